"""Do passes on fixed buffers, captured or not, give what passes on a group's own tensors give?

The recorder is a stand-in, which does recorded work again: what it reads must be in buffers, as in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from k5cache.shared.errors import RunError
from k5train.data.batch import Batch, Group
from k5train.forward.routing import Route, come_back, leave
from k5train.options.train import TrainConfig
from k5train.training import graph as graph_module
from k5train.training.fixed_inputs import Buffers, FixedInputs, kind_of
from k5train.training.graph import GraphedPasses, can_be_captured
from k5train.training.step import accumulate, clip_gradients, compute_on, exploded, loss_function, update

CPU = torch.device("cpu")
ROOM = 16


class Toy(nn.Module):
    """Looks at all that a group may have, and at a caption only as far as its length."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 16))
        self.of_text = nn.Parameter(torch.linspace(0.5, 1, 5))

    def forward(
        self, latents: Tensor, sigma: Tensor, text: Tensor, pooled: Tensor, *, condition: Tensor | None = None,
        text_lengths: Tensor | tuple[int, ...] | None = None, routes: tuple[Route, ...] = (),
    ) -> Tensor:  # fmt: skip
        lengths = torch.as_tensor([text.shape[1]] * len(text) if text_lengths is None else text_lengths)
        is_inside = torch.arange(text.shape[1]) < lengths[:, None]
        caption = ((text * self.of_text).sum(-1) * is_inside).sum(1) / lengths + pooled.mean(1) * sigma
        tokens = (latents * self.weight).flatten(1, 3)
        for route in routes:
            kept, _ = leave(tokens, tokens[:1], route.kept)
            tokens = come_back(tokens, kept * self.weight, route.kept)
        tokens = tokens.view_as(latents) + caption.view(-1, 1, 1, 1, 1)
        return tokens if condition is None else tokens + condition[..., :16] * self.weight.square()


class Counted:
    """A recorder that counts, and does recorded work again."""

    def __init__(self, fails: Callable[[int], Exception | None] = lambda number: None) -> None:
        self.recorded, self.repeated, self.released, self.fails = 0, 0, 0, fails

    def record(self, work: Callable[[], object]) -> Callable[[], object]:
        self.recorded += 1
        if error := self.fails(self.recorded):
            raise error

        def repeat() -> None:
            self.repeated += 1
            work()

        return repeat

    def release(self) -> None:
        self.released += 1


def a_group(seed: int = 0, rows: int = 2, side: int = 4, tokens: int = 3, **fields: object) -> Group:
    generator = torch.Generator().manual_seed(seed)
    latents, noise = torch.randn(2, rows, 1, side, side, 16, generator=generator)
    text, sigma = torch.randn(rows, tokens, 5, generator=generator), torch.rand(rows, generator=generator)
    return Group(latents, noise, sigma, text, text[:, 0], **fields)  # type: ignore[arg-type]


def a_batch(*groups: Group) -> Batch:
    return Batch(tuple(range(sum(len(g.sigma) for g in groups))), groups)


def kept(seed: int, rows: int = 2) -> tuple[Route, ...]:
    generator = torch.Generator().manual_seed(seed)
    return (
        Route(1, -2, torch.stack([torch.randperm(16, generator=generator)[:7].sort().values for _ in range(rows)])),
    )


MASK = (torch.arange(2 * 16).view(2, 1, 4, 4, 1) % 5 > 1).float()
STEPS = {
    "captions of other lengths": [[a_batch(a_group(i, tokens=n))] for i, n in enumerate((3, 9, 1, 16, 2))],
    "captions that differ in a batch": [
        [a_batch(a_group(i, tokens=9, text_lengths=lengths))] for i, lengths in enumerate(((9, 2), (1, 9), (9, 8)))
    ],
    "accumulation over sizes and groups": [
        [a_batch(a_group(i)), a_batch(a_group(i + 50, 1, tokens=5), a_group(i + 70, 3)), a_batch(a_group(i, side=6))]
        for i in range(4)
    ],
    "weights and masks": [
        [a_batch(a_group(i, weight=torch.tensor([0.2, 0.1 * i]), mask=MASK.roll(i, 2)))] for i in range(4)
    ],
    "a source": [[a_batch(a_group(i, condition=a_group(i + 9).latents[..., :1].expand(-1, -1, -1, -1, 17)))]
                 for i in range(4)],
    "routes": [[a_batch(a_group(i, routes=kept(i)))] for i in range(4)],
    "groups with weights, a source and routes": [
        [a_batch(*(
            a_group(i + n, rows, tokens=n, weight=torch.full((rows,), 0.3 * n), routes=kept(i + n, rows),
                    condition=a_group(i + 9 * n, rows).latents[..., :1].expand(-1, -1, -1, -1, 17))
            for n, rows in ((3, 1), (i + 4, 2), (12, 1))
        ))]
        for i in range(4)
    ],
    "a caption longer than the buffer": [[a_batch(a_group(i, tokens=n))] for i, n in enumerate((3, 20, 20, 3, 20))],
}  # fmt: skip


