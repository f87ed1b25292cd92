"""Does a plan predict what blocks really keep, fit the VRAM it is given, and refuse the rest with advice?"""

from __future__ import annotations

import functools
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, Kandinsky5Transformer3DModel

from k5cache.shared.console import command, parse_bytes
from k5cache.shared.errors import DoesNotFit, RecipeError, RunError
from k5cache.shared.vram import CONTEXT_BYTES, left
from k5train.adapter import attach
from k5train.adapter.targets import linear_sizes, num_parameters
from k5train.base import random_weights
from k5train.base.architecture import FULL_SIZE
from k5train.bench import steps, timing
from k5train.bench.baseline import time_baseline
from k5train.bench.case import CARDS, EDITS, MUST_REACH, SIZES, Case, inputs_for, routes_for
from k5train.forward import compile, execute
from k5train.forward.block import Modes, gather
from k5train.forward.levels import run_at_level
from k5train.forward.predict_velocity import predict_velocity
from k5train.options.adapter import LoraConfig, RankConfig
from k5train.options.memory import MemoryConfig
from k5train.options.objective import RouteConfig, TreadConfig
from k5train.options.train import TrainConfig
from k5train.pictures import sample
from k5train.planning import memory, vram
from k5train.planning.memory import Plan, Streaming, Work, architecture, make_plan
from k5train.planning.plan import adapter_size, plan_for, streaming_of, work_for
from k5train.planning.vram import check_bfloat16
from k5train.training import out_of_memory

GIB = 2**30
CPU = torch.device("cpu")
FULL = architecture(FULL_SIZE)
# r16 on q, k, v of both attentions, whose inputs are the picture's tokens twice
WORK = Work(1, 4096, 256, 24_739_840, 16 * 6, "int8-quanto", (2 * 2 * 2560, 0))
SMALL = {
    **FULL_SIZE, "model_dim": 256, "ff_dim": 1024, "time_dim": 32, "num_visual_blocks": 1,
    "in_text_dim": 64, "in_text_dim2": 48,
}  # fmt: skip


def gib(plan: memory.Plan) -> float:
    return plan.peak / GIB


QKV, FF_OUT = LoraConfig(rank=4, targets=("qkv",)), LoraConfig(rank=4, targets=("feed_forward.out_layer",))
OFFICIAL, DROPOUT = LoraConfig(rank=4), LoraConfig(rank=4, dropout=0.1)


@pytest.mark.parametrize(
    ("precision", "lora", "levels"),
    [
        pytest.param("int8-quanto", QKV, ["selective"], id="quanto, qkv"),
        pytest.param("int8-quanto", OFFICIAL, ["all"], id="quanto, official"),
        pytest.param("int8-dynamic", OFFICIAL, ["all"], id="dynamic, official"),
        *(
            pytest.param(precision, lora, levels, id=f"{precision} {i}", marks=pytest.mark.long)
            for i, (precision, lora, levels) in enumerate((
                ("int8-dynamic", QKV, ["selective", "all"]), ("int8-quanto", FF_OUT, ["all"]),
                ("int8-dynamic", FF_OUT, ["all"]), ("int8-quanto", OFFICIAL, ["matmuls"]),
                ("int8-quanto", DROPOUT, ["selective", "all"]), ("int8-dynamic", DROPOUT, ["all"]),
            ))
        ),
    ],
)  # fmt: skip
def test_a_compiled_block_keeps_what_the_planner_counts(precision, lora, levels, monkeypatch):
    # aot_eager: the partitioner that decides what is kept, without the code generator.
    monkeypatch.setattr(
        execute.torch, "compile", functools.partial(torch.compile, backend="aot_eager_decomp_partition")
    )
    counted, saved, casts = kept_by_a_block(precision, lora, levels, compile.compile_block())
    for level in levels:
        assert counted[level] * 0.97 < saved[level] < (counted[level] + casts) * 1.01, level


def test_an_eager_block_keeps_what_the_planner_counts():
    for lora in (QKV, OFFICIAL):
        counted, saved, casts = kept_by_a_block("int8-quanto", lora, ["all"], None)
        assert counted["all"] * 0.97 < saved["all"] < (counted["all"] + casts) * 1.01, lora.targets


