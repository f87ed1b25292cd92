"""Is each kind of adapter what peft says, does diffusers load it, and can training start from anyone's LoRA?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import Kandinsky5T2IPipeline
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from k5cache.shared.errors import RecipeError, RunError
from k5cache.shared.recipe import parse
from k5train.adapter import attach, files, targets
from k5train.base.linear import Int8Linear
from k5train.base.quantize import load_transformer
from k5train.forward.predict_velocity import predict_velocity
from k5train.options.adapter import LoraConfig, RankConfig
from k5train.options.train import TrainConfig
from k5train.planning.plan import how_to_run
from tests.test_lora import a_batch, velocity

QKV = ("qkv",)
NAME = "visual_transformer_blocks.1.cross_attention.to_key"


def base(toy_model: Path, precision: str = "no_change"):
    return load_transformer(toy_model, precision, torch.float32, "cpu")


def stirred(transformer, config: LoraConfig) -> targets.Matched:
    """An adapter with every part moved away from its initial value."""
    matched = attach.add_lora(transformer, config, seed=1)
    generator = torch.Generator().manual_seed(2)
    for parameter in attach.lora_parameters(transformer):
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return matched


@pytest.fixture(scope="module")
def pipeline(toy_model):
    """diffusers' own pipeline. Tests must leave its transformer unchanged."""
    return Kandinsky5T2IPipeline.from_pretrained(toy_model, dtype=torch.float32)


def by_pipeline(pipeline, path: Path) -> None:
    pipeline.load_lora_weights(path)


def by_transformer(pipeline, path: Path) -> None:
    pipeline.transformer.load_lora_adapter(str(path), prefix="transformer")


def through_diffusers(pipeline, path: Path, load=by_pipeline) -> tuple[torch.Tensor, torch.Tensor]:
    """The velocity of diffusers' own transformer before and after ``load(pipeline, path)``."""
    before = velocity(pipeline.transformer)
    load(pipeline, path)
    after = velocity(pipeline.transformer)
    pipeline.transformer.unload_lora()
    assert torch.equal(velocity(pipeline.transformer), before)
    return before, after


def test_rslora_is_scaled_by_the_root_of_its_rank(toy_model, pipeline, tmp_path):
    ours = base(toy_model)
    stirred(ours, LoraConfig(algo="rslora", rank=4, alpha=6.0, targets=QKV))
    layer = ours.get_submodule(NAME)
    assert isinstance(layer, LoraLayer)
    assert layer.scaling["default"] == 6.0 / 4**0.5
    files.save_lora(tmp_path / "a.safetensors", ours)
    saved = load_file(tmp_path / "a.safetensors")[f"transformer.{NAME}.lora_B.weight"]
    assert torch.equal(saved, layer.lora_B["default"].weight * 3.0)
    _, after = through_diffusers(pipeline, tmp_path / "a.safetensors")
    torch.testing.assert_close(velocity(ours), after, rtol=0, atol=5e-4)  # rounding of rotated queries, as test_lora


def test_dora_loads_into_the_pipeline_magnitudes_and_all(toy_model, pipeline, tmp_path):
    ours = base(toy_model)
    start = velocity(ours)
    attach.add_lora(ours, LoraConfig(algo="dora", rank=4, targets=QKV), seed=1)
    torch.testing.assert_close(velocity(ours), start, rtol=0, atol=2e-2)  # the norm divides and multiplies again
    matched = stirred(fresh := base(toy_model), LoraConfig(algo="dora", rank=4, targets=QKV))
    files.save_lora(tmp_path / "a.safetensors", fresh)
    state = load_file(tmp_path / "a.safetensors")
    assert len(state) == 3 * len(matched.modules)
    assert f"transformer.{NAME}.lora_magnitude_vector" in state
    before, after = through_diffusers(pipeline, tmp_path / "a.safetensors")
    assert (after - before).abs().max() > 0.1
    torch.testing.assert_close(velocity(fresh), after, rtol=0, atol=5e-4)
    again = base(toy_model)
    assert set(files.load_lora(again, tmp_path / "a.safetensors")) == set(matched.modules)
    torch.testing.assert_close(velocity(again), after, rtol=0, atol=5e-4)


def dequantized(transformer):
    """The same model with plain linears that have the weights which the int8 linears multiply with."""
    for name, module in list(transformer.named_modules()):
        if isinstance(module, Int8Linear):
            plain = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            plain.weight.data = module.scale * module.weight
            plain.bias = module.bias
            parent, _, leaf = name.rpartition(".")
            setattr(transformer.get_submodule(parent), leaf, plain.requires_grad_(False))
    return transformer


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dora_on_the_int8_base_is_pefts_on_the_weights_that_are_multiplied_with(toy_model, dropout):
    config = LoraConfig(algo="dora", rank=4, targets=QKV, dropout=dropout)
    velocities = []
    for transformer in (base(toy_model, "int8-quanto"), dequantized(base(toy_model, "int8-quanto"))):
        attach.add_lora(transformer, config, seed=1)
        start = transformer.get_submodule(NAME).lora_magnitude_vector["default"].weight.detach().clone()
        generator = torch.Generator().manual_seed(2)
        for parameter in attach.lora_parameters(transformer):
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
        transformer.train()
        torch.manual_seed(3)
        out = predict_velocity(transformer, *a_batch())
        out.square().mean().backward()
        grads = {n: p.grad for n, p in transformer.named_parameters() if p.grad is not None}
        velocities.append({"start": start, "velocity": out.detach(), **grads})
    ours, theirs = velocities
    assert ours.keys() == theirs.keys()
    assert any("lora_magnitude_vector" in name for name in ours)
    assert torch.equal(ours["start"], theirs["start"])
    for name, tensor in theirs.items():  # the int8 linear adds its bias apart; rotated queries are rounded to bfloat16
        assert (ours[name] - tensor).norm() <= 5e-3 * tensor.norm(), name


