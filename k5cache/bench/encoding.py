"""How fast is stage 1 on this card? Encoders of full size with random weights, compared with what trainers do today.

The baseline in the same run is diffusers' own ``encode_prompt``, one caption at a time, and ``vae.encode``, one image
at a time, with everything on the GPU. Nothing is downloaded: 14 GB of random text encoder are written to a temporary
folder.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from k5cache.bench.measurements import Measurements, Sizes
from k5cache.bench.tools import collect, in_use, peak_vram, reset_peak, rss, timed, watched
from k5cache.encoders import memory_plan
from k5cache.encoders.random_model import as_pipeline, write_model, write_pictures
from k5cache.shared import console
from k5cache.shared.console import human_bytes
from k5cache.shared.errors import K5Error
from k5cache.shared.vram import limit_to_card, release

if TYPE_CHECKING:
    import torch


def bench(device: str, vram: int | None = None, folder: Path | None = None, sizes: Sizes | None = None) -> Measurements:
    """Measure all of it.

    Args:
        vram: bytes; the cap of the streamed run.
        folder: where the random model is written, by default the temporary folder; 20 GB must be free.
        sizes: of another model; by default full size, which needs a GPU.

    Raises:
        K5Error: there is no GPU for the full size.
    """
    import torch

    if sizes is None and device == "cpu":
        raise K5Error("The encoders of full size are measured on a GPU", "Run this on a machine with one")
    sizes = sizes or Sizes()
    sizes = replace(sizes, vram=vram or sizes.vram)

    measured = Measurements()
    with TemporaryDirectory(prefix="k5-bench-", dir=folder) as name, torch.no_grad():
        root = Path(name)
        torch.manual_seed(0)
        ceiling(measured, device)
        seconds, _ = timed(device, lambda: write_model(root, sizes, device))
        measured.add("writing a random model", f"{seconds:.1f} s")
        captions = make_captions(sizes.tokens, sizes.num_captions)
        measured.values["vram_at_start"] = in_use(device)
        is_whole = has_room(measured, "the whole text encoder", whole_text_bytes(sizes), device)
        if is_whole:
            resident(measured, root, sizes, captions, device)
            freed(measured, "resident text", device)
        streamed(measured, root, sizes, captions, device, is_whole)
        freed(measured, "streamed text", device)
        if has_room(measured, "the VAE, whole images in float32", whole_vae_bytes(sizes), device):
            pictures(measured, root, sizes, device)
            freed(measured, "VAE", device)
    return measured


def whole_text_bytes(sizes: Sizes) -> int:
    """VRAM of ``diffusers``' text encoder in bfloat16, as the baseline holds it: embeddings and head too."""
    architecture = memory_plan.TextArchitecture.of(sizes.text)
    layers = architecture.num_layers * architecture.layer_parameters
    return 2 * (layers + 2 * architecture.vocab_size * architecture.hidden_size) + 2**31


def whole_vae_bytes(sizes: Sizes) -> int:
    """VRAM of the VAE and one image."""
    return memory_plan.plan_vae(sizes.vae, "fp32", sizes.side**2, vram=2**62, ram=0).vram


def has_room(measured: Measurements, what: str, num_bytes: int, device: str) -> bool:
    """Whether the device has so much room. If it has not, a line says so."""
    from k5cache.shared import vram

    free = vram.free_card(device)
    if free is None or num_bytes <= free:
        return True
    measured.add(what, "not measured", f"it takes {human_bytes(num_bytes)} of VRAM, {human_bytes(free)} are free")
    return False


def ceiling(measured: Measurements, device: str) -> None:
    """The ceiling that the encoders are held against."""
    import torch

    n = 8192 if device != "cpu" else 256
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    a @ b
    seconds = sorted(timed(device, lambda: a @ b)[0] for _ in range(9))[4]
    name = torch.cuda.get_device_name(device) if device != "cpu" else "CPU"
    rate = 2 * n**3 / seconds
    measured.add("bf16 matmul ceiling", f"{rate / 1e12:.0f} TFLOP/s", f"{name}, torch {torch.__version__}",
              device=name, ceiling=rate)  # fmt: skip


