"""Do the parts of a checkpoint belong together, and are they Kandinsky 5 Image? Compares configs, loads nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from k5cache.shared.errors import ModelError

Config = Mapping[str, Any]
VAE_SCALE = 8  # Kandinsky5T2IPipeline.vae_scale_factor_spatial


def check_parts(folder: object, configs: Mapping[str, Config]) -> None:
    """Refuse a checkpoint that neither stage could use, before any work.

    Args:
        folder: for the message.
        configs: the config.json of each part that is there: ``transformer``, ``vae``, ``text_encoder``,
            ``text_encoder_2``.

    Raises:
        ModelError: parts are of another model or do not fit each other. All problems are named.
    """
    transformer = configs.get("transformer", {})
    problems = [*_transformer(transformer), *_vae(configs.get("vae", {}), transformer), *_widths(configs)]
    if problems:
        raise ModelError(
            f"The model in {folder} is not Kandinsky 5 Image: {'; '.join(problems)}",
            "Give a Kandinsky 5 Image repository in the diffusers layout with --model DIR",
        )


def _transformer(config: Config) -> list[str]:
    problems = []
    name = config.get("_class_name", "Kandinsky5Transformer3DModel")
    if name != "Kandinsky5Transformer3DModel":
        return [f"its transformer is a {name}"]
    if config.get("patch_size", [1, 2, 2]) not in ([1, 2, 2], (1, 2, 2)):
        problems.append(f"its transformer has patches of {config['patch_size']}, not [1, 2, 2]")
    if config.get("visual_cond") not in (None, False, True):
        problems.append(f"its transformer has visual_cond {config['visual_cond']!r}, not true or false")
    return problems


def _vae(config: Config, transformer: Config) -> list[str]:
    if not config:
        return []
    name = config.get("_class_name")
    if name != "AutoencoderKL":
        return [f"its VAE is a {name}, not AutoencoderKL"]
    problems = []
    scale = 2 ** (len(config.get("block_out_channels") or ()) - 1)
    if scale != VAE_SCALE:  # the pipeline has the 8 written in it too: with another VAE it would draw other sizes
        problems.append(f"its VAE makes images {scale} times smaller, and the pipeline counts on {VAE_SCALE}")
    if config.get("scaling_factor") is None:
        problems.append("its VAE has no scaling_factor")
    channels, wanted = config.get("latent_channels"), transformer.get("in_visual_dim")
    if wanted is not None and channels != wanted:
        problems.append(f"its VAE makes latents of {channels} channels, and the transformer takes {wanted}")
    return problems


def _widths(configs: Mapping[str, Config]) -> list[str]:
    problems = []
    for part, option in (("text_encoder", "in_text_dim"), ("text_encoder_2", "in_text_dim2")):
        config, wanted = configs.get(part, {}), configs.get("transformer", {}).get(option)
        width = {**config, **(config.get("text_config") or {})}.get("hidden_size")
        if wanted is not None and width is not None and width != wanted:
            problems.append(f"its {part} gives vectors of {width} numbers, and the transformer takes {wanted}")
    return problems