def train(
    steps: list[list[Batch]], config: TrainConfig, recorder: Counted | None, seen: list[GraphedPasses] | None = None
) -> tuple[list[tuple[float, ...]], list[Tensor]]:
    """Updates of a toy; returns what each gave, and the trained weights."""
    toy, loss_of = Toy(), loss_function(config)
    parameters = list(toy.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.5)
    graphs = GraphedPasses(partial(compute_on, toy, loss_of), parameters, ROOM, CPU, recorder) if recorder else None
    if seen is not None and graphs:
        seen.append(graphs)
    outcomes = []
    for batches in steps:
        losses = accumulate(toy, batches, None, CPU, 1e3, loss_of, graphs=graphs,
                            clip=partial(clip_gradients, parameters, 1.0))  # type: ignore[arg-type]  # fmt: skip
        assert losses.norm is not None
        update(optimizer, losses.norm, None, graphs)
        outcomes.append((losses.mean, losses.norm, *(x for pair in losses.errors for x in pair)))
    return outcomes, [p.detach().clone() for p in parameters]


@pytest.mark.parametrize("huber", [False, True], ids=["l2", "huber"])
@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
def test_captured_passes_give_the_losses_norms_and_weights_of_plain_ones(steps, huber):
    plain_config = TrainConfig()
    objective = replace(plain_config.objective, loss_type="huber" if huber else "l2")
    config, recorder = replace(plain_config, objective=objective), Counted()
    ours, weights = train(steps, config, recorder)
    plain, plain_weights = train(steps, config, None)
    assert recorder.repeated > 0
    for a, b in zip(ours, plain, strict=True):
        assert a == pytest.approx(b, rel=1e-6)  # a caption's sum has its padding's zeros in another order
    for a, b in zip(weights, plain_weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_what_is_captured_has_the_bits_of_what_is_not():
    steps = [batches for name in ("captions of other lengths", "routes", "a source") for batches in STEPS[name]]
    never = Counted(lambda number: torch.OutOfMemoryError())
    captured, given_up = train(steps, TrainConfig(), Counted()), train(steps, TrainConfig(), never)
    assert captured[0] == given_up[0]
    assert all(torch.equal(a, b) for a, b in zip(captured[1], given_up[1], strict=True))
    assert (never.recorded, never.repeated, never.released) == (1, 0, 1)


def test_a_kind_is_the_shapes_and_fields_of_a_group_and_not_its_captions_lengths():
    plain = kind_of([a_group()], ROOM)
    assert plain == kind_of([a_group(5, tokens=ROOM)], ROOM) == kind_of([a_group(text_lengths=(1, 3))], ROOM)
    others = [
        a_group(rows=1), a_group(side=6), a_group(tokens=ROOM + 1), a_group(mask=MASK), a_group(weight=torch.ones(2)),
        a_group(routes=kept(0)), a_group(routes=(replace(kept(0)[0], end=-1),)),
    ]  # fmt: skip
    assert len({plain, *(kind_of([group], ROOM) for group in others)}) == 1 + len(others)


def test_the_first_pass_of_a_kind_is_plain_and_then_all_are_captured_the_largest_first():
    toy, order = Toy(), []
    recorder = Counted()

    class Noting(Counted):
        def record(self, work):
            order.append(work.args[0].num_elements)
            return recorder.record(work)

        def release(self) -> None:
            recorder.release()

    graphs = GraphedPasses(
        partial(compute_on, toy, loss_function(TrainConfig())), list(toy.parameters()), ROOM, CPU, Noting()
    )
    small, large = a_group(side=4), a_group(side=6)
    graphs.run([small], 1.0)
    graphs.run([large], 1.0)
    assert recorder.recorded == 0
    graphs.run([small], 1.0)
    assert order == [large.latents.numel(), small.latents.numel()]
    graphs.run([large], 1.0)
    assert (recorder.recorded, recorder.repeated, recorder.released) == (2, 2, 0)
    graphs.run([a_group(side=8)], 1.0)  # needs the memory that the others hold
    assert (recorder.repeated, recorder.released, graphs.num_graphs) == (2, 1, 0)
    graphs.run([small], 1.0)
    assert (order[2:], graphs.num_graphs) == ([2 * 64 * 16, 2 * 36 * 16, 2 * 16 * 16], 3)
    graphs.release()  # as before pictures are drawn: the pass after them is plain, whatever its kind
    graphs.run([small], 1.0)
    assert graphs.num_graphs == 0
    graphs.run([large], 1.0)
    assert graphs.num_graphs == 3


def test_trying_out_changes_nothing_and_is_done_once_a_kind():
    toy = Toy()
    graphs = GraphedPasses(
        partial(compute_on, toy, loss_function(TrainConfig())), list(toy.parameters()), ROOM, CPU, Counted()
    )
    graphs.try_out([a_group()])
    graphs.try_out([a_group(1)])
    assert graphs.num_graphs == 0
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in toy.parameters())
    graphs.run([a_group()], 1.0)
    assert graphs.num_graphs == 1


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no"), RuntimeError("operation not permitted\nmore")])
def test_where_capturing_fails_one_line_says_so_and_the_run_goes_on(error, capsys):
    seen: list[GraphedPasses] = []
    recorder = Counted(lambda number: error if number == 2 else None)
    steps = STEPS["accumulation over sizes and groups"]
    outcomes, weights = train(steps, TrainConfig(), recorder, seen)
    plain, plain_weights = train(steps, TrainConfig(), Counted())
    assert outcomes == plain
    assert all(torch.equal(a, b) for a, b in zip(weights, plain_weights, strict=True))
    assert seen[0].is_off
    assert (recorder.recorded, recorder.repeated, recorder.released) == (2, 0, 1)
    said = capsys.readouterr().err
    why = "not enough memory" if isinstance(error, torch.OutOfMemoryError) else "RuntimeError: operation not permitted"
    assert said.count("without a CUDA graph") == 1
    assert why in " ".join(said.split())