def resident(measured: Measurements, root: Path, sizes: Sizes, captions: Sequence[str], device: str) -> None:
    """Text with all layers on the device, exact and fast, beside the pipeline a caption at a time."""
    import torch

    from k5cache.encoders import clip, qwen

    architecture = memory_plan.TextArchitecture.of(sizes.text)
    tokens = tokenized(measured, root, captions, device)
    tower = clip.load_clip(root, device, torch.bfloat16)
    seconds, encoder = timed(device, lambda: qwen.load_qwen(root, device, torch.bfloat16))
    num_bytes = architecture.num_layers * architecture.layer_parameters * 2
    measured.add("loading the text layers", f"{seconds:.1f} s",
              f"{num_bytes / seconds / 1e9:.1f} GB/s, {human_bytes(rss())} of host memory in use",
              load_seconds=seconds)  # fmt: skip
    some = captions[: sizes.num_baseline]
    theirs = one_at_a_time(measured, as_pipeline(root, encoder, tower, device), some, device)
    for name, is_exact in (("exact", True), ("fast", False)):
        count = len(some) if is_exact else len(captions)
        compare_resident(measured, encoder, tower, tokens[:count], captions[:count], theirs, is_exact, device)
        if device != "cpu":
            measured.values[f"peak_{name}"] = torch.cuda.max_memory_reserved(device)


def one_at_a_time(measured: Measurements, pipeline: Any, captions: Sequence[str], device: str) -> list[tuple[Any, Any]]:
    """``encode_prompt`` of each caption; results on the CPU."""
    import torch

    def alone() -> list[tuple[Any, Any]]:
        results = []
        for caption in captions:
            embeds, pooled, _ = pipeline.encode_prompt(caption, device=torch.device(device))
            results.append((embeds[0].cpu(), pooled[0].cpu()))
        return results

    pipeline.encode_prompt(captions[0], device=torch.device(device))
    seconds, theirs = timed(device, alone)
    rate = len(captions) / seconds
    measured.add("baseline: encode_prompt, one at a time", f"{rate:.1f} captions/s", f"{len(captions)} captions",
              baseline_captions=rate)  # fmt: skip
    return list(theirs)


def compare_resident(
    measured: Measurements,
    encoder: Any,
    tower: Any,
    tokens: Sequence[Any],
    captions: Sequence[str],
    theirs: Sequence[tuple[Any, Any]],
    is_exact: bool,
    device: str,
) -> None:
    """Speed and bits of one way to batch."""
    import torch

    from k5cache.encoders import clip, qwen

    name = "exact" if is_exact else "fast"
    qwen.encode_prompt_embeds(encoder, tokens[:40], exact=is_exact)
    clip.encode_pooled(tower, captions[:64], exact=is_exact)
    text, embeds = timed(device, lambda: collect(qwen.iter_prompt_embeds(encoder, tokens, exact=is_exact)))
    again, _ = timed(device, lambda: collect(qwen.iter_prompt_embeds(encoder, tokens, exact=is_exact)))
    pooling, pooled = timed(device, lambda: clip.encode_pooled(tower, captions, exact=is_exact))
    config = encoder.model.config
    flops = 2 * sum(p.numel() for p in encoder.model.layers.parameters()) * sum(len(t.ids) for t in tokens)
    share = flops / min(text, again) / measured.values["ceiling"]
    rate, baseline = len(tokens) / (min(text, again) + pooling), measured.values["baseline_captions"]
    measured.add(f"resident, {name}: Qwen and CLIP", f"{rate:.1f} captions/s",
              f"{rate / baseline:.1f}x the baseline, {len(tokens)} captions; Qwen {text:.2f} and {again:.2f} s, "
              f"CLIP {pooling:.2f} s", **{f"resident_{name}": rate})  # fmt: skip
    measured.add(f"resident, {name}: Qwen alone", f"{flops / min(text, again) / 1e12:.0f} TFLOP/s",
              f"{share:.0%} of the ceiling, {config.num_hidden_layers} layers", **{f"share_{name}": share})  # fmt: skip
    pairs = list(zip(embeds, pooled, theirs, strict=False))
    same = [sum(torch.equal(ours[k], expected[k]) for *ours, expected in pairs) for k in (0, 1)]
    error = max(relative(embeds, expected[0]) for embeds, _, expected in pairs)
    measured.add(f"resident, {name}: bits", f"{same[0]} of {len(pairs)} captions as encode_prompt",
              f"pooled {same[1]}; largest error {error:.1e} of the norm",
              **{f"same_{name}": same, f"error_{name}": error})  # fmt: skip


