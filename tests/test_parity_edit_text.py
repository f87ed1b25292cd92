"""Text parity for image-to-image: what is cached is what ``Kandinsky5I2IPipeline.encode_prompt`` gives for one pair."""

from __future__ import annotations

import pytest
import torch

from k5cache.encoders.pipeline import clean, pipeline_template
from k5cache.encoders.qwen import encode_prompt_embeds, load_qwen
from k5cache.encoders.streaming import int8_error, stream_prompt_embeds
from k5cache.encoders.vision import load_tower, look
from k5cache.encoders.with_picture import CannotEncode, load_processor, nothing_survives, see, tokenize_with_picture
from tests.edit_models import edit_pipeline, picture

LIMIT = 1024
INSTRUCTIONS = (
    "make it red",  # all of it is cut
    "Turn the sky into a starry night, and keep the house as it is",
    "&lt;b&gt;“bold”&lt;/b&gt;   naïve\ncafé 🦊",
    "",  # the negative prompt: the crop goes on into the picture's tokens
)
SIZES = ((256, 256), (1023, 769), (97, 400), (30, 17), (640, 128))


@pytest.fixture(scope="module")
def processor(toy_edit_model):
    return load_processor(toy_edit_model)


def tokens_and_pictures(processor, folder, pairs, dtype=torch.bfloat16, exact=True):
    """Every pair through our processor and tower."""
    seen = [see(processor, source) for source, _ in pairs]
    tower = load_tower(folder, "cpu", dtype)
    pictures = [tokens for _, tokens in look(tower, enumerate(seen), exact=exact)]
    tokens = [
        tokenize_with_picture(processor, clean(text, "i2i"), s.grid, LIMIT)
        for s, (_, text) in zip(seen, pairs, strict=True)
    ]
    return tokens, pictures


def pairs_of(sizes=SIZES):
    return [(picture(*size, seed=i), text) for i, size in enumerate(sizes) for text in INSTRUCTIONS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_pair_is_encoded_to_the_bits_the_pipeline_gives_for_it_alone(toy_edit_model, processor, dtype):
    pipeline, pairs = edit_pipeline(toy_edit_model, dtype), pairs_of()
    tokens, pictures = tokens_and_pictures(processor, toy_edit_model, pairs, dtype)
    resident = encode_prompt_embeds(load_qwen(toy_edit_model, "cpu", dtype, kind="i2i"), tokens, pictures)
    streaming = load_qwen(toy_edit_model, "cpu", dtype, kind="i2i", streamed=True)
    streamed = {i: rows.clone() for i, rows in stream_prompt_embeds(streaming, tokens, pictures)}
    for i, (source, text) in enumerate(pairs):
        with torch.no_grad():
            theirs, _, lengths = pipeline.encode_prompt([text], image=[source], device=torch.device("cpu"))
        assert torch.equal(resident[i], theirs[0]), (source.size, text)
        assert torch.equal(streamed[i], theirs[0]), (source.size, text)
        assert tokens[i].n_tokens == len(resident[i]) == lengths[1]
    assert len({t.place.grid for t in tokens}) == len(SIZES)


def test_fast_puts_pictures_and_instructions_side_by_side_and_comes_close(toy_edit_model, processor):
    pairs = pairs_of((SIZES[0], *SIZES[2:]))
    qwen = load_qwen(toy_edit_model, "cpu", torch.float32, kind="i2i")
    tokens, pictures = tokens_and_pictures(processor, toy_edit_model, pairs, torch.float32)
    fast_tokens, fast_pictures = tokens_and_pictures(processor, toy_edit_model, pairs, torch.float32, exact=False)
    assert fast_tokens == tokens
    for exact, fast in zip(pictures, fast_pictures, strict=True):
        torch.testing.assert_close(exact, fast, rtol=0, atol=1e-5)
    alone = encode_prompt_embeds(qwen, tokens, pictures)
    together = encode_prompt_embeds(qwen, tokens, fast_pictures, exact=False)
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)  # float32, matrix products of another size


def test_int8_text_layers_come_close_and_their_error_counts_the_picture(toy_edit_model, processor):
    pairs = pairs_of(SIZES[:1])
    tokens, pictures = tokens_and_pictures(processor, toy_edit_model, pairs)
    plain = encode_prompt_embeds(load_qwen(toy_edit_model, "cpu", torch.bfloat16, kind="i2i"), tokens, pictures)
    qwen = load_qwen(toy_edit_model, "cpu", torch.bfloat16, kind="i2i", streamed=True, int8=True)
    rounded = {i: rows.clone() for i, rows in stream_prompt_embeds(qwen, tokens, pictures)}
    expected = torch.cat(plain).double()
    error = float((torch.cat([rounded[i] for i in range(len(plain))]).double() - expected).norm() / expected.norm())
    assert 0 < error < 0.1
    assert int8_error(qwen, tokens, pictures) == pytest.approx(error, rel=0.05)


