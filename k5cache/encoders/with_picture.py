"""What does the image-to-image pipeline give its text encoder for an instruction and a picture? The pipeline is asked.

``Kandinsky5I2IPipeline`` halves the picture, and a ``Qwen2VLProcessor`` cuts it into patches and writes as many picture
tokens into the template. Both run here as they are installed, except that the processor gets an image processor of
Pillow instead of torchvision. What the pipeline cannot encode, because too many tokens are left for its limit, cannot
be drawn with either: it is refused with the reason.
"""

from __future__ import annotations

import functools
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k5cache.encoders.pipeline import empty_pipeline, logger_name, pipeline_template, silent
from k5cache.encoders.qwen import Place, Tokens, cut_off, load_tokenizer
from k5cache.shared.errors import ModelError
from k5cache.shared.preprocessor import preprocessor_values

if TYPE_CHECKING:
    import torch
    from PIL import Image

PICTURE_TOKENS = ("<|image_pad|>", "<|video_pad|>")
_LONG = 2**20  # tokens: no limit, where only the patches are wanted
_MODEST = 64  # tokens of an instruction of one or two sentences
_MOST_OVER = 16  # tokens over the limit that the pipeline may get away with, by cutting its own closing tags
Grid = tuple[int, int, int]
"""Patches of a picture: frames (1), rows, columns. The text encoder gets one token for four of them."""


class CannotEncode(Exception):
    """An instruction with a picture that the pipeline fails on. Caught where pairs are looped over."""

    def __init__(self, reason: str) -> None:
        """``reason``: what is said after the source's name."""
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Seen:
    """A picture as the vision tower takes it."""

    patches: torch.Tensor
    """``[rows * columns, 1176]`` float32: of each patch, two equal frames of 14x14 pixels."""
    grid: Grid


@dataclass(frozen=True)
class Processor:
    """The tokenizer and the image processor of an image-to-image checkpoint."""

    whole: Any
    """``Qwen2VLProcessor``, its image processor ``Qwen2VLImageProcessorPil``."""
    num_around: int
    """Tokens of the template without instruction and picture."""

    @property
    def tokenizer(self) -> Any:
        """Qwen's tokenizer."""
        return self.whole.tokenizer

    def grid_of(self, width: int, height: int) -> Grid:
        """The patches of a picture of this size. Raises ``CannotEncode`` if the processor takes no such picture."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        images = self.whole.image_processor
        patch, factor = images.patch_size, images.patch_size * images.merge_size
        if min(width, height) < 2:
            raise CannotEncode(f"is {width}x{height} pixels, and Kandinsky5I2IPipeline halves it")
        try:
            rows, columns = smart_resize(
                height // 2,
                width // 2,
                factor=factor,
                min_pixels=images.size["shortest_edge"],
                max_pixels=images.size["longest_edge"],
            )
        except ValueError as error:  # longer than 200 times its width
            raise CannotEncode(f"is {width}x{height} pixels, too long and thin: {error}") from error
        return 1, rows // patch, columns // patch

    def num_tokens(self, grid: Grid) -> int:
        """Tokens that a picture of this grid takes in the text."""
        return grid[0] * grid[1] * grid[2] // int(self.whole.image_processor.merge_size) ** 2


def load_processor(folder: Path) -> Processor:
    """The processor of ``folder/tokenizer``.

    Raises:
        ModelError: the tokenizer or the preprocessor's config is missing or cannot be read.
    """
    from PIL import Image

    values = preprocessor_values(folder)
    try:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    except ImportError as error:
        raise ModelError(
            "The installed transformers has no Qwen2VLImageProcessorPil, which image-to-image needs",
            "Upgrade: pip install -U transformers",
        ) from error
    tokenizer = load_tokenizer(folder)
    around = tokenizer(text=pipeline_template("i2i").text.format(""))["input_ids"]
    try:
        images = Qwen2VLImageProcessorPil(**values)
        processor = Processor(_processor_class()(images, tokenizer, None), len(around) - 1)
        if see(processor, Image.new("RGB", (200, 120))).grid != processor.grid_of(200, 120):
            raise ValueError("it cuts a picture into other patches than it says")
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        raise ModelError(
            f"The preprocessor's config in {folder / 'tokenizer'} is not one of Qwen2.5-VL: {str(error)[:200]}",
            "Download the model again",
        ) from error
    return processor


def see(processor: Processor, picture: Image.Image) -> Seen:
    """Halve a picture and cut it into patches.

    Args:
        picture: RGB, as a user would hand it to the pipeline.
    """
    # The pipeline calls the processor twice with one picture; the work is done once.
    once = _Once(processor.whole.image_processor)
    inputs = _inputs(_processor_class()(once, processor.tokenizer, None), picture, "", _LONG)
    frames, rows, columns = inputs["image_grid_thw"][0].tolist()
    return Seen(inputs["pixel_values"], (frames, rows, columns))


def tokenize_with_picture(processor: Processor, instruction: str, grid: Grid, max_sequence_length: int) -> Tokens:
    """Token ids of one cleaned instruction with a picture of this grid, cut where the pipeline cuts.

    Raises:
        CannotEncode: the pipeline fails on it.
    """
    from PIL import Image

    for token in PICTURE_TOKENS:
        if token in instruction:
            raise CannotEncode(f"has an instruction with {token}, which stands for a picture")
    template, count = pipeline_template("i2i"), processor.num_tokens(grid)
    room = template.encode_start_idx + max_sequence_length - processor.num_around
    is_near = not surely_fits(processor, instruction, grid, max_sequence_length)
    words = processor.tokenizer(text=template.text.format(instruction))["input_ids"] if is_near else []
    num_words = len(words) - processor.num_around - 1
    too_long = _too_long(processor, grid, room, num_words) if num_words + count > room else ""
    if num_words + count > room + _MOST_OVER:  # known without the work; nearer to the limit the pipeline is asked
        raise CannotEncode(too_long)
    whole = _processor_class()(_OnlyGrid(processor.whole.image_processor, grid), processor.tokenizer, None)
    try:
        ids = _inputs(whole, Image.new("RGB", (2, 2)), instruction, max_sequence_length)["input_ids"][0].tolist()
    except ValueError as error:
        raise CannotEncode(too_long or str(error)) from error
    start = ids.index(whole.image_token_id)
    truncated = ""
    if too_long:
        shortened = [*ids[:start], *ids[start + count - 1 :]]
        truncated = cut_off(processor.tokenizer, template.text, instruction, shortened)
    return Tokens(ids, len(ids) - template.encode_start_idx, truncated, Place(start, count, grid))


def surely_fits(processor: Processor, instruction: str, grid: Grid, max_sequence_length: int) -> bool:
    """Whether an instruction is so short that it fits, without tokenising it: a token has at least a byte."""
    room = pipeline_template("i2i").encode_start_idx + max_sequence_length - processor.num_around
    num_bytes = len(unicodedata.normalize("NFC", instruction).encode(errors="replace"))
    return "<|" not in instruction and processor.num_tokens(grid) + num_bytes <= room


def nothing_survives(tokens: Tokens) -> bool:
    """Whether Qwen's embeddings lack the whole instruction: the pipeline crops more tokens than its template has."""
    return tokens.place is not None and tokens.place.start - 1 <= pipeline_template("i2i").encode_start_idx