@pytest.mark.parametrize("algo", ["dora", "lokr"])
def test_what_runs_as_pefts_modules_is_refused_on_int8_arithmetic_and_planned_as_not_compiled(algo):
    with pytest.raises(RecipeError, match="runs as peft's modules"):
        parse({"train": {"lora": {"algo": algo}, "base_model_precision": "int8-dynamic"}}, {"train": TrainConfig})
    (config,) = parse({"train": {"lora": {"algo": algo}}}, {"train": TrainConfig})
    assert how_to_run(config, torch.device("cuda")) == "eager"
    assert how_to_run(TrainConfig(), torch.device("cuda")) == "compiled"


@pytest.mark.parametrize("start", ["pissa", "olora", "gaussian"])
def test_a_start_that_changes_the_base_is_refused_with_the_reason(start):
    with pytest.raises(RecipeError, match=r"train\.lora\.init_lora_weights .* frozen, int8 and shared by every run"):
        parse({"train": {"lora": {"init_lora_weights": start}}}, {"train": TrainConfig})


@pytest.mark.parametrize(
    ("precision", "options"),
    [
        ("no_change", {"rank": 4}),
        ("no_change", {"rank": 2, "decompose_factor": 4}),
        ("no_change", {"rank": 1000}),  # both factors whole
        ("int8-quanto", {"rank": 4}),
    ],
)
def test_lokr_trains_and_diffusers_loads_it_by_the_transformer(toy_model, pipeline, tmp_path, precision, options):
    ours = base(toy_model, precision)
    start = velocity(ours)
    config = LoraConfig(algo="lokr", targets=QKV, **options)
    attach.add_lora(ours, config, seed=1)
    assert torch.equal(velocity(ours), start)
    predict_velocity(ours, *a_batch()).square().mean().backward()
    parameters = attach.lora_parameters(ours)
    assert {p.dtype for p in parameters} == {torch.float32}
    assert [id(p) for p in ours.parameters() if p.requires_grad] == [id(p) for p in parameters]
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in parameters)

    stirred(fresh := base(toy_model, precision), config)
    files.save_lora(tmp_path / "a.safetensors", fresh)
    again = base(toy_model, precision)
    files.load_lora(again, tmp_path / "a.safetensors")
    torch.testing.assert_close(velocity(again), velocity(fresh), rtol=0, atol=5e-4)
    if precision == "no_change":
        before, after = through_diffusers(pipeline, tmp_path / "a.safetensors", by_transformer)
        assert (after - before).abs().max() > 0.1
        torch.testing.assert_close(velocity(fresh), after, rtol=0, atol=5e-4)


def test_the_help_says_what_diffusers_pipeline_does_with_lokr(toy_model, pipeline, tmp_path):
    stirred(ours := base(toy_model), LoraConfig(algo="lokr", rank=4, targets=QKV))
    files.save_lora(tmp_path / "a.safetensors", ours)
    with pytest.raises(ValueError, match="Invalid"):  # the day this loads, the help of train.lora.algo is out of date
        through_diffusers(pipeline, tmp_path / "a.safetensors")


def test_the_start_of_lokr_depends_on_seed_and_module_alone(toy_model):
    config = LoraConfig(algo="lokr", rank=4, targets=QKV)
    states = []
    for global_seed in (0, 1):
        with torch.random.fork_rng():
            torch.manual_seed(global_seed)
            attach.add_lora(ours := base(toy_model), config, seed=5)
            states.append(files.lora_state_dict(ours))
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_each_target_can_have_a_rank_of_its_own_and_the_last_that_matches_counts(toy_model, pipeline, tmp_path):
    ranks = (RankConfig("attention", 2), RankConfig("cross_attention.to_key", 3))
    ours = base(toy_model)
    stirred(ours, LoraConfig(rank=6, ranks=ranks))
    rank_of = {n: m.r["default"] for n, m in ours.named_modules() if isinstance(m, LoraLayer)}
    assert rank_of[NAME] == 3
    assert rank_of["visual_transformer_blocks.1.self_attention.to_key"] == 2
    assert rank_of["visual_transformer_blocks.1.feed_forward.in_layer"] == 6
    assert {m.scaling["default"] for m in ours.modules() if isinstance(m, LoraLayer)} == {1.0}
    files.save_lora(tmp_path / "a.safetensors", ours)
    _, after = through_diffusers(pipeline, tmp_path / "a.safetensors")
    assert torch.equal(velocity(ours), after)
    matched = attach.add_lora(other := base(toy_model), LoraConfig(rank=6, ranks=ranks, alpha=12.0), seed=1)
    said = targets.describe(matched).splitlines()
    assert said[1].startswith("rank 2 on 29 modules: self_attention.to_query, self_attention.to_key")
    assert said[2:] == [
        "rank 3 on 3 modules: cross_attention.to_key",
        "rank 6 on 10 modules: feed_forward.in_layer, feed_forward.out_layer",
    ]
    assert other.get_submodule(NAME).scaling["default"] == 4.0


