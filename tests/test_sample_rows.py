"""`k5train sample`: each LoRA at each strength is a row on the same noise, and what does not exist is refused first.

The run's one prompt has a name, which a library gave it.
"""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.loaders import KandinskyLoraLoaderMixin
from PIL import Image
from safetensors.torch import load_file, save_file

from k5cache.cli import app as cache_app
from k5cache.shared.errors import RecipeError, RunError
from k5cache.shared.inside import as_file_names, name_problem
from k5cache.shared.recipe import parse, read
from k5train.adapter.attach import adapted_layers, add_lora, lora_parameters
from k5train.adapter.files import save_lora
from k5train.adapter.loaded import loaded, set_strength, vet
from k5train.base.quantize import empty_transformer, load_transformer
from k5train.cli import app
from k5train.options.adapter import LoraConfig
from k5train.options.optimizer import OptimConfig
from k5train.options.train import TrainConfig
from k5train.options.validation import ValidationConfig
from k5train.pictures import sheet
from k5train.pictures.saved import read_labels, read_pictures, save_pictures
from k5train.runs.folder import Run
from k5train.runs.metrics import read_metrics
from k5train.runs.recipe import read_recipe
from k5train.training import picture_rows
from k5train.training.start import with_library
from tests.cli import Cli
from tests.parity import PROMPTS, as_the_pipeline_calls_it, reference_transformer
from tests.runs import CONFIG, start_run

NAME = "fox? in: snow"  # as a person may call it
DRAWN = ValidationConfig(
    num_inference_steps=1, guidance_scale=1.0, width=32, height=32, before=False, split=0.34,
    held_out_every=1, held_out_sigmas=1,
)  # fmt: skip
OPTIM = OptimConfig(lr=1e-2, warmup_steps=0, ema_decay=0.5)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, toy_cache, toy_model) -> Path:
    """A run of two steps with a best LoRA, an average, and a checkpoint of each step."""
    root = tmp_path_factory.mktemp("runs") / "fox"
    library = root.parent / "library.json"
    library.write_text(json.dumps({NAME: PROMPTS[0]}), encoding="utf-8")
    config = replace(CONFIG, steps=2, checkpoint_every=1, optim=OPTIM,
                     validation=replace(DRAWN, prompt_library=str(library)))  # fmt: skip
    start_run(root, toy_cache("fp32"), toy_model, with_library(config))
    library.unlink()
    return root


@pytest.fixture(scope="module")
def files(tmp_path_factory, toy_model) -> dict[str, Path]:
    """A LoRA, a DoRA and a LoKr of random values, as runs write them."""
    folder = tmp_path_factory.mktemp("loras")
    for algo in ("lora", "dora", "lokr"):
        transformer = load_transformer(toy_model, "no_change", torch.float32, "cpu")
        add_lora(transformer, LoraConfig(algo=algo, rank=4, targets=("qkv",)), seed=1)
        random = torch.Generator().manual_seed(2)
        for parameter in lora_parameters(transformer):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=random)
        save_lora(folder / f"{algo}.safetensors", transformer)
    return {path.stem: path for path in folder.iterdir()}


@torch.no_grad()
def velocity(transformer) -> torch.Tensor:
    """What the transformer answers to fixed inputs."""
    random = torch.Generator().manual_seed(5)
    latents, embeds = torch.randn(1, 1, 8, 8, 16, generator=random), torch.randn(1, 7, 3584, generator=random)
    config = transformer.config
    embeds, pooled = embeds[..., : config.in_text_dim], torch.randn(1, config.in_text_dim2, generator=random)
    return as_the_pipeline_calls_it(transformer, latents, torch.tensor([0.5]), embeds, pooled)


def test_a_strength_is_that_of_diffusers_and_the_base_has_its_bits_again_afterwards(toy_model, files):
    ours = load_transformer(toy_model, "no_change", torch.float32, "cpu").eval()
    before, at_base = {name: t.clone() for name, t in ours.state_dict().items()}, velocity(ours)
    for algo, path in files.items():
        theirs = reference_transformer(toy_model, torch.float32).eval()
        theirs.load_lora_adapter(str(path), prefix="transformer", adapter_name="mine")
        with loaded(ours, path):
            for strength in (0.7, 1.0, -1.5, 0.0):
                theirs.set_adapters(["mine"], [strength])
                set_strength(ours, strength)
                assert torch.equal(velocity(ours), velocity(theirs)), (algo, strength)
            assert torch.equal(velocity(ours), at_base) == (algo != "dora")  # now at 0: magnitudes are not scaled
        after = ours.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before), algo


