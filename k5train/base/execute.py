"""How a plan is carried out: blocks compiled or eager, what each keeps for backward, weights resident or streamed."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import itertools
import logging
import os
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from k5cache import console
from k5cache.errors import K5Error, RunError
from k5train.base import attention, ops
from k5train.base import block as block_module
from k5train.base.attention import attention_works
from k5train.base.block import Attention, Block, Linears, Modes, adapter_state, gather, run_block
from k5train.base.forward import BlockPolicy, keep, recompute
from k5train.base.masked import MaskedTextBlock, MaskedVisualBlock
from k5train.base.memory import LEVELS, Level, LevelName, Plan
from k5train.base.prepared import k5_home
from k5train.base.stream import Streamer, spread

if TYPE_CHECKING:
    from diffusers import Kandinsky5Transformer3DModel

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


class Execution:
    """A transformer made ready to run by a plan. ``policies`` go to ``predict_velocity``.

    Args:
        transformer: with its adapter. Streamed blocks' weights may still lie in host memory.
        plan: for its visual blocks. Text blocks, two of 52 over few tokens, are always resident, recomputed and eager:
            compiling them would cost seconds at every start, and again for a caption of one token.
        compiled: compile the visual blocks; ``warm_up`` falls back where that fails.
        streamer: of the blocks that the plan streams, where it does.
        any_rank: one compilation for adapters of every rank, as a sweep over ranks wants it; a third more of it.
    """

    def __init__(
        self,
        transformer: Kandinsky5Transformer3DModel,
        plan: Plan,
        modes: Modes,
        *,
        compiled: bool,
        device: torch.device,
        streamer: Streamer | None = None,
        any_rank: bool = False,
    ) -> None:
        text, visual = list(transformer.text_transformer_blocks), list(transformer.visual_transformer_blocks)
        self.plan, self.modes, self.device = plan, modes, device
        self._run = _compile() if compiled else _run
        streamed = spread(len(visual), plan.streaming.num_blocks) if plan.streaming else []
        self.streamer = streamer
        self._any_rank = any_rank
        self._compiled: set[Any] = set()
        self._is_warm = self._is_warming_up = False
        if plan.streaming and not streamer:
            raise ValueError("a plan that streams needs the streamer that moved the weights")
        self.policies: list[BlockPolicy] = [self._policy("nothing") for _ in text]
        for i, level in enumerate(plan.levels):
            policy = self._policy(level)
            place = streamed.index(i) if i in streamed else None
            if self.streamer and place is not None:
                policy = self.streamer.around(policy, place)
            self.policies.append(policy)

    @property
    def is_compiled(self) -> bool:
        """Whether blocks run compiled: asked for, and not found impossible since."""
        return self._run is not _run

    def warm_up(self, step: Callable[[], Any]) -> None:
        """Run ``step`` (a forward and backward pass) once: compile, or say in one line what runs instead.

        Raises:
            torch.OutOfMemoryError: as it came.
        """
        if not self.is_compiled:
            return
        self._is_warming_up = True
        error = self._attempt(step)
        if error and self.modes.cudnn:
            self.modes = self.modes._replace(cudnn=False)
            console.note(f"cuDNN attention does not compile here, flash attention is tried ({error})")
            error = self._attempt(step)
        self._is_warming_up = False
        if error:
            self._give_up(error)
        self._is_warm = True
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what loading and compiling took and gave back

    def _attempt(self, step: Callable[[], Any]) -> str | None:
        """Run ``step``, random numbers put back after it. Returns what went wrong, unless that is for the user.

        In words: the error itself holds the frames of the step, and they its activations, while the next one runs.
        """
        try:
            with _random_numbers_kept(self.device):
                step()
            return None
        except (torch.OutOfMemoryError, K5Error):
            raise
        # Dynamo, inductor, Triton, gcc and ptxas each fail in their own way; whatever it was, the eager run that
        # follows answers it, and raises if the compiler was not to blame.
        except Exception as error:
            self._compiled.clear()
            if self.streamer:
                self.streamer.reset()
            return _in_words(error)

    def _policy(self, level: LevelName) -> BlockPolicy:
        gathered: dict[Any, tuple[Block, tuple[int, ...]] | None] = {}

        def policy(given: Any, x: Tensor, *rest: Any) -> Tensor:
            masked = isinstance(given, MaskedTextBlock | MaskedVisualBlock)
            block, mask = (given.block, given.mask) if masked else (given, None)
            state = (block.training, adapter_state(block))
            if state not in gathered:
                gathered.clear()
                weights = gather(block, dropout=block.training)
                gathered[state] = (weights, self._ranks(weights)) if weights else None
            found = gathered[state]
            if found is None:
                return (keep if level == "all" else recompute)(given, x, *rest)
            weights, ranks = found
            text, time, rope = rest[:3] if weights.cross_attention else (None, *rest)
            modulate: nn.Module = block.visual_modulation if weights.cross_attention else block.text_modulation
            if torch.is_grad_enabled() and not x.requires_grad:
                x = x.detach().requires_grad_()  # the first block is then compiled with the others
            args = (modulate(time), weights, self.modes, level)
            if text is None or not self.is_compiled:
                return _run(x, text, rope, mask, *args)
            sized = _Sized(x, text, rope, mask)
            kind = (level, torch.is_grad_enabled(), block.training, ranks, sized.kinds())
            if self.plan.sizes and kind not in self._compiled:
                if self._is_warm and not any(known[1:] == kind[1:] for known in self._compiled):
                    console.note(f"Compiling for {_words(sized)}: seconds, or a minute if never done on this machine")
                self._compiled.add(kind)
                if not self._compiles_at(sized.at(self.plan.sizes, ranks), *args):
                    return _run(x, text, rope, mask, *args)
            sized.mark_dynamic()
            result: Tensor = self._run(*sized, *args)
            return result

        return policy

    def _compiles_at(self, largest: _Sized, *args: Any) -> bool:
        """Compile what is met for the first time at the plan's largest size, whatever size it is met with.

        One compilation serves every size, but the size it was made at decides how its kernels divide their sums. A run
        that is resumed meets sizes in another order, and shall get the same kernels.

        Returns:
            False where the compiler failed: blocks run eagerly from then on. ``warm_up`` answers its own failures.
        """
        largest.mark_dynamic()
        try:
            with _random_numbers_kept(self.device):
                self._run(*largest, *args)
        except (torch.OutOfMemoryError, K5Error):
            raise
        except Exception as error:  # as in _attempt: whatever it was, the eager run that follows answers it
            if self._is_warming_up:
                raise
            self._give_up(_in_words(error))
        return self.is_compiled

    def _give_up(self, error: str) -> None:
        console.warn(f"The blocks cannot be compiled here and run eagerly, slower ({error})")
        self._run = _run

    def _ranks(self, weights: Block) -> tuple[int, ...]:
        """Of every adapter in a block, for the compiler a constant or not."""
        attentions = [a for a in (weights.self_attention, weights.cross_attention) if a]
        linears = [part for a in attentions for parts in (*a.projections, (a.out,)) for part in parts]
        ranks = []
        for part in (*linears, weights.ff_in, weights.ff_out):
            for down, up in zip(part.downs, part.ups, strict=True):
                ranks.append(len(down))
                if self._any_rank and self.is_compiled:
                    torch._dynamo.maybe_mark_dynamic(down, 0)
                    torch._dynamo.maybe_mark_dynamic(up, 1)
        return tuple(ranks)


def _in_words(error: Exception) -> str:
    lines = (str(error).strip() or "no message").splitlines()  # dynamo's first line says only that a backend raised
    return f"{type(error).__name__}: {' '.join(line.strip() for line in lines[:2])[:180]}"


class _Sized(NamedTuple):
    """The inputs of a picture block whose sizes change from step to step."""

    x: Tensor
    text: Tensor
    rope: Tensor
    mask: Tensor | None

    def mark_dynamic(self) -> None:
        """Have one compilation serve every size."""
        for tensor, along in zip(self, _ALONG, strict=True):
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, along)

    def kinds(self) -> tuple[tuple[int, ...] | None, ...]:
        """The shapes with 0 for a number of tokens, unless it is one: the compiler takes that for a constant."""

        def kind(tensor: Tensor | None, along: int) -> tuple[int, ...] | None:
            if tensor is None:
                return None
            return (*tensor.shape[:along], int(tensor.shape[along] == 1), *tensor.shape[along + 1 :])

        return tuple(map(kind, self, _ALONG))

    def at(self, sizes: tuple[int, int], taken: Collection[int]) -> _Sized:
        """Stand-ins for a picture and a caption of so many tokens, or a few more.

        Args:
            taken: no size is one of these: the compiler takes two sizes that are equal at first for one size.
        """
        chosen: list[int] = []
        for size in sizes:
            chosen.append(next(n for n in itertools.count(max(2, size)) if n not in {*taken, *chosen}))
        num_tokens, num_text_tokens = chosen

        def stand_in(tensor: Any, along: int, size: int) -> Any:
            if tensor is None or tensor.shape[along] == 1:
                return tensor
            shape = [*tensor.shape[:along], size, *tensor.shape[along + 1 :]]
            return tensor.new_zeros(shape).requires_grad_(tensor.requires_grad)

        return _Sized(*map(stand_in, self, _ALONG, (num_tokens, num_text_tokens, num_tokens, num_text_tokens)))


_ALONG = (1, 1, 1, 3)  # where _Sized's tensors have their tokens


def _words(sized: _Sized) -> str:
    """What may be new about a step, for a person who waits for the compiler."""
    caption = "captions of one token" if sized.text.shape[1] == 1 else "captions"
    masked = "" if sized.mask is None else ", masked"
    return f"{'training' if torch.is_grad_enabled() else 'drawing'} on {len(sized.x)} x {caption}{masked}"


def _random_numbers_kept(device: torch.device) -> AbstractContextManager[None]:
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def choose_modes(device: torch.device, precision: str) -> Modes:
    """How blocks compute on this device: what is asked for, and what is found to work.

    Raises:
        RunError: int8 tensor cores are asked for and the GPU has none.
    """
    if device.type != "cuda":
        return Modes(int8_dynamic=precision == "int8-dynamic", cudnn=False)
    capability = torch.cuda.get_device_capability(device)
    if precision == "int8-dynamic":
        if capability < (8, 0):
            raise RunError(
                f"{torch.cuda.get_device_name(device)} has no int8 tensor cores that this can use",
                "Use --set train.base_model_precision=int8-quanto",
            )
        if not ops.kernel_works(device):
            console.note("The int8 kernel does not run here: torch._int_mm is used, which is slower")
    # Flash attention as torch ships it is written for Ampere; cuDNN's knows Hopper and Blackwell.
    cudnn = capability[0] in (9, 10) and attention_works(device, cudnn=True)
    return Modes(precision == "int8-dynamic", cudnn, flash=attention_works(device, cudnn=False))


def check_bfloat16(device: torch.device, mixed_precision: str) -> None:
    """Refuse a GPU that only imitates bfloat16, before anything is loaded.

    Raises:
        RunError: it is older than Ampere.
    """
    if device.type == "cuda" and mixed_precision == "bf16" and not torch.cuda.is_bf16_supported(False):
        raise RunError(
            f"{torch.cuda.get_device_name(device)} has no bfloat16",
            "Use a GPU of the RTX 30 series or newer, or --set train.mixed_precision=fp32 (twice the memory, slow)",
        )


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
globals().update({contexts.__name__: contexts for contexts in _CONTEXTS.values()})


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
