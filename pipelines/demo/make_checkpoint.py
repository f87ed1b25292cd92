"""What do tests and selftests run on? A complete Kandinsky 5 Image at toy size, made from a seed with the real classes.

    python pipelines/demo/make_checkpoint.py build/toy
    python pipelines/demo/make_checkpoint.py build/toy_edit --i2i

The folder has the layout of the published checkpoints, so ``Kandinsky5T2IPipeline.from_pretrained`` loads it, or
``Kandinsky5I2IPipeline.from_pretrained`` with ``--i2i``. Two things differ from them besides size: the weights are
random, and ``tokenizer/`` holds the tokenizer alone (with ``--i2i`` also the config of the image processor), because
the published one is a ``Qwen2VLProcessor``, which needs torchvision.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5I2IPipeline,
    Kandinsky5T2IPipeline,
    Kandinsky5Transformer3DModel,
)
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
)
from transformers.utils.logging import disable_progress_bar

TOKENIZERS = Path(__file__).parent / "tokenizers"
QWEN_HIDDEN = 64  # 3584 in the published model
CLIP_HIDDEN = 48  # 768: not QWEN_HIDDEN, so that mixing the two up fails

# Qwen2.5-VL's added tokens in their published order (ids 151643 to 151664 there); the second list is not special.
QWEN_SPECIAL = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
]
QWEN_ADDED = [
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>"),
]

IMAGE_PROCESSOR = {  # preprocessor_config.json of Qwen2.5-VL
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
}


def make(folder: Path, seed: int = 0, is_i2i: bool = False) -> None:
    """Write the checkpoint: transformer and text encoders in bfloat16, the VAE in float32, about 10 MB in 1 second.

    The same seed gives the same bytes. torch's global generator does not change.

    Args:
        is_i2i: it edits pictures: the transformer takes a source's latents too, and ``tokenizer/`` has the config of
            the image processor, with which Qwen sees the source.
    """
    tokenizer, tokenizer_2 = qwen_tokenizer(), clip_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = (Kandinsky5I2IPipeline if is_i2i else Kandinsky5T2IPipeline)(
            transformer=to_bfloat16(transformer(visual_cond=is_i2i)),
            text_encoder=to_bfloat16(text_encoder(tokenizer)),
            tokenizer=tokenizer,
            text_encoder_2=to_bfloat16(text_encoder_2(tokenizer_2)),
            tokenizer_2=tokenizer_2,
            vae=vae(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),  # scheduler_scale of kandinsky-5's own T2I pipeline
        )
    if not is_i2i:
        check_template(pipeline)  # that of I2I crops more than its template, and so a part of the instruction
    disable_progress_bar()
    pipeline.save_pretrained(folder)
    name_as_published(folder / "text_encoder_2" / "model.safetensors")
    if is_i2i:
        processor = json.dumps(IMAGE_PROCESSOR, indent=2)
        (folder / "tokenizer" / "preprocessor_config.json").write_text(processor + "\n", encoding="utf-8")


def transformer(visual_cond: bool = False) -> Kandinsky5Transformer3DModel:
    """Two text and three visual blocks of width 128; 4 heads of 32 channels.

    Kandinsky starts training with zero modulations, which close the gates of every block. Here they are random, so that
    the output depends on every weight.
    """
    model = Kandinsky5Transformer3DModel(
        in_visual_dim=16,
        out_visual_dim=16,
        in_text_dim=QWEN_HIDDEN,
        in_text_dim2=CLIP_HIDDEN,
        time_dim=64,
        patch_size=(1, 2, 2),
        model_dim=128,
        ff_dim=384,
        num_text_blocks=2,
        num_visual_blocks=3,
        axes_dims=(8, 12, 12),
        visual_cond=visual_cond,
    )
    for name, parameter in model.named_parameters():
        if "modulation" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """Two text layers with grouped queries and two vision layers. As in the 7B model, embeddings are not tied."""
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad")}
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": QWEN_HIDDEN,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        # time, height and width share the 8 frequencies of a head of 16 channels (16, 24, 24 of 64 in the 7B model)
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [2, 3, 3]},
        "bos_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
    }
    vision: dict[str, Any] = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": QWEN_HIDDEN,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    spread(model)
    return model


def text_encoder_2(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Two layers over 77 positions. It has the tokenizer's ids, so the pooler reads the first end-of-text token."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=CLIP_HIDDEN,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=CLIP_HIDDEN,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = CLIPTextModel(config)
    spread(model)
    return model


def vae() -> AutoencoderKL:
    """Flux's autoencoder with narrow layers: 8 times smaller on each side, 16 channels, no quant convolutions."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=16,
        sample_size=128,
        scaling_factor=0.3611,
        shift_factor=0.1159,  # in Flux's config; Kandinsky does not use it
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def name_as_published(file: Path) -> None:
    """Put ``text_model.`` before the names of CLIP's tensors, as in the published file; transformers 5.23 omits it."""
    tensors = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def spread(model: torch.nn.Module) -> None:
    """Draw a text model's embeddings and matrices again, at unit gain.

    With the 0.02 of transformers the layers add almost nothing: whether "red" or "blue" stands before a word changed
    its hidden state by 0.1 %, less than bfloat16 can represent.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight)
        elif isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=module.in_features**-0.5)


def to_bfloat16(model: torch.nn.Module) -> torch.nn.Module:
    """Convert all weights as on the hub, modulations too; diffusers' own ``to`` warns that those compute in float32."""
    return torch.nn.Module.to(model, torch.bfloat16)