def test_a_rank_for_what_is_not_adapted_is_refused(toy_model):
    config = LoraConfig(targets=QKV, ranks=(RankConfig("feed_forward.in_layer", 3),))
    with pytest.raises(RecipeError, match=r"train.lora.ranks: .* matches no module that train.lora.targets adapts"):
        attach.add_lora(base(toy_model), config, seed=1)
    with pytest.raises(RecipeError, match=r"train.lora.ranks: 'to_kay' matches no module"):
        attach.add_lora(base(toy_model), LoraConfig(ranks=(RankConfig("to_kay", 3),)), seed=1)


def kohya(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The LoRA as kohya's scripts write it: flat names, an alpha of half the rank that is not folded into B."""
    tensors = {}
    for key, tensor in state.items():
        name, _, part = key.removeprefix("transformer.").rpartition(".lora_")
        flat = "lora_unet_" + name.replace(".", "_")
        tensors[f"{flat}.lora_down.weight" if part[0] == "A" else f"{flat}.lora_up.weight"] = (
            tensor if part[0] == "A" else tensor * 2
        )
        tensors[f"{flat}.alpha"] = torch.tensor(2.0)
    return tensors


def renamed(prefix: str, ending: str = ".weight"):
    return lambda state: {k.replace("transformer.", prefix, 1).replace(".weight", ending): t for k, t in state.items()}


@pytest.mark.parametrize(
    ("form", "metadata"),
    [
        (lambda state: state, None),
        (renamed("diffusion_model."), None),
        (renamed("base_model.model."), None),
        (renamed("base_model.model.", ".default.weight"), None),
        (renamed(""), None),
        (kohya, None),
        (
            lambda state: {k: t * 2 if "lora_B" in k else t for k, t in state.items()},
            {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 2})},
        ),
    ],
    ids=["ours", "comfyui", "peft", "peft's own names", "bare", "kohya", "diffusers with alpha"],
)
def test_training_starts_from_a_lora_with_anyones_keys_and_a_smaller_rank(toy_model, tmp_path, form, metadata):
    theirs = base(toy_model)
    stirred(theirs, LoraConfig(rank=4, targets=QKV))
    save_file(form(files.lora_state_dict(theirs)), tmp_path / "a.safetensors", metadata=metadata)
    ours = base(toy_model)
    config = LoraConfig(rank=8, alpha=4.0, targets=("attention",), init_lora=str(tmp_path / "a.safetensors"))
    attach.add_lora(ours, config, seed=3)
    torch.testing.assert_close(velocity(ours), velocity(theirs), rtol=0, atol=5e-4)
    assert ours.get_submodule(NAME).lora_A["default"].weight[4:].abs().max() > 0  # the ranks beyond can learn
    assert all(p.requires_grad for p in attach.lora_parameters(ours))


@pytest.mark.parametrize(
    ("change", "config", "words"),
    [
        (lambda s: s, {"rank": 2}, "has rank 4 at .*, the adapter 2"),
        (lambda s: s, {"targets": ("self_attention.to_key",)}, "which train.lora.targets does not"),
        (lambda s: s | {"transformer.x.lora_A.weight": torch.ones(4, 4)}, {}, "adapts x, which this model"),
        (lambda s: s | {f"transformer.{NAME}.lokr_w1": torch.ones(4)}, {}, "is a LoKr, whose products are not pairs"),
        (lambda s: dict(list(s.items())[1:]), {}, "half of the pair"),
        (lambda s: {}, {}, "no tensors"),
        (lambda s: {k: t * torch.inf for k, t in s.items()}, {}, "has NaN or infinity in 48 of 48 tensors"),
        (lambda s: {k: t[..., :3].contiguous() for k, t in s.items()}, {}, "another size|has rank"),
    ],
)  # fmt: skip
def test_a_lora_that_cannot_be_started_from_is_named(toy_model, tmp_path, change, config, words):
    theirs = base(toy_model)
    attach.add_lora(theirs, LoraConfig(rank=4, targets=QKV), seed=1)
    save_file(change(files.lora_state_dict(theirs)), tmp_path / "a.safetensors")
    options = {"rank": 8, "targets": QKV, **config}
    with pytest.raises(RunError, match=words):
        attach.add_lora(base(toy_model), LoraConfig(**options, init_lora=str(tmp_path / "a.safetensors")), seed=1)
