"""TREAD: do the right tokens skip the right blocks, and does a route that drops nothing change nothing?"""

from __future__ import annotations

import pytest
import torch

from k5cache.shared.errors import RecipeError
from k5train.base.quantize import load_transformer
from k5train.forward import routing
from k5train.forward.block import Modes
from k5train.forward.execute import Execution
from k5train.forward.predict_velocity import predict_velocity, rotary
from k5train.objective import tread
from k5train.options.objective import RouteConfig, TreadConfig
from k5train.planning.memory import Plan
from tests.test_lora import a_batch

NUM_TOKENS = 6  # a_batch is 6x4 latents: 3x2 tokens


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def transformer(request, toy_model):
    return load_transformer(toy_model, "no_change", request.param, "cpu")


@pytest.fixture(scope="module")
def plain_blocks(toy_model):
    return load_transformer(toy_model, "no_change", torch.float32, "cpu")


def test_dropped_tokens_return_as_they_left_and_the_others_have_walked():
    whole = torch.tensor([[[1.0], [2.0], [3.0], [4.0]], [[5.0], [6.0], [7.0], [8.0]]])
    rope = torch.arange(4.0).view(1, 4, 1, 1, 1, 1)
    rows = torch.tensor([[1, 3], [0, 1]])
    walking, turned = routing.leave(whole, rope, rows)
    assert walking.tolist() == [[[2.0], [4.0]], [[5.0], [6.0]]]
    assert turned.flatten(1).tolist() == [[1.0, 3.0], [0.0, 1.0]]  # each token keeps its own position
    back = routing.come_back(whole, 10 * walking, rows)
    assert back.flatten(1).tolist() == [[1.0, 20.0, 3.0, 40.0], [50.0, 60.0, 7.0, 8.0]]


@pytest.mark.parametrize(("start", "end"), [(0, 2), (1, 1), (-2, -1)])
def test_a_route_that_keeps_every_token_is_the_plain_pass_bit_for_bit(transformer, start, end):
    everything = torch.arange(NUM_TOKENS).expand(2, -1)
    with torch.no_grad():
        plain = predict_velocity(transformer, *a_batch())
        routed = predict_velocity(transformer, *a_batch(), routes=[routing.Route(start, end, everything)])
    assert torch.equal(plain, routed)


def test_selection_ratio_0_makes_no_route_at_all():
    config = TreadConfig(routes=(RouteConfig(0.0, 0, -1),))
    assert tread.choose(torch.rand(2, 1, 8), config, 0, 10) == ()


@pytest.mark.parametrize(
    ("start", "end", "inside"), [(1, 1, [1]), (0, 1, [0, 1]), (-2, -1, [1, 2]), (0, -1, [0, 1, 2])]
)
def test_blocks_from_start_to_end_inclusive_see_only_the_kept_tokens(plain_blocks, start, end, inside):
    seen = []
    hooks = [
        block.register_forward_hook(lambda _, args, out, i=i: seen.append((i, args[0], out, args[3])))
        for i, block in enumerate(plain_blocks.visual_transformer_blocks)
    ]
    rows = torch.tensor([[0, 2, 5], [1, 3, 4]])
    with torch.no_grad():
        predict_velocity(plain_blocks, *a_batch(), routes=[routing.Route(start, end, rows)])
    for hook in hooks:
        hook.remove()
    assert [i for i, tokens, _, _ in seen if tokens.shape[1] == 3] == inside
    rope = rotary(plain_blocks, 9, (1, 3, 2), torch.device("cpu")).visual.flatten(1, 3)
    first, last = inside[0], inside[-1]
    before = seen[first - 1][2] if first else None
    for item in range(2):
        assert torch.equal(seen[first][3][item], rope[0][rows[item]])
        if before is not None:  # they leave before the first block, in their order
            assert torch.equal(seen[first][1][item], before[item][rows[item]])
        if last + 1 < len(seen) and before is not None:  # and return behind the last
            dropped = [i for i in range(NUM_TOKENS) if i not in rows[item].tolist()]
            assert torch.equal(seen[last + 1][1][item][dropped], before[item][dropped])
            assert torch.equal(seen[last + 1][1][item][rows[item]], seen[last][2][item])


def test_a_hand_computed_pass_through_a_route_is_what_the_blocks_give(plain_blocks):
    latents, sigma, embeds, pooled = a_batch()
    rows = torch.tensor([[0, 3], [2, 5]])
    with torch.no_grad():
        routed = predict_velocity(plain_blocks, latents, sigma, embeds, pooled, routes=[routing.Route(1, 1, rows)])
        t = plain_blocks
        text, time = t.text_embeddings(embeds), t.time_embeddings(1000 * sigma) + t.pooled_text_embeddings(pooled)
        rope = rotary(t, 9, (1, 3, 2), latents.device)
        for block in t.text_transformer_blocks:
            text = block(text, time, rope.text)
        visual = t.visual_embeddings(latents)
        grid, tokens, visual_rope = visual.shape[:-1], visual.flatten(1, 3), rope.visual.flatten(1, 3)
        first, middle, last = t.visual_transformer_blocks
        tokens = first(tokens, text, time, visual_rope, None)
        for item in range(2):  # the middle block, one picture at a time, on two of its six tokens
            picked = rows[item]
            walked = middle(tokens[item : item + 1, picked], text[item : item + 1], time[item : item + 1],
                            visual_rope[:, picked], None)  # fmt: skip
            tokens[item, picked] = walked[0]
        tokens = last(tokens, text, time, visual_rope, None)
        expected = t.out_layer(tokens.view(*grid, -1), text, time)
    torch.testing.assert_close(routed, expected, rtol=0, atol=2e-4)  # two pictures at once, against one at a time


