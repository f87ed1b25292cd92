"""The text encoders over every new caption: CLIP first, then Qwen, which writes each row.

One encoder is loaded at a time and freed before the next. Captions are encoded in chunks, and each is committed
when it is done: more captions need no more memory, and a crash loses no more work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from tempfile import SpooledTemporaryFile
from typing import IO, TYPE_CHECKING, Any

from k5cache.encode import estimate
from k5cache.encode.job import Job
from k5cache.encode.one_encoder import one_encoder
from k5cache.encode.plan import TextJob
from k5cache.encode.precision import DTYPES, torch_dtype
from k5cache.encode.sink import RowSink
from k5cache.encode.write_rows import row_writer
from k5cache.encoders import memory_plan
from k5cache.shared import console
from k5cache.store.tensors import TensorSpec, from_bytes, to_bytes

if TYPE_CHECKING:
    import torch

    from k5cache.encoders.qwen import Qwen, Tokens

_POOLED_IN_MEMORY = 2**26  # bytes of pooled vectors, 40,000 captions; more than this goes to a file
_CLIP_CAPTIONS = 50_000  # captions that CLIP encodes before Qwen begins: minutes of a GPU
_CLIP_BATCH = 64  # captions at once where batches need not be exact
_INT8_ERROR_CAPTIONS = 4  # captions that the error of an int8 text encoder is measured on


def encode_texts(job: Job, sink: RowSink, text_jobs: Sequence[TextJob]) -> tuple[tuple[str, int], ...]:
    """CLIP over new captions, then Qwen, which writes each row as it comes. Returns the captions that were cut.

    CLIP goes first because its vectors are small (1.5 KB a caption), so Qwen's (2 MB) never pile up in memory. CLIP's
    vectors are saved only with Qwen's rows, so CLIP encodes at most 50,000 captions ahead: that is all a crash can
    lose.

    Raises:
        DoesNotFit: the card cannot hold two layers of the text encoder and a caption.
    """
    if not text_jobs:
        return ()
    from k5cache.encoders import speed

    captions = (text_job.caption for text_job in text_jobs)
    lengths = speed.text_lengths(captions, job.config.max_sequence_length)
    plan = estimate.plan_text(job.folder, job.config, job.device, job.vram, lengths)
    truncated: tuple[tuple[str, int], ...] = ()
    for start in range(0, len(text_jobs), _CLIP_CAPTIONS):
        part = text_jobs[start : start + _CLIP_CAPTIONS]
        with SpooledTemporaryFile(_POOLED_IN_MEMORY, dir=str(job.root)) as file:
            with one_encoder(job.device, job.vram, "CLIP"):
                pooled = _encode_pooled(job, part, file)
            with one_encoder(job.device, job.vram, "Qwen2.5-VL", plan.vram):
                truncated += _encode_prompts(job, sink, part, plan, pooled)
    return truncated


@dataclass(frozen=True)
class _PooledFile:
    """CLIP's vectors of some captions, one after another in a temporary file."""

    file: IO[bytes]
    spec: TensorSpec
    num_bytes: int
    """Of one vector."""

    def read(self, i: int) -> torch.Tensor:
        """The vector of caption ``i``."""
        self.file.seek(self.num_bytes * i)
        return from_bytes(self.file.read(self.num_bytes), self.spec)


