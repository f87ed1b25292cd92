"""Text parity: what is cached for a caption is what ``Kandinsky5T2IPipeline.encode_prompt`` gives for it alone."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import Kandinsky5T2IPipeline
from safetensors.torch import load_file, save_file

from k5cache.encoders.clip import encode_pooled, load_clip
from k5cache.encoders.pipeline import clean, pipeline_template
from k5cache.encoders.qwen import encode_prompt_embeds, load_qwen, load_tokenizer, tokenize
from k5cache.shared.errors import ModelError
from k5cache.shared.template import version

MAX_TOKENS = 512
CAPTIONS = {
    "one word": "fox",
    "2,000 words": "a red fox asleep in the snow " * 285 + "and so it ends",
    "HTML entities": "a &lt;b&gt; &amp;amp; &quot;c&quot;",
    "emoji": "🦊 in the snow 🏳️‍🌈👩‍👩‍👧",
    "emoji past the limit": "🦊" * 700,
    "right to left": "قطة تجلس على السجادة, חתול על השטיח",
    "newlines": "one\ntwo\r\n\r\nthree\u2028four",
    "doubled spaces": "  a  fox   asleep\t\t",
    "curly quotes": "“quoted” ‘it’s’ — an em dash…",
    "decomposed accents": "cafe\u0301 nai\u0308ve",
    "braces": "{} {0} {caption}",
    "the template's own tags": "<|im_end|>\n<|im_start|>user\nfox<|image_pad|>",
    "empty": "",
}


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def tokenizer(toy_model):
    return load_tokenizer(toy_model)


@pytest.fixture(scope="module")
def text_pipeline(toy_model):
    return reference(toy_model, torch.bfloat16)


@pytest.fixture(scope="module")
def tokens_of(tokenizer):
    return lambda caption, limit=MAX_TOKENS: tokenize(tokenizer, clean(caption), limit)


def reference(folder: Path, dtype: torch.dtype, device: str = "cpu") -> Kandinsky5T2IPipeline:
    """diffusers' own pipeline, as a user loads it, without the transformer and the VAE."""
    return Kandinsky5T2IPipeline.from_pretrained(folder, transformer=None, vae=None, dtype=dtype).to(device)


def ids_seen_by(encoder: torch.nn.Module, encode) -> list[int]:
    """The token ids that the reference's real text encoder is given while ``encode`` runs."""
    seen = []
    hook = encoder.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    with torch.no_grad():
        encode()
    hook.remove()
    return seen[0][0].tolist()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_caption_is_encoded_to_the_bits_the_pipeline_gives_for_it_alone(toy_model, tokens_of, dtype, device):
    pipeline = reference(toy_model, dtype, device)
    clip = load_clip(toy_model, device, dtype)
    tokens = [tokens_of(caption) for caption in CAPTIONS.values()]
    prompt_embeds = encode_prompt_embeds(load_qwen(toy_model, device, dtype), tokens)
    pooled = encode_pooled(clip, [clean(caption) for caption in CAPTIONS.values()])
    for i, (name, caption) in enumerate(CAPTIONS.items()):
        with torch.no_grad():
            theirs, their_pooled, cu_seqlens = pipeline.encode_prompt(caption, device=torch.device(device))
        assert torch.equal(prompt_embeds[i], theirs[0].cpu()), name
        assert torch.equal(pooled[i], their_pooled[0].cpu()), name
        assert tokens[i].n_tokens == len(prompt_embeds[i]) == cu_seqlens[1], name
        assert prompt_embeds[i].dtype == pooled.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_captions_of_one_length_may_share_a_forward_and_keep_their_order(toy_model, tokens_of, dtype):
    qwen = load_qwen(toy_model, "cpu", dtype)
    captions = ["fox", "a b c d e f g", "box", "", "cat", "g f e d c b a"]
    tokens = [tokens_of(caption) for caption in captions]
    assert len({t.n_tokens for t in tokens}) < len(captions), "no two share a length: nothing is batched"
    alone = encode_prompt_embeds(qwen, tokens)
    together = encode_prompt_embeds(qwen, tokens, exact=False)
    # The same bits on the CPUs measured; another matrix size may round otherwise, which is why exact is the default.
    atol = {torch.float32: 1e-5, torch.bfloat16: 6e-2}[dtype]  # values up to 5: 2 units in the last place
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("limit", [8, 16, MAX_TOKENS])
def test_truncation_cuts_where_the_pipeline_cuts(tokenizer, tokens_of, text_pipeline, limit):
    one_token = next(word for word in (" fox", " cat", " a") if len(tokenizer(word)["input_ids"]) == 1)
    for over in (-3, -2, -1, 0, 1, 2, 3, 40):
        caption = clean(one_token * (limit + over))
        tokens = tokens_of(caption, limit)
        theirs = ids_seen_by(
            text_pipeline.text_encoder,
            lambda caption=caption: text_pipeline.encode_prompt(caption, max_sequence_length=limit),
        )
        assert tokens.ids == theirs, over
        assert tokens.n_tokens <= limit, over


def test_what_was_truncated_is_the_end_of_the_caption_that_no_token_stands_for(tokenizer, tokens_of):
    caption = clean(CAPTIONS["2,000 words"])
    tokens = tokens_of(caption)
    remaining = tokenizer.decode(tokens.ids[pipeline_template().encode_start_idx :])
    assert tokens.truncated.endswith("and so it ends")
    assert remaining + tokens.truncated == caption


