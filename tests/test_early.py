"""What a user reads first: a refusal before any large library is imported, or the name of the library."""

from __future__ import annotations

import gc
import importlib.util
import json
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import save_file

from k5cache.cli import app as cache_app
from k5cache.shared import loading
from k5cache.shared.device import pick_device
from k5cache.shared.errors import RunError
from k5cache.shared.model import ModelConfig
from k5train.cli import app as train_app
from k5train.options.train import TrainConfig
from k5train.runs.folder import create_run
from tests.cli import Cli

# Runs the command lines on stdin, each as a user would, in one process. An import of a large library ends a command.
RUNNER = """
import json, os, shlex, sys
os.environ["HF_HUB_OFFLINE"] = "1"
from pathlib import Path
sys.path.insert(0, ROOT)
from k5cache.shared import console, loading

def end(line):
    raise AssertionError(line)

console.announced = lambda say: loading.announced(end)
from k5cache.cli import app as cache_app
from k5train.cli import app as train_app
from tests.cli import Cli
ends = []
for line in json.load(sys.stdin):
    program, *words = shlex.split(line)
    try:
        done = Cli(Path.cwd())({"k5cache": cache_app, "k5train": train_app}[program], *words)
        ends.append([done.code, done.out, done.err])
    except AssertionError as error:
        ends.append([None, "", str(error)])
print(json.dumps(ends))
"""

# Each command line, and a part of what it is refused for. Every command that can be refused has one.
REFUSED = {
    "k5cache encode nosuch": "There is no folder nosuch",
    "k5cache encode images --device gpu": "--device gpu is not a device",
    "k5cache plan nosuch": "There is no folder nosuch",
    "k5cache diff nosuch": "There is no folder nosuch",
    "k5cache info nosuch": "nosuch is not a cache",
    "k5cache verify nosuch": "nosuch is not a cache",
    "k5cache show nosuch": "nosuch is not a cache",
    "k5cache gc nosuch": "nosuch is not a cache",
    "k5cache merge nosuch other -o merged": "nosuch is not a cache",
    "k5cache selftest nosuch": "nosuch is not a cache",
    "k5cache bench": "There is nothing to measure",
    "k5cache prompts add nosuch fox": "nosuch is not a cache",
    "k5cache prompts list nosuch": "nosuch is not a cache",
    "k5cache push nosuch me/cats": "nosuch is not a cache",
    "k5cache pull me/cats": "Cannot pull me/cats",
    "k5train run nosuch": "nosuch is not a cache",
    "k5train run toy --model nosuch": "There is no model folder nosuch",
    "k5train run toy -o images": "images",
    "k5train run toy --set train.optim.lr=fast": "train.optim.lr",
    "k5train run toy --set train.objective.masked_loss=true": "the cache holds no masks",
    "k5train run toy --set train.device=gpu": "train.device must be one of",
    "k5train run toy --set train.lora.init_lora=nosuch": "There is no nosuch",
    "k5train run toy --set train.validation.pairs=2": "only for image-to-image",
    "k5train resume nosuch": "nosuch is not a run",
    "k5train sweep nosuch --grid train.lora.rank=1,2": "nosuch is not a cache",
    "k5train sweep toy": "A sweep needs a grid or a list",
    "k5train sample nosuch": "nosuch is not a run",
    "k5train compare nosuch": "There is no nosuch",
    "k5train report nosuch": "There is no nosuch",
    "k5train report run --max-size lots": "--max-size lots is not a size",
    "k5train plan nosuch": "nosuch is not a cache",
    "k5train plan --vram lots": "lots",
    "k5train run toy --vram lots": "--vram lots is not an amount of memory",
    "k5train selftest nosuch": "nosuch is not a cache",
    "k5train bench -o nosuch/numbers.json": "There is no folder nosuch",
    "k5train configure nowhere": "There is no folder or file nowhere",
    "k5train configure images": "images has no image",
    "k5train import nosuch": "nosuch",
    "k5train recipes nosuch": "There is no recipe nosuch",
    "k5train export nosuch": "There is no nosuch",
    "k5train export page.safetensors": "is a web page",
    "k5train merge nosuch other -o merged": "There is no nosuch",
    "k5train merge nosuch --into-base nosuch -o merged": "There is no nosuch",
    "k5train push nosuch": "nosuch is not a run",
    "k5train configure nosuch --yes": "There is no folder or file nosuch",
    "k5train check-lora nosuch": "There is no nosuch",
    "k5train base prepare --model nosuch": "There is no model folder nosuch",
    "k5train base rm nosuch": "nosuch",
    "k5train ui --folder nosuch": "There is no folder nosuch",
    "k5train doctor --vram lots": "--vram lots is not an amount of memory",
}
# Each command that writes to an -o, and something there that is not its own.
OTHERS = {
    "k5cache encode pictures -o images": "images is not empty and not a cache: it holds mine.txt",
    "k5cache plan pictures -o images": "images is not empty and not a cache: it holds mine.txt",
    "k5cache diff pictures -o images": "images is not empty and not a cache: it holds mine.txt",
    "k5cache encode pictures -o run": "run is a run, not a cache",
    "k5cache merge toy toy -o images": "images is not empty and not a cache: it holds mine.txt",
    "k5cache show toy -o mine.png": "mine.png is there already and was not drawn by k5cache or k5train",
    "k5train run toy -o images": "images is not empty and not a run: it holds mine.txt",
    "k5train run toy -o toy": "toy is a cache, not a run",
    "k5train sweep toy --grid train.lora.rank=1,2 -o images": "images is not empty and not a sweep: it holds mine.txt",
    "k5train sweep toy --grid train.lora.rank=1,2 -o run": "run is a run, not a sweep",
    "k5train sample run -o mine.png": "mine.png is there already and was not drawn by k5cache or k5train",
    "k5train sample run -o images": "images cannot be written: it is a folder",
    "k5train compare run -o mine.png": "mine.png is there already and was not drawn by k5cache or k5train",
    "k5train report run -o mine.html": "mine.html is there already and was not written by k5train report",
    "k5train report run -o mine.png": "mine.png does not end in .html",
    "k5train export page.safetensors -o mine.png": "mine.png already exists",
    "k5train merge page.safetensors page.safetensors -o mine.png": "mine.png already exists",
    "k5train merge page.safetensors --into-base nosuch -o images":
        "images is not empty and not a merged checkpoint: it holds mine.txt",
    "k5train import config.json -o mine.toml": "mine.toml is there already, and is not of this command",
    "k5train recipes official -o mine.toml": "mine.toml is there already",
    "k5train configure pictures -o mine.toml --yes": "mine.toml is there and is not a recipe: it has tool",
    "k5train bench -o mine.json": "mine.json is there already and was not written by k5train bench",
}  # fmt: skip
REFUSED |= OTHERS
NEVER_REFUSED = {"k5cache options", "k5train options", "k5train base list"}


