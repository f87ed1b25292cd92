"""Which modules get an adapter, and of which rank?"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn

from k5cache.shared.errors import RecipeError
from k5cache.shared.foreign import shown
from k5cache.shared.patterns import Pattern, PatternProblem, Steps
from k5cache.shared.units import count_of
from k5train.adapter.lokr import factors_of
from k5train.options.adapter import LoraConfig

_BLOCK = r"(?:text|visual)_transformer_blocks\.\d+\."
_ADAPTED = re.compile(_BLOCK + r"(?:(?:self|cross)_attention|feed_forward)\.\w+")  # what a preset may match

PRESETS = {
    # The official trainer's configs/trainer/lora_image.yaml: ten suffixes, self_attention.to_query and so on.
    "official": _BLOCK
    + r"(?:(?:self|cross)_attention\.(?:to_query|to_key|to_value|out_layer)|feed_forward\.(?:in_layer|out_layer))",
    "attention": _BLOCK + r"(?:self|cross)_attention\.(?:to_query|to_key|to_value|out_layer)",
    "qkv": _BLOCK + r"(?:self|cross)_attention\.(?:to_query|to_key|to_value)",
}


class RankTooHigh(RecipeError):
    """A rank is above a side of its module's matrix."""


@dataclass(frozen=True)
class Matched:
    """What each target matched: pattern -> module names, in the recipe's order."""

    patterns: Mapping[str, tuple[str, ...]]
    ranks: Mapping[str, int] = field(default_factory=dict)
    """Module name -> rank; empty until the adapter is attached."""

    @property
    def modules(self) -> tuple[str, ...]:
        """Every matched module, once."""
        return tuple(dict.fromkeys(name for names in self.patterns.values() for name in names))


def describe(matched: Matched) -> str:
    """One line for each target: how many modules it matched, and which, without block numbers. If there are several
    ranks, one line for each."""
    lines = [
        f"LoRA on {count_of(len(names), 'module')} by {target}: {', '.join(_endings(names))}"
        for target, names in matched.patterns.items()
    ]
    by_rank: dict[int, list[str]] = {}
    for name, rank in matched.ranks.items():
        by_rank.setdefault(rank, []).append(name)
    if len(by_rank) > 1:
        lines += [
            f"rank {r} on {count_of(len(by_rank[r]), 'module')}: {', '.join(_endings(by_rank[r]))}"
            for r in sorted(by_rank)
        ]
    return "\n".join(lines)


def match_targets(transformer: nn.Module, targets: Iterable[str], option: str = "train.lora.targets") -> Matched:
    """Which linears do ``targets`` name?

    A target is a preset (``official``, ``attention``, ``qkv``); or the end of a dotted module name
    (``cross_attention.to_value``), as peft reads a list; or, if it has any other character, a regular expression
    for the whole name (``visual_transformer_blocks\\.(1|2)\\d\\..*attention\\.to_query``), as peft reads a string.

    Modulations, embeddings and the output head are taken only if the target names their parent
    (``visual_modulation.out_layer``): a bare ``out_layer`` would hit all of them.

    Raises:
        RecipeError: a target matches nothing, or also modules outside attention and feed-forward.
    """
    linears = list(linear_sizes(transformer))
    steps = Steps()
    return Matched({target: _match(target, linears, option, steps) for target in targets})


def linear_sizes(transformer: nn.Module) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of every linear of the transformer by its name, whether it is adapted or not."""
    return {
        name.replace(".base_layer", ""): (module.out_features, module.in_features)
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name
    }


def module_ranks(transformer: nn.Module, config: LoraConfig, matched: Matched) -> dict[str, int]:
    """The rank of each adapted module.

    Raises:
        RankTooHigh: a rank is above a side of its module's matrix.
        RecipeError: an entry of ``train.lora.ranks`` matches no adapted module.
    """
    ranks = dict.fromkeys(matched.modules, config.rank)
    sizes = linear_sizes(transformer)
    for entry in config.ranks:
        names = match_targets(transformer, [entry.target], "train.lora.ranks").modules
        adapted = [n for n in names if n in matched.modules]
        if not adapted:
            raise RecipeError(
                f"train.lora.ranks: {entry.target!r} matches no module that train.lora.targets adapts",
                "Add it to targets, or leave its rank out",
            )
        ranks |= dict.fromkeys(adapted, entry.rank)
    for name, rank in ranks.items() if config.algo != "lokr" else ():  # LoKr trains a whole factor at a high rank
        if rank > min(sizes[name]):
            smallest = min(min(sizes[n]) for n, r in ranks.items() if r == rank)
            raise RankTooHigh(
                f"train.lora: rank {rank} is too high for {name}, whose matrix is {sizes[name][0]} x {sizes[name][1]}",
                f"Use a rank of at most {smallest}: a higher one takes memory and can change nothing more",
            )
    return ranks


def num_parameters(size: tuple[int, int], rank: int, config: LoraConfig) -> int:
    """Trained parameters of one adapted linear.

    Args:
        size: its outputs and inputs.
    """
    if config.algo != "lokr":
        outputs, inputs = size
        return rank * (outputs + inputs) + (outputs if config.algo == "dora" else 0)
    return factors_of(size, rank, config.decompose_factor).num_parameters(rank)


def _match(target: str, linears: list[str], option: str, steps: Steps) -> tuple[str, ...]:
    # Only what somebody else wrote needs the matcher of bounded time, which is slower than re.
    ours = PRESETS.get(target) or (rf"(?:.*\.)?{re.escape(target)}" if re.fullmatch(r"[\w.]+", target) else None)
    try:
        fullmatch: Callable[[str], object] = (re.compile(ours) if ours else Pattern(target, steps)).fullmatch
        names = tuple(n for n in linears if fullmatch(n))
    except PatternProblem as problem:
        raise RecipeError(
            f"{option}: {shown(target, 80)!r} {problem}",
            r"Write it like attention\.to_(query|key), or name modules by their ends, like cross_attention.to_value",
        ) from None
    if not names:
        endings = _endings(linears)
        words = [*PRESETS, *endings, *(e.rpartition(".")[2] for e in endings)]
        near = difflib.get_close_matches(target, dict.fromkeys(words), n=3, cutoff=0.5) or sorted(PRESETS)
        raise RecipeError(f"{option}: {target!r} matches no module", f"Did you mean {', '.join(near)}?")
    without_escapes = target.replace("\\", "")
    surprising = [n for n in names if not _ADAPTED.fullmatch(n) and _parent(n) not in without_escapes]
    if surprising:
        parents = ", ".join(dict.fromkeys(_parent(n) for n in surprising))
        expected = ", ".join(_endings(n for n in names if n not in surprising))
        raise RecipeError(
            f"{option}: {target!r} also matches {count_of(len(surprising), 'module')} of {parents}",
            f"Write the parent too: {expected or parents}",
        )
    return names


def _endings(names: Iterable[str]) -> list[str]:
    """Names without the block they are in, each once."""
    return list(dict.fromkeys(n.split(".", 2)[-1] if "_blocks." in n else n for n in names))


def _parent(name: str) -> str:
    """What a target must contain to match this linear outside attention and feed-forward.

    The parent's name, or the whole name for the output head, ``out_layer.out_layer``.
    """
    parent = name.rpartition(".")[0].rpartition(".")[2]
    return name if parent == "out_layer" else parent
