"""A cache goes to the hub and comes back with the same bytes, private, in order, and never over something else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from k5cache.cli import app
from k5cache.store.manifest import read_manifest
from k5cache.upkeep.verify import verify_cache
from tests.cli import Cli, Done
from tests.hub_server import TOKEN, Hub, Repository, point_client_at, serving
from tests.workshop import Workshop

REPO = "datasets/me/cats"
# The client's upload of a file by LFS, which xet replaces on the hub itself.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with serving(Hub()) as server:
        point_client_at(server, tmp_path / "downloads", monkeypatch, TOKEN)
        yield server


@pytest.fixture
def shop(tmp_path, once, toy_model) -> Workshop:
    """A cache of two pictures in ``shop/cache``."""

    def make(folder: Path) -> None:
        shop = Workshop(folder / "shop", toy_model)
        shop.put("cat.png", "a cat")
        shop.put("dog.png", "a dog", seed=1)
        shop.encode()

    shop = Workshop(tmp_path / "shop", toy_model)
    shutil.copytree(once("shop_to_push", make) / "shop", tmp_path / "shop", dirs_exist_ok=True)
    return shop


@pytest.fixture
def cli(tmp_path) -> Cli:
    return Cli(tmp_path)


def json_of(done: Done) -> dict:
    assert done.code == 0, done.err
    return json.loads(done.out)


def bytes_of(root: Path) -> dict[str, bytes]:
    """Every file that the manifest names, and the manifest."""
    named = {*read_manifest(root).named, "manifest.json"}
    return {name: (root / name).read_bytes() for name in sorted(named)}


def test_a_cache_comes_back_with_the_same_bytes_and_a_second_push_or_pull_moves_none(hub, shop, cli):
    done = cli(app, "push", str(shop.root), "cats")
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == "Next, on another machine: k5cache pull me/cats"
    repository = hub.repositories[REPO]
    assert repository.private
    assert set(bytes_of(shop.root)) == set(repository.files) - {"README.md", ".gitattributes"}
    assert "manifest.json" not in repository.commits[list(repository.commits)[-2]]  # it is committed last
    card = repository.files["README.md"].decode()
    assert "| items | 2 |" in card
    assert "k5cache pull me/cats" in card
    assert str(shop.root.parent) not in card

    done = cli(app, "pull", "me/cats")
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1].startswith("Next, train a LoRA: k5train run cache/cats")
    pulled = cli.folder / "cache" / "cats"
    assert bytes_of(pulled) == bytes_of(shop.root)
    assert verify_cache(pulled).problems == verify_cache(pulled).foreign == ()

    hub.requests.clear()
    again = json_of(cli(app, "push", str(shop.root), "cats", "--json"))
    assert (again["num_files"], again["num_bytes"]) == (0, 0)
    assert json_of(cli(app, "pull", "me/cats", "--json"))["is_unchanged"]
    assert not [request for request in hub.requests if "/commit/" in request or request.endswith(".parquet")]


def test_what_was_interrupted_goes_on_where_it_was(hub, shop, cli, monkeypatch):
    monkeypatch.setattr("k5cache.shared.upload._BATCH_FILES", 1)
    sent = []

    def break_at(count: int, what: str):
        def refuse(request: str) -> int | None:
            sent.append(what in request)
            return 403 if what in request and sum(sent) > count else None

        sent.clear()
        return refuse

    hub.refuse = break_at(2, "/commit/")
    done = cli(app, "push", str(shop.root), "cats")
    assert (done.code, done.err.count("error: ")) == (2, 1)
    assert "manifest.json" not in hub.repositories[REPO].files
    done = cli(app, "pull", "me/cats")
    assert "me/cats holds no cache: it has no manifest.json" in done.err
    hub.refuse = lambda request: None
    assert json_of(cli(app, "push", str(shop.root), "cats", "--json"))["num_there"] == 2

    hub.refuse = break_at(1, ".parquet")
    assert cli(app, "pull", "me/cats").code == 2
    pulled = cli.folder / "cache" / "cats"
    assert not (pulled / "manifest.json").exists()
    hub.refuse = lambda request: None
    assert cli(app, "pull", "me/cats").code == 0
    assert bytes_of(pulled) == bytes_of(shop.root)


def test_a_cache_that_grew_is_brought_up_to_date_and_its_old_tables_leave_the_hub(hub, shop, cli):
    assert cli(app, "push", str(shop.root), "cats").code == 0
    assert cli(app, "pull", "me/cats").code == 0
    before = read_manifest(shop.root)
    shop.put("owl.png", "an owl", seed=2)
    shop.encode()
    pushed = json_of(cli(app, "push", str(shop.root), "me/cats", "--json"))
    assert set(pushed["deleted"]) == before.tables
    assert pushed["num_there"] == len(before.shards)
    assert json_of(cli(app, "pull", "me/cats", "--json"))["num_here"] == len(before.shards)
    assert bytes_of(cli.folder / "cache" / "cats") == bytes_of(shop.root)


def test_nothing_is_written_over_what_is_something_else(hub, shop, cli, tmp_path, toy_model):
    hub.repositories["datasets/me/full"] = Repository(private=True)
    hub.repositories["datasets/me/full"].put({"data.csv": b"1,2"})
    assert "me/full holds other files and no cache: data.csv" in cli(app, "push", str(shop.root), "me/full").err
    assert cli(app, "push", str(shop.root), "cats").code == 0
    other = Workshop(tmp_path / "other", toy_model)
    other.put("fox.png", "a fox", seed=5)
    other.encode("a wolf")
    assert "holds another cache" in cli(app, "push", str(other.root), "cats").err

    hub.repositories[REPO].private = False
    assert "me/cats is public" in cli(app, "push", str(shop.root), "cats").err
    done = cli(app, "push", str(shop.root), "cats", "--public")
    assert (done.code, "to everybody" in done.out) == (0, True)

    before = bytes_of(other.root)
    done = cli(app, "pull", "me/cats", str(other.root))
    assert (done.code, "shards that me/cats does not have" in done.err) == (2, True)
    assert bytes_of(other.root) == before
    done = cli(app, "pull", "me/cats", str(shop.source))
    assert (done.code, "is not empty and not a cache" in done.err) == (2, True)


def test_a_page_of_ones_own_stays_and_the_page_of_a_push_is_written_anew(hub, shop, cli):
    assert cli(app, "push", str(shop.root), "cats").code == 0
    repository = hub.repositories[REPO]
    repository.put({"README.md": b"<!-- Written by `k5cache push`, which replaces this page"})
    repository.put({"README.md": b"my own"})
    assert cli(app, "push", str(shop.root), "cats").code == 0
    assert repository.files["README.md"] == b"my own"


def test_a_damaged_cache_is_not_pushed_and_a_byte_that_changed_on_the_way_is_not_pulled(hub, shop, cli, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(shop.root, broken)
    shard = next((broken / "latents").iterdir())
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    done = cli(app, "push", str(broken), "cats")
    assert (done.code, "is damaged and is not pushed" in done.err, hub.repositories) == (2, True, {})

    assert cli(app, "push", str(shop.root), "cats").code == 0
    name = f"latents/{shard.name}"
    hub.repositories[REPO].put({name: bytes(data)})
    done = cli(app, "pull", "me/cats", "mine")
    assert (done.code, f"{name} did not arrive with the bytes that the manifest" in done.err) == (2, True)
    assert not (tmp_path / "mine" / "manifest.json").exists()
    hub.repositories[REPO].put({name: (shop.root / name).read_bytes()})
    assert cli(app, "pull", "me/cats", "mine").code == 0
    (tmp_path / "mine" / name).write_bytes(data)
    assert json_of(cli(app, "pull", "me/cats", "mine", "--json"))["num_bytes"] == len(data)
    assert bytes_of(tmp_path / "mine") == bytes_of(shop.root)


@pytest.mark.parametrize(
    ("status", "fix"),
    [(401, "Log in with `hf auth login`"), (403, "Use a token with the right to write"), (404, "Check the name of"),
     (500, "Check the network and try again")],
)  # fmt: skip
def test_what_the_hub_refuses_ends_in_two_lines_without_the_token(hub, shop, cli, status, fix):
    hub.refuse = lambda request: None if "whoami" in request else status
    for arguments in (("push", str(shop.root), "me/cats"), ("pull", "me/cats")):
        done = cli(app, *arguments)
        assert done.code == 2
        lines = done.err.strip().splitlines()
        assert len(lines) == 2, done.err
        assert lines[0].startswith("error: Cannot pu")
        assert fix in lines[1]
        assert TOKEN not in done.err + done.out


def test_offline_and_without_a_login_it_is_said_what_to_do(hub, shop, cli, tmp_path, monkeypatch):
    done = cli(app, "push", str(shop.root), "a b/c")
    assert (done.code, "a b/c is not a name of a repository" in done.err) == (2, True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for arguments in (("push", str(shop.root), "cats"), ("push", str(shop.root), "me/cats"), ("pull", "me/cats")):
        done = cli(app, *arguments)
        assert done.code == 2
        assert done.err.strip().splitlines()[1:] == ["  fix: Offline mode is set: unset HF_HUB_OFFLINE and try again"]
    point_client_at(hub, tmp_path / "downloads", monkeypatch)
    for name in ("cats", "me/cats"):
        done = cli(app, "push", str(shop.root), name)
        assert (done.code, "Log in with `hf auth login`" in done.err) == (2, True), done.err
