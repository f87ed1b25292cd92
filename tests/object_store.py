"""An S3 that tests start in this process, and what of it fails when."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from k5cache.remote import behind, copies, mirror, objects, sending
from k5cache.store.manifest import read_manifest
from k5cache.store.reader import open_cache
from k5cache.store.tensors import to_bytes
from tests.workshop import Workshop

BUCKET = "bucket"


@contextmanager
def s3_server() -> Iterator[str]:
    """Serve an empty S3 with one bucket; yields its address. Skips the module if moto or s3fs is missing."""
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install -e .[test]")
    server_module = pytest.importorskip("moto.server", reason="moto is not installed: pip install -e .[test]")
    server = server_module.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    try:
        _, port = server.get_host_and_port()
        yield f"http://127.0.0.1:{port}"
    finally:
        server.stop()


def point_at(address: str, home: Path, patch: pytest.MonkeyPatch) -> None:
    """The environment of a user of that server, and copies in ``home``."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "a-secret-of-tests", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": address, "AWS_EC2_METADATA_DISABLED": "true", "K5_HOME": str(home),
    }.items():  # fmt: skip
        patch.setenv(name, value)
    patch.setattr(objects, "WAITS", (0.01, 0.01))
    another_machine(home, patch)


def another_machine(home: Path, patch: pytest.MonkeyPatch) -> None:
    """From now on, this process knows nothing of what it did so far, as on a machine with another ``K5_HOME``."""
    patch.setenv("K5_HOME", str(home))
    behind.MIRRORS.clear()
    mirror._URLS.clear()
    copies._held, copies._added = 0, None


def in_store(prefix: str) -> dict[str, bytes]:
    """Every object below a prefix of the bucket."""
    import s3fs

    fs = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    begin = f"{BUCKET}/{prefix}/"
    return {path.removeprefix(begin): fs.cat_file(path) for path in fs.find(begin)}


def put(prefix: str, files: dict[str, bytes]) -> None:
    """Write objects below a prefix of the bucket, which is made if there is none."""
    import s3fs

    fs = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    if not fs.exists(BUCKET):
        fs.mkdir(BUCKET)
    for name, content in files.items():
        fs.pipe_file(f"{BUCKET}/{prefix}/{name}", content)


def environment() -> dict[str, str]:
    """Of this process."""
    return dict(os.environ)


def rows_of(root: Path | str) -> dict[tuple[str, str], tuple[bytes, ...]]:
    """Every stored row that the index of a cache names, by kind and key, in bytes."""
    cache = open_cache(root)
    rows = cache.rows(range(len(cache)))
    keys = {("latents", row.latent_key) for row in rows} | {("text", key) for row in rows for key in row.caption_keys}
    return {(kind, key): tuple(map(to_bytes, cache._read(kind, key).tensors.values())) for kind, key in keys}


def files_of(root: Path) -> dict[str, bytes]:
    """A cache as objects."""
    return {name: (root / name).read_bytes() for name in ("manifest.json", *read_manifest(root).named)}


def make_store(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder from which commands reach an empty bucket, and send what is committed at once."""
    point_at(server, tmp_path / "home", monkeypatch)
    monkeypatch.setattr(sending, "SECONDS", 0.0)
    put("made", {"it": b""})
    return tmp_path


def shop_of_six(tmp_path: Path, once: Callable[[str, Callable[[Path], None]], Path], toy_model: Path) -> Workshop:
    """Six pictures and their cache, in ``shop/cache``."""

    def make(folder: Path) -> None:
        shop = Workshop(folder / "shop", toy_model)
        for number in range(6):
            shop.put(f"{number}.png", f"picture {number}", seed=number)
        shop.encode()

    shutil.copytree(once("shop_of_six", make) / "shop", tmp_path / "shop")
    shop = Workshop.__new__(Workshop)
    shop.source, shop.root, shop.model = tmp_path / "shop/images", tmp_path / "shop/cache", toy_model
    return shop
