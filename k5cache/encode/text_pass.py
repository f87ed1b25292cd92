"""The text encoders over every new caption: CLIP first, then Qwen, which writes each row.

One encoder is loaded at a time and freed before the next. Captions are encoded in chunks, and each is committed
when it is done: more captions need no more memory, and a crash loses no more work.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from tempfile import SpooledTemporaryFile
from typing import IO, TYPE_CHECKING

from k5cache.encode import estimate
from k5cache.encode.job import Job, TextJob
from k5cache.encode.one_encoder import one_encoder
from k5cache.encode.precision import DTYPES, torch_dtype
from k5cache.encode.sink import RowSink
from k5cache.encode.source_pass import Chunk, Sources, in_order_of_sources, lost_instructions, with_pictures
from k5cache.encode.write_rows import row_writer
from k5cache.encoders import memory_plan
from k5cache.shared import console
from k5cache.shared.kind import Kind
from k5cache.shared.units import count_of
from k5cache.sources.items import UnreadableImage
from k5cache.store.tensors import TensorSpec, from_bytes, to_bytes

if TYPE_CHECKING:
    import torch

    from k5cache.encoders.clip import Clip
    from k5cache.encoders.qwen import Qwen, Tokens

_POOLED_IN_MEMORY = 2**26  # bytes of pooled vectors, 40,000 captions; more than this goes to a file
_CLIP_CAPTIONS = 50_000  # captions that CLIP encodes before Qwen begins: minutes of a GPU
_CLIP_BATCH = 64  # captions at once where batches need not be exact
_INT8_ERROR_CAPTIONS = 4  # captions that the error of an int8 text encoder is measured on


FirstChunk = Callable[[], Chunk | None]
"""Waits for the tokens of the first chunk of captions."""


class PipelineFails(UnreadableImage):
    """The source can be read, but the pipeline cannot encode it with its instruction."""


def encode_texts(
    job: Job, sink: RowSink, text_jobs: Sequence[TextJob], failed: dict[str, UnreadableImage] | None = None
) -> tuple[tuple[str, int], ...]:
    """CLIP over new captions, then Qwen, which writes each row as it comes. Returns the captions that were cut.

    CLIP goes first because its vectors are small (1.5 KB a caption), so Qwen's (2 MB) never pile up in memory. CLIP's
    vectors are saved only with Qwen's rows, so CLIP encodes at most 50,000 captions ahead: that is all a crash can
    lose.

    Args:
        failed: gets the key of each text that has no row, and why: its source cannot be read, or the pipeline fails on
            this pair. Only for image-to-image.

    Raises:
        DoesNotFit: the card cannot hold two layers of the text encoder and a caption.
        ModelError: the checkpoint has no vision tower or image processor, and there are sources.
    """
    failed = {} if failed is None else failed
    text_jobs, sources = encodable(job, text_jobs, failed)
    if not text_jobs:
        return ()
    plan = estimate.plan_text(
        job.folder, job.config, job.device, job.vram, estimate.token_counts(job.config, text_jobs)
    )
    if sources:
        sources.is_kept = plan.mode == "resident"
    truncated: tuple[tuple[str, int], ...] = ()
    for start in range(0, len(text_jobs), _CLIP_CAPTIONS):
        part = text_jobs[start : start + _CLIP_CAPTIONS]
        with SpooledTemporaryFile(_POOLED_IN_MEMORY, dir=str(job.root)) as file:
            with one_encoder(job.device, job.vram, "CLIP"):
                pooled = encode_pooled(job, load_clip(job), part, file)
            with one_encoder(job.device, job.vram, "Qwen2.5-VL", plan.vram):
                load = functools.partial(load_qwen, job, plan, sources)
                texts = encode_prompts(job, sink, part, plan, pooled, sources, failed, load)
        warn_of_lost(texts.lost)
        truncated += texts.truncated
    return truncated


@dataclass(frozen=True)
class Texts:
    """What is worth knowing of texts that were encoded."""

    truncated: tuple[tuple[str, int], ...]
    """(cleaned caption, how many of its last characters were cut off)."""
    lost: tuple[str, ...]
    """Instructions of which Qwen's embeddings hold nothing."""


def encodable(
    job: Job, text_jobs: Sequence[TextJob], failed: dict[str, UnreadableImage]
) -> tuple[Sequence[TextJob], Sources | None]:
    """The texts that the pipeline can encode, in the order of the pass, and the sources of instructions.

    Those on which it fails go into ``failed``.
    """
    sources = sources_of(job) if estimate.has_sources(text_jobs) else None
    if sources:
        reasons = {text_job.key: sources.reason(text_job) for text_job in text_jobs}
        failed.update({key: PipelineFails(reason) for key, reason in reasons.items() if reason})
        text_jobs = in_order_of_sources([text_job for text_job in text_jobs if text_job.key not in failed])
    return text_jobs, sources


