"""Does an exported DoRA or LoKr change each weight in ComfyUI as peft does, by ComfyUI's own rules?"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from k5train.adapter import attach, files
from k5train.adapter.export import export
from k5train.adapter.who_loads import check_lora
from k5train.base.quantize import empty_transformer, load_transformer
from k5train.cli import app
from k5train.options.adapter import LoraConfig
from tests.cli import Cli

TO_KEY, IN_LAYER = (
    "visual_transformer_blocks.1.cross_attention.to_key",
    "visual_transformer_blocks.0.feed_forward.in_layer",
)
KINDS = {
    "dora": LoraConfig(algo="dora", rank=4, alpha=6.0, targets=(TO_KEY, IN_LAYER)),
    "lokr of pairs": LoraConfig(algo="lokr", rank=2, targets=(TO_KEY, IN_LAYER)),
    "lokr of whole factors": LoraConfig(algo="lokr", rank=500, targets=(TO_KEY, IN_LAYER)),
}


@pytest.fixture(scope="module")
def made(toy_model, tmp_path_factory):
    """For each kind its file, and the weights that peft merges it into: (path, before, after)."""
    folder, result = tmp_path_factory.mktemp("kinds"), {}
    transformer = load_transformer(toy_model, "no_change", torch.float32, "cpu")
    before = {name: transformer.get_submodule(name).weight.detach().clone() for name in (TO_KEY, IN_LAYER)}
    for kind, config in KINDS.items():
        attach.add_lora(transformer, config, seed=1)
        generator = torch.Generator().manual_seed(2)
        for parameter in attach.lora_parameters(transformer):
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
        path = folder / f"{kind.replace(' ', '-')}.safetensors"
        files.save_lora(path, transformer, {"modelspec.title": kind})
        for name in before:
            transformer.get_submodule(name).merge()
        after = {name: transformer.get_submodule(name).base_layer.weight.detach().clone() for name in before}
        for name in before:
            transformer.get_submodule(name).base_layer.weight.data = before[name].clone()
            transformer.get_submodule(name).merged_adapters = []
        transformer.unload_lora()
        result[kind] = (path, before, after)
    return result


def by_comfyui(state: dict[str, torch.Tensor], stem: str, weight: torch.Tensor) -> torch.Tensor:
    """What ComfyUI 0.8 makes of a weight at strength 1, by the formulas of its weight adapters."""
    get = lambda end: state.get(f"{stem}.{end}")  # noqa: E731
    if get("lora_up.weight") is not None:
        changed = weight + get("lora_up.weight") @ get("lora_down.weight") * (
            get("alpha") / len(get("lora_down.weight"))
        )
        norm = weight.norm(dim=1, keepdim=True) + torch.finfo(weight.dtype).eps  # of the weight before the change
        return changed * (get("dora_scale") / norm)
    first, second = get("lokr_w1"), get("lokr_w2")
    strength = 1.0
    if second is None:
        second, strength = get("lokr_w2_a") @ get("lokr_w2_b"), get("alpha") / len(get("lokr_w2_b"))
    return weight + strength * torch.kron(first, second)


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_changes_weights_in_comfyui_as_peft_merges_them(made, toy_model, tmp_path, kind):
    path, before, after = made[kind]
    target = tmp_path / "out.safetensors"
    assert export(path, target, "kohya", "fp32", toy_model).num_modules == 2
    state = load_file(target)
    for name, weight in before.items():
        stem = f"lora_unet_{name.replace('.', '_')}"
        assert (after[name] - weight).abs().max() > 0.1
        torch.testing.assert_close(by_comfyui(state, stem, weight), after[name], rtol=1e-5, atol=1e-5)
    if kind == "dora":  # the magnitudes alone would be another weight
        stem = f"lora_unet_{TO_KEY.replace('.', '_')}"
        magnitude = load_file(path)[f"transformer.{TO_KEY}.lora_magnitude_vector"]
        there = by_comfyui(state | {f"{stem}.dora_scale": magnitude[:, None]}, stem, before[TO_KEY])
        assert (there - after[TO_KEY]).abs().max() > 0.01
    report = check_lora(target, empty_transformer(toy_model))
    comfyui = next(program for program in report.programs if program.name == "ComfyUI")
    assert comfyui.loads_all
    assert set(comfyui.modules) == set(before)
    assert set(comfyui.strengths.values()) == {1.0}


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_for_diffusers_keeps_every_number_and_halves_the_file(made, toy_model, tmp_path, kind):
    path, _, _ = made[kind]
    export(path, tmp_path / "same.safetensors", "diffusers", "fp32", toy_model)
    before, same = load_file(path), load_file(tmp_path / "same.safetensors")
    assert before.keys() == same.keys()
    assert all(torch.equal(before[key], same[key]) for key in before)
    export(path, tmp_path / "half.safetensors", "diffusers", "bf16", toy_model)
    for key, tensor in load_file(tmp_path / "half.safetensors").items():
        assert torch.equal(tensor.float(), before[key] if "magnitude" in key else before[key].bfloat16().float())
    if "lokr" in kind:  # there and back
        export(path, tmp_path / "flat.safetensors", "kohya", "fp32", toy_model)
        export(tmp_path / "flat.safetensors", tmp_path / "back.safetensors", "diffusers", "fp32", toy_model)
        back = load_file(tmp_path / "back.safetensors")
        assert back.keys() == before.keys()
        assert all(torch.equal(back[key], before[key]) for key in before)


def test_a_lokr_of_lycoris_becomes_one_that_comfyui_loads_with_its_strength(made, toy_model, tmp_path):
    path, before, _ = made["lokr of pairs"]
    state = {k.replace("transformer.", "", 1): t for k, t in load_file(path).items()}
    theirs = {f"lycoris_{k.rpartition('.')[0].replace('.', '_')}.{k.rpartition('.')[2]}": t for k, t in state.items()}
    theirs |= {f"lycoris_{name.replace('.', '_')}.alpha": torch.tensor(1.0) for name in before}
    save_file(theirs, tmp_path / "theirs.safetensors")
    export(tmp_path / "theirs.safetensors", tmp_path / "out.safetensors", "kohya", "fp32", toy_model)
    out, stem = load_file(tmp_path / "out.safetensors"), f"lora_unet_{TO_KEY.replace('.', '_')}"
    weight = torch.zeros_like(before[TO_KEY])
    expected = torch.kron(state[f"{TO_KEY}.lokr_w1"], state[f"{TO_KEY}.lokr_w2_a"] @ state[f"{TO_KEY}.lokr_w2_b"]) / 2
    torch.testing.assert_close(by_comfyui(out, stem, weight), expected)


def test_what_cannot_be_exported_or_merged_says_what_to_do(made, toy_model, tmp_path):
    dora, lokr = made["dora"][0], made["lokr of pairs"][0]
    run = Cli(tmp_path)
    for arguments, words in (
        (("export", dora, "--model", tmp_path), "has no transformer/config.json"),
        (("merge", dora, lokr, "-o", "c.safetensors", "--model", toy_model), "is a DoRA, which no LoRA does exactly"),
        (("merge", lokr, lokr, "-o", "c.safetensors", "--model", toy_model), "is a LoKr, which no LoRA does exactly"),
    ):  # fmt: skip
        done = run(app, *map(str, arguments))
        assert done.code == 2
        assert words in " ".join(done.err.split())
    full_size = {f"transformer.{TO_KEY}.lora_A.weight": torch.ones(1, 2560), f"transformer.{TO_KEY}.lora_B.weight":
                 torch.ones(2560, 1), f"transformer.{TO_KEY}.lora_magnitude_vector": torch.ones(2560)}  # fmt: skip
    save_file(full_size, tmp_path / "full.safetensors")
    done = run(app, "export", "full.safetensors")
    assert (done.code, "Give the model folder that it was trained on: --model DIR" in " ".join(done.err.split())) == (
        2,
        True,
    )
    marked = tmp_path / "marked.safetensors"
    save_file(load_file(dora), marked, metadata={"k5.base_fingerprint": "another"})
    done = run(app, "export", "marked.safetensors", "--model", str(toy_model))
    assert (done.code, "was trained on another base" in " ".join(done.err.split())) == (2, True)
    state = load_file(lokr)
    for change, words in (
        (lambda s: dict(list(s.items())[1:]), "whose product is"),
        (lambda s: {k: t[:-1] if "w1" in k else t for k, t in s.items()}, "whose product is"),
        (
            lambda s: s | {f"transformer.{TO_KEY}.lokr_t2": torch.ones(2, 2)},
            "lokr_t2, which is not a LoKr's of this model",
        ),
        (lambda s: {k: t * torch.nan for k, t in s.items()}, "NaN"),
    ):
        save_file({k: t.contiguous() for k, t in change(state).items()}, tmp_path / "bad.safetensors")
        done = run(app, "export", "bad.safetensors", "--model", str(toy_model))
        assert (done.code, words in " ".join(done.err.split())) == (2, True), (words, done.err)
    assert not list(tmp_path.glob("*-kohya*"))


def test_check_lora_knows_an_export_and_says_who_halves_a_file_by_its_metadata(made, toy_model, tmp_path):
    run = Cli(tmp_path)
    for kind in KINDS:
        target = f"{kind.replace(' ', '-')}-out.safetensors"
        done = run(app, "export", str(made[kind][0]), "-o", target, "--model", str(toy_model), "--dtype", "bf16")
        assert (done.code, "Wrote" in done.out, "2 modules, kohya keys" in done.out) == (0, True, True), done.err
        done = run(app, "check-lora", target, "--model", str(toy_model))
        assert "k5train export wrote it for ComfyUI" in " ".join(done.out.split())
        assert done.code == 1  # diffusers loads none of it
    generator = torch.Generator().manual_seed(0)
    size = empty_transformer(toy_model).get_submodule(TO_KEY)
    half = {f"transformer.{TO_KEY}.lora_A.weight": torch.randn(8, size.in_features, generator=generator),
            f"transformer.{TO_KEY}.lora_B.weight": torch.randn(size.out_features, 8, generator=generator)}  # fmt: skip
    facts = {"transformer.r": 8, "transformer.lora_alpha": 4, "transformer.target_modules": [TO_KEY]}
    save_file(half, tmp_path / "half.safetensors", metadata={"lora_adapter_metadata": json.dumps(facts)})
    said = " ".join(run(app, "check-lora", "half.safetensors", "--model", str(toy_model)).out.split())
    assert "diffusers multiplies by the alpha / rank of the file's lora_adapter_metadata, x0.5." in said
    assert "ComfyUI does not read that, so its strength is x2 of diffusers'" in said
