"""The text encoders over every new caption: CLIP first, then Qwen, which writes each row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from tempfile import SpooledTemporaryFile
from typing import IO, TYPE_CHECKING, Any

from k5cache.encode import estimate, plan
from k5cache.encode.commit import Committer
from k5cache.encode.job import DTYPES, Job, _bar, _dtype, _in_background, _numbers
from k5cache.encode.one_encoder import alone
from k5cache.encoders import memory_plan
from k5cache.shared import console
from k5cache.store.tensors import TensorSpec, from_bytes, to_bytes

if TYPE_CHECKING:
    import torch

    from k5cache.encoders.qwen import Qwen, Tokens


_POOLED_IN_MEMORY = 2**26  # bytes of pooled vectors, 40,000 captions, past which they go to a file


_TOGETHER = 50_000  # captions through CLIP before Qwen begins: minutes of a GPU


_TRIED_IN_BOTH = 4  # captions that the error of an int8 text encoder is measured on


def encode_texts(job: Job, commit: Committer, jobs: Sequence[plan.TextJob]) -> tuple[tuple[str, int], ...]:
    """CLIP over new captions, then Qwen, which writes each row as it comes. Returns the captions that were cut.

    CLIP goes first because its vectors are small (1.5 KB a caption): Qwen's (2 MB) then never pile up in memory. They
    are kept by Qwen's rows alone, so of a million captions CLIP takes no more at once than a kill may cost.

    Raises:
        DoesNotFit: the card cannot hold two layers of the text encoder and a caption.
    """
    if not jobs:
        return ()
    from k5cache.encoders import speed

    lengths = speed.text_lengths((one.caption for one in jobs), job.config.max_sequence_length)
    made = estimate.plan_text(job.folder, job.config, job.device, job.vram, lengths)
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
    from k5cache.encoders.pipeline import pipeline_template

    pipeline_template()  # imports diffusers, whose lazy modules break when two threads are the first to ask
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
