"""How are pictures shown side by side on one labelled sheet?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from PIL import Image, ImageDraw, ImageFont

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
    font = ImageFont.load_default(font_size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # Pillow's wheels always have FreeType
    line, gap = font_size + 4, 6
    labels = [_wrap(label, font, LABEL_CHARACTERS * font.getlength("n")) for label, _ in shown]
    label_width = 24 + max(int(font.getlength(text)) for lines in labels for text in lines)
    headers = [_head(text, font, cell_width - 8) for text in columns]
    header_height = 12 + line * max(len(lines) for lines in headers)
    size = (label_width + len(columns) * (cell_width + gap), header_height + len(rows) * (cell_height + gap))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, lines in enumerate(headers):
        left = label_width + column * (cell_width + gap)
        draw.multiline_text((left, 6), "\n".join(lines), "black", font, spacing=4)
        if "\n" in columns[column]:  # below its name, a prompt is grey
            draw.rectangle((left, 6 + line, left + cell_width, header_height - 1), "white")
            draw.multiline_text((left, 6 + line), "\n".join(lines[1:]), "#666666", font, spacing=4)
    for row, (lines, (_, pictures)) in enumerate(zip(labels, shown, strict=True)):
        top = header_height + row * (cell_height + gap)
        middle = top + cell_height // 2 - len(lines) * line // 2
        draw.multiline_text((10, middle), "\n".join(lines), "black", font, spacing=4)
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


def _head(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """A prompt in at most four lines; or its name in one, and the prompt in at most three."""
    name, line_break, prompt = text.partition("\n")
    return [*_wrap(name, font, width, 1), *_wrap(prompt, font, width, 3)] if line_break else _wrap(text, font, width)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: float, max_lines: int = 4) -> list[str]:
    lines = [""]
    for word in _broken((text or "(the empty prompt)").split(), font, width):
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
        if len(lines) > max_lines:
            return [*lines[: max_lines - 1], _ending(lines[max_lines - 1], font, width)]
    return lines


def _broken(words: Sequence[str], font: ImageFont.FreeTypeFont, width: float) -> Iterator[str]:
    """Words, those that are wider than a line in pieces."""
    for word in words:
        rest = word
        while font.getlength(rest) > width and len(rest) > 1:
            count = next(n for n in range(min(len(rest), 200), 0, -1) if n == 1 or font.getlength(rest[:n]) <= width)
            yield rest[:count]
            rest = rest[count:]
        yield rest


def _ending(line: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The last line of a text that goes on."""
    while line and font.getlength(f"{line} ...") > width:
        line = line[:-1]
    return f"{line.rstrip()} ..."