def tokenizer_of(job: Job, *, is_with_sources: bool) -> Callable[[TextJob], Tokens]:
    """What gives the token ids of a text, as an encode has them."""
    return _tokenizer(job, sources_of(job) if is_with_sources else None)


def sources_of(job: Job) -> Sources:
    """The sources of instructions."""
    from k5cache.encoders.pipeline import pipeline_template
    from k5cache.encoders.vision import check_tower
    from k5cache.encoders.with_picture import load_processor

    check_tower(job.folder)
    pipeline_template("i2i")  # imports diffusers: its lazy imports fail if two threads trigger them at once
    return Sources(job, load_processor(job.folder), is_kept=False)


@dataclass(frozen=True)
class PooledFile:
    """CLIP's vectors of some captions, one after another in a temporary file."""

    file: IO[bytes]
    spec: TensorSpec
    num_bytes: int
    """Of one vector."""
    places: dict[str, int]
    """Caption -> the number of its vector."""

    def read(self, caption: str) -> torch.Tensor:
        """The vector of a caption."""
        self.file.seek(self.num_bytes * self.places[caption])
        return from_bytes(self.file.read(self.num_bytes), self.spec)


def load_clip(job: Job) -> Clip:
    """CLIP in the precision that is asked for."""
    from k5cache.encoders import clip

    with console.doing(job.bars, "loading CLIP"):
        return clip.load_clip(job.folder, job.device, torch_dtype(job.config.text_encoder_2_precision))


