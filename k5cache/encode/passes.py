"""The encoders' passes: every new caption through CLIP and Qwen, every new image through the VAE, into shards.

One encoder is loaded at a time and freed before the next. Captions go in chunks, each committed when it is done, so
that neither memory nor what a kill costs grows with their number. Rows are written by a thread while the next are
computed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import IO, TYPE_CHECKING, Any

from rich.progress import Progress

from k5cache import console, memory_plan
from k5cache.buckets import Bucket
from k5cache.config import CacheConfig
from k5cache.encode import plan, stage1
from k5cache.encode.alone import alone
from k5cache.encode.commit import Committer
from k5cache.errors import ModelError
from k5cache.hub import read_config
from k5cache.sources import images, masks
from k5cache.sources.items import Content, UnreadableImage
from k5cache.store.tensors import TensorSpec, from_bytes, to_bytes

if TYPE_CHECKING:
    import torch

    from k5cache.encoders.qwen import Qwen, Tokens

DTYPES = stage1.DTYPES
_POOLED_IN_MEMORY = 2**26  # bytes of pooled vectors, 40,000 captions, past which they go to a file
_ROWS_IN_FLIGHT = 32
_TOGETHER = 50_000  # captions through CLIP before Qwen begins: minutes of a GPU
_TRIED_IN_BOTH = 4  # captions that the error of an int8 text encoder is measured on


@dataclass(frozen=True)
class Job:
    """What an encode needs to know all the way through."""

    read: Callable[[str], Content]
    """An image by its path in the source: a file, or its bytes."""
    root: Path
    folder: Path
    recipe: dict[str, Any]
    config: CacheConfig
    device: str
    bars: Progress
    vram: int | None = None
    """Bytes of VRAM to plan for; None takes what is free."""


def encode_texts(job: Job, commit: Committer, jobs: Sequence[plan.TextJob]) -> tuple[tuple[str, int], ...]:
    """CLIP over new captions, then Qwen, which writes each row as it comes. Returns the captions that were cut.

    CLIP goes first because its vectors are small (1.5 KB a caption): Qwen's (2 MB) then never pile up in memory. They
    are kept by Qwen's rows alone, so of a million captions CLIP takes no more at once than a kill may cost.

    Raises:
        DoesNotFit: the card cannot hold two layers of the text encoder and a caption.
    """
    if not jobs:
        return ()
    from k5cache.encoders import machine

    lengths = machine.text_lengths((one.caption for one in jobs), job.config.max_sequence_length)
    made = stage1.plan_text(job.folder, job.config, job.device, job.vram, lengths)
    truncated: tuple[tuple[str, int], ...] = ()
    for start in range(0, len(jobs), _TOGETHER):
        part = jobs[start : start + _TOGETHER]
        with SpooledTemporaryFile(_POOLED_IN_MEMORY, dir=str(job.root)) as pooled:
            with alone(job.device, job.vram, "CLIP"):
                width = _encode_pooled(job, part, pooled)
            with alone(job.device, job.vram, "Qwen2.5-VL", made.vram):
                truncated += _encode_prompts(job, commit, part, made, pooled, width)
    return truncated


def _encode_pooled(job: Job, jobs: Sequence[plan.TextJob], pooled: IO[bytes]) -> int:
    """CLIP's vector of every caption, appended to ``pooled``. Returns how long one is."""
    from k5cache.encoders import clip

    is_exact = job.config.text_batching == "exact"
    size = 1 if is_exact else 64
    with console.doing(job.bars, "loading CLIP"):
        tower = clip.load_clip(job.folder, job.device, _dtype(job.config.text_encoder_2_precision))
    with _bar(job.bars, "CLIP", len(jobs), "caption") as advance:
        for start in range(0, len(jobs), size):
            vectors = clip.encode_pooled(tower, [one.caption for one in jobs[start : start + size]], exact=is_exact)
            pooled.write(to_bytes(vectors))
            advance(len(vectors))
        return int(vectors.shape[1])


