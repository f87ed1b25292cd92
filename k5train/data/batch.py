"""What does one micro-batch hold? Rows of one bucket, in groups whose captions have one length or are padded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from k5train.forward import routing


@dataclass(frozen=True)
class Group:
    """The rows of one forward pass: their captions have one length, or are padded and masked."""

    latents: Tensor
    """``[B, 1, H/8, W/8, 16]`` float32, scaled."""
    noise: Tensor
    """Like ``latents``, N(0, 1)."""
    sigma: Tensor
    """``[B]`` float32 in (0, 1)."""
    prompt_embeds: Tensor
    """``[B, L, 3584]`` in the dtype of the cache."""
    pooled_projections: Tensor
    """``[B, 768]``."""
    condition: Tensor | None = None
    """``[B, 1, H/8, W/8, 17]`` float32: the scaled latents of the source that is edited, and the mask channel. None:
    pictures are made from captions alone."""
    text_lengths: tuple[int, ...] | Tensor | None = None
    """The length of each caption, if ``prompt_embeds`` is padded at the end; the forward pass masks the padding. In a
    captured step, ``[B]`` int32 on the device. None: all have length L."""
    class_embeds: Tensor | None = None
    """``[B, L', 3584]``: the class captions, for differential output preservation. None: no row has one."""
    class_pooled: Tensor | None = None
    """``[B, 768]``."""
    class_lengths: tuple[int, ...] | None = None
    """As ``text_lengths``, of ``class_embeds``."""
    weight: Tensor | None = None
    """``[B]`` float32: the weight of each row's error. None: 1."""
    mask: Tensor | None = None
    """``[B, 1, H/8, W/8, 1]`` float32, 0 to 1: the weight of each position's error. None: 1."""
    path: Tensor | None = None
    """``[B, k + 1]`` sigmas, from the start of a rollout down to ``sigma``. None: no row has a rollout."""
    scores: Tensor | None = None
    """``[B, routes, N]``: the order in which TREAD keeps tokens, until the routes are chosen."""
    routes: tuple[routing.Route, ...] = ()
    """TREAD's routes of this forward pass."""

    def to(self, device: torch.device) -> Group:
        """The same group on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> Group:
        """The same group in page-locked memory, for asynchronous copies."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Group:
        changed: dict[str, Any] = {n: change(value) for n, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **changed, routes=tuple(replace(r, kept=change(r.kept)) for r in self.routes))


@dataclass(frozen=True)
class Batch:
    """One micro-batch: rows of one bucket."""

    rows: tuple[int, ...]
    """Row numbers of the mixture. With a single cache they are positions in its index."""
    groups: tuple[Group, ...]
    num_rows_of_update: int | None = None
    """Rows of all micro-batches of its update, of which other processes may have some. None: this process has all."""

    @property
    def num_rows(self) -> int:
        """Number of rows in all groups."""
        return len(self.rows)


def pad(members: Sequence[Group]) -> Group:
    """Groups of one bucket as one group. Captions are padded with zeros to the longest one, and ``text_lengths`` has
    their lengths; so are class captions, which all of the groups have or none."""
    padded, lengths = _padded([m.prompt_embeds for m in members])
    members = [replace(m, prompt_embeds=embeds) for m, embeds in zip(members, padded, strict=True)]
    of_classes = [m.class_embeds for m in members if m.class_embeds is not None]
    class_lengths = None
    if of_classes:
        padded, class_lengths = _padded(of_classes)
        members = [replace(m, class_embeds=embeds) for m, embeds in zip(members, padded, strict=True)]
    return replace(concatenate(members), text_lengths=lengths, class_lengths=class_lengths)


def _padded(texts: Sequence[Tensor]) -> tuple[list[Tensor], tuple[int, ...] | None]:
    """Texts with zeros up to the longest, and the length of each; None if they have one length."""
    lengths = tuple(text.shape[1] for text in texts for _ in text)
    longest = max(lengths)
    padded = [F.pad(text, (0, 0, 0, longest - text.shape[1])) if text.shape[1] < longest else text for text in texts]
    return padded, None if set(lengths) == {longest} else lengths


def concatenate(members: Sequence[Group]) -> Group:
    """Groups whose captions have one length as one group."""
    names = [name for name, value in vars(members[0]).items() if isinstance(value, Tensor)]
    tensors: dict[str, Any] = {name: torch.cat([vars(m)[name] for m in members]) for name in names}
    return Group(**tensors)