@pytest.fixture(scope="module")
def ends(tmp_path_factory, toy_cache, toy_model) -> dict[str, tuple[int | None, str, str]]:
    """How each command line ends where no large library can be imported."""
    folder = tmp_path_factory.mktemp("early")
    (folder / "images").mkdir()
    (folder / "images" / "mine.txt").touch()
    (folder / "pictures").mkdir()
    for name in ("mine.png", "pictures/cat.png"):
        Image.new("RGB", (64, 64)).save(folder / name)
    for name, text in (
        ("mine.json", "{}"),
        ("mine.toml", "[tool]\n"),
        ("mine.html", "<p>"),
        ("config.json", '{"model_type": "lora"}'),
    ):
        (folder / name).write_text(text, encoding="utf-8")
    create_run(folder / "run", folder / "toy", ModelConfig(), TrainConfig())
    (folder / "toy").symlink_to(toy_cache("fp32"))
    (folder / "page.safetensors").write_text("<!doctype html>", encoding="utf-8")
    model = shlex.quote(str(toy_model))
    lines = [*REFUSED, *sorted(NEVER_REFUSED), "k5train plan --vram 12GB", f"k5train run toy --model {model}"]
    given = [line if "--model" in line or "run toy" not in line else f"{line} --model {model}" for line in lines]
    done = subprocess.run(
        [sys.executable, "-c", RUNNER.replace("ROOT", repr(str(Path(__file__).parent.parent)))],
        input=json.dumps(given), capture_output=True, text=True, cwd=folder, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    there = sorted(path.name for path in folder.iterdir())
    assert there == [
        "config.json", "images", "mine.html", "mine.json", "mine.png", "mine.toml", "page.safetensors", "pictures",
        "run", "toy",
    ]  # fmt: skip
    assert [path.name for path in (folder / "images").iterdir()] == ["mine.txt"]
    return dict(zip([line.replace(model, "MODEL") for line in lines], json.loads(done.stdout), strict=True))


def test_every_command_refuses_a_wrong_argument_before_a_large_library_is_imported(ends):
    wrong = {
        line: ends[line] for line, problem in REFUSED.items() if ends[line][0] != 2 or problem not in ends[line][2]
    }
    assert wrong == {}
    assert not any("Loading" in ends[line][2] for line in REFUSED)
    assert not {line: ends[line] for line in NEVER_REFUSED if ends[line][0] != 0}


def test_every_command_has_a_wrong_argument_above_and_each_that_writes_something_of_others():
    def names(command: object, above: str) -> dict[str, bool]:
        """The name of each command, and whether it takes an -o."""
        inner = getattr(command, "commands", None)
        if not inner:
            return {above: any("-o" in parameter.opts for parameter in command.params)}
        return {n: out for name, c in inner.items() for n, out in names(c, f"{above} {name}").items()}

    commands = names(typer.main.get_command(cache_app), "k5cache") | names(typer.main.get_command(train_app), "k5train")

    def untried(names: Iterable[str], lines: Iterable[str]) -> list[str]:
        return [name for name in names if not any(f"{line} ".startswith(f"{name} ") for line in lines)]

    assert not untried(commands, [*REFUSED, *NEVER_REFUSED])
    assert not untried([name for name, out in commands.items() if out], OTHERS)


def test_a_command_that_passes_its_checks_names_the_library_that_it_loads(ends):
    for line in ("k5train plan --vram 12GB", "k5train run toy --model MODEL"):
        code, _, err = ends[line]
        assert (code, err) == (None, "Loading torch ..."), line


def test_the_first_large_library_is_named_as_its_import_begins(tmp_path, monkeypatch):
    for name in ("large_one", "large_two"):
        (tmp_path / f"{name}.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(loading, "SLOW", ("large_one", "large_two"))
    said: list[str] = []
    for _ in range(2):
        with loading.announced(said.append):
            assert importlib.util.find_spec("large_one")
            assert not said or "large_one" in sys.modules
            import large_one  # noqa: F401
            import large_two  # noqa: F401
    assert said == ["Loading large_one ..."]


def test_garbage_is_collected_seldom_from_the_first_large_library_until_work_begins(tmp_path, monkeypatch):
    (tmp_path / "large_three.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(loading, "SLOW", ("large_three",))
    monkeypatch.setattr(loading, "_collector", loading._Collector())
    usual, kept = gc.get_threshold(), gc.get_freeze_count()
    try:
        with loading.announced(lambda line: None):
            import large_three  # noqa: F401

            assert gc.get_threshold() == (1_000_000, 10, 10)
            pick_device("cpu")
            assert gc.get_threshold() == usual
        assert gc.get_threshold() == usual
        assert (frozen := gc.get_freeze_count()) > kept
        more = [[] for _ in range(1000)]
        pick_device("cpu")  # a second run of a sweep: what is there now may hold a GPU's memory
        assert gc.get_freeze_count() <= frozen
        assert len(more) == 1000
    finally:
        gc.set_threshold(*usual)


def test_garbage_is_collected_as_usual_after_a_command_that_only_imported(tmp_path, monkeypatch):
    (tmp_path / "large_four.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(loading, "SLOW", ("large_four",))
    monkeypatch.setattr(loading, "_collector", loading._Collector())
    usual = gc.get_threshold()
    with loading.announced(lambda line: None):
        import large_four  # noqa: F401

        assert gc.get_threshold() != usual
    assert gc.get_threshold() == usual


@pytest.fixture
def resting(monkeypatch):
    """As in a command that has just imported torch. Returns the usual thresholds of the collector."""
    usual = gc.get_threshold()
    collector = loading._Collector()
    monkeypatch.setattr(loading, "_collector", collector)
    collector.rest()
    assert gc.get_threshold() != usual
    yield usual
    gc.set_threshold(*usual)


@pytest.mark.parametrize(
    "words",
    [["bench"], ["base", "prepare"], ["check-lora", "a.safetensors"], ["export", "a.safetensors"],
     ["merge", "a.safetensors", "-o", "b.safetensors"]],
)  # fmt: skip
def test_work_without_a_training_device_collects_garbage_as_usual(words, tmp_path, resting, toy_model, monkeypatch):
    thresholds = []

    def work(*arguments, **options):
        thresholds.append(gc.get_threshold())
        raise RunError("It got to work", "Look no further")

    for name in ("bench.timing.matmul_ceiling", "base.prepared.prepare", "adapter.export.architecture",
                 "adapter.export.export", "adapter.export.merge"):  # fmt: skip
        monkeypatch.setattr(f"k5train.{name}", work)
    monkeypatch.setattr("torch.cuda.is_available", lambda: words == ["bench"])
    monkeypatch.setattr("k5train.planning.vram.budget", lambda *arguments: 2**34)
    save_file({"transformer.visual_transformer_blocks.0.x.lora_A.weight": torch.zeros(1)}, tmp_path / "a.safetensors")
    model = [] if words == ["bench"] else ["--model", str(toy_model)]
    done = Cli(tmp_path)(train_app, *words, *model)
    assert "It got to work" in done.err, done.err
    assert thresholds == [resting]