def _encode_prompts(
    job: Job,
    commit: Committer,
    jobs: Sequence[plan.TextJob],
    made: memory_plan.TextPlan,
    pooled: IO[bytes],
    pooled_width: int,
) -> tuple[tuple[str, int], ...]:
    """Qwen over every caption, a chunk at a time; the next chunk is tokenised meanwhile."""
    from k5cache.encoders import qwen
    from k5cache.encoders.pipeline import pipeline_facts

    pipeline_facts()  # imports diffusers, whose lazy modules break when two threads are the first to ask
    tokenizer = qwen.load_tokenizer(job.folder)
    truncated: list[tuple[str, int]] = []
    spec = TensorSpec(DTYPES[job.config.text_encoder_2_precision], (pooled_width,))
    row_bytes = pooled.tell() // len(jobs)
    is_exact = job.config.text_batching == "exact"
    with ThreadPoolExecutor(1) as pool, _bar(job.bars, "loading Qwen2.5-VL", len(jobs), "caption") as advance:
        chunks = _chunks(tokenizer, jobs, job.config.max_sequence_length, made.chunk_tokens)
        following = pool.submit(next, chunks, None)
        encoder = _load_qwen(job, made, lambda: following.result())
        advance(0, "Qwen2.5-VL")
        specs = {
            "prompt_embeds": TensorSpec(
                DTYPES[job.config.text_encoder_1_precision], (None, encoder.embeddings.shape[1])
            ),
            "pooled": spec,
        }
        while (chunk := following.result()) is not None:
            following = pool.submit(next, chunks, None)
            first, tokens = chunk
            truncated += [(jobs[first + i].caption, len(t.truncated)) for i, t in enumerate(tokens) if t.truncated]
            if made.mode == "resident":
                rows = qwen.iter_prompt_embeds(encoder, tokens, exact=is_exact, batch_tokens=made.batch_tokens)
            else:
                rows = _streamed(encoder, tokens, made, is_exact, advance)
            with commit.shards("text", specs) as append, _in_background(_numbers(append, job.config)) as put:
                for i, embeds in rows:
                    one = jobs[first + i]
                    pooled.seek(row_bytes * (first + i))
                    vector = from_bytes(pooled.read(row_bytes), spec)
                    put({"key": one.key, "prompt_embeds": embeds, "pooled": vector,
                         "n_tokens": tokens[i].n_tokens, "caption": one.caption})  # fmt: skip
                    advance(1)
    return tuple(truncated)


def _load_qwen(job: Job, made: memory_plan.TextPlan, first_chunk: Callable[[], Any]) -> Qwen:
    """The text encoder as planned; in 8 bits, its error is printed first."""
    from k5cache.encoders import qwen, streaming

    dtype, is_int8 = _dtype(job.config.text_encoder_1_precision), job.config.text_encoder_1_precision == "int8"
    is_streamed = made.mode == "streamed"
    if is_int8:
        encoder = qwen.load_qwen(job.folder, job.device, dtype, streamed=True, int8=True)
        tried = first_chunk()[1][:_TRIED_IN_BOTH]
        error = streaming.int8_error(encoder, tried)
        console.note(
            f"The text encoder in int8 gives embeddings {error:.2%} off those in bf16 (of {len(tried)} captions)"
        )
        if is_streamed:
            return encoder
        del encoder
    return qwen.load_qwen(job.folder, job.device, dtype, streamed=is_streamed, int8=is_int8)


def _streamed(
    encoder: Qwen, tokens: Sequence[Tokens], made: memory_plan.TextPlan, is_exact: bool, advance: Callable[..., None]
) -> Iterator[tuple[int, torch.Tensor]]:
    from k5cache.encoders.streaming import stream_prompt_embeds

    num_layers = len(encoder.model.layers)
    return stream_prompt_embeds(
        encoder,
        tokens,
        exact=is_exact,
        batch_tokens=made.batch_tokens,
        parking=made.parking,
        on_layer=lambda i: advance(0, f"Qwen2.5-VL: {len(tokens)} captions, layer {i + 1} of {num_layers}"),
    )


