"""Is the frozen base what diffusers loads and quanto quantises, tensor by tensor?"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import Kandinsky5Transformer3DModel
from optimum.quanto import QLinear, freeze, qint8, quantize
from optimum.quanto.library.qbytes_mm import qbytes_mm
from safetensors.torch import load_file, save_file
from torch import nn

from k5cache.shared.errors import ModelError
from k5train.base import quantize as loading
from k5train.base.linear import Float32Linear, Int8Linear
from k5train.base.quantize import INT8_MODULES, load_transformer, quantize_int8

QUANTO_INCLUDE = [
    "*_transformer_blocks.*.self_attention.*",
    "*_transformer_blocks.*.cross_attention.*",
    "*.feed_forward.*",
]
DTYPES = [torch.float32, torch.bfloat16]


def reference(folder: Path, dtype: torch.dtype) -> Kandinsky5Transformer3DModel:
    return Kandinsky5Transformer3DModel.from_pretrained(folder, subfolder="transformer", torch_dtype=dtype)


def quanto_reference(folder: Path, dtype: torch.dtype) -> Kandinsky5Transformer3DModel:
    model = reference(folder, dtype)
    quantize(model, weights=qint8, include=QUANTO_INCLUDE)
    freeze(model)
    return model


def a_pair(dtype: torch.dtype, bias: bool = True) -> tuple[Int8Linear, QLinear]:
    """Our linear and quanto's, made of the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        linear = nn.Linear(48, 40, bias=bias, dtype=dtype)
    theirs = QLinear.from_module(linear, weights=qint8)
    weight, scale = quantize_int8(linear.weight.detach())
    theirs.freeze()
    return Int8Linear(weight, scale, None if linear.bias is None else linear.bias.detach()), theirs


