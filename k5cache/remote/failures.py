"""What does an error mean that came from asking a store? May it pass, and what is said about it? Values only."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from k5cache.shared.credentials import without_credentials
from k5cache.shared.errors import StoreError
from k5cache.shared.foreign import shown

_LIBRARIES = frozenset({"botocore", "aiobotocore", "aiohttp", "s3fs", "gcsfs", "google", "huggingface_hub", "httpx",
                        "httpx2", "httpcore", "requests", "urllib3"})  # fmt: skip
LOGIN = {
    "s3": "Set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and AWS_ENDPOINT_URL if it is not Amazon's",
    "gs": "Log in with `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS",
    "hf": "Log in with `hf auth login`, or set HF_TOKEN",
    "memory": "Name another URL",
}
_QUERY = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"]+")
"""An address with its query, which may hold a signature."""
_KEPT = "run the same command again: what was finished is kept"


class NotAStore(Exception):
    """What has answered is not an object store. Says what it answered."""


class Absent(StoreError):
    """There is no such object or bucket."""


@dataclass(frozen=True)
class Asked:
    """What a store was asked for."""

    verb: str
    url: str
    name: str
    """Of the object; empty if it was not asked about one."""
    address: str = ""
    """Where it was asked; empty if that is not known, or if it was not asked yet."""
    origin: str = ""
    """What the address comes from."""
    seconds: float = 0.0
    """For how long it was asked, again and again."""

    @property
    def scheme(self) -> str:
        """Of the URL."""
        return self.url.partition("://")[0]

    @property
    def problem(self) -> str:
        """The beginning of a message."""
        return f"Cannot {self.verb} {self.url}/{self.name}" if self.name else f"Cannot {self.verb} {self.url}"

    @property
    def store(self) -> str:
        """The address that was asked, and what it comes from."""
        if not self.address:
            return "the store"
        return f"the store at {without_credentials(shown(self.address, 120))} (the address is from {self.origin})"


def refusal(error: Exception, asked: Asked) -> StoreError:
    """What is said about an error of a store that is not going to pass."""
    words = " ".join(str(error).split()) or type(error).__name__
    reason = without_credentials(shown(_QUERY.sub(r"\1", words), 240))
    if isinstance(error, FileNotFoundError):
        if is_bucket(error):
            bucket = asked.url.partition("://")[2].partition("/")[0]
            return Absent(f"{asked.problem}: there is no bucket {bucket}", "Correct its name, or make it")
        return Absent(f"{asked.problem}: there is no such object", "Look at what the store holds")
    if isinstance(error, NotAStore):
        setting = f"Correct {asked.origin}" if asked.origin else "Correct the address"
        return StoreError(
            f"{asked.problem}: {asked.store} does not answer as an object store does ({reason})",
            f"{setting}, or log in if a proxy wants that, and {_KEPT}",
        )
    if is_silence(error):
        return StoreError(
            f"{asked.problem}: {asked.store} did not answer within {max(1, round(asked.seconds))} s",
            f"See whether it works and can be reached from here, and {_KEPT}",
        )
    if "RequestTimeTooSkewed" in repr(error.__cause__):
        return StoreError(f"{asked.problem}: {reason}", "Set the clock of this machine")
    if "expired" in reason.lower() and isinstance(error, PermissionError):
        return StoreError(f"{asked.problem}: {reason}", f"Renew it ({LOGIN[asked.scheme]}), and {_KEPT}")
    if isinstance(error, OSError) and error.errno == errno.EINVAL and asked.scheme == "s3":
        may = "A token that has expired is answered so too, and a region that is not the bucket's"
        return StoreError(f"{asked.problem}: {reason}", f"{LOGIN['s3']}. {may}")
    if isinstance(error, PermissionError):
        may = f"They must allow to list, read and write below {asked.url}, or to read it if nothing is written there"
        return StoreError(f"{asked.problem}: {reason}", f"{LOGIN[asked.scheme]}. {may}")
    if "redentials" in type(error).__name__ + reason or is_setting(error):
        return StoreError(f"{asked.problem}: {reason}", LOGIN[asked.scheme])
    return StoreError(f"{asked.problem}: {reason}", f"Check the network, and {_KEPT}")


def is_setting(error: Exception) -> bool:
    """Whether an error is about how the store is named, which no second try changes."""
    is_invalid = isinstance(error, ValueError) and str(error).startswith("Invalid endpoint")
    return is_invalid or type(error).__name__ in ("ParamValidationError", "ProfileNotFound", "ConfigParseError")


def is_of_store(error: Exception) -> bool:
    """Whether an error is the store's or the network's, and not one of this code."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return False  # this machine's disk
    if isinstance(error, OSError) and error.errno and Path(str(error.filename)).is_absolute():
        return False  # a file of this machine; those of stores are no paths
    if is_setting(error) or isinstance(error, NotAStore):
        return True
    roots = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return isinstance(error, OSError | TimeoutError | EOFError) or bool(roots & _LIBRARIES)


def may_pass(error: Exception) -> bool:
    """Whether another try may succeed."""
    if isinstance(error, FileNotFoundError | PermissionError | FileExistsError | IsADirectoryError):
        return False
    if "redentials" in type(error).__name__ or is_setting(error) or isinstance(error, NotAStore):
        return False
    status = getattr(getattr(error, "response", None), "status_code", None)
    is_invalid = isinstance(error, OSError) and error.errno in (errno.EINVAL, errno.EPERM, errno.EACCES)
    return not is_invalid and not (isinstance(status, int) and 400 <= status < 500)


def is_silence(error: Exception) -> bool:
    """Whether a store did not answer in time, or took no more bytes."""
    return any(
        isinstance(cause, TimeoutError) or type(cause).__name__.endswith(("Timeout", "TimeoutError"))
        for cause in _causes(error)
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and what it was raised from."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def is_bucket(error: Exception) -> bool:
    """Whether it is the bucket that is not there."""
    return "bucket does not exist" in str(error) or "NoSuchBucket" in repr(error.__cause__)


def is_condition(error: Exception) -> bool | None:
    """Whether an error answers the condition of a write; None if not, False if the store does not know conditions."""
    response = getattr(error.__cause__ or error, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    if isinstance(error, FileExistsError) or code in ("PreconditionFailed", "412", "ConditionalRequestConflict"):
        return True
    if isinstance(error, FileNotFoundError) and code in ("NoSuchKey", "404"):  # If-Match, and it has been deleted
        return True
    return False if code in ("NotImplemented", "501") else None
