"""What may be written and deleted: nothing that is not ours, and whatever is refused is refused before any work."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from k5cache.cli import app as cache_app
from k5cache.shared import outputs
from k5cache.shared.errors import CacheError, OutputError, RunError
from k5cache.shared.files import write_json
from k5cache.shared.lock import lock_file
from k5cache.shared.model import ModelConfig
from k5cache.store import manifest, ours
from k5cache.store.index import with_index
from k5cache.store.manifest import lock, read_manifest, write_manifest
from k5cache.store.shards import ShardWriter
from k5cache.upkeep.gc import collect
from k5cache.upkeep.merge import merge_caches
from k5cache.upkeep.show import SOFTWARE, free_default
from k5cache.upkeep.verify import verify_cache
from k5train.cli import app as train_app
from k5train.options.train import TrainConfig
from k5train.runs import resume_state
from k5train.runs.folder import Run, create_run, lock_run, new_run
from k5train.runs.outcomes import write_outcomes
from tests.cli import Cli, Done
from tests.store_samples import LATENTS, index_row, latents_row, make_cache


def tree(root: Path) -> dict[str, bytes | None]:
    """Every file's bytes and every folder under ``root``."""
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in sorted(root.rglob("*"))}


def refused(done: Done, words: str) -> None:
    assert done.code == 2, done.out + done.err
    assert words in done.err
    assert [line.split(":")[0].strip() for line in done.err.splitlines()[-2:]] == ["error", "fix"], done.err


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with one of everything that an ``-o`` may name by mistake."""
    Image.new("RGB", (64, 64), "red").save(put(tmp_path / "photos" / "cat.png"))
    put(tmp_path / "photos" / "cat.txt", "a cat")
    put(tmp_path / "photos" / "sub" / "note.txt", "mine")
    make_cache(tmp_path / "cache" / "a")
    make_cache(tmp_path / "cache" / "b")
    put(tmp_path / "runs" / "r" / "run.json", '{"cache": "cache/a", "versions": {}}')
    put(tmp_path / "runs" / "r" / "recipe.toml", "[train]\nsteps = 1\n")
    put(tmp_path / "runs" / "r" / "samples.png", "the run's")
    put(tmp_path / "sweeps" / "s" / "sweep.json", "[]")
    put(tmp_path / "stuff [bold]" / "index-000001.parquet", "mine")
    put(tmp_path / "notes.txt", "mine")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "to_photos").symlink_to("photos")
    (tmp_path / "circle").symlink_to("circle")
    return tmp_path


def put(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


ENCODE = (cache_app, "encode", "photos")
MERGE = (cache_app, "merge", "cache/a", "cache/b")
RUN = (train_app, "run", "cache/a")
SWEEP = (train_app, "sweep", "cache/a", "--grid", "train.lora.rank=2,4")
SHOW = (cache_app, "show", "cache/a")
SAMPLE = (train_app, "sample", "runs/r")
FOLDERS = {"encode": ENCODE, "plan": (cache_app, "plan", "photos"), "merge": MERGE, "run": RUN, "sweep": SWEEP}

REFUSED = [
    # What every command with a folder says
    *((name, out, words) for name in FOLDERS for out, words in (
        ("stuff [bold]", "holds index-000001.parquet"),
        ("notes.txt", "notes.txt cannot be written: it is a file"),
        ("notes.txt/x", "notes.txt is a file"),
        ("dangling", "dangling is a link to nowhere, which does not exist"),
        ("dangling/x", "dangling is a link to nowhere, which does not exist"),
        ("circle", "circle cannot be written"),
        ("x" * 300, "File name too long"),
        ("cache/a/deeper/x", "cache/a/deeper/x is inside "),
        ("runs/r/x", "runs/r/x is inside the run "),
        ("photos/../stuff [bold]", "holds index-000001.parquet"),
    )),
    # Only a cache may be at a URL. Before, a folder called s3: was made here
    *((name, "s3://bucket/x", "s3://bucket/x cannot be written: only a cache may be at a URL")
      for name in ("run", "sweep")),
    # Ours, but of another kind
    ("encode", "runs/r", "runs/r is a run, not a cache"),
    ("encode", "sweeps/s", "sweeps/s is a sweep, not a cache"),
    ("encode", "cache", "cache is not a cache: it holds other caches (a/, b/)"),
    ("encode", "runs", "runs is not a cache: it holds other runs (r/)"),
    ("merge", "runs/r", "runs/r is a run, not a cache"),
    ("run", "cache/a", "cache/a is a cache, not a run"),
    ("run", "sweeps/s", "sweeps/s is a sweep, not a run"),
    ("run", "runs", "runs is not a run: it holds other runs (r/)"),
    ("sweep", "runs/r", "runs/r is a run, not a sweep"),
    ("sweep", "cache/a", "cache/a is a cache, not a sweep"),
    ("sweep", "runs", "runs is not a sweep: it holds other runs (r/)"),
    # What the command reads
    *(("encode", out, f"{Path(out)} is the folder that this command reads, so it cannot be a new cache") for out in (
        "photos", "./photos/", "to_photos", "photos/sub/..")),
    *(("encode", out, f"{out} is inside ") for out in ("photos/new", "to_photos/new", "photos/sub")),
    ("encode", ".", "is not empty and not a cache: it holds cache/, "),
    ("merge", "cache/a", "cache/a is the folder that this command reads"),
    ("merge", "cache/a/text", "which this command reads"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "out", "words"), REFUSED)
def test_a_folder_that_is_not_the_commands_own_is_refused_and_left_alone(place, name, out, words):
    before = tree(place)
    refused(Cli(place)(*FOLDERS[name], "-o", out), words)
    assert tree(place) == before


@pytest.mark.parametrize("command", [SHOW, SAMPLE], ids=["show", "sample"])
@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("photos", "photos cannot be written: it is a folder\n  fix: Name a file in it: -o photos/NAME.png"),
        ("cat.jpg", "cat.jpg does not end in .png, and that is what is written\n  fix: Name it: -o cat.png"),
        ("sheet", "Name it: -o sheet.png"),
        ("notes.txt/x.png", "notes.txt is a file"),
        ("dangling/x.png", "dangling is a link to nowhere, which does not exist"),
        ("/dev/null", "does not end in .png"),
        ("s3://bucket/x.png", "s3://bucket/x.png cannot be written: only a cache may be at a URL"),
    ],
)
def test_a_picture_that_cannot_be_written_is_refused_before_it_is_drawn(place, command, out, words):
    before = tree(place)
    refused(Cli(place)(*command, "-o", out), words)
    assert tree(place) == before


@pytest.mark.parametrize("command", [ENCODE, MERGE, RUN, SWEEP, SHOW, SAMPLE], ids=lambda command: command[1])
def test_a_place_without_permission_is_refused_before_any_work(place, command, monkeypatch):
    (place / "locked").mkdir()
    access = os.access  # tests may run as root, whom no permission stops
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked" and access(path, mode))
    refused(Cli(place)(*command, "-o", "locked/new.png"), "there is no permission to write in ")
    assert list((place / "locked").iterdir()) == []


def test_a_file_system_that_is_mounted_read_only_is_named_as_that(place, monkeypatch):
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK and access(path, mode))
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=os.ST_RDONLY))
    for command in (MERGE, RUN):
        done = Cli(place)(*command, "-o", "new")
        refused(done, f"new cannot be written: the file system of {place} is read-only")
        refused(done, "fix: Choose another place with -o\n")
    monkeypatch.undo()

    def read_only(path: Path, wait_seconds: float) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(manifest, "lock_file", read_only)
    with pytest.raises(CacheError, match="cache/a cannot be written: Read-only file system") as caught:
        collect(place / "cache/a")
    assert caught.value.fix == "Copy it to a disk that can be written"


def test_a_folder_that_its_user_calls_empty_may_be_used_and_what_is_in_it_stays(tmp_path):
    for name in (".gitkeep", ".DS_Store", "desktop.ini", ".gitignore", "lost+found/x", ".Trash-1000/x"):
        put(tmp_path / name, name)
    before = tree(tmp_path)
    outputs.check_folder(tmp_path, "run")
    manifest = make_cache(tmp_path)
    collect(tmp_path)
    after = tree(tmp_path)
    assert before.items() <= after.items()
    assert set(after) - set(before) == manifest.named | {"manifest.json", ".lock", "latents", "text"}
    assert verify_cache(tmp_path).foreign == ()


# Deleting


def strangers(root: Path, manifest) -> dict[str, bytes]:
    """Put files with names like ours into a cache; returns their bytes."""
    table = pa.table({"a": [1]})
    shard = manifest.shards[0].file
    for name in ("text/my.parquet", f"text/{'0' * 16}.parquet", "index-000007.parquet"):
        pq.write_table(table, root / name)
    shutil.copy(root / shard, root / "latents" / f"64x64-{'1' * 16}.parquet")  # a shard of ours, but not of that name
    for name in ("locations-000001.parquet", "text/.tmp-notes", ".tmp-x", "notes.txt", "more/x.txt", "masks/m.png"):
        put(root / name, "mine")
    (root / "latents" / f"32x32-{'2' * 16}.parquet").symlink_to(root / "notes.txt")
    listed = verify_cache(root).foreign
    assert listed == (
        ".tmp-x", "index-000007.parquet", "latents/32x32-2222222222222222.parquet",
        "latents/64x64-1111111111111111.parquet", "locations-000001.parquet", "masks/m.png", "more/", "notes.txt",
        "text/.tmp-notes", "text/0000000000000000.parquet", "text/my.parquet",
    )  # fmt: skip
    return {name: (root / name).read_bytes() for name in (*listed, "more/x.txt") if not name.endswith("/")}


def test_no_writer_deletes_or_overwrites_a_file_that_is_not_proven_ours(tmp_path):
    manifest = make_cache(tmp_path)
    before = strangers(tmp_path, manifest)
    with lock(tmp_path) as removed:
        manifest = with_index(tmp_path, manifest, [index_row(0), index_row(3)])
        write_manifest(tmp_path, manifest)
    assert removed == []
    assert manifest.index.file == "index-000002.parquet"  # there is a locations-000001.parquet already
    report = collect(tmp_path)
    assert report.foreign == verify_cache(tmp_path).foreign
    assert len(report.foreign) == 11
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert verify_cache(tmp_path).problems == ()
    assert not (tmp_path / "index-000000.parquet").exists()  # the manifest before named it


def test_what_killed_writers_left_is_proven_by_its_content_named_and_deleted(tmp_path):
    manifest = make_cache(tmp_path)
    with lock(tmp_path), ShardWriter(tmp_path, "latents", LATENTS, (64, 64)) as writer:
        writer.append(latents_row(9))
        shard = writer.finish().file
        index = with_index(tmp_path, manifest, [index_row(1)])  # killed before its manifest
    temporary = put(tmp_path / "text" / ".tmp-123-0123456789ab", "half").relative_to(tmp_path)
    left = tuple(sorted((shard, index.index.file, index.locations.file, str(temporary))))
    assert verify_cache(tmp_path).unnamed == left
    would = collect(tmp_path, dry_run=True)
    assert all((tmp_path / name).is_file() for name in left)
    did = collect(tmp_path)
    assert would.unnamed == did.unnamed == left
    assert not any((tmp_path / name).exists() for name in left)
    assert read_manifest(tmp_path) == manifest


def test_gc_names_the_files(tmp_path):
    manifest = make_cache(tmp_path / "a")
    put(tmp_path / "a" / "text" / "my.parquet", "mine")
    with lock(tmp_path / "a"):
        write_manifest(tmp_path / "a", with_index(tmp_path / "a", manifest, [index_row(0), index_row(2)]))
    gone = manifest.shards[1].file  # of items 1 and 3
    for arguments, word in ((("--dry-run",), "would be"), ((), "were")):
        done = Cli(tmp_path)(cache_app, "gc", "a", *arguments)
        assert f"1 {word} deleted\n  {gone}\n" in done.out
        assert f"1 {word} rewritten\n  {manifest.shards[2].file}\n" in done.out
        assert "1 file that is not of this cache (it stays)\n  text/my.parquet\n" in done.out
    assert (tmp_path / "a" / "text" / "my.parquet").read_text() == "mine"
    assert not (tmp_path / "a" / gone).exists()
    assert "file that is not of this cache (it stays)\n  text/my.parquet" in Cli(tmp_path)(cache_app, "verify", "a").out


# What a kill before the first manifest leaves


def test_a_folder_in_which_a_writer_was_killed_at_once_may_go_on_and_one_that_looks_like_it_may_not(tmp_path):
    manifest = make_cache(tmp_path / "cache")
    (tmp_path / "cache" / "manifest.json").unlink()
    put(tmp_path / "cache" / "latents" / ".tmp-123-0123456789ab")
    ours.check_root(tmp_path / "cache")
    shutil.copytree(tmp_path / "cache", tmp_path / "busy")
    put(tmp_path / "busy" / ".lock", json.dumps({"pid": 1, "host": "here", "since": "today"}))
    ours.check_root(tmp_path / "busy")

    def damage(root: Path) -> None:
        (root / manifest.shards[0].file).write_bytes((tmp_path / "cache" / manifest.shards[1].file).read_bytes())

    for number, change in enumerate(
        (
            damage,
            lambda root: put(root / "latents" / "a.png"),
            lambda root: put(root / "notes.txt"),
            lambda root: put(root / ".lock", "another program's"),
            lambda root: (root / ".lock").unlink(),
            lambda root: (root / "masks").symlink_to(tmp_path),
        )
    ):
        root = tmp_path / f"trial-{number}"
        shutil.copytree(tmp_path / "cache", root)
        change(root)
        with pytest.raises(OutputError, match="is not empty and not a cache"):
            ours.check_root(root)


def test_a_killed_merge_goes_on(tmp_path):
    first = make_cache(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    merge_caches([tmp_path / "a", tmp_path / "b"], tmp_path / "ab")
    (tmp_path / "ab" / "manifest.json").unlink()  # as if it had been killed before its last step
    (tmp_path / "ab" / first.shards[0].file).unlink()
    assert merge_caches([tmp_path / "a", tmp_path / "b"], tmp_path / "ab").is_linked
    assert verify_cache(tmp_path / "ab").problems == ()
    assert read_manifest(tmp_path / "ab").shards == first.shards


# Runs and sweeps

CONFIG = (ModelConfig(), TrainConfig())


def test_a_recipe_in_a_folder_of_its_users_is_not_taken_for_a_run_that_was_killed(tmp_path):
    put(tmp_path / "mine" / "recipe.toml", "# mine")
    for folder in ("checkpoints", "samples"):
        (tmp_path / "mine" / folder).mkdir()
    with pytest.raises(OutputError, match=r"not a run: it holds checkpoints/, recipe.toml, samples/"):
        create_run(tmp_path / "mine", Path("cache"), *CONFIG)
    assert (tmp_path / "mine" / "recipe.toml").read_text() == "# mine"


def test_a_refused_run_removes_what_it_made_and_no_folder_that_was_there(tmp_path):
    put(tmp_path / "there" / ".gitkeep")
    (tmp_path / "empty").mkdir()
    before = tree(tmp_path)

    def refuse(root: Path) -> None:
        with new_run(root, Path("cache"), *CONFIG) as run, lock_run(run):
            assert {p.name for p in root.iterdir()} >= {"run.json", "recipe.toml", "checkpoints", "samples", ".lock"}
            raise RunError("refused", "mend it")

    for name in ("new", "there", "empty"):
        with pytest.raises(RunError, match="refused"):
            refuse(tmp_path / name)
    assert tree(tmp_path) == before


def test_a_run_in_the_current_folder_has_the_folders_name(tmp_path, monkeypatch):
    (tmp_path / "fox" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "fox")
    assert Run(Path()).lora == Path("fox.safetensors")
    monkeypatch.chdir(tmp_path / "fox" / "deep")
    assert Run(Path("..")).lora == Path("../fox.safetensors")


def test_files_of_others_outlive_the_state_and_the_temporary_folder_that_they_lie_in(tmp_path):
    state = tmp_path / "state"
    for step in (1, 2):
        resume_state.save_state(state, resume_state.Progress(step), {"adapter": {"w": torch.zeros(1)}}, {})
    put(state / "step-000002" / "notes.txt", "mine")
    put(state / "step-foo" / "x", "mine")
    put(state / ".tmp-step-000009" / ".tmpAbC123")
    resume_state.remove_states(state)
    assert tree(state) == {
        "step-000002": None,
        "step-000002/notes.txt": b"mine",
        "step-foo": None,
        "step-foo/x": b"mine",
    }
    dead = 2**22 + 1  # above the largest process id
    put(tmp_path / f".{dead}-x.json" / "x.json")
    put(tmp_path / f".{dead + 1}-x.json" / "notes.txt", "mine")
    put(tmp_path / f".{dead + 2}-x.json", "mine")
    write_json(tmp_path / "x.json", {})
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == [f".{dead + 1}-x.json", f".{dead + 2}-x.json", "state", "x.json"]


def test_another_programs_sweep_json_makes_no_sweep_of_the_folder_that_it_is_in(tmp_path):
    others = put(tmp_path / "sweep.json", '{"method": "grid", "parameters": {"lr": {"values": [0.1, 0.2]}}}')
    assert outputs.kind_of(tmp_path) is None
    outputs.check_folder(tmp_path / "cache" / "a", "cache")
    others.unlink()
    write_outcomes(tmp_path, [])
    with pytest.raises(OutputError, match="is inside the sweep"):
        outputs.check_folder(tmp_path / "cache" / "a", "cache")
    put(tmp_path / "sweep.json", "damaged")
    assert outputs.kind_of(tmp_path) is None
    put(tmp_path / ".lock")
    assert outputs.kind_of(tmp_path) == "sweep"


def test_a_sweep_checks_the_folders_of_all_its_runs_before_the_first_begins(tmp_path, toy_model):
    make_cache(tmp_path / "cache" / "a")
    sweep = ("sweep", "cache/a", "--grid", "train.lora.rank=2,4", "-o", "out")
    put(tmp_path / "out" / "sweep.json", "[]")
    put(tmp_path / "out" / "rank=4" / "notes.txt", "mine")
    before = tree(tmp_path)
    refused(Cli(tmp_path)(train_app, *sweep), "out/rank=4 is not empty and not a run: it holds notes.txt")
    assert tree(tmp_path) == before
    shutil.rmtree(tmp_path / "out" / "rank=4")
    create_run(tmp_path / "out" / "rank=4", tmp_path / "cache" / "a", *CONFIG)
    refused(Cli(tmp_path)(train_app, *sweep), "out/rank=4 has a run that was started differently: ")
    assert not (tmp_path / "out" / "rank=2").exists()
    put(tmp_path / "runs.toml", '[[run]]\nname = "samples.png"\n')
    refused(Cli(tmp_path)(train_app, "sweep", "cache/a", "--list", "runs.toml"), "cannot be called samples.png")
    with lock_file(tmp_path / "out" / ".lock"):
        shutil.rmtree(tmp_path / "out" / "rank=4")
        locked = Cli(tmp_path)(train_app, *sweep, "--model", str(toy_model))
        refused(locked, f"out is being written by process {os.getpid()}")


# Pictures


def test_show_draws_over_its_own_sheet_by_default_and_over_no_other_picture(tmp_path):
    make_cache(tmp_path / "cat")
    assert free_default(tmp_path / "cat") == tmp_path / "cat.png"
    photo = Image.new("RGB", (8, 8))
    photo.save(tmp_path / "cat.png")
    with pytest.raises(OutputError, match=r"cat.png is there already and was not drawn by k5cache show"):
        free_default(tmp_path / "cat")
    note = PngInfo()
    note.add_text("Software", SOFTWARE)
    photo.save(tmp_path / "cat.png", pnginfo=note)
    assert free_default(tmp_path / "cat") == tmp_path / "cat.png"


def test_a_picture_that_its_user_names_is_written_through_a_link(tmp_path):
    put(tmp_path / "old.png", "an older picture")
    (tmp_path / "link.PNG").symlink_to("old.png")
    assert outputs.check_file(tmp_path / "link.PNG", ".png") == tmp_path / "old.png"
    assert outputs.check_file(tmp_path / "new" / "a [b].png", ".png") == tmp_path / "new" / "a [b].png"


def test_a_manifest_that_another_program_wrote_is_not_a_cache(tmp_path):
    put(tmp_path / "web" / "manifest.json", '{"name": "an app"}')
    with pytest.raises(OutputError, match=r"it holds manifest\.json"):
        ours.check_root(tmp_path / "web")
    make_cache(tmp_path / "cache")
    path = tmp_path / "cache" / "manifest.json"
    path.write_bytes(b" " + path.read_bytes()[1:])  # damaged: that its reader says, and the way to repair it
    ours.check_root(tmp_path / "cache")
