"""How a plan is carried out: blocks compiled or eager, what each keeps for backward, weights resident or streamed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from k5cache.shared import console
from k5cache.shared.errors import K5Error, RunError
from k5train.forward import ops
from k5train.forward.attention import attention_works
from k5train.forward.block import Block, Modes, adapter_state, gather
from k5train.forward.compile import _CONTEXTS, _compile, _run
from k5train.forward.masked import MaskedTextBlock, MaskedVisualBlock
from k5train.forward.predict_velocity import BlockPolicy, keep, recompute
from k5train.forward.sizes import _Sized, _words
from k5train.forward.stream import Streamer, spread
from k5train.planning.memory import LevelName, Plan

if TYPE_CHECKING:
    from diffusers import Kandinsky5Transformer3DModel


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


globals().update({contexts.__name__: contexts for contexts in _CONTEXTS.values()})
