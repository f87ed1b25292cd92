"""What do the rows of a CSV or JSON file hold? Every cell of CSV is text; a value of JSON is what it is."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa

from k5cache.shared.errors import DatasetError
from k5cache.shared.plain import open_plain, too_large
from k5cache.sources.inflated import Inflated, bounded
from k5cache.sources.items import UnreadableImage

_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_LONGEST_CELL = 64 << 20  # csv's own limit of 131,072 is below a picture in base64
MOST_BYTES = 2 << 30
"""Of text in one table, after decompression: 10 million captions. It is read into memory."""
_END = "\0end of file\0"
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
_GZIP = b"\x1f\x8b"
_TOO_LARGE = "Split it into several tables, or save it as Parquet"
_NOT_SPACE = re.compile(r"\S")


@dataclass(frozen=True)
class TextRows:
    """The rows of one file of text, in memory."""

    file: Path
    columns: dict[str, list[Any]]
    num_rows: int
    lines: Sequence[int] = ()
    """The line at which each row ends; empty if rows are not lines."""

    @cached_property
    def schema(self) -> pa.Schema:
        """A column in which any row has text is a column of text."""
        return pa.schema([(name, _kind(values)) for name, values in self.columns.items()])

    def column(self, name: str) -> list[Any]:
        """The values of a column."""
        return self.columns[name]

    def image_names(self, name: str) -> list[str]:
        """The ``path`` of each ``{"bytes": null, "path": "a.png"}``."""
        names = [cell.get("path") if isinstance(cell, dict) else None for cell in self.columns[name]]
        return [path if isinstance(path, str) else "" for path in names]

    def has_bytes(self, name: str) -> list[bool]:
        """None has: text cannot hold bytes."""
        return [False] * self.num_rows

    def read(self, name: str, row: int) -> bytes:
        """Never called for a row without bytes."""
        raise UnreadableImage("holds no image")

    def place(self, row: int) -> str:
        """`` line 3``, or ``#2`` if rows are not lines."""
        return f" line {self.lines[row]}" if self.lines else f"#{row}"


def read_csv(file: Path, separator: str) -> TextRows:
    """Read a table with a header line. A row may lack its last cells; blank lines are ignored.

    Raises:
        DatasetError: it is not UTF-8 or not such a table.
    """
    csv.field_size_limit(_LONGEST_CELL)
    name = file.name
    try:
        with _open(file) as text:
            records = _records(name, text, separator)
            header = [cell.strip() for cell in next(records, ([], 0))[0]]
            _check_header(name, header, separator)
            columns: list[list[str | None]] = [[] for _ in header]
            lines: list[int] = []
            for cells, line in records:
                if len(cells) > len(header):
                    raise DatasetError(
                        f"{name} line {line} has {len(cells)} cells, the header has {len(header)}",
                        f"Put captions with {_SEPARATORS[separator]} into quotes",
                    )
                lines.append(line)
                for number, column in enumerate(columns):
                    column.append(cells[number] if number < len(cells) else None)
    except csv.Error as error:
        raise DatasetError(f"{name} cannot be read as a table: {error}", "Repair it") from None
    return TextRows(file, dict(zip(header, columns, strict=True)), len(lines), lines)


def read_json(file: Path) -> TextRows:
    """Read a list of objects, or objects one after another, usually one a line. Text in the place of one is a caption.

    Raises:
        DatasetError: it is not UTF-8 or not such a file.
    """
    with _open(file) as stream:
        text = stream.read()
    try:
        values, lines = _values(text)
    except json.JSONDecodeError as error:
        raise DatasetError(f"{file.name} line {error.lineno} is not JSON: {error.msg}", "Repair it") from None
    except ValueError:  # Python's limit
        raise DatasetError(f"{file.name} has a number of more than 4,300 digits", "Write it as text") from None
    except RecursionError:
        raise DatasetError(f"{file.name} is nested too deeply", "Give each row one object") from None
    columns: dict[str, list[Any]] = {}
    for number, value in enumerate(values):
        if isinstance(value, str):
            value = {"text": value}
        if not isinstance(value, dict):
            place = f"line {lines[number]}" if lines else f"row {number}"
            raise DatasetError(f"{file.name} {place} is {type(value).__name__}, not an object", 'Write {"image": ...}')
        columns |= {name: [None] * number for name in value if name not in columns}
        for name, column in columns.items():
            column.append(value.get(name))
    return TextRows(file, columns, len(values), lines)


