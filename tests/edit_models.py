"""What tests of image-to-image encoders share: a toy I2I checkpoint's encoders, and diffusers' own pipeline on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, Kandinsky5I2IPipeline
from PIL import Image
from transformers import CLIPTextModel, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor

from k5cache.encoders.clip import load_clip_tokenizer
from k5cache.encoders.qwen import load_tokenizer


class Processor(Qwen2VLProcessor):
    """The real processor, which would refuse to be built without a video processor, and that needs torchvision."""

    def check_argument_for_proper_class(self, argument_name, argument):
        return type(argument)


def edit_pipeline(folder: Path, dtype: torch.dtype = torch.bfloat16, tokenizer=None) -> Kandinsky5I2IPipeline:
    """``Kandinsky5I2IPipeline`` as a user loads it, without the transformer; its image processor is of Pillow."""
    images = Qwen2VLImageProcessorPil.from_pretrained(folder / "tokenizer")
    qwen = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, subfolder="text_encoder", dtype=dtype)
    clip = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder_2", dtype=dtype)
    return Kandinsky5I2IPipeline(
        transformer=None,
        scheduler=None,
        vae=AutoencoderKL.from_pretrained(folder, subfolder="vae"),
        text_encoder=qwen.eval(),
        tokenizer=Processor(images, tokenizer or load_tokenizer(folder), None),
        text_encoder_2=clip.eval(),
        tokenizer_2=load_clip_tokenizer(folder),
    )


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise over soft shapes, in RGB."""
    x, y = np.meshgrid(np.linspace(0, 9, width), np.linspace(0, 9, height))
    waves = np.stack([np.sin(x * y / 4 + seed), np.cos(x + y), np.sin(x - 2 * y)], axis=-1)
    noise = np.random.default_rng(seed).normal(0, 0.3, waves.shape)
    return Image.fromarray(((waves + noise) * 64 + 128).clip(0, 255).astype(np.uint8))
