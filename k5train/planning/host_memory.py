"""Is there host memory for the weights that several processes of one machine stream, each from its own?"""

from __future__ import annotations

from collections.abc import Sequence

from k5cache.shared import console
from k5cache.shared.errors import DoesNotFit
from k5cache.shared.units import count_of

HOST_RESERVE = 2**30
"""Bytes of host memory that stay free for each worker beside the weights that it streams."""


def check_host_memory(num_bytes: Sequence[int], free: int) -> None:
    """Refuse processes that stream more weights from host memory, together, than is free.

    Args:
        num_bytes: what each process streams.

    Raises:
        DoesNotFit: says for how many there is room.
    """
    if not any(num_bytes):
        return
    needed = [HOST_RESERVE + streamed for streamed in num_bytes]
    if sum(needed) <= free:
        return
    fitting = sum(1 for count in range(1, len(needed)) if sum(needed[:count]) <= free)
    most = console.human_bytes(max(num_bytes))
    raise DoesNotFit(
        f"{count_of(len(needed), 'GPU')} need {console.human_bytes(sum(needed))} of host memory together, as each "
        f"streams up to {most} of weights from it, and {console.human_bytes(free)} is free",
        f"Use --gpus {max(1, fitting)}, close other programs, or stream less: a lower resolution or batch size leaves "
        "more weights on the GPU",
    )
