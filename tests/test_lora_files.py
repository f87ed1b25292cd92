"""Whatever LoRA file there is: what is said of it, and whether check-lora offers export just where export works."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from k5cache.shared.errors import RunError
from k5train.adapter import export as exporting
from k5train.adapter import lora_file
from k5train.adapter.lora_file import read_file
from k5train.adapter.pairs import read_pairs
from k5train.adapter.targets import linear_sizes
from k5train.adapter.who_loads import check_lora, load_by_diffusers
from k5train.base.quantize import empty_transformer
from k5train.cli import app
from k5train.options.adapter import LoraConfig
from k5train.options.optimizer import OptimConfig
from k5train.training.session import Session
from tests.cli import Cli
from tests.runs import CONFIG, go_on, start_run

QUERY = "visual_transformer_blocks.0.self_attention.to_query"
IN = "visual_transformer_blocks.1.feed_forward.in_layer"
FLAT = f"lora_unet_{QUERY.replace('.', '_')}"
_RANDOM = torch.Generator().manual_seed(0)
# Rank 4, of the toy's sizes: 128 x 128 and 384 x 128.
PAIRS = {
    QUERY: (torch.randn(4, 128, generator=_RANDOM), torch.randn(128, 4, generator=_RANDOM)),
    IN: (torch.randn(4, 128, generator=_RANDOM), torch.randn(384, 4, generator=_RANDOM)),
}


@pytest.fixture(scope="module")
def empty(toy_model):
    return empty_transformer(toy_model)


@pytest.fixture
def cli(tmp_path, empty, monkeypatch) -> Cli:
    monkeypatch.setattr(exporting, "architecture", lambda *_: empty)  # without building it for every command
    return Cli(tmp_path)


def state(module="transformer.{}", down="{}.lora_A.weight", up="{}.lora_B.weight", change=None, **more):
    """The pairs under some family of keys; ``change`` is applied to every matrix with its letter."""
    tensors = {}
    for name, (a, b) in PAIRS.items():
        key = module.format(name.replace(".", "_") if module.startswith("lora_") else name)
        for pattern, letter, tensor in ((down, "A", a), (up, "B", b)):
            tensors[pattern.format(key)] = change(letter, tensor).contiguous() if change else tensor.clone()
        tensors |= {f"{key}.{end}": tensor.clone() for end, tensor in more.items()}
    return tensors


def kohya(module="lora_unet_{}", **more):
    return state(module, "{}.lora_down.weight", "{}.lora_up.weight", **more)


def of_diffusers(**config):
    """The metadata that diffusers writes into a file."""
    config = {"target_modules": [QUERY, IN], **config}
    return {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in config.items()})}


def named(name):
    return state(down=f"{{}}.lora_A.{name}.weight", up=f"{{}}.lora_B.{name}.weight")


def on_b(function):
    return lambda letter, tensor: function(tensor) if letter == "B" else tensor


NAN = torch.tensor(float("nan"))
TEXT = {"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(4, 8)}
BEYOND = {f"transformer.visual_transformer_blocks.77.cross_attention.to_key.lora_{x}.weight": torch.ones(4, 4)
          for x in "AB"}  # fmt: skip

# name: the tensors, the metadata, and the strength that the file states (of both modules, or of each).
READ = {
    "ours": (state(), None, 1),
    "ComfyUI's": (state("diffusion_model.{}"), None, 1),
    "bare names": (state("{}"), None, 1),
    "peft's": (state("base_model.model.{}"), None, 1),
    "kohya's": (kohya(), None, 1),
    "alpha of shape []": (kohya(alpha=torch.tensor(2.0)), None, 0.5),
    "alpha of one element": (kohya(alpha=torch.tensor([2.0])), None, 0.5),
    "alpha in bf16": (kohya(alpha=torch.tensor(2.0, dtype=torch.bfloat16)), None, 0.5),
    "alpha as an integer": (kohya(alpha=torch.tensor(2)), None, 0.5),
    "alpha 0": (kohya(alpha=torch.tensor(0.0)), None, 0),
    "negative alpha": (kohya(alpha=torch.tensor(-4.0)), None, -1),
    "diffusers' keys with alpha": (state(alpha=torch.tensor(8.0)), None, 2),
    "lora_alpha": (state(), of_diffusers(r=4, lora_alpha=8), 2),
    "rank-stabilized": (state(), of_diffusers(r=4, lora_alpha=8, use_rslora=True), 4),
    "alpha_pattern": (state(), of_diffusers(r=4, lora_alpha=4, alpha_pattern={"feed_forward.in_layer": 12}), (1, 3)),
    "lora_alpha left out": (state(), of_diffusers(r=4), 2),  # peft's default is 8
    "metadata of an encoder": (
        state(), {"lora_adapter_metadata": json.dumps({"text_encoder.r": 4, "text_encoder.lora_alpha": 8})}, 1,
    ),
    "compiled": (state("transformer._orig_mod.{}"), None, 1),
    "compiled, peft's": (state("base_model.model._orig_mod.{}"), None, 1),
    "compiled, kohya's": (kohya("lora_unet__orig_mod_{}"), None, 1),
    "compiled blocks": ({k.replace("s.0.", "s.0._orig_mod.").replace("s.1.", "s.1._orig_mod."): t for k, t in
                         state().items()}, None, 1),
    "with a text encoder": (state() | TEXT, None, 1),
    "adapter called default": (named("default"), None, 1),
    "adapter called mine": (named("mine"), None, 1),
    "lora.down": (state(down="{}.lora.down.weight", up="{}.lora.up.weight"), None, 1),
    "_lora.down": (state(down="{}_lora.down.weight", up="{}_lora.up.weight"), None, 1),
    "lora_linear_layer": (state(down="{}.lora_linear_layer.down.weight", up="{}.lora_linear_layer.up.weight"), None, 1),
    "without .weight": (state(down="{}.lora_A", up="{}.lora_B"), None, 1),
    "1 x 1 convolutions": (state(change=lambda _, t: t[..., None, None]), None, 1),
    "float64": (state(change=lambda _, t: t.double()), None, 1),
    "B of zeros": (state(change=on_b(torch.zeros_like)), None, 1),
}  # fmt: skip
# Those that both programs load whole and alike. For every other name diffusers leaves its own start in the adapter.
GOOD = {"ours", "lora.down", "float64", "B of zeros"}
# name: the tensors, the metadata, and what is said of them.
REFUSED = {
    "NaN": (state(change=on_b(lambda t: t * NAN)), None, "has NaN or infinity in 2 of 4 tensors: transformer.vis"),
    "infinity": (state() | {f"transformer.{QUERY}.lora_A.weight": torch.full((4, 128), -torch.inf)}, None,
                 "NaN or infinity in 1 of 4 tensors"),
    "NaN in bf16": (state(change=lambda _, t: (t * NAN).bfloat16()), None, "NaN or infinity in 4 of 4 tensors"),
    "NaN in float8": (state(change=lambda _, t: (t * NAN).to(torch.float8_e4m3fn)), None, "infinity in 4 of 4"),
    "NaN in a DoRA": (state(lora_magnitude_vector=NAN.repeat(128)), None, "NaN or infinity in 2 of 6 tensors"),
    "alpha NaN": (kohya(alpha=NAN), None, "NaN or infinity in 2 of 6 tensors"),
    "alpha of two elements": (kohya(alpha=torch.ones(2)), None, r"an alpha of shape \[2\] for visual"),
    "strength too high": (state(change=on_b(lambda t: t * 1e37), alpha=torch.tensor(1e4)), None,
                          "too large for float32 at their strength, x2500"),
    "float64 too large": (state(change=lambda _, t: t.double() * 1e300), None, "too large for float32"),
    "another rank in the metadata": (state(), of_diffusers(r=8, lora_alpha=8), "matrices of rank 4 .* config says 8"),
    "lora_alpha NaN": (state(), of_diffusers(r=4, lora_alpha=float("nan")), "an alpha is not a finite number"),
    "rank 0 in the metadata": (state(), of_diffusers(r=0, lora_alpha=8), "a rank is below 1"),
    "metadata that is not JSON": (state(), {"lora_adapter_metadata": "{r: 4"}, "cannot be used: it is not JSON"),
    "metadata that is a list": (state(), {"lora_adapter_metadata": "[4]"}, "it is a JSON list, not an object"),
    "metadata of other types": (state(), of_diffusers(r=[4]), "lora_adapter_metadata of .* cannot be used"),
    "a pattern that is none": (state(), of_diffusers(r=4, alpha_pattern={"(": 4}), "not a regular expression: missing"),
    "biases": (state(**{"lora_B.bias": torch.ones(128)}), None, "has biases such as .*lora_B.bias"),
    "two adapters": (named("a") | named("b"), None, "holds several adapters: a, b"),
    "two spellings": (state() | state("diffusion_model.{}"), None, "has visual.* twice: .* and "),
    "half a pair": (dict(list(state().items())[1:]), None, "half of the pair for visual"),
    "an alpha alone": (state() | {"transformer.visual_transformer_blocks.2.self_attention.to_key.alpha": torch.ones(1)},
                       None, "half of the pair for visual.*2.self"),
    "a module that there is not": (state() | BEYOND, None, "adapts visual_transformer_blocks.77.* does not have"),
    "ranks that disagree": (state(change=lambda x, t: t[:3] if x == "A" else t), None, "do not fit together: ranks 3"),
    "rank 0": (state(change=lambda x, t: t[:0] if x == "A" else t[:, :0]), None, "do not fit together: ranks 0"),
    "vectors": (state(change=lambda _, t: t[0]), None, r"in the shape \[128\], which is not a matrix"),
    "numbers": (state(change=lambda _, t: t[0, 0]), None, r"in the shape \[\], which is not a matrix"),
    "3 x 3 convolutions": (state(change=lambda _, t: t[..., None, None].expand(*t.shape, 3, 3)), None, "not a matrix"),
    "a product beyond float32": (state(change=lambda _, t: t * 1e30), None, "are too large for float32"),
    "int8": (state(change=lambda _, t: t.to(torch.int8)), None, "lora_A.weight as int8"),
    "LoCon": (kohya(**{"lora_mid.weight": torch.ones(4, 4, 1, 1)}), None, "lora_mid.weight, which is not a plain LoRA"),
    "DoRA": (state(lora_magnitude_vector=torch.ones(128)), None, "is a DoRA"),
    "DoRA, kohya's": (kohya(dora_scale=torch.ones(128, 1)), None, "is a DoRA"),
    "LoKr": ({f"transformer.{QUERY}.lokr_w{i}": torch.ones(n, n) for i, n in ((1, 8), (2, 16))}, None, "is a LoKr"),
    "LoHa": ({f"{FLAT}.hada_w{i}_{x}": torch.ones(*((128, 2) if x == "a" else (2, 128))) for i in (1, 2) for x in "ab"},
             None, "is a LoHa"),
    "text encoders only": (TEXT, None, "is a LoRA for text encoders only"),
    "Flux": ({f"transformer.single_transformer_blocks.0.attn.to_q.lora_{x}.weight": torch.ones(4, 4) for x in "AB"},
             None, "is a LoRA of another model: .*such as transformer.single"),
    "SDXL": ({f"lora_unet_input_blocks_4_1_proj_in.lora_{x}.weight": torch.ones(4, 4) for x in ("down", "up")} | TEXT,
             None, "is a LoRA of another model"),
    "a VAE": ({"decoder.conv_in.weight": torch.ones(4, 4, 3, 3)}, None, "is not a LoRA: none of its tensors is part"),
    "a transformer": ({f"{QUERY}.weight": torch.ones(128, 128)}, None, "is not a LoRA: none of its tensors is part"),
    "nothing": ({}, None, "has no tensors"),
}  # fmt: skip
ONLY_EXPORTED = {"DoRA", "DoRA, kohya's", "LoKr"}
"""They are no LoRAs, and can be exported as what they are (tests/test_other_kinds.py)."""
NOT_OF_THIS_MODEL = {"text encoders only", "Flux", "SDXL", "a VAE", "a transformer", "nothing"}


def strengths_of(expected) -> dict[str, float]:
    return dict(zip(PAIRS, expected if isinstance(expected, tuple) else (expected,) * 2, strict=True))


@pytest.mark.parametrize("name", READ)
def test_a_file_that_can_be_read_is_exported_with_its_strength_and_offered_that_if_it_needs_it(
    tmp_path, cli, empty, name
):
    tensors, metadata, expected = READ[name]
    save_file(tensors, tmp_path / "a.safetensors", metadata=metadata)
    report = check_lora(tmp_path / "a.safetensors", empty)
    assert report.is_good == (name in GOOD)
    for program in report.programs:  # diffusers says so after loading it, and ComfyUI only knows alpha
        if program.name == "diffusers" or "alpha" in "".join(tensors):
            assert not program.strengths or program.strengths == pytest.approx(strengths_of(expected))
    checked = cli(app, "check-lora", "a.safetensors")
    assert checked.code == (0 if report.is_good else 1), checked.err
    assert ("k5train export a.safetensors --format diffusers" in checked.out) == (not report.is_good)

    exported = cli(app, "export", "a.safetensors", "--format", "diffusers", "-o", "b.safetensors")
    assert exported.code == 0, exported.err
    again = check_lora(tmp_path / "b.safetensors", empty)
    assert again.is_good
    assert all(set(program.strengths.values()) == {1} for program in again.programs)
    loaded, _ = load_by_diffusers(tmp_path / "b.safetensors", empty)
    for module, strength in strengths_of(expected).items():
        down, up = PAIRS[module][0], PAIRS[module][1] * (0 if name == "B of zeros" else 1)
        assert torch.equal(loaded[f"{module}.lora_A.weight"], down)
        assert torch.equal(loaded[f"{module}.lora_B.weight"], up * strength)


@pytest.mark.parametrize("name", [name for name in REFUSED if name not in ONLY_EXPORTED])
def test_a_file_that_cannot_be_read_is_refused_by_all_in_the_same_words(tmp_path, cli, empty, name):
    tensors, metadata, words = REFUSED[name]
    save_file(tensors, tmp_path / "a.safetensors", metadata=metadata)
    exported = cli(app, "export", "a.safetensors", "--format", "diffusers")
    assert exported.code == 2
    problem = re.search(r"error: (.*)\n", exported.err)[1]
    assert re.search(words, problem)
    merged = cli(app, "merge", "a.safetensors", "a.safetensors", "-o", "b.safetensors")
    assert (merged.code, problem in merged.err) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    with pytest.raises(RunError, match=words):  # what train.lora.init_lora and `k5train sample` read it by
        read_pairs(tmp_path / "a.safetensors", linear_sizes(empty))

    checked = cli(app, "check-lora", "a.safetensors")
    assert checked.code == (2 if name in NOT_OF_THIS_MODEL else 1)
    assert problem in checked.out + checked.err
    assert "k5train export" not in checked.out


def test_a_file_of_another_kind_of_adapter_is_not_merged_nor_started_from(tmp_path, cli, empty):
    for name in ONLY_EXPORTED:
        tensors, metadata, words = REFUSED[name]
        save_file(tensors, tmp_path / "a.safetensors", metadata=metadata)
        merged = cli(app, "merge", "a.safetensors", "a.safetensors", "-o", "b.safetensors")
        assert (merged.code, words in merged.err, "as a LoRA node of its own" in merged.err) == (2, True, True)
        with pytest.raises(RunError, match=words):
            read_pairs(tmp_path / "a.safetensors", linear_sizes(empty))
        checked = cli(app, "check-lora", "a.safetensors")
        assert (checked.code, words in checked.out) == (1, True)
        assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_the_strengths_of_both_programs_are_told_where_they_differ(tmp_path, cli):
    save_file(state(), tmp_path / "a.safetensors", metadata=of_diffusers(r=4, lora_alpha=8))
    done = cli(app, "check-lora", "a.safetensors")
    assert done.code == 1
    assert "The strengths differ at 2 modules: diffusers x2, ComfyUI x1, the file says x2" in done.out
    mixed = of_diffusers(r=4, lora_alpha=4, alpha_pattern={"feed_forward.in_layer": 12})
    save_file(state(), tmp_path / "b.safetensors", metadata=mixed)
    done = cli(app, "check-lora", "b.safetensors")
    assert "x1 to x3" in done.out
    assert "The strengths differ at 1 module: diffusers x3, ComfyUI x1, the file says x3" in done.out


def test_a_config_beside_a_file_of_peft_states_its_strength(tmp_path, empty):
    save_file(state("base_model.model.{}"), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 16}))
    pairs = read_pairs(tmp_path / "adapter_model.safetensors", linear_sizes(empty))
    assert torch.equal(pairs[QUERY][1], PAIRS[QUERY][1] * 4)
    for text, words in (("[]", "JSON list"), ("{", "not JSON"), ('{"r": 0}', "below 1")):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(RunError, match=f"adapter_config.json cannot be used: .*{words}"):
            read_pairs(tmp_path / "adapter_model.safetensors", linear_sizes(empty))


def test_a_lora_that_does_nothing_is_said_to(tmp_path, cli):
    save_file(state(change=on_b(torch.zeros_like)), tmp_path / "a.safetensors")
    assert "It changes nothing at all of 2 modules" in cli(app, "check-lora", "a.safetensors").out
    assert "It does nothing" in cli(app, "export", "a.safetensors").err
    assert "It does nothing" in cli(app, "merge", "a.safetensors", "-o", "m.safetensors").err
    save_file(state() | {f"transformer.{QUERY}.lora_A.weight": torch.zeros(4, 128)}, tmp_path / "b.safetensors")
    assert "It changes nothing at 1 of 2 modules, such as visual" in cli(app, "check-lora", "b.safetensors").out


def test_keys_of_text_encoders_are_left_out_with_a_note(tmp_path, cli):
    save_file(state() | TEXT, tmp_path / "a.safetensors")
    for words in (("export", "a.safetensors"), ("merge", "a.safetensors", "-o", "m.safetensors")):
        done = cli(app, *words)
        assert (done.code, "1 key of text encoders is left out, such as lora_te1_" in done.err) == (0, True)


def test_numbers_that_do_not_fit_16_bits_are_refused_with_a_type_that_holds_them(tmp_path, cli):
    save_file(state(change=on_b(lambda t: t.sign() * 70_000)), tmp_path / "a.safetensors")
    save_file(state(change=on_b(lambda t: t * 1e-9)), tmp_path / "b.safetensors")
    done = cli(app, "export", "a.safetensors", "--dtype", "fp16")
    assert done.code == 2
    assert "lora_up has values up to 70000, and fp16 holds none above 65504" in done.err
    assert "Use --dtype bf16 or fp32" in done.err
    done = cli(app, "export", "b.safetensors", "--dtype", "fp16")
    assert (done.code, "lora_up would become all zero: its values are too small for fp16" in done.err) == (2, True)
    for file in ("a", "b"):
        assert cli(app, "export", f"{file}.safetensors", "--dtype", "bf16").code == 0
    huge = cli(app, "merge", "a.safetensors", "-w", "1e38", "-o", "m.safetensors")
    assert (huge.code, "values that are too large for any LoRA file" in huge.err) == (2, True)
    for weight in ("nan", "inf"):
        done = cli(app, "merge", "a.safetensors", "-w", weight, "-o", "m.safetensors")
        assert (done.code, f"A weight of {weight}" in done.err) == (2, True)


def test_a_run_stands_for_its_finished_lora(tmp_path, cli):
    for name in ("done", "stopped", "new"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        for file in ("run.json", "recipe.toml"):
            (tmp_path / name / file).touch()
    save_file(state(), tmp_path / "done" / "done.safetensors")
    save_file(state(), tmp_path / "stopped" / "checkpoints" / "step-000005.safetensors")
    assert cli(app, "check-lora", "done").code == 0
    assert Cli(tmp_path / "done")(app, "check-lora", ".").code == 0
    assert cli(app, "export", "done").code == 0
    assert (tmp_path / "done" / "done-kohya.safetensors").is_file()
    assert cli(app, "merge", "done", "done", "-o", "m.safetensors").code == 0
    for words in (("check-lora", "stopped"), ("export", "stopped"), ("merge", "stopped", "-o", "n.safetensors")):
        done = cli(app, *words)
        assert done.code == 2
        assert "Give its last checkpoint, stopped/checkpoints/step-000005.safetensors" in done.err
    assert "Finish it: k5train resume new" in cli(app, "export", "new").err
    (tmp_path / "done" / "run.json").unlink()
    refused = cli(app, "export", "done")  # a folder that is no run
    assert refused.code == 2
    assert "Give the file: done/done-kohya.safetensors, done/done.safetensors" in refused.err


FILES = {
    "empty.safetensors": (b"", "is empty"),
    "a.ckpt": (b"PK\x03\x04" + b"\0" * 60, "is a pickle, which can run any code"),
    "a.pt": (b"\x80\x02}q\0.", "is a pickle, which can run any code"),
    "b.bin": (b"anything", "is a pickle, which can run any code"),
    "renamed.safetensors": (b"PK\x03\x04" + b"\0" * 60, "is a pickle, which can run any code"),
    "page.safetensors": (b"\n<!DOCTYPE html><html>", "is a web page"),
    "lfs.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "only the pointer of Git LFS"),
    "text.safetensors": (b"no tensors", "damaged, cut short or not a .safetensors file"),
    "gone.safetensors": (None, "There is no gone.safetensors"),
    "empty.safetensors/a": (None, "There is no empty.safetensors/a"),
}


def test_what_is_no_safetensors_file_is_named_for_what_it_is(tmp_path, cli):
    save_file(state(), tmp_path / "whole.safetensors")
    cut = (tmp_path / "whole.safetensors").read_bytes()[:-5]
    (tmp_path / "folder.safetensors").mkdir()
    cases = {**FILES, "cut.safetensors": (cut, "damaged, cut short"), "folder.safetensors": (None, "is a folder"),
             "/dev/null": (None, "is not a file")}  # fmt: skip
    for name, (content, words) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        for command in (("check-lora", name), ("export", name, "-o", "x"), ("merge", name, "-o", "x")):
            done = cli(app, *command)
            assert (done.code, words in done.err) == (2, True), (command, done.err)
            assert len(done.err.splitlines()) == 2


def test_a_header_as_long_as_a_pickle_begins_is_no_pickle(tmp_path):
    save_file(state(), tmp_path / "a.safetensors", metadata={"pad": ""})
    length = int.from_bytes((tmp_path / "a.safetensors").read_bytes()[:8], "little")
    pad = (0x80 - length) % 0x100  # \x80 is how a pickle begins
    save_file(state(), tmp_path / "a.safetensors", metadata={"pad": "x" * pad})
    assert (tmp_path / "a.safetensors").read_bytes()[:1] == b"\x80"
    assert set(read_file(tmp_path / "a.safetensors")[0]) == set(state())


def test_a_target_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path, cli, monkeypatch):
    save_file(state(), tmp_path / "a.safetensors")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "nowhere")
    monkeypatch.setattr(lora_file, "safe_open", None)
    for target, words in (
        ("folder", "it is a folder"), ("a.safetensors", "already exists"), ("link.safetensors", "is a link to"),
        ("a.safetensors/b/c", "a.safetensors is a file"),
    ):  # fmt: skip
        for command in ("export", "merge"):
            done = cli(app, command, "a.safetensors", "-o", target)
            assert (done.code, words in done.err) == (2, True), (command, target, done.err)


def test_a_start_that_cannot_be_is_refused_before_the_base_is_loaded(tmp_path, toy_cache, toy_model, capsys):
    save_file(state(change=on_b(lambda t: t * NAN)), tmp_path / "nan.safetensors")
    save_file(state(), tmp_path / "good.safetensors")
    lora = LoraConfig(rank=4, targets=("self_attention.to_query", "feed_forward.in_layer"))
    for name, change, words in (
        ("nan", {}, "has NaN or infinity in 2 of 4 tensors"),
        ("gone", {}, "There is no .*gone.safetensors"),
        ("good", {"rank": 2}, "has rank 4 at .*, the adapter 2"),
        ("good", {"targets": ("cross_attention.to_key",)}, "which train.lora.targets does not"),
    ):
        start = replace(lora, init_lora=str(tmp_path / f"{name}.safetensors"), **change)
        with pytest.raises(RunError, match=words):
            start_run(tmp_path / "runs" / f"{name}{len(change)}{words[4]}", toy_cache("fp32"), toy_model,
                      replace(CONFIG, lora=start))  # fmt: skip
    assert "Loading" not in capsys.readouterr().err

    config = replace(CONFIG, steps=1, optim=OptimConfig(lr_scheduler="constant"))
    config = replace(config, lora=replace(lora, init_lora=str(tmp_path / "good.safetensors")))
    start_run(tmp_path / "run", toy_cache("fp32"), toy_model, config)
    (tmp_path / "good.safetensors").unlink()  # the saved state has all that is needed to go on
    assert go_on(tmp_path / "run", steps=2).steps == 2


def test_a_saved_state_with_nan_is_refused(tmp_path):
    parameters = {"x": torch.nn.Parameter(torch.zeros(2))}
    session = Session(None, parameters, None, None, None)
    saved = SimpleNamespace(folder=tmp_path, tensors=lambda part: {"x": torch.tensor([1.0, torch.nan])})
    with pytest.raises(RunError, match="has NaN or infinity in 1 of 1 tensor: x"):
        session.restore(saved)
    assert not parameters["x"].any()


@pytest.mark.parametrize("manifest", ["step.json", "state.json"])
def test_the_state_of_a_run_is_no_lora_since_its_matrices_lack_their_strength(tmp_path, cli, manifest):
    """train.lora.alpha is not in a state's matrices: exported, they would act at alpha / rank of their strength."""
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000002.safetensors"
    folder = tmp_path / "run" / "state" / "step-000002"
    for parent in (folder, checkpoint.parent):
        parent.mkdir(parents=True)
    save_file(state("{}", "{}.lora_A.default.weight", "{}.lora_B.default.weight"), folder / "adapter.safetensors")
    (folder / manifest).write_text("{}", encoding="utf-8")
    save_file(state(), checkpoint)
    for path in ("run/state/step-000002", "run/state/step-000002/adapter.safetensors"):
        for arguments in (["export", path], ["check-lora", path], ["merge", path, path, "-o", "merged.safetensors"]):
            done = cli(app, *arguments)
            assert done.code == 2
            words = " ".join(done.err.split())
            assert words.startswith(f"error: {path} is the state that a run resumes from")
            assert words.endswith(f"fix: Give the LoRA of that step: {checkpoint}")
    assert cli(app, "check-lora", str(checkpoint)).code == 0


def test_a_model_folder_that_is_not_there_is_named_and_nobody_is_told_to_download_it(tmp_path):
    save_file(state(), tmp_path / "a.safetensors")
    (tmp_path / "other").mkdir()
    for name, problem in (("none", "There is no folder none"), ("other", "other has no transformer/config.json")):
        done = Cli(tmp_path)(app, "check-lora", "a.safetensors", "--model", name)
        assert (done.code, done.err.splitlines()[0]) == (2, f"error: {problem}")
        assert "leave it out" in done.err
