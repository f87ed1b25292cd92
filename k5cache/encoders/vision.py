"""Qwen2.5-VL's vision tower: patches of a picture to the tokens that stand for it among those of its instruction.

It has 0.67 of the 8.3 billion parameters. It is loaded whole, for all pictures of a chunk, and freed before the text
layers begin if these are streamed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from k5cache.encoders.hostio import fetched, read_ahead
from k5cache.encoders.layers import attention_kernels
from k5cache.encoders.vision_plan import BATCH_PATCHES
from k5cache.encoders.weights import Weights
from k5cache.encoders.with_picture import Seen
from k5cache.shared.checkpoint import read_config
from k5cache.shared.part_files import VISION_PREFIXES

if TYPE_CHECKING:
    import torch

# The library hands all windows at once to an attention that has "flash" in its name, and else one after another.
_ATTENTION = "k5_flash_windows"


@dataclass(frozen=True)
class Tower:
    """The vision tower on its device, in evaluation mode, without gradients."""

    model: Any
    """``Qwen2_5_VisionTransformerPretrainedModel``."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return cast("torch.device", self.model.merger.ln_q.weight.device)


def load_tower(folder: Path, device: str | torch.device, dtype: torch.dtype) -> Tower:
    """Load the vision tower of ``folder/text_encoder``. On the CPU in the file's own dtype the weights stay mapped.

    Raises:
        ModelError: the files have no vision tower, or one that does not match the config.
    """
    import torch
    from transformers import AttentionInterface

    device = torch.device(device)
    weights, model = _checked(folder, dtype)
    names = list(model.state_dict())
    if device.type == "cpu":
        tensors = {name: weights.tensor(name) for name in names}
    else:
        (group,) = read_ahead([[weights.stored(name) for name in names]], device, reuse=False)
        tensors = {weights.own_name(name): tensor for name, tensor in group.items()}
    model.load_state_dict({name: t.to(dtype) for name, t in tensors.items()}, strict=True, assign=True)
    # The rotary frequencies are in no file. They are computed on the CPU in float32, as from_pretrained keeps them.
    without_layers = type(model.config).from_dict({**model.config.to_dict(), "depth": 0})
    model.rotary_pos_emb = type(model)._from_config(without_layers).rotary_pos_emb.to(device)
    AttentionInterface.register(_ATTENTION, _attend)
    return Tower(model.eval().requires_grad_(False))


def check_tower(folder: Path) -> None:
    """Check that the checkpoint has a vision tower, from its config and the headers of its files.

    Raises:
        ModelError: the files have none, or one that does not match the config.
    """
    import torch

    _checked(folder, torch.bfloat16)


def _checked(folder: Path, dtype: torch.dtype) -> tuple[Weights, Any]:
    """The tower's weights, none missing or misshapen, and the tower itself on the meta device."""
    weights = Weights(folder, VISION_PREFIXES, "patch_embed.proj.weight", "vision tower, which image-to-image needs")
    model = empty_tower(folder, dtype)
    weights.check({name: tuple(value.shape) for name, value in model.state_dict().items()})
    return weights, model


def empty_tower(folder: Path, dtype: torch.dtype) -> Any:
    """The vision tower of the folder's config on the meta device: shapes, no memory."""
    import torch
    from transformers import Qwen2_5_VLConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    config = Qwen2_5_VLConfig.from_dict(read_config(folder, "text_encoder")).vision_config
    with torch.device("meta"):
        return Qwen2_5_VisionTransformerPretrainedModel._from_config(config).to(dtype)


def look(tower: Tower, pictures: Iterable[tuple[Any, Seen]], *, exact: bool = True) -> Iterator[tuple[Any, Any]]:
    """Yield (name, ``[tokens, 3584]`` on the CPU) of each named picture, in their order.

    Args:
        exact: one picture in a forward pass, so that every bit is what the pipeline computes. False puts several side
            by side in one pass, and the windows of equal size through one attention.
    """
    import torch

    def results() -> Iterator[tuple[Any, torch.Tensor]]:
        for batch in _batches(pictures, 1 if exact else BATCH_PATCHES):
            yield from zip(
                [name for name, _ in batch], _forward(tower, [seen for _, seen in batch], exact), strict=True
            )

    with torch.no_grad(), attention_kernels(exact):
        yield from fetched(results())


def _batches(pictures: Iterable[tuple[Any, Seen]], most: int) -> Iterator[list[tuple[Any, Seen]]]:
    batch: list[tuple[Any, Seen]] = []
    num_patches = 0
    for name, seen in pictures:
        if batch and num_patches + len(seen.patches) > most:
            yield batch
            batch, num_patches = [], 0
        batch.append((name, seen))
        num_patches += len(seen.patches)
    if batch:
        yield batch


def _forward(tower: Tower, batch: Sequence[Seen], exact: bool) -> Sequence[torch.Tensor]:
    """The tokens of each picture of a batch, in one forward pass."""
    import torch
    from transformers.vision_utils import get_vision_position_ids

    model = tower.model
    patches = torch.cat([seen.patches for seen in batch])
    if tower.device.type == "cuda":
        patches = patches.pin_memory()
    on_device = patches.to(tower.device, non_blocking=True).type(model.dtype)  # get_image_features casts there, too
    # On the CPU: every layer asks for the lengths of the windows, and would wait for the device each time.
    grids = torch.tensor([seen.grid for seen in batch])
    merged = int(model.spatial_merge_size)
    places = get_vision_position_ids(grids, merged).to(tower.device)
    options: dict[str, Any] = {} if exact else {"k5_groups": {}}
    model.config._attn_implementation = "sdpa" if exact else _ATTENTION
    tokens = model(on_device, grid_thw=grids, position_ids=places, **options).pooler_output
    return cast("Sequence[torch.Tensor]", torch.split(tokens, [len(seen.patches) // merged**2 for seen in batch]))


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor,
    k5_groups: dict[int, list[tuple[torch.Tensor, int, int]]],
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within each window, windows of one size at once. query, key, value: ``[1, heads, patches, d]``.

    Args:
        cu_seq_lens_q: where the windows begin, and the end.
        k5_groups: of the windows that an earlier layer had, their groups.

    Returns:
        ``[1, patches, heads, d]``.
    """
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    groups = k5_groups.setdefault(id(cu_seq_lens_q), [])
    if not groups:
        groups += _groups(cu_seq_lens_q.tolist(), query.device)
    output = torch.empty_like(query.transpose(1, 2))
    for index, count, length in groups:
        parts = (
            t[0].index_select(1, index).view(t.shape[1], count, length, t.shape[3]).transpose(0, 1)
            for t in (query, key, value)
        )
        attended, _ = sdpa_attention_forward(module, *parts, None, scaling=scaling, is_causal=False)
        output[0].index_copy_(0, index, attended.flatten(0, 1))
    return output, None


def _groups(starts: Sequence[int], device: torch.device) -> list[tuple[torch.Tensor, int, int]]:
    """(patches, windows, patches of each) for every size of window."""
    import torch

    windows = sorted((end - start, start) for start, end in pairwise(starts))
    groups = []
    for length, members in groupby(windows, lambda window: window[0]):
        begins = [start for _, start in members]
        index = (torch.tensor(begins)[:, None] + torch.arange(length)).flatten()
        groups.append((index.to(device), len(begins), length))
    return groups
