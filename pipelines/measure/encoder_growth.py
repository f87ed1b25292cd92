"""Does the memory of the text pass grow with the number of captions? The whole pass, which writes the rows too.

The text encoder has the full width but few layers, so that 10,000 captions take seconds, and is streamed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from k5cache.bench.measurements import Sizes
from k5cache.bench.pictures import job_for
from k5cache.bench.text import make_captions
from k5cache.bench.tools import peak_vram, reset_peak, timed, watched
from k5cache.encode.commit import Committer
from k5cache.encode.job import TextJob
from k5cache.encode.text_pass import encode_texts
from k5cache.encoders.random_model import FULL_TEXT, write_model
from k5cache.shared import console
from k5cache.store.manifest import Manifest
from k5train.commands.bench import gpu_to_measure
from pipelines.measure import command_line

COLUMNS = ("captions", "seconds", "VRAM", "host memory")
NUM_LAYERS = 2
VRAM = 5 * 2**29  # bytes; under this cap the layers are streamed
NUM_CAPTIONS = (100, 1000, 10000)
TOKENS = (20, 100)  # of a caption, from and to


@dataclass(frozen=True)
class Growth:
    """The time and memory for one number of captions."""

    num_captions: int
    seconds: float
    vram_bytes: int
    """The most VRAM, with the CUDA context; 0 on a CPU."""
    host_bytes: int
    """The most host memory of the process."""


def main(out: command_line.Out = None) -> None:
    """Encode 100, 1,000 and 10,000 captions and measure VRAM and host memory. Needs a GPU."""
    device = gpu_to_measure(out)
    sizes = replace(Sizes(), text={**FULL_TEXT, "num_hidden_layers": NUM_LAYERS}, tokens=TOKENS)
    with torch.no_grad():
        growths = measure_growth(sizes, NUM_CAPTIONS, str(device), VRAM)
    setting = f"{NUM_LAYERS} layers of the full-size text encoder, random weights"
    command_line.print_table(setting, COLUMNS, [table_row(growth) for growth in growths], numbers=COLUMNS)
    command_line.write_json(out, [asdict(growth) for growth in growths])


def measure_growth(
    sizes: Sizes,
    counts: Sequence[int],
    device: str,
    vram: int | None,
    report: Callable[[str], None] = console.note,
) -> list[Growth]:
    """Run the text pass over each number of captions, into an empty cache, and report each result at once.

    Args:
        vram: bytes that the pass may use; None on a CPU.
    """
    growths: list[Growth] = []
    with TemporaryDirectory(prefix="k5-growth-") as name:
        root = Path(name)
        write_model(root, sizes, device)
        for count in counts:
            cache = root / f"cache-{count}"
            cache.mkdir()
            reset_peak(device)
            with watched() as memory:
                seconds, _ = timed(device, partial(_encode, root, cache, sizes.tokens, count, device, vram))
            growths.append(Growth(count, seconds, peak_vram(device), memory.peak))
            report("  ".join(table_row(growths[-1])))
    return growths


def _encode(root: Path, cache: Path, tokens: tuple[int, int], count: int, device: str, vram: int | None) -> None:
    captions = make_captions(tokens, count, seed=1)
    jobs = [TextJob(f"{i:032x}", caption) for i, caption in enumerate(captions)]
    job = job_for(root, cache, device, {"text_batching": "fast"}, vram)
    encode_texts(job, Committer(cache, Manifest(recipe={}), 2**28), jobs)


def table_row(growth: Growth) -> list[str]:
    """A measurement as a row of text, in the order of ``COLUMNS``."""
    memory = [console.human_bytes(num_bytes) for num_bytes in (growth.vram_bytes, growth.host_bytes)]
    return [f"{growth.num_captions:,}", f"{growth.seconds:.1f}", *memory]


if __name__ == "__main__":
    command_line.run(main)
