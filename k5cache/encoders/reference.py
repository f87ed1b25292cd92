"""The reference of `k5cache selftest`: diffusers' own pipeline and VAE on a checkpoint of any size, part by part.

A part that does not fit is spread over GPU, memory and disk by accelerate: the same modules, the same arithmetic.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k5cache.encoders.clip import load_clip_tokenizer, no_progress_bar
from k5cache.encoders.pipeline import clean, empty_pipeline, logger_name, silent
from k5cache.encoders.qwen import load_tokenizer
from k5cache.encoders.with_picture import as_picture, load_processor
from k5cache.shared.handed_over import handed_over
from k5cache.shared.host_memory import free_ram
from k5cache.shared.kind import Kind
from k5cache.shared.part_files import weight_files

if TYPE_CHECKING:
    import torch

ROOM = 0.8  # of free memory may be taken by weights; activations have the rest


@dataclass(frozen=True)
class Encoded:
    """What ``Kandinsky5T2IPipeline.encode_prompt`` makes of one caption alone."""

    ids: list[int]
    """What Qwen is given, template included."""
    prompt_embeds: torch.Tensor
    pooled: torch.Tensor


def encode_as_the_pipeline(
    folder: Path,
    captions: Sequence[str],
    max_sequence_length: int,
    device: str,
    dtypes: tuple[torch.dtype, torch.dtype],
    sources: Sequence[torch.Tensor] | None = None,
) -> list[Encoded]:
    """Run ``encode_prompt`` on each caption alone: first Qwen, then CLIP, each freed before the next.

    Args:
        captions: raw or cleaned; the pipeline cleans them.
        dtypes: of Qwen and of CLIP.
        sources: for image-to-image, the picture of each instruction, uint8 ``[3, H, W]``.
    """
    import torch

    kind: Kind = "t2i" if sources is None else "i2i"
    pipeline, at = _pipeline(folder, kind), torch.device(device)
    ids: list[list[int]] = []
    embeds: list[torch.Tensor] = []
    with torch.no_grad(), silent(logger_name(kind)), _loaded_qwen(folder, device, dtypes[0]) as qwen:
        hook = qwen.register_forward_pre_hook(
            lambda _, __, inputs: ids.append(inputs["input_ids"][0].tolist()), with_kwargs=True
        )
        vars(pipeline)["text_encoder"] = qwen
        for i, caption in enumerate(captions):
            picture = {} if sources is None else {"image": [as_picture(sources[i])]}
            states, _ = pipeline._encode_prompt_qwen(
                [clean(caption, kind)],
                device=at,
                max_sequence_length=max_sequence_length,
                dtype=dtypes[0],
                **picture,
            )
            embeds.append(states[0].cpu())
        hook.remove()
        vars(pipeline)["text_encoder"] = None
    del qwen
    _free()
    with torch.no_grad():
        vars(pipeline)["text_encoder_2"] = _clip(folder, dtypes[1]).to(at)
        pooled = [pipeline._encode_prompt_clip([clean(caption, kind)], at, dtypes[1])[0].cpu() for caption in captions]
    del pipeline
    _free()
    return [Encoded(*row) for row in zip(ids, embeds, pooled, strict=True)]


def moments_of_the_vae(
    folder: Path, crops: Sequence[torch.Tensor], device: str, dtype: torch.dtype
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """``vae.encode`` of the pipeline's own ``image_processor.preprocess`` of each crop.

    Args:
        crops: uint8 ``[3, H, W]``.

    Returns:
        mean and std of each, ``[H/8, W/8, 16]`` float32, unscaled.
    """
    import torch
    from diffusers import AutoencoderKL
    from PIL import Image

    processor = _pipeline(folder).image_processor
    moments = []
    with (
        torch.no_grad(),
        silent("diffusers.models.modeling_utils"),
    ):  # it warns at every cast that no module stays in float32
        with handed_over(folder, "vae") as only:
            vae = AutoencoderKL.from_pretrained(only, torch_dtype=dtype, local_files_only=True)
        vae = vae.to(device)
        for crop in crops:
            pixels = processor.preprocess(Image.fromarray(crop.permute(1, 2, 0).numpy()))
            posterior = vae.encode(pixels.to(device, dtype)).latent_dist
            mean, std = (m[0].permute(1, 2, 0).float().cpu() for m in (posterior.mean, posterior.std))
            moments.append((mean, std))
    del vae
    _free()
    return moments


def _pipeline(folder: Path, kind: Kind = "t2i") -> Any:
    """The pipeline with its tokenizers and no models. That of image-to-image has an image processor of Pillow."""
    pipeline = empty_pipeline(kind)
    tokenizer = load_tokenizer(folder) if kind == "t2i" else load_processor(folder).whole
    vars(pipeline).update(tokenizer=tokenizer, tokenizer_2=load_clip_tokenizer(folder))
    return pipeline


@contextmanager
def _loaded_qwen(folder: Path, device: str, dtype: torch.dtype) -> Iterator[Any]:
    """The whole ``Qwen2_5_VLForConditionalGeneration``, loaded as diffusers does; spread if it does not fit."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    free = _free_bytes(device)
    num_bytes = sum(file.stat().st_size for file in weight_files(folder, "text_encoder"))
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True}
    with tempfile.TemporaryDirectory() as spill:
        if num_bytes > ROOM * free[device]:
            index = {name: int(name.partition(":")[2] or 0) if name != "cpu" else "cpu" for name in free}
            room = {index[name]: int(ROOM * count) for name, count in free.items()}
            options |= {"device_map": "auto", "max_memory": room, "offload_folder": spill}
        # It reports the lm_head and the vision tower where they were not downloaded; nothing here uses them.
        quiet = silent("transformers.modeling_utils")
        with handed_over(folder, "text_encoder", Path(spill)) as only, no_progress_bar(), quiet:
            model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
                only, local_files_only=True, trust_remote_code=False, **options
            )
        yield (model if "device_map" in options else model.to(device)).eval()


def _clip(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import CLIPTextModel

    with handed_over(folder, "text_encoder_2") as only, no_progress_bar():
        model = CLIPTextModel.from_pretrained(only, dtype=dtype, local_files_only=True, trust_remote_code=False)
    return model.eval()


def _free_bytes(device: str) -> dict[str, int]:
    """Free memory of the device, and of the host."""
    import torch

    free = {"cpu": free_ram()}
    return free if device == "cpu" else {device: torch.cuda.mem_get_info(device)[0], **free}


def _free() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