def test_a_caption_that_fits_is_not_reported_as_truncated(tokens_of):
    assert {tokens_of(caption).truncated for name, caption in CAPTIONS.items() if len(caption) < 200} == {""}


def test_an_emoji_cut_in_half_counts_as_truncated(tokens_of):
    tokens = tokens_of(CAPTIONS["emoji past the limit"])
    assert set(tokens.truncated) == {"🦊"}
    assert 0 < len(tokens.truncated) < 700


def test_loading_prints_nothing_and_truncating_does_not_let_diffusers_warn(toy_model, tokens_of, text_pipeline, capfd):
    warned: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = warned.append
    logging.getLogger("diffusers").addHandler(handler)
    tokens = tokens_of(CAPTIONS["2,000 words"], 16)
    encode_prompt_embeds(load_qwen(toy_model, "cpu", torch.bfloat16), [tokens])
    encode_pooled(load_clip(toy_model, "cpu", torch.bfloat16), ["fox"])
    captured = capfd.readouterr()
    assert (captured.out, captured.err, warned) == ("", "", [])
    text_pipeline.encode_prompt("fox " * 40, max_sequence_length=16)
    assert len(warned) == 1, "the pipeline itself warns as before"
    logging.getLogger("diffusers").removeHandler(handler)


def test_captions_are_cleaned_as_the_pipeline_cleans_them():
    # ftfy straightens quotes, and so changes token ids: pyproject requires it, so that this never depends on luck.
    assert version("ftfy") is not None
    assert clean(CAPTIONS["curly quotes"]) == "\"quoted\" 'it's' — an em dash…"
    assert clean(CAPTIONS["HTML entities"]) == 'a <b> & "c"'
    assert clean(CAPTIONS["doubled spaces"]) == "a fox asleep"
    assert clean(CAPTIONS["newlines"]) == "one two three four"


def test_template_and_crop_are_the_installed_pipelines(text_pipeline):
    template = pipeline_template()
    assert template.text == text_pipeline.prompt_template
    assert template.encode_start_idx == text_pipeline.prompt_template_encode_start_idx


def test_a_tokenizer_that_pads_left_is_told_to_pad_right(toy_model, tmp_path):
    copy_part(toy_model, tmp_path, "tokenizer")
    edit_json(tmp_path / "tokenizer" / "tokenizer_config.json", padding_side="left")
    assert load_tokenizer(tmp_path).padding_side == "right"


def test_rotary_frequencies_stay_float32_in_a_bfloat16_model(toy_model, text_pipeline):
    ours = load_qwen(toy_model, "cpu", torch.bfloat16).model.rotary_emb.inv_freq
    assert ours.dtype == torch.float32
    assert torch.equal(ours, text_pipeline.text_encoder.model.language_model.rotary_emb.inv_freq)


def test_the_vision_tower_and_the_head_are_not_needed_and_both_key_layouts_load(toy_model, tokens_of, tmp_path):
    copy_part(toy_model, tmp_path, "text_encoder")
    file = tmp_path / "text_encoder" / "model.safetensors"
    published = load_file(file)
    assert "model.layers.0.mlp.up_proj.weight" in published
    assert "lm_head.weight" in published
    text = {k.removeprefix("model."): v for k, v in published.items() if k.startswith("model.")}
    tokens = [tokens_of("a fox in the snow")]
    expected = encode_prompt_embeds(load_qwen(toy_model, "cpu", torch.bfloat16), tokens)[0]
    for prefix in ("model.", "model.language_model."):
        save_file({prefix + k: v for k, v in text.items()}, file)
        assert torch.equal(encode_prompt_embeds(load_qwen(tmp_path, "cpu", torch.bfloat16), tokens)[0], expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.layers.1.self_attn.k_proj.bias"), "lacks model.layers.1.self_attn.k_proj.bias"),
        (lambda t: t.update({"model.norm.weight": torch.ones(3)}), "model.norm.weight (3,) instead of (64,)"),
        (lambda t: t.pop("model.embed_tokens.weight"), "no text layers"),
    ],
)
def test_a_tensor_that_is_missing_or_misshapen_is_named(toy_model, tmp_path, change, words):
    copy_part(toy_model, tmp_path, "text_encoder")
    file = tmp_path / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(ModelError) as refused:
        load_qwen(tmp_path, "cpu", torch.bfloat16)
    assert words in refused.value.problem


def test_another_kind_of_text_encoder_and_a_clip_with_holes_are_refused(toy_model, tmp_path):
    for part in ("text_encoder", "text_encoder_2", "tokenizer_2"):
        copy_part(toy_model, tmp_path, part)
    edit_json(tmp_path / "text_encoder" / "config.json", model_type="llama")
    with pytest.raises(ModelError, match=r"is a llama, not Qwen2\.5-VL"):
        load_qwen(tmp_path, "cpu", torch.bfloat16)
    file = tmp_path / "text_encoder_2" / "model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if "final_layer_norm" not in name}, file)
    with pytest.raises(ModelError, match=r"lacks .*final_layer_norm"):
        load_clip(tmp_path, "cpu", torch.bfloat16)


def copy_part(source: Path, target: Path, part: str) -> None:
    shutil.copytree(source / part, target / part)


def edit_json(path: Path, **changes: str) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
