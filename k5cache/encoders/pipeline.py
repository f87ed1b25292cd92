"""What does the installed diffusers pipeline do to text? The pipeline itself is asked; nothing of it is copied.

diffusers changed the template and its crop between releases, so both are read from the installed one. Token ids come
from the pipeline's own ``_encode_prompt_qwen``, run with a text encoder that only records its input.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from k5cache.shared.kind import Kind
from k5cache.shared.template import Template, installed_template

_MODULES = ("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "scheduler")


def prompt_template(kind: Kind = "t2i") -> Template:
    """The template and crop of the installed pipeline: from its source if that states them, else from the class."""
    return installed_template(kind) or pipeline_template(kind)


@functools.cache
def pipeline_template(kind: Kind = "t2i") -> Template:
    """The template and crop of the installed pipeline class. The first call imports diffusers: about 6 s."""
    pipe = empty_pipeline(kind)
    template = Template(pipe.prompt_template, pipe.prompt_template_encode_start_idx)
    assert installed_template(kind) in (None, template), "diffusers' source states another template than its class"
    return template


def clean(caption: str, kind: Kind = "t2i") -> str:
    """The caption as the pipeline tokenises it: ftfy (where installed), HTML unescaped twice, whitespace folded."""
    return cast(str, _module(kind).prompt_clean(caption))


def pipeline_token_ids(tokenizer: Any, caption: str, max_sequence_length: int) -> list[int]:
    """The ids that the pipeline would give its text encoder for one cleaned caption alone: template, no padding.

    The pipeline's truncation is odd, so it is not written a second time here: it cuts *characters* off the end of
    the templated text, as many as the removed tokens decode to, closing tag included, and tokenises the rest.
    """
    import torch

    seen: list[Any] = []

    def text_encoder(*, input_ids: Any, **_: Any) -> dict[str, list[Any]]:
        seen.append(input_ids)
        return {"hidden_states": [torch.zeros(*input_ids.shape, 1)]}

    pipe = empty_pipeline()
    vars(pipe).update(tokenizer=tokenizer, text_encoder=text_encoder)
    with silent(logger_name("t2i")):
        pipe._encode_prompt_qwen(
            prompt=[caption], device=torch.device("cpu"), max_sequence_length=max_sequence_length, dtype=torch.float32
        )
    (input_ids,) = seen
    return cast(list[int], input_ids[0].tolist())


@contextmanager
def silent(name: str) -> Iterator[None]:
    """Silence one logger whose messages we print ourselves or that do not concern the user."""
    logger = logging.getLogger(name)
    was_disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was_disabled


def logger_name(kind: Kind) -> str:
    """Through which the pipeline says what it cut off."""
    return f"diffusers.pipelines.kandinsky5.pipeline_kandinsky_{kind}"


def empty_pipeline(kind: Kind = "t2i") -> Any:
    """A pipeline without modules. Cheap: 0.1 ms."""
    return _pipeline_class(kind)(**dict.fromkeys(_MODULES))


@functools.cache
def _pipeline_class(kind: Kind) -> Callable[..., Any]:
    import diffusers

    name = {"t2i": "Kandinsky5T2IPipeline", "i2i": "Kandinsky5I2IPipeline"}[kind]
    return cast(Callable[..., Any], getattr(diffusers, name))


def _module(kind: Kind) -> Any:
    """The module that the pipeline is in, and its cleaning."""
    from diffusers.pipelines.kandinsky5 import pipeline_kandinsky_i2i, pipeline_kandinsky_t2i

    return {"t2i": pipeline_kandinsky_t2i, "i2i": pipeline_kandinsky_i2i}[kind]
