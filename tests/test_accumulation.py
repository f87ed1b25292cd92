"""Does every row of an update weigh the same, however rows fall into micro-batches and groups of one caption length?"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from k5train.data.batch import Batch, Group
from k5train.objective import flow
from k5train.training.step import accumulate, by_sigma, train_step

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
    return loss.mean, toy.weight.grad


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


WEIGHTS = torch.linspace(0.1, 2, NUM_ROWS)
MASK = torch.zeros(NUM_ROWS, 1, 4, 4, 1)
MASK[:, :, :2] = 1
ROLLED = torch.tensor([[0.9, 0.5]] * 2 + [[0.4, 0.4]] * 5)  # the first two rows begin at a higher sigma


@pytest.mark.parametrize(
    ("changes", "huber_c"),
    [({}, None), ({"weight": WEIGHTS}, None), ({"mask": MASK}, None), ({}, 0.5), ({"path": ROLLED}, 1.0)],
    ids=["plain", "weight", "mask", "huber", "rollout"],
)  # fmt: skip
def test_each_row_has_its_plain_squared_error_whatever_is_trained_on_and_gradients_keep_their_bits(changes, huber_c):
    group = replace(a_group(slice(0, NUM_ROWS)), **changes)
    if group.path is not None:
        group = replace(group, sigma=group.path[:, -1])
    batches = [
        Batch(tuple(range(len(rows))), (replace(group, **{n: t[rows] for n, t in tensors_of(group).items()}),))
        for rows in (torch.arange(0, 3), torch.arange(3, NUM_ROWS))
    ]
    passes, toys = [], (Toy(), Toy())

    def predict(toy: Toy, *inputs: Tensor) -> Tensor:
        passes.append(len(inputs[0]))
        return toy(*inputs)

    losses = accumulate(
        partial(predict, toys[0]), batches, None, torch.device("cpu"), loss_of=partial(train_step, huber_c=huber_c)
    )  # type: ignore[arg-type]
    assert passes == ([2, 3, 4] if group.path is not None else [3, 4])  # the rollout of two rows, and the two batches
    for batch in batches:
        part = batch.groups[0]
        torch.autograd.backward(train_step(toys[1], part, huber_c) * (len(part.sigma) / NUM_ROWS))
    assert torch.equal(toys[0].weight.grad, toys[1].weight.grad)
    velocity = toys[1](flow.add_noise(group.latents, group.noise, group.sigma), None, group.prompt_embeds, None)
    expected = (velocity - (group.noise - group.latents)).square().mean((1, 2, 3, 4))
    kept = range(2, NUM_ROWS) if group.path is not None else range(NUM_ROWS)
    assert [sigma for sigma, _ in losses.errors] == [group.sigma[i].item() for i in kept]
    assert [error for _, error in losses.errors] == pytest.approx([expected[i].item() for i in kept], rel=1e-6)


def tensors_of(group: Group) -> dict[str, Tensor]:
    return {name: value for name, value in vars(group).items() if isinstance(value, Tensor)}


def test_errors_are_averaged_in_equal_parts_of_sigma():
    nan = float("nan")
    errors = ((0.0, 1.0), (0.24, 2.0), (0.25, 7.123456789), (0.5, nan), (0.99, 3.0), (1.0, 5.0))
    assert by_sigma(errors, 4) == [1.5, 7.12346, None, 4.0]
    assert by_sigma(errors, 1) == [None]  # NaN is in it
    assert by_sigma((), 2) == [None, None]
