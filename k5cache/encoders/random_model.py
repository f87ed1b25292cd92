"""What does the encoders' bench run on? A model of full size with random weights, and random pictures, on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FULL_TEXT = {  # Qwen2.5-VL-7B-Instruct, config.json
    "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 128000, "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]},
    "pad_token_id": None,
}  # fmt: skip
FULL_CLIP = {  # openai/clip-vit-large-patch14, text part
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "projection_dim": 768, "max_position_embeddings": 77,
}  # fmt: skip
FULL_VAE = {  # FLUX.1's autoencoder, config.json
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16,
    "scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip


FULL_VISION = {  # Qwen2.5-VL-7B-Instruct, config.json, vision_config
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
    "in_channels": 3, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2,
}  # fmt: skip
PREPROCESSOR = {  # Qwen2.5-VL-7B-Instruct, preprocessor_config.json
    "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip
_MARKS = ("im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")


def write_model(root: Path, sizes: Any, device: str) -> None:
    """Write random encoders in the diffusers layout, the text encoder a tensor at a time.

    Args:
        sizes: with ``vision``, the checkpoint is one of image-to-image: it has a vision tower, and a tokenizer that
            knows the marks of a picture.
    """
    import torch
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    where = root / "text_encoder"
    where.mkdir(parents=True)
    vision = sizes.vision or {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64,
                              "out_hidden_size": sizes.text["hidden_size"]}  # fmt: skip
    marks = {f"{mark}_token_id": 300 + i for i, mark in enumerate(_MARKS)} if sizes.vision else {}
    marks |= {"image_token_id": marks["image_pad_token_id"], "video_token_id": 305} if marks else {}
    nested = {"model_type": "qwen2_5_vl", "text_config": sizes.text, "vision_config": vision, **marks}
    (where / "config.json").write_text(json.dumps({**sizes.text, **nested}))
    write_text_encoder(root, device, has_tower=sizes.vision is not None)
    for name in ("tokenizer", "tokenizer_2"):
        write_tokenizer(root / name, sizes.clip["max_position_embeddings"] if name == "tokenizer_2" else 4096, name)
    if sizes.vision:
        _add_marks(root / "tokenizer")
        (root / "tokenizer" / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    CLIPTextModel(CLIPTextConfig(**sizes.clip, pad_token_id=1, eos_token_id=2)).to(torch.bfloat16).save_pretrained(
        root / "text_encoder_2"
    )
    AutoencoderKL(**sizes.vae).save_pretrained(root / "vae")


def as_pipeline(root: Path, encoder: Any, clip: Any, device: str, tower: Any = None) -> Any:
    """``Kandinsky5T2IPipeline`` with the same weights, its whole text encoder on the device.

    Args:
        tower: of a checkpoint of image-to-image; then it is ``Kandinsky5I2IPipeline``.
    """
    import torch
    from diffusers import Kandinsky5I2IPipeline, Kandinsky5T2IPipeline
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from k5cache.encoders import qwen, with_picture

    config = Qwen2_5_VLConfig.from_dict(json.loads((root / "text_encoder" / "config.json").read_text()))
    with torch.device("meta"):
        text_encoder = Qwen2_5_VLForConditionalGeneration(config).to(torch.bfloat16)
    text_encoder = text_encoder.to_empty(device=device).eval()
    text = text_encoder.model.language_model
    for ours, theirs in zip(encoder.model.layers, text.layers, strict=True):
        theirs.load_state_dict(ours.state_dict(), assign=True)
    text.norm.load_state_dict(encoder.model.norm.state_dict(), assign=True)
    text.embed_tokens.weight.copy_(encoder.embeddings)
    text.rotary_emb = encoder.model.rotary_emb
    if tower is not None:
        text_encoder.model.visual.load_state_dict(tower.model.state_dict(), assign=True)
        text_encoder.model.visual.rotary_pos_emb = tower.model.rotary_pos_emb
    tokenizer = qwen.load_tokenizer(root) if tower is None else with_picture.load_processor(root).whole
    return (Kandinsky5T2IPipeline if tower is None else Kandinsky5I2IPipeline)(
        transformer=None, vae=None, scheduler=None, text_encoder=text_encoder, tokenizer=tokenizer,
        text_encoder_2=clip.model, tokenizer_2=clip.tokenizer,
    )  # fmt: skip


def write_text_encoder(root: Path, device: str, has_tower: bool = False) -> None:
    """Write random weights of unit gain from the device into one safetensors file: text layers, vision tower."""
    import torch

    from k5cache.encoders.qwen import empty_text_model
    from k5cache.encoders.vision import empty_tower

    models = {"model": empty_text_model(root, torch.bfloat16)}
    models |= {"visual": empty_tower(root, torch.bfloat16)} if has_tower else {}
    shapes = {f"{part}.{name}": tuple(t.shape) for part, m in models.items() for name, t in m.state_dict().items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(torch.Size(shape).numel())
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (root / "text_encoder" / "model.safetensors").open("wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            if len(shape) == 1:
                is_norm = "norm" in name or "ln_q" in name
                tensor = torch.ones(shape, device=device) if is_norm else 0.1 * torch.randn(shape, device=device)
            else:
                tensor = torch.randn(shape, device=device, dtype=torch.bfloat16)
                tensor *= 1.0 if "embed_tokens" in name else torch.Size(shape[1:]).numel() ** -0.5
            flat = tensor.to(torch.bfloat16).flatten().view(torch.uint8)
            for piece in flat.split(2**26):  # type: ignore[no-untyped-call]
                file.write(memoryview(piece.cpu().numpy()))


def write_tokenizer(folder: Path, max_length: int, name: str) -> None:
    """Write a tokenizer with one token per word, so that a caption's length is known."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPTokenizer, PreTrainedTokenizerFast

    words = {f"w{i}": 10 + i for i in range(200)} | {"<unk>": 0, "<pad>": 1, "<end>": 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if name == "tokenizer_2":
        tokenizer.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 2)])
        vocabulary = {c: i for i, c in enumerate(["<unk>", "<pad>", "<end>", *map(chr, range(33, 127))])}
        vocabulary |= {f"{c}</w>": len(vocabulary) + i for i, c in enumerate(map(chr, range(33, 127)))}
        CLIPTokenizer(
            vocab=vocabulary, merges=[], unk_token="<unk>", pad_token="<pad>", eos_token="<end>", bos_token="<end>",
            model_max_length=max_length,
        ).save_pretrained(folder)  # fmt: skip
        return
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", model_max_length=max_length
    ).save_pretrained(folder)


