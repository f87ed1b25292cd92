"""Does `k5train bench` group kernels by what they are for, say what limits a step, and time both baselines?"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from k5train.bench import baseline, steps
from k5train.bench.case import Case, Measured
from k5train.bench.kernels import (
    GROUPS,
    Launch,
    Share,
    busy_milliseconds,
    by_group,
    copying_alone,
    group_of,
    limit_of,
    longest,
    spent_on,
)
from k5train.bench.timing import Seen
from k5train.commands import bench as bench_command

IN_FORWARD = ("k5::matmul", "## Call CompiledFxGraph f3 ##", "CompiledFunction")
IN_BACKWARD = ("k5::int8_matmul", "CompiledFunctionBackward", "autograd::engine::evaluate_function")
# Names as the profiler gave them on an H200, with torch 2.11.
KERNELS = {
    "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<128, 64>>": "attention",
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x128_1x4x1_kernel0": "attention",
    "fmha_cutlassF_bf16_aligned_64x128_rf_sm80": "attention",
    "_few_keys_dkv": "attention",
    "triton_red_fused__to_copy_add_attention_backward_mean_mul_pow_rsqrt_split_sum_view_21": "elementwise",
    "triton_red_fused__to_copy_abs_amax_clamp_div_gelu_int8_matmul_mul_reciprocal_round_view_14": "elementwise",
    "triton_poi_fused_gelu_matmul_view_12": "elementwise",
    "triton_unk_fused__to_copy_abs_amax_clamp_div_int8_matmul_mul_reciprocal_round_view_4": "elementwise",
    "void at::native::vectorized_elementwise_kernel<4, at::native::BinaryFunctor<float, float>>": "elementwise",
    "_scale_rows": "dequantise",
    "_transpose": "dequantise",
    "_int8_matmul": "matmul",
    "_int8_matmul_hopper": "matmul",
    "_float32_linear": "matmul",
    "_gelu_backward": "elementwise",
    "_rotate_backward": "elementwise",
    "nvjet_sm90_tst_320x128_64x3_1x2_h_bz_coopB_NNT": "matmul",
    "ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_tn": "matmul",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>": "matmul",
    "void at::native::multi_tensor_apply_kernel<TensorListMetadata<4>, FusedAdamMathFunctor<float, 4>>": "optimizer",
    "Memcpy HtoD (Pinned -> Device)": "copies",
    "Memset (Device)": "copies",
    "void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda(at::TensorIterator&)>": "copies",
    "void at::native::CatArrayBatchedCopy_vectorized<OpaqueType<2u>, unsigned int, 2, 128, 1>": "copies",
    "something_of_tomorrow": "other",
}


@pytest.mark.parametrize(("kernel", "group"), KERNELS.items())
def test_a_kernel_belongs_to_the_group_that_it_works_for(kernel, group):
    assert group in GROUPS
    assert group_of(Launch(kernel, 1.0)) == group


def test_matmuls_of_adapters_are_told_by_the_calls_that_launch_them():
    gemm = "nvjet_sm90_tst_320x128_64x3_1x2_h_badd_coopB_TNT"
    by_calls = {
        ("aten::addmm", *IN_FORWARD): "matmul",
        ("aten::mm", "aten::matmul", *IN_FORWARD): "matmul",
        ("aten::addmm_", *IN_FORWARD): "LoRA",  # added to the frozen weight's product
        ("aten::mm", *IN_FORWARD[1:]): "LoRA",
        ("aten::mm", "_Linear"): "LoRA",  # an eager text block
        ("aten::mm", "CompiledFunctionBackward", "autograd::engine::evaluate_function"): "LoRA",
        ("aten::addmm", "aten::linear"): "matmul",  # embeddings and modulations
    }
    for calls, group in by_calls.items():
        assert group_of(Launch(gemm, 1.0, calls)) == group, calls
    assert group_of(Launch("_int8_matmul", 1.0, IN_BACKWARD)) == "matmul"


def test_the_same_kernel_is_of_the_optimizer_or_scales_weights_where_these_launch_it():
    plain = "void at::native::elementwise_kernel<128, 4, at::native::BinaryFunctor<float, float>>"
    assert group_of(Launch(plain, 1.0, ("aten::mul", "aten::_foreach_mul_"))) == "optimizer"
    assert group_of(Launch(plain, 1.0, ("aten::mul_", "Optimizer.step#AdamW.step"))) == "optimizer"
    assert group_of(Launch(plain, 1.0, ("aten::mul", *IN_FORWARD))) == "dequantise"


def launches(matmul: float = 0, attention: float = 0, elementwise: float = 0, streamed: float = 0) -> list[Launch]:
    return [
        Launch("_int8_matmul", matmul), Launch("fmha_cutlassB", attention), Launch("triton_poi_fused_0", elementwise),
        Launch("Memcpy HtoD (Pinned -> Device)", streamed),
    ]  # fmt: skip


def test_groups_and_the_longest_kernels_are_sums_over_launches():
    seen = [*launches(10, 5, 1), *launches(20, 5, 1)]
    assert by_group(seen) == {
        "matmul": Share(30, 2), "attention": Share(10, 2), "elementwise": Share(2, 2), "copies": Share(0, 2)
    }  # fmt: skip
    assert longest(seen, 2) == [("matmul", "_int8_matmul", Share(30, 2)), ("attention", "fmha_cutlassB", Share(10, 2))]
    assert busy_milliseconds(launches(10, 5, 1, streamed=100)) == 16


def limit(milliseconds: float, *spent: float, waiting: float = 0, busy: float | None = None) -> str:
    seen = launches(*spent, streamed=1000)
    return limit_of(milliseconds, spent_on(seen), sum(spent) if busy is None else busy, waiting)


def test_what_limits_a_step_is_said_in_words():
    assert limit(200, 60, 30, 10) == (
        "launches: the GPU computes for 100 of 200 ms (matmuls 60, attention 30, memory 10)"
    )
    assert limit(105, 60, 30, 10).startswith("matmuls, of 100 ms on the GPU")
    assert limit(105, 30, 60, 10).startswith("attention, ")
    assert limit(105, 30, 10, 60).startswith("memory, ")
    assert limit(120, 60, 30, 10, waiting=15) == (
        "copies of streamed weights: the GPU waits for 15 of 120 ms (matmuls 60, attention 30, memory 10)"
    )
    assert limit(120, 60, 30, 10, waiting=5).startswith("launches: ")
    assert limit(105, 60, 30, 10, waiting=4).startswith("matmuls, of 100 ms on the GPU")
    # A captured step is what is timed; launched one by one, it only says which kernel is of what.
    assert limit(120, 60, 30, 10, busy=115).startswith("matmuls, of 115 ms on the GPU")


def test_the_gpu_waits_for_copies_where_nothing_else_runs():
    def at(begin: float, milliseconds: float, kernel: str = "_int8_matmul") -> Launch:
        return Launch(kernel, milliseconds, (), begin)

    up, down = "Memcpy HtoD (Pinned -> Device)", "Memcpy DtoH (Device -> Pageable)"
    kernels = [at(10, 5), at(12, 1), at(20, 5)]
    assert copying_alone(kernels) == 0
    assert copying_alone([*kernels, at(11, 3, up)]) == 0
    assert copying_alone([*kernels, at(8, 4, up), at(9, 2, up), at(14, 8, up)]) == 2 + 5
    assert copying_alone([*kernels, at(15, 5, down)]) == 0
    assert copying_alone([at(0, 2, up)]) == 2


def test_of_compiled_diffusers_no_matmul_is_told_as_an_adapters():
    gemm = Launch("nvjet_sm90_tst_320x128_64x3_1x2_h_bz_coopB_TNT", 3.0, ("aten::mm", "CompiledFunction"))
    step = Launch("void at::native::elementwise_kernel<4>", 1.0, ("aten::mul", "aten::_foreach_mul_"))
    seen = Seen((gemm, step), 4.0, 0.0)
    plain = Measured("a", 4.0, 4.0, None, 8.0, 1.0, "all recomputed", 1.0, "compiled")
    assert plain.on_gpu(seen).groups == {"matmul": Share(3.0, 1), "optimizer": Share(1.0, 1)}
    assert replace(plain, baseline=None).on_gpu(seen).groups == {"LoRA": Share(3.0, 1), "optimizer": Share(1.0, 1)}


def measured(name: str, milliseconds: float, busy: float, how: Any = None) -> Measured:
    plain = Measured(name, milliseconds, milliseconds, None, 8.0, 1.0, "1 all", 1.0, how)
    return plain.on_gpu(Seen(tuple(launches(busy)), busy, 0.0))


def test_a_case_is_shown_beside_both_baselines_by_the_clock_and_by_the_gpu():
    results = [measured("a", 1000, 800, "eager"), measured("b", 600, 400, "compiled"), measured("ours", 300, 200)]
    assert [row[3:5] for row in steps.table_rows(results, None)] == [
        ["1.00x, GPU 1.00x", "0.60x, GPU 0.50x"],
        ["1.67x, GPU 2.00x", "1.00x, GPU 1.00x"],
        ["3.33x, GPU 4.00x", "2.00x, GPU 2.00x"],
    ]
    assert [row[2] for row in steps.table_rows(results, None)] == ["800 (1.25x)", "400 (1.50x)", "200 (1.50x)"]
    assert len(steps.table_rows(results, None)[0]) == len(steps.COLUMNS)
    assert steps.limits(results)[2] == (
        "ours: limited by launches: the GPU computes for 200 of 300 ms (matmuls 200, attention 0, memory 0)"
    )
    assert steps.limits([replace(results[2], spent=None)]) == []
    assert json.loads(steps.as_json(results))[2]["limit"] == results[2].limit
    assert steps.kernel_rows(results[2])[0] == ["matmul", "200.0", "1", GROUPS["matmul"]]
    assert steps.kernel_rows(results[2])[4] == ["matmul", "200.0", "1", "_int8_matmul"]
    assert len(steps.kernel_rows(results[2])[0]) == len(steps.KERNEL_COLUMNS)


def test_a_table_has_no_columns_without_a_value_and_parts_groups_from_kernels():
    rows = steps.table_rows([measured("ours", 300, 200)], None)
    table = bench_command._table("a card", steps.COLUMNS, rows, steps.COLUMNS[1:5])
    assert [column.header for column in table.columns] == [
        "case", "ms/step", "GPU busy (wall over it)", "reserved GiB", "TFLOP/s (of ceiling)", "blocks",
    ]  # fmt: skip
    result = measured("ours", 300, 200)
    kernels = bench_command._table(
        "ours", steps.KERNEL_COLUMNS, steps.kernel_rows(result), (), len(result.groups or ())
    )
    names = list(kernels.columns[0].cells)
    assert names.index("") == len(result.groups or ())


def test_the_bench_times_diffusers_eager_and_with_its_own_way_to_compile(monkeypatch):
    asked: list[tuple[str, Case]] = []

    def time_baseline(config: Any, device: Any, *, case: Case, how: Any, **_: Any) -> Measured:
        asked.append((how, case))
        return measured(f"baseline, {how}", 10, 5, how)

    monkeypatch.setattr(steps, "time_baseline", time_baseline)
    case = Case("int8-quanto", 16, is_i2i=True)
    results = steps.time_cases((), torch.device("cpu"), baseline=case)
    assert asked == [("eager", case), ("compiled", case)]
    assert [r.baseline for r in results] == ["eager", "compiled"]
    assert steps.time_cases((), torch.device("cpu")) == []


def test_all_cases_are_timed_before_one_is_looked_at(monkeypatch):
    """What looks at a step stays attached to the process, and delays what is captured later."""
    done: list[tuple[str, bool]] = []

    def time_case(case: Case, *_: Any, num_steps: int, num_warm_up: int, is_watched: bool = True) -> Measured:
        done.append((case.precision, is_watched))
        if is_watched and case.precision == "int8-dynamic":
            raise RuntimeError("no room any more")
        result = measured(case.name, 10.0 if num_steps > 1 else 13.0, 9.0)
        return result if is_watched else replace(result, busy=None, spent=None, groups=None)

    monkeypatch.setattr(steps, "time_case", time_case)
    monkeypatch.setattr(steps.torch.cuda, "empty_cache", lambda: None)
    quanto, dynamic = steps.time_cases((Case("int8-quanto", None), Case("int8-dynamic", None)), torch.device("cuda"))
    assert done == [("int8-quanto", False), ("int8-dynamic", False), ("int8-quanto", True), ("int8-dynamic", True)]
    assert (quanto.milliseconds, quanto.busy) == (10.0, 9.0)
    assert quanto.limit == "matmuls, of 9 ms on the GPU (matmuls 9, attention 0, memory 0)"
    assert (dynamic.milliseconds, dynamic.busy, dynamic.limit) == (10.0, None, None)


def test_the_compiled_baseline_compiles_diffusers_blocks(monkeypatch):
    from diffusers import Kandinsky5Transformer3DModel as Transformer

    from tests.test_memory import SMALL

    compiled: list[Any] = []
    monkeypatch.setattr(Transformer, "compile_repeated_blocks", lambda self: compiled.append(self))
    monkeypatch.setattr(baseline, "set_up_compiler", lambda: None)
    monkeypatch.setattr(baseline, "time_steps", lambda *args: SimpleNamespace(
        median=1.0, fastest=1.0, first=1.0, reserved_gib=None))  # fmt: skip
    small, cpu = {**SMALL, "num_text_blocks": 1}, torch.device("cpu")
    assert baseline.time_baseline(small, cpu, 1, 0, how="eager").baseline == "eager"
    assert compiled == []
    result = baseline.time_baseline(small, cpu, 1, 0, how="compiled")
    assert (result.baseline, len(compiled)) == ("compiled", 1)
    assert result.name == "baseline: diffusers + peft + quanto, compiled, checkpointing"


def test_every_function_of_ours_that_multiplies_is_known_to_the_groups():
    """Its adapters' products come from torch's own matmuls, whose names do not say whose they are."""
    import k5train.forward

    for module in pkgutil.iter_modules(k5train.forward.__path__, "k5train.forward."):
        if module.name.endswith((".kernels", ".row_kernels", ".hopper", ".few_keys")):
            continue  # these need Triton, and have kernels
        importlib.import_module(module.name)
    ours = [f for f in torch.autograd.Function.__subclasses__() if f.__module__.startswith("k5train.")]
    multiply = {f.__name__ for f in ours if re.search(r"\bmm\(| @ |adapter_grads", inspect.getsource(f))}
    groups = {"_Linear": "LoRA", "_FeedForward": "LoRA", "_Int8Matmul": "matmul"}  # the last has frozen weights alone
    assert multiply == set(groups)
    for name, group in groups.items():
        for call in (name, f"{name}Backward"):
            assert group_of(Launch("nvjet_sm90_tst", 1.0, ("aten::mm", "aten::matmul", call))) == group
