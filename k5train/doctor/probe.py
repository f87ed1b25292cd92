"""What do torch, the GPU and the hub say? Asked in a process of its own, which may crash or hang and is then ended.

``python -m k5train.doctor.probe NAME`` prints its facts as JSON, one line for each that is known.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from k5cache.shared import system
from k5train.doctor.check import reason_of

Facts = dict[str, Any]


def ask(name: str, *arguments: str, seconds: float, env: dict[str, str] | None = None) -> tuple[Facts, str]:
    """The facts that a probe printed, and why there are no more of them: "" if it came to its end."""
    folder = Path(__file__).parents[2]  # -P: a file of the user's named random.py must not be imported
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-P", "-m", "k5train.doctor.probe", name, *arguments]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:  # a pipe would wait for a compiler's workers
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env={**os.environ, "PYTHONPATH": path,
            **(env or {})}, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(seconds)
            err.seek(0)
            problem = (_last_line(err.read()) or f"it ended with code {code}") if code else ""
        except subprocess.TimeoutExpired:
            problem = f"no answer within {seconds:g} s"
        finally:
            system.end_with_children(process)
        out.seek(0)
        return facts_of(out.read()), problem


def facts_of(output: bytes) -> Facts:
    """The facts in what a probe printed. A library may print other lines between them."""
    facts: Facts = {}
    for line in output.decode("utf-8", "replace").splitlines():
        with suppress(ValueError):
            value = json.loads(line)
            facts |= value if isinstance(value, dict) else {}
    return facts


def _last_line(text: bytes) -> str:
    lines = text.decode("utf-8", "replace").strip().splitlines()
    return lines[-1][:200] if lines else ""


def _torch() -> Iterator[Facts]:
    """torch's build, and the GPUs that it sees."""
    import torch

    yield {"version": torch.__version__, "cuda": torch.version.cuda, "hip": getattr(torch.version, "hip", None)}
    yield {"is_available": torch.cuda.is_available()}
    if torch.version.cuda or getattr(torch.version, "hip", None):
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call]
        except (RuntimeError, AssertionError) as error:
            yield {"problem": reason_of(error)}
            return
        yield {"arch_list": torch.cuda.get_arch_list()}
        yield {"cards": [_card(index) for index in range(torch.cuda.device_count())]}


def _card(index: int) -> Facts:
    import torch

    free, total = torch.cuda.mem_get_info(index)
    arch = getattr(torch.cuda.get_device_properties(index), "gcnArchName", "")  # gfx90a:sramecc+:xnack-
    return {
        "name": torch.cuda.get_device_name(index),
        "total": total,
        "free": free,
        "capability": list(torch.cuda.get_device_capability(index)),
        "has_bf16": torch.cuda.is_bf16_supported(False),
        "arch": arch.partition(":")[0] if getattr(torch.version, "hip", None) else "",
    }


def _kernels() -> Iterator[Facts]:
    """Which kernels run on the first GPU: the compiler's, ours, and those of attention."""
    import torch

    device = torch.device("cuda")
    yield {"compile": _compile_problem(device)}
    from k5train.forward import attention, checks, ops

    yield {"int8": ops.kernel_works(device), "int_mm": checks.int_mm_works(device)}
    yield {"scaling": ops.scaling_works(device)}
    yield {"flash": attention.attention_works(device, cudnn=False)}
    yield {"cudnn": attention.attention_works(device, cudnn=True)}
    yield {"efficient": _efficient_works(device)}


def _compile_problem(device: Any) -> str:
    """Why torch.compile does not give the right numbers on a small norm; "" if it does."""
    import torch

    def norm(x: Any, scale: Any) -> Any:
        mean = x.float().square().mean(-1, keepdim=True)
        return (x * torch.rsqrt(mean + 1e-6) * scale).to(x.dtype)

    x, scale = torch.randn(64, 256, device=device), torch.randn(256, device=device)
    try:
        ours = torch.compile(norm, fullgraph=True, dynamic=False)(x, scale)
    except Exception as error:  # of any kind, as in forward/execute.py
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {' '.join(lines[:2])[:200]}"
    return "" if torch.allclose(ours, norm(x, scale), rtol=1e-4, atol=1e-4) else "its numbers are wrong"


def _efficient_works(device: Any) -> bool:
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    query = torch.randn(1, 2, 256, 128, device=device, dtype=torch.bfloat16)
    try:
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            F.scaled_dot_product_attention(query, query, query)
    except RuntimeError:  # no kernel for this GPU
        return False
    return True


def _plan(vram: str = "") -> Iterator[Facts]:
    """What the planner chooses for the published model at 1024x1024, from its shapes alone."""
    import torch

    from k5cache.shared.errors import DoesNotFit
    from k5train.base.architecture import full_size
    from k5train.forward.precision import decided
    from k5train.options.memory import MemoryConfig
    from k5train.options.precision import precision_of
    from k5train.options.train import TrainConfig
    from k5train.planning import vram as vram_module
    from k5train.planning.plan import plan_for

    config = decided(TrainConfig(memory=MemoryConfig(vram=vram or None)), is_imagined=True)
    budget = vram_module.budget(torch.device("cuda" if torch.cuda.is_available() else "cpu"), vram or None)
    try:
        plan = plan_for(full_size("t2i"), config, torch.device("cuda"), (64 * 64, 512), budget)
    except DoesNotFit as error:
        yield {"problem": error.problem, "fix": error.fix}
        return
    levels = {name: plan.levels.count(name) for name in dict.fromkeys(plan.levels)}
    streamed = plan.streaming.num_blocks if plan.streaming else 0
    yield {"peak": plan.peak, "budget": plan.budget, "levels": levels, "streamed": streamed}
    yield {"precision": precision_of(config), "host_bytes": plan.host_bytes}


def _hub(repo: str) -> Iterator[Facts]:
    """Whether the hub answers, and what it says to this user's token. The token itself is never printed."""
    from huggingface_hub import get_token, model_info
    from huggingface_hub.errors import HfHubHTTPError

    from k5cache.shared.hub import without_tokens

    yield {"has_token": bool(get_token())}
    try:
        yield {"commit": model_info(repo, timeout=5).sha}
    except Exception as error:  # no route, no name, a proxy, a certificate: the reason is the answer
        response = getattr(error, "response", None) if isinstance(error, HfHubHTTPError) else None
        reason = reason_of(error)
        yield {"status": getattr(response, "status_code", None)}
        yield {"problem": without_tokens(reason)}


_PROBES: dict[str, Callable[..., Iterator[Facts]]] = {"torch": _torch, "kernels": _kernels, "plan": _plan, "hub": _hub}


def main() -> None:
    """Print the facts of the probe that the command line names."""
    name, *arguments = sys.argv[1:]
    try:
        for facts in _PROBES[name](*arguments):
            print("\n" + json.dumps(facts), flush=True)
    except Exception as error:  # its line is what the report says
        print(reason_of(error), file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)  # libraries' threads and atexit handlers are not waited for


if __name__ == "__main__":
    main()