def _encode_pooled(job: Job, text_jobs: Sequence[TextJob], file: IO[bytes]) -> _PooledFile:
    """CLIP's vector of every caption, into ``file``."""
    from k5cache.encoders import clip

    is_exact = job.config.text_batching == "exact"
    batch = 1 if is_exact else _CLIP_BATCH
    precision = job.config.text_encoder_2_precision
    with console.doing(job.bars, "loading CLIP"):
        tower = clip.load_clip(job.folder, job.device, torch_dtype(precision))
    with job.progress_bar("CLIP", len(text_jobs), "caption") as advance:
        for start in range(0, len(text_jobs), batch):
            captions = [text_job.caption for text_job in text_jobs[start : start + batch]]
            vectors = clip.encode_pooled(tower, captions, exact=is_exact)
            file.write(to_bytes(vectors))
            advance(len(vectors))
    spec = TensorSpec(DTYPES[precision], (int(vectors.shape[1]),))
    return _PooledFile(file, spec, file.tell() // len(text_jobs))


def _encode_prompts(
    job: Job, sink: RowSink, text_jobs: Sequence[TextJob], plan: memory_plan.TextPlan, pooled: _PooledFile
) -> tuple[tuple[str, int], ...]:
    """Qwen over every caption, a chunk at a time. While it runs, a thread tokenises the next chunk."""
    from k5cache.encoders import qwen
    from k5cache.encoders.pipeline import pipeline_template

    pipeline_template()  # imports diffusers: its lazy imports fail if two threads trigger them at once
    tokenizer = qwen.load_tokenizer(job.folder)
    truncated: list[tuple[str, int]] = []
    progress_bar = job.progress_bar("loading Qwen2.5-VL", len(text_jobs), "caption")
    with ThreadPoolExecutor(1) as pool, progress_bar as advance:
        chunks = _chunks(tokenizer, text_jobs, job.config.max_sequence_length, plan.chunk_tokens)
        next_chunk = pool.submit(next, chunks, None)
        encoder = _load_qwen(job, plan, lambda: next_chunk.result())
        advance(0, "Qwen2.5-VL")
        embeds_spec = TensorSpec(DTYPES[job.config.text_encoder_1_precision], (None, encoder.embeddings.shape[1]))
        specs = {"prompt_embeds": embeds_spec, "pooled": pooled.spec}
        while (chunk := next_chunk.result()) is not None:
            next_chunk = pool.submit(next, chunks, None)
            first, tokens = chunk
            truncated += [(text_jobs[first + i].caption, len(t.truncated)) for i, t in enumerate(tokens) if t.truncated]
            with row_writer(sink, job.config, "text", specs) as put:
                for i, embeds in _prompt_embeds(job, encoder, tokens, plan, advance):
                    text_job = text_jobs[first + i]
                    put({
                        "key": text_job.key, "prompt_embeds": embeds, "pooled": pooled.read(first + i),
                        "n_tokens": tokens[i].n_tokens, "caption": text_job.caption,
                    })  # fmt: skip
                    advance(1)
    return tuple(truncated)


def _load_qwen(job: Job, plan: memory_plan.TextPlan, first_chunk: Callable[[], Any]) -> Qwen:
    """The text encoder as planned; if it is in 8 bits, its error is printed first."""
    from k5cache.encoders import qwen, streaming

    precision = job.config.text_encoder_1_precision
    dtype, is_int8 = torch_dtype(precision), precision == "int8"
    is_streamed = plan.mode == "streamed"
    if is_int8:
        encoder = qwen.load_qwen(job.folder, job.device, dtype, streamed=True, int8=True)
        tokens = first_chunk()[1][:_INT8_ERROR_CAPTIONS]
        error = streaming.int8_error(encoder, tokens)
        console.note(
            f"The text encoder in int8 gives embeddings that differ from bf16 by {error:.2%} ({len(tokens)} captions)"
        )
        if is_streamed:
            return encoder
        del encoder
    return qwen.load_qwen(job.folder, job.device, dtype, streamed=is_streamed, int8=is_int8)


def _prompt_embeds(
    job: Job, encoder: Qwen, tokens: Sequence[Tokens], plan: memory_plan.TextPlan, advance: Callable[..., None]
) -> Iterator[tuple[int, torch.Tensor]]:
    """(position in ``tokens``, prompt_embeds) of every caption of a chunk, as they are done."""
    from k5cache.encoders import qwen, streaming

    is_exact = job.config.text_batching == "exact"
    if plan.mode == "resident":
        return qwen.iter_prompt_embeds(encoder, tokens, exact=is_exact, batch_tokens=plan.batch_tokens)
    num_layers = len(encoder.model.layers)
    return streaming.stream_prompt_embeds(
        encoder,
        tokens,
        exact=is_exact,
        batch_tokens=plan.batch_tokens,
        parking=plan.parking,
        on_layer=lambda i: advance(0, f"Qwen2.5-VL: {len(tokens)} captions, layer {i + 1} of {num_layers}"),
    )


def _chunks(
    tokenizer: Any, text_jobs: Sequence[TextJob], max_sequence_length: int, chunk_tokens: int
) -> Iterator[tuple[int, list[Tokens]]]:
    """(position of the first caption, tokens) of captions that are encoded and committed together."""
    from k5cache.encoders import qwen

    first, chunk, num_tokens = 0, list[qwen.Tokens](), 0
    for i, text_job in enumerate(text_jobs):
        tokens = qwen.tokenize(tokenizer, text_job.caption, max_sequence_length)
        if chunk and num_tokens + len(tokens.ids) > chunk_tokens:
            yield first, chunk
            first, chunk, num_tokens = i, [], 0
        chunk.append(tokens)
        num_tokens += len(tokens.ids)
    if chunk:
        yield first, chunk
