"""How is a large image encoded on a small card? Layer by layer, each layer's work in strips of rows.

Tiles that are encoded separately and blended leave seams, because group norms and attention see a tile instead of the
image. Here every layer sees the whole image. Convolutions are computed in strips, each with the rows around it that its
kernel needs; norms first take their statistics over the whole image. Only the order of additions differs from the plain
encoder. Two activations are in memory, not four or more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

STRIP_PIXELS = 2**17
"""Pixels of the output in one strip: 128 rows of 1024."""


def moments_in_strips(vae: Any, pixels: torch.Tensor, strip_pixels: int = STRIP_PIXELS) -> torch.Tensor:
    """The mean and log-variance of ``AutoencoderKL``'s posterior, ``[1, 32, H/8, W/8]``.

    Args:
        pixels: ``[1, 3, H, W]`` on the VAE's device, in its dtype.
    """
    encoder = vae.encoder
    x = _convolve(encoder.conv_in, pixels, strip_pixels)
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            x = _resnet(resnet, x, strip_pixels)
        for downsampler in block.downsamplers or ():
            x = _downsample(downsampler, x, strip_pixels)
    x = encoder.mid_block(x)
    x = encoder.conv_out(encoder.conv_act(encoder.conv_norm_out(x)))
    return x if vae.quant_conv is None else vae.quant_conv(x)


def _resnet(resnet: Any, x: torch.Tensor, strip_pixels: int) -> torch.Tensor:
    """``ResnetBlock2D`` without a time embedding; ``x`` is overwritten."""
    hidden = _convolve(resnet.conv1, x, strip_pixels, _normed(resnet.norm1, resnet.nonlinearity, x, strip_pixels))
    if resnet.conv_shortcut is not None:
        x = _convolve(resnet.conv_shortcut, x, strip_pixels)
    before = _normed(resnet.norm2, resnet.nonlinearity, hidden, strip_pixels)
    for top, bottom in _strips(x, strip_pixels):
        x[:, :, top:bottom] += _rows(resnet.conv2, hidden, top, bottom, before)
    if resnet.output_scale_factor != 1:
        x /= resnet.output_scale_factor
    return x


def _downsample(downsampler: Any, x: torch.Tensor, strip_pixels: int) -> torch.Tensor:
    """``Downsample2D`` as the VAE uses it: stride 2, with a row of zeros below and a column on the right."""
    import torch
    from torch.nn import functional as F

    conv = downsampler.conv
    height, width = x.shape[2] // 2, x.shape[3] // 2
    out = torch.empty(1, conv.out_channels, height, width, dtype=x.dtype, device=x.device)
    for top, bottom in _strips(out, strip_pixels):
        rows = x[:, :, 2 * top : 2 * bottom + 1]
        rows = F.pad(rows, (0, 1, 0, 2 * (bottom - top) + 1 - rows.shape[2]))
        out[:, :, top:bottom] = F.conv2d(rows, conv.weight, conv.bias, stride=2)
    return out


def _convolve(
    conv: Any, x: torch.Tensor, strip_pixels: int, before: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> torch.Tensor:
    """A convolution of stride 1 over ``before(x)``; the size stays the same."""
    import torch

    out = torch.empty(1, conv.out_channels, *x.shape[2:], dtype=x.dtype, device=x.device)
    for top, bottom in _strips(x, strip_pixels):
        out[:, :, top:bottom] = _rows(conv, x, top, bottom, before)
    return out


def _rows(
    conv: Any, x: torch.Tensor, top: int, bottom: int, before: Callable[[torch.Tensor], torch.Tensor] | None
) -> torch.Tensor:
    """Rows ``top`` to ``bottom`` of a convolution's output."""
    from torch.nn import functional as F

    halo = conv.padding[0]
    first, last = max(0, top - halo), min(x.shape[2], bottom + halo)
    rows = x[:, :, first:last]
    if before is not None:
        rows = before(rows)
    rows = F.pad(rows, (halo, halo, first - (top - halo), bottom + halo - last))
    return F.conv2d(rows, conv.weight, conv.bias)


def _normed(
    norm: Any, activation: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, strip_pixels: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function for any rows of ``x``: group norm with the statistics of all of ``x``, then the activation."""
    import torch

    groups = norm.num_groups
    count = x.numel() // groups
    total = torch.zeros(groups, dtype=torch.float64, device=x.device)
    for top, bottom in _strips(x, strip_pixels):
        total += x[0, :, top:bottom].reshape(groups, -1).float().sum(1)
    mean = (total / count).float()[:, None]
    total.zero_()
    for top, bottom in _strips(x, strip_pixels):
        total += (x[0, :, top:bottom].reshape(groups, -1).float() - mean).square_().sum(1)
    deviation = torch.rsqrt(total / count + norm.eps).float()[:, None]
    per_group = (groups, x.shape[1] // groups)
    scale = (deviation * norm.weight.float().view(per_group)).view(1, -1, 1, 1)
    shift = norm.bias.float().view(1, -1, 1, 1) - mean.expand(per_group).reshape(1, -1, 1, 1) * scale

    def apply(rows: torch.Tensor) -> torch.Tensor:
        return activation(torch.addcmul(shift, rows.float(), scale).to(rows.dtype))

    return apply


def _strips(out: torch.Tensor, strip_pixels: int) -> Iterator[tuple[int, int]]:
    """(first row, end) of each strip."""
    height, width = out.shape[2:]
    rows = max(1, strip_pixels // width)
    for top in range(0, height, rows):
        yield top, min(height, top + rows)