def test_another_source_or_another_instruction_gives_other_embeddings(toy_edit_model, processor):
    text = INSTRUCTIONS[1]
    pairs = [(picture(256, 256, seed=0), text), (picture(256, 256, seed=5), text)]
    tokens, pictures = tokens_and_pictures(processor, toy_edit_model, pairs)
    first, second = encode_prompt_embeds(load_qwen(toy_edit_model, "cpu", torch.bfloat16, kind="i2i"), tokens, pictures)
    assert tokens[0] == tokens[1]
    assert (first.float() - second.float()).norm() > 0.1 * first.float().norm()


@pytest.mark.parametrize("limit", [64, 120])
def test_an_instruction_at_the_limit_is_cut_as_the_pipeline_cuts_it_and_beyond_it_both_fail(
    toy_edit_model, processor, limit
):
    pipeline, source = edit_pipeline(toy_edit_model), picture(200, 200)
    seen = see(processor, source)
    count = processor.num_tokens(seen.grid)
    word = next(w for w in (" fox", " cat", " a") if len(processor.tokenizer(w)["input_ids"]) == 1)
    prefix = len(processor.tokenizer(pipeline_template("i2i").text.format(""))["input_ids"]) - 1
    room = pipeline_template("i2i").encode_start_idx + limit - prefix - count
    outcomes = set()
    for over in range(-2, 24):
        instruction = clean(word * (room + over))
        given = []
        hook = pipeline.text_encoder.register_forward_pre_hook(
            lambda _, __, inputs, given=given: given.append(inputs["input_ids"][0].tolist()), with_kwargs=True
        )
        try:
            with torch.no_grad():
                pipeline._encode_prompt_qwen([instruction], [source], torch.device("cpu"), limit, torch.bfloat16)
        except ValueError:
            with pytest.raises(CannotEncode, match=r"its instruction of \d+ tokens is \d+ too long: "):
                tokenize_with_picture(processor, instruction, seen.grid, limit)
            outcomes.add("fails")
        else:
            assert tokenize_with_picture(processor, instruction, seen.grid, limit).ids == given[0], over
            outcomes.add("cut" if over > 0 else "whole")
        finally:
            hook.remove()
    assert outcomes == {"whole", "cut", "fails"}


def test_5000_words_are_refused_in_a_sentence_and_so_is_a_second_picture(processor):
    grid = processor.grid_of(1024, 1024)
    assert processor.num_tokens(grid) == 324
    with pytest.raises(CannotEncode) as refused:
        tokenize_with_picture(processor, "fox " * 5000, grid, LIMIT)
    assert "takes 324 tokens, and its instruction of 5001 tokens is" in refused.value.reason
    with pytest.raises(CannotEncode, match=r"with <\|image_pad\|>, which stands for a picture"):
        tokenize_with_picture(processor, "an <|image_pad|> here", grid, LIMIT)


def test_the_largest_picture_that_works_is_named_and_works(toy_edit_model, processor):
    """At 1024 tokens and 20 words: 1764x1764 is too large for the pipeline, and the size that is named is not."""
    pipeline, words = edit_pipeline(toy_edit_model), "make the red house blue and the sky green please now"
    for size in ((1792, 1792), (2048, 1600), (4000, 1000)):
        grid = processor.grid_of(*size)
        with pytest.raises(
            CannotEncode, match=r"the largest picture of its shape that leaves 64 is \d+x\d+$"
        ) as refused:
            tokenize_with_picture(processor, words, grid, LIMIT)
        width, height = map(int, refused.value.reason.rpartition(" ")[2].split("x"))
        assert abs(width / height - size[0] / size[1]) < 0.05 * size[0] / size[1]
        assert processor.num_tokens(processor.grid_of(width, height)) > 800
        tokenize_with_picture(processor, words, processor.grid_of(width, height), LIMIT)
        whole = picture(*size)
        with pytest.raises(ValueError, match=r"Mismatch in `image` token count|total number of <.image_pad.> tokens"):
            pipeline._encode_prompt_qwen([words], [whole], torch.device("cpu"), LIMIT, torch.bfloat16)


def test_sizes_that_the_processor_refuses_are_refused_in_a_sentence(processor):
    for size, words in (((1, 300), "halves it"), ((8, 6000), "too long and thin")):
        with pytest.raises(CannotEncode, match=words):
            processor.grid_of(*size)


def test_an_instruction_of_which_nothing_survives_is_known(processor):
    grid = processor.grid_of(200, 200)
    prefix = pipeline_template("i2i").text.partition("{}")[0]
    num_cut = pipeline_template("i2i").encode_start_idx - len(processor.tokenizer(prefix)["input_ids"])
    word = next(w for w in (" fox", " cat", " a") if len(processor.tokenizer(w)["input_ids"]) == 1)
    for count in (1, num_cut, num_cut + 1):
        tokens = tokenize_with_picture(processor, word * count, grid, LIMIT)
        assert nothing_survives(tokens) == (count <= num_cut), count
