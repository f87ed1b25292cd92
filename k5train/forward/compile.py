"""How one block is run and compiled, what it keeps for backward, and where compiled code is kept."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from k5cache.shared.home import k5_home
from k5train.forward import attention, ops
from k5train.forward import block as block_module
from k5train.forward.block import Attention, Block, Linears, Modes, run_block
from k5train.planning.memory import LEVELS, Level, LevelName

_ATTENTIONS = (
    torch.ops.k5.attention.default,
    *(  # with a mask, and where ours does not work
        getattr(torch.ops.aten, f"_scaled_dot_product_{name}").default
        for name in ("flash_attention", "cudnn_attention", "efficient_attention", "flash_attention_for_cpu")
    ),
)


_LORA = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


_OURS = (torch.ops.k5.matmul.default, torch.ops.k5.int8_matmul.default)


_COMPILED_VARIANTS = 64  # levels x batch sizes x captions of one token or more x training or sampling; torch allows 8


def _keep(level: Level, op: Any, *args: Any) -> CheckpointPolicy:
    """Whether one op's result is kept; what is elementwise never is."""
    if op in _ATTENTIONS:
        # Over the picture, queries and keys are as many; cross attention is cheap and kept only with its linears.
        is_self = args[0].shape == args[1].shape
        kept = bool(level.matmuls) or (level.attention and is_self)
    else:
        kept = (op in _OURS and args[-1] in level.matmuls) or (op in _LORA and bool(level.matmuls))
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.MUST_RECOMPUTE


def _contexts(name: LevelName) -> Callable[[], Any]:
    level = LEVELS[name]

    # Plain functions: dynamo of torch 2.11 hands the arguments of a `partial` within a `partial` on unread.
    def keep_some(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return _keep(level, op, *args)

    def contexts() -> Any:
        return create_selective_checkpoint_contexts(keep_some)  # type: ignore[no-untyped-call, unused-ignore]

    # A cache of traced graphs pickles it by its name, and tells one policy from another by this hash.
    contexts.__name__ = contexts.__qualname__ = f"_contexts_{name}"
    policy = (level.attention, sorted(level.matmuls), _ATTENTIONS, _OURS, _LORA, inspect.getsource(_keep))
    contexts.cache_hash = repr(policy)  # type: ignore[attr-defined]
    return contexts


_CONTEXTS = {name: _contexts(name) for name in LEVELS}


def _run(
    x: Tensor,
    text: Tensor | None,
    rope: Tensor,
    mask: Tensor | None,
    modulation: Tensor,
    block: Block,
    modes: Modes,
    level: LevelName,
) -> Tensor:
    args = (x, text, mask, modulation, rope, block, modes)
    result: Tensor
    if level == "all" or not torch.is_grad_enabled():
        result = _opaque_block(*args)
    elif level == "nothing" and not torch.compiler.is_compiling():
        result = checkpoint(run_block, *args, use_reentrant=False)
    else:  # "nothing" too: without a context the compiler recomputes only what it finds worth it
        result = checkpoint(_opaque_block, *args, use_reentrant=False, context_fn=_CONTEXTS[level])
    return result


def _opaque_block(x: Tensor, *rest: Any) -> Tensor:
    """``run_block``, as one call in dynamo's graph: AOTAutograd looks inside, unless it finds what it made before.

    Dynamo follows Python a line at a time, and would do so at every start: seconds a level. It only asks this function
    what comes out of it, by a call with a fake tensor, and that is known.
    """
    if type(x) is FakeTensor and not _is_traced():
        return x.clone()
    return run_block(x, *rest)


def _is_traced() -> bool:
    """Whether AOTAutograd is at work: it always makes ops functional, to learn shapes as well as to trace."""
    key = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(k) is not None for k in (key.FUNCTIONAL, key.PROXY))


def _mark_opaque() -> None:
    """Tell dynamo to leave ``_opaque_block`` whole, and the cache of traced graphs what a call of it stands for."""
    import torch._inductor.config as inductor

    torch.compiler.allow_in_graph(_opaque_block)  # type: ignore[no-untyped-call, unused-ignore]
    # Not in torch 2.7: without it a later process finds the kernels, but traces the block again.
    if hasattr(inductor, "unsafe_marked_cacheable_functions"):
        sources = "".join(inspect.getsource(module) for module in (block_module, ops, attention))
        digest = hashlib.sha256(sources.encode()).hexdigest()
        for f in (_opaque_block, Attention, Block, Linears, Modes):
            inductor.unsafe_marked_cacheable_functions[f"{f.__module__}.{f.__name__}"] = digest


def _compile() -> Callable[..., Tensor]:
    set_up_compiler()
    return torch.compile(_run, fullgraph=True, dynamic=False)


def set_up_compiler() -> None:
    """The compiler's settings, and where it keeps what it makes."""
    import torch._dynamo
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # inductor keeps what it compiled in /tmp, which a restart empties; a second run then compiles again, a minute.
    # Importing dynamo has already written its own choice to the environment, so a user's is one that differs from it.
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", default_cache_dir()) == default_cache_dir():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(k5_home() / "compiled")
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _COMPILED_VARIANTS)
    config.force_parameter_static_shapes = False  # adapters are parameters, of any rank
    _mark_opaque()
    # Says once that in-place ops would be wrong under selective checkpointing; there are none inside a block.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)


def import_compiler() -> None:
    """Import what the first compilation will, and hash torch's and Triton's sources as it will: seconds.

    For a thread beside the reading of weights, which needs the processor little. What fails here fails again where the
    compiler is used, and is answered there.
    """
    with suppress(Exception):
        set_up_compiler()
        importlib.import_module("torch._inductor.compile_fx")
        from torch._inductor.codecache import CacheBase, torch_key

        CacheBase.get_system()
        torch_key()
