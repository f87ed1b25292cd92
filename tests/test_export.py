"""LoRA files for other programs: what diffusers and ComfyUI load of each family of keys; exact exports and merges."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from k5cache.shared.errors import RunError
from k5train.adapter.attach import add_lora
from k5train.adapter.comfyui import OTHER_MODEL
from k5train.adapter.export import architecture, side_by_side
from k5train.adapter.files import lora_state_dict
from k5train.adapter.pairs import read_pairs
from k5train.adapter.targets import linear_sizes
from k5train.adapter.who_loads import BY_PIPELINE, check_lora, compare_saved, load_by_diffusers
from k5train.base.quantize import empty_transformer, load_transformer
from k5train.cli import app
from k5train.commands.lora import _model_of_run
from k5train.options.adapter import LoraConfig
from tests.cli import Cli
from tests.runs import CONFIG, start_run

MODULE = "visual_transformer_blocks.0.self_attention.to_query"
OTHER = "visual_transformer_blocks.1.feed_forward.in_layer"


@pytest.fixture(scope="module")
def empty(toy_model):
    return empty_transformer(toy_model)


@pytest.fixture(scope="module")
def pairs(empty):
    """Two modules' matrices, ranks 2 and 3."""
    generator = torch.Generator().manual_seed(0)
    matrices = {}
    for name, rank in ((MODULE, 2), (OTHER, 3)):
        linear = empty.get_submodule(name)
        matrices[name] = (torch.randn(rank, linear.in_features, generator=generator),
                      torch.randn(linear.out_features, rank, generator=generator))  # fmt: skip
    return matrices


def write(path, pairs, down="{}.lora_A.weight", up="{}.lora_B.weight", name="transformer.{}", flat=False, **more):
    state = {}
    for module, (a, b) in pairs.items():
        key = name.format(module.replace(".", "_") if flat else module)
        state |= {down.format(key): a, up.format(key): b}
        state |= {f"{key}.{end}": tensor for end, tensor in more.items()}
    save_file({key: tensor.clone() for key, tensor in state.items()}, path)
    return path


KOHYA = {"down": "{}.lora_down.weight", "up": "{}.lora_up.weight", "name": "lora_unet_{}", "flat": True}
# How many modules of each family of keys are loaded by (diffusers, ComfyUI), or "error".
FAMILIES = [
    ({}, (2, 2)),
    ({"name": "diffusion_model.{}"}, (0, 2)),
    ({"name": "{}"}, (0, 2)),
    ({"name": "base_model.model.{}"}, (0, 0)),
    (KOHYA, (0, 2)),
    ({**KOHYA, "alpha": torch.tensor(1.0)}, (0, 2)),
    ({"alpha": torch.tensor(1.0)}, ("error", 2)),
]


@pytest.mark.parametrize(("keys", "expected"), FAMILIES, ids=lambda v: v.get("name", "") if isinstance(v, dict) else "")
def test_what_diffusers_and_comfyui_load_of_each_family_of_keys(tmp_path, empty, pairs, keys, expected):
    report = check_lora(write(tmp_path / "lora.safetensors", pairs, **keys), empty)
    diffusers, comfyui = report.programs
    assert ("error" if diffusers.error else len(diffusers.modules)) == expected[0]
    assert len(comfyui.modules) == expected[1]
    assert report.is_good == (expected == (2, 2))
    assert report.ranks == (2, 3)
    assert not any(hasattr(module, "lora_A") for module in empty.modules())  # left as it was


def test_a_module_that_the_model_does_not_have_is_left_out_by_both(tmp_path, empty, pairs):
    beyond = {**pairs, "visual_transformer_blocks.77.self_attention.to_query": pairs[MODULE]}
    report = check_lora(write(tmp_path / "lora.safetensors", beyond), empty)
    assert not report.is_good
    assert [len(program.modules) for program in report.programs] == [2, 2]
    assert all("blocks.77" in program.unused[0] for program in report.programs)