def _values(text: str) -> tuple[list[Any], list[int]]:
    """The objects of a text, and the line at which each ends; no lines for those of a list."""
    decoder = json.JSONDecoder()
    values: list[Any] = []
    lines: list[int] = []
    start, counted, line = 0, 0, 1
    while match := _NOT_SPACE.search(text, start):
        value, start = decoder.raw_decode(text, match.start())
        if isinstance(value, list) and not values:
            values = value
            continue
        line, counted = line + text.count("\n", counted, start), start
        values.append(value)
        lines.append(line)
    return values, lines if len(lines) == len(values) else []


def _check_header(name: str, header: Sequence[str], separator: str) -> None:
    if not header:
        raise DatasetError(f"{name} has no header line", "Give each column a name")
    if len(set(header)) < len(header):
        raise DatasetError(f"{name} has two columns with the same name", "Give each column a name")
    others = [kind for mark, kind in _SEPARATORS.items() if mark != separator and mark in header[0]]
    if len(header) == 1 and others:
        raise DatasetError(
            f"{name} has {others[0]} between its cells, and {_SEPARATORS[separator]} are expected",
            f"Save it with {_SEPARATORS[separator]}" + (", or with tabs as .tsv" if separator == "," else ""),
        )


def _records(name: str, text: Iterable[str], separator: str) -> Iterator[tuple[list[str], int]]:
    """The cells of every record that is not blank, and the line at which it ends."""
    reader = csv.reader(chain(text, ["\n", f"{_END}\n"]), delimiter=separator)
    line = 1
    for cells in reader:
        if cells == [_END]:
            return
        if _END in "".join(cells):
            raise DatasetError(f"{name} line {line} opens a quote that is never closed", 'Write a quote inside as ""')
        if len(cells) > 1 or (cells and cells[0].strip()):
            yield cells, reader.line_num
        line = reader.line_num + 1


@contextmanager
def _open(file: Path) -> Iterator[TextIO]:
    """The text of a file, which may be compressed by gzip."""
    try:
        with open_plain(file) as raw:
            start = raw.read(2)
            raw.seek(0)
            if start in _UTF_16:
                raise DatasetError(f"{file.name} is UTF-16", "Save it as UTF-8")
            if start != _GZIP and (num_bytes := os.fstat(raw.fileno()).st_size) > MOST_BYTES:
                raise DatasetError(f"{file.name} cannot be read: {too_large(num_bytes, MOST_BYTES)}", _TOO_LARGE)
            stream = bounded(gzip.GzipFile(fileobj=raw), raw, MOST_BYTES) if start == _GZIP else raw
            with io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
                yield text
    except Inflated as error:
        raise DatasetError(f"{file.name} cannot be read: {error}", _TOO_LARGE) from None
    except UnicodeDecodeError as error:
        raise DatasetError(f"{file.name} is not UTF-8 ({error.reason})", "Save it as UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DatasetError(f"{file.name} cannot be read: {reason}", "Repair it, or use another source") from None


def _kind(values: Sequence[Any]) -> pa.DataType:
    """The Arrow type of a column. Text if any value is text, since rows of other types are skipped one by one."""
    if any(isinstance(value, str) for value in values):
        return pa.string()
    try:
        return pa.infer_type(values)
    except (pa.ArrowException, OverflowError):
        return pa.null()