def qwen_tokenizer(folder: Path = TOKENIZERS) -> Qwen2Tokenizer:
    """A part of Qwen2.5's vocabulary, renumbered: 256 bytes, then the merged tokens, then the 22 added ones."""
    merges = read_merges(folder / "qwen_merges.txt")
    vocabulary = [*byte_characters(), *(left + right for left, right in merges)]
    # eos is set below: if it were named here, <|im_end|> would get the first of the added ids.
    tokenizer = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(vocabulary)},
        merges=merges,
        padding_side="right",  # the pipeline slices the template off the left and passes no mask
        model_max_length=131072,
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in QWEN_SPECIAL], True)
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in QWEN_ADDED])
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    return tokenizer


def clip_tokenizer(folder: Path = TOKENIZERS) -> CLIPTokenizer:
    """A part of CLIP's vocabulary, renumbered: 256 bytes, 256 at a word's end, the merged tokens, start and end."""
    merges = read_merges(folder / "clip_merges.txt")
    bytes_ = byte_characters()
    vocabulary = [*bytes_, *(f"{byte}</w>" for byte in bytes_), *(left + right for left, right in merges)]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(vocabulary)},
        merges=merges,
        pad_token="<|endoftext|>",
        model_max_length=77,
    )


def read_merges(file: Path) -> list[tuple[str, str]]:
    """The merges that ``make_tokenizers.py`` wrote, in order."""
    pairs = [line.split(" ") for line in file.read_text(encoding="utf8").splitlines()]
    return [(left, right) for left, right in pairs]


def byte_characters() -> list[str]:
    """The printable characters that stand for bytes, in the order of both vocabularies."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def check_template(pipeline: Kandinsky5T2IPipeline) -> None:
    """Check that the installed diffusers crops as many tokens as its template has in this vocabulary."""
    prefix = pipeline.prompt_template.split("{}")[0]
    num_tokens = len(pipeline.tokenizer(prefix)["input_ids"])
    assert num_tokens == pipeline.prompt_template_encode_start_idx, (num_tokens, prefix)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a toy Kandinsky 5 Image checkpoint.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--i2i", action="store_true", help="a model that edits pictures")
    arguments = parser.parse_args()
    make(arguments.folder, arguments.seed, arguments.i2i)
    print(arguments.folder)
