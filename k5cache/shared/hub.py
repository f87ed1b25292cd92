"""The hub of models and datasets: who asks it, and what does an answer that refuses mean? One edge for both tools.

Login, tokens, proxies and the folder of downloads are those of huggingface_hub. No token is read, shown or kept here,
except to take it out of what a server or a library says.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from k5cache.shared.credentials import without_credentials
from k5cache.shared.errors import HubError
from k5cache.shared.foreign import shown

if TYPE_CHECKING:
    from huggingface_hub import HfApi

REPOSITORY = re.compile(r"(?![.-])(?!.*(?:\.\.|--))[\w.-]+/(?![.-])[\w.-]+(?<![.-])", re.ASCII)
"""``owner/name``."""
_REQUEST_ID = re.compile(r"\s*\(Request ID: [^)]*\)")
_ONLY_A_CODE = re.compile(r"\d{3} (Client|Server) Error\.?")
_UPLOAD = re.compile(r"Error while uploading|Data processing error|Xet")
"""How the RuntimeErrors of an upload begin, by LFS and by xet."""
_LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN"


def api(quiet: bool = False) -> HfApi:
    """The client, for the endpoint that the environment names now. Imported late: it takes 0.3 s.

    Args:
        quiet: without its own progress bars, which only a terminal gets in any case.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if quiet or not sys.stderr.isatty():
        disable_progress_bars()
    return HfApi()


def home_of(repo: str, kind: str = "model") -> Path:
    """Where the hub's client keeps what it downloaded of a repository.

    The layout is documented (huggingface_hub, "Understand caching"): ``refs/<branch>`` contains the commit,
    ``snapshots/<commit>`` the files, which are links to ``blobs/<hash>``.
    """
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"{kind}s--{repo.replace('/', '--')}"


@contextmanager
def counted(count: Callable[[], int], show: Callable[[int], object], seconds: float = 1.0) -> Iterator[None]:
    """While the block runs, ``show`` every second by how much ``count`` has grown since it was last asked."""
    ended = Event()
    before = count()

    def watch() -> None:
        nonlocal before
        while not ended.wait(seconds):
            now = count()
            show(max(0, now - before))
            before = max(now, before)

    thread = Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def unreachable() -> tuple[type[Exception], ...]:
    """What is raised if the hub or the repository cannot be reached, or refuses."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    # The base class of everything that the client's httpx raises: no route, no name, a timeout, a proxy.
    http_error: Any = HfHubHTTPError.__mro__[1]
    return (http_error, LocalEntryNotFoundError, OfflineModeIsEnabled, HFValidationError, ConnectionError)


def reason_of(error: Exception) -> str:
    """Why the hub did not do what it was asked, in one line without credentials."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    reason = _REQUEST_ID.sub("", lines[0])
    if _ONLY_A_CODE.fullmatch(reason) and len(lines) > 1:  # what it means is in the next line
        reason = f"{reason.rstrip('.')}: {lines[1]}"
    return without_tokens(shown(reason))[:240]


def is_about_login(error: Exception) -> bool:
    """Whether the hub does not know this user, or knows that the user may not do this."""
    return getattr(getattr(error, "response", None), "status_code", None) in (401, 403)


def without_tokens(text: str) -> str:
    """``text`` without this user's token and other credentials, and without what has the shape of one."""
    from huggingface_hub import get_token

    return without_credentials(text, get_token())


@contextmanager
def answering(what: str) -> Iterator[None]:
    """``with answering("push cache/cats to me/cats"):`` turns a hub that is away or refuses into two lines.

    Raises:
        HubError: the hub cannot be reached, this user may not do this, or there is no such repository.
    """
    try:
        yield
    except _refusals() as error:
        raise HubError(f"Cannot {what}: {reason_of(error)}", fix_of(error)) from None
    except RuntimeError as error:  # so an upload ends if a file of it is refused, or its connection is lost
        cause = error.__cause__ if isinstance(error.__cause__, _refusals()) else None
        if cause is None and not _UPLOAD.match(str(error)):
            raise
        raise HubError(f"Cannot {what}: {reason_of(cause or error)}", fix_of(cause or error)) from None


def _refusals() -> tuple[type[Exception], ...]:
    from huggingface_hub.errors import LocalTokenNotFoundError

    return (*unreachable(), LocalTokenNotFoundError)


def fix_of(error: Exception) -> str:
    """What a user can do about it."""
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    status = getattr(getattr(error, "response", None), "status_code", None)
    if HF_HUB_OFFLINE and isinstance(error, LocalTokenNotFoundError):
        return f"Offline mode is set: unset HF_HUB_OFFLINE. {_LOG_IN}, with a token that may do this"
    if isinstance(error, OfflineModeIsEnabled) or (HF_HUB_OFFLINE and status is None):
        return "Offline mode is set: unset HF_HUB_OFFLINE and try again"
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        return f"{_LOG_IN}, with a token that may do this"
    if status == 403:
        return "Use a token that may do this (`hf auth login`); of a gated repository, accept the terms on its page"
    if status == 404:
        return f"Check the name of the repository; a private one is only shown to who may read it. {_LOG_IN}"
    if isinstance(error, HFValidationError):
        return "Write the repository as owner/name"
    return "Check the network and try again; what has arrived already is not sent again"