def test_a_run_keeps_the_names_of_its_prompts_and_draws_by_them(finished, tmp_path, monkeypatch):
    (config,) = parse(read_recipe(finished), {"train": TrainConfig})
    assert (config.validation.prompts, config.validation.prompt_names) == (PROMPTS[:1], ("fox_ in_ snow",))
    assert read_labels(Run(finished).samples(2)) == [f"fox_ in_ snow\n{PROMPTS[0]}"]
    heads = []
    monkeypatch.setattr(picture_rows.sample, "draw", lambda transformer, folder, drawings, *_: heads.append(
        [drawing.head for drawing in drawings]) or [Image.new("RGB", (8, 8))] * len(drawings))  # fmt: skip
    for prompts in ([], ["--prompt", PROMPTS[1], "--prompt", PROMPTS[0]]):
        done = Cli(tmp_path)(app, "sample", str(finished), *prompts, "-o", "out.png")
        assert done.code == 0, done.err
        assert "Pictures are drawn at 32x32. diffusers' pipeline rounds" in done.err
        assert "set pipe.resolutions = [(32, 32)]" in " ".join(done.err.split())
    assert heads[::2] == [[f"fox_ in_ snow\n{PROMPTS[0]}"], [PROMPTS[1], f"fox_ in_ snow\n{PROMPTS[0]}"]]


def test_without_prompts_the_commands_that_are_advised_work(finished, toy_cache, tmp_path, monkeypatch):
    monkeypatch.setattr(picture_rows.sample, "draw", lambda *_: [Image.new("RGB", (8, 8))])
    cache = tmp_path / "cache"
    shutil.copytree(toy_cache("fp32"), cache)
    run = tmp_path / "my runs" / finished.name
    shutil.copytree(finished, run)
    (run / "run.json").write_text(json.dumps({"cache": str(cache)}), encoding="utf-8")  # as an earlier version wrote it
    without = [f"train.validation.{name}=[]" for name in ("prompts", "prompt_names")]
    done = Cli(tmp_path)(app, "sample", str(run), "--set", without[0], "--set", without[1])
    assert done.code == 2
    advice = " ".join(done.err.split()).partition("that the cache holds: ")[2]
    held, _, rest = advice.partition(". Or add one, then draw it: ")
    commands = [shlex.split(words.replace("PROMPT", "'a new prompt'")) for words in (held, *rest.split(" and k5train"))]
    for program, command in zip((app, cache_app, app), commands, strict=True):
        arguments = command[command.index("sample" if program is app else "prompts") :]
        done = Cli(tmp_path)(program, *arguments)
        assert done.code == 0, done.err
    assert len(list((run / "samples").glob("sample-*.png"))) == 2


def test_names_of_a_library_become_file_names_that_differ_everywhere():
    names = ["a/b", "a:b", "A_B", "", "..", "con", "COM1.x", "x" * 300, "é" * 300, "tab\there", "e\u0301", "\udce9"]
    cleaned = as_file_names(names)
    assert cleaned[:7] == ["a_b", "a_b-2", "A_B-3", "_", "_-2", "_con", "_COM1.x"]
    assert cleaned[9:] == ["tab_here", "é", "_-3"]
    assert all(name_problem(name) is None for name in cleaned)
    assert len({name.casefold() for name in cleaned}) == len(names)
    assert as_file_names(cleaned) == cleaned


def test_pictures_are_the_same_whatever_they_are_called_and_names_lead_nowhere_else(tmp_path):
    drawn = {"prompts": ["a", "b", "c"], "seed": 1}
    pictures = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    for names, files in (
        (["", "fox", "00"], ["00-2.png", "00.png", "fox.png"]),
        (["../x", "/etc/y", "Fox"], ["Fox.png", "_etc_y.png", "_x.png"]),
    ):
        folder = tmp_path / names[2]
        save_pictures(folder, pictures, {**drawn, "names": names})
        assert sorted(path.name for path in folder.glob("*.png")) == files
        for wanted in (drawn, {**drawn, "names": ["x", "y", "z"]}, None):
            assert [p.tobytes() for p in read_pictures(folder, wanted)] == [p.tobytes() for p in pictures]
    assert {path.name for path in tmp_path.iterdir()} == {"00", "Fox"}
    with pytest.raises(RecipeError) as caught:
        parse(read(None, ["train.validation.prompts=['a', 'b']", "train.validation.prompt_names=['con', 'x', 'X']"]),
              {"train": TrainConfig})  # fmt: skip
    for words in ("is a name that Windows keeps", "has a name twice", "has 3 names for 2 prompts: give one for each"):
        assert f"train.validation.prompt_names {words}" in caught.value.problem.replace("has a name that is", "is")


def rows_of(monkeypatch) -> list[list[tuple[str, np.ndarray]]]:
    """A list to which the rows of every grid are added that is drawn from now on."""
    grids: list[list[tuple[str, np.ndarray]]] = []

    def noting(rows, columns):
        grids.append([(label, np.asarray(pictures[0])) for label, pictures in rows])
        return original(rows, columns)

    original = sheet.grid
    monkeypatch.setattr(sheet, "grid", noting)
    return grids


