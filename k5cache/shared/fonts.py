"""In which font is a text drawn on a picture? The first one that has all its letters. Every sheet and chart asks here.

1. Pillow's own font, Aileron, so that a sheet in English looks the same on every machine. It has ASCII letters only.
2. Noto Sans CJK of the package noto-cjk-sans-otc, if it is installed: Latin, Greek, Cyrillic, Chinese, Japanese and
   Korean in one file, under the SIL Open Font License 1.1. It is the extra ``fonts`` and no dependency: it is a
   download of 15.5 MB, and an install should not fail if one person's package disappears.
3. Fonts of the system, by the names that they usually have on Linux, Windows and macOS. Only Linux was tried.

If no font has all letters, the one that lacks the fewest draws the text, with a box for each that it lacks, and one
warning names the package if that would help. A text has one font, so an emoji in a Chinese prompt may be such a box.

Text from right to left and combining marks are drawn as Pillow does it: right if libraqm and FriBiDi are there, and
otherwise letter by letter from left to right.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from PIL import ImageDraw, ImageFont

from k5cache.shared import console

Font = ImageFont.FreeTypeFont
PACKAGE, INSTALL = "noto_cjk_sans_otc", 'pip install "kandinsky5-lora[fonts]"'
COLLECTION = "NotoSansCJK-Regular.ttc"
FACES = {"HIRAGANA": 0, "KATAKANA": 0, "HANGUL": 1}
"""Script -> face of the collection. All faces have all letters, but each draws ideographs as its country does."""
CHINESE = 2  # simplified; nothing in a text tells reliably that it is traditional
SYSTEM = (
    "DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "Arial.ttf", "arial.ttf",
    COLLECTION, "wqy-microhei.ttc", "wqy-zenhei.ttc", "DroidSansFallbackFull.ttf",
    "msyh.ttc", "YuGothM.ttc", "malgun.ttf",
    "Arial Unicode.ttf", "PingFang.ttc", "Hiragino Sans GB.ttc", "AppleSDGothicNeo.ttc",
)  # fmt: skip
HELPED = ("CYRILLIC", "GREEK", "CJK", "HIRAGANA", "KATAKANA", "HANGUL")
"""How the Unicode names of letters begin that the package draws."""
_INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff\ufe0e\ufe0f"  # joiners and variation selectors
_IDEOGRAPHIC = r"\u2e80-\u312f\u3190-\ua4cf\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"
_STAYS = "、。，．：；！？）」』】》〉”’…ーぁぃぅぇぉっゃゅょ"  # does not begin a line
_UNITS = re.compile(rf"(?:[{_IDEOGRAPHIC}]|[^\s{_IDEOGRAPHIC}]+)[{_STAYS}]*")


def font_for(text: str, size: int) -> Font:
    """The font that draws a text, ``size`` pixels high."""
    letters = {letter for letter in text if not letter.isspace() and letter not in _INVISIBLE}
    chosen, lacking = _PILLOW, _lacking(_PILLOW, letters)
    if lacking:
        for candidate in _candidates():
            others = _lacking(candidate, letters)
            if len(others) < len(lacking):
                chosen, lacking = candidate, others
            if not lacking:
                break
    _warn_of(lacking)
    return _open(chosen, size, _face(text) if chosen.endswith(COLLECTION) else 0)


def fitting(text: str, of_font: Font, width: float) -> str:
    """The text, cut at the end if it is wider than ``width`` pixels."""
    if of_font.getlength(text) <= width:
        return text
    fits = bisect_right(range(len(text)), width, key=lambda length: of_font.getlength(f"{text[:length]} ..."))
    return f"{text[: max(0, fits - 1)].rstrip()} ..."


def wrap(text: str, of_font: Font, width: float, most: int) -> list[str]:
    """A text in at most ``most`` lines of at most ``width`` pixels; a longer one ends in dots.

    Lines break at spaces, and between any two letters of Chinese and Japanese, which have none.
    """
    lines = [""]
    for unit in _units(text, of_font, width):
        longer = f"{lines[-1]}{unit}".lstrip()
        if of_font.getlength(longer.rstrip()) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(unit.lstrip())
        if len(lines) > most:
            shown = [line.rstrip() for line in lines[:most]]
            return [*shown[:-1], _ending(shown[-1], of_font, width)]
    return [line.rstrip() for line in lines]


def write(
    draw: ImageDraw.ImageDraw, at: tuple[float, float], lines: Sequence[str], colour: str, font: Font, line: int
) -> None:
    """Draw lines below each other, ``line`` pixels apart, on the baselines that Pillow's own font would have."""
    ascent = _open(_PILLOW, round(font.size)).getmetrics()[0]
    for number, text in enumerate(lines):
        draw.text((at[0], at[1] + number * line + ascent), text, colour, font, anchor="ls")


def _units(text: str, of_font: Font, width: float) -> Iterator[str]:
    """The pieces between which a line may break, each with the space that precedes it."""
    end = 0
    for match in _UNITS.finditer(text):
        space, unit = " " * (match.start() > end), match[0]
        end = match.end()
        while of_font.getlength(unit) > width and len(unit) > 1:  # a word that is wider than a line
            fits = bisect_right(range(1, len(unit)), width, key=lambda n: of_font.getlength(unit[:n]))
            yield space + unit[: max(1, fits)]
            space, unit = "", unit[max(1, fits) :]
        yield space + unit


def _ending(line: str, of_font: Font, width: float) -> str:
    """The last line of a text that goes on."""
    while line and of_font.getlength(f"{line} ...") > width:
        line = line[:-1]
    return f"{line.rstrip()} ..."


_PILLOW = ""  # in place of a path


@cache
def _candidates() -> tuple[str, ...]:
    """Paths and names of the fonts that can be opened, in their order."""
    package = find_spec(PACKAGE)
    folders = package.submodule_search_locations if package else None
    packaged = [str(Path(folder) / COLLECTION) for folder in folders or ()]
    return tuple(name for name in (*packaged, *SYSTEM) if _can_open(name))


def _can_open(name: str) -> bool:
    try:
        _open(name, _PROBE)
    except OSError:
        return False
    return True


@cache
def _open(name: str, size: int, face: int = 0) -> Font:
    loaded = ImageFont.truetype(name, size, face) if name else ImageFont.load_default(size)
    assert isinstance(loaded, ImageFont.FreeTypeFont)  # Pillow's wheels always have FreeType
    return loaded


_PROBE = 24  # pixels at which glyphs are compared


def _lacking(name: str, letters: set[str]) -> set[str]:
    return {letter for letter in letters if not _has(name, letter)}


@cache
def _has(name: str, letter: str) -> bool:
    """Whether a font draws a letter otherwise than U+FFFF, which is no character and gets the box of a missing one."""
    return _drawn(name, letter) != _drawn(name, "\uffff")


@cache
def _drawn(name: str, letter: str) -> tuple[tuple[int, int], bytes]:
    mask = _open(name, _PROBE).getmask(letter)
    return mask.size, bytes(mask)


def _face(text: str) -> int:
    scripts = (unicodedata.name(letter, "").split(" ")[0] for letter in text)
    return next((FACES[script] for script in scripts if script in FACES), CHINESE)


def _warn_of(lacking: set[str]) -> None:
    """Say once what would draw the letters that are boxes now."""
    is_helped = any(unicodedata.name(letter, "").startswith(HELPED) for letter in lacking)
    if is_helped and not find_spec(PACKAGE):
        _warn_once()


@cache
def _warn_once() -> None:
    console.warn(f"Some letters of the text on pictures are boxes, because no font here has them. Run: {INSTALL}")