def _too_long(processor: Processor, grid: Grid, room: int, num_words: int) -> str:
    count = processor.num_tokens(grid)
    modest = min(_MODEST, room // 2)
    if count + min(num_words, modest) > room:
        width, height = _largest(processor, grid, room - modest)
        return (
            f"takes {count} tokens of the {room} that Kandinsky5I2IPipeline has for source and instruction: "
            f"the largest picture of its shape that leaves {modest} is {width}x{height}"
        )
    return (
        f"takes {count} tokens, and its instruction of {num_words} tokens is {count + num_words - room} too long: "
        "Kandinsky5I2IPipeline fails on them instead of cutting"
    )


def _largest(processor: Processor, grid: Grid, room: int) -> tuple[int, int]:
    """The largest picture of about this shape with at most ``room`` tokens, both sides multiples of 16."""
    _, rows, columns = grid
    images = processor.whole.image_processor
    for side in range(max(rows, columns) * images.patch_size * 2 // 16 * 16, 16, -16):
        width = side if columns >= rows else max(16, round(side * columns / rows / 16) * 16)
        height = side if rows > columns else max(16, round(side * rows / columns / 16) * 16)
        if processor.num_tokens(processor.grid_of(width, height)) <= room:
            return width, height
    return 16, 16


def _inputs(whole: Any, picture: Image.Image, instruction: str, max_sequence_length: int) -> dict[str, Any]:
    """What the pipeline would give its text encoder for one cleaned instruction."""
    import torch

    seen: list[dict[str, Any]] = []

    def text_encoder(**inputs: Any) -> dict[str, list[Any]]:
        seen.append(inputs)
        return {"hidden_states": [torch.zeros(*inputs["input_ids"].shape, 1)]}

    pipe = empty_pipeline("i2i")
    vars(pipe).update(tokenizer=whole, text_encoder=text_encoder)
    with silent(logger_name("i2i")):
        pipe._encode_prompt_qwen(
            prompt=[instruction],
            image=[picture],
            device=torch.device("cpu"),
            max_sequence_length=max_sequence_length,
            dtype=torch.float32,
        )
    (inputs,) = seen
    return inputs


class _Once:
    """An image processor that answers the second time as the first."""

    def __init__(self, images: Any) -> None:
        self.merge_size, self.valid_kwargs, self._images = images.merge_size, images.valid_kwargs, images
        self._result: Any = None

    def fetch_images(self, pictures: Any) -> Any:
        return pictures

    def __call__(self, pictures: Any, **kwargs: Any) -> Any:
        if self._result is None:
            self._result = self._images(pictures, **kwargs)
        return dict(self._result)


class _OnlyGrid:
    """An image processor that knows the grid already and looks at no picture."""

    def __init__(self, images: Any, grid: Grid) -> None:
        self.merge_size, self.valid_kwargs, self._grid = images.merge_size, images.valid_kwargs, grid

    def fetch_images(self, pictures: Any) -> Any:
        return pictures

    def __call__(self, pictures: Any, **kwargs: Any) -> dict[str, Any]:
        import torch

        return {"image_grid_thw": torch.tensor([self._grid])}


@functools.cache
def _processor_class() -> Any:
    """``Qwen2VLProcessor`` that takes our image processors and no video processor, which needs torchvision."""
    from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor

    class Without(Qwen2VLProcessor):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return type(argument)

    return Without


def as_picture(pixels: torch.Tensor) -> Image.Image:
    """uint8 ``[3, H, W]`` as Pillow has it."""
    from PIL import Image

    return Image.fromarray(pixels.permute(1, 2, 0).numpy())
