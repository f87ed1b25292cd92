"""How is the file system of a store opened, how long does it wait for an answer, and at which address does it ask?

Only requests are asked again here, each within its file system. ``objects.py`` asks again too, but not when that took
long, so the tries are not multiplied: a store that accepts connections and stays silent is named after at most
``TRIES * SILENT`` seconds and some waits between them, and twice that in the middle of an upload in parts.
"""

from __future__ import annotations

import importlib
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from k5cache.remote.failures import NotAStore

CONNECT = 10.0
"""Seconds in which a connection must come about."""
SILENT = 25.0
"""Seconds without a byte after which a connection is given up. s3fs has 15; a disk that spins up may need that."""
TRIES = 3
"""How often one request is sent to S3, unless ``AWS_MAX_ATTEMPTS`` or ``AWS_RETRY_MODE`` say otherwise."""
PACKAGES = {"s3": ("s3fs", "s3fs"), "gs": ("gcsfs", "gcsfs"), "hf": ("huggingface_hub", "huggingface_hub")}
"""Scheme -> the module that fsspec needs, and what pip calls it."""
_WITH_ETAG = ("HeadObject", "GetObject", "PutObject", "UploadPart")
"""Answers of S3 that always have an ETag."""
_UNSENT = 128 << 10
"""Bytes that the system holds for a connection and has not sent. By default it holds megabytes, for which a slow link
takes longer than ``SILENT``, and that time runs from when the last byte was handed to the system."""


def open_filesystem(scheme: str) -> Any:
    """The fsspec file system of a scheme, configured by fsspec and by the environment.

    Raises:
        ImportError: its package is not installed.
    """
    import fsspec

    if scheme in PACKAGES:
        importlib.import_module(PACKAGES[scheme][0])
    fs = fsspec.filesystem(scheme, skip_instance_cache=scheme != "memory", use_listings_cache=False)
    if scheme == "s3":
        from aiobotocore.session import AioSession

        fs.retries = 1  # botocore asks again
        fs.config_kwargs = {**_s3_config(os.environ), **fs.config_kwargs}  # what the user configured for fsspec wins
        if fs.session is None:
            fs.session = AioSession(**fs.kwargs)
        fs.session.register("before-call.s3", _send_at_once)
        fs.session.register("after-call.s3", _check_answer)
    return fs


def _send_at_once(params: dict[str, Any], **rest: Any) -> None:
    """Do not wait for the store to say that a body may come: aiohttp would wait for that word without an end."""
    params["headers"].pop("Expect", None)


def _check_answer(http_response: Any, parsed: dict[str, Any], model: Any, **rest: Any) -> None:
    """Refuse what no store says: s3fs would take a login page for a written object, or for an empty listing.

    Raises:
        NotAStore: a web server, or a proxy, has answered.
    """
    status, is_head = http_response.status_code, model.http.get("method") == "HEAD"
    is_page = "text/html" in str(http_response.headers.get("content-type"))
    code = str(parsed.get("Error", {}).get("Code") or "")
    if status < 300 and model.name in _WITH_ETAG:
        is_stores = bool(http_response.headers.get("etag"))
    elif status < 300:
        is_stores = not is_page or status != 200  # a store answers 204 where it has deleted
    else:  # a gateway before a store says with a page that the store is busy, and an answer to HEAD has no words
        has_code = bool(code) and not code.isdigit()
        is_stores = not is_page or has_code or is_head or (status >= 500 and status != 501)
    if not is_stores:
        raise NotAStore(f"status {status}{', a web page' if is_page else ''}")


def _s3_config(environ: Mapping[str, str]) -> dict[str, Any]:
    """What botocore is told about time."""
    config: dict[str, Any] = {"connect_timeout": CONNECT, "read_timeout": SILENT}
    if not environ.get("AWS_MAX_ATTEMPTS") and not environ.get("AWS_RETRY_MODE"):
        config["retries"] = {"mode": "standard", "total_max_attempts": TRIES}
    if hasattr(socket, "TCP_USER_TIMEOUT") and _takes_sockets():
        config["connector_args"] = {"socket_factory": _socket}
    return config


def _takes_sockets() -> bool:
    from aiobotocore.config import AioConfig
    from botocore.exceptions import ParamValidationError

    try:
        AioConfig(connector_args={"socket_factory": None})
    except ParamValidationError:  # aiobotocore before 2.22
        return False
    return True


def _socket(address: tuple[Any, ...]) -> socket.socket:
    """A socket that also fails when the store takes no byte for ``SILENT`` seconds, for which aiohttp has no limit."""
    connection = socket.socket(*address[:3])
    with suppress(OSError):  # a system that knows the names and not the options
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(SILENT * 1000))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT)
    return connection


def address_of(fs: Any, scheme: str) -> tuple[str, str]:
    """The address at which a store is asked, and what it comes from. Both are empty if that is not known."""
    if scheme == "hf":
        from huggingface_hub import constants

        return constants.ENDPOINT, "HF_ENDPOINT" if os.environ.get("HF_ENDPOINT") else "huggingface_hub"
    if scheme == "gs":
        emulator = os.environ.get("STORAGE_EMULATOR_HOST", "")
        return (emulator, "STORAGE_EMULATOR_HOST") if emulator else ("https://storage.googleapis.com", "gcsfs")
    client = getattr(fs, "_s3", None) if scheme == "s3" else None
    if client is None:
        return "", ""
    address = str(client.meta.endpoint_url)
    if fs.endpoint_url or fs.client_kwargs.get("endpoint_url"):
        return address, "fsspec's configuration"
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        if os.environ.get(name):
            return address, name
    is_amazons = (urlsplit(address).hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn"))
    return address, "the region" if is_amazons else "the configuration of AWS (AWS_CONFIG_FILE, ~/.aws/config)"
