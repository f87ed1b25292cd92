"""Does the adapter sit where it should, start as it should, and mean the same to diffusers when it is saved?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import Kandinsky5T2IPipeline, Kandinsky5Transformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from k5cache.shared.errors import RecipeError, RunError
from k5train.adapter import attach, files
from k5train.adapter.targets import Matched, describe, match_targets
from k5train.base.quantize import load_transformer
from k5train.forward.predict_velocity import predict_velocity
from k5train.options.adapter import LoraConfig

# The official trainer's configs/trainer/lora_image.yaml, read as peft reads a list: ends of dotted names.
OFFICIAL = [
    *(f"{a}_attention.{m}" for a in ("self", "cross") for m in ("to_query", "to_key", "to_value", "out_layer")),
    *("feed_forward.in_layer", "feed_forward.out_layer"),
]


def base(toy_model: Path, precision: str = "int8-quanto", dtype: torch.dtype = torch.float32):
    return load_transformer(toy_model, precision, dtype, "cpu")


def a_batch() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(2, 1, 6, 4, 16, generator=generator)
    embeds = torch.randn(2, 9, 64, generator=generator)
    return latents, torch.tensor([0.3, 0.8]), embeds, torch.randn(2, 48, generator=generator)


def trained(transformer: Kandinsky5Transformer3DModel, config: LoraConfig, size: float = 0.5) -> Matched:
    """An adapter whose B is no longer zero."""
    matched = attach.add_lora(transformer, config, seed=1)
    generator = torch.Generator().manual_seed(2)
    for parameter in attach.lora_parameters(transformer)[1::2]:
        parameter.data = torch.randn(parameter.shape, generator=generator) * size
    return matched


@torch.no_grad()
def velocity(transformer: Kandinsky5Transformer3DModel) -> torch.Tensor:
    return predict_velocity(transformer, *a_batch())


@pytest.fixture(scope="module")
def plain(toy_model):
    """A transformer that tests do not change."""
    return base(toy_model)


def test_the_official_preset_is_the_official_trainers_list_in_text_and_visual_blocks(plain):
    linears = [n for n, m in plain.named_modules() if isinstance(m, torch.nn.Linear)]
    theirs = {n for n in linears if any(n.endswith(f".{t}") for t in OFFICIAL)}
    matched = match_targets(plain, ["official"])
    assert set(matched.modules) == theirs
    assert len(theirs) == 2 * 6 + 3 * 10
    assert not any("modulation" in n or "embeddings" in n for n in theirs)
    assert match_targets(plain, OFFICIAL).modules != ()
    assert set(match_targets(plain, OFFICIAL).modules) == theirs


@pytest.mark.parametrize(("preset", "count"), [("attention", 2 * 4 + 3 * 8), ("qkv", 2 * 3 + 3 * 6)])
def test_presets_nest(plain, preset, count):
    names = set(match_targets(plain, [preset]).modules)
    assert len(names) == count
    assert names < set(match_targets(plain, ["official"]).modules)


@pytest.mark.parametrize(
    ("target", "names"),
    [
        ("visual_transformer_blocks.1.cross_attention.to_key", ["visual_transformer_blocks.1.cross_attention.to_key"]),
        ("cross_attention.to_key", [f"visual_transformer_blocks.{i}.cross_attention.to_key" for i in range(3)]),
        (
            r"text_.*\.1\.feed_forward\.\w+",
            [f"text_transformer_blocks.1.feed_forward.{m}_layer" for m in ("in", "out")],
        ),
        ("text_modulation.out_layer", [f"text_transformer_blocks.{i}.text_modulation.out_layer" for i in range(2)]),
        ("out_layer.out_layer", ["out_layer.out_layer"]),
    ],
)
def test_a_pattern_is_the_end_of_a_name_or_a_regular_expression(plain, target, names):
    assert list(match_targets(plain, [target]).modules) == names


def test_a_module_matched_twice_is_adapted_once_and_both_patterns_say_so(plain):
    matched = match_targets(plain, ["qkv", "cross_attention.to_key"])
    assert len(matched.patterns["cross_attention.to_key"]) == 3
    assert matched.modules == match_targets(plain, ["qkv"]).modules
    assert describe(matched).splitlines()[1] == ("LoRA on 3 modules by cross_attention.to_key: cross_attention.to_key")


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("to_querry", r"'to_querry' matches no module\nDid you mean to_query"),
        ("offical", "Did you mean official"),
        ("self_attention.to_k", "self_attention.to_key"),
        ("to_q", "Did you mean to_query"),
        ("zzz", "Did you mean"),
        (
            "out_layer",
            r"also matches 8 modules of .*visual_modulation.*\nWrite the parent too: self_attention.out_layer, f",
        ),
        (r".*\.out_layer", "also matches"),
        ("in_layer", "also matches 4 modules of time_embeddings"),
        ("(", "not a regular expression"),
    ],
)
def test_a_pattern_that_hits_nothing_or_too_much_is_refused_with_a_way_out(plain, target, words):
    with pytest.raises(RecipeError, match=words):
        match_targets(plain, ["official", target])


def test_only_the_adapter_is_trained_and_it_is_float32_on_any_base(toy_model):
    for precision in ("int8-quanto", "no_change"):
        transformer = base(toy_model, precision, torch.bfloat16)
        before = transformer.dtype
        matched = attach.add_lora(transformer, LoraConfig(rank=4), seed=1)
        trainable = {n: p for n, p in transformer.named_parameters() if p.requires_grad}
        assert len(trainable) == 2 * len(matched.modules) == 84
        assert all(".lora_A." in n or ".lora_B." in n for n in trainable)
        assert {p.dtype for p in trainable.values()} == {torch.float32}
        assert [id(p) for p in trainable.values()] == [id(p) for p in attach.lora_parameters(transformer)]
        assert transformer.dtype == before == torch.bfloat16


def test_the_start_is_pefts_and_changes_nothing_yet(toy_model):
    transformer = base(toy_model)
    before = velocity(transformer)
    attach.add_lora(transformer, LoraConfig(rank=8), seed=1)
    assert torch.equal(velocity(transformer), before)
    state = files.lora_state_dict(transformer)
    for key, tensor in state.items():
        if ".lora_A." in key:  # kaiming_uniform(a=sqrt(5)): uniform in +-1/sqrt(in)
            bound = tensor.shape[1] ** -0.5
            assert 0.9 * bound < tensor.abs().max() <= bound, key
            assert abs(tensor.mean()) < 0.15 * bound, key
        else:
            assert not tensor.any(), key


def test_the_start_depends_on_seed_and_module_and_on_nothing_else(toy_model):
    def start(seed: int, targets: tuple[str, ...], precision: str, global_seed: int) -> dict[str, torch.Tensor]:
        with torch.random.fork_rng():
            torch.manual_seed(global_seed)
            transformer = base(toy_model, precision, torch.bfloat16)
            state = torch.random.get_rng_state()
            attach.add_lora(transformer, LoraConfig(rank=4, targets=targets), seed)
            assert torch.equal(torch.random.get_rng_state(), state)
        return {k: t for k, t in files.lora_state_dict(transformer).items() if ".lora_A." in k}

    whole = start(1, ("official",), "int8-quanto", 0)
    some = start(1, ("cross_attention.to_key", "qkv"), "no_change", 99)
    assert set(some) < set(whole)
    assert all(torch.equal(whole[k], t) for k, t in some.items())
    assert len({t.flatten()[0].item() for t in whole.values()}) == len(whole)  # no two modules start alike
    assert not any(torch.equal(whole[k], t) for k, t in start(2, ("qkv",), "no_change", 0).items())


@pytest.mark.parametrize("precision", ["int8-quanto", "no_change"])
def test_gradients_reach_every_part_of_the_adapter_and_nothing_else(toy_model, precision):
    transformer = base(toy_model, precision, torch.bfloat16)
    trained(transformer, LoraConfig(rank=4))
    predict_velocity(transformer, *a_batch(), gradient_checkpointing=True).float().square().mean().backward()
    for name, parameter in transformer.named_parameters():
        assert (parameter.grad is not None) == (".lora_" in name), name
        assert parameter.grad is None or parameter.grad.abs().max() > 0, name


def test_gradients_on_the_int8_base_are_those_on_a_linear_with_the_dequantised_weight(toy_model):
    grads = []
    for dequantised in (False, True):
        transformer = base(toy_model, "int8-quanto")
        if dequantised:
            for name, module in list(transformer.named_modules()):
                if type(module).__name__ == "Int8Linear":
                    linear = torch.nn.Linear(module.in_features, module.out_features, module.bias is not None)
                    linear.weight.data, linear.bias = module.scale * module.weight, module.bias
                    transformer.set_submodule(name, linear)
        trained(transformer, LoraConfig(rank=4))
        predict_velocity(transformer, *a_batch()).square().mean().backward()
        grads.append([p.grad for p in attach.lora_parameters(transformer)])
    for ours, theirs in zip(*grads, strict=True):  # the bias is added apart from the matmul: float32 rounding
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())


def test_the_file_holds_only_what_diffusers_loads(toy_model, tmp_path):
    transformer = base(toy_model)
    matched = trained(transformer, LoraConfig(rank=4, alpha=6.0))
    files.save_lora(tmp_path / "new" / "one.safetensors", transformer, {"name": "one"})
    path = tmp_path / "new" / "one.safetensors"
    state = load_file(path)
    expected = {f"transformer.{n}.lora_{p}.weight" for n in matched.modules for p in "AB"}
    assert set(state) == expected
    assert {t.dtype for t in state.values()} == {torch.float32}
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "name": "one"}  # no lora_adapter_metadata: the tensors say it all
    assert [p.name for p in path.parent.iterdir()] == ["one.safetensors"]
    name = matched.modules[0]
    layer = transformer.get_submodule(name)
    assert torch.equal(state[f"transformer.{name}.lora_A.weight"], layer.lora_A["default"].weight)
    assert torch.equal(state[f"transformer.{name}.lora_B.weight"], layer.lora_B["default"].weight * 1.5)  # alpha / rank


def test_a_16_bit_file_is_the_float32_one_rounded(toy_model, tmp_path):
    transformer = base(toy_model)
    trained(transformer, LoraConfig(rank=4, alpha=3.0))
    files.save_lora(tmp_path / "a.safetensors", transformer, dtype=torch.bfloat16)
    small, exact = load_file(tmp_path / "a.safetensors"), files.lora_state_dict(transformer)
    assert all(torch.equal(small[k], t.bfloat16()) for k, t in exact.items())


def test_a_saved_file_may_be_read_by_whom_the_umask_lets(toy_model, tmp_path):
    transformer = base(toy_model)
    trained(transformer, LoraConfig(rank=2, targets=("qkv",)))
    files.save_lora(tmp_path / "a.safetensors", transformer)
    (tmp_path / "other").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_save_that_fails_leaves_the_old_file(toy_model, tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")

    def full(state, temporary, metadata):
        Path(temporary).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        files.save_lora(path, base(toy_model))
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize(
    ("dtype", "alpha", "atol"),
    [
        (torch.float32, None, 0.0),
        (torch.float32, 8.0, 0.0),  # alpha / rank = 2: folding it is exact
        (torch.float32, 3.0, 5e-4),  # folding 0.75 rounds B, and a rotated query is rounded to bfloat16 even here
        (torch.bfloat16, None, 2**-5),  # the pipeline casts the adapter to bfloat16, we train it in float32
    ],
)
def test_the_pipeline_loads_every_tensor_and_draws_what_we_trained(toy_model, tmp_path, dtype, alpha, atol):
    ours = base(toy_model, "no_change", dtype)
    matched = trained(ours, LoraConfig(rank=4, alpha=alpha))
    files.save_lora(tmp_path / "a.safetensors", ours)
    pipeline = Kandinsky5T2IPipeline.from_pretrained(toy_model, dtype=dtype)
    before = velocity(pipeline.transformer)
    pipeline.load_lora_weights(tmp_path / "a.safetensors", adapter_name="mine")

    loaded = {n: t for n, t in pipeline.transformer.state_dict().items() if ".lora_" in n}
    saved = load_file(tmp_path / "a.safetensors")
    assert len(loaded) == len(saved) == 2 * len(matched.modules)
    for key, tensor in saved.items():
        assert torch.equal(
            loaded[key.removeprefix("transformer.").replace(".weight", ".mine.weight")], tensor.to(dtype)
        ), key

    after, trained_form = velocity(pipeline.transformer), velocity(ours)
    change = (after - before).float().abs().max().item()
    assert change > max(0.1, 2 * atol)
    torch.testing.assert_close(trained_form, after, rtol=0, atol=atol)


def test_an_adapter_of_several_ranks_means_the_same_to_diffusers(toy_model, tmp_path):
    ours = base(toy_model, "no_change")
    trained(ours, LoraConfig(rank=4))
    files.save_lora(tmp_path / "a.safetensors", ours)
    state = load_file(tmp_path / "a.safetensors")
    for key in list(state):  # rank 3 on one kind of module
        if "cross_attention.to_key" in key:
            state[key] = (state[key][:3] if "lora_A" in key else state[key][:, :3]).contiguous()
    save_file(state, tmp_path / "b.safetensors")
    theirs = Kandinsky5Transformer3DModel.from_pretrained(toy_model, subfolder="transformer", torch_dtype=torch.float32)
    theirs.load_lora_adapter(str(tmp_path / "b.safetensors"))
    fresh = base(toy_model, "no_change")
    files.load_lora(fresh, tmp_path / "b.safetensors")
    assert torch.equal(velocity(fresh), velocity(theirs))
    assert not torch.equal(velocity(fresh), velocity(ours))


@pytest.mark.parametrize("alpha", [None, 8.0])
def test_a_saved_adapter_loads_back_into_a_bare_base_and_into_its_own_kind(toy_model, tmp_path, alpha):
    ours = base(toy_model)
    matched = trained(ours, LoraConfig(rank=4, alpha=alpha))
    files.save_lora(tmp_path / "a.safetensors", ours)
    bare, adapted = base(toy_model), base(toy_model)
    attach.add_lora(adapted, LoraConfig(rank=4, alpha=alpha), seed=7)
    for other in (bare, adapted):
        assert files.load_lora(other, tmp_path / "a.safetensors") == matched.modules
        assert torch.equal(velocity(other), velocity(ours))
        assert all(
            torch.equal(a, b) for a, b in zip(*(files.lora_state_dict(t).values() for t in (other, ours)), strict=True)
        )
    assert all(
        torch.equal(a, b) for a, b in zip(attach.lora_parameters(adapted), attach.lora_parameters(ours), strict=True)
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda s: {k.replace("_transformer_blocks", "_single_blocks", 1): t for k, t in s.items()},
            "is a LoRA of another model",
        ),
        (lambda s: s | {"transformer.x.alpha": torch.ones(1)}, "adapts x, which this model does not have"),
        (lambda s: dict(list(s.items())[1:]), "half of the pair for text_transformer_blocks"),
        (lambda s: {k.replace("blocks.1", "blocks.7"): t for k, t in s.items()}, "which this model does not have"),
        (lambda s: {k: t[..., :-1].contiguous() for k, t in s.items()}, "belongs to a model of another size"),
        (lambda s: {k: t / 0 for k, t in s.items()}, "has NaN or infinity in 48 of 48 tensors"),
        (lambda s: {}, "no tensors"),
    ],
)
def test_a_file_that_is_not_such_a_lora_is_named(toy_model, tmp_path, change, words):
    transformer = base(toy_model)
    attach.add_lora(transformer, LoraConfig(rank=4, targets=("qkv",)), seed=1)
    save_file(change(files.lora_state_dict(transformer)), tmp_path / "a.safetensors")
    with pytest.raises(RunError, match=words):
        files.load_lora(base(toy_model), tmp_path / "a.safetensors")


def test_a_lora_of_other_targets_or_rank_does_not_load_into_an_adapter(toy_model, tmp_path):
    transformer = base(toy_model)
    attach.add_lora(transformer, LoraConfig(rank=4, targets=("qkv",)), seed=1)
    files.save_lora(tmp_path / "a.safetensors", transformer)
    for config, words in ((LoraConfig(rank=4), "they differ in"), (LoraConfig(rank=2, targets=("qkv",)), "expected")):
        other = base(toy_model)
        attach.add_lora(other, config, seed=1)
        with pytest.raises(RunError, match=words):
            files.load_lora(other, tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"nothing")
    with pytest.raises(RunError, match="cannot be read"):
        files.load_lora(transformer, tmp_path / "b.safetensors")


def test_dropout_acts_in_training_only(toy_model):
    transformer = base(toy_model)
    trained(transformer, LoraConfig(rank=4, dropout=0.5))
    transformer.eval()
    assert torch.equal(velocity(transformer), velocity(transformer))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer.train()
        assert not torch.equal(velocity(transformer), velocity(transformer))
