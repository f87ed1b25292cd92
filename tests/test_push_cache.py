"""A cache goes to the hub and comes back with the same bytes, private, in order, and never over something else."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest

from k5cache.cli import app
from k5cache.shared.errors import CacheCorrupt, CacheError, HubError, OutputError
from k5cache.store.manifest import read_manifest
from k5cache.upkeep.pull import pull_cache
from k5cache.upkeep.push import push_cache
from k5cache.upkeep.verify import verify_cache
from tests.cli import Cli
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


def bytes_of(root: Path) -> dict[str, bytes]:
    """Every file that the manifest names, and the manifest."""
    named = {*read_manifest(root).named, "manifest.json"}
    return {name: (root / name).read_bytes() for name in sorted(named)}


def test_a_cache_comes_back_with_the_same_bytes_and_a_second_push_or_pull_moves_none(hub, shop, tmp_path):
    cli = Cli(tmp_path)
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
    pulled = tmp_path / "cache" / "cats"
    assert bytes_of(pulled) == bytes_of(shop.root)
    assert verify_cache(pulled).problems == verify_cache(pulled).foreign == ()

    hub.requests.clear()
    again = push_cache(shop.root, "cats")
    assert (again.num_files, again.num_bytes) == (0, 0)
    assert pull_cache("me/cats", pulled).is_unchanged
    assert not [request for request in hub.requests if "/commit/" in request or request.endswith(".parquet")]


def test_what_was_interrupted_goes_on_where_it_was(hub, shop, tmp_path, monkeypatch):
    monkeypatch.setattr("k5cache.shared.upload._BATCH_FILES", 1)
    sent = []

    def break_at(count: int, what: str):
        def refuse(request: str) -> int | None:
            sent.append(what in request)
            return 403 if what in request and sum(sent) > count else None

        sent.clear()
        return refuse

    hub.refuse = break_at(2, "/commit/")
    with pytest.raises(HubError, match="Cannot push"):
        push_cache(shop.root, "cats")
    assert "manifest.json" not in hub.repositories[REPO].files
    pulled = tmp_path / "pulled"
    with pytest.raises(HubError, match=r"me/cats holds no cache: it has no manifest\.json"):
        pull_cache("me/cats", pulled)
    hub.refuse = lambda request: None
    assert push_cache(shop.root, "cats").num_there == 2

    hub.refuse = break_at(1, ".parquet")
    with pytest.raises(HubError, match="Cannot pull"):
        pull_cache("me/cats", pulled)
    assert not (pulled / "manifest.json").exists()
    hub.refuse = lambda request: None
    pull_cache("me/cats", pulled)
    assert bytes_of(pulled) == bytes_of(shop.root)


def test_a_cache_that_grew_is_brought_up_to_date_and_its_old_tables_leave_the_hub(hub, shop, tmp_path):
    push_cache(shop.root, "cats")
    pull_cache("me/cats", tmp_path / "pulled")
    before = read_manifest(shop.root)
    shop.put("owl.png", "an owl", seed=2)
    shop.encode()
    pushed = push_cache(shop.root, "me/cats")
    assert set(pushed.deleted) == before.tables
    assert pushed.num_there == len(before.shards)
    assert pull_cache("me/cats", tmp_path / "pulled").num_here == len(before.shards)
    assert bytes_of(tmp_path / "pulled") == bytes_of(shop.root)


def test_nothing_is_written_over_what_is_something_else(hub, shop, tmp_path, toy_model):
    hub.repositories["datasets/me/full"] = Repository(private=True)
    hub.repositories["datasets/me/full"].put({"data.csv": b"1,2"})
    with pytest.raises(HubError, match=r"me/full holds other files and no cache: data\.csv"):
        push_cache(shop.root, "me/full")
    push_cache(shop.root, "cats")
    other = Workshop(tmp_path / "other", toy_model)
    other.put("fox.png", "a fox", seed=5)
    other.encode("a wolf")
    with pytest.raises(HubError, match="me/cats holds another cache"):
        push_cache(other.root, "cats")

    hub.repositories[REPO].private = False
    with pytest.raises(HubError, match="me/cats is public"):
        push_cache(shop.root, "cats")
    assert push_cache(shop.root, "cats", is_public=True).is_public

    before = bytes_of(other.root)
    with pytest.raises(CacheError, match="shards that me/cats does not have"):
        pull_cache("me/cats", other.root)
    assert bytes_of(other.root) == before
    with pytest.raises(OutputError, match="is not empty and not a cache"):
        pull_cache("me/cats", shop.source)


def test_a_page_of_ones_own_stays_and_the_page_of_a_push_is_written_anew(hub, shop):
    push_cache(shop.root, "cats")
    repository = hub.repositories[REPO]
    written = repository.files["README.md"]
    repository.put({"README.md": written + b"more"})
    push_cache(shop.root, "cats")
    assert repository.files["README.md"] == written
    repository.put({"README.md": b"my own"})
    push_cache(shop.root, "cats")
    assert repository.files["README.md"] == b"my own"


def test_a_damaged_cache_is_not_pushed_and_a_byte_that_changed_on_the_way_is_not_pulled(hub, shop, tmp_path):
    broken, mine = tmp_path / "broken", tmp_path / "mine"
    shutil.copytree(shop.root, broken)
    shard = next((broken / "latents").iterdir())
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CacheCorrupt, match="is damaged and is not pushed"):
        push_cache(broken, "cats")
    assert hub.repositories == {}

    push_cache(shop.root, "cats")
    name = f"latents/{shard.name}"
    hub.repositories[REPO].put({name: bytes(data)})
    with pytest.raises(CacheError, match=f"{name} did not arrive with the bytes that the manifest"):
        pull_cache("me/cats", mine)
    assert not (mine / "manifest.json").exists()
    hub.repositories[REPO].put({name: (shop.root / name).read_bytes()})
    pull_cache("me/cats", mine)
    (mine / name).write_bytes(data)
    assert pull_cache("me/cats", mine).num_bytes == len(data)
    assert bytes_of(mine) == bytes_of(shop.root)


def test_what_the_hub_refuses_is_one_problem_with_a_fix_and_without_the_token(hub, shop, tmp_path, monkeypatch):
    def refusals() -> list[HubError]:
        calls = (partial(push_cache, shop.root, "me/cats"), partial(pull_cache, "me/cats", tmp_path / "pulled"))
        errors = []
        for call in calls:
            with pytest.raises(HubError) as caught:
                call()
            errors.append(caught.value)
        return errors

    for status, fix in (
        (401, "Log in with `hf auth login`"), (403, "Use a token that may do this"),
        (404, "Check the name of"), (500, "Check the network and try again"),
    ):  # fmt: skip
        hub.refuse = lambda request, status=status: status
        for error in refusals():
            assert error.problem.startswith("Cannot pu")
            assert "\n" not in error.problem
            assert fix in error.fix
            assert TOKEN not in str(error)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert {error.fix for error in refusals()} == {"Offline mode is set: unset HF_HUB_OFFLINE and try again"}
    with pytest.raises(HubError, match="a b/c is not a name of a repository"):
        push_cache(shop.root, "a b/c")


def test_without_a_login_it_is_said_how_to_log_in_in_two_lines(hub, shop, tmp_path, monkeypatch):
    point_client_at(hub, tmp_path / "downloads", monkeypatch)
    for name in ("cats", "me/cats"):
        done = Cli(tmp_path)(app, "push", str(shop.root), name)
        lines = [line for line in done.err.splitlines() if line]
        assert (done.code, len(lines)) == (2, 2), done.err
        assert "Log in with `hf auth login`" in lines[1]