@pytest.mark.long
def test_every_choice_is_a_row_on_the_same_noise_below_the_base_model(finished, files, tmp_path, monkeypatch):
    grids = rows_of(monkeypatch)
    for file in files.values():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    done = Cli(tmp_path)(
        app, "sample", str(finished), "--which", "final", "--which", "02", "--which", "ema", "--strength", "0",
        "--lora", "lokr.safetensors", "--lora", "dora.safetensors", "--lora", "./lokr.safetensors", "--strength", "1",
        "-o", "out.png",
    )  # fmt: skip
    assert done.code == 0, done.err
    (rows,) = grids
    names = ("final", "step 2", "EMA", "lokr", "dora")
    assert [label for label, _ in rows] == ["base model", *(f"{name} x {x}" for name in names for x in (0, 1))]
    pictures = dict(rows)
    for name in names:  # at 0 all but the DoRA are the base model
        assert np.array_equal(pictures[f"{name} x 0"], pictures["base model"]) == (name != "dora"), name
        assert not np.array_equal(pictures[f"{name} x 1"], pictures["base model"]), name
    assert done.err.count("is a DoRA: a strength scales its matrices") == 1
    with Image.open(Run(finished).samples(2) / "fox_ in_ snow.png") as drawn:  # in training, by the same adapter
        assert np.array_equal(pictures["step 2 x 1"], np.asarray(drawn))
    assert np.array_equal(pictures["final x 1"], pictures["step 2 x 1"])
    for arguments, labels in (
        (("--step", "1"), ["base model", "step 1"]),
        (("--lora", str(finished), "--strength", "0.7"), ["base model", "fox x 0.7"]),
    ):
        done = Cli(tmp_path)(app, "sample", str(finished), *arguments, "-o", "out.png")
        assert done.code == 0, done.err
        assert [label for label, _ in grids.pop()] == labels


def test_blocks_that_run_in_our_own_forward_pass_know_which_adapter_is_on_and_how_strong(
    finished, tmp_path, monkeypatch
):
    """A block remembers its adapter by its address in memory, which the next adapter may have again."""
    grids = rows_of(monkeypatch)
    eager = ("-o", "out.png", "--set", "train.memory.execution=eager")
    chosen = (("--which", "1"), ("--which", "2"), ("--strength", "1"), ("--strength", "2"))
    together, *alone = (
        Cli(tmp_path)(app, "sample", str(finished), *(word for option in options for word in option), *eager)
        for options in (chosen, (chosen[1], chosen[2]), (chosen[1], chosen[3]))
    )
    assert (together.code, *(done.code for done in alone)) == (0, 0, 0), together.err
    warned = ["A strength of 2 changes the model more" in done.err for done in (together, *alone)]
    assert warned == [True, False, True]
    rows = [picture for _, picture in grids[0]]
    assert all(not np.array_equal(a, b) for i, a in enumerate(rows) for b in rows[:i])
    assert [np.array_equal(rows[3], grids[1][1][1]), np.array_equal(rows[4], grids[2][1][1])] == [True, True]


def test_a_long_label_is_wrapped_beside_its_row_and_not_the_whole_sheet():
    square = Image.new("RGB", (64, 64), "red")
    width = {label: sheet.grid([(label, [square])], ["a fox"]).width for label in ("x" * 20, "x" * 400, "x y " * 100)}
    assert len({*width.values()}) <= 3
    assert max(width.values()) < 500


def test_what_does_not_exist_or_is_no_lora_of_the_model_is_refused_before_the_transformer_is_loaded(
    finished, files, tmp_path, monkeypatch
):
    monkeypatch.setattr(picture_rows, "load", lambda *_: pytest.fail("it was loaded"))
    (tmp_path / "page.safetensors").write_text("<!doctype html>")
    state = load_file(files["dora"])
    save_file({key.replace("transformer.", ""): t for key, t in state.items()}, tmp_path / "bare.safetensors")
    harmful = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.megatron_core": "os"})}
    save_file(state, tmp_path / "harmful.safetensors", metadata=harmful)
    save_file({k: t * float("nan") for k, t in state.items()}, tmp_path / "nan.safetensors")
    run = Run(finished)
    for arguments, words in (
        (("--which", "7"), f"{finished} has no LoRA of step 7 fix: Use --which with one of: final, best, ema, 1, 2"),
        (("--step", "7"), "one of: final, best, ema, 1, 2"),
        (("--which", "last"), "--which last names no LoRA"),
        (("--lora", "gone.safetensors"), "There is no gone.safetensors"),
        (("--lora", "."), ". is neither a LoRA nor a run"),
        (("--lora", "page.safetensors"), "page.safetensors is a web page, not a LoRA"),
        (("--lora", "bare.safetensors"), "bare.safetensors is a DoRA that diffusers does not load as it is"),
        (("--lora", "harmful.safetensors"), "peft would do more than load a LoRA"),
        (("--lora", "nan.safetensors"), "has NaN or infinity"),
        (("--strength", "nan"), "A strength of nan makes no picture"),
    ):
        done = Cli(tmp_path)(app, "sample", str(finished), *arguments, "-o", "out.png")
        assert done.code == 2, arguments
        assert words in " ".join(done.err.split()), done.err
    elsewhere = tmp_path / finished.name
    shutil.copytree(finished, elsewhere)
    (elsewhere / "run.json").write_text(json.dumps({"cache": "cache/of another folder"}), encoding="utf-8")
    done = Cli(tmp_path)(app, "sample", elsewhere.name, "-o", "out.png")
    words = f"If it has moved: k5train sample {elsewhere.name} --cache PATH"
    assert (done.code, words in " ".join(done.err.split())) == (2, True), done.err
    best = run.best.rename(tmp_path / "aside")
    try:
        done = Cli(tmp_path)(app, "sample", str(finished), "--which", "best")
        assert "one of: final, ema, 1, 2" in " ".join(done.err.split())
    finally:
        best.rename(run.best)
    assert not (tmp_path / "out.png").exists()


