"""How fast are captions encoded? Text layers on the card or streamed, beside diffusers' own ``encode_prompt``."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k5cache.bench.measurements import Measurements, Sizes
from k5cache.bench.tools import collect, peak_vram, reset_peak, timed, watched
from k5cache.encoders import memory_plan
from k5cache.encoders.random_model import as_pipeline
from k5cache.shared.console import human_bytes
from k5cache.shared.system import resident_bytes
from k5cache.shared.units import count_of
from k5cache.shared.vram import limit_to_card

if TYPE_CHECKING:
    import torch


def measure_resident(
    measurements: Measurements, root: Path, sizes: Sizes, captions: Sequence[str], device: str
) -> None:
    """Measure text with all layers on the device, exact and fast, beside the pipeline a caption at a time."""
    import torch

    from k5cache.encoders import clip, qwen

    architecture = memory_plan.TextArchitecture.of(sizes.text)
    tokens = tokenized(measurements, root, captions, device)
    clip_model = clip.load_clip(root, device, torch.bfloat16)
    seconds, encoder = timed(device, lambda: qwen.load_qwen(root, device, torch.bfloat16))
    num_bytes = architecture.num_layers * architecture.layer_parameters * 2
    measurements.add(
        "loading the text layers",
        f"{seconds:.1f} s",
        f"{num_bytes / seconds / 1e9:.1f} GB/s, {human_bytes(resident_bytes())} of host memory in use",
        load_seconds=seconds,
    )
    baseline_captions = captions[: sizes.num_baseline]
    theirs = one_at_a_time(measurements, as_pipeline(root, encoder, clip_model, device), baseline_captions, device)
    for name, is_exact in (("exact", True), ("fast", False)):
        count = len(baseline_captions) if is_exact else len(captions)
        compare_resident(measurements, encoder, clip_model, tokens[:count], captions[:count], theirs, is_exact, device)
        if device != "cpu":
            measurements.values[f"peak_{name}"] = torch.cuda.max_memory_reserved(device)


def one_at_a_time(
    measurements: Measurements, pipeline: Any, captions: Sequence[str], device: str
) -> list[tuple[Any, Any]]:
    """Measure ``encode_prompt`` on each caption alone. Returns (prompt_embeds, pooled) of each, on the CPU."""
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
    measurements.add(
        "baseline: encode_prompt, one at a time",
        f"{rate:.1f} captions/s",
        f"{count_of(len(captions), 'caption')}",
        baseline_captions=rate,
    )
    return list(theirs)


def compare_resident(
    measurements: Measurements,
    encoder: Any,
    clip_model: Any,
    tokens: Sequence[Any],
    captions: Sequence[str],
    theirs: Sequence[tuple[Any, Any]],
    is_exact: bool,
    device: str,
) -> None:
    """Measure the speed of the exact or the fast pass, and compare its bits with the baseline's."""
    import torch

    from k5cache.encoders import clip, qwen

    name = "exact" if is_exact else "fast"
    qwen.encode_prompt_embeds(encoder, tokens[:40], exact=is_exact)
    clip.encode_pooled(clip_model, captions[:64], exact=is_exact)
    text, embeds = timed(device, lambda: collect(qwen.iter_prompt_embeds(encoder, tokens, exact=is_exact)))
    text_again, _ = timed(device, lambda: collect(qwen.iter_prompt_embeds(encoder, tokens, exact=is_exact)))
    pooling, pooled = timed(device, lambda: clip.encode_pooled(clip_model, captions, exact=is_exact))
    config = encoder.model.config
    flops = 2 * sum(p.numel() for p in encoder.model.layers.parameters()) * sum(len(t.ids) for t in tokens)
    share = flops / min(text, text_again) / measurements.values["ceiling"]
    rate, baseline = len(tokens) / (min(text, text_again) + pooling), measurements.values["baseline_captions"]
    measurements.add(
        f"resident, {name}: Qwen and CLIP",
        f"{rate:.1f} captions/s",
        f"{rate / baseline:.1f}x the baseline, {count_of(len(tokens), 'caption')}; "
        f"Qwen {text:.2f} and {text_again:.2f} s, "
        f"CLIP {pooling:.2f} s",
        **{f"resident_{name}": rate},
    )
    measurements.add(
        f"resident, {name}: Qwen alone",
        f"{flops / min(text, text_again) / 1e12:.0f} TFLOP/s",
        f"{share:.0%} of the ceiling, {count_of(config.num_hidden_layers, 'layer')}",
        **{f"share_{name}": share},
    )
    pairs = list(zip(embeds, pooled, theirs, strict=False))
    same = [sum(torch.equal(ours[k], expected[k]) for *ours, expected in pairs) for k in (0, 1)]
    error = max(relative(embeds, expected[0]) for embeds, _, expected in pairs)
    measurements.add(
        f"resident, {name}: bits",
        f"{same[0]} of {count_of(len(pairs), 'caption')} as encode_prompt",
        f"pooled {same[1]}; largest error {error:.1e} of the norm",
        **{f"same_{name}": same, f"error_{name}": error},
    )