def _add_marks(folder: Path) -> None:
    """Let a tokenizer know the marks that the template of image-to-image puts around a picture."""
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text())
    document["added_tokens"] += [
        {"id": 300 + i, "content": f"<|{mark}|>", "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for i, mark in enumerate(_MARKS)
    ]  # fmt: skip
    document["model"]["vocab"] |= {f"<|{mark}|>": 300 + i for i, mark in enumerate(_MARKS)}
    path.write_text(json.dumps(document))


def write_pictures(folder: Path, sizes: Any) -> None:
    """Write JPEG files of smooth noise at every scale, as large as ``sizes.source``."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    rng = np.random.default_rng(0)
    width, height = sizes.source

    def draw() -> Any:
        layers = []
        for k in range(1, 8):
            small = rng.normal(size=(max(1, height >> k), max(1, width >> k), 3)).astype(np.float32) * 2**k
            small = np.clip(small * 2 + 128, 0, 255).astype(np.uint8)
            layers.append(
                np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC), np.float32)
            )
        mixed = sum(layers) / len(layers) - 128
        return np.clip(128 + 2.5 * mixed, 0, 255).astype(np.uint8)

    for i in range(8):
        Image.fromarray(draw()).save(folder / f"{i:04d}.jpg", quality=92)
    for i in range(8, sizes.num_images):
        (folder / f"{i:04d}.jpg").write_bytes((folder / f"{i % 8:04d}.jpg").read_bytes())
