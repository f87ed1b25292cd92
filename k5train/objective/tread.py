"""Which visual tokens skip which blocks in a training step (TREAD)?

Krause et al., "TREAD: Token Routing for Efficient Architecture-agnostic Diffusion Training" (2025). A random subset of
each picture's tokens skips consecutive visual blocks and continues after them unchanged; the other tokens are computed
as if they were the whole picture, with their own RoPE. The loss is over all tokens. Sampling never skips any.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from k5cache.shared.errors import RecipeError
from k5train.forward.routing import Route
from k5train.options.objective import RouteConfig, TreadConfig


def check_routes(routes: Sequence[RouteConfig], num_blocks: int) -> None:
    """Refuse routes that do not fit the transformer, before anything is loaded.

    Args:
        num_blocks: number of visual blocks of the transformer.

    Raises:
        RecipeError: an index is out of range, a route ends before it starts, or two share a block.
    """
    taken: dict[int, int] = {}
    for number, route in enumerate(routes):
        name = f"train.tread.routes[{number}]"
        for key, index in (("start_layer_idx", route.start_layer_idx), ("end_layer_idx", route.end_layer_idx)):
            if not -num_blocks <= index < num_blocks:
                raise RecipeError(
                    f"{name}.{key} is {index}, the transformer has {num_blocks} visual blocks",
                    f"Use {-num_blocks} to {num_blocks - 1}; negative numbers count from the end",
                )
        first, last = route.start_layer_idx % num_blocks, route.end_layer_idx % num_blocks
        if last < first:
            raise RecipeError(
                f"{name} ends at block {last}, before its start at block {first}", "Exchange the two indices"
            )
        for block in range(first, last + 1):
            if block in taken:
                raise RecipeError(
                    f"{name} shares block {block} with routes[{taken[block]}]", "Use routes that do not overlap"
                )
            taken[block] = number


def ratio_at(ratio: float, step: int, num_steps: int, ramp_down: float) -> float:
    """``selection_ratio`` at update ``step`` (0 is the first). It falls to 0 over the last ``ramp_down`` of the run."""
    ramp = round(ramp_down * num_steps)
    left = num_steps - 1 - step
    return ratio * min(1.0, left / ramp) if ramp else ratio


def token_scores(num_tokens: int, generator: torch.Generator, forced: Tensor | None = None) -> Tensor:
    """The order in which tokens are kept, highest score first: forced ones first, the others at random.

    Args:
        forced: ``[num_tokens]`` bool: tokens that are never dropped.

    Returns:
        ``[num_tokens]`` float32: 0 to 1, and 1 to 2 for forced tokens.
    """
    scores = torch.rand(num_tokens, generator=generator)
    return scores if forced is None else scores + forced


def masked_tokens(mask: Tensor) -> Tensor:
    """``[N]`` bool: the tokens (2x2 latents) that a mask ``[H/8, W/8]`` from 0 to 1 covers at least in part."""
    height, width = mask.shape
    return (mask.view(height // 2, 2, width // 2, 2).amax(dim=(1, 3)) > 0).flatten()


def choose(scores: Tensor, config: TreadConfig, step: int, num_steps: int) -> tuple[Route, ...]:
    """The routes of one forward pass at update ``step``, without those that would drop nothing.

    ``floor(ratio * N)`` tokens of each picture are dropped, or fewer if a picture has more forced tokens than would be
    kept: all pictures of a forward pass keep the same number.

    Args:
        scores: ``[B, R, N]`` from ``token_scores``, one set for each route.
    """
    routes = []
    num_tokens = scores.shape[-1]
    for i, route in enumerate(config.routes):
        dropped = int(ratio_at(route.selection_ratio, step, num_steps, config.ramp_down) * num_tokens)
        forced = int((scores[:, i] >= 1).sum(1).max())
        kept = min(num_tokens, max(num_tokens - dropped, forced))
        if kept < num_tokens:
            order = scores[:, i].argsort(dim=1, descending=True, stable=True)
            routes.append(Route(route.start_layer_idx, route.end_layer_idx, order[:, :kept].sort(dim=1).values))
    return tuple(routes)
