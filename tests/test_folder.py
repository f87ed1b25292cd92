"""What does a plain folder give of what real folders hold: other trainers' files, systems' folders, odd captions?"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from diffusers.pipelines.kandinsky5.pipeline_kandinsky_t2i import prompt_clean

from k5cache.cli import app
from k5cache.options import CacheConfig
from k5cache.sources.find import find
from k5cache.sources.items import NAMED_SUFFIXES
from tests.cli import Cli
from tests.workshop import Workshop


def put(root: Path, *names: str, content: str = "a cat") -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return root


def listed(source: Path, **options: object) -> tuple[list[str], dict[str, str]]:
    """The paths that are used, and what is skipped with its reason."""
    found = find(source, CacheConfig(**options))
    return [item.path for item in found.items], {skip.path: skip.reason for skip in found.skipped}


# What is not an image of the set, and is said


def test_pictures_of_other_trainers_and_systems_are_named_and_not_trained_on(tmp_path):
    put(tmp_path, "cat.jpg", "cat.txt", "owl-masklabel.png", "owl-masklabel.txt")
    put(tmp_path, "cat-masklabel.png", "cat-condlabel.png", "cat.mask.jpg", "cat.mask.png", "cat.mask.webp")
    put(tmp_path, "@eaDir/cat.jpg/SYNOPHOTO_THUMB_XL.jpg", "sub/__MACOSX/cat.jpg", "#recycle/dog.jpg", "._cat.jpg")
    put(tmp_path, ".thumbnails/cat.jpg", ".hidden.jpg", "Thumbs.db", ".DS_Store")
    named = {
        "cat-masklabel.png": "is a mask in OneTrainer's name: rename it cat.mask.png",
        "cat-condlabel.png": "is a conditioning image: for image-to-image, rename it cat.source.png",
        "cat.mask.jpg": "is a mask of a kind that is not read: save it as cat.mask.png",
        "cat.mask.webp": "is a second mask of its image",
        "@eaDir": "is a folder of a NAS, an archiver or a system",
        "sub/__MACOSX": "is a folder of a NAS, an archiver or a system",
        "#recycle": "is a folder of a NAS, an archiver or a system",
        ".hidden.jpg": "is hidden: its name begins with a dot",
    }
    used = ["cat.jpg", "owl-masklabel.png"]  # no owl.jpg, and a caption of its own: an image
    assert listed(tmp_path) == (used, named)
    assert listed(tmp_path, caption_strategy="filename") == (used, named)


def test_every_kind_of_picture_that_cannot_be_read_is_named_with_what_to_do(tmp_path):
    put(tmp_path, "cat.jpg", "cat.txt")
    names = [f"{i}{suffix.upper() if i % 2 else suffix}" for i, suffix in enumerate(sorted(NAMED_SUFFIXES))]
    put(tmp_path, *names, *(f"{i}.txt" for i in range(len(names))))
    used, skipped = listed(tmp_path)
    assert used == ["cat.jpg"]
    assert skipped == {name: NAMED_SUFFIXES[Path(name).suffix.lower()] for name in names}


def test_text_files_without_an_image_are_named_where_captions_are_text_files(tmp_path):
    put(tmp_path, "cat.jpg", "cat.txt", "sub/notes.txt", "film.mp4", "film.txt", "Dog.JPG", "dog.txt")
    used, skipped = listed(tmp_path)
    assert used == ["cat.jpg"]
    assert skipped == {
        "sub/notes.txt": "is a caption without an image",
        "film.txt": "is beside film.mp4, which is not an image",
        "Dog.JPG": "missing caption Dog.txt",
        "dog.txt": "is a caption without an image",
    }
    assert listed(tmp_path, caption_strategy="filename") == (["Dog.JPG", "cat.jpg"], {})


@pytest.mark.parametrize(
    ("beside", "reason"),
    [
        ("cat.tags", "missing caption cat.txt, and cat.tags is not read: set cache.caption_extension to tags"),
        ("cat.jpg.txt", "missing caption cat.txt: rename cat.jpg.txt"),
        ("cat.json", "missing caption cat.txt, and caption cat.json is not JSON"),
    ],
)
def test_a_missing_caption_that_is_there_under_another_name_is_named(tmp_path, beside, reason):
    put(tmp_path, "cat.jpg", beside, "dog.jpg", "dog.txt")
    assert listed(tmp_path)[1]["cat.jpg"] == reason


def test_a_picture_that_may_be_a_mask_is_used_only_with_a_caption(tmp_path):
    put(tmp_path, "cat.jpg", "cat.txt", "cat_mask.png")
    reason = "missing caption cat_mask.txt, unless it is a mask: then rename it cat.mask.png"
    assert listed(tmp_path) == (["cat.jpg"], {"cat_mask.png": reason})
    put(tmp_path, "cat_mask.txt")
    assert listed(tmp_path) == (["cat.jpg", "cat_mask.png"], {})


# Captions reach the pipeline's cleaning as they were written


@pytest.mark.parametrize(
    "caption",
    [
        "a caf\xc3\xa9, voil\xc3\xa0",  # mojibake that ends in a no-break space
        "\xe2\x80\x85a cat\xe2\x80\x85",  # ends in U+0085, a line break to Python
        "voil\xc3 ",
        "a cat\xa0",
        "\u3000a cat \x1c",
        "  a cat\t",
        "&nbsp;a &amp;lt; b&nbsp;",
    ],
)
@pytest.mark.parametrize("trigger", [None, "sks", "sks "])
def test_a_caption_is_cleaned_as_the_pipeline_cleans_what_was_written(tmp_path, caption, trigger):
    before = "" if not trigger else trigger if trigger.endswith(" ") else f"{trigger}, "
    wanted = prompt_clean(before + caption)
    put(tmp_path, "cat.jpg")
    (tmp_path / "cat.txt").write_text(f"\n{caption}\r\n\n", encoding="utf-8", newline="")
    for options in ({}, {"caption_strategy": "instanceprompt", "instance_prompt": caption}):
        [item] = find(tmp_path, CacheConfig(trigger=trigger, **options)).items
        assert [prompt_clean(text) for text in item.captions] == [wanted]
    named = tmp_path / "named"
    put(named, f"{caption}.jpg")
    [item] = find(named, CacheConfig(trigger=trigger, caption_strategy="filename")).items
    assert [prompt_clean(text) for text in item.captions] == [wanted]


# Names that are patterns elsewhere


@pytest.mark.parametrize("strategy", ["textfile", "filename", "metadata"])
def test_names_with_characters_of_patterns_and_urls_are_plain_names(tmp_path, strategy):
    source = tmp_path / "a [1] {b} * ? :: # %20" / "set [a-z]**"
    names = ["cat [2].jpg", "sub#1/*.jpg", "sub#1/{x}?.jpg", "100%25::x.jpg"]
    put(source, *names, *(f"{name.removesuffix('.jpg')}.txt" for name in names))
    rows = "".join(f'{{"file_name": "{name}", "text": "a cat"}}\n' for name in names)
    (source / "metadata.jsonl").write_text(rows, encoding="utf-8")
    used, skipped = listed(source, caption_strategy=strategy)
    assert (used, skipped) == (sorted(names), {})


# The summary


def test_the_summary_counts_what_is_skipped_by_reason_and_files_of_several_captions(tmp_path, toy_model):
    shop, cli = Workshop(tmp_path, toy_model), Cli(tmp_path)
    for i, caption in enumerate(("a cat\nasleep", "one\n\ntwo\n", "a dog\n")):
        shop.put(f"{i}.png", caption, seed=i)
    put(shop.source, *(f"sub/a{i}.png" for i in range(7)), *(f"n{i}.txt" for i in range(2)), "cat.psd", "@eaDir/x.jpg")
    arguments = ["images", "-o", "cache", "--model", str(toy_model), "--set", "cache.resolution=64"]
    several = (
        "2 caption files have several lines: each line is a caption of its own, and each step draws one. For one"
        " caption a file, set cache.caption_lines to whole"
    )
    summary = [
        "11 skipped",
        "  sub/a0.png: missing caption a0.txt",
        "    and 6 more for this reason: sub/a1.png, sub/a2.png, sub/a3.png, ...",
        "  n0.txt: is a caption without an image",
        "    and 1 more for this reason: n1.txt",
        "  @eaDir: is a folder of a NAS, an archiver or a system",
        "  cat.psd: is a Photoshop document: save it as PNG",
    ]
    for command in ("diff", "encode"):
        done = cli(app, command, *arguments)
        assert done.code == 0, done.err
        lines = [line.rstrip() for line in done.out.splitlines()]
        start = lines.index("11 skipped")
        file = ["  all of them: cache/skipped.csv"] if command == "encode" else []
        assert lines[start : start + 8 + len(file)] == [*summary, *file, several]
    assert summary == [line.rstrip() for line in cli(app, "encode", *arguments).out.splitlines()][1:8]
    assert "3, 2 with several captions" in cli(app, "info", "cache").out


def test_a_pipe_in_the_place_of_a_caption_is_named_and_not_waited_for(tmp_path):
    put(tmp_path, "a.png", "a.txt", "b.png")
    os.mkfifo(tmp_path / "b.txt")
    assert listed(tmp_path) == (
        ["a.png"],
        {"b.png": "caption b.txt cannot be read: it is not a file but a pipe, a device or the like"},
    )
