"""In which form do jobs and results travel between processes? As JSON in the columns of Arrow tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from k5cache.buckets import Bucket, Geometry
from k5cache.encode.job import LatentJob, SourceView, TextJob
from k5cache.shared import errors
from k5cache.shared.errors import K5Error
from k5cache.sources.items import UnreadableImage
from k5cache.store.manifest import ShardInfo


@dataclass(frozen=True)
class Report:
    """What became of one order."""

    order: int
    shards: tuple[ShardInfo, ...] = ()
    """Whole on disk; the manifest does not name them yet."""
    failed: Mapping[str, UnreadableImage] = field(default_factory=dict)
    """Key -> why there is no row."""
    truncated: tuple[tuple[str, int], ...] = ()
    lost: tuple[str, ...] = ()
    """This and the one before as in ``text_pass.Texts``."""
    notes: tuple[str, ...] = ()
    """What the user should know, once."""
    error: K5Error | OSError | None = None
    """Why the encode ends here."""


def latent_job(text: str) -> LatentJob:
    """The job that ``json_of`` wrote."""
    value = json.loads(text)
    return LatentJob(**value | {"geometry": _geometry(value["geometry"])})


def text_job(text: str) -> TextJob:
    """The job that ``json_of`` wrote."""
    value = json.loads(text)
    source = value["source"]
    view = SourceView(**source | {"geometry": _geometry(source["geometry"])}) if source else None
    return TextJob(**value | {"source": view})


def json_of(job: LatentJob | TextJob) -> str:
    """A job."""
    return json.dumps(asdict(job))


def _geometry(value: dict[str, Any]) -> Geometry:
    return Geometry(**value | {"bucket": Bucket(**value["bucket"])})


def json_of_failure(failure: UnreadableImage) -> str:
    """Why an image cannot be read, and whether that lasts."""
    return json.dumps([failure.reason, failure.is_lasting])


def failure_of(text: str) -> UnreadableImage:
    """What ``json_of_failure`` wrote."""
    reason, is_lasting = json.loads(text)
    return UnreadableImage(reason, has_changed=not is_lasting)


def json_of_report(report: Report) -> str:
    """A report."""
    error = report.error
    return json.dumps(
        {
            "order": report.order,
            "shards": [asdict(shard) for shard in report.shards],
            "failed": {key: json_of_failure(failure) for key, failure in report.failed.items()},
            "truncated": report.truncated,
            "lost": report.lost,
            "notes": report.notes,
            "error": None if error is None else _json_of_error(error),
        }
    )


def report_of(text: str) -> Report:
    """The report that ``json_of_report`` wrote."""
    value = json.loads(text)
    return Report(
        value["order"],
        tuple(ShardInfo(**shard | {"bucket": _bucket(shard["bucket"])}) for shard in value["shards"]),
        {key: failure_of(failure) for key, failure in value["failed"].items()},
        tuple((caption, count) for caption, count in value["truncated"]),
        tuple(value["lost"]),
        tuple(value["notes"]),
        None if value["error"] is None else _error(*value["error"]),
    )


def _bucket(sides: Sequence[int] | None) -> tuple[int, int] | None:
    return (sides[0], sides[1]) if sides else None


def _json_of_error(error: K5Error | OSError) -> tuple[str, Any, Any]:
    if isinstance(error, K5Error):
        return type(error).__name__, error.problem, error.fix
    return "OSError", error.errno, [error.strerror, str(error.filename or "")]


def _error(name: str, first: Any, second: Any) -> K5Error | OSError:
    if name == "OSError":
        return OSError(first, second[0], *([second[1]] if second[1] else []))
    kind: type[K5Error] = getattr(errors, name, K5Error)
    return kind(first, second)
