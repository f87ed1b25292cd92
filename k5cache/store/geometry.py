"""Which part of an image and of its source is trained on? A row of the index as a ``Geometry``."""

from __future__ import annotations

from k5cache.buckets import Bucket, Geometry, source_geometry
from k5cache.store.index import IndexRow


def geometry_of(row: IndexRow) -> Geometry:
    """The crop of an index row."""
    return Geometry(
        width=row.width,
        height=row.height,
        bucket=Bucket(row.bucket_width, row.bucket_height),
        resized_width=row.resized_width,
        resized_height=row.resized_height,
        left=row.left,
        top=row.top,
        flipped=row.flipped,
    )


def source_of_row(row: IndexRow) -> Geometry:
    """The crop of a row's source."""
    return source_geometry(geometry_of(row), row.source_width, row.source_height)
