"""What grows with the number of images? Planning, indexing, merging, opening and reading, and on request whole encodes.

Each phase runs in a process of its own (``million_phases``, ``million_uses``), so that its peak memory is its own. Only
what grows with the count is done: images are not decoded, and shards are named without being there. ``--encode`` also
encodes tiny images from Parquet files with stub encoders, from the first file to the last commit, and reads all of it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from k5cache.shared.console import human_bytes
from pipelines.measure import command_line
from pipelines.measure.million_uses import OF_SHARDS, OF_TABLES

PHASES = ("plan", "tables", "open", *OF_TABLES, "halves", "merge")
OF_AN_ENCODE = ("source", "encode", "encode", *OF_SHARDS)
"""The second encode finds nothing new."""


def main(
    counts: Annotated[str, typer.Option(help="Numbers of images, ascending.")] = "10000,100000,1000000",
    encode: Annotated[str, typer.Option(help="Numbers of images of whole encodes; a million take an hour.")] = "",
    out: command_line.Out = None,
) -> None:
    """Print seconds and peak memory of each phase. Needs no GPU; a million take 2 GB of disk and minutes."""
    measured: dict[int, dict[str, dict[str, Any]]] = {}
    for option, phases in ((counts, PHASES), (encode, OF_AN_ENCODE)):
        for count in map(int, filter(None, option.split(","))):
            with tempfile.TemporaryDirectory() as folder:
                for number, phase in enumerate(phases):
                    of_phase = measure(Path(folder), phase, count)
                    again = " again" if phase in phases[:number] else ""
                    measured.setdefault(count, {}).update({f"{phase}{again}: {p['part']}": p for p in of_phase})
            command_line.write_json(out, measured)
    columns = ("phase", *(f"{count:,}" for count in measured))
    names = dict.fromkeys(name for parts in measured.values() for name in parts)
    rows = [[name, *(_cell(parts.get(name)) for parts in measured.values())] for name in names]
    command_line.print_table("seconds and peak memory of the process so far", columns, rows, numbers=columns[1:])


def measure(root: Path, phase: str, count: int) -> list[dict[str, Any]]:
    """The parts of one phase, in the order in which they ran."""
    module = "million_uses" if phase in (*OF_TABLES, *OF_SHARDS) else "million_phases"
    program = [sys.executable, "-m", f"pipelines.measure.{module}", phase, str(root), str(count)]
    done = subprocess.run(program, check=True, stdout=subprocess.PIPE, text=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def _cell(part: dict[str, Any] | None) -> str:
    return f"{part['seconds']:.2f} s, {human_bytes(part['peak_bytes'])}" if part else ""


if __name__ == "__main__":
    command_line.run(main)