def test_a_strangers_dora_acts_at_the_strength_that_its_metadata_says(toy_model, files, tmp_path):
    config = {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": ["to_query", "to_key", "to_value"]}
    metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in config.items()})}
    path = tmp_path / "stranger.safetensors"
    save_file(load_file(files["dora"]), path, metadata=metadata)
    assert vet(path, empty_transformer(toy_model)) == "dora"
    ours = load_transformer(toy_model, "no_change", torch.float32, "cpu").eval()
    theirs = reference_transformer(toy_model, torch.float32)
    tensors, config = KandinskyLoraLoaderMixin.lora_state_dict(str(path), return_lora_metadata=True)
    KandinskyLoraLoaderMixin.load_lora_into_transformer(tensors, theirs, adapter_name="mine", metadata=config)
    with loaded(ours, path):
        assert adapted_layers(ours)[0][1].scaling["default"] == 2.0
        assert torch.equal(velocity(ours), velocity(theirs.eval()))


@pytest.mark.parametrize(("step", "warnings"), [("0", 1), ("1", 0)])
def test_a_best_of_before_the_first_step_is_said_to_be_none(tmp_path, monkeypatch, step, warnings):
    path = tmp_path / "r-best.safetensors"
    save_file({"a": torch.zeros(1)}, path, {"k5.step": step})
    said: list[str] = []
    monkeypatch.setattr(picture_rows, "empty_transformer", lambda folder: None)
    monkeypatch.setattr(picture_rows, "vet", lambda path, empty: "lora")
    monkeypatch.setattr(picture_rows.console, "warn", said.append)
    picture_rows._vet([picture_rows.Choice("best", path, 1.0)], tmp_path, "t2i")
    assert [line.endswith("the run never found a better one") for line in said] == [True] * warnings


def test_each_row_is_measured_as_the_run_measured_its_loras(finished, tmp_path):
    measured = {row["step"]: row for row in read_metrics(Run(finished).metrics) if "held_out_loss" in row}
    expected = {
        "base model": measured[0]["held_out_loss"],
        "final": measured[2]["held_out_loss"],
        "best": min(row["held_out_loss"] for row in measured.values()),
        "EMA": measured[2]["ema_held_out_loss"],
        "step 1": measured[1]["held_out_loss"],
    }
    which = [word for name in ("final", "best", "ema", "1") for word in ("--which", name)]
    done = Cli(tmp_path)(
        app, "sample", str(finished), *which, "--measure", "-o", "out.png", "--set", "train.validation.split=0.5"
    )
    assert done.code == 0, done.err
    lines = [line.rsplit(maxsplit=1) for line in done.out.splitlines()]
    assert lines[0] == ["row         held-out", "loss"]
    assert {line[0]: line[1] for line in lines if line and line[0] in expected} == {
        name: f"{loss:.4f}" for name, loss in expected.items()
    }
    assert len(set(expected.values())) >= 4


def test_vram_is_the_size_of_the_card_that_the_pictures_are_planned_for(finished, monkeypatch):
    def seen(run: Run, model: object, config: TrainConfig, *words: object) -> None:
        raise RunError(f"planned for {config.memory.vram}", "none")

    monkeypatch.setattr("k5train.training.more_pictures.resample", seen)
    for vram, said in (("12GB", "planned for 12GB"), ("lots", "--vram lots is not an amount of memory")):
        done = Cli(finished.parent)(app, "sample", finished.name, "--vram", vram)
        assert (done.code, done.err.splitlines()[-2]) == (2, f"error: {said}")
