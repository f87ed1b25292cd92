"""Are merged checkpoints what peft merges and what diffusers loads, and is nothing else touched?"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import Kandinsky5Transformer3DModel
from safetensors.torch import load_file, save_file

from k5cache.shared.errors import ModelError, OutputError, RunError
from k5train.adapter import attach, files
from k5train.adapter.into_base import merge_into_base
from k5train.base.quantize import load_transformer
from k5train.cli import app
from k5train.options.adapter import LoraConfig
from tests.cli import Cli

TO_KEY, IN_LAYER = (
    "visual_transformer_blocks.1.cross_attention.to_key",
    "visual_transformer_blocks.0.feed_forward.in_layer",
)
TARGETS = (TO_KEY, IN_LAYER)
KINDS = {
    "lora": LoraConfig(rank=4, alpha=6.0, targets=TARGETS),
    "dora": LoraConfig(algo="dora", rank=4, alpha=6.0, targets=TARGETS),
    "lokr": LoraConfig(algo="lokr", rank=2, targets=TARGETS),
    "whole": LoraConfig(algo="lokr", rank=500, targets=TARGETS),
}


@pytest.fixture(scope="module")
def made(toy_model, tmp_path_factory) -> dict[str, tuple[Path, dict[str, torch.Tensor]]]:
    """For each kind its file, and the weights that peft merges it into."""
    folder, result = tmp_path_factory.mktemp("kinds"), {}
    for kind, config in KINDS.items():
        transformer = load_transformer(toy_model, "no_change", torch.float32, "cpu")
        attach.add_lora(transformer, config, seed=1)
        generator = torch.Generator().manual_seed(2)
        for parameter in attach.lora_parameters(transformer):
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
        path = folder / f"{kind}.safetensors"
        files.save_lora(path, transformer)
        for name in TARGETS:
            transformer.get_submodule(name).merge()
        result[kind] = (path, {n: transformer.get_submodule(n).base_layer.weight.detach().clone() for n in TARGETS})
    return result


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: t for path in sorted((folder / "transformer").glob("*.safetensors")) for k, t in load_file(path).items()}


def test_a_merged_checkpoint_has_the_weights_that_peft_merges_and_no_other_change(made, toy_model, tmp_path):
    before = {name: tensor.float() for name, tensor in weights_of(toy_model).items()}
    for kind, (path, after) in made.items():
        out = tmp_path / kind
        report = merge_into_base([path], [1.0], toy_model, out, torch.float32)
        assert (report.num_modules, report.is_pipeline, report.lost) == (2, True, 0)
        weights = weights_of(out)
        assert weights.keys() == before.keys()
        for name, tensor in weights.items():
            module = name.removesuffix(".weight")
            if module in after:
                assert (tensor - before[name]).abs().max() > 0.1
                torch.testing.assert_close(tensor, after[module], rtol=1e-5, atol=1e-5)
            else:
                assert torch.equal(tensor, before[name]), name
        loaded = Kandinsky5Transformer3DModel.from_pretrained(out, subfolder="transformer")
        assert torch.equal(loaded.get_submodule(TO_KEY).weight, weights[f"{TO_KEY}.weight"])


def test_several_files_are_added_as_if_they_were_loaded_beside_each_other(made, toy_model, tmp_path):
    paths = [made[kind][0] for kind in ("lora", "dora", "whole")]
    merge_into_base(paths, [0.5, 1.0, -2.0], toy_model, tmp_path / "m", torch.float32)
    merged, before = weights_of(tmp_path / "m"), weights_of(toy_model)
    for name in TARGETS:
        base = before[f"{name}.weight"].float()
        lora, dora, lokr = (made[kind][1][name] - base for kind in ("lora", "dora", "whole"))
        torch.testing.assert_close(merged[f"{name}.weight"], base + 0.5 * lora + dora - 2 * lokr, rtol=1e-5, atol=1e-5)
    # A DoRA at half strength is as peft computes it: half of its matrices, and all of its magnitudes.
    merge_into_base([made["dora"][0]], [0.5], toy_model, tmp_path / "half", torch.float32)
    transformer = load_transformer(toy_model, "no_change", torch.float32, "cpu")
    attach.add_lora(transformer, replace(KINDS["dora"], alpha=3.0), seed=1)
    generator = torch.Generator().manual_seed(2)
    for parameter in attach.lora_parameters(transformer):
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    transformer.get_submodule(TO_KEY).merge()
    expected = transformer.get_submodule(TO_KEY).base_layer.weight
    torch.testing.assert_close(weights_of(tmp_path / "half")[f"{TO_KEY}.weight"], expected, rtol=1e-5, atol=1e-5)


def split_in_two(model: Path, folder: Path, dtype: torch.dtype) -> Path:
    """The model as the hub has large ones: two files and an index, in bfloat16."""
    state = {name: tensor.to(dtype).contiguous() for name, tensor in weights_of(model).items()}
    (folder / "transformer").mkdir(parents=True)
    names = sorted(state)
    weight_map = {}
    for number, part in enumerate((names[: len(names) // 3], names[len(names) // 3 :]), 1):
        file = f"diffusion_pytorch_model-{number:05d}-of-00002.safetensors"
        save_file({name: state[name] for name in part}, folder / "transformer" / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    (folder / "transformer" / "config.json").write_bytes((model / "transformer" / "config.json").read_bytes())
    return folder


def test_a_base_of_several_files_in_16_bits_stays_so_and_a_stopped_merge_goes_on(
    made, toy_model, tmp_path, monkeypatch
):
    base = split_in_two(toy_model, tmp_path / "base", torch.bfloat16)
    path, out = made["dora"][0], tmp_path / "out"

    def stop_in_the_second_file(done: int, total: int) -> None:
        if done > total * 0.6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_into_base([path], [1.0], base, out, progress=stop_in_the_second_file)
    first = out / "transformer" / "diffusion_pytorch_model-00001-of-00002.safetensors"
    assert sorted(p.name for p in out.rglob("*") if p.is_file()) == [first.name, "k5_merge.json"]
    written = first.stat().st_mtime_ns
    with pytest.raises(RunError, match="is a merged checkpoint of other files"):
        merge_into_base([path], [0.9], base, out)
    report = merge_into_base([path], [1.0], base, out)
    assert (first.stat().st_mtime_ns, report.was_there, report.is_pipeline) == (written, False, False)
    assert 1e-4 < report.lost < 0.1  # 8 bits of mantissa
    merge_into_base([path], [1.0], base, tmp_path / "at_once")
    merged = Kandinsky5Transformer3DModel.from_pretrained(out, subfolder="transformer", torch_dtype=torch.bfloat16)
    expected, exact = weights_of(tmp_path / "at_once"), made["dora"][1][TO_KEY]
    assert {t.dtype for t in expected.values()} == {torch.bfloat16}
    assert weights_of(out).keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights_of(out).items())
    # The base was rounded to bfloat16 too, which moves the norms of its rows.
    torch.testing.assert_close(merged.get_submodule(TO_KEY).weight.float(), exact, rtol=2e-2, atol=2e-2)
    assert merge_into_base([path], [1.0], base, out).was_there
    whole = merge_into_base([path], [1.0], base, tmp_path / "wide", torch.float32)
    assert {t.dtype for t in weights_of(tmp_path / "wide").values()} == {torch.float32}
    assert whole.lost == 0


def test_what_cannot_be_merged_is_refused_before_anything_is_written(made, toy_model, tmp_path):
    path = made["dora"][0]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine", encoding="utf-8")
    other = tmp_path / "other.safetensors"
    save_file(load_file(path), other, metadata={"k5.base_fingerprint": "0" * 32})
    broken = tmp_path / "broken.safetensors"
    save_file({k: t for k, t in load_file(path).items() if "magnitude" not in k or TO_KEY not in k}, broken)
    cut = split_in_two(toy_model, tmp_path / "cut", torch.float32)
    config = json.loads((cut / "transformer" / "config.json").read_text(encoding="utf-8"))
    (cut / "transformer" / "config.json").write_text(json.dumps({**config, "num_visual_blocks": 9}), encoding="utf-8")
    for sources, strengths, base, out, error, words in (
        ([path], [1.0], toy_model, tmp_path / "full", OutputError, "is not empty and not a merged checkpoint"),
        ([path], [1.0], toy_model, toy_model, OutputError, "is the folder that this command reads"),
        ([path], [1.0], toy_model, toy_model / "x", OutputError, "is inside"),
        ([path], [float("nan")], toy_model, tmp_path / "new", RunError, "A weight of nan"),
        ([path, path], [1.0], toy_model, tmp_path / "new", RunError, "2 files and 1 weight"),
        ([other], [1.0], toy_model, tmp_path / "new", RunError, "was trained on another base"),
        ([broken], [1.0], toy_model, tmp_path / "new", RunError, "one magnitude for each output"),
        ([path], [1.0], cut, tmp_path / "new", ModelError, "lacks visual_transformer_blocks"),
    ):
        with pytest.raises(error, match=words):
            merge_into_base(sources, strengths, base, out)
    assert not (tmp_path / "new").exists()
    with pytest.raises(RunError, match=r"would have a value that float16 does not hold"):
        merge_into_base([made["lora"][0]], [1e6], toy_model, tmp_path / "new", torch.float16)
    assert not list((tmp_path / "new").rglob("*.safetensors"))
    assert merge_into_base([made["lora"][0]], [1.0], toy_model, tmp_path / "new", torch.float16).lost > 0
    assert 0 < merge_into_base([made["lora"][0]], [1e30], toy_model, tmp_path / "far", torch.bfloat16).lost < 0.01


def test_the_command_says_what_it_wrote_and_how_to_load_it(made, toy_model, tmp_path):
    cli, path = Cli(tmp_path), str(made["lokr"][0])
    done = cli(app, "merge", path, "--into-base", str(toy_model), "-o", "merged")
    assert done.code == 0, done.err
    assert "Wrote merged: 2 modules of" in done.out
    assert 'DiffusionPipeline.from_pretrained("merged", torch_dtype=torch.bfloat16)' in done.out + done.err
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        for file in (toy_model / part).iterdir():
            assert (tmp_path / "merged" / part / file.name).read_bytes() == file.read_bytes()
    again = cli(app, "merge", path, "--into-base", str(toy_model), "-o", "merged")
    assert (again.code, "nothing was written" in again.out) == (0, True)
    for arguments, words in (
        (("--into-base", "nowhere", "-o", "x"), "There is no model folder nowhere"),
        (("--into-base", str(toy_model), "-o", "x", "--format", "kohya"), "--format is about LoRA files"),
    ):
        refused = cli(app, "merge", path, *arguments)
        assert (refused.code, words in " ".join(refused.err.split())) == (2, True), refused.err
    assert not (tmp_path / "x").exists()
    refused = cli(app, "merge", path, "--into-base", str(tmp_path), "-o", "x")
    assert "in the diffusers layout with --into-base DIR" in " ".join(refused.err.split())
    (file,) = (tmp_path / "merged" / "transformer").glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])  # a copy that was cut short
    assert "Wrote merged" in cli(app, "merge", path, "--into-base", str(toy_model), "-o", "merged").out
    assert file.read_bytes() == whole
