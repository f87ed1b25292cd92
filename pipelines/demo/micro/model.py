"""What does k5-micro consist of? A complete Kandinsky 5 Image with the published classes and layout, 23 MB in all.

The transformer takes two thirds of the bytes: 6 visual blocks of width 256, 8 heads. The VAE has Flux's factors, which
matter to a trainer: 8 times smaller on each side and 16 channels, so a picture of 128 pixels is 64 tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5T2IPipeline,
    Kandinsky5Transformer3DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from pipelines.demo.make_checkpoint import (
    check_template,
    clip_tokenizer,
    name_as_published,
    qwen_tokenizer,
    to_bfloat16,
)

SIZE = 128  # pixels on a side
QWEN_HIDDEN = 128
CLIP_HIDDEN = 64
SHIFT = 1.0  # of the scheduler and of training; the published 3.0 is for 64 times as many pixels


def make(vocabularies: Path, seed: int) -> Kandinsky5T2IPipeline:
    """The untrained model, float32; the same seed gives the same weights.

    Args:
        vocabularies: the folder with ``data.py``'s merge files.
    """
    tokenizer, tokenizer_2 = qwen_tokenizer(vocabularies), clip_tokenizer(vocabularies)
    torch.manual_seed(seed)
    pipeline = Kandinsky5T2IPipeline(
        transformer=transformer(),
        text_encoder=text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2(tokenizer_2),
        tokenizer_2=tokenizer_2,
        vae=vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
    )
    check_template(pipeline)
    return pipeline


def save(pipeline: Kandinsky5T2IPipeline, folder: Path) -> int:
    """Convert the pipeline to bfloat16, write it to ``folder`` and return the number of bytes there."""
    for part in (pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.vae):
        to_bfloat16(part.to("cpu"))
    pipeline.save_pretrained(folder)
    name_as_published(folder / "text_encoder_2" / "model.safetensors")
    forget_origin(folder / "vae" / "config.json")
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def forget_origin(file: Path) -> None:
    """Remove from a config the folder that its model was loaded from, a path on the machine that trained it."""
    lines = [line for line in file.read_text(encoding="utf8").splitlines() if "_name_or_path" not in line]
    file.write_text("\n".join([*lines, ""]), encoding="utf8")


def load(folder: Path) -> Kandinsky5T2IPipeline:
    """A saved k5-micro in float32, through diffusers' own loader."""
    pipeline = Kandinsky5T2IPipeline.from_pretrained(folder, local_files_only=True)
    for part in (pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.vae):
        torch.nn.Module.to(part, torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.resolutions = [(SIZE, SIZE)]  # the pipeline rounds every size to one of its list
    return pipeline


def transformer() -> Kandinsky5Transformer3DModel:
    """The start of the official trainer: modulations are zero, so every block begins as the identity."""
    return Kandinsky5Transformer3DModel(
        in_visual_dim=16,
        out_visual_dim=16,
        in_text_dim=QWEN_HIDDEN,
        in_text_dim2=CLIP_HIDDEN,
        time_dim=96,
        patch_size=(1, 2, 2),
        model_dim=256,
        ff_dim=768,
        num_text_blocks=1,
        num_visual_blocks=6,
        axes_dims=(4, 14, 14),  # a picture has one frame: time needs few channels
    )


def vae() -> AutoencoderKL:
    """Flux's autoencoder with narrow layers."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(24, 48, 80, 80),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=16,
        sample_size=SIZE,
        scaling_factor=1.0,  # set after training
        shift_factor=0.0,  # Kandinsky does not use it
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def text_encoder(tokenizer: Any) -> Qwen2_5_VLForConditionalGeneration:
    """Two text layers, and a vision tower for the layout only. Embeddings are tied, because nothing reads the head."""
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad", "vision_start")}
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": QWEN_HIDDEN,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        "bos_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
        "tie_word_embeddings": True,
    }
    vision: dict[str, Any] = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": QWEN_HIDDEN,
        "fullatt_block_indexes": [0],
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def text_encoder_2(tokenizer: Any) -> CLIPTextModel:
    """Two layers over 77 positions."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=CLIP_HIDDEN,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=CLIP_HIDDEN,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)
