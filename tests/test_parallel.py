"""Training on several processes: the numbers of one that accumulates, one writer, and an end that says which one died.

gloo on the CPU stands for NCCL on GPUs; tests/gpu/test_parallel_gpu.py has those.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from k5cache.cli import app as encode_app
from k5cache.shared.errors import RunError
from k5cache.shared.sealed import seal, unseal
from k5train.cli import app as train_app
from k5train.options.train import TrainConfig
from k5train.parallel.ranks import ALONE, united
from k5train.parallel.ranks import Ranks as RanksOfRun
from k5train.parallel.world import World, gpu_of, world_of
from k5train.runs.folder import Run
from k5train.runs.resume_state import latest_state
from k5train.training.shared_out import check_alike, shared_out
from tests.cli import Cli
from tests.ranks import Ranks
from tests.runs import CONFIG, lora_of, metrics_of, numbers, same, state_of
from tests.test_masks import mask_file, white_left
from tests.workshop import Workshop

# The toy has three buckets and captions of four lengths. All that is shared out is on.
RECIPE = """
[model]
path = "{model}"
[train]
steps = 4
batch_size = 2
checkpoint_every = 100
base_model_precision = "no_change"
mixed_precision = "fp32"
device = "cpu"
unequal_captions = "mask"
loss_limit = 0.0
[train.lora]
rank = 2
targets = ["qkv"]
dropout = 0.3
[train.optim]
lr = 1e-2
warmup_steps = 2
ema_decay = 0.9
[train.rollout]
probability = 0.6
num_inference_steps = 8
ramp_steps = 2
[train.objective]
stratified_sigmas = true
[train.tread]
routes = [{{selection_ratio = 0.5, start_layer_idx = 1, end_layer_idx = -1}}]
[train.validation]
split = 0.2
held_out_every = 2
prompts = ["a red fox in the snow", "blurry", "“nothing” but noise &amp; grain"]
num_inference_steps = 1
width = 64
height = 64
before = false
every = 100
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    processes = Ranks(tmp_path_factory.mktemp("output"))
    yield processes
    processes.close()


@pytest.fixture(scope="module")
def words(tmp_path_factory, toy_model, toy_cache):
    """``words(folder, option...)``: the command line of a run."""
    recipe = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    recipe.write_text(RECIPE.format(model=toy_model), encoding="utf-8")

    def line(root: Path, *options: str) -> list[str]:
        sets = [word for option in options for word in ("--set", f"train.{option}")]
        return ["run", str(toy_cache("fp32")), "-r", str(recipe), "-o", str(root), *sets]

    return line


@pytest.fixture(scope="module")
def two(tmp_path_factory, ranks, words) -> Path:
    """A run of two processes, deterministic."""
    root = tmp_path_factory.mktemp("two") / "two"
    ended = ranks(*[words(root, "deterministic=true")] * 2)
    assert ended.codes == [0, 0], ended.said
    assert ended.said[1] == ""  # only the first one talks
    return root


def pictures_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.glob("samples/**/*.png"))}


def test_two_processes_train_bit_for_bit_what_one_does_that_accumulates_two_batches(tmp_path, two, ranks, words):
    one = tmp_path / "two"  # the same name, which is in the LoRA
    assert ranks(words(one, "deterministic=true", "gradient_accumulation_steps=2")).codes == [0]
    # A sum of two numbers has no order, so every bit is the same; of more it would be the same within rounding.
    assert same(state_of(two), state_of(one))
    assert same(lora_of(two), lora_of(one))
    assert numbers_of(two) == numbers_of(one)
    assert {row["num_rows"] for row in metrics_of(two) if "loss" in row} > {4}  # buckets leave batches of one row too
    assert any("rollout_passes" in row for row in metrics_of(two))
    assert len(pictures_of(two)) == 6  # three prompts, and the average's
    assert pictures_of(two) == pictures_of(one)


