"""``k5cache bench``: how fast is stage 1 on this machine?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from k5cache.commands.arguments import Device, Json, vram_bytes
from k5cache.shared import console


def bench(
    encoders: Annotated[
        bool,
        typer.Option("--encoders", help="Measure full-size text encoders and VAE on this GPU; writes 14 GB to --dir."),
    ] = False,
    pairs: Annotated[
        bool,
        typer.Option("--pairs", help="Measure pairs of image-to-image on this GPU, beside the pipeline; writes 16 GB."),
    ] = False,
    store: Annotated[
        bool, typer.Option("--store", help="Measure reading random rows from shards, compared with other formats.")
    ] = False,
    folder: Annotated[Path | None, typer.Option("--dir", help="Where to write. Default: the temporary folder.")] = None,
    vram: Annotated[str, typer.Option(help="The cap under which --encoders streams.")] = "4GB",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure stage 1 with random weights and rows, compared with what others do. Downloads nothing."""
    if not (encoders or pairs or store):
        from k5cache.shared.errors import K5Error

        raise K5Error("There is nothing to measure", "Give --encoders, --pairs or --store, or several of them")
    results: dict[str, object] = {}
    if store:
        from k5cache.bench import reading

        with console.working("measuring reads"):
            store_bench = reading.bench_store(folder=folder)
        results["store"] = reading.as_json(store_bench)
        if not as_json:
            reading.print_bench(store_bench)
    if encoders:
        from k5cache.bench import encoding
        from k5cache.shared.device import pick_device

        with console.working("measuring encoders"):
            measurements = encoding.bench(pick_device(device), vram_bytes(vram), folder)
        results["encoders"] = encoding.as_json(measurements)
        if not as_json:
            encoding.print_bench(measurements)
    if pairs:
        from k5cache.bench import encoding
        from k5cache.bench.pairs import bench_pairs
        from k5cache.shared.device import pick_device

        with console.working("measuring pairs"):
            of_pairs = bench_pairs(pick_device(device), folder)
        results["pairs"] = encoding.as_json(of_pairs)
        if not as_json:
            encoding.print_bench(of_pairs, "Pairs of image-to-image, random weights of full size")
    if as_json:
        console.print_json(results)
