"""How fast is the page with many pictures and runs, and what does it cost while nobody looks?

A project is made by writing files: pictures with captions, their cache, and runs with metrics and samples. Each page is
asked for from a server in a process of its own, by a client that draws nothing and by Chromium.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from PIL import Image

from k5cache.shared.console import human_bytes
from k5cache.shared.model import ModelConfig
from k5cache.shared.sealed import write_sealed
from k5cache.sources.items import stat_numbers
from k5cache.store.index import IndexRow, with_index
from k5cache.store.manifest import Manifest, ShardInfo, ShardKind, lock, write_manifest
from k5train.options.train import TrainConfig
from k5train.options.validation import ValidationConfig
from k5train.pictures.saved import save_pictures
from k5train.runs.folder import create_run
from k5train.runs.metrics import Metrics
from pipelines.measure import command_line
from pipelines.measure.million_phases import key_of, latents_row, text_row, write_shard

SIDE = 1024
NUM_LIKE = 20
"""So many pictures differ in what is to be seen; all differ in their bytes."""
STEPS = 2000
PROMPTS = ("a fox", "an owl", "a lighthouse", "a red bicycle")
COLUMNS = ("page", "first", "again", "HTML", "first paint", "largest paint", "painted again")
IDLE_SECONDS = 20.0
PAINTS = """() => new Promise(done => {
  const first = performance.getEntriesByName('first-contentful-paint')[0];
  if (!first) return done(null);
  const observer = new PerformanceObserver(all => done([first.startTime, all.getEntries().at(-1).startTime]));
  observer.observe({type: 'largest-contentful-paint', buffered: true});
})"""
"""The first and the largest contentful paint, in milliseconds."""
TABS = 5
"""In so many new tabs each page is opened; the median of their paints counts."""


@dataclass(frozen=True)
class Timing:
    """One page. Seconds; ``paint`` and ``largest`` are Chromium's contentful paints, from the click on."""

    name: str
    first: float
    """With what is imported, listed and drawn for the first time."""
    again: float
    num_bytes: int
    paint: float | None = None
    """Of anything: the top of a page is sent before the rest is known."""
    largest: float | None = None
    """Of its largest text or picture."""
    paint_again: float | None = None


def main(
    pictures: Annotated[int, typer.Option(help="How many pictures.")] = 5000,
    runs: Annotated[int, typer.Option(help="How many runs.")] = 200,
    out: command_line.Out = None,
) -> None:
    """Time the page over a project that is made for it. Needs Chromium and Playwright for first paints; no GPU."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "project"
        make_project(root, pictures, runs)
        names = pages_of(root)
        with served(root) as (url, process):
            timings = asked(url, names)
            idle = {"nobody": cpu_share(process.pid)}
            timings = with_paints(url, timings, lambda: idle.update({"one tab": cpu_share(process.pid)}))
    command_line.write_json(out, {"pages": [asdict(timing) for timing in timings], "idle": idle})
    setting = f"{pictures:,} pictures, {runs} runs"
    command_line.print_table(setting, COLUMNS, [_row(timing) for timing in timings], numbers=COLUMNS[1:])
    for who, share in idle.items():
        print(f"processor time with {who} looking: {max(share, 0.0):.2%} of a core")


def make_project(root: Path, num_pictures: int, num_runs: int) -> None:
    """Write the project's files."""
    write_pictures(root / "datasets" / "many", num_pictures)
    write_cache(root / "cache" / "many", root / "datasets" / "many")
    first = write_run(root / "runs" / "run-000")
    for number in range(1, num_runs):
        shutil.copytree(first, root / "runs" / f"run-{number:03}")