def relative(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((ours.double() - expected.double()).norm() / expected.double().norm())


def streamed(
    measured: Measurements, root: Path, sizes: Sizes, captions: Sequence[str], device: str, is_whole: bool = True
) -> None:
    """Text a layer at a time under the cap, beside reading the file and, where it fits, computing, each alone."""
    import torch

    from k5cache.encoders import qwen, streaming

    tokens = tokenized(None, root, captions, device)
    for batching in ("exact", "fast"):
        compare_streamed(measured, root, sizes, tokens, batching, device, is_whole)
    if is_whole and device != "cpu":
        first_passes(measured, root, sizes, device)
    encoder = qwen.load_qwen(root, device, torch.bfloat16, streamed=True, int8=True)
    error = streaming.int8_error(encoder, tokens[:4])
    measured.add("int8 text encoder", f"{error:.2%} off bf16", "random weights, 4 captions", int8_error=error)


def compare_streamed(
    measured: Measurements, root: Path, sizes: Sizes, tokens: Sequence[Any], batching: str, device: str, is_whole: bool
) -> None:
    """Time, memory and bits of one way to batch."""
    import torch

    from k5cache.encoders import qwen, streaming

    plan = plan_streamed(sizes, tokens, batching, device)
    options: dict[str, Any] = {"exact": batching == "exact", "batch_tokens": plan.batch_tokens}
    limit_to_card(device, sizes.vram)
    encoder = qwen.load_qwen(root, device, torch.bfloat16, streamed=True)
    read, _ = timed(device, lambda: [None for _ in qwen.read_layers(encoder, reuse=True)])
    results = (
        encoder.embeddings.shape[1] * 2 * sum(t.n_tokens for t in tokens)
    )  # the bench keeps what a shard would get
    ours: dict[str, float] = {}

    began: list[float] = []  # when each layer began

    def run(parking: memory_plan.Parking) -> list[torch.Tensor]:
        began.clear()
        on_layer = partial(_note_time, began)
        return collect(streaming.stream_prompt_embeds(encoder, tokens, parking=parking, on_layer=on_layer, **options))

    parkings: tuple[memory_plan.Parking, ...] = ("device", "host") if plan.parking == "device" else ("host",)
    for parking in (plan.parking, *parkings):  # the first meets every length for the first time, as a user's run does
        reset_peak(device)
        with watched() as memory:
            start = time.monotonic()
            seconds, embeds = timed(device, partial(run, parking))
        is_first = not ours
        name = f"{parking}, first time" if is_first else str(parking)
        peak, host, ours[name] = peak_vram(device), memory.peak - results, seconds
        layers = (began[-1] - began[0]) * len(began) / max(1, len(began) - 1)
        measured.add(f"streamed, {batching}, parked on the {name}", f"{seconds:.2f} s",
                  f"{len(tokens)} captions, VRAM {human_bytes(peak)} with the context, host {human_bytes(host)} "
                  f"besides results; {began[0] - start:.2f} s before the layers, {layers:.2f} s in them; planned on "
                  f"the {plan.parking}, {human_bytes(plan.vram)}",
                  **{f"streamed_{batching}_{name}": (seconds, peak, host)})  # fmt: skip
    limit_to_card(device, None)
    if not is_whole:
        measured.add(f"reading the layers, {batching}", f"{read:.2f} s", "", **{f"read_{batching}": read})
        return
    whole = qwen.load_qwen(root, device, torch.bfloat16)
    collect(qwen.iter_prompt_embeds(whole, tokens[:8], **options))
    compute, expected = timed(device, lambda: collect(qwen.iter_prompt_embeds(whole, tokens, **options)))
    same = sum(map(torch.equal, embeds, expected))
    over = ours[plan.parking] / max(read, compute)
    measured.add(f"streamed, {batching}: over the larger of reading and computing", f"{over:.2f}x",
              f"reading {read:.2f} s, computing {compute:.2f} s; {same} of {len(tokens)} as resident, bit for bit",
              **{f"streamed_over_{batching}": over, f"read_{batching}": read, f"compute_{batching}": compute,
                 f"streamed_same_{batching}": same})  # fmt: skip


def plan_streamed(sizes: Sizes, tokens: Sequence[Any], batching: str, device: str) -> memory_plan.TextPlan:
    """How captions are streamed under the cap, with 16 GB of RAM."""
    return memory_plan.plan_text(
        memory_plan.TextArchitecture.of(sizes.text), "bf16", batching, 512, ram=16 * 2**30,
        vram=sizes.vram if device != "cpu" else None, num_tokens=sum(len(t.ids) for t in tokens),
    )  # fmt: skip


def first_passes(measured: Measurements, root: Path, sizes: Sizes, device: str) -> None:
    """The exact pass as a user's first one, streamed and resident, each in a process of its own.

    A second pass in the same process is faster: 512 captions took 28.9 s the first time on an H100 and 15.5 s the
    second, most likely because cuDNN plans its attention for every new length.
    """
    seconds: dict[str, float] = {}
    for mode in ("resident", "streamed"):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
            seconds[mode] = alone.submit(first_pass, root, sizes, mode, device).result()
    over = seconds["streamed"] / seconds["resident"]
    measured.add("first exact pass of a process", f"{seconds['streamed']:.2f} s streamed",
              f"{seconds['resident']:.2f} s resident, its weights loaded before: {over:.2f}x; {sizes.num_captions} "
              "captions", first_over=over, **{f"first_{m}": s for m, s in seconds.items()})  # fmt: skip


def first_pass(root: Path, sizes: Sizes, mode: str, device: str) -> float:
    """Seconds of the exact pass over all captions: "streamed" within the cap, or "resident" once it is loaded."""
    import torch

    from k5cache.encoders import qwen, streaming

    with torch.no_grad():
        tokens = tokenized(None, root, make_captions(sizes.tokens, sizes.num_captions), device)
        plan = plan_streamed(sizes, tokens, "exact", device)
        options: dict[str, Any] = {"exact": True, "batch_tokens": plan.batch_tokens}
        if mode == "resident":
            whole = qwen.load_qwen(root, device, torch.bfloat16)
            return timed(device, lambda: collect(qwen.iter_prompt_embeds(whole, tokens, **options)))[0]
        limit_to_card(device, sizes.vram)
        encoder = qwen.load_qwen(root, device, torch.bfloat16, streamed=True)
        parked = partial(streaming.stream_prompt_embeds, encoder, tokens, parking=plan.parking, **options)
        return timed(device, lambda: collect(parked()))[0]


def _note_time(times: list[float], layer: int) -> None:
    times.append(time.monotonic())


def pictures(measured: Measurements, root: Path, sizes: Sizes, device: str) -> None:
    """The VAE fed by the worker pool, beside one image at a time, loaded by the same thread."""
    from k5cache.bench.pictures import compare_precisions, compare_speed

    source = root / "pictures"
    write_pictures(source, sizes)
    compare_speed(measured, root, source, sizes, device)
    compare_precisions(measured, root, source, sizes, device)


def tokenized(measured: Measurements | None, root: Path, captions: Sequence[str], device: str) -> list[Any]:
    """Token ids of every caption."""
    from k5cache.encoders import qwen

    tokenizer = qwen.load_tokenizer(root)
    seconds, tokens = timed(device, lambda: [qwen.tokenize(tokenizer, c, 512) for c in captions])
    if measured:
        measured.add("tokenising", f"{1e3 * seconds / len(tokens):.2f} ms a caption", "on a thread, ahead of the GPU",
                  tokenise_seconds=seconds)  # fmt: skip
    return tokens


def make_captions(tokens: tuple[int, int], count: int, seed: int = 0) -> list[str]:
    """Captions of random words, their lengths spread evenly over ``tokens``."""
    from k5cache.encoders.pipeline import prompt_template

    template = prompt_template()
    num_words = len(template.text.format("w0").split()) - 1  # words; the crop takes its own number of tokens
    chance = random.Random(seed)
    missing = template.encode_start_idx - num_words
    lengths = [max(0, chance.randint(*tokens) + missing) for _ in range(count)]
    return [" ".join(f"w{chance.randrange(200)}" for _ in range(n)) for n in lengths]


def freed(measured: Measurements, what: str, device: str) -> None:
    """Whether VRAM is what it was before the first encoder."""
    release(device)
    now, start = in_use(device), measured.values["vram_at_start"]
    measured.add(f"freed after {what}", f"{human_bytes(now)} allocated by torch, {human_bytes(start)} at the start",
              **{f"freed_{what}": now - start})  # fmt: skip


def print_bench(measured: Measurements) -> None:
    """The table."""
    table = console.table("Encoders, random weights of full size", "what", "value", "remark")
    for row in measured.rows:
        table.add_row(*row)
    console.out.print(table)


def as_json(measured: Measurements) -> dict[str, Any]:
    """For scripts."""
    return asdict(measured)
