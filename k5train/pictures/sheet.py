"""How are pictures shown side by side on one labelled sheet?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from k5cache.shared.fonts import Font, font_for, wrap, write

LABEL_CHARACTERS = 22  # of a row, in a line


def grid(rows: Sequence[tuple[str, Sequence[Image.Image]]], columns: Sequence[str]) -> Image.Image:
    """One picture with labelled rows (the checkpoints) and columns (the prompts).

    Args:
        rows: a label, which is wrapped, and ``len(columns)`` pictures for each row. Large pictures are shown at 512
            pixels, and toy pictures are enlarged; the files beside the grid keep their size.
        columns: the text above each column: a prompt, which is wrapped, or a name in a line of its own and its prompt.
    """
    shown = [(label, [_resized(picture) for picture in pictures]) for label, pictures in rows]
    cell_width = max(160, *(p.width for _, pictures in shown for p in pictures))
    cell_height = max(p.height for _, pictures in shown for p in pictures)
    font_size = max(14, cell_width // 28)
    line, gap = font_size + 4, 6
    most = LABEL_CHARACTERS * font_for("n", font_size).getlength("n")
    labels = [_Text.of(label, font_size, most, 4) for label, _ in shown]
    label_width = 24 + max(int(label.font.getlength(text)) for label in labels for text in label.lines)
    headers = [_Head.of(text, font_size, cell_width - 8) for text in columns]
    header_height = 12 + line * max(len(head.name.lines) + len(head.prompt.lines) for head in headers)
    size = (label_width + len(columns) * (cell_width + gap), header_height + len(rows) * (cell_height + gap))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, head in enumerate(headers):
        left = label_width + column * (cell_width + gap)
        write(draw, (left, 6), head.name.lines, "black", head.name.font, line)
        below = 6 + line * len(head.name.lines)
        write(draw, (left, below), head.prompt.lines, "#666666" if head.name.lines else "black", head.prompt.font, line)
    for row, (label, (_, pictures)) in enumerate(zip(labels, shown, strict=True)):
        top = header_height + row * (cell_height + gap)
        middle = top + cell_height // 2 - len(label.lines) * line // 2
        write(draw, (10, middle), label.lines, "black", label.font, line)
        for column, picture in enumerate(pictures):
            sheet.paste(picture, (label_width + column * (cell_width + gap), top))
    return sheet


def _resized(picture: Image.Image, largest: int = 512, smallest: int = 192) -> Image.Image:
    side = max(picture.size)
    if side > largest:
        return picture.resize(
            (picture.width * largest // side, picture.height * largest // side), Image.Resampling.LANCZOS
        )
    times = max(1, smallest // side)
    return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)


@dataclass(frozen=True)
class _Text:
    """Lines in the font that has their letters."""

    lines: list[str]
    font: Font

    @classmethod
    def of(cls, text: str, size: int, width: float, most: int) -> _Text:
        font = font_for(text, size)
        return cls(wrap(text, font, width, most), font)


@dataclass(frozen=True)
class _Head:
    """What stands above a column: a prompt in at most four lines; or its name in one, and the prompt in at most three,
    in grey."""

    name: _Text
    """Without lines if there is no name."""
    prompt: _Text

    @classmethod
    def of(cls, text: str, size: int, width: float) -> _Head:
        name, line_break, prompt = text.partition("\n")
        if not line_break:
            return cls(_Text([], font_for("", size)), _Text.of(text or "(the empty prompt)", size, width, 4))
        return cls(_Text.of(name, size, width, 1), _Text.of(prompt or "(the empty prompt)", size, width, 3))
