"""Does every row of an update weigh the same, however rows fall into micro-batches and groups of one caption length?"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from k5train.data.batch import Batch, Group
from k5train.training.step import accumulate, train_step

NUM_ROWS = 7


def a_group(rows: slice) -> Group:
    """Some of seven rows of noise in float64, in which sums differ by less than 1e-12 through rounding."""
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, NUM_ROWS, 1, 4, 4, 16, generator=generator, dtype=torch.float64)
    sigma = torch.rand(NUM_ROWS, generator=generator)
    text = torch.randn(NUM_ROWS, 3, 5, generator=generator, dtype=torch.float64)
    return Group(latents[rows], noise[rows], sigma[rows], text[rows], text[rows, 0])


class Toy(nn.Module):
    """A model that returns its weight times the noisy latents, plus a share of the caption."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 16, dtype=torch.float64))

    def forward(self, latents: Tensor, sigma: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
        return latents.double() * self.weight + text.mean((1, 2)).view(-1, 1, 1, 1, 1) * self.weight.square()


def outcome(*batches: list[slice], weights: Tensor | None = None) -> tuple[float, Tensor]:
    """Loss and gradient of one update of these micro-batches, each a list of groups."""
    toy, losses = Toy(), []
    for groups in batches:
        parts = [a_group(rows) for rows in groups]
        if weights is not None:
            parts = [replace(part, weight=weights[rows]) for part, rows in zip(parts, groups, strict=True)]
        count = sum(len(part.sigma) for part in parts)
        losses.append(Batch(tuple(range(count)), tuple(parts)))
    loss = accumulate(toy, losses, None, torch.device("cpu"), loss_of=train_step)  # type: ignore[arg-type]
    assert toy.weight.grad is not None
    return loss, toy.weight.grad


@pytest.mark.parametrize("weights", [None, torch.linspace(0.1, 2, NUM_ROWS)], ids=["plain", "weighted"])
@pytest.mark.parametrize(
    "split",
    [
        ([slice(0, 4)], [slice(4, 7)]),
        ([slice(0, 1)], [slice(1, 7)]),
        ([slice(0, 5), slice(5, 6)], [slice(6, 7)]),  # the first micro-batch has captions of two lengths
        tuple([slice(i, i + 1)] for i in range(NUM_ROWS)),
    ],
    ids=["4+3", "1+6", "(5, 1)+1", "one by one"],
)
def test_unequal_micro_batches_give_the_gradient_of_one_batch_of_all_rows(split, weights):
    loss, gradient = outcome([slice(0, NUM_ROWS)], weights=weights)
    parts_loss, parts_gradient = outcome(*split, weights=weights)
    assert parts_loss == pytest.approx(loss, rel=1e-6)  # the loss is a float32 mean
    torch.testing.assert_close(parts_gradient, gradient, rtol=1e-6, atol=1e-7)


def test_a_mean_of_means_would_not_be_the_same():
    _, gradient = outcome([slice(0, NUM_ROWS)])
    _, first = outcome([slice(0, 1)])
    _, rest = outcome([slice(1, NUM_ROWS)])
    assert (0.5 * first + 0.5 * rest - gradient).norm() > 0.01 * gradient.norm()
