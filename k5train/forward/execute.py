"""How is a plan carried out? Each block runs compiled or eager, at its level, with its weights resident or streamed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from k5cache.shared import console
from k5cache.shared.device import is_rocm
from k5cache.shared.errors import K5Error, RunError
from k5train.forward import checks, ops
from k5train.forward.attention import attention_works, few_keys_work, lengths_work
from k5train.forward.block import Block, Modes, adapter_state, bare, gather
from k5train.forward.choices import leave_rows
from k5train.forward.compile import compile_block
from k5train.forward.feed_forward import gelu_works
from k5train.forward.levels import run_at_level
from k5train.forward.masked import MaskedTextBlock, MaskedVisualBlock
from k5train.forward.modulations import modulations, modulations_work
from k5train.forward.predict_velocity import BlockPolicy, keep, recompute
from k5train.forward.rotary import rotary_works
from k5train.forward.sizes import SizedInputs
from k5train.forward.stream import Streamer, spread
from k5train.forward.without_adapter import is_without_adapter
from k5train.planning.memory import LevelName, Plan

if TYPE_CHECKING:
    from diffusers import Kandinsky5Transformer3DModel


class Gathered(NamedTuple):
    """A block's weights and adapters, and the ranks of these."""

    block: Block
    ranks: tuple[int, ...]
    bare: Block
    """Without the adapters."""