def _chunks(
    tokenizer: Any, jobs: Sequence[plan.TextJob], max_sequence_length: int, chunk_tokens: int
) -> Iterator[tuple[int, list[Tokens]]]:
    """(position of the first caption, tokens) of captions that are encoded and committed together."""
    from k5cache.encoders import qwen

    first, tokens, size = 0, list[qwen.Tokens](), 0
    for i, one in enumerate(jobs):
        text = qwen.tokenize(tokenizer, one.caption, max_sequence_length)
        if tokens and size + len(text.ids) > chunk_tokens:
            yield first, tokens
            first, tokens, size = i, [], 0
        tokens.append(text)
        size += len(text.ids)
    if tokens:
        yield first, tokens


def encode_latents(job: Job, commit: Committer, jobs: Sequence[plan.LatentJob]) -> dict[str, str]:
    """The VAE over every new image, one bucket after another. Returns latent key -> reason for unreadable images.

    Raises:
        DoesNotFit: the card cannot hold the VAE and an image, in strips either.
    """
    if not jobs:
        return {}
    by_bucket: dict[Bucket, list[plan.LatentJob]] = {}
    for one in jobs:
        by_bucket.setdefault(one.geometry.bucket, []).append(one)
    failed: dict[str, str] = {}
    planned = stage1.plan_vae(job.folder, job.config, job.device, job.vram, jobs).vram
    with alone(job.device, job.vram, "The VAE", planned), _bar(job.bars, "VAE", len(jobs), "image") as advance:
        encoder = Vae(job, jobs)
        for bucket, members in sorted(by_bucket.items()):
            advance(0, f"VAE: {bucket.name}")
            encode_bucket(job, commit, bucket, members, encoder, failed, advance)
    return failed


