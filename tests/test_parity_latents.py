"""Latent parity: what is cached for a picture is what diffusers' VAE gives for the same crop."""

from __future__ import annotations

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, Kandinsky5T2IPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from safetensors.torch import load_file, save_file

from k5cache.encoders.vae import encode_pixels, load_vae, to_model_range
from k5cache.shared.errors import ModelError

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
DTYPES = [torch.float32, torch.bfloat16]
WIDTH, HEIGHT = 96, 64


def crops(count: int = 3) -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)) for _ in range(count)]


def as_uint8(images: list[Image.Image]) -> torch.Tensor:
    """``[B, 3, H, W]``, as ``k5cache.sources.images.load_pixels`` gives them."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).contiguous()


@pytest.mark.parametrize("device", DEVICES)
def test_each_of_the_256_pixel_values_becomes_the_float_the_pipelines_image_processor_makes(device):
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16).repeat(3).reshape(16, 16, 3))
    theirs = VaeImageProcessor(vae_scale_factor=8).preprocess(ramp)
    ours = to_model_range(as_uint8([ramp]).to(device))
    assert ours.device.type == device
    assert ours.dtype == torch.float32
    assert torch.equal(ours.cpu(), theirs)
    assert (ours.min(), ours.max()) == (-1, 1)
    # Strides choose a convolution's kernel, and so its rounding: 7e-5 in a moment of a 512x512 picture on a CPU.
    assert ours.stride() == theirs.stride()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moments_are_the_vaes_for_each_picture_alone_channels_last_and_unscaled(toy_model, dtype, device):
    images = crops()
    reference = AutoencoderKL.from_pretrained(toy_model / "vae", dtype=dtype).to(device)
    processor = VaeImageProcessor(vae_scale_factor=8)
    ours = encode_pixels(load_vae(toy_model, device, dtype), to_model_range(as_uint8(images)))
    assert ours.mean.shape == ours.std.shape == (len(images), HEIGHT // 8, WIDTH // 8, 16)
    for i, image in enumerate(images):
        with torch.no_grad():
            theirs = reference.encode(processor.preprocess(image).to(device, dtype)).latent_dist
        assert torch.equal(ours.mean[i].permute(2, 0, 1), theirs.mean[0].float().cpu())
        assert torch.equal(ours.std[i].permute(2, 0, 1), theirs.std[0].float().cpu())


def test_a_cast_that_was_asked_for_is_not_warned_of(toy_model, caplog):
    logger = logging.getLogger("diffusers.models.modeling_utils")
    logger.addHandler(caplog.handler)
    try:
        assert load_vae(toy_model, "cpu", torch.bfloat16).dtype == torch.bfloat16
        assert not caplog.records
        AutoencoderKL.from_pretrained(toy_model / "vae").to(torch.bfloat16)
        assert caplog.records, "if this fails, diffusers no longer warns and there is nothing to hold back"
    finally:
        logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pictures_encoded_in_one_batch_differ_only_by_rounding(toy_model, dtype):
    vae, pixels = load_vae(toy_model, "cpu", dtype), to_model_range(as_uint8(crops()))
    alone, together = encode_pixels(vae, pixels), encode_pixels(vae, pixels, exact=False)
    atol = {torch.float32: 1e-5, torch.bfloat16: 4e-2}[dtype]  # a convolution over a batch adds in another order
    torch.testing.assert_close(alone.mean, together.mean, rtol=0, atol=atol)
    torch.testing.assert_close(alone.std, together.std, rtol=0, atol=atol)


def test_the_pipeline_decodes_mean_times_scaling_factor_to_what_the_vae_decodes_from_the_mean(toy_model):
    """``scaling_factor`` is used and ``shift_factor`` is not: through ``Kandinsky5T2IPipeline.__call__`` itself."""
    pipeline = Kandinsky5T2IPipeline.from_pretrained(
        toy_model, text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.resolutions = [(WIDTH, HEIGHT)]
    transformer, vae = pipeline.transformer, load_vae(toy_model, "cpu", torch.float32)
    for parameter in transformer.out_layer.parameters():
        torch.nn.init.zeros_(parameter)  # a velocity of zero: the latents that go in are the latents that are decoded
    assert vae.config.shift_factor != 0
    mean = encode_pixels(vae, to_model_range(as_uint8(crops(1)))).mean
    decoded = pipeline(
        prompt_embeds_qwen=torch.zeros(1, 4, transformer.config.in_text_dim),
        prompt_embeds_clip=torch.zeros(1, transformer.config.in_text_dim2),
        prompt_cu_seqlens=torch.tensor([0, 4]),
        latents=(mean * vae.config.scaling_factor).unsqueeze(1),
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=1,
        guidance_scale=1.0,
        output_type="pt",
    ).image
    with torch.no_grad():
        expected = vae.decode(mean.permute(0, 3, 1, 2)).sample
    # float32: the scaling factor multiplied and divided again
    torch.testing.assert_close(decoded, (expected / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)


def test_a_vae_that_lacks_a_tensor_or_is_another_class_is_refused(toy_model, tmp_path):
    shutil.copytree(toy_model / "vae", tmp_path / "vae")
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors.pop("encoder.conv_in.weight")
    save_file(tensors, file)
    with pytest.raises(ModelError, match=r"lacks encoder\.conv_in\.weight"):
        load_vae(tmp_path, "cpu", torch.float32)
    config = tmp_path / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "AutoencoderTiny"}))
    with pytest.raises(ModelError, match="is a AutoencoderTiny, not AutoencoderKL"):
        load_vae(tmp_path, "cpu", torch.float32)