def test_beyond_the_most_kinds_nothing_is_captured_any_more(monkeypatch, capsys):
    monkeypatch.setattr(graph_module, "MOST_KINDS", 2)
    seen: list[GraphedPasses] = []
    steps = [[a_batch(a_group(i, side=side))] for i, side in enumerate((4, 4, 6, 4, 8, 4, 6, 8))]
    recorder = Counted()
    outcomes, _ = train(steps, TrainConfig(), recorder, seen)
    plain, _ = train(steps, TrainConfig(), None)
    assert [list(o) for o in outcomes] == [pytest.approx(list(p), rel=1e-6) for p in plain]
    assert seen[0].is_off
    assert seen[0].num_graphs == 0
    assert recorder.recorded == 3  # one kind, and then both
    assert capsys.readouterr().err.count("more than 2 kinds") == 1


def test_batches_of_seven_buckets_stay_captured_whatever_groups_their_captions_make():
    """Batches of 4 rows are split by the lengths of captions in all ways; a bucket's last batch has 3 rows."""
    splits = [(4,), (3, 1), (2, 2), (2, 1, 1), (1, 1, 1, 1), (1, 3), (3,), (1, 2), (1, 1, 1)]
    batches = [
        a_batch(*(a_group(100 * side + 10 * i + n, rows, side, tokens=2 + 3 * n) for n, rows in enumerate(split)))
        for i, split in enumerate(splits)
        for side in (4, 6, 8, 10, 12, 14, 16)
    ]
    seen: list[GraphedPasses] = []
    recorder = Counted()
    ours, weights = train([[batch] for batch in batches], TrainConfig(), recorder, seen)
    plain, plain_weights = train([[batch] for batch in batches], TrainConfig(), None)
    assert not seen[0].is_off
    assert seen[0].num_graphs == 7 * 2
    assert recorder.repeated >= len(batches) - 14
    assert [list(o) for o in ours] == [pytest.approx(list(p), rel=1e-5) for p in plain]
    for a, b in zip(weights, plain_weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # sums over rows instead of over groups


def test_kinds_share_their_buffers():
    buffers = Buffers(CPU)
    small, large = (FixedInputs([a_group(rows=rows, side=side)], ROOM, buffers) for rows, side in ((2, 6), (4, 4)))
    places = [
        [t.untyped_storage().data_ptr() for t in (x.group.prompt_embeds, x.group.latents)] for x in (small, large)
    ]
    assert places[0][1] == places[1][1]  # 4 pictures of 4 x 4 fit where 2 of 6 x 6 do
    assert places[0][0] != places[1][0]  # captions of 4 rows do not fit where those of 2 do, which stay where they are
    again = FixedInputs([a_group(rows=3, side=4)], ROOM, buffers)
    assert again.group.prompt_embeds.untyped_storage().data_ptr() == places[1][0]


@pytest.mark.parametrize(
    ("broken", "limit", "words"),
    [(float("nan"), 1e3, "The loss is nan"), (3.0, 0.5, "The loss is"), (1e13, 0.0, "The gradients' norm is inf")],
    ids=["NaN", "loss_limit", "norm"],
)
def test_a_bad_loss_or_norm_stops_before_the_update_and_names_the_rows(broken, limit, words, cache_of_names):
    toy, loss_of = Toy(), loss_function(TrainConfig())
    parameters = list(toy.parameters())
    graphs = GraphedPasses(partial(compute_on, toy, loss_of), parameters, ROOM, CPU, Counted())
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    clip = partial(clip_gradients, parameters, 1.0)
    good = a_group()
    for _ in range(2):  # plain, then captured
        losses = accumulate(toy, [a_batch(good)], cache_of_names, CPU, 1e6, loss_of, graphs=graphs, clip=clip)
        update(optimizer, losses.norm, None, graphs)
    before = [p.detach().clone() for p in parameters]
    bad = replace(good, latents=good.latents * broken)

    def one_update(batch: Batch) -> None:
        losses = accumulate(toy, [batch], cache_of_names, CPU, limit, loss_of, graphs=graphs, clip=clip)
        update(optimizer, losses.norm, partial(exploded, rows=batch.rows, cache=cache_of_names), graphs)

    with pytest.raises(RunError, match=words) as caught:
        one_update(a_batch(bad))
    assert "row 0, row 1; nothing was updated" in caught.value.problem
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))