def encode_pooled(job: Job, tower: Clip, text_jobs: Sequence[TextJob], file: IO[bytes]) -> PooledFile:
    """CLIP's vector of every caption, into ``file``. Instructions that several sources share are encoded once."""
    from k5cache.encoders import clip

    is_exact = job.config.text_batching == "exact"
    batch = 1 if is_exact else _CLIP_BATCH
    captions = list(dict.fromkeys(text_job.caption for text_job in text_jobs))
    with job.progress_bar("CLIP", len(captions), "caption") as advance:
        for start in range(0, len(captions), batch):
            vectors = clip.encode_pooled(tower, captions[start : start + batch], exact=is_exact)
            file.write(to_bytes(vectors))
            advance(len(vectors))
    spec = TensorSpec(DTYPES[job.config.text_encoder_2_precision], (int(vectors.shape[1]),))
    return PooledFile(file, spec, file.tell() // len(captions), {caption: i for i, caption in enumerate(captions)})


def encode_prompts(
    job: Job,
    sink: RowSink,
    text_jobs: Sequence[TextJob],
    plan: memory_plan.TextPlan,
    pooled: PooledFile,
    sources: Sources | None,
    failed: dict[str, UnreadableImage],
    load: Callable[[FirstChunk], Qwen],
) -> Texts:
    """Qwen over every caption, a chunk at a time. While it runs, a thread tokenises the next chunk.

    Args:
        load: gives the encoder, while the first chunk is tokenised.
    """
    from k5cache.encoders.pipeline import pipeline_template

    pipeline_template()  # imports diffusers: its lazy imports fail if two threads trigger them at once
    truncated: list[tuple[str, int]] = []
    lost: dict[str, None] = {}
    progress_bar = job.progress_bar("loading Qwen2.5-VL", len(text_jobs), "caption")
    with ThreadPoolExecutor(1) as pool, progress_bar as advance:
        chunks = _chunks(_tokenizer(job, sources), text_jobs, plan.chunk_tokens)
        next_chunk = pool.submit(next, chunks, None)
        encoder = load(lambda: next_chunk.result())
        advance(0, "Qwen2.5-VL")
        embeds_spec = TensorSpec(DTYPES[job.config.text_encoder_1_precision], (None, encoder.embeddings.shape[1]))
        specs = {"prompt_embeds": embeds_spec, "pooled": pooled.spec}
        while (chunk := next_chunk.result()) is not None:
            next_chunk = pool.submit(next, chunks, None)
            if sources:
                advance(0, f"Qwen2.5-VL: the sources of {count_of(len(chunk.tokens), 'instruction')}")
                chunk = with_pictures(sources, chunk, failed)
                lost |= dict.fromkeys(lost_instructions(chunk))
            pairs = zip(chunk.text_jobs, chunk.tokens, strict=True)
            truncated += [(text_job.caption, len(own.truncated)) for text_job, own in pairs if own.truncated]
            with row_writer(sink, job.config, "text", specs) as put:
                for i, embeds in _prompt_embeds(job, encoder, chunk, plan, advance):
                    text_job = chunk.text_jobs[i]
                    put({
                        "key": text_job.key, "prompt_embeds": embeds, "pooled": pooled.read(text_job.caption),
                        "n_tokens": chunk.tokens[i].n_tokens, "caption": text_job.caption,
                    })  # fmt: skip
                    advance(1)
    return Texts(tuple(truncated), tuple(lost))


def load_qwen(job: Job, plan: memory_plan.TextPlan, sources: Sources | None, first_chunk: FirstChunk) -> Qwen:
    """The text encoder as planned; if it is in 8 bits, its error is printed first."""
    from k5cache.encoders import qwen, streaming

    precision = job.config.text_encoder_1_precision
    dtype, is_int8 = torch_dtype(precision), precision == "int8"
    is_streamed = plan.mode == "streamed"
    kind: Kind = "i2i" if sources else "t2i"
    if is_int8:
        some = first_chunk()
        assert some is not None
        some = some.part(range(min(_INT8_ERROR_CAPTIONS, len(some.tokens))))
        some = with_pictures(sources, some, {}) if sources else some
        encoder = qwen.load_qwen(job.folder, job.device, dtype, streamed=True, int8=True, kind=kind)
        if some.tokens:
            error = streaming.int8_error(encoder, some.tokens, some.pictures)
            job.note(
                f"The text encoder in int8 gives embeddings that differ from bf16 by {error:.2%} "
                f"({count_of(len(some.tokens), 'caption')})"
            )
        if is_streamed:
            return encoder
        del encoder
    return qwen.load_qwen(job.folder, job.device, dtype, streamed=is_streamed, int8=is_int8, kind=kind)


def _prompt_embeds(
    job: Job, encoder: Qwen, chunk: Chunk, plan: memory_plan.TextPlan, advance: Callable[..., None]
) -> Iterator[tuple[int, torch.Tensor]]:
    """(position in the chunk, prompt_embeds) of every caption of a chunk, as they are done."""
    from k5cache.encoders import qwen, streaming

    is_exact = job.config.text_batching == "exact"
    tokens, pictures = chunk.tokens, chunk.pictures
    if plan.mode == "resident":
        return qwen.iter_prompt_embeds(encoder, tokens, pictures, exact=is_exact, batch_tokens=plan.batch_tokens)
    num_layers = len(encoder.model.layers)
    return streaming.stream_prompt_embeds(
        encoder,
        tokens,
        pictures,
        exact=is_exact,
        batch_tokens=plan.batch_tokens,
        parking=plan.parking,
        on_layer=lambda i: advance(0, f"Qwen2.5-VL: {count_of(len(tokens), 'caption')}, layer {i + 1} of {num_layers}"),
    )


def _tokenizer(job: Job, sources: Sources | None) -> Callable[[TextJob], Tokens]:
    """What gives the token ids of one caption."""
    from k5cache.encoders import qwen

    if sources:
        return sources.tokens
    tokenizer, limit = qwen.load_tokenizer(job.folder), job.config.text_limit("t2i")
    return lambda text_job: qwen.tokenize(tokenizer, text_job.caption, limit)


def _chunks(tokenize: Callable[[TextJob], Tokens], text_jobs: Sequence[TextJob], chunk_tokens: int) -> Iterator[Chunk]:
    """Captions that are encoded and committed together."""
    first, chunk, num_tokens = 0, list["Tokens"](), 0
    for i, text_job in enumerate(text_jobs):
        tokens = tokenize(text_job)
        if chunk and num_tokens + len(tokens.ids) > chunk_tokens:
            yield Chunk(text_jobs[first:i], chunk)
            first, chunk, num_tokens = i, [], 0
        chunk.append(tokens)
        num_tokens += len(tokens.ids)
    if chunk:
        yield Chunk(text_jobs[first:], chunk)


def warn_of_lost(lost: Sequence[str]) -> None:
    """Say which instructions leave no trace in Qwen's embeddings."""
    if not lost:
        return
    named = ", ".join(repr(caption[:40]) for caption in lost[:3]) + (", ..." if len(lost) > 3 else "")
    count, it = count_of(len(lost), "instruction is", "instructions are"), "it" if len(lost) == 1 else "them"
    console.warn(
        f"{count} so short that Qwen's embedding holds nothing of {it} ({named}): Kandinsky5I2IPipeline cuts an "
        f"instruction's first tokens off. Only CLIP reads {it}. Use longer sentences"
    )