def test_a_route_through_padded_captions_is_each_picture_by_itself(plain_blocks):
    latents, sigma, embeds, pooled = a_batch()
    rows = torch.tensor([[0, 3], [2, 5]])
    with torch.no_grad():
        both = predict_velocity(plain_blocks, latents, sigma, embeds, pooled, text_lengths=(9, 4),
                                routes=[routing.Route(0, 1, rows)])  # fmt: skip
        for i, length in enumerate((9, 4)):
            row = slice(i, i + 1)
            alone = predict_velocity(plain_blocks, latents[row], sigma[row], embeds[row, :length], pooled[row],
                                     routes=[routing.Route(0, 1, rows[row])])  # fmt: skip
            torch.testing.assert_close(both[row], alone, rtol=0, atol=5e-3)  # masked attention sums in another order


def test_the_lean_blocks_route_as_diffusers_own_do(plain_blocks):
    plan = Plan(("nothing",) * 3, None, {}, None, 0)
    modes = Modes(int8_dynamic=False, cudnn=False)
    lean = Execution(plain_blocks, plan, modes, compiled=False, device=torch.device("cpu"))
    routes = [routing.Route(1, -1, torch.tensor([[0, 2, 5], [1, 3, 4]]))]
    with torch.no_grad():
        theirs = predict_velocity(plain_blocks, *a_batch(), routes=routes)
        ours = predict_velocity(plain_blocks, *a_batch(), routes=routes, block_policies=lean.policies)
    assert (ours - theirs).norm() < 1e-3 * theirs.norm()


def test_gradients_reach_through_both_the_walk_and_the_way_around():
    whole = torch.ones(1, 3, 2, requires_grad=True)
    rows = torch.tensor([[1]])
    walking, _ = routing.leave(whole, torch.zeros(1, 3, 1, 1, 2, 2), rows)
    routing.come_back(whole, 5 * walking, rows).sum().backward()
    assert whole.grad.tolist() == [[[1.0, 1.0], [5.0, 5.0], [1.0, 1.0]]]


def test_the_share_that_is_dropped_is_the_ratio_and_each_picture_drops_its_own():
    scores = torch.rand(2, 1, 10, generator=torch.Generator().manual_seed(0))
    (route,) = tread.choose(scores, TreadConfig(routes=(RouteConfig(0.35, 1, -1),)), 0, 10)
    assert (route.start, route.end) == (1, -1)
    assert route.kept.shape == (2, 7)  # 3 of 10 are dropped
    assert route.kept.tolist() == [sorted(s.topk(7).indices.tolist()) for s in scores[:, 0]]
    assert route.kept[0].tolist() != route.kept[1].tolist()


def test_masked_tokens_are_always_kept_and_the_picture_with_most_of_them_sets_the_number():
    mask = torch.zeros(4, 6)
    mask[2:, 5] = 0.1  # touches one 2x2 token, the last
    assert tread.masked_tokens(mask).tolist() == [False] * 5 + [True]
    forced = torch.tensor([True, True, True, True, False, False])
    generator = torch.Generator().manual_seed(0)
    scores = torch.stack([tread.token_scores(6, generator, forced), tread.token_scores(6, generator)])[:, None]
    (route,) = tread.choose(scores, TreadConfig(routes=(RouteConfig(0.9, 0, 1),)), 0, 10)
    assert route.kept.shape == (2, 4)  # 0.9 would keep one
    assert route.kept[0].tolist() == [0, 1, 2, 3]


def test_the_ratio_falls_to_0_over_the_last_share_of_the_steps():
    ratios = [tread.ratio_at(0.5, step, 10, 0.4) for step in range(10)]
    assert ratios == pytest.approx([0.5] * 6 + [0.375, 0.25, 0.125, 0.0])
    assert [tread.ratio_at(0.5, step, 10, 0.0) for step in (0, 9)] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("routes", "words"),
    [
        ([(0.5, 2, 3)], r"routes\[0\].end_layer_idx is 3, the transformer has 3 visual blocks"),
        ([(0.5, -4, -1)], r"routes\[0\].start_layer_idx is -4"),
        ([(0.5, -1, 1)], "ends at block 1, before its start at block 2"),
        ([(0.5, 0, 1), (0.5, -2, -1)], r"routes\[1\] shares block 1 with routes\[0\]"),
    ],
)
def test_routes_that_the_transformer_does_not_have_are_refused(routes, words):
    with pytest.raises(RecipeError, match=words):
        tread.check_routes([RouteConfig(*route) for route in routes], 3)


def test_routes_side_by_side_are_taken():
    tread.check_routes([RouteConfig(0.5, 0, 0), RouteConfig(0.2, 1, -1)], 3)
    assert RouteConfig(1.0, 0, 0).check() == ["selection_ratio must be at least 0 and below 1, found 1.0"]