@pytest.mark.slow
def test_a_deterministic_run_is_not_gone_on_with_if_any_process_computes_otherwise(tmp_path, ranks, words):
    root = tmp_path / "run"
    ended = ranks(*[words(root, "deterministic=true", "checkpoint_every=2")] * 2)
    assert ended.codes == [0, 0], ended.said
    path = root / "state" / "step-000002" / "step.json"
    document = unseal(path.read_bytes())
    assert document["computed_by_others"] == [document["computed_by"]]
    document["computed_by_others"][0]["torch"] = "1.13.0"
    path.write_bytes(seal(document))
    result = (root / "result.json").read_bytes()
    ended = ranks(*[["resume", str(root), "--step", "2"]] * 2)
    assert ended.codes == [2, 2], ended.said
    assert f'its last bits would change here: rank 1: torch: "1.13.0", now "{torch.__version__}"' in ended.said[0]
    assert ended.said[1] == ""
    assert (root / "result.json").read_bytes() == result
    assert latest_state(root / "state").progress.step == 4


# What the recipe above leaves out, or cannot have beside it.
OTHERS = {
    "schedule-free, streamed, a prior, class captions and masks": (
        'base_model_precision="int8-quanto"', "memory.enable_group_offload=true", 'optim.optimizer="schedulefree"',
        "optim.ema_decay=0.0", "tread.routes=[]", "rollout.probability=0.0", "objective.preservation_weight=0.5",
        "objective.masked_loss=true", "objective.prior_loss_weight=0.3", "validation.prompts=[]", "steps=2",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_every_other_option_trains_on_two_processes_what_it_trains_on_one(tmp_path, name, ranks, words, toy_model):
    shop, prior = (Workshop(tmp_path / folder, toy_model) for folder in ("classes", "prior"))
    for i, caption in enumerate(("sks", "sks on a hill", "a dog", "a portrait of sks")):
        shop.put(f"{i}.png", caption, seed=i)
        prior.put(f"{i}.png", "a cat" * (i % 2 + 1), seed=i + 9)
    mask_file(shop.source / "0.mask.png", white_left(64, 64, 24))
    shop.encode(class_replaces="sks", class_word="old cat")
    prior.encode()
    data = f"data=[{{cache='{shop.root}'}}, {{cache='{prior.root}', is_regularisation_data=true}}]"
    one, two = tmp_path / "one" / "run", tmp_path / "two" / "run"
    line = [words(root, data, *OTHERS[name]) for root in (one, two)]
    for line_of in line:
        del line_of[1]  # the cache: the recipe names its own
    assert ranks([*line[0], "--set", "train.gradient_accumulation_steps=2"]).codes == [0]
    ended = ranks(*[line[1]] * 2)
    assert ended.codes == [0, 0], ended.said
    # The preservation loss makes a micro-batch two passes, so one process adds up four gradients in turn, and two add
    # pairs. Adam divides a gradient near zero by itself: of 256 weights one differed by 9e-5, and the next by 6e-6.
    torch.testing.assert_close(lora_of(two), lora_of(one), rtol=0, atol=1e-3)
    losses = [[row[name] for row in numbers_of(root) for name in row if name.endswith("loss")] for root in (one, two)]
    # What is preserved is the square of a small difference: of 5.3e-5, 1.3e-9 differed on one kind of CPU.
    assert losses[1] == pytest.approx(losses[0], rel=1e-5, abs=1e-8)
    # A LoRA begins as zeros, which change nothing that could be preserved.
    assert [row["preservation_loss"] > 0 for row in metrics_of(two) if "loss" in row] == [False, True]


def numbers_of(root: Path) -> list[dict]:
    return numbers(metrics_of(root))


def test_a_process_that_is_killed_ends_the_run_with_its_state_saved_and_it_goes_on_on_one_or_two(
    tmp_path, two, ranks, words
):
    for name, count in (("again", 2), ("alone", 1)):
        root = tmp_path / name / "two"
        ended = ranks(*[words(root, f"deterministic={json.dumps(count == 2)}")] * 2, at=(1, 2, "kill"))
        assert ended.codes == [2, -9]
        assert "error: Rank 1 (process " in ended.said[0]
        assert "ended without a word" in ended.said[0]
        assert "saved at step 2" in ended.said[0]
        assert "Traceback" not in ended.said[0]
        saved = latest_state(Run(root).state)
        assert saved is not None
        assert (saved.progress.step, saved.facts["ranks"]) == (2, 2)
        assert ranks(*[["resume", root]] * count).codes == [0] * count
        assert same(state_of(root), state_of(two))  # one process does two batches in turn: as above
        assert numbers_of(root) == numbers_of(two)


def test_a_deterministic_run_does_not_go_on_with_another_number_of_processes(two, ranks):
    ended = ranks(["resume", two, "--step", "4", "--set", "train.steps=6"])
    assert ended.codes == [2]
    assert "is deterministic and was trained on 2 GPUs" in ended.said[0]
    assert "--gpus 2" in ended.said[0]


def test_ctrl_c_at_one_process_stops_all_after_the_same_step_and_an_error_of_one_names_it(tmp_path, ranks, words):
    root = tmp_path / "run"
    ended = ranks(*[words(root)] * 2, at=(1, 1, "stop"))
    assert ended.codes == [130, 130]
    assert "Stopped and saved at step 2" in ended.said[0]
    ended = ranks(*[words(tmp_path / "told")] * 2, at=(1, 1, "twice"))  # SIGTERM of a cluster, and torchrun's own
    assert ended.codes == [130, 130]
    assert "Stopped and saved at step 2" in ended.said[0]
    ended = ranks(*[words(root)] * 2, at=(1, 2, "fail"))  # which went on with the run
    assert ended.codes == [2, 1]
    assert "error: Rank 1 (process " in ended.said[0]
    assert "ValueError: of a bug" in ended.said[0]
    ended = ranks(*[words(root)] * 2, at=(1, 2, "hang"))  # a minute takes four seconds here
    assert ended.codes == [2, -9]
    assert "hangs: it has given no sign of life for 4 s. The run has ended and saved at step 2" in ended.said[0]
    assert "error: Rank 1 (process " in ended.said[0]
    ended = ranks(*[words(root)] * 2, at=(0, 3, "kill"))
    assert ended.codes == [-9, 2]
    assert "Rank 1: Rank 0 (on 127.0.0.1) ended without a word" in ended.said[1]
    assert "saved" not in ended.said[1]


@pytest.mark.slow
def test_a_process_that_is_killed_before_the_first_sum_is_named_and_the_same_command_begins_again(
    tmp_path, two, ranks, words
):
    root = tmp_path / "two"
    line = words(root, "deterministic=true")
    for step in (-1, -2):
        ended = ranks(line, line, at=(1, step, "kill"))
        assert ended.codes == [2, -9]
        assert ended.said[0].count("error: Rank 1 (process ") == 1
        assert "ended without a word, as a process does that was killed" in ended.said[0]
        assert not root.exists()  # nothing was trained
    ended = ranks(line, line, at=(0, -2, "kill"))
    assert ended.codes == [-9, 2]
    assert "error: Rank 1: Rank 0 (on 127.0.0.1) ended without a word" in ended.said[1]
    assert ranks(line, line).codes == [0, 0]
    assert same(lora_of(root), lora_of(two))


def test_processes_that_were_given_other_recipes_or_see_another_run_are_refused_before_any_work(
    tmp_path, two, ranks, words
):
    ended = ranks(words(tmp_path / "run"), words(tmp_path / "run", "seed=7"))
    assert ended.codes == [2, 2]
    assert "Rank 1 does not see what rank 0 sees: train.seed: 42, there 7" in ended.said[0]
    assert not (tmp_path / "run").exists()
    ended = ranks(*[words(two, "deterministic=true", "seed=7")] * 2)  # the first one refuses
    assert ended.codes == [2, 2]
    assert "error:" in ended.said[0]
    assert ended.said[1] == ""


def test_torchruns_variables_say_which_process_this_is_and_which_gpu_is_its_own(monkeypatch):
    assert world_of({}) is None
    assert world_of({"RANK": "0", "WORLD_SIZE": "1"}) is None
    env = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert world_of(env) == World(5, 8, 1, 4)
    for rank in ("x", "2", "-1"):
        with pytest.raises(RunError, match="are no numbers"):
            world_of({"RANK": rank, "WORLD_SIZE": "2"})
    world = World(1, 2, 1, 2)
    monkeypatch.setattr("k5train.parallel.world.visible_gpus", lambda env: ("GPU-a", "GPU-b"))
    assert gpu_of(world, "auto", {}) == {"CUDA_VISIBLE_DEVICES": "GPU-b"}
    assert gpu_of(world, "cpu", {}) == {}
    with pytest.raises(RunError, match="device=cuda:1 is one GPU"):
        gpu_of(world, "cuda:1", {})
    with pytest.raises(RunError, match="3 processes were started on this machine, and it has 2 GPUs"):
        gpu_of(World(2, 3, 2, 3), "auto", {})


def test_a_command_that_is_one_process_refuses_torchrun_and_says_how_it_uses_several_gpus(monkeypatch, tmp_path):
    for rank in ("0", "1"):
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2")):
            monkeypatch.setenv(name, value)
        for app, program, words, instead in (
            (train_app, "k5train", ["sweep", "cache/a", "--grid", "train.lora.rank=8,16"], " --gpus 2"),
            (train_app, "k5train", ["sample", "runs/a"], ""),
            (encode_app, "k5cache", ["encode", "pictures"], " --gpus 2"),
        ):
            done = Cli(tmp_path)(app, *words)
            line = f"error: {program} {words[0]} is one process, and torchrun has started 2 of it\n"
            assert (done.code, done.out) == (2, "")
            assert done.err.startswith(line if rank == "0" else "")
            assert done.err.endswith(f"{' '.join(words)}{instead}\n" if rank == "0" else "")
            assert done.err.count("\n") == (2 if rank == "0" else 0)
    monkeypatch.delenv("LOCAL_RANK")  # a cluster that numbers its pods
    assert "torchrun" not in Cli(tmp_path)(train_app, "sample", "runs/a").err


def test_items_that_were_dealt_out_come_back_in_their_order():
    items = list(range(7))
    assert list(united([items[rank::3] for rank in range(3)])) == items
    assert ALONE.unite(ALONE.share(items)) == items


def test_a_deterministic_sum_over_three_processes_is_in_the_order_of_their_ranks(ranks):
    ended = ranks(["add-up"], ["add-up"], ["add-up"])
    assert ended.codes == [0, 0, 0], ended.said
    # In float32 1 + 1e8 is 1e8. Any other order of the first sum would give 1.
    assert ended.said == ["[[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]\n"] * 3


class Seen(RanksOfRun):
    """The first of two processes, of which the other one sees something else."""

    size = 2

    def __init__(self, other: dict[str, Any]) -> None:
        self.other = other

    def gather(self, value: Any) -> list[Any]:
        return [value, {**value, **self.other}]


def test_what_another_process_sees_otherwise_is_named():
    check_alike(Seen({}), {"cache": {"rows": "abc"}})
    for other, words in (
        ({"cache": {"rows": "abd"}}, "Rank 1 does not see what rank 0 sees: cache.rows: other images or captions"),
        ({"transformer": "a"}, 'transformer: "b", there "a"'),
        ({"version": {}}, r"version\.torch: .*, there not set"),
    ):
        with pytest.raises(RunError, match=words):
            check_alike(Seen(other), {"cache": {"rows": "abc"}, "transformer": "b"})


def test_a_resumed_run_keeps_the_micro_batches_of_an_update_on_any_number_of_gpus_that_divides_them(tmp_path):
    def saved(of_update: int, **facts: int) -> Any:
        return SimpleNamespace(facts={"identity": {"train": {"gradient_accumulation_steps": of_update}}, **facts})

    run, config = Run(tmp_path), replace(CONFIG, gradient_accumulation_steps=2)

    def own(state: Any, count: int, config: TrainConfig = config) -> int:
        return shared_out(config, run, state, count).gradient_accumulation_steps

    assert own(None, 4) == 2  # a new run
    assert own(saved(4, ranks=2), 1) == 4
    assert own(saved(4, ranks=2), 4) == 1
    assert own(saved(4, ranks=1), 1) == 4  # which had been on two before
    assert own(saved(4), 2) == 2
    assert own(saved(3), 1) == 2  # a recipe that was changed: refused where identities are compared
    with pytest.raises(RunError, match="has 4 micro-batches, which 3 GPUs cannot share evenly") as refused:
        own(saved(4, ranks=2), 3)
    assert "--gpus with one of 1, 2, 4" in refused.value.fix
    exact = replace(config, deterministic=True)
    assert own(saved(4, ranks=2), 2, exact) == 2
    with pytest.raises(RunError, match="is deterministic and was trained on 1 GPU"):
        own(saved(4), 2, exact)