def kept_by_a_block(precision: Any, lora: LoraConfig, levels: Any, run_compiled: Any) -> tuple[Any, Any, int]:
    """Bytes that are counted and kept at each level, and those of the adapters as they are multiplied."""
    transformer = random_weights.random_transformer(SMALL, precision, CPU)
    attach.add_lora(transformer, lora, seed=0)
    block = gather(transformer.visual_transformer_blocks[0], dropout=lora.dropout > 0)
    tokens, text_tokens, arch = 192, 24, architecture(SMALL)
    config = TrainConfig(base_model_precision=precision, lora=lora)
    work = work_for(SMALL, config, (tokens, text_tokens), compiled=bool(run_compiled))
    is_dynamic = precision == "int8-dynamic"
    modes = Modes(is_dynamic, cudnn=False, rows=is_dynamic)
    casts = 2 * sum(p.numel() for p in transformer.visual_transformer_blocks.parameters() if p.requires_grad)
    kept = {}
    for level in levels:
        x = torch.randn(1, tokens, 256, dtype=torch.bfloat16).requires_grad_()
        text = torch.randn(1, text_tokens, 256, dtype=torch.bfloat16).requires_grad_()
        modulation, rope = torch.randn(1, 9 * 256), torch.randn(1, tokens, 1, 64, 2, 2)
        given = [*transformer.parameters(), *transformer.buffers(), text, modulation, rope]
        known = {t.untyped_storage().data_ptr() for t in given}
        saved = {x.untyped_storage().data_ptr(): x.nbytes}

        def note(tensor: torch.Tensor, known=known, saved=saved) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = (run_compiled or run_at_level)(x, text, rope, None, modulation, block, modes, level)
        kept[level] = sum(saved.values())
        del out  # what is kept has its place until now
    return {level: memory.kept_bytes(level, arch, work) for level in levels}, kept, casts


def test_tokens_that_always_skip_blocks_are_not_planned_for():
    def work(**tread: Any) -> Work:
        config = TrainConfig(tread=TreadConfig(routes=(RouteConfig(0.5, 1, -2),), **tread))
        return work_for({**SMALL, "num_visual_blocks": 6}, config, (64, 24), compiled=True)

    routed, whole = work(), work(ramp_down=0.1)
    assert routed.token_shares == (1, 0.5, 0.5, 0.5, 0.5, 1)
    assert whole.token_shares == work(keep_masked=True).token_shares == ()
    arch = architecture(SMALL)
    counted = memory.estimate(arch, routed, ("selective",) * 6, None)["kept activations"]
    all_tokens, half = (memory.kept_bytes("selective", arch, replace(whole, num_tokens=n)) for n in (64, 32))
    assert counted == 2 * all_tokens + 4 * half


def test_weights_are_counted_as_they_are_held():
    for precision in ("int8-quanto", "no_change"):
        transformer = random_weights.random_transformer(SMALL, precision, CPU)
        num_bytes = sum(t.nbytes for t in [*transformer.parameters(), *transformer.buffers()])
        work = replace(WORK, precision=precision, lora_parameters=0)
        counted = memory.estimate(architecture(SMALL), work, ("nothing",), None)["weights"]
        tables = sum(b.nbytes for n, b in transformer.named_buffers() if "rope" in n)
        assert counted == pytest.approx(num_bytes - tables, rel=0.01)


def test_the_adapter_is_counted_as_it_is_made():
    kinds = [{"targets": targets} for targets in (("qkv",), ("official",), ("visual_modulation.out_layer",))]
    kinds += [
        {"algo": "dora"},
        {"algo": "lokr"},
        {"algo": "lokr", "rank": 10**5},
        {"algo": "lokr", "decompose_factor": 4},
    ]
    for kind in kinds:
        config = LoraConfig(**{"rank": 4, **kind})
        transformer = random_weights.random_transformer(SMALL, "no_change", CPU)
        attach.add_lora(transformer, config, seed=0)
        parameters, _ = adapter_size(SMALL, config)
        assert parameters == sum(p.numel() for p in transformer.parameters() if p.requires_grad)


