"""Which pictures of a grid are asked for? A filter, a search, an order and a page, from a URL and back into one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from urllib.parse import urlencode

PAGE = 60
"""Pictures on a page."""
ONLY = {
    "": "All",
    "left-out": "Left out",
    "mask": "With a mask",
    "several": "Several captions",
    "truncated": "Cut-off caption",
    "no-caption": "No caption",
}
SORTS = {"": "As encoded", "name": "Name", "size": "Largest first", "long": "Longest caption", "newest": "Newest first"}
_BUCKET = re.compile(r"[0-9]{1,5}x[0-9]{1,5}", re.ASCII)
_MOST_PAGES = 10**7


@dataclass(frozen=True)
class Query:
    """What of a grid is shown."""

    only: str = ""
    """A key of ``ONLY``."""
    bucket: str = ""
    """``1024x1024``; empty for all."""
    q: str = ""
    """Text that names or captions have."""
    sort: str = ""
    """A key of ``SORTS``."""
    page: int = 1
    rest: Mapping[str, str] = field(default_factory=dict)
    """What else is in the URL: the options of an encode that is tried."""

    def url(self, **changes: str | int) -> str:
        """``?only=mask&page=2``: this query with changes. Another filter begins at its first page."""
        query = replace(self, **({"page": 1} | changes))  # type: ignore[arg-type]
        values = {"only": query.only, "bucket": query.bucket, "q": query.q, "sort": query.sort}
        values |= {"page": str(query.page) if query.page > 1 else "", **query.rest}
        return "?" + urlencode({name: value for name, value in values.items() if value})

    @property
    def is_all(self) -> bool:
        """Whether nothing is filtered out."""
        return not (self.only or self.bucket or self.q)


def read_query(values: Mapping[str, str], rest: Mapping[str, str] | None = None) -> Query:
    """A query from a URL. What it does not know counts as not given."""
    only, sort, bucket, page = (values.get(name, "") for name in ("only", "sort", "bucket", "page"))
    number = int(page) if page.isascii() and page.isdigit() and len(page) < 9 else 1
    return Query(
        only if only in ONLY else "",
        bucket if _BUCKET.fullmatch(bucket) else "",
        values.get("q", "").strip()[:200],
        sort if sort in SORTS else "",
        max(1, min(number, _MOST_PAGES)),
        rest or {},
    )


@dataclass(frozen=True)
class Choice:
    """One filter to choose."""

    label: str
    url: str
    is_chosen: bool
    count: int | None = None


@dataclass(frozen=True)
class Tile:
    """One picture in a grid."""

    href: str
    """Its page."""
    picture: str
    """URL of its small picture."""
    name: str
    shape: tuple[int, int] = (1, 1)
    """Width and height of the small picture, so that nothing jumps when it comes."""
    captions: tuple[str, ...] = ()
    facts: str = ""
    """Bucket and size, in a few words."""
    badges: tuple[str, ...] = ()
    problem: str = ""
    """Why it is left out or cannot be shown as it is trained on."""


@dataclass(frozen=True)
class Grid:
    """A page of pictures, and how to get to others."""

    query: Query
    tiles: tuple[Tile, ...]
    num_shown: int
    """That the filter leaves."""
    num_all: int
    choices: tuple[Choice, ...] = ()
    buckets: tuple[Choice, ...] = ()
    sorts: tuple[tuple[str, str], ...] = tuple(SORTS.items())
    note: str = ""
    """What a search does not cover, and the like."""

    @property
    def num_pages(self) -> int:
        """At least 1."""
        return max(1, -(-self.num_shown // PAGE))

    @property
    def page(self) -> int:
        """The page that is shown: the last one, if the URL names one behind it."""
        return min(self.query.page, self.num_pages)


def slice_of(query: Query, count: int) -> slice:
    """Which of ``count`` things are on the page that is asked for; on the last one, if it is behind that."""
    page = min(query.page, max(1, -(-count // PAGE)))
    return slice((page - 1) * PAGE, page * PAGE)