@pytest.mark.parametrize("keys", [family for family, _ in FAMILIES], ids=lambda v: v.get("name", ""))
def test_every_family_exported_for_diffusers_is_loaded_in_full_with_its_strength(
    tmp_path, toy_model, empty, pairs, keys
):
    source = write(tmp_path / "source.safetensors", pairs, **keys)
    done = Cli(tmp_path)(app, "export", str(source), "--format", "diffusers", "--model", str(toy_model), "-o", "out.st")
    assert done.code == 0, done.err
    assert check_lora(tmp_path / "out.st", empty).is_good
    loaded, error = load_by_diffusers(tmp_path / "out.st", empty)
    assert error is None
    for module, (down, up) in pairs.items():
        factor = 1.0 / down.shape[0] if "alpha" in keys else 1.0
        assert torch.equal(loaded[f"{module}.lora_A.weight"], down)
        assert torch.equal(loaded[f"{module}.lora_B.weight"], up * factor)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_file_of_diffusers_has_the_strength_that_its_metadata_says(tmp_path, toy_model, empty, use_rslora):
    config = PeftLoraConfig(
        r=8, lora_alpha=4, use_rslora=use_rslora, target_modules=[MODULE, OTHER],
        rank_pattern={OTHER: 4}, alpha_pattern={"feed_forward.in_layer": 2},
    )  # fmt: skip
    transformer = load_transformer(toy_model, "no_change", torch.float32, torch.device("cpu"))
    transformer.add_adapter(config)
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name in (MODULE, OTHER):
        layer = transformer.get_submodule(name)
        for part in ("lora_A", "lora_B"):
            weight = getattr(layer, part)["default"].weight
            weight.data = torch.randn(weight.shape, generator=generator)
            state[f"transformer.{name}.{part}.weight"] = weight.data.clone()
    names = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
    facts = {f"transformer.{key}": getattr(config, key) for key in names}
    save_file(state, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": json.dumps(facts)})
    # peft's own: other keys, and the config in a file beside it
    (tmp_path / "adapter_config.json").write_text(json.dumps({key: getattr(config, key) for key in names}))
    peft_state = {key.replace("transformer.", "base_model.model.", 1): tensor for key, tensor in state.items()}
    save_file(peft_state, tmp_path / "adapter_model.safetensors")
    ours = read_pairs(tmp_path / "a.safetensors", linear_sizes(empty))
    of_peft = read_pairs(tmp_path / "adapter_model.safetensors", linear_sizes(empty))
    for name, (down, up) in ours.items():
        assert torch.equal(of_peft[name][1], up)
        theirs = transformer.get_submodule(name).get_delta_weight("default")
        torch.testing.assert_close(up @ down, theirs)


@pytest.mark.parametrize("prefix", ["transformer.", "diffusion_model.", ""])
def test_a_file_of_a_model_of_another_size_is_known_as_one(tmp_path, empty, pairs, prefix):
    def wider(name, down, up):
        return {f"{prefix}{name}.lora_A.weight": torch.zeros(down.shape[0], down.shape[1] + 16),
                f"{prefix}{name}.lora_B.weight": up}  # fmt: skip

    state = {k: t for name, (down, up) in pairs.items() for k, t in wider(name, down, up).items()}
    save_file(state, tmp_path / "wide.safetensors")
    report = check_lora(tmp_path / "wide.safetensors", empty)
    comfy = next(program for program in report.programs if program.name == "ComfyUI")
    assert comfy.error == OTHER_MODEL
    with pytest.raises(RunError, match="belongs to a model of another size: visual_transformer_blocks"):
        read_pairs(tmp_path / "wide.safetensors", linear_sizes(empty))


def test_kohya_keys_carry_alpha_as_the_rank_and_come_back_the_same(tmp_path, toy_model, empty, pairs):
    write(tmp_path / "source.safetensors", pairs)
    done = Cli(tmp_path)(app, "export", "source.safetensors", "--model", str(toy_model))
    assert done.code == 0, done.err
    state = load_file(tmp_path / "source-kohya.safetensors")
    flat = f"lora_unet_{MODULE.replace('.', '_')}"
    assert state[f"{flat}.alpha"].item() == 2.0
    assert torch.equal(state[f"{flat}.lora_up.weight"], pairs[MODULE][1])
    back = read_pairs(tmp_path / "source-kohya.safetensors", linear_sizes(empty))
    assert all(torch.equal(back[name][i], pairs[name][i]) for name in pairs for i in (0, 1))
    again = Cli(tmp_path)(app, "export", "source.safetensors", "--model", str(toy_model))
    assert (again.code, "already exists" in again.err) == (2, True)


def test_a_merge_does_exactly_what_its_parts_do_together(tmp_path, toy_model, empty, pairs):
    generator = torch.Generator().manual_seed(1)
    other = {MODULE: tuple(torch.randn(t.shape, generator=generator) for t in pairs[MODULE])}
    write(tmp_path / "a.safetensors", pairs)
    write(tmp_path / "b.safetensors", other, **KOHYA)
    done = Cli(tmp_path)(app, "merge", "a.safetensors", "b.safetensors", "-o", "c.safetensors",
                         "-w", "0.5", "-w", "-2", "--model", str(toy_model))  # fmt: skip
    assert done.code == 0, done.err
    merged, _ = load_by_diffusers(tmp_path / "c.safetensors", empty)
    down, up = merged[f"{MODULE}.lora_A.weight"], merged[f"{MODULE}.lora_B.weight"]
    assert down.shape[0] == 4
    expected = 0.5 * pairs[MODULE][1] @ pairs[MODULE][0] - 2 * other[MODULE][1] @ other[MODULE][0]
    torch.testing.assert_close(up @ down, expected, rtol=0, atol=1e-5)  # float32 sums of 4 products of about 1
    assert torch.equal(merged[f"{OTHER}.lora_B.weight"], 0.5 * pairs[OTHER][1])
    assert check_lora(tmp_path / "c.safetensors", empty).is_good


def test_merging_nothing_with_weight_one_changes_no_bit(pairs):
    merged = side_by_side([pairs], [1.0])
    assert all(torch.equal(merged[name][i], pairs[name][i]) for name in pairs for i in (0, 1))


def test_a_merge_wants_one_weight_a_file(tmp_path, toy_model, pairs):
    write(tmp_path / "a.safetensors", pairs)
    refused = Cli(tmp_path)(app, "merge", "a.safetensors", "a.safetensors", "-o", "c", "-w", "1")
    assert (refused.code, "2 files and 1 weight" in refused.err) == (2, True)


def test_check_lora_says_so_and_how_to_mend_it(tmp_path, toy_model, pairs):
    write(tmp_path / "lora.safetensors", pairs, name="diffusion_model.{}")
    done = Cli(tmp_path)(app, "check-lora", "lora.safetensors", "--model", str(toy_model))
    assert done.code == 1
    assert "loads nothing, without an error" in done.out
    assert "loads all of it" in done.out
    assert "k5train export lora.safetensors --format diffusers" in done.out
    (tmp_path / "text.safetensors").write_text("no tensors")
    assert Cli(tmp_path)(app, "check-lora", "text.safetensors", "--model", str(toy_model)).code == 2


def test_check_lora_asks_for_the_model_of_a_file_of_another_size(tmp_path, pairs):
    write(tmp_path / "lora.safetensors", pairs)
    done = Cli(tmp_path)(app, "check-lora", "lora.safetensors")  # the toy's file against the full size
    assert done.code == 1
    assert "its matrices belong to a model of another size" in " ".join(done.out.split())
    assert "k5train check-lora lora.safetensors --model DIR" in done.out


def test_the_published_architecture_is_at_hand_without_a_download():
    names = linear_sizes(architecture(None))
    assert sum(name.startswith("visual_transformer_blocks.49.") for name in names) == 11
    assert "text_transformer_blocks.1.self_attention.to_query" in names


def test_a_trained_file_says_how_it_was_made_and_is_compared_after_saving(tmp_path, toy_cache, toy_model, monkeypatch):
    from k5cache.shared.errors import RunError
    from k5cache.shared.fingerprint import fingerprint
    from k5train.adapter import files

    config = replace(CONFIG, steps=2)
    start_run(tmp_path / "good", toy_cache("fp32"), toy_model, config, is_whole=True)
    with safe_open(tmp_path / "good" / "good.safetensors", framework="pt") as file:
        facts = file.metadata()
    assert facts["modelspec.sai_model_spec"] == "1.0.1"
    assert facts["modelspec.architecture"] == "kandinsky-5-image-lite/lora"
    assert facts["modelspec.title"] == "good"
    assert facts["modelspec.resolution"] == "64x64"
    assert facts["k5.base_fingerprint"] == fingerprint(toy_model, "transformer")
    assert json.loads(facts["k5.caches"])[0]["images"] == 6
    assert json.loads(facts["k5.recipe"])["lora"]["rank"] == 2
    assert (facts["k5.seed"], facts["k5.step"]) == ("42", "2")
    assert set(json.loads(facts["k5.versions"])) == {"kandinsky5-lora", "torch", "diffusers", "peft"}

    monkeypatch.setattr(files, "PREFIX", "diffusion_model.")  # what diffusers would leave out without a word
    with pytest.raises(RunError, match=r"diffusers does not load .* as it was trained: 48 of 48 tensors differ"):
        start_run(tmp_path / "bad", toy_cache("fp32"), toy_model, config, is_whole=True)
    assert (tmp_path / "bad" / "result.json").is_file()


WAYS = {
    "lora": "pipe.load_lora_weights(FILE)",
    "rslora": "pipe.load_lora_weights(FILE)",
    "dora": "pipe.load_lora_weights(FILE)",
    "lokr": 'pipe.transformer.load_lora_adapter(FILE, prefix="transformer")',
}
# The programs that load every key of each kind. For the others the report lists what they leave out.
WHOLE = {
    "lora": ["diffusers", "ComfyUI"],
    "rslora": ["diffusers", "ComfyUI"],
    "dora": ["diffusers"],
    "lokr": ["diffusers' transformer", "ComfyUI"],
}


@pytest.mark.parametrize(
    ("precision", "algo"),
    [
        *(("no_change", algo) for algo in WAYS),
        ("int8-quanto", "dora"),  # the only one that reads the base's weights
        *(pytest.param("int8-quanto", algo, marks=pytest.mark.long) for algo in WAYS if algo != "dora"),
    ],
)
def test_every_kind_of_adapter_is_loaded_back_as_its_result_says_and_compared(
    tmp_path, toy_cache, toy_model, empty, monkeypatch, algo, precision
):
    from k5cache.shared.errors import RunError
    from k5train.adapter import files

    config = replace(
        CONFIG, steps=2, base_model_precision=precision, lora=LoraConfig(algo=algo, rank=4, targets=("qkv",))
    )
    result = start_run(tmp_path / "good", toy_cache("fp32"), toy_model, config, is_whole=True)
    assert result.loads_by == WAYS[algo]
    report = check_lora(result.lora, empty)
    assert report.kind == ("lora" if algo == "rslora" else algo)
    assert [program.name for program in report.programs if program.loads_all] == WHOLE[algo]
    assert {len(program.modules) for program in report.programs if program.loads_all} == {24}
    assert _model_of_run(result.lora) == toy_model  # so check-lora, export and merge need no --model

    def changed(state, *args, **kwargs):
        last = sorted(state)[-1]
        save_file({**state, last: state[last] + 1}, *args, **kwargs)

    monkeypatch.setattr(files, "save_file", changed)
    with pytest.raises(RunError, match=r"diffusers does not load .* as it was trained: 1 of \d+ tensors differ"):
        start_run(tmp_path / "bad", toy_cache("fp32"), toy_model, config, is_whole=True)


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_a_tensor_that_a_file_lacks_is_noticed(tmp_path, toy_model, empty, part):
    """diffusers then leaves it out without a word: on the meta device, where nothing is compared as equal."""
    trained = empty_transformer(toy_model).to_empty(device="cpu")
    add_lora(trained, LoraConfig(rank=2, targets=("qkv",)), 0)
    state = lora_state_dict(trained)
    save_file(state, tmp_path / "whole.safetensors", metadata={"format": "pt"})
    compare_saved(tmp_path / "whole.safetensors", trained, empty, BY_PIPELINE)
    dropped = [key for key in state if part in key][3]
    save_file({k: t for k, t in state.items() if k != dropped}, tmp_path / "less.safetensors", {"format": "pt"})
    with pytest.raises(RunError, match=r"diffusers does not load .*less.* as it was trained: 1 of 48 tensors differ"):
        compare_saved(tmp_path / "less.safetensors", trained, empty, BY_PIPELINE)