def inputs(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(2, 7, 48, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


@pytest.mark.parametrize("bias", [True, False])
def test_the_int8_linear_is_quantos_bit_for_bit_forward_and_backward(bias):
    ours, theirs = a_pair(torch.float32, bias)
    x, y = inputs(torch.float32), inputs(torch.float32)
    assert torch.equal(ours(x), theirs(y))
    ours(x).square().sum().backward()
    theirs(y).square().sum().backward()
    assert torch.equal(x.grad, y.grad)


def test_in_bfloat16_it_is_quantos_gpu_formula_bit_for_bit_and_its_cpu_kernel_within_rounding():
    ours, theirs = a_pair(torch.bfloat16)
    x, y = inputs(torch.bfloat16), inputs(torch.bfloat16)
    formula = qbytes_mm(x.reshape(-1, 48), ours.weight, ours.scale).reshape(2, 7, 40) + ours.bias
    assert torch.equal(ours(x), formula)
    # On a CPU quanto takes _weight_int8pack_mm, which scales the product: the weight is not rounded to bfloat16 first.
    torch.testing.assert_close(ours(x), theirs(y), rtol=2**-7, atol=2**-7)
    ours(x).float().square().sum().backward()
    ours_grad = torch.matmul((2 * ours(x).float()).bfloat16(), ours.scale * ours.weight)
    assert torch.equal(x.grad, ours_grad)


def test_the_int8_linear_keeps_nothing_of_the_step_for_backward():
    ours, theirs = a_pair(torch.float32)

    def kept(module: nn.Module) -> int:
        own = {id(t) for t in [*module.parameters(), *module.buffers()]}
        sizes: list[int] = []

        def pack(t: torch.Tensor) -> torch.Tensor:
            sizes.append(0 if id(t) in own else t.nbytes)
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            module(inputs(torch.float32))
        return sum(sizes)

    assert kept(ours) == 0
    assert kept(theirs) > 0  # a check of the check itself: quanto keeps its input


def test_the_int8_linear_is_a_linear_whose_state_is_plain_buffers():
    ours, _ = a_pair(torch.bfloat16)
    assert isinstance(ours, nn.Linear)
    assert {n: t.dtype for n, t in ours.state_dict().items()} == {
        "weight": torch.int8,
        "scale": torch.bfloat16,
        "bias": torch.bfloat16,
    }
    assert [n for n, p in ours.named_parameters() if p.requires_grad] == []
    assert repr(ours) == "Int8Linear(in_features=48, out_features=40, bias=True)"
    with pytest.raises(ValueError, match="int8"):
        Int8Linear(torch.zeros(4, 4), torch.ones(4, 1))


def test_the_int8_linear_traces_into_one_graph():
    ours, _ = a_pair(torch.float32)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    x, y = inputs(torch.float32), inputs(torch.float32)
    out = compiled(x)
    assert torch.equal(out, ours(y))
    out.sum().backward()
    ours(y).sum().backward()
    assert torch.equal(x.grad, y.grad)


def test_a_float32_linear_computes_what_its_upcast_weights_say():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        linear = nn.Linear(8, 6, dtype=torch.bfloat16)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    ours = Float32Linear(linear.weight.detach(), linear.bias.detach())
    assert ours.weight.dtype == torch.bfloat16
    assert torch.equal(ours(x), linear.float()(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_quantisation_every_tensor_and_table_is_the_one_from_pretrained_has(toy_model, dtype):
    ours, theirs = load_transformer(toy_model, "no_change", dtype, "cpu"), reference(toy_model, dtype)
    state = ours.state_dict()
    assert set(state) == set(theirs.state_dict())
    for name, tensor in theirs.state_dict().items():
        is_float32 = any(part in theirs._keep_in_fp32_modules for part in name.split("."))
        assert state[name].dtype == (dtype if is_float32 else tensor.dtype), name  # the toy is bf16, as the hub is
        assert torch.equal(state[name].to(tensor.dtype), tensor), name
    assert torch.equal(ours.time_embeddings.freqs, theirs.time_embeddings.freqs)
    tables = dict(ours.named_buffers())
    assert len(tables) == 4
    for name, table in theirs.named_buffers():
        assert torch.equal(tables[name], table), name
    assert ours.dtype == theirs.dtype == dtype
    assert not ours.training
    assert not any(p.requires_grad for p in ours.parameters())


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_weights_and_scales_are_quantos_exactly(toy_model, dtype):
    ours, theirs = load_transformer(toy_model, "int8-quanto", dtype, "cpu"), quanto_reference(toy_model, dtype)
    quantised = {n: m for n, m in theirs.named_modules() if isinstance(m, QLinear)}
    assert {n for n, m in ours.named_modules() if isinstance(m, Int8Linear)} == set(quantised)
    assert len(quantised) == 2 * 6 + 3 * 10  # q, k, v, out (twice in a visual block) and the two of the feed-forward
    for name, module in quantised.items():
        mine = ours.get_submodule(name)
        assert torch.equal(mine.weight, module.weight._data), name
        assert torch.equal(mine.scale, module.weight._scale), name
        assert mine.scale.dtype == dtype
        assert (mine.bias is None) == (module.bias is None)
        assert mine.bias is None or torch.equal(mine.bias, module.bias)


def test_what_becomes_int8_is_what_quantos_wildcards_include(toy_model):
    names = [n for n, m in reference(toy_model, torch.float32).named_modules() if isinstance(m, nn.Linear)]
    chosen = {n for n in names if INT8_MODULES.fullmatch(n)}
    rest = {n.rsplit(".", 2)[-2] + "." + n.rsplit(".", 1)[-1] for n in set(names) - chosen}
    assert rest == {
        *("time_embeddings.in_layer", "time_embeddings.out_layer", "text_embeddings.in_layer"),
        *("pooled_text_embeddings.in_layer", "visual_embeddings.in_layer", "text_modulation.out_layer"),
        *("visual_modulation.out_layer", "modulation.out_layer", "out_layer.out_layer"),
    }


def test_a_checkpoint_in_several_files_loads_the_same(toy_model, tmp_path):
    state = load_file(next((toy_model / "transformer").glob("*.safetensors")))
    target = copy_without_weights(toy_model, tmp_path)
    names = sorted(state)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}  # weights and biases in different files
    for file, members in parts.items():
        save_file({n: state[n] for n in members}, target / file)
    index = {"metadata": {}, "weight_map": {n: f for f, members in parts.items() for n in members}}
    (target / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    whole = load_transformer(toy_model, "int8-quanto", torch.bfloat16, "cpu").state_dict()
    split = load_transformer(tmp_path, "int8-quanto", torch.bfloat16, "cpu").state_dict()
    assert list(whole) == list(split)
    assert all(torch.equal(whole[n], split[n]) for n in whole)


def test_the_loaded_model_does_not_lean_on_the_file(toy_model, tmp_path):
    shutil.copytree(toy_model / "transformer", tmp_path / "transformer")
    model = load_transformer(tmp_path, "no_change", torch.bfloat16, "cpu")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    file = next((tmp_path / "transformer").glob("*.safetensors"))
    with file.open("r+b") as opened:
        opened.seek(-1000, 2)
        opened.write(b"\x7f" * 1000)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_a_file_read_through_many_small_maps_loads_the_same(toy_model, monkeypatch):
    whole = load_transformer(toy_model, "int8-quanto", torch.bfloat16, "cpu").state_dict()
    monkeypatch.setattr(loading, "_BYTES_MAPPED_AT_ONCE", 10_000)  # the toy's transformer has 4 MB
    pieces = load_transformer(toy_model, "int8-quanto", torch.bfloat16, "cpu").state_dict()
    assert list(whole) == list(pieces)
    assert all(torch.equal(whole[n], pieces[n]) for n in whole)


def copy_without_weights(toy_model: Path, folder: Path) -> Path:
    target = folder / "transformer"
    target.mkdir()
    shutil.copy(toy_model / "transformer" / "config.json", target)
    return target


@pytest.fixture
def broken(toy_model, tmp_path):
    """Load the toy with some of its tensors changed; returns the error's text."""
    state = load_file(next((toy_model / "transformer").glob("*.safetensors")))

    def load(drop: tuple[str, ...] = (), config: dict[str, object] | None = None, **add: torch.Tensor) -> str:
        target = copy_without_weights(toy_model, tmp_path)
        changed = {n: t for n, t in state.items() if n not in drop} | {n.replace("__", "."): t for n, t in add.items()}
        save_file(changed, target / "model.safetensors")
        path = target / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
        with pytest.raises(ModelError) as caught:
            load_transformer(tmp_path, "int8-quanto", torch.bfloat16, "cpu")
        return str(caught.value)

    return load


def test_a_missing_tensor_is_named(broken):
    name = "visual_transformer_blocks.1.self_attention.to_key.weight"
    assert f"lacks {name}\n" in broken(drop=(name,))


def test_an_unknown_tensor_is_named(broken):
    assert "does not know: extra.weight\n" in broken(extra__weight=torch.zeros(2))


def test_a_misshapen_tensor_is_named_with_both_shapes(broken):
    assert "text_embeddings.in_layer.bias is [3], expected [128]" in broken(
        text_embeddings__in_layer__bias=torch.zeros(3)
    )


def test_a_config_of_another_size_is_named(broken):
    message = broken(config={"num_visual_blocks": 4})
    assert "lacks visual_transformer_blocks.3." in message
    assert "more" in message


def test_another_models_config_is_refused(broken):
    assert "a FluxTransformer2DModel, not a Kandinsky5Transformer3DModel" in broken(
        config={"_class_name": "FluxTransformer2DModel"}
    )


def test_a_video_model_is_refused(broken):
    assert "a video model" in broken(config={"attention_type": "nabla"})


def test_an_impossible_config_is_refused(broken):
    assert "cannot be built" in broken(config={"model_dim": 100})


def test_a_truncated_file_is_named(toy_model, tmp_path):
    target = copy_without_weights(toy_model, tmp_path)
    whole = next((toy_model / "transformer").glob("*.safetensors")).read_bytes()
    (target / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read"):
        load_transformer(tmp_path, "int8-quanto", torch.bfloat16, "cpu")
