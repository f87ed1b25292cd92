"""Are prompts in any script drawn with their letters, and wrapped where that script breaks?"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from k5cache.shared import fonts
from k5train.pictures import sheet

PROMPTS = {
    "Russian": "маяк", "Chinese": "一座灯塔", "Japanese": "崖の灯台", "Korean": "절벽", "mixed": "a cat, кот, 猫",
}  # fmt: skip


@pytest.fixture
def bare(monkeypatch):
    """A machine without the package and without fonts."""
    caches = (fonts._candidates, fonts._can_open, fonts._warn_once)
    for cached in caches:
        getattr(cached, "cache_clear", lambda: None)()
    monkeypatch.setattr(fonts, "find_spec", lambda name: None)
    monkeypatch.setattr(fonts, "SYSTEM", ())
    yield monkeypatch
    for cached in caches:
        getattr(cached, "cache_clear", lambda: None)()


def test_a_letter_is_missing_where_its_drawing_is_the_box_of_no_character():
    assert fonts._lacking(fonts._PILLOW, set("Az,9")) == set()
    assert fonts._lacking(fonts._PILLOW, set("aéя猫절🐱")) == set("éя猫절🐱")


def test_english_text_has_the_same_font_on_every_machine():
    assert fonts.font_for("a lighthouse, 1.5 [~]", 14).getname() == ("Aileron", "Regular")


def test_the_first_font_with_all_letters_draws_a_text_and_without_one_that_which_lacks_fewest(bare):
    has = {fonts._PILLOW: "ab", "latin": "abc", "both": "abя", "all": "abcя"}
    opened = []
    bare.setattr(fonts, "_candidates", lambda: ("latin", "both", "all"))
    bare.setattr(fonts, "_has", lambda name, letter: letter in has[name])
    bare.setattr(fonts, "_open", lambda name, size, face: opened.append(name))
    for text in ("a b", "ac", "bя", "cя", "ab猫", "abя\u200d猫"):
        fonts.font_for(text, 14)
    assert opened == [fonts._PILLOW, "latin", "both", "all", fonts._PILLOW, "both"]


def test_without_a_font_boxes_are_drawn_and_one_warning_says_what_to_install(bare, capsys):
    pictures = [Image.new("RGB", (160, 160), "red")]
    for text in (*PROMPTS.values(), "\0\x07\ud800\U0010ffff", "猫" * 3000, ""):
        assert sheet.grid([(text, pictures)], [text]).width > 160
    assert " ".join(capsys.readouterr().err.split()) == (
        "warning: Some letters of the text on pictures are boxes, because no font here has them."
        ' Run: pip install "kandinsky5-lora[fonts]"'
    )


def test_nothing_is_said_of_letters_that_the_package_does_not_draw_either(bare, capsys):
    fonts.font_for("مرحبا 🐱", 14)
    assert capsys.readouterr().err == ""


def test_the_package_draws_every_script_in_the_face_of_its_country():
    pytest.importorskip(fonts.PACKAGE, reason="the extra 'fonts' is not installed")
    fonts._candidates.cache_clear()
    faces = {
        "Russian": "Noto Sans CJK SC", "Chinese": "Noto Sans CJK SC", "Japanese": "Noto Sans CJK JP",
        "Korean": "Noto Sans CJK KR", "mixed": "Noto Sans CJK SC",
    }  # fmt: skip
    packaged = fonts._candidates()[0]
    assert Path(packaged).name == fonts.COLLECTION
    for script, text in PROMPTS.items():
        assert fonts._lacking(packaged, set(text) - {" "}) == set(), script
        assert fonts.font_for(text, 14).getname()[0] == faces[script]


def test_a_line_breaks_at_spaces_and_between_ideographs_and_not_before_their_punctuation():
    font = fonts.font_for("", 20)
    box = font.getlength("猫")  # a box, as wide as every other: the rules of breaking need no font with the letters
    assert fonts.wrap("two words", font, 500, 4) == ["two words"]
    assert fonts.wrap("灯塔矗立在悬崖", font, 3 * box, 4) == ["灯塔矗", "立在悬", "崖"]
    assert fonts.wrap("灯塔矗，立在", font, 3 * box, 4) == ["灯塔", "矗，立", "在"]
    assert fonts.wrap("a cat 灯塔矗", font, font.getlength("a cat 灯"), 4) == ["a cat 灯", "塔矗"]
    assert fonts.wrap("가나 다라", font, font.getlength("가나 다"), 4) == ["가나", "다라"]  # Korean has spaces
    assert fonts.wrap("", font, 500, 4) == [""]


def test_long_captions_are_wrapped_and_cut_with_dots_in_any_script():
    font = fonts.font_for("", 13)
    for text in ("word " * 200, "語" * 400, "a" * 900):
        lines = fonts.wrap(text, font, 256, 4)
        assert len(lines) == 4
        assert lines[-1].endswith(" ...")
        assert all(font.getlength(line) <= 256 for line in lines)


def test_a_line_that_is_too_long_is_cut():
    font = fonts.font_for("", 12)
    assert fonts.fitting("short", font, 100) == "short"
    cut = fonts.fitting("a run with a very long name", font, 100)
    assert cut.endswith(" ...")
    assert font.getlength(cut) <= 100


def test_texts_in_different_fonts_stand_on_one_baseline():
    bottoms = []
    for font in (fonts.font_for("", 20), *(fonts._open(name, 20) for name in fonts._candidates()[:2])):
        picture = Image.new("L", (60, 60))
        fonts.write(ImageDraw.Draw(picture), (5, 5), ["H"], "white", font, 24)
        bottoms.append(int(np.flatnonzero(np.asarray(picture).any(axis=1)).max()))
    assert max(bottoms) - min(bottoms) <= 1  # rounding of the outlines to pixels
    assert bottoms[0] == 5 + fonts.font_for("", 20).getmetrics()[0] - 1


def test_a_font_file_that_cannot_be_read_is_passed_over(tmp_path):
    broken = tmp_path / "broken.ttf"
    broken.write_bytes(os.urandom(2000))
    assert not fonts._can_open(str(broken))
    assert not fonts._can_open("no-such-font.ttf")
    assert fonts._can_open(fonts._PILLOW)
