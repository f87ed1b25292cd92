"""How are pictures shown side by side on one labelled sheet?"""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont


def grid(rows: Sequence[tuple[str, Sequence[Image.Image]]], columns: Sequence[str]) -> Image.Image:
    """One picture with labelled rows (the checkpoints) and columns (the prompts).

    Args:
        rows: a label and ``len(columns)`` pictures for each row. Large pictures are shown at 512 pixels, and toy
            pictures are enlarged; the files beside the grid keep their size.
        columns: the text above each column, which is wrapped.
    """
    shown = [(label, [_resized(picture) for picture in pictures]) for label, pictures in rows]
    cell_width = max(160, *(p.width for _, pictures in shown for p in pictures))
    cell_height = max(p.height for _, pictures in shown for p in pictures)
    font_size = max(14, cell_width // 28)
    font = ImageFont.load_default(font_size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # Pillow's wheels always have FreeType
    line, gap = font_size + 4, 6
    label_width = 24 + max(int(font.getlength(label)) for label, _ in shown)
    headers = [_wrap(text, font, cell_width - 8) for text in columns]
    header_height = 12 + line * max(len(lines) for lines in headers)
    size = (label_width + len(columns) * (cell_width + gap), header_height + len(rows) * (cell_height + gap))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, lines in enumerate(headers):
        left = label_width + column * (cell_width + gap)
        draw.multiline_text((left, 6), "\n".join(lines), "black", font, spacing=4)
    for row, (label, pictures) in enumerate(shown):
        top = header_height + row * (cell_height + gap)
        draw.text((10, top + cell_height // 2 - line // 2), label, "black", font)
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


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: float, max_lines: int = 4) -> list[str]:
    lines = [""]
    for word in (text or "(the empty prompt)").split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines if len(lines) <= max_lines else [*lines[: max_lines - 1], f"{lines[max_lines - 1]} ..."]
