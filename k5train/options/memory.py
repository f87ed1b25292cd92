"""``[train.memory]``: the options of how memory is used. The docstring under an option is its help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from k5cache.shared.console import parse_bytes


@dataclass(frozen=True)
class MemoryConfig:
    """``[train.memory]``: how memory is used."""

    vram: str | None = None
    """The VRAM to plan for and never exceed, given as the size of a card: "12GB". None: what is free on the GPU."""
    activations: Literal["auto", "nothing", "attention", "selective", "matmuls", "all"] = "auto"
    """What blocks keep for the backward pass; the rest is computed again. auto: as much as fits, see `k5train plan`."""
    execution: Literal["auto", "compiled", "eager", "diffusers"] = "auto"
    """How blocks run: compiled, one op at a time, or as diffusers' own modules. auto: compiled on a GPU, diffusers on a
    CPU."""
    graph: Literal["auto", "off"] = "auto"
    """Capture each kind of training pass, and the update, as a CUDA graph, which the GPU repeats without being told
    every kernel. auto: where it works; a line at the start names what turns it off. The graph takes some memory."""
    enable_group_offload: bool = False
    """Keep the weights of all blocks in host memory and copy them to the GPU ahead of use. false: do so only for as
    many blocks as necessary."""
    group_offload_blocks_per_group: int = 1
    """Blocks that are copied together. Two groups are on the GPU at a time with group_offload_use_stream, else one."""
    group_offload_use_stream: bool = True
    """Copy on a separate CUDA stream while blocks are computed."""

    def check(self) -> list[str]:
        """What is out of range, or cannot be combined."""
        problems = []
        if self.vram is not None:
            try:
                parse_bytes(self.vram)
            except ValueError:
                problems.append(f'vram must be an amount such as "12GB", found {self.vram!r}')
        if self.group_offload_blocks_per_group < 1:
            problems.append(
                f"group_offload_blocks_per_group must be at least 1, found {self.group_offload_blocks_per_group}"
            )
        if self.execution == "diffusers" and self.enable_group_offload:
            problems.append("enable_group_offload needs execution = compiled or eager")
        if self.execution == "diffusers" and self.activations not in ("auto", "nothing", "all"):
            problems.append(f"activations = {self.activations} needs execution = compiled or eager")
        return problems