def relative(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((ours.double() - expected.double()).norm() / expected.double().norm())


def measure_streamed(
    measurements: Measurements, root: Path, sizes: Sizes, captions: Sequence[str], device: str, fits_whole: bool = True
) -> None:
    """Measure text a layer at a time under the cap, beside reading alone and, if the whole fits, computing alone."""
    import torch

    from k5cache.encoders import qwen, streaming

    tokens = tokenized(None, root, captions, device)
    for batching in ("exact", "fast"):
        compare_streamed(measurements, root, sizes, tokens, batching, device, fits_whole)
    if fits_whole and device != "cpu":
        first_passes(measurements, root, sizes, device)
    encoder = qwen.load_qwen(root, device, torch.bfloat16, streamed=True, int8=True)
    error = streaming.int8_error(encoder, tokens[:4])
    measurements.add("int8 text encoder", f"{error:.2%} off bf16", "random weights, 4 captions", int8_error=error)


def compare_streamed(
    measurements: Measurements,
    root: Path,
    sizes: Sizes,
    tokens: Sequence[Any],
    batching: str,
    device: str,
    fits_whole: bool,
) -> None:
    """Time, memory and bits of the exact or the fast pass, streamed."""
    import torch

    from k5cache.encoders import qwen

    plan = plan_streamed(sizes, tokens, batching, device)
    options: dict[str, Any] = {"exact": batching == "exact", "batch_tokens": plan.batch_tokens}
    limit_to_card(device, sizes.vram)
    encoder = qwen.load_qwen(root, device, torch.bfloat16, streamed=True)
    read, _ = timed(device, lambda: [None for _ in qwen.read_layers(encoder, reuse=True)])
    seconds, embeds = time_parkings(measurements, encoder, tokens, plan, options, device)
    limit_to_card(device, None)
    if not fits_whole:
        measurements.add(f"reading the layers, {batching}", f"{read:.2f} s", "", **{f"read_{batching}": read})
        return
    resident = qwen.load_qwen(root, device, torch.bfloat16)
    collect(qwen.iter_prompt_embeds(resident, tokens[:8], **options))
    compute, expected = timed(device, lambda: collect(qwen.iter_prompt_embeds(resident, tokens, **options)))
    same = sum(map(torch.equal, embeds, expected))
    over = seconds / max(read, compute)
    measurements.add(
        f"streamed, {batching}: over the larger of reading and computing",
        f"{over:.2f}x",
        f"reading {read:.2f} s, computing {compute:.2f} s; {same} of {len(tokens)} as resident, bit for bit",
        **{
            f"streamed_over_{batching}": over,
            f"read_{batching}": read,
            f"compute_{batching}": compute,
            f"streamed_same_{batching}": same,
        },
    )


def time_parkings(
    measurements: Measurements,
    encoder: Any,
    tokens: Sequence[Any],
    plan: memory_plan.TextPlan,
    options: dict[str, Any],
    device: str,
) -> tuple[float, list[torch.Tensor]]:
    """Stream with hidden states parked as planned, twice, and then on the host if that was not planned.

    Returns:
        seconds of the second pass as planned, and the embeddings of the last pass.
    """
    from k5cache.encoders import streaming

    batching = "exact" if options["exact"] else "fast"
    # The bench keeps in memory what a real pass writes to a shard.
    result_bytes = encoder.embeddings.shape[1] * 2 * sum(t.n_tokens for t in tokens)
    seconds_of: dict[str, float] = {}
    layer_starts: list[float] = []

    def run(parking: memory_plan.Parking) -> list[torch.Tensor]:
        layer_starts.clear()
        on_layer = partial(_note_time, layer_starts)
        return collect(streaming.stream_prompt_embeds(encoder, tokens, parking=parking, on_layer=on_layer, **options))

    embeds: list[torch.Tensor] = []
    parkings: tuple[memory_plan.Parking, ...] = ("device", "host") if plan.parking == "device" else ("host",)
    for parking in (plan.parking, *parkings):  # the first pass meets every length for the first time, as a user's does
        reset_peak(device)
        with watched() as memory:
            start = time.monotonic()
            seconds, embeds = timed(device, partial(run, parking))
        name = str(parking) if seconds_of else f"{parking}, first time"
        peak, host, seconds_of[name] = peak_vram(device), memory.peak - result_bytes, seconds
        in_layers = (layer_starts[-1] - layer_starts[0]) * len(layer_starts) / max(1, len(layer_starts) - 1)
        measurements.add(
            f"streamed, {batching}, parked on the {name}",
            f"{seconds:.2f} s",
            f"{count_of(len(tokens), 'caption')}, VRAM {human_bytes(peak)} with the context, host {human_bytes(host)} "
            f"besides results; {layer_starts[0] - start:.2f} s before the layers, {in_layers:.2f} s in them; "
            f"planned on the {plan.parking}, {human_bytes(plan.vram)}",
            **{f"streamed_{batching}_{name}": (seconds, peak, host)},
        )
    return seconds_of[plan.parking], embeds


def plan_streamed(sizes: Sizes, tokens: Sequence[Any], batching: str, device: str) -> memory_plan.TextPlan:
    """The plan to stream captions under the cap with 16 GB of RAM."""
    return memory_plan.plan_text(
        memory_plan.TextArchitecture.of(sizes.text), "bf16", batching, 512, ram=16 * 2**30,
        vram=sizes.vram if device != "cpu" else None, num_tokens=sum(len(t.ids) for t in tokens),
    )  # fmt: skip


def first_passes(measurements: Measurements, root: Path, sizes: Sizes, device: str) -> None:
    """Measure the exact pass as a user's first one, streamed and resident, each in its own process.

    A second pass in the same process is faster: 512 captions took 28.9 s the first time on an H100 and 15.5 s the
    second, most likely because cuDNN makes a plan for its attention at every new length.
    """
    seconds: dict[str, float] = {}
    for mode in ("resident", "streamed"):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
            seconds[mode] = alone.submit(first_pass, root, sizes, mode, device).result()
    over = seconds["streamed"] / seconds["resident"]
    measurements.add(
        "first exact pass of a process",
        f"{seconds['streamed']:.2f} s streamed",
        f"{seconds['resident']:.2f} s resident, its weights loaded before: {over:.2f}x; "
        f"{count_of(sizes.num_captions, 'caption')}",
        first_over=over,
        **{f"first_{m}": s for m, s in seconds.items()},
    )


def first_pass(root: Path, sizes: Sizes, mode: str, device: str) -> float:
    """Seconds of the exact pass over all captions: "streamed" under the cap, or "resident" after loading."""
    import torch

    from k5cache.encoders import qwen, streaming

    with torch.no_grad():
        tokens = tokenized(None, root, make_captions(sizes.tokens, sizes.num_captions), device)
        plan = plan_streamed(sizes, tokens, "exact", device)
        options: dict[str, Any] = {"exact": True, "batch_tokens": plan.batch_tokens}
        if mode == "resident":
            resident = qwen.load_qwen(root, device, torch.bfloat16)
            return timed(device, lambda: collect(qwen.iter_prompt_embeds(resident, tokens, **options)))[0]
        limit_to_card(device, sizes.vram)
        encoder = qwen.load_qwen(root, device, torch.bfloat16, streamed=True)
        stream = partial(streaming.stream_prompt_embeds, encoder, tokens, parking=plan.parking, **options)
        return timed(device, lambda: collect(stream()))[0]


def _note_time(times: list[float], layer: int) -> None:
    times.append(time.monotonic())


def tokenized(measurements: Measurements | None, root: Path, captions: Sequence[str], device: str) -> list[Any]:
    """Token ids of every caption; the time is added to ``measurements`` if it is given."""
    from k5cache.encoders import qwen

    tokenizer = qwen.load_tokenizer(root)
    seconds, tokens = timed(device, lambda: [qwen.tokenize(tokenizer, c, 512) for c in captions])
    if measurements:
        measurements.add(
            "tokenising",
            f"{1e3 * seconds / len(tokens):.2f} ms a caption",
            "on a thread, ahead of the GPU",
            tokenise_seconds=seconds,
        )
    return tokens


def make_captions(tokens: tuple[int, int], count: int, seed: int = 0) -> list[str]:
    """Captions of random words, their lengths spread evenly over ``tokens``."""
    from k5cache.encoders.pipeline import prompt_template

    template = prompt_template()
    num_words = len(template.text.format("w0").split()) - 1  # a word is a token, but the crop may be longer
    rng = random.Random(seed)
    missing = template.encode_start_idx - num_words
    lengths = [max(0, rng.randint(*tokens) + missing) for _ in range(count)]
    return [" ".join(f"w{rng.randrange(200)}" for _ in range(n)) for n in lengths]