@pytest.fixture
def cache_of_names():
    class Names:
        def row(self, number: int) -> object:
            return type("Row", (), {"path": f"row {number}"})

    return Names()


class OnGpu(torch.optim.SGD):
    """Says of itself what a fused AdamW on a GPU says."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, lr=torch.tensor(0.5), momentum=0.9)
        self.param_groups[0]["capturable"] = True


def test_the_update_is_captured_once_it_has_a_state_and_reads_the_rate_of_its_step():
    weights = []
    for recorder in (Counted(), Counted(lambda number: RuntimeError("no"))):
        toy = Toy()
        parameters = list(toy.parameters())
        graphs = GraphedPasses(partial(compute_on, toy, loss_function(TrainConfig())), parameters, ROOM, CPU, recorder)
        optimizer = OnGpu(parameters)
        graphs.try_out([a_group()])
        for step in range(4):
            graphs.run([a_group(step)], 1.0)
            optimizer.param_groups[0]["lr"].fill_(0.1 / (step + 1))
            assert can_be_captured(optimizer) == (step > 0)
            graphs.update(optimizer)
            assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in parameters)
        weights.append([p.detach().clone() for p in parameters])
        assert recorder.recorded == (2 if recorder.repeated else 1)
        assert recorder.repeated in (0, 4 + 3)
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert not can_be_captured(torch.optim.SGD(parameters, lr=0.1))
