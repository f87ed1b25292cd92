"""What does every file of rows offer? Columns for listing, and single images on demand: the same for all formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa


class FileRows(Protocol):
    """The rows of one file. Images are read one by one; every other column is read whole."""

    @property
    def file(self) -> Path: ...
    @property
    def schema(self) -> pa.Schema:
        """Column names and Arrow types. A column of JSON whose rows have several types counts as text."""

    @property
    def num_rows(self) -> int: ...
    def column(self, name: str) -> list[Any]:
        """The values of a column that has no images; each may be a ``captions.Unusable``."""

    def image_names(self, name: str) -> list[str]:
        """The file name that each image of a column came from; "" if the file does not say."""

    def has_bytes(self, name: str) -> list[bool]:
        """Which rows of a column of images have an image. No image is kept in memory."""

    def read(self, name: str, row: int) -> bytes:
        """One image. Called by several threads. Raises ``UnreadableImage``."""

    def place(self, row: int) -> str:
        """What messages add to the name of the file: `` line 3`` or ``#2``."""


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds text."""
    if pa.types.is_dictionary(kind):
        return is_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def is_binary(kind: pa.DataType) -> bool:
    """Whether a column of this type holds bytes."""
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def is_images(kind: pa.DataType) -> bool:
    """Whether a column of this type may hold images: bytes, or the struct of bytes and path that `datasets` writes."""
    if not pa.types.is_struct(kind):
        return is_binary(kind)
    return "bytes" in kind.names and (is_binary(kind.field("bytes").type) or pa.types.is_null(kind.field("bytes").type))


def is_struct_of_text(kind: pa.DataType) -> bool:
    """Whether it is such a struct with text where the bytes belong, as JSON gives it: base64."""
    return pa.types.is_struct(kind) and "bytes" in kind.names and is_text(kind.field("bytes").type)
