"""Are our kernels right on this GPU? Each is compared with plain arithmetic on small cases before it is used."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

_outcomes: dict[str, bool] = {}


def outcomes() -> dict[str, bool]:
    """Which kernels of ours were compared so far, on whichever GPU, and whether each is used."""
    return dict(_outcomes)


def triton_works(device: torch.device, agrees: Callable[[torch.device], bool]) -> bool:
    """Whether Triton is there and ``agrees``; if only direct launches fail, they are turned off for all kernels."""
    if str(device) == "cuda":  # tensors name the number of their GPU
        device = torch.device("cuda", torch.cuda.current_device())
    works = _works(device, agrees)
    _outcomes[f"{agrees.__module__.rpartition('.')[2]}.{agrees.__name__.strip('_')}"] = works
    return works


@functools.cache
def _works(device: torch.device, agrees: Callable[[torch.device], bool]) -> bool:
    from torch.utils._triton import has_triton

    if not has_triton():
        return False
    from k5train.forward import kernels

    was_direct = kernels.is_direct
    if agrees(device):
        return True
    kernels.is_direct = False
    if was_direct and agrees(device):
        return True
    kernels.is_direct = was_direct
    return False


def exact(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor | None,
    bias: Tensor | None,
    z: Tensor | None,
    up: Tensor | None,
    segments: int,
) -> Tensor:
    """``ops._int8_matmul`` with torch alone: on integer tensor cores if cuBLAS takes the shapes, else in float64."""
    takes_shapes = a.shape[0] > 16 and a.shape[1] % 8 == 0 and b.shape[0] % 8 == 0
    if a.is_cuda and takes_shapes and int_mm_works(a.device):
        out = torch._int_mm(a, b.t()).float()
    else:
        out = (a.double() @ b.double().t()).float()  # sums of 10,240 products of int8 are exact in float64
    out = out * a_scale
    out = out if b_scale is None else out * b_scale.float().t()
    out = out if bias is None else out + bias.float()
    if z is not None and up is not None:
        columns, rank = out.shape[1] // segments, up.shape[1]
        for i in range(segments):
            part = slice(i * columns, (i + 1) * columns)
            out[:, part] += z[:, i * rank : (i + 1) * rank].float() @ up[part].float().t()
    return out


@functools.cache
def int_mm_works(device: torch.device) -> bool:
    """Whether ``torch._int_mm`` runs and is exact on a small case: not every card and build of torch has it."""
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randint(-127, 128, (32, 64), device=device, dtype=torch.int8, generator=generator) for _ in "ab")
    try:
        return torch.equal(torch._int_mm(a, b.t()).double(), a.double() @ b.double().t())
    except RuntimeError:
        return False


def scaling_agrees(device: torch.device) -> bool:
    """Whether int8 weights that are scaled have torch's bits."""
    from k5train.forward.kernels import scale_rows

    generator = torch.Generator(device).manual_seed(0)
    for rows, columns in ((96, 2560), (33, 100)):
        weight = torch.randint(-127, 128, (rows, columns), device=device, dtype=torch.int8, generator=generator)
        scale = torch.randn(rows, 1, device=device, generator=generator).bfloat16()
        target = torch.empty(rows, columns, dtype=scale.dtype, device=device)
        for _ in range(2):  # the first compiles, the second launches directly
            try:
                scale_rows(weight, scale, target.zero_())
            except Exception:  # Triton, ptxas, gcc and the driver each fail in their own way, with one answer
                return False
            if not torch.equal(target, scale * weight):
                return False
    return True


def hopper_agrees(device: torch.device) -> bool:
    """Whether Hopper's int8 matmul is exact but for the rounding of its result."""
    generator = torch.Generator(device).manual_seed(0)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-127, 128, shape, device=device, dtype=torch.int8, generator=generator)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16, generator=generator)

    for rows, columns, inner in ((4096, 2560, 272), (1500, 10240, 192)):  # square and wide tiles
        a, a_scale, b = integers(rows, inner), numbers(rows, 1).float().abs(), integers(columns, inner)
        full = (numbers(columns, 1).abs(), numbers(columns), numbers(rows, 20), numbers(20, columns).t())
        for b_scale, bias, z, up in (full, (None,) * 4):
            plain = exact(a, a_scale, b, b_scale, bias, z, up, 1)
            for _ in range(2):  # the first compiles, the second launches directly
                try:
                    from k5train.forward import hopper

                    ours = hopper.int8_matmul(a, a_scale, b, b_scale, bias, z, up, torch.bfloat16).double()
                except Exception:  # Triton, ptxas, gcc and the driver each fail in their own way, with one answer
                    return False
                if not ((ours - plain).norm() <= 5e-3 * plain.norm()).item():  # bfloat16 results: 2e-3
                    return False
    return True


def matmul_agrees(device: torch.device) -> bool:
    """Whether the int8 matmul, in every form that is used, is exact but for the rounding of its result."""
    from k5train.forward.kernels import int8_matmul, transpose

    generator = torch.Generator(device).manual_seed(0)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-127, 128, shape, device=device, dtype=torch.int8, generator=generator)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16, generator=generator)

    for rows in (96, 1024):  # small and large tiles
        a, a_scale, b = integers(rows, 256), numbers(rows, 1).float().abs(), integers(1536, 256)
        full = (numbers(1536, 1).abs(), numbers(1536), numbers(rows, 48), numbers(1536, 16), 3)
        for b_scale, bias, z, up, segments in (full, (None, None, numbers(rows, 20), numbers(20, 1536).t(), 1)):
            plain = exact(a, a_scale, b, b_scale, bias, z, up, segments)
            for _ in range(2):  # the first compiles, the second launches directly
                try:
                    ours = int8_matmul(a, a_scale, b, b_scale, bias, z, up, segments, torch.bfloat16).double()
                except Exception:  # Triton, ptxas, gcc and the driver each fail in their own way, with one answer
                    return False
                if not ((ours - plain).norm() <= 5e-3 * plain.norm()).item():  # bfloat16 results: 2e-3
                    return False
    weights = (integers(256, 640), b[:, :100])
    return all(torch.equal(transpose(w, w.new_empty(w.shape[::-1])), w.t()) for w in weights for _ in range(2))
