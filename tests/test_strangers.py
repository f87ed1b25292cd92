"""Folders that somebody else made: no link or name leads a command out of them, and their text is shown as text."""

from __future__ import annotations

import ast
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.text import Text

from k5cache.cli import app as cache_app
from k5cache.commands.listing import print_skipped, print_some
from k5cache.shared import console
from k5cache.shared.checkpoint import check_known
from k5cache.shared.errors import CacheError, ModelError, OutputError, RecipeError
from k5cache.shared.foreign import Terminal, shown
from k5cache.shared.inside import check_inside, name_problem
from k5cache.shared.model import FLAVOURS, ModelConfig
from k5cache.sources.items import Skipped
from k5cache.store.manifest import lock, write_manifest
from k5cache.store.reader import open_cache
from k5cache.upkeep.gc import collect
from k5cache.upkeep.verify import verify_cache
from k5train.cli import app as train_app
from k5train.options.train import TrainConfig
from k5train.runs.folder import check_new, create_run, open_run
from k5train.runs.recipe import write_recipe
from k5train.training.start import resume, start
from tests.cli import Cli
from tests.store_samples import make_cache


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file below a folder, with its bytes and its time."""
    return {
        str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()
    }


def linked(folder: Path, name: str, target: Path) -> Path:
    """``folder/name`` replaced by a link to ``target``."""
    path = folder / name
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.symlink_to(target)
    return path


# Caches


@pytest.mark.parametrize("name", ["masks", "latents", "text", ".lock", "manifest.json"])
@pytest.mark.parametrize("is_folder", [True, False])
def test_no_writer_of_a_cache_follows_a_link_out_of_it(tmp_path: Path, name: str, is_folder: bool) -> None:
    make_cache(tmp_path / "other")
    make_cache(tmp_path / "cache")
    target = tmp_path / "other" / ("latents" if is_folder else "manifest.json")
    linked(tmp_path / "cache", name, target)
    before = contents(tmp_path / "other")
    with pytest.raises((OutputError, CacheError), match=r"is a link|is not empty"), lock(tmp_path / "cache"):
        pass
    with pytest.raises((OutputError, CacheError)):
        collect(tmp_path / "cache")
    assert contents(tmp_path / "other") == before


def test_a_cache_reached_through_a_link_and_links_that_stay_in_it_are_followed(tmp_path: Path) -> None:
    make_cache(tmp_path / "disk" / "cache")
    (tmp_path / "disk" / "cache" / "latents").rename(tmp_path / "disk" / "cache" / "elsewhere")
    (tmp_path / "disk" / "cache" / "latents").symlink_to("elsewhere")
    (tmp_path / "cache").symlink_to(tmp_path / "disk" / "cache")
    assert len(open_cache(tmp_path / "cache")) == 4
    assert collect(tmp_path / "cache").dropped == ()
    assert verify_cache(tmp_path / "cache").problems == ()


def test_a_link_in_a_circle_in_a_cache_is_named(tmp_path: Path) -> None:
    make_cache(tmp_path)
    linked(tmp_path, "text", tmp_path / "text")
    with pytest.raises(CacheError, match="text"):
        open_cache(tmp_path).text("t-cat")
    with pytest.raises(OutputError, match="text is a link"), lock(tmp_path):
        pass


# Runs

RUN_ENTRIES = (
    ".lock", "checkpoints", "state", "samples", "metrics.jsonl", "recipe.toml", "run.json", "result.json",
    "samples/step-000001", "checkpoints/step-000001.safetensors", "state/step-000001", "loss.png", "tensorboard",
)  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    """A run without a step, beside a folder that must stay as it is."""
    outside = tmp_path / "outside"
    (outside / "inner").mkdir(parents=True)
    (outside / "file").write_text("theirs", encoding="utf-8")
    (outside / "inner" / "file").write_text("theirs", encoding="utf-8")
    root = tmp_path / "run"
    create_run(root, tmp_path / "cache", ModelConfig(), TrainConfig(name="run"))
    (root / "state").mkdir()
    before = contents(outside)
    yield root
    assert contents(outside) == before


@pytest.mark.parametrize("name", RUN_ENTRIES)
def test_no_command_opens_a_run_with_a_link_that_leads_out_of_it(run: Path, name: str) -> None:
    for target in (run.parent / "outside", run.parent / "outside" / "file", run.parent / "outside" / "nothing"):
        linked(run, name, target)
        with pytest.raises(OutputError, match=r"is a link to .*outside") as raised:
            open_run(run)
        assert "Remove the link" in raised.value.fix


def test_a_pipe_in_a_run_is_named_before_anything_waits_for_it(run: Path) -> None:
    os.mkfifo(run / "metrics.jsonl")
    with pytest.raises(OutputError, match=r"metrics\.jsonl is neither a file nor a folder"):
        open_run(run)


def test_a_new_run_is_not_begun_in_a_folder_whose_samples_lead_out_of_it(run: Path) -> None:
    root = run.parent / "new"
    root.mkdir()
    (root / "samples").symlink_to(run.parent / "outside" / "inner")
    with pytest.raises(OutputError, match="samples is a link"):
        check_new(root)


def test_a_run_reached_through_a_link_and_links_that_stay_in_it_are_followed(run: Path) -> None:
    (run.parent / "short").symlink_to(run)
    (run / "latest").symlink_to("checkpoints")
    assert open_run(run.parent / "short")[0].name == "short"


# Names


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../../x", "name of one folder"),
        ("a/b", "name of one folder"),
        ("/tmp/x", "name of one folder"),
        ("a\\b", "name of one folder"),
        ("C:x", "name of one folder"),
        ("..", "begin or end with a dot"),
        (".hidden", "begin or end with a dot"),
        ("x.", "begin or end with a dot"),
        ("x ", "begin or end with a dot or a space"),
        ("a\0b", "control character"),
        ("a\x1b[31m", "control character"),
        ("", "is empty"),
        ("  ", "is empty"),
        ("con", "Windows"),
        ("NUL.txt", "Windows"),
        ("Lpt1", "Windows"),
        ("x" * 201, "201 bytes"),
        ("é" * 101, "202 bytes"),
        ("a\udcff", "not valid text"),
    ],
)
def test_a_name_that_is_not_one_folder_is_refused(tmp_path: Path, monkeypatch, name: str, reason: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert reason in str(name_problem(name))
    with pytest.raises(RecipeError, match=r"train\.name"):
        start(None, TrainConfig(name=name), None, ModelConfig(), is_new=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["my_run", "try 2", "rank=8,lr=1e-4", "кошки", "v1.2", "x" * 200, "console", "猫"])
def test_ordinary_names_are_names(name: str) -> None:
    assert name_problem(name) is None


def test_a_run_folder_whose_lora_could_not_be_written_at_the_end_is_refused_at_the_start(tmp_path: Path) -> None:
    check_new(tmp_path / ("x" * 200))
    with pytest.raises(OutputError, match="more than 200 bytes"):
        check_new(tmp_path / ("x" * 201))


def test_a_folder_that_is_not_there_has_no_links(tmp_path: Path) -> None:
    check_inside(tmp_path / "nothing")
    check_inside(tmp_path / "nothing", ("a",))


# What is printed

ESCAPE = "\x1b[2J\x1b]0;title\x07 [/b] [cats] :smile: \x9b31m \u202egnp.exe\udcff \r over"
AS_SHOWN = r"\x1b[2J\x1b]0;title [/b] [cats] :smile: \x9b31m \u202egnp.exe\udcff  over"
"""rich itself leaves out the bell and the carriage return."""


@pytest.fixture
def printed(monkeypatch) -> StringIO:
    """What the terminal gets, as if it were one that shows colours."""
    text = StringIO()
    for name in ("out", "err"):
        terminal = Terminal(file=text, force_terminal=True, color_system=None, width=200, legacy_windows=False)
        monkeypatch.setattr(console, name, terminal)
    return text


def test_every_way_to_print_shows_foreign_text_as_text(printed: StringIO) -> None:
    table = console.table(ESCAPE, ESCAPE, "b")
    table.add_row(ESCAPE, Text(ESCAPE))
    ways = [
        lambda: console.out.print(ESCAPE),
        lambda: console.out.print(f"Wrote {ESCAPE}", style="red"),
        lambda: console.out.print(Text(ESCAPE)),
        lambda: console.out.print(table),
        lambda: console.note(ESCAPE),
        lambda: console.warn(ESCAPE),
        lambda: console.next_step(ESCAPE, ESCAPE),
        lambda: console.print_error(ESCAPE, ESCAPE),
        lambda: print_some(ESCAPE, [ESCAPE], "red"),
        lambda: print_skipped([Skipped(ESCAPE, ESCAPE)]),
    ]
    for way in ways:
        way()
        text = printed.getvalue()
        assert "[cats]" in text
        assert "[/b]" in text
        assert ":smile:" in text
        assert not [c for c in text if (ord(c) < 32 and c != "\n") or 0x7F <= ord(c) < 0xA0 or c in "\u202e\udcff"]
        printed.truncate(0)
        printed.seek(0)
    console.out.print(ESCAPE)
    assert printed.getvalue() == f"{AS_SHOWN}\n"


def test_progress_shows_foreign_text_as_text_and_still_moves_the_cursor(printed: StringIO) -> None:
    with console.progress() as bars:
        task = bars.add_task(f"training {ESCAPE}", total=2, unit="step", note=ESCAPE)
        bars.advance(task)
        bars.refresh()
    text = printed.getvalue()
    assert r"\x1b[2J\x1b]0;title" in text
    assert not {"\x1b[2J", "\x1b]0", "\x9b", "\u202e"} & {text[i : i + n] for i in range(len(text)) for n in (1, 3, 4)}
    assert "\x1b[2K" in text  # rich's own


def test_a_foreign_text_of_one_line_stays_one_line_of_bounded_length() -> None:
    assert shown("a\nerror: b\tc") == r"a\nerror: b\tc"
    assert len(shown("x" * 10**6)) == 1000
    assert len(shown("\x1b" * 10**6)) == 1000
    assert shown("кошка 猫 👩\u200d🚀 é") == "кошка 猫 👩\u200d🚀 é"


def test_a_prompt_and_a_cache_with_markup_and_escapes_are_printed_as_they_are(tmp_path: Path, monkeypatch) -> None:
    cli = Cli(tmp_path)
    manifest = make_cache(tmp_path / "[cats]")
    prompts = {"a [/b] \x1b[2Jfox": "t-cat", "": "t-empty"}
    write_manifest(tmp_path / "[cats]", replace(manifest, prompts=prompts, created_by={"[/i]\x1b[1m": "\x9b"}))
    done = cli(cache_app, "info", "[cats]")
    assert done.code == 0, done.err
    assert done.out.startswith("[cats]")
    assert r"a [/b] \x1b[2Jfox" in done.out
    assert not {"\x1b", "\x9b"} & {*done.out}
    lock = tmp_path / "[cats]" / ".lock"
    lock.write_text(json.dumps({"pid": "\x1b[2J", "host": "[/b]", "since": "\x07"}), encoding="utf-8")
    with lock.open("r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = cli(cache_app, "gc", "[cats]")
    assert done.code == 2
    assert r"process \x1b[2J on [/b] since" in done.err


def test_nothing_is_printed_past_the_terminals_of_the_command_lines() -> None:
    """A print, an echo or a console of its own would send what it is given. These few give it none of others' text."""
    allowed = {
        "k5cache/__main__.py": {"sys.stderr.write"},  # a word of ours
        "k5cache/engines/try_to_join.py": {"print"},  # an address, for the process that asked
        "k5cache/shared/console.py": {"print"},  # JSON, which is ASCII
        "k5cache/shared/help.py": {"typer.echo"},  # versions, before the terminals are set up
        "k5train/__main__.py": {"sys.stderr.write"},
        "k5train/commands/arguments.py": {"typer.prompt"},  # a question of ours
        "k5train/doctor/probe.py": {"print"},  # JSON, which is ASCII, for the process that asked
    }
    forbidden = {"print", "Console", "rich.print", "typer.echo", "typer.secho", "typer.prompt", "typer.confirm",
                 "click.echo", "sys.stdout.write", "sys.stderr.write", "Console.print", "Text.from_markup",
                 "Text.from_ansi"}  # fmt: skip
    root = Path(__file__).parent.parent
    used: dict[str, set[str]] = {}
    for path in [*root.glob("k5cache/**/*.py"), *root.glob("k5train/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and (name := ast.unparse(node.func)) in forbidden:
                used.setdefault(path.relative_to(root).as_posix(), set()).add(name)
            assert not (isinstance(node, ast.keyword) and node.arg == "markup" and ast.unparse(node.value) == "True")
    assert used == allowed


# Models that only a stranger names


def test_a_repository_that_only_a_cache_or_a_run_names_is_not_asked_for(tmp_path: Path, monkeypatch) -> None:
    hub = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    theirs = ModelConfig(path="stranger/model")
    with pytest.raises(ModelError, match=r"names the model stranger/model, of which nothing is on this machine"):
        check_known(theirs, tmp_path, "fix")
    published = FLAVOURS["t2i-lite-sft"]
    for revision in ("refs/pr/7", "../../..", "/etc", "0123abcd"):
        with pytest.raises(ModelError, match=f"{published} at {revision}"):
            check_known(ModelConfig(revision=revision), tmp_path, "fix")
    check_known(ModelConfig(), tmp_path, "fix")  # a published checkpoint
    check_known(ModelConfig(path=str(tmp_path)), tmp_path, "fix")  # a folder
    (hub / "models--stranger--model" / "refs").mkdir(parents=True)
    (hub / "models--stranger--model" / "refs" / "main").write_text("0123", encoding="utf-8")
    (hub / "models--stranger--model" / "snapshots" / "0123").mkdir(parents=True)
    check_known(theirs, tmp_path, "fix")  # the encoders were downloaded here: the user has named it before


def test_training_on_a_strangers_cache_says_which_model_it_would_download_and_how_to_allow_it(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    manifest = make_cache(tmp_path / "theirs")
    recipe = {**manifest.recipe, "model": {"source": "stranger/model", "revision": "v1"}}
    write_manifest(tmp_path / "theirs", replace(manifest, recipe=recipe))
    for app, *words in ((train_app, "run", "theirs"), (cache_app, "prompts", "add", "theirs", "a dog")):
        done = cli(app, *words)
        assert done.code == 2
        assert "theirs names the model stranger/model at v1, of which nothing is on this machine" in done.err
        assert "--model stranger/model" in done.err
    assert not (tmp_path / "runs").exists()


def test_a_strangers_run_does_not_download_the_model_that_it_names(run: Path) -> None:
    write_recipe(run, ModelConfig(path="stranger/model"), TrainConfig(name="run"))
    with pytest.raises(ModelError, match="run names the model stranger/model") as raised:
        resume(run, [], None)
    assert "--set model.path=stranger/model" in raised.value.fix


# Permissions


@pytest.mark.parametrize(("umask", "of_file", "of_folder"), [(0o002, 0o664, 0o775), (0o077, 0o600, 0o700)])
def test_files_and_folders_have_the_permissions_that_the_umask_leaves(
    tmp_path: Path, umask: int, of_file: int, of_folder: int
) -> None:
    before = os.umask(umask)
    try:
        make_cache(tmp_path / "made" / "cache")
        create_run(tmp_path / "made" / "run", tmp_path / "cache", ModelConfig(), TrainConfig(name="run"))
    finally:
        os.umask(before)
    paths = [tmp_path / "made", *(tmp_path / "made").rglob("*")]
    assert {p.name: oct(p.stat().st_mode & 0o777) for p in paths} == {
        p.name: oct(of_folder if p.is_dir() else of_file) for p in paths
    }
    assert (tmp_path / "made" / "cache" / ".lock") in paths
