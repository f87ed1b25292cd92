"""A model of the hub: when is the hub asked, when is anything downloaded, and what if it cannot be reached?"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from k5cache.cli import app as cache_app
from k5cache.encode import differences
from k5cache.encode.request import build_recipe
from k5cache.options import CacheConfig
from k5cache.shared.checkpoint import model_folder
from k5cache.shared.console import human_bytes
from k5cache.shared.errors import ModelError
from k5cache.shared.model import FLAVOURS, ModelConfig, model_of
from k5cache.store.manifest import read_manifest, write_manifest
from k5train.cli import app
from tests.cli import Cli
from tests.workshop import EditShop, Workshop

PARTS = ("transformer", "vae", "scheduler")
COMMIT, NEWER = "1111aaaa" * 5, "2222bbbb" * 5
MODEL = ModelConfig(path="someone/toy")
PIN = f"model.revision={COMMIT}"
SMALL = ("--set", "cache.resolution=64", "--device", "cpu")
TINY = ("--set", "train.steps=1", "--set", "train.mixed_precision=fp32", "--set", "train.lora.rank=2")
NO_ROUTE = HfHubHTTPError.__mro__[1]("no route to host")  # what httpx's own errors descend from


class Hub:
    """A stand-in for the hub: it knows which commit ``main`` is, and notes what it is asked."""

    def __init__(self, home: Path, model: Path) -> None:
        self.snapshots = home / "models--someone--toy" / "snapshots"
        self.here, self.model = self.snapshots / COMMIT, model
        shutil.copytree(model, self.here)
        self.refs = home / "models--someone--toy" / "refs" / "main"
        self.refs.parent.mkdir()
        self.refs.write_text(COMMIT, encoding="utf-8")
        self.commit, self.problem = COMMIT, None
        self.asked, self.downloads = 0, []

    def model_info(
        self, repo: str, revision: str | None = None, timeout: float | None = None, files_metadata: bool = False
    ) -> SimpleNamespace:
        self.asked += 1
        if self.problem:
            raise self.problem
        files = [path for path in self.model.rglob("*") if path.is_file()] if files_metadata else ()
        siblings = [
            SimpleNamespace(rfilename=str(path.relative_to(self.model)), size=path.stat().st_size, lfs=None, blob_id="")
            for path in files
        ]
        return SimpleNamespace(sha=self.commit, siblings=siblings)

    def snapshot_download(self, repo: str, revision: str | None = None, allow_patterns: Sequence[str] = ()) -> str:
        if self.problem:
            raise self.problem
        self.downloads.append(allow_patterns)
        snapshot = self.snapshots / self.commit
        for path in (p for p in self.model.rglob("*") if p.is_file()):
            name = path.relative_to(self.model)
            if any(fnmatch(str(name), pattern) for pattern in allow_patterns):
                (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, snapshot / name)
        return str(snapshot)


@pytest.fixture
def hub(tmp_path, toy_model, monkeypatch) -> Hub:
    return connected(Hub(tmp_path / "hub", toy_model), tmp_path, monkeypatch)


def connected(hub_of_one_model: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The hub, put in the place of the real one."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("k5cache.shared.hub.api", lambda quiet=False: hub_of_one_model)
    return hub_of_one_model


def test_a_snapshot_that_is_whole_and_the_newest_costs_one_question_and_no_download(hub, capsys):
    assert model_folder(MODEL, PARTS) == hub.here
    assert (hub.asked, hub.downloads) == (1, [])
    assert capsys.readouterr() == ("", "")


def test_a_revision_that_moved_is_downloaded(hub):
    hub.commit = NEWER
    assert model_folder(MODEL, PARTS) == hub.snapshots / NEWER
    small = ["model_index.json", "transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json"]
    weights = [f"{part}/diffusion_pytorch_model.safetensors" for part in ("transformer", "vae")]
    assert hub.downloads == [small, [*small[:2], weights[0], small[2], weights[1], small[3]]]


def test_a_pinned_commit_that_is_here_is_not_asked_for(hub):
    assert model_folder(ModelConfig(path="someone/toy", revision=COMMIT), PARTS) == hub.here
    assert (hub.asked, hub.downloads) == (0, [])


@pytest.mark.parametrize("problem", [NO_ROUTE, ConnectionError("refused")])
def test_where_the_hub_cannot_be_reached_the_last_download_serves_and_one_line_says_so(hub, capsys, problem):
    hub.problem = problem
    assert model_folder(MODEL, PARTS) == hub.here
    note = f"cannot reach the hub to check for a newer one ({problem})\n"
    assert capsys.readouterr() == ("", f"Using the downloaded copy of someone/toy (commit 1111aaaa): {note}")


def test_who_asked_to_be_offline_is_not_told_so(hub, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.problem = OfflineModeIsEnabled("offline")
    assert model_folder(MODEL, PARTS) == hub.here
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        ("transformer/diffusion_pytorch_model.safetensors", "a weight file of transformer is missing"),
        ("scheduler/scheduler_config.json", "scheduler/scheduler_config.json is missing"),
    ],
)
def test_of_half_a_download_it_is_said_what_is_missing_where_the_hub_cannot_complete_it(hub, lost, words):
    (hub.here / lost).unlink()
    hub.problem = NO_ROUTE
    with pytest.raises(ModelError, match=rf"someone/toy is incomplete on this machine \({words}\) and cannot be"):
        model_folder(MODEL, PARTS)


def test_a_model_that_was_never_downloaded_needs_the_hub(hub):
    hub.problem = NO_ROUTE
    with pytest.raises(ModelError, match=r"someone/other is not on this machine and cannot be downloaded \(no route"):
        model_folder(ModelConfig(path="someone/other"), PARTS)


def test_a_full_disk_is_not_taken_for_a_hub_that_is_away(hub):
    hub.problem = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="No space left"):
        model_folder(MODEL, PARTS)


def test_a_run_trains_on_what_is_here_while_the_hub_is_away(hub, tmp_path, toy_cache):
    hub.problem = NO_ROUTE
    done = Cli(tmp_path)(app, "run", str(toy_cache("bf16")), "--model", "someone/toy", "-o", "runs/a", *TINY)
    assert done.code == 0, done.err
    assert done.err.count("cannot reach the hub") == 1
    assert (tmp_path / "runs" / "a" / "a.safetensors").is_file()


# A cache of a pinned revision


@pytest.fixture(scope="module")
def encoded_at_the_commit(tmp_path_factory, toy_model) -> Path:
    """A folder with pictures in ``set`` and a cache of them that was encoded at a pinned commit. Tests only copy it."""
    root = tmp_path_factory.mktemp("pinned")
    with pytest.MonkeyPatch.context() as patch:
        connected(Hub(root / "hub", toy_model), root, patch)
        Workshop(root, toy_model).put("cat.png", "a cat")
        (root / "images").rename(root / "set")
        done = Cli(root)(cache_app, "encode", "set", *SMALL, "--model", "someone/toy", "--set", PIN)
        assert done.code == 0, done.err
    return root


@pytest.fixture
def pinned(hub, tmp_path, encoded_at_the_commit) -> Cli:
    """A copy of it; ``main`` has moved on since."""
    for name in ("set", "cache"):
        shutil.copytree(encoded_at_the_commit / name, tmp_path / name)
    hub.commit = NEWER
    return Cli(tmp_path)


def test_a_run_that_names_no_model_trains_the_revision_that_its_cache_was_encoded_at(hub, pinned):
    done = pinned(app, "run", "cache/set", *TINY)
    assert done.code == 0, done.err
    assert f'revision = "{COMMIT}"' in (pinned.folder / "runs" / "set" / "recipe.toml").read_text(encoding="utf-8")
    assert (hub.asked, hub.downloads) == (0, [])


def test_a_run_that_names_a_model_trains_that_and_not_the_caches_revision(hub, pinned):
    done = pinned(app, "run", "cache/set", "--model", "someone/toy", *TINY)
    assert done.code == 0, done.err
    assert "revision" not in (pinned.folder / "runs" / "set" / "recipe.toml").read_text(encoding="utf-8")
    assert (hub.asked, len(hub.downloads)) == (1, 2)


def test_the_revision_is_shown_and_is_in_the_command_that_trains(pinned):
    shown = pinned(cache_app, "info", "cache/set")
    encoded = pinned(cache_app, "encode", "set", *SMALL, "--model", "someone/toy", "--set", PIN)
    assert f"someone/toy at {COMMIT}" in " ".join(shown.out.split())
    for done in (shown, encoded):
        assert done.out.splitlines()[-1] == f"Next, train a LoRA: k5train run cache/set --model someone/toy --set {PIN}"


def test_the_encoders_that_add_a_prompt_are_of_the_revision_unless_a_model_is_named(hub, pinned):
    assert pinned(cache_app, "prompts", "add", "cache/set", "a fox").code == 0
    assert hub.asked == 0
    assert pinned(cache_app, "prompts", "add", "cache/set", "an owl", "--model", "someone/toy").code == 0
    assert hub.asked == 1


def test_a_revision_changes_no_key_and_a_cache_without_one_has_the_recipe_that_it_always_had(toy_model):
    plain, at = (build_recipe(ModelConfig(revision=r), CacheConfig(), toy_model) for r in (None, COMMIT))
    assert plain["model"] == {"source": FLAVOURS["t2i-lite-sft"], "flavour": "t2i-lite-sft"}
    assert at == {**plain, "model": {**plain["model"], "revision": COMMIT}}
    assert differences.differences(plain, at) == []
    assert (model_of(plain), model_of(at)) == (ModelConfig(), ModelConfig(revision=COMMIT))
    assert model_of({"model": {**plain["model"], "revision": 5}}) == ModelConfig()


def test_a_cache_from_before_revisions_were_noted_notes_its_own_when_it_is_encoded_again(hub, pinned):
    root = pinned.folder / "cache" / "set"
    again = ("encode", "set", *SMALL, "--model", "someone/toy", "--json")
    pinned(cache_app, *again, "--set", PIN)  # notes where the copied pictures are now
    manifest = read_manifest(root)
    noted = manifest.recipe["model"]
    without = {name: value for name, value in noted.items() if name != "revision"}
    write_manifest(root, replace(manifest, recipe={**manifest.recipe, "model": without}))
    assert json.loads(pinned(cache_app, *again).out)["is_unchanged"]
    for is_unchanged in (False, True):
        done = json.loads(pinned(cache_app, *again, "--set", PIN).out)
        assert (done["is_unchanged"], done["num_latents"], done["num_texts"]) == (is_unchanged, 0, 0)
        assert read_manifest(root).recipe["model"] == noted
    assert read_manifest(root).shards == manifest.shards


def test_a_run_goes_on_where_its_cache_has_noted_the_revision_meanwhile(hub, pinned):
    root = pinned.folder / "cache" / "set"
    manifest = read_manifest(root)
    without = {name: value for name, value in manifest.recipe["model"].items() if name != "revision"}
    write_manifest(root, replace(manifest, recipe={**manifest.recipe, "model": without}))
    hub.commit = COMMIT
    assert pinned(app, "run", "cache/set", "-o", "runs/a", *TINY).code == 0
    write_manifest(root, manifest)
    done = pinned(app, "resume", "runs/a", "--set", "train.steps=2")
    assert done.code == 0, done.err


# Looking ahead


@pytest.fixture
def nothing_here(hub, tmp_path) -> Cli:
    """A folder with a picture; no file of the model is on this machine."""
    shutil.rmtree(hub.snapshots)
    shop = Workshop(tmp_path / "shop", hub.model)
    shop.put("cat.png", "a cat")
    return Cli(tmp_path / "shop")


def test_plan_and_diff_download_configs_alone_and_say_how_large_the_rest_is(hub, nothing_here):
    rest = [
        hub.model / part / name
        for part, name in (
            ("text_encoder", "model.safetensors"), ("tokenizer", "tokenizer.json"),
            ("text_encoder_2", "model.safetensors"), ("tokenizer_2", "tokenizer.json"),
            ("vae", "diffusion_pytorch_model.safetensors"),
        )
    ]  # fmt: skip
    parts = ", ".join(f"{path.parent.name} {human_bytes(path.stat().st_size)}" for path in rest)
    size = human_bytes(sum(path.stat().st_size for path in rest))
    for command in ("plan", "diff"):
        done = nothing_here(cache_app, command, "images", "--model", "someone/toy", "--set", "cache.resolution=64")
        assert done.code == 0, done.err
        assert f"Using someone/toy will download {size} ({parts}) first: it is not on this machine" in done.err
        here = sorted(str(p.relative_to(hub.here)) for p in hub.here.rglob("*") if p.is_file())
        assert here == [
            "model_index.json", "text_encoder/config.json", "text_encoder_2/config.json",
            "tokenizer/tokenizer_config.json", "tokenizer_2/tokenizer_config.json", "transformer/config.json",
            "vae/config.json",
        ]  # fmt: skip
    assert hub.asked == 2
    done = nothing_here(app, "plan", "--model", "someone/toy")
    assert done.code == 0, done.err
    assert not [*hub.here.rglob("*.safetensors")]


def test_a_preview_takes_weights_that_are_not_here_for_those_of_the_cache(hub, pinned):
    hub.commit = COMMIT
    before = [*hub.here.rglob("*.safetensors")]
    for path in before:
        path.unlink()
    done = pinned(cache_app, "diff", "set", "--model", "someone/toy", "--set", "cache.resolution=64", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["differences"] == []
    assert json.loads(done.out)["num_latents"] == 0
    assert not [*hub.here.rglob("*.safetensors")]


def test_a_preview_of_a_newer_revision_uses_what_is_here_and_says_so(hub, pinned):
    done = pinned(cache_app, "diff", "set", "--model", "someone/toy", "--set", "cache.resolution=64")
    assert done.code == 0, done.err
    assert "the hub has a newer revision, 2222bbbb. Only its configs are read now" in done.err
    assert hub.downloads == []


def test_a_preview_without_the_hub_needs_only_the_configs_that_are_here(hub, nothing_here):
    hub.problem = NO_ROUTE
    arguments = ("diff", "images", "--model", "someone/toy", "--set", "cache.resolution=64")
    assert "is not on this machine and cannot be downloaded" in nothing_here(cache_app, *arguments).err
    hub.problem = None
    assert nothing_here(cache_app, *arguments).code == 0
    hub.problem = NO_ROUTE
    assert nothing_here(cache_app, *arguments).code == 0


def test_a_plan_of_pairs_downloads_the_config_of_the_image_processor_and_no_weights(
    tmp_path, toy_edit_model, monkeypatch
):
    hub = connected(Hub(tmp_path / "hub", toy_edit_model), tmp_path, monkeypatch)
    shutil.rmtree(hub.snapshots)
    shop = EditShop(tmp_path / "shop", toy_edit_model)
    shop.put_pair("cat.png")
    cli = Cli(tmp_path / "shop")
    for command in ("plan", "diff"):
        options = ("--set", "cache.resolution=64", "--set", "model.flavour=i2i-lite-sft", "--model", "someone/toy")
        done = cli(cache_app, command, "images", "--sources", "sources", *options)
        assert done.code == 0, done.err
        assert (hub.here / "tokenizer" / "preprocessor_config.json").is_file()
    assert not [*hub.here.rglob("*.safetensors")]
