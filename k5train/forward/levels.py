"""What does a block keep from the forward to the backward pass? Runs one block at one level of a plan."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from k5train.forward.block import Block, Modes, run_block  # defines the ops of k5 too
from k5train.planning.memory import LEVELS, Level, LevelName

_ATTENTIONS = (
    torch.ops.k5.attention.default,
    *(  # torch's own: with a mask, and if our kernel is not available
        getattr(torch.ops.aten, f"_scaled_dot_product_{name}").default
        for name in ("flash_attention", "cudnn_attention", "efficient_attention", "flash_attention_for_cpu")
    ),
)
_LORA_MATMULS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
_MATMULS = (torch.ops.k5.matmul.default, torch.ops.k5.int8_matmul.default)


def run_at_level(
    x: Tensor,
    text: Tensor | None,
    rope: Tensor,
    lengths: Tensor | None,
    modulation: Tensor,
    block: Block,
    modes: Modes,
    level: LevelName,
) -> Tensor:
    """``run_block``, which keeps for the backward pass what ``level`` says. Works both eagerly and compiled."""
    args = (x, text, lengths, modulation, rope, block, modes)
    output: Tensor
    if level == "all" or not torch.is_grad_enabled():
        output = opaque_block(*args)
    elif level == "nothing" and not torch.compiler.is_compiling():
        output = checkpoint(run_block, *args, use_reentrant=False)
    else:  # "nothing" too: without a context the compiler would choose itself what to recompute
        output = checkpoint(opaque_block, *args, use_reentrant=False, context_fn=_CONTEXTS[level])
    return output


def opaque_block(x: Tensor, *rest: Any) -> Tensor:
    """``run_block`` as a single call in dynamo's graph. ``compile.py`` marks it as such.

    Dynamo follows Python line by line, which takes seconds a level at every start. It does not look into this
    function: it calls it with a fake tensor to learn what comes out, and that is known. AOTAutograd does look inside,
    unless its cache has the block from an earlier start.
    """
    if type(x) is FakeTensor and not _is_traced():
        return x.clone()
    return run_block(x, *rest)


def _is_traced() -> bool:
    """Whether AOTAutograd is at work. It makes ops functional both to learn shapes and to trace."""
    key = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(k) is not None for k in (key.FUNCTIONAL, key.PROXY))


def _policy(level: Level, op: Any, *args: Any) -> CheckpointPolicy:
    """Whether the result of one op is kept. Results of elementwise ops never are."""
    if op in _ATTENTIONS:
        # Self attention has as many keys as queries. Cross attention is cheap: it is kept only with its linears.
        is_self = args[0].shape == args[1].shape
        is_kept = bool(level.matmuls) or (level.attention and is_self)
    elif op in _LORA_MATMULS:
        # Only down-projections. What dropout leaves of them is projected up in a product of its own, as wide as the
        # linear's output, which no gradient needs.
        is_kept = bool(level.matmuls) and args[-1].shape[1] < args[-2].shape[1]
    else:
        is_kept = op in _MATMULS and args[-1] in level.matmuls
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.MUST_RECOMPUTE


def _contexts(name: LevelName) -> Callable[[], Any]:
    """The ``context_fn`` of one level, with a name and a hash by which a later process finds its compiled code."""
    level = LEVELS[name]

    # Plain functions, because dynamo of torch 2.11 does not read the arguments of a `partial` within a `partial`.
    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return _policy(level, op, *args)

    def contexts() -> Any:
        return create_selective_checkpoint_contexts(policy)  # type: ignore[no-untyped-call, unused-ignore]

    # AOTAutograd's cache pickles the function by its name, and tells one policy from another by this hash.
    contexts.__name__ = contexts.__qualname__ = f"_contexts_{name}"
    facts = (level.attention, sorted(level.matmuls), _ATTENTIONS, _MATMULS, _LORA_MATMULS, inspect.getsource(_policy))
    contexts.cache_hash = repr(facts)  # type: ignore[attr-defined]
    return contexts


_CONTEXTS = {name: _contexts(name) for name in LEVELS}
globals().update({contexts.__name__: contexts for contexts in _CONTEXTS.values()})  # where pickle looks them up