class Execution:
    """A transformer that runs by a plan. Its ``policies`` go to ``predict_velocity``.

    Args:
        transformer: with its adapter.
        plan: for the visual blocks. The two text blocks see few tokens: they are always resident, recomputed and
            eager, because compiling them takes seconds at every start, and again for a caption of one token.
        compiled: compile the visual blocks. They run eagerly if that fails.
        streamer: holds the weights of the blocks that the plan streams.
        any_rank: one compilation serves adapters of every rank, as a sweep over ranks needs it. It takes a third
            longer.
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
        self._run_compiled = compile_block() if compiled else None
        streamed = spread(len(visual), plan.streaming.num_blocks) if plan.streaming else []
        self.streamer = streamer
        self._any_rank = any_rank
        self._compiled_kinds: set[Any] = set()
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
        """Whether the visual blocks run compiled: it was asked for and has not failed."""
        return self._run_compiled is not None

    def warm_up(self, step: Callable[[], Any]) -> None:
        """Run ``step``, a forward and backward pass, once to compile. If that fails, say in one line what runs instead.

        Raises:
            torch.OutOfMemoryError: the step ran out of memory.
        """
        if not self.is_compiled:
            return
        self._is_warming_up = True
        error = self._attempt(step)
        if error and leave_rows():
            torch._dynamo.reset()
            error = self._attempt(step)
        if error and self.modes.cudnn:
            self.modes = self.modes._replace(cudnn=False)
            console.note(f"cuDNN attention does not compile here, trying flash attention ({error})")
            error = self._attempt(step)
        self._is_warming_up = False
        if error:
            self._give_up(error)
        self._is_warm = True
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what loading and compiling reserved and no longer use

    def _attempt(self, step: Callable[[], Any]) -> str | None:
        """Run ``step`` without moving the random generators. Returns the compiler's error as text, or None.

        Text, because the error itself would keep the step's frames and their activations alive during the next step.
        """
        try:
            with _same_random_numbers(self.device):
                step()
            return None
        except (torch.OutOfMemoryError, K5Error):
            raise
        # Dynamo, inductor, Triton, gcc and ptxas each fail in their own way. An eager run follows: it needs none of
        # them, and raises the error again if the compiler was not to blame.
        except Exception as error:
            self._compiled_kinds.clear()
            if self.streamer:
                self.streamer.reset()
            return _in_words(error)

    def _policy(self, level: LevelName) -> BlockPolicy:
        """How a block is run at ``level``."""
        known: dict[Any, Gathered | None] = {}

        def policy(module: Any, x: Tensor, *rest: Any) -> Tensor:
            is_padded = isinstance(module, MaskedTextBlock | MaskedVisualBlock)
            block, lengths = (module.block, module.padding.lengths) if is_padded else (module, None)
            gathered = self._gathered(block, known)
            if gathered is None:
                return (keep if level == "all" else recompute)(module, x, *rest)
            is_visual = gathered.block.cross_attention is not None
            text, time, rope = rest[:3] if is_visual else (None, *rest)
            modulation: nn.Module = block.visual_modulation if is_visual else block.text_modulation
            if torch.is_grad_enabled() and not x.requires_grad:
                x = x.detach().requires_grad_()  # so that the first block is compiled with the others
            weights, ranks = (gathered.bare, ()) if is_without_adapter() else (gathered.block, gathered.ranks)
            # Without gradients no level keeps anything, so that one compilation serves blocks of all levels.
            kept: LevelName = level if torch.is_grad_enabled() else "all"
            args = (modulations(modulation, time), weights, self.modes, kept)
            if text is None or not self.is_compiled:
                return run_at_level(x, text, rope, lengths, *args)
            return self._run_visual(SizedInputs(x, text, rope, lengths), args, ranks, block.training)

        return policy

    def _gathered(self, block: nn.Module, known: dict[Any, Gathered | None]) -> Gathered | None:
        """``gather``, again only when the block's adapters have changed. None: the block runs as the module it is.

        Args:
            known: what was gathered before, by the state of the block's adapters.
        """
        state = (block.training, adapter_state(block))
        if state not in known:
            known.clear()
            weights = gather(block, dropout=block.training)
            known[state] = Gathered(weights, self._ranks(weights), bare(weights)) if weights else None
        return known[state]

    def _run_visual(self, inputs: SizedInputs, args: tuple[Any, ...], ranks: tuple[int, ...], training: bool) -> Tensor:
        """Run a visual block compiled, or eagerly if the compiler fails at something new."""
        kind = (args[-1], torch.is_grad_enabled(), training, ranks, inputs.kind())
        if self.plan.sizes and kind not in self._compiled_kinds:
            if self._is_warm and not any(known[1:] == kind[1:] for known in self._compiled_kinds):
                console.note(f"Compiling for {inputs.describe()}: seconds, or a minute if never done on this machine")
            self._compiled_kinds.add(kind)
            self._compile_at(inputs.stand_ins(self.plan.sizes, ranks), *args)
        if self._run_compiled is None:
            return run_at_level(*inputs, *args)
        inputs.mark_dynamic()
        return self._run_compiled(*inputs, *args)

    def _compile_at(self, largest: SizedInputs, *args: Any) -> None:
        """Compile for the plan's largest size, whatever size comes first.

        One compilation serves every size, but the size it was made for decides how its kernels divide their sums. A
        resumed run meets the sizes in another order and must get the same kernels.

        If the compiler fails, blocks run eagerly from then on; ``warm_up`` handles its own failures.
        """
        assert self._run_compiled is not None
        largest.mark_dynamic()
        try:
            with _same_random_numbers(self.device):
                self._run_compiled(*largest, *args)
        except (torch.OutOfMemoryError, K5Error):
            raise
        except Exception as error:  # of any kind, as in _attempt
            if self._is_warming_up:
                raise
            self._give_up(_in_words(error))

    def _give_up(self, error: str) -> None:
        console.warn(f"The blocks cannot be compiled here and run eagerly, which is slower ({error})")
        self._run_compiled = None

    def _ranks(self, weights: Block) -> tuple[int, ...]:
        """The rank of every adapter in the block; dynamic in a sweep over ranks, so that one compilation serves all."""
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


def _same_random_numbers(device: torch.device) -> AbstractContextManager[None]:
    """Afterwards the generators are where they were before."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def choose_modes(device: torch.device, precision: str) -> Modes:
    """How blocks compute on this device: what is asked for, as far as it works here.

    Raises:
        RunError: ``precision`` needs int8 tensor cores and the GPU has none.
    """
    if device.type != "cuda":
        return Modes(int8_dynamic=precision == "int8-dynamic", cudnn=False)
    capability, on_amd = torch.cuda.get_device_capability(device), is_rocm()
    if precision == "int8-dynamic":
        is_old = capability < (8, 0) and not on_amd  # AMD's numbers mean other cards
        kernel = not is_old and ops.kernel_works(device)
        if not kernel and (is_old or not checks.int_mm_works(device)):
            raise RunError(
                f"{torch.cuda.get_device_name(device)} has no int8 tensor cores that can be used here",
                "Use --set train.base_model_precision=int8-quanto. A run that began with int8-dynamic goes on where it"
                " works, or starts anew: --new",
            )
        if not kernel:
            console.note("The int8 kernel does not run here: using torch._int_mm, which is slower")
    # Flash attention as torch ships it is written for Ampere; cuDNN's knows Hopper and Blackwell.
    cudnn = not on_amd and capability[0] in (9, 10) and attention_works(device, cudnn=True)
    flash = attention_works(device, cudnn=False)
    rows = gelu_works(device) and rotary_works(device)
    # These are asked for again at the first step. Now there are no activations yet beside what the checks need.
    modulations_work(device)
    few_keys_work(device)
    if precision == "int8-dynamic":
        ops.hopper_works(device)
    return Modes(precision == "int8-dynamic", cudnn, flash, padded=flash and lengths_work(device), rows=rows)