class Vae:
    """The VAE, loaded for the first image that can be read: a broken one alone is no reason to."""

    def __init__(self, job: Job, jobs: Sequence[plan.LatentJob]) -> None:
        self._job, self._jobs = job, jobs
        self._loaded: Any = None
        self._in_strips = False

    def moments(self, pixels: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
        """uint8 ``[3, H, W]`` to float16 ``[names, H/8, W/8, 16]`` on the device; the copy there is queued."""
        import torch

        from k5cache.encoders import vae

        if self._loaded is None:
            with console.doing(self._job.bars, "loading the VAE"):
                self._load()
        if self._job.device != "cpu":
            pixels = pixels.pin_memory().to(self._job.device, non_blocking=True)
        mean, std = vae.encode_on_device(
            self._loaded, vae.to_model_range(pixels.unsqueeze(0)), in_strips=self._in_strips
        )
        moments = {"mean": mean, "std": std}
        return torch.cat([moments[name] for name in names]).half()

    def _load(self) -> None:
        from k5cache.encoders import vae

        job = self._job
        made = stage1.plan_vae(job.folder, job.config, job.device, job.vram, self._jobs)
        self._in_strips = made.mode == "strips"
        self._loaded = vae.keep_encoder_only(vae.load_vae(job.folder, job.device, _dtype(job.config.vae_precision)))


def encode_bucket(
    job: Job,
    commit: Committer,
    bucket: Bucket,
    members: Sequence[plan.LatentJob],
    encoder: Vae,
    failed: dict[str, str],
    advance: Callable[..., None],
) -> None:
    """The images of one bucket into shards; reasons for unreadable ones go to ``failed``."""
    from k5cache.encoders.hostio import fetched

    height, width = bucket.latent_shape
    names = ("mean", "std") if job.config.posterior == "sample" else ("mean",)
    channels = read_config(job.folder, "vae")["latent_channels"]
    specs = {name: TensorSpec("float16", (height, width, channels)) for name in names}

    def encoded() -> Iterator[tuple[str, torch.Tensor]]:
        # With its hash: an image that changed since the plan must not be stored under the old content's key.
        wanted = ((one.path, one.geometry, one.content_hash) for one in members)
        for i, pixels in images.load_many(wanted, job.read):
            if isinstance(pixels, UnreadableImage):
                failed[members[i].key] = pixels.reason
                advance(1)
            else:
                yield members[i].key, encoder.moments(pixels, names)

    with commit.shards("latents", specs, bucket) as append, _in_background(_numbers(append, job.config)) as put:
        for key, moments in fetched(encoded()):
            put({"key": key} | dict(zip(names, moments, strict=True)))
            advance(1)


def encode_masks(read: Callable[[str], Content], commit: Committer, jobs: Sequence[plan.MaskJob]) -> dict[str, str]:
    """Every new mask into shards, one bucket after another. Returns mask key -> reason for unreadable ones."""
    failed: dict[str, str] = {}
    by_bucket: dict[Bucket, list[plan.MaskJob]] = {}
    for job in jobs:
        by_bucket.setdefault(job.geometry.bucket, []).append(job)
    for bucket, members in sorted(by_bucket.items()):
        with commit.shards("masks", {"mask": TensorSpec("uint8", bucket.latent_shape)}, bucket) as append:
            for job in members:
                try:
                    content = read(job.path)
                    content = content if isinstance(content, bytes) else content.read_bytes()  # what is hashed is used
                    if job.content_hash and images.hash_content(content) != job.content_hash:
                        raise UnreadableImage("has changed since the encode began; encode again")
                    mask = masks.load_mask(content, job.geometry)
                except OSError as error:
                    failed[job.key] = f"its mask {job.path} cannot be read ({error.strerror})"
                except UnreadableImage as error:
                    failed[job.key] = f"its mask {job.path} {error.reason}"
                else:
                    append({"key": job.key, "mask": mask})
    return failed


def _numbers(append: Callable[[dict[str, Any]], None], config: CacheConfig) -> Callable[[dict[str, Any]], None]:
    """``append`` for rows of numbers; NaN or infinity is a ``ModelError``: float16 overflows in some models."""
    precisions = {
        "prompt_embeds": "text_encoder_1_precision",
        "pooled": "text_encoder_2_precision",
        "mean": "vae_precision",
        "std": "vae_precision",
    }

    def checked(row: dict[str, Any]) -> None:
        for name in precisions.keys() & row.keys():
            if not row[name].isfinite().all():
                option = precisions[name]
                what = repr(row["caption"][:60]) if "caption" in row else "an image"
                raise ModelError(
                    f"The encoder of {name} gives {what} numbers that are not finite, with cache.{option} = "
                    f'"{getattr(config, option)}"',
                    f'Set cache.{option} = "{"fp32" if name in ("mean", "std") else "bf16"}", '
                    "or download the model again",
                )
        append(row)

    return checked


@contextmanager
def _in_background(append: Callable[[dict[str, Any]], None]) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield ``append`` as a thread does it, in order, a few rows behind; what it raises is raised here."""
    waiting: deque[Future[None]] = deque()
    is_broken = False

    def write(row: dict[str, Any]) -> None:
        nonlocal is_broken
        if not is_broken:
            is_broken = True  # until it has worked
            append(row)
            is_broken = False

    def put(row: dict[str, Any]) -> None:
        if len(waiting) >= _ROWS_IN_FLIGHT:
            waiting.popleft().result()
        waiting.append(pool.submit(write, row))

    with ThreadPoolExecutor(1, thread_name_prefix="k5-write") as pool:
        yield put
        while waiting:
            waiting.popleft().result()


@contextmanager
def _bar(bars: Progress, description: str, total: int, unit: str) -> Iterator[Callable[..., None]]:
    task = bars.add_task(description, total=total, unit=unit, note="")

    def advance(count: int, description: str | None = None) -> None:
        bars.update(task, advance=count, description=description)

    try:
        yield advance
    finally:
        bars.remove_task(task)


def _dtype(precision: str) -> torch.dtype:
    import torch

    dtype: torch.dtype = getattr(torch, DTYPES[precision])
    return dtype