class Kept:
    """A tensor that a graph keeps: it lives as long as its place in the graph."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def test_a_block_that_runs_as_pefts_modules_keeps_what_the_planner_counts():
    arch, text = architecture(SMALL), torch.randn(1, 24, 256, dtype=torch.bfloat16).requires_grad_()
    for lora in (
        LoraConfig(algo="dora", rank=4), LoraConfig(algo="dora", rank=4, targets=("qkv",)),
        LoraConfig(algo="lokr", rank=4), LoraConfig(algo="lokr", rank=4, targets=("qkv",)),
    ):  # fmt: skip
        transformer = random_weights.random_transformer(SMALL, "int8-quanto", CPU)
        attach.add_lora(transformer, lora, seed=0)
        transformer.train()
        for tokens in (192, 768):
            work = work_for(SMALL, TrainConfig(lora=lora), (tokens, 24), compiled=False)
            x = torch.randn(1, tokens, 256, dtype=torch.bfloat16).requires_grad_()
            rest = (text, torch.randn(1, 32), torch.randn(1, tokens, 1, 64, 2, 2))
            known = {t.untyped_storage().data_ptr() for t in [*transformer.parameters(), *transformer.buffers(), *rest]}
            alive: weakref.WeakSet[Kept] = weakref.WeakSet()

            def note(tensor: torch.Tensor, alive=alive) -> Kept:
                alive.add(kept := Kept(tensor))
                return kept

            with torch.autograd.graph.saved_tensors_hooks(note, lambda kept: kept.tensor):
                out = transformer.visual_transformer_blocks[0](x, *rest, None)
            storages = [box.tensor.untyped_storage() for box in alive]
            by_place = {storage.data_ptr(): storage.nbytes() for storage in storages}
            kept = sum(size for place, size in by_place.items() if place not in known)
            del out
            assert kept < memory.kept_bytes("all", arch, work) < 1.25 * kept, (lora.algo, lora.targets, tokens)
            lean = memory.kept_bytes("selective", arch, work)
            assert lean == memory.kept_bytes("nothing", arch, work) == x.nbytes  # such a block is recomputed whole
    assert set(make_plan(arch, work, None).levels) == {"all"}
    full = work_for(FULL_SIZE, TrainConfig(lora=LoraConfig(algo="lokr")), (4096, 256), compiled=False)
    for cap in (20, 48):
        plan = make_plan(FULL, full, cap * GIB)
        assert set(plan.levels) == {"nothing", "all"}
        assert 0.9 * cap < gib(plan) < cap


def test_the_adapter_of_the_full_size_is_counted_as_peft_makes_it():
    with init_empty_weights():
        empty = Kandinsky5Transformer3DModel.from_config(FULL_SIZE)
    sizes = linear_sizes(empty)
    names = tuple(
        f"visual_transformer_blocks.7.{linear}"  # one of each shape
        for linear in ("cross_attention.to_key", "feed_forward.in_layer", "feed_forward.out_layer")
    )
    counts = {}
    for algo, rank, factor in (
        ("lora", 32, -1), ("rslora", 32, -1), ("dora", 32, -1), ("lokr", 16, -1), ("lokr", 32, -1), ("lokr", 64, -1),
        ("lokr", 32, 1), ("lokr", 32, 4), ("lokr", 32, 30), ("lokr", 32, 2560), ("lokr", 10**5, 8),
    ):  # fmt: skip
        config = LoraConfig(algo=algo, rank=rank, decompose_factor=factor, targets=names)
        with init_empty_weights():
            attach.add_lora(empty, config, seed=0)
        counts[algo, rank, factor] = sum(p.numel() for p in empty.parameters() if p.requires_grad)
        empty.unload_lora()
        counted = sum(num_parameters(sizes[name], rank, config) for name in names)
        assert counted == counts[algo, rank, factor], (algo, rank, factor)
    assert counts["lora", 32, -1] == 32 * (5120 + 2 * 12800)
    assert counts["dora", 32, -1] == counts["lora", 32, -1] + 2560 + 10240 + 2560
    assert counts["lokr", 64, -1] == (40 * 40 + 64 * 64) + 2 * (80 * 40 + 128 * 64)  # all factors whole
    assert counts["lokr", 32, -1] == (40 * 40 + 64 * 64) + 2 * (80 * 40 + 32 * (128 + 64))  # pairs in the feed-forward


def test_a_rank_above_a_side_of_a_matrix_is_refused_before_anything_is_allocated():
    highest = LoraConfig(rank=256, targets=("qkv",))
    assert adapter_size(SMALL, highest)[0] == 256 * 2 * 256 * (2 * 3 + 6)  # 2 text blocks, 1 visual block
    words = r"rank 257 is too high for text_transformer_blocks.0.self_attention.to_query, whose matrix is 256 x 256\n"
    for algo in ("lora", "rslora", "dora"):
        with pytest.raises(RecipeError, match=words + "Use a rank of at most 256"):
            adapter_size(SMALL, replace(highest, algo=algo, rank=257))
    wide = RankConfig("visual_transformer_blocks.0.feed_forward.in_layer", 300)
    with pytest.raises(RecipeError, match=r"rank 300 is too high for visual_.*feed_forward.in_layer.* 1024 x 256\n"):
        adapter_size(SMALL, LoraConfig(rank=4, ranks=(wide,)))
    transformer = random_weights.random_transformer(SMALL, "no_change", CPU)
    with pytest.raises(RecipeError, match="rank 100000 is too high"):
        attach.add_lora(transformer, LoraConfig(rank=100_000), seed=0)
    assert not attach.adapted_layers(transformer)


def test_a_cpu_without_the_ram_is_refused_with_the_nearest_that_fits():
    wasteful = replace(WORK, batch_size=8, lora_parameters=100 * WORK.lora_parameters, compiled=False)
    plan = make_plan(FULL, wasteful, None, level="nothing")
    memory.check_fits_ram(plan, FULL, wasteful, plan.peak)
    with pytest.raises(DoesNotFit, match=r"needs \d+.\d GiB of RAM, there is 10.0 GiB free") as refused:
        memory.check_fits_ram(plan, FULL, wasteful, 10 * GIB)
    assert refused.value.fix.endswith("=1, 1/16 of train.lora.rank, a cache encoded with cache.resolution=512")
    assert "VRAM" not in str(refused.value)
    with pytest.raises(DoesNotFit, match=r"or use a machine with \d+.\d GiB of free RAM"):
        memory.check_fits_ram(plan, FULL, wasteful, GIB)  # the weights alone have no room, and nothing streams them


@pytest.mark.parametrize("cap", [80, 48, 24, 16, 12, 10, 8.5, 7, 6, 5, 4.5])
def test_a_plan_fits_its_budget_and_uses_it(cap):
    plan = make_plan(FULL, WORK, int(cap * GIB))
    assert 0.8 * cap < gib(plan) <= 0.97 * cap or set(plan.levels) == {"all"}
    assert len(set(plan.levels)) <= 2


def test_more_memory_never_means_more_recompute_or_streaming():
    ladder = list(memory.LEVELS)

    def rank(cap: float) -> tuple[int, int]:
        plan = make_plan(FULL, WORK, int(cap * GIB))
        return -(plan.streaming.num_blocks if plan.streaming else 0), sum(ladder.index(level) for level in plan.levels)

    ranks = [rank(cap) for cap in (4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 20, 24, 32, 48)]
    assert ranks == sorted(ranks)


def test_weights_are_streamed_only_when_recomputing_everything_does_not_fit():
    assert make_plan(FULL, WORK, int(8.5 * GIB)).streaming is None
    plan = make_plan(FULL, WORK, int(4.5 * GIB))
    assert plan.streaming is not None
    assert plan.host_bytes == pytest.approx(plan.streaming.num_blocks * FULL.block_parameters, rel=0.02)


@pytest.mark.parametrize(
    ("card", "changes", "fix"),
    [
        (5, {"batch_size": 4}, "Nearest that fits, with 3.9 GiB: --set train.batch_size=1, a cache encoded with "
                               "cache.resolution=512"),
        (4, {}, "Nearest that fits, with 2.9 GiB: a quarter of train.lora.rank, a cache encoded with "
                "cache.resolution=768"),
        (3, {}, "Use a GPU with at least 5.8 GiB of memory"),  # the size that was asked for, not a smaller one
        (8, {"memory": MemoryConfig(enable_group_offload=True, group_offload_blocks_per_group=25)},
         "Use --set train.memory.group_offload_blocks_per_group=1, which allows a plan that fits"),
        (8, {"memory": MemoryConfig(execution="diffusers")},
         "Use --set train.memory.execution=auto, which allows a plan that fits"),
        (8, {"memory": MemoryConfig(activations="all")},
         "Use --set train.memory.activations=auto, which allows a plan that fits"),
    ],
)  # fmt: skip
def test_advice_for_a_card_that_is_too_small_is_a_change_that_fits_it(card, changes, fix):
    config, device = replace(TrainConfig(), **changes), torch.device("cuda")
    budget = card * GIB - CONTEXT_BYTES
    with pytest.raises(DoesNotFit) as refused:
        plan_for(FULL_SIZE, config, device, (4096, 512), budget)
    assert refused.value.fix == fix


def test_what_no_plan_fits_is_refused_with_the_nearest_that_does():
    with pytest.raises(DoesNotFit, match="even with all weights streamed") as refused:
        make_plan(FULL, replace(WORK, batch_size=8), int(4.5 * GIB))
    assert "train.batch_size=1" in refused.value.fix
    with pytest.raises(DoesNotFit) as refused:
        make_plan(FULL, replace(WORK, num_tokens=16384), int(5 * GIB))
    assert "cache.resolution=768" in refused.value.fix
    with pytest.raises(DoesNotFit) as refused:
        make_plan(FULL, WORK, int(0.5 * GIB))
    assert "Use a GPU with at least" in refused.value.fix


def test_sixteen_bit_weights_that_do_not_fit_are_pointed_to_int8():
    with pytest.raises(DoesNotFit) as refused:
        make_plan(FULL, replace(WORK, precision="no_change"), 10 * GIB)
    assert "base_model_precision=int8-quanto" in refused.value.fix
    assert TrainConfig(base_model_precision="no_change", memory=MemoryConfig(enable_group_offload=True)).check()
    assert MemoryConfig(execution="diffusers", enable_group_offload=True).check()


def test_a_level_asked_for_that_does_not_fit_is_refused_by_name():
    with pytest.raises(DoesNotFit, match='activations = "all"') as refused:
        make_plan(FULL, WORK, 8 * GIB, level="all")
    assert "activations=auto" in refused.value.fix


@pytest.mark.parametrize(
    ("text", "expected"), [("12GB", 12 * GIB), ("12 GiB", 12 * GIB), ("8", 8 * GIB), ("9500MB", 9500 * 2**20)]
)
def test_vram_is_read_as_a_card_is_sold(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "lots", "-3GB", "0", "GB", "1e400"])
def test_what_is_no_amount_of_memory_is_refused(text):
    with pytest.raises(ValueError, match=r".*"):
        parse_bytes(text)


def test_group_offload_words_become_slots():
    arch = FULL
    assert streaming_of(MemoryConfig(), arch) is None
    on = MemoryConfig(enable_group_offload=True)
    assert streaming_of(on, arch) == Streaming(50, slots=2, prefetch=True)
    groups = replace(on, group_offload_blocks_per_group=3)
    assert streaming_of(groups, arch) == Streaming(50, slots=6, prefetch=True)
    assert streaming_of(replace(groups, group_offload_use_stream=False), arch) == Streaming(50, 3, False)


def test_options_that_exclude_each_other_are_named():
    assert (
        "int8-dynamic"
        in TrainConfig(base_model_precision="int8-dynamic", memory=MemoryConfig(execution="diffusers")).check()[0]
    )


def test_a_gpu_without_bfloat16_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Quadro RTX 4000")
    with pytest.raises(RunError, match="Quadro RTX 4000 has no bfloat16"):
        check_bfloat16(torch.device("cuda"), "bf16")
    check_bfloat16(torch.device("cuda"), "fp32")
    check_bfloat16(CPU, "bf16")


def test_running_out_of_memory_saves_and_names_the_setting(tmp_path):
    plan = make_plan(FULL, WORK, 16 * GIB)
    with (
        pytest.raises(DoesNotFit, match="step-000007") as ended,
        out_of_memory.when_memory_ends(
            lambda: plan,
            lambda: tmp_path / "step-000007.safetensors",
            functools.partial(command, "k5train", "resume", "runs/a b"),
        ),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 MiB.")
    assert ended.value.fix == "Free VRAM, or plan for less: k5train resume 'runs/a b' --vram 14.9GB"


def test_there_is_no_leaner_plan_than_all_weights_streamed():
    plan = Plan(("nothing",) * 50, Streaming(50), {"weights": 4 * GIB}, 5 * GIB, 0)
    with (
        pytest.raises(DoesNotFit) as ended,
        out_of_memory.when_memory_ends(lambda: plan, lambda: None, lambda **_: "never"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    assert ended.value.fix.startswith("Free VRAM, or use a lower resolution, batch size or rank")


def test_a_picture_is_decoded_whole_where_it_fits_and_in_tiles_where_not():
    vae = AutoencoderKL()
    sample.fit_decoding(vae, 1024, 1024, None)
    sample.fit_decoding(vae, 1024, 1024, 5 * GIB)
    assert not vae.use_tiling
    sample.fit_decoding(vae, 1024, 1024, 2 * GIB)
    assert (vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size) == (True, 512, 64)


def test_the_budget_is_the_card_less_what_cuda_takes():
    assert vram.budget(CPU, None) is None
    assert vram.budget(CPU, "12GB") == 12 * GIB - CONTEXT_BYTES
    assert left(CPU) is None


def test_the_bench_times_a_case_and_counts_its_arithmetic():
    small = {**SMALL, "num_text_blocks": 1}
    case = Case("int8-dynamic", 4.0, side=64, num_text_tokens=8, rank=4, execution="eager")
    (result,) = steps.time_cases((case,), CPU, config=small, num_steps=2, num_warm_up=1)
    assert result.milliseconds > 0
    assert result.plan == "1 all, eager"
    assert result.tflops == pytest.approx(
        timing.flops(architecture(small), Work(1, 16, 8, 0, 0, "int8-dynamic")) / result.milliseconds / 1e9
    )


def test_caps_beyond_the_card_are_what_the_card_has():
    cases = steps.within(8 * GIB, (*MUST_REACH, *SIZES))
    assert [c.cap_gib for c in cases[:4]] == [None, None, 4.5, None]
    assert steps.within(80 * GIB, MUST_REACH) == MUST_REACH


def test_the_benchs_baseline_is_diffusers_with_peft_and_quanto():
    result = time_baseline({**SMALL, "num_text_blocks": 1}, CPU, 1, 0)
    assert steps.table_rows([result], None)[0][3:5] == ["1.00x", ""]


def test_the_bench_times_image_to_image_beside_text_to_image():
    small = {**SMALL, "num_text_blocks": 1}
    assert [(c.cap_gib, c.num_text_tokens, c.is_i2i) for c in EDITS[:2]] == [
        (CARDS[0], 500, False),
        (CARDS[0], 500, True),
    ]
    assert CARDS == (12 - CONTEXT_BYTES / GIB, 8 - CONTEXT_BYTES / GIB)
    cases = [replace(case, side=64, num_text_tokens=8, rank=4, execution="eager") for case in EDITS[:2]]
    plain, edit = steps.time_cases(tuple(cases), CPU, config=small, num_steps=2, num_warm_up=1)
    assert edit.name == f"I2I, {plain.name}"
    (line,) = steps.beside_t2i([plain, edit])
    assert line == f"{plain.name}: a step of I2I takes {edit.milliseconds / plain.milliseconds:.2f}x of T2I's"
    baseline = time_baseline(small, CPU, 1, 0, EDITS[1])
    assert baseline.name.startswith("baseline: I2I, diffusers")
    assert steps.table_rows([baseline, plain, edit], None)[0][3] == "1.00x"


def test_a_transformer_that_edits_needs_its_wider_input_and_the_sources_channels():
    """17 more channels of 2 x 2 latents in float32, and 33 of them in 16 bits; 68 more rows of the first matrix."""
    config = TrainConfig(lora=LoraConfig(targets=("qkv",)))
    plain, edit = (
        plan_for({**FULL_SIZE, "visual_cond": is_i2i}, config, torch.device("cuda"), (4096, 1024), None)
        for is_i2i in (False, True)
    )
    assert edit.parts["source"] == 4 * 4096 * (17 * 4 + 33 * 2)
    assert edit.parts["weights"] - plain.parts["weights"] == 17 * 4 * 2560 * 2
    assert edit.peak - plain.peak == edit.parts["source"] + 17 * 4 * 2560 * 2
    assert "source" not in plain.parts


def test_flops_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    small = {**SMALL, "num_visual_blocks": 2}
    transformer = random_weights.random_transformer(small, "no_change", CPU).requires_grad_(False)
    case = Case("no_change", None, side=128, num_text_tokens=24)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        predict_velocity(transformer, *inputs_for(case, small, CPU))
    # Forward alone is half of a step's linears and 2 / 7 of its attention.
    work, arch = Work(1, 64, 24, 0, 0, "no_change"), architecture(small)
    attention = 4 * 256 * (2 * (64 * 64 + 64 * 24) + 2 * 24 * 24)
    forward = (timing.flops(arch, work) - 3.5 * attention) / 2 + attention
    assert counter.get_total_flops() == pytest.approx(forward, rel=0.15)  # and embeddings, modulations, the head


def test_a_case_whose_first_step_has_no_room_is_planned_for_less_as_a_run_is(monkeypatch, capsys):
    small = {**SMALL, "num_visual_blocks": 4, "num_text_blocks": 1}
    monkeypatch.setattr(memory, "_ALLOCATOR_BYTES", 0)
    plans, timed = [], steps._time_plan
    config = TrainConfig(base_model_precision="int8-quanto", lora=LoraConfig(rank=4, targets=("qkv",)))
    whole = steps.plan_for(small, replace(config, memory=MemoryConfig(execution="eager")), CPU, (64, 8), 2**40)
    case = Case("int8-quanto", 1.05 * whole.peak / 2**30, 128, num_text_tokens=8, rank=4, execution="eager")

    def out_of_memory_once(plan, *args):
        plans.append(plan)
        if len(plans) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 40.00 MiB.")
        return timed(plan, *args)

    monkeypatch.setattr(steps, "_time_plan", out_of_memory_once)
    (result,) = steps.time_cases((case,), CPU, config=small, num_steps=1, num_warm_up=1)
    assert plans[1].peak <= plans[0].peak * 11 // 12
    assert plans[0].levels == ("all",) * 4
    assert result.plan == "3 matmuls, 1 all, eager"
    assert "needed more VRAM than the" in capsys.readouterr().err


def test_flops_of_a_tread_step_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    small = {**SMALL, "num_visual_blocks": 8}
    transformer = random_weights.random_transformer(small, "no_change", CPU).requires_grad_(False)
    plain, routed = (Case("no_change", None, side=128, num_text_tokens=24, tread=ratio) for ratio in (0.0, 0.5))
    counted = []
    for case in (plain, routed):
        routes = routes_for(case, CPU)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            predict_velocity(transformer, *inputs_for(case, small, CPU), routes=routes)
        counted.append(counter.get_total_flops())
    work, arch = Work(1, 64, 24, 0, 0, "no_change"), architecture(small)
    half = replace(work, token_shares=(1, 1, 0.5, 0.5, 0.5, 0.5, 1, 1))
    saved = timing.flops(arch, work) - timing.flops(arch, half)  # of linears twice, of attention 3.5 times
    attention = 4 * 4 * 256 * (64 * 64 + 64 * 24 - 32 * 32 - 32 * 24)  # 4 of 8 blocks: 2 to 5
    assert counted[0] - counted[1] == (saved - 3.5 * attention) / 2  # torch counts no attention on a CPU