def write_pictures(folder: Path, count: int) -> None:
    """JPEGs that look like photographs to a decoder, each with a caption."""
    folder.mkdir(parents=True)
    like = []
    for number in range(NUM_LIKE):
        noise = Image.effect_noise((SIDE // 8, SIDE // 8), 60 + number).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        path = folder / "like.jpg"
        Image.merge("RGB", (noise, noise.rotate(90), noise.rotate(180))).save(path, quality=90)
        like.append(path.read_bytes())
        path.unlink()
    for number in range(count):
        # What stands behind the end of a JPEG is not decoded, so each file has its own content.
        (folder / f"{number:06}.jpg").write_bytes(like[number % NUM_LIKE] + str(number).encode())
        caption = f"picture number {number} of a large collection, in the light of the evening"
        (folder / f"{number:06}.txt").write_text(caption, encoding="utf-8")


def write_cache(root: Path, folder: Path) -> None:
    """A cache of these pictures, with rows of hardly any size."""
    files = sorted(folder.glob("*.jpg"))
    root.mkdir(parents=True)
    with lock(root):
        shards = [*_shards(root, "latents", len(files)), *_shards(root, "text", len(files))]
        manifest = Manifest(recipe={}, shards=tuple(shards), created_by={"k5cache": "0"})
        manifest = with_index(root, manifest, [_index_row(number, path) for number, path in enumerate(files)])
        write_manifest(root, manifest)


def _shards(root: Path, kind: ShardKind, count: int) -> Iterator[ShardInfo]:
    """Small rows of this many images, in shards of 256."""
    for first in range(0, count, 256):
        numbers = range(first, min(first + 256, count))
        captions = (f"picture number {number} of a large collection" for number in numbers)
        texts = (text_row(key_of("t", number), caption) for number, caption in zip(numbers, captions, strict=True))
        yield write_shard(
            root, kind, texts if kind == "text" else (latents_row(key_of("l", number)) for number in numbers), 1024
        )


def _index_row(number: int, path: Path) -> IndexRow:
    num_bytes, mtime_ns, inode = stat_numbers(path.stat())
    return IndexRow(
        path=path.name, content_hash=key_of("c", number), num_bytes=num_bytes, mtime_ns=mtime_ns, inode=inode,
        width=SIDE, height=SIDE, bucket_width=SIDE, bucket_height=SIDE, resized_width=SIDE, resized_height=SIDE,
        left=0, top=0, flipped=False, latent_key=key_of("l", number), caption_keys=(key_of("t", number),),
        captions_hash=key_of("h", number),
    )  # fmt: skip


def write_run(root: Path) -> Path:
    """A finished run: ``STEPS`` lines of metrics, five measurements and their pictures."""
    config = replace(
        TrainConfig(name=root.name, steps=STEPS, validation=ValidationConfig(prompts=PROMPTS, every=500, split=0.1))
    )
    run = create_run(root, Path("../../cache/many"), ModelConfig(), config)
    drawn = {
        "prompts": list(PROMPTS), "negative_prompt": "", "width": 256, "height": 256, "num_inference_steps": 20,
        "guidance_scale": 5.0, "seed": 42,
    }  # fmt: skip
    with Metrics(run.metrics) as metrics:
        for step in range(STEPS + 1):
            if step % 500 == 0:
                metrics.write(step=step, held_out_loss=0.5 - step / 20000, held_out_key="0123")
                pictures = [Image.effect_noise((256, 256), 40 + n).convert("RGB") for n in range(len(PROMPTS))]
                save_pictures(run.samples(step), pictures, drawn)
            if step:
                metrics.write(step=step, loss=0.5 + 0.1 * (step * 7919 % 100) / 100, lr=1e-4, seconds=step / 4)
    run.lora.write_bytes(b"a LoRA")
    write_sealed(run.result, {"lora": run.lora.name, "steps": STEPS, "seconds": 500.0, "ended_by": "steps"})
    return root


def pages_of(root: Path) -> dict[str, str]:
    """What each page is called -> its URL."""
    from k5train.ui.ids import id_of

    runs = [id_of(f"runs/{path.name}") for path in sorted((root / "runs").iterdir())[:3]]
    cache, folder = id_of("cache/many"), id_of("datasets/many")
    return {
        "overview": "/", "data": "/data", "folder": f"/data/f/{folder}", "cache": f"/data/c/{cache}",
        "cache, searched": f"/data/c/{cache}?q=4321", "new run": "/new", "runs": "/runs", "a run": f"/runs/{runs[0]}",
        "compare three": "/compare?" + "&".join(f"run={id}" for id in runs), "queue": "/queue",
    }  # fmt: skip


@contextmanager
def served(root: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The page over a project in a process of its own: its URL, and the process."""
    command = [sys.executable, "-m", "k5train", "ui", "--port", "0", "--folder", str(root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip().rstrip("/"), process
        finally:
            process.terminate()


def asked(url: str, names: dict[str, str]) -> list[Timing]:
    """Ask for each page three times, from a client that draws nothing; the best of the later two counts as again."""
    timings = []
    for name, path in names.items():
        seconds, text = [], b""
        for _ in range(3):
            begin = time.perf_counter()
            with urllib.request.urlopen(url + path) as answer:
                text = answer.read()
            seconds.append(time.perf_counter() - begin)
        timings.append(Timing(name + " " + path, seconds[0], min(seconds[1:]), len(text)))
    return timings


def with_paints(url: str, timings: list[Timing], at_the_end: Callable[[], object]) -> list[Timing]:
    """Add first paints, as Chromium measures them. ``at_the_end`` is called while one tab shows the overview."""
    from playwright.sync_api import sync_playwright

    found = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), chromium_sandbox=False)
        for timing in timings:
            tabs: list[list[float]] = []
            for _ in range(TABS):
                page, seconds = browser.new_page(), list[float]()
                for _ in range(2):
                    page.goto(url + timing.name.rpartition(" ")[2], wait_until="load")
                    while (paints := page.evaluate(PAINTS)) is None:
                        page.wait_for_timeout(50)
                    seconds += [paint / 1000 for paint in paints]
                tabs.append(seconds)
                page.close()
            first, largest, again, _ = (median(seconds) for seconds in zip(*tabs, strict=True))
            found.append(replace(timing, paint=first, largest=largest, paint_again=again))
        page = browser.new_page()
        page.goto(url + "/")
        at_the_end()
        browser.close()
    return found


def cpu_share(pid: int) -> float:
    """How much of a core a process takes, over ``IDLE_SECONDS``."""
    import psutil

    process = psutil.Process(pid)
    before = process.cpu_times()
    time.sleep(IDLE_SECONDS)
    after = process.cpu_times()
    return (after.user + after.system - before.user - before.system) / IDLE_SECONDS


def _row(timing: Timing) -> list[str]:
    paints = [f"{1000 * s:.0f} ms" if s is not None else "" for s in (timing.paint, timing.largest, timing.paint_again)]
    name = re.sub(r" /.*", "", timing.name)
    return [
        name,
        f"{1000 * timing.first:.0f} ms",
        f"{1000 * timing.again:.0f} ms",
        human_bytes(timing.num_bytes),
        *paints,
    ]


if __name__ == "__main__":
    command_line.run(main)
