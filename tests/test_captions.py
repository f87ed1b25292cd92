"""Which captions does an image get of the files beside it, and what is encoded of them?"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import fields, replace

import pytest

from k5cache.options import CacheConfig
from k5cache.shared.errors import CacheStale, DatasetError, RecipeError
from k5cache.shared.recipe import parse
from k5cache.sources.find import find
from k5cache.sources.variants import variants
from tests.table_files import png, tar
from tests.workshop import Workshop


def put(root, **texts):
    """Images with caption files: ``cat_txt="a cat"`` is ``cat.txt`` beside ``cat.jpg``."""
    for name, text in texts.items():
        stem, _, suffix = name.partition("_")
        (root / f"{stem}.jpg").touch()
        (root / f"{stem}.{suffix}").write_text(text, encoding="utf-8")
    return root


def captions(source, kind="t2i", **options):
    """The captions of every image by its name."""
    return {item.path.partition(".")[0]: item.captions for item in find(source, CacheConfig(**options), kind).items}


def of(text, **options):
    """What one caption becomes."""
    return variants(text, **{"shuffle": False, "keep": 0, "wildcards": False, "most": 4, **options})


# Which file is read


def test_captions_are_in_txt_else_in_caption_else_in_a_field_of_json(tmp_path):
    put(tmp_path, a_txt="t", a_caption="c", a_json='{"caption": "j"}', b_caption="c", b_json='{"caption": "j"}')
    put(tmp_path, c_json='{"tags": ["x"], "text": "j"}', d_json='["one\\nline", "two"]', e_json='"plain"')
    found = find(tmp_path, CacheConfig())
    assert {item.path: item.captions for item in found.items} == {
        "a.jpg": ("t",), "b.jpg": ("c",), "c.jpg": ("j",), "d.jpg": ("one\nline", "two"), "e.jpg": ("plain",),
    }  # fmt: skip
    assert found.notices == (
        "1 image has no .txt: captions are read from .caption files",
        "3 images have no .txt: captions are read from .json files",
        "1 image has a .caption file that is not read: cache.caption_extension = caption reads it instead",
    )
    assert found.num_multiline == 0  # a list in JSON is meant to be several captions


def test_a_chosen_extension_is_the_only_one_that_is_read(tmp_path):
    put(tmp_path, a_txt="t", a_caption="c", b_txt="t", c_tags="g")
    assert captions(tmp_path, caption_extension=".Caption") == {"a": ("c",)}
    assert captions(tmp_path, caption_extension="tags") == {"c": ("g",)}
    put(tmp_path, d_json='{"meta": {"de": "eine Katze"}}', e_json='{"meta": 1}')
    assert captions(tmp_path, caption_extension="json", caption_column="meta.de") == {"d": ("eine Katze",)}
    reasons = {s.path: s.reason for s in find(tmp_path, CacheConfig(caption_extension="caption")).skipped}
    assert reasons["b.jpg"] == "missing caption b.caption, and b.txt is not read: set cache.caption_extension to txt"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"caption": ', "is not JSON"),
        ('{"a": 1}', "has no field caption, text, captions or prompt"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_a_json_file_that_has_no_caption_is_named(tmp_path, content, reason):
    put(tmp_path, a_txt="t", b_json=content)
    (skip,) = find(tmp_path, CacheConfig()).skipped
    assert (skip.path, skip.reason) == ("b.jpg", f"missing caption b.txt, and caption b.json {reason}")


def test_caption_files_without_a_picture_are_named_and_json_only_where_it_was_chosen(tmp_path):
    put(tmp_path, a_txt="t", a_json='{"caption": "j"}')
    for name in ("x.txt", "y.caption", "dataset.json"):
        (tmp_path / name).write_text("{}")
    lone = "is a caption without an image"
    assert {s.path: s.reason for s in find(tmp_path, CacheConfig()).skipped} == {"x.txt": lone, "y.caption": lone}
    only_json = find(tmp_path, CacheConfig(caption_extension="json"))
    assert {s.path: s.reason for s in only_json.skipped} == {"dataset.json": lone}


def test_a_link_of_any_suffix_to_a_private_file_is_not_followed(tmp_path):
    (tmp_path / "secret").write_text("a password")
    source = tmp_path / "images"
    source.mkdir()
    put(source, a_txt="t", b_caption="c", c_json="1")
    for name in ("b.caption", "c.json"):
        (source / name).unlink()
        (source / name).symlink_to(tmp_path / "secret")
    found = find(source, CacheConfig())
    assert [item.path for item in found.items] == ["a.jpg"]
    assert all("is a link that leads out of the folder" in skip.reason for skip in found.skipped[:2])


def test_instructions_of_pairs_may_be_in_any_of_these_files_and_txt_comes_first(tmp_path):
    for name in ("a_start", "a_end", "b_start", "b_end", "c_start", "c_end"):
        (tmp_path / f"{name}.jpg").touch()
    (tmp_path / "a_end.json").write_text('{"caption": "of json"}')
    (tmp_path / "a.txt").write_text("of txt")
    (tmp_path / "b.caption").write_text("of caption")
    (tmp_path / "c.json").write_text('{"prompt": "of json"}')
    assert captions(tmp_path, "i2i") == {"a_end": ("of txt",), "b_end": ("of caption",), "c_end": ("of json",)}


def test_a_tar_may_have_captions_of_any_suffix(tmp_path):
    path = tar(tmp_path / "t.tar", {"a.png": png(1), "a.cap": b"one\ntwo", "a.txt": b"t"})
    found = find(path, CacheConfig(caption_extension="cap"))
    assert ([item.captions for item in found.items], found.num_multiline) == ([("one", "two")], 1)
    assert [i.captions for i in find(path, CacheConfig(caption_extension="cap", caption_lines="whole")).items] == [
        ("one two",)
    ]


# What is made of the text


def test_a_file_is_one_caption_a_line_or_one_caption_or_its_first_line(tmp_path):
    put(tmp_path, a_txt="\n one\r\n\r\ntwo. \nthree", b_txt="one")
    assert captions(tmp_path)["a"] == (" one", "two. ", "three")
    assert captions(tmp_path, caption_lines="whole") == {"a": (" one two.  three",), "b": ("one",)}
    assert captions(tmp_path, caption_lines="first") == {"a": (" one",), "b": ("one",)}
    numbers = [find(tmp_path, CacheConfig(caption_lines=lines)).num_multiline for lines in ("each", "whole", "first")]
    assert numbers == [1, 0, 0]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"caption_prefix": "best quality"}, "best quality, a cat."),
        ({"caption_prefix": "a photo of "}, "a photo of a cat."),
        ({"caption_prefix": "photo:"}, "photo: a cat."),
        ({"caption_suffix": "at night"}, "a cat. at night"),
        ({"caption_suffix": ", at night"}, "a cat., at night"),
        ({"caption_suffix": " - sks style"}, "a cat. - sks style"),
        ({"trigger": "sks", "caption_prefix": "a photo of ", "caption_suffix": "."}, "sks, a photo of a cat.."),
    ],
)
def test_prefix_and_suffix_stand_between_trigger_and_caption(tmp_path, options, expected):
    assert captions(put(tmp_path, a_txt="a cat."), **options) == {"a": (expected,)}


def test_the_trigger_of_image_to_image_comes_behind_the_suffix(tmp_path):
    for name in ("a_start.jpg", "a_end.jpg"):
        (tmp_path / name).touch()
    (tmp_path / "a.txt").write_text("make it red")
    options = {"trigger": "sks", "caption_prefix": "please: ", "caption_suffix": "at night"}
    assert captions(tmp_path, "i2i", **options) == {"a_end": ("please: make it red, at night, sks",)}


# Shuffled tags and wildcards


def test_shuffled_tags_begin_as_written_keep_the_first_and_lose_none():
    caption = "1girl, red hair,smile , hat"
    texts = of(caption, shuffle=True, keep=1, most=6)
    assert texts[0] == caption
    assert len(set(texts)) == 6  # all orders of three tags
    assert {text.split(", ")[0] for text in texts[1:]} == {"1girl"}
    assert {tuple(sorted(text.split(", "))) for text in texts[1:]} == {("1girl", "hat", "red hair", "smile")}


def test_what_has_only_one_order_stays_as_it_is():
    assert of("a cat", shuffle=True) == ("a cat",)
    assert of("a,  b", shuffle=True, keep=1) == ("a,  b",)
    assert of("a, a", shuffle=True) == ("a, a",)


@pytest.mark.parametrize(
    ("caption", "texts"),
    [
        ("a {red|blue} cat", {"a red cat", "a blue cat"}),
        ("{|big }cat", {"cat", "big cat"}),
        ("{a|{b|c}}", {"a", "b", "c"}),
        ("{{a|b}}", {"{a}", "{b}"}),
        ("{json} {a", {"{json} {a"}),
        ("{a|b", {"{a|b"}),
        (r"\{a\|b\} c|d}", {"{a|b} c|d}"}),
        ("{x|x}", {"x"}),
    ],
)
def test_a_wildcard_becomes_its_parts_and_other_braces_are_text(caption, texts):
    assert set(of(caption, wildcards=True, most=9)) == texts
    assert of(caption) == (caption,)


def test_there_are_at_most_as_many_as_asked_for_and_they_are_drawn_evenly(monkeypatch):
    assert len(of("{a|b|c|d|e|f|g|h}", wildcards=True, most=3)) == 3
    first = Counter(of(f"{i} {{a|b|c}}", wildcards=True, most=1)[0][-1] for i in range(600))
    assert all(150 < count < 250 for count in first.values())  # 200 +- 4 standard deviations
    assert of("{a|b}, " * 600_000, wildcards=True, shuffle=True) == ("{a|b}, " * 600_000,)  # no caption; in no time
    assert of("{" * 20_000 + "|" + "}" * 20_000, wildcards=True)[0].startswith("{{{")
    draws = []
    monkeypatch.setattr("k5cache.sources.variants._drawn", lambda parts, rng: draws.append(parts) or "a")
    assert of("{a|a}" * 1000, wildcards=True, most=100) == ("a",)  # 1,600 times would take seconds
    assert len(draws) == 1_000_000 // 5001


def test_the_same_caption_always_becomes_the_same_texts():
    """Literals: another order would encode the rows of every such cache again."""
    assert of("a, b, c, {x|y}", shuffle=True, wildcards=True) == (
        *("a, b, c, y", "c, b, x, a", "b, c, y, a", "b, a, c, y"),
    )
    assert of("a, b, c, d", shuffle=True, most=3) == ("a, b, c, d", "c, d, a, b", "d, c, a, b")


def test_what_is_drawn_is_counted_and_said_and_images_without_a_caption_are_named(tmp_path):
    put(tmp_path, a_txt="{x|y}, z\nw", b_txt="{| }", c_txt="{x|y}, z\nw")
    found = find(tmp_path, CacheConfig(wildcards=True, trigger="sks"))
    assert {caption for item in found.items for caption in item.captions} == {"sks, x, z", "sks, y, z", "sks, w"}
    assert [(s.path, s.reason) for s in found.skipped] == [("b.jpg", "empty caption")]
    assert found.num_multiline == 2  # before anything is drawn
    assert found.notices == (
        "cache.wildcards: 3 captions become 3, at most 4 each (cache.caption_variants), and each step draws one; the"
        " same captions always become the same ones",
    )
    idle = find(tmp_path, CacheConfig(keep_tokens=1, caption_variants=2)).notices
    assert idle == (
        "cache.keep_tokens does nothing without cache.shuffle_tags",
        "cache.caption_variants does nothing without cache.shuffle_tags or cache.wildcards",
    )


# Options


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"caption_extension": "a/b"}, "caption_extension must be one suffix such as caption, found 'a/b'"),
        ({"caption_extension": ""}, "caption_extension must be one suffix such as caption, found ''"),
        ({"caption_variants": 0}, "caption_variants must be 1 to 100, found 0"),
        ({"keep_tokens": -1}, "keep_tokens must be 0 or more, found -1"),
        ({"caption_lines": "one"}, "caption_lines must be one of 'each'"),
    ],
)
def test_values_out_of_range_are_refused(options, problem):
    with pytest.raises(RecipeError, match=problem.partition(",")[0]):
        parse({"cache": options}, {"cache": CacheConfig})


def test_an_extension_of_pictures_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="caption_extension = png is the suffix of pictures"):
        find(put(tmp_path, a_txt="t"), CacheConfig(caption_extension="png"))
    with pytest.raises(DatasetError, match=r"each with a \.cap caption beside it"):
        find(tmp_path, CacheConfig(caption_extension="cap"))


NEW = {
    "caption_extension": "caption", "caption_lines": "whole", "caption_prefix": "p", "caption_suffix": "s",
    "shuffle_tags": True, "keep_tokens": 1, "wildcards": True, "caption_variants": 2,
}  # fmt: skip


def test_a_recipe_names_these_options_only_if_they_are_set():
    names = {f.name for f in fields(CacheConfig)}
    assert names >= set(NEW)
    assert not set(CacheConfig().selection) & set(NEW)  # caches from before they existed are not stale
    for name, value in NEW.items():
        assert replace(CacheConfig(), **{name: value}).selection == {**CacheConfig().selection, name: value}
    assert CacheConfig(caption_extension=".TXT").selection["caption_extension"] == "txt"
    assert json.dumps(CacheConfig(**NEW).selection)


def test_a_changed_option_is_named_and_encodes_only_what_it_changes(tmp_path, toy_model):
    shop = Workshop(tmp_path, toy_model)
    shop.put("a.png", "a cat, red, small")
    shop.put("b.png", "a dog", seed=1)
    shop.encode()
    with pytest.raises(CacheStale, match=r"selection.shuffle_tags is not set in the cache, True now"):
        shop.encode(shuffle_tags=True, caption_variants=3)
    report = shop.encode(shuffle_tags=True, caption_variants=3, update=True)
    assert (report.num_latents, report.num_texts, report.reused_latents) == (0, 2, 2)
    assert sorted(len(shop.cache.row(i).caption_keys) for i in range(2)) == [1, 3]
    assert shop.encode(shuffle_tags=True, caption_variants=3).is_unchanged
    (tmp_path / "images" / "a.cap").write_text("other")
    options = {"caption_extension": "cap", "update": True}
    assert len(shop.encode(**options).skipped) == 1
    (tmp_path / "images" / "a.cap").write_text("changed")  # a file of a chosen suffix is looked at too
    assert shop.encode(**options).changed == ("a.png",)
