"""What the installed diffusers pipeline says about text: asked of the class itself, never copied.

diffusers changed the template and its crop between releases, so both are read off a pipeline without modules, and
token ids come from the pipeline's own ``_encode_prompt_qwen`` run over a text encoder that only takes notes.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

_MODULES = ("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "scheduler")


@dataclass(frozen=True)
class PipelineFacts:
    """What ``Kandinsky5T2IPipeline`` of the installed diffusers does to a caption, and under which libraries."""

    prompt_template: str
    """The text around the caption, with one ``{}``."""
    encode_start_idx: int
    """Tokens of the template that are cropped off the front of the hidden states."""
    resolutions: tuple[tuple[int, int], ...]
    """Native (width, height) in pixels."""
    diffusers: str
    ftfy: str | None
    """Its version; None where it is not installed, and then captions are not mended before tokenising."""


@functools.cache
def pipeline_facts() -> PipelineFacts:
    """Read the facts off the installed pipeline. The first call imports diffusers: about 6 s."""
    pipe = _empty_pipeline()
    return PipelineFacts(
        prompt_template=pipe.prompt_template,
        encode_start_idx=pipe.prompt_template_encode_start_idx,
        resolutions=tuple((int(w), int(h)) for w, h in pipe.resolutions),
        diffusers=importlib.metadata.version("diffusers"),
        ftfy=_version("ftfy"),
    )


def clean(caption: str) -> str:
    """The caption as the pipeline tokenises it: ftfy (where installed), HTML unescaped twice, whitespace folded."""
    from diffusers.pipelines.kandinsky5 import pipeline_kandinsky_t2i

    return cast(str, pipeline_kandinsky_t2i.prompt_clean(caption))


def pipeline_token_ids(tokenizer: Any, caption: str, max_sequence_length: int) -> list[int]:
    """The ids that the pipeline would give its text encoder for one cleaned caption alone: template, no padding.

    Its truncation is odd and so is not written out again here: it cuts *characters* off the end of the templated
    text, as many as the removed tokens decode to, closing tag included, and tokenises what is left.
    """
    import torch

    seen: list[Any] = []

    def text_encoder(*, input_ids: Any, **_: Any) -> dict[str, list[Any]]:
        seen.append(input_ids)
        return {"hidden_states": [torch.zeros(*input_ids.shape, 1)]}

    pipe = _empty_pipeline()
    vars(pipe).update(tokenizer=tokenizer, text_encoder=text_encoder)
    with silent("diffusers.pipelines.kandinsky5.pipeline_kandinsky_t2i"):
        pipe._encode_prompt_qwen(
            prompt=[caption], device=torch.device("cpu"), max_sequence_length=max_sequence_length, dtype=torch.float32
        )
    (input_ids,) = seen
    return cast(list[int], input_ids[0].tolist())


@contextmanager
def silent(name: str) -> Iterator[None]:
    """Hold back one logger: where what it says is said once, in our words, or is no one's concern."""
    logger = logging.getLogger(name)
    was_disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was_disabled


def _empty_pipeline() -> Any:
    """A pipeline without modules. Cheap: 0.1 ms."""
    return _pipeline_class()(**dict.fromkeys(_MODULES))


@functools.cache
def _pipeline_class() -> Callable[..., Any]:
    from diffusers import Kandinsky5T2IPipeline

    return cast(Callable[..., Any], Kandinsky5T2IPipeline)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
