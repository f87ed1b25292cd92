"""The adapter: which modules get one, how it starts, and the one file that diffusers and ComfyUI both load in full."""

from __future__ import annotations

import difflib
import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import Kandinsky5Transformer3DModel
from peft import LoKrConfig
from peft import LoraConfig as PeftLoraConfig
from peft.tuners.lokr import LoKrLayer
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from k5cache.errors import RecipeError, RunError
from k5train.checkpoint import write_whole
from k5train.config import LoraConfig
from k5train.lora_keys import read_pairs

ADAPTER = "default"
PREFIX = "transformer."  # diffusers loads nothing without it, and says nothing; ComfyUI takes it too

_BLOCK = r"(?:text|visual)_transformer_blocks\.\d+\."
_ADAPTED = re.compile(_BLOCK + r"(?:(?:self|cross)_attention|feed_forward)\.\w+")
PRESETS = {
    # The official trainer's configs/trainer/lora_image.yaml: ten suffixes, self_attention.to_query and so on.
    "official": _BLOCK
    + r"(?:(?:self|cross)_attention\.(?:to_query|to_key|to_value|out_layer)|feed_forward\.(?:in_layer|out_layer))",
    "attention": _BLOCK + r"(?:self|cross)_attention\.(?:to_query|to_key|to_value|out_layer)",
    "qkv": _BLOCK + r"(?:self|cross)_attention\.(?:to_query|to_key|to_value)",
}


@dataclass(frozen=True)
class Matched:
    """What each target matched: pattern -> module names, in the recipe's order."""

    patterns: Mapping[str, tuple[str, ...]]
    ranks: Mapping[str, int] = field(default_factory=dict)
    """Module name -> rank, once the adapter is there."""

    @property
    def modules(self) -> tuple[str, ...]:
        """Every matched module once."""
        return tuple(dict.fromkeys(name for names in self.patterns.values() for name in names))


def describe(matched: Matched) -> str:
    """One line a target: what it matched, block numbers left out, and how many modules; one a rank, if several."""
    lines = [
        f"LoRA on {len(names)} modules by {target}: {', '.join(_endings(names))}"
        for target, names in matched.patterns.items()
    ]
    by_rank: dict[int, list[str]] = {}
    for name, rank in matched.ranks.items():
        by_rank.setdefault(rank, []).append(name)
    if len(by_rank) > 1:
        lines += [f"rank {r} on {len(by_rank[r])} modules: {', '.join(_endings(by_rank[r]))}" for r in sorted(by_rank)]
    return "\n".join(lines)


def match_targets(transformer: nn.Module, targets: Iterable[str], option: str = "train.lora.targets") -> Matched:
    """Find the linears that ``targets`` name.

    A target is a preset (``official``, ``attention``, ``qkv``); or the end of a dotted module name
    (``cross_attention.to_value``), as peft reads a list; or, when it has any other character, a regular expression
    for the whole name (``visual_transformer_blocks\\.(1|2)\\d\\..*attention\\.to_query``), as peft reads a string.

    Modulations, embeddings and the output head are taken only when the target spells their parent out
    (``visual_modulation.out_layer``): a bare ``out_layer`` would hit all of them.

    Raises:
        RecipeError: a target matches nothing, or more than it says.
    """
    linears = linear_names(transformer)
    return Matched({target: _match(target, linears, option) for target in targets})


def linear_names(transformer: nn.Module) -> list[str]:
    """Every linear of the transformer, adapted or not."""
    linears = [n.replace(".base_layer", "") for n, m in transformer.named_modules() if isinstance(m, nn.Linear)]
    return [n for n in linears if ".lora_" not in n]


def _match(target: str, linears: list[str], option: str) -> tuple[str, ...]:
    try:
        pattern = re.compile(
            PRESETS.get(target) or (rf"(?:.*\.)?{re.escape(target)}" if re.fullmatch(r"[\w.]+", target) else target)
        )
    except re.error as error:
        raise RecipeError(f"{option}: {target!r} is no regular expression: {error}", "Mend it") from error
    names = tuple(n for n in linears if pattern.fullmatch(n))
    if not names:
        endings = _endings(linears)
        words = [*PRESETS, *endings, *(e.rpartition(".")[2] for e in endings)]
        near = difflib.get_close_matches(target, dict.fromkeys(words), n=3, cutoff=0.5) or sorted(PRESETS)
        raise RecipeError(f"{option}: {target!r} matches no module", f"Did you mean {', '.join(near)}?")
    spelt = target.replace("\\", "")
    surprising = [n for n in names if not _ADAPTED.fullmatch(n) and _parent(n) not in spelt]
    if surprising:
        parents = ", ".join(dict.fromkeys(_parent(n) for n in surprising))
        meant = ", ".join(_endings(n for n in names if n not in surprising))
        raise RecipeError(
            f"{option}: {target!r} also matches {len(surprising)} modules of {parents}",
            f"Write the parent too: {meant or parents}",
        )
    return names


def _endings(names: Iterable[str]) -> list[str]:
    """Names without the block they are in, each once."""
    return list(dict.fromkeys(n.split(".", 2)[-1] if "_blocks." in n else n for n in names))


def _parent(name: str) -> str:
    """What must be spelt out for a linear outside attention and feed-forward; the head is ``out_layer.out_layer``."""
    parent = name.rpartition(".")[0].rpartition(".")[2]
    return name if parent == "out_layer" else parent


def add_lora(transformer: Kandinsky5Transformer3DModel, config: LoraConfig, seed: int) -> Matched:
    """Wrap the target linears with an adapter through peft, and freeze everything else.

    The start is peft's (A uniform in +-1/sqrt(in), B zero) but drawn from (seed, module name): the same whatever
    else was drawn before, whatever other modules are targeted, on any device. Weights are float32.

    Raises:
        RecipeError: a target matches nothing, or more than it says.
        RunError: ``init_lora`` cannot be read, or does not fit.
    """
    matched = match_targets(transformer, config.targets)
    ranks = module_ranks(transformer, config, matched)
    peft_config = _peft_config(config, matched, ranks)
    if config.algo in ("dora", "lokr"):
        with torch.random.fork_rng(devices=[]):  # peft draws a start of its own
            transformer.add_adapter(peft_config, adapter_name=ADAPTER)
    else:
        _add_unset(transformer, peft_config)
    for name, layer in _layers(transformer):
        for part, parameter in _parts(layer):
            tag = name if part == "lora_A" else f"{name}.{part}"
            digest = hashlib.sha256(f"{seed}:{tag}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
            if part == "lora_magnitude_vector":
                parameter.data = parameter.data.float()  # the norms of the weights, as peft has found them
            elif part in _ZEROS:
                parameter.data = torch.zeros_like(parameter, dtype=torch.float32)
            else:
                start = nn.init.kaiming_uniform_(torch.empty(parameter.shape), a=math.sqrt(5), generator=generator)
                parameter.data = start.to(parameter.device)
    if config.init_lora is not None:
        start_from(transformer, Path(config.init_lora))
    return replace(matched, ranks=ranks)


def _add_unset(transformer: Kandinsky5Transformer3DModel, config: PeftLoraConfig) -> None:
    """A plain adapter where its weights are, its values still to come.

    peft would draw A twice and B once, 190 million numbers at rank 32: 1.7 s. On the meta device it draws none.
    """
    with init_empty_weights():
        transformer.add_adapter(config, adapter_name=ADAPTER)
    for _, layer in _layers(transformer):
        for part in (layer.lora_A, layer.lora_B):
            part[ADAPTER].to_empty(device=layer.get_base_layer().weight.device)


_ZEROS = ("lora_B", "lokr_w1", "lokr_w1_a")  # what makes the start change nothing


def module_ranks(transformer: nn.Module, config: LoraConfig, matched: Matched) -> dict[str, int]:
    """The rank of each module that is adapted.

    Raises:
        RecipeError: an entry of ``train.lora.ranks`` matches none of them.
    """
    ranks = dict.fromkeys(matched.modules, config.rank)
    for entry in config.ranks:
        names = match_targets(transformer, [entry.target], "train.lora.ranks").modules
        hit = [n for n in names if n in matched.modules]
        if not hit:
            raise RecipeError(
                f"train.lora.ranks: {entry.target!r} matches no module that train.lora.targets adapts",
                "Add it to targets, or leave its rank out",
            )
        ranks |= dict.fromkeys(hit, entry.rank)
    return ranks


def _peft_config(config: LoraConfig, matched: Matched, ranks: Mapping[str, int]) -> Any:
    pattern: dict[str, Any] = {f"^{re.escape(n)}$": rank for n, rank in ranks.items() if rank != config.rank}
    if config.algo == "lokr":
        return LoKrConfig(
            r=config.rank,
            alpha=config.rank,
            target_modules=list(matched.modules),
            decompose_factor=config.decompose_factor,
        )
    return PeftLoraConfig(
        r=config.rank,
        lora_alpha=config.rank if config.alpha is None else config.alpha,
        rank_pattern=pattern,
        alpha_pattern=pattern if config.alpha is None else {},
        lora_dropout=config.dropout,
        init_lora_weights=config.algo == "dora",  # the others' start is drawn by add_lora alone
        target_modules=list(matched.modules),
        use_rslora=config.algo == "rslora",
        use_dora=config.algo == "dora",
    )


def start_from(transformer: nn.Module, path: Path) -> None:
    """Give the adapter that is there the values of a LoRA file of any make: it then changes what the file changed.

    Where the file's rank is smaller, the ranks beyond it stay at their start, which changes nothing. Modules that the
    file does not adapt stay at their start.

    Raises:
        RunError: the file adapts a module that the adapter does not, has a higher rank, or belongs to another model.
    """
    pairs = read_pairs(path, linear_names(transformer))
    layers = dict(_layers(transformer))
    for name, (down, up) in pairs.items():
        if name not in layers:
            raise RunError(
                f"{path} adapts {name}, which train.lora.targets does not",
                "Use the targets that the LoRA was trained with",
            )
        ours = [getattr(layers[name], part)[ADAPTER].weight for part in ("lora_A", "lora_B")]
        rank = down.shape[0]
        if (down.shape[1], up.shape[0]) != (ours[0].shape[1], ours[1].shape[0]):
            raise RunError(f"{path} has another width at {name}", "Use a LoRA of this base model")
        if rank > ours[0].shape[0]:
            raise RunError(
                f"{path} has rank {rank} at {name}, the adapter {ours[0].shape[0]}",
                f"Use --set train.lora.rank={rank}",
            )
        with torch.no_grad():
            ours[0][:rank] = down
            ours[1][:, :rank] = up / layers[name].scaling[ADAPTER]


def lora_parameters(transformer: nn.Module) -> list[nn.Parameter]:
    """What is trained, in module order: A and B of every adapted module, or the parts of its kind of adapter."""
    return [parameter for _, layer in _layers(transformer) for _, parameter in _parts(layer)]


def lora_state_dict(transformer: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The adapter as it is saved: ``transformer.<module>.lora_{A,B}.weight``, alpha / rank folded into B, on the CPU.

    diffusers and ComfyUI then take alpha = rank, and agree; a separate ``.alpha`` makes diffusers raise. DoRA adds
    ``lora_magnitude_vector``; LoKr has ``lokr_w1``, ``lokr_w2`` or their halves ``_a`` and ``_b``, its scale being 1.
    """
    state = {}
    for name, layer in _layers(transformer):
        for part, parameter in _parts(layer):
            tensor = parameter.detach()
            if part == "lora_B":
                tensor = tensor.float() * layer.scaling[ADAPTER]
            ending = ".weight" if part in ("lora_A", "lora_B") else ""
            state[f"{PREFIX}{name}.{part}{ending}"] = tensor.to("cpu", dtype)
    return {key: tensor.contiguous() for key, tensor in state.items()}


def save_lora(
    path: Path,
    transformer: nn.Module,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write the adapter, whole or not at all.

    float32 by default: the file is all that is left of the run, and further training, merging and the comparison with
    diffusers start from it. 16 bits halve it (438 to 219 MB at rank 32) and can be had later; the other way cannot.
    There is no ``lora_adapter_metadata``: diffusers reads rank, and alpha = rank, off the tensors.

    Args:
        metadata: strings for the file's header; what is not a string goes in as JSON by the caller.
    """
    header = {"format": "pt", **(metadata or {})}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda temporary: save_file(lora_state_dict(transformer, dtype), temporary, metadata=header))


def load_lora(transformer: Kandinsky5Transformer3DModel, path: Path) -> tuple[str, ...]:
    """Load what ``save_lora`` wrote: into the adapter that is there, or else into a new one with alpha = rank.

    Returns:
        the names of the adapted modules.

    Raises:
        RunError: the file is not such a LoRA, or does not fit the transformer or its adapter.
    """
    try:
        with safe_open(path, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in list(file.keys())}
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} cannot be read: {error}", "Give the .safetensors file of a LoRA") from error
    if any(".lokr_" in key or "lora_magnitude_vector" in key for key in state):
        return _load_by_diffusers(transformer, path, state)
    names = _names(path, state)
    ranks = {name: state[f"{PREFIX}{name}.lora_A.weight"].shape[0] for name in names}
    if not _layers(transformer):
        _add_empty(transformer, path, ranks)
    layers = dict(_layers(transformer))
    if set(layers) != set(names):
        odd = sorted(set(layers) ^ set(names))
        raise RunError(
            f"{path} adapts {len(names)} modules, the adapter here {len(layers)}; they differ in {odd[0]}",
            "Use the targets that the LoRA was trained with",
        )
    for name, layer in layers.items():
        scaling = layer.scaling[ADAPTER]
        for part, factor in (("lora_A", 1.0), ("lora_B", scaling)):
            weight = getattr(layer, part)[ADAPTER].weight
            tensor = state[f"{PREFIX}{name}.{part}.weight"]
            if weight.shape != tensor.shape:
                raise RunError(
                    f"{path} has {name}.{part} as {list(tensor.shape)}, expected {list(weight.shape)}",
                    "Use the base model and the rank that the LoRA was trained with",
                )
            weight.data = (tensor.float() / factor).to(weight.device)
    return tuple(layers)


def _names(path: Path, state: Mapping[str, Tensor]) -> list[str]:
    pattern = re.compile(re.escape(PREFIX) + r"(.+)\.lora_[AB]\.weight")
    matches = [pattern.fullmatch(key) for key in state]
    for key, match in zip(state, matches, strict=True):
        if match is None:
            raise RunError(
                f"{path} has the key {key}, not {PREFIX}<module>.lora_A.weight or lora_B.weight",
                "Give a LoRA in the diffusers format for Kandinsky 5",
            )
    names = list(dict.fromkeys(m.group(1) for m in matches if m))
    odd = [n for n in names if any(f"{PREFIX}{n}.lora_{p}.weight" not in state for p in "AB")]
    if odd or not names:
        found = f"half of the pair for {odd[0]}" if odd else "no tensors"
        raise RunError(f"{path} has {found}", "Give a whole LoRA file")
    return names


def _add_empty(transformer: Kandinsky5Transformer3DModel, path: Path, ranks: Mapping[str, int]) -> None:
    """A float32 adapter of these ranks, its values still to come."""
    linears = {n for n, m in transformer.named_modules() if isinstance(m, nn.Linear)}
    if absent := sorted(set(ranks) - linears):
        raise RunError(f"{path} adapts {absent[0]}, which this model does not have", "Use it with its own base model")
    rank = max(ranks.values())
    others: dict[str, Any] = {f"^{re.escape(n)}$": r for n, r in ranks.items() if r != rank}
    _add_unset(
        transformer,
        PeftLoraConfig(
            r=rank,
            lora_alpha=rank,
            rank_pattern=others,
            alpha_pattern=others,
            init_lora_weights=False,
            target_modules=list(ranks),
        ),
    )


def _load_by_diffusers(
    transformer: Kandinsky5Transformer3DModel, path: Path, state: dict[str, Tensor]
) -> tuple[str, ...]:
    """DoRA and LoKr, into a transformer without an adapter, as a user of diffusers loads them."""
    if _layers(transformer):
        raise RunError(
            f"{path} is no plain LoRA and cannot replace the adapter that is there", "Load it on a bare base"
        )
    transformer.load_lora_adapter(dict(state), prefix=PREFIX.rstrip("."), adapter_name=ADAPTER)
    for _, layer in _layers(transformer):
        for _, parameter in _parts(layer):
            parameter.data = parameter.data.float()
    return tuple(name for name, _ in _layers(transformer))


def _layers(transformer: nn.Module) -> list[tuple[str, Any]]:
    return [
        (n, m) for n, m in transformer.named_modules() if isinstance(m, LoraLayer | LoKrLayer) and list(_parts(m))
    ]  # fmt: skip


def _parts(layer: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """The trained tensors of one adapted module by their peft name."""
    for part in layer.adapter_layer_names:
        holder = getattr(layer, part, None)
        if holder is not None and ADAPTER in holder and part in _PARTS:
            found = holder[ADAPTER]
            yield part, found if isinstance(found, nn.Parameter) else found.weight


_PARTS = ("lora_A", "lora_B", "lora_magnitude_vector", "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a",
          "lokr_w2_b")  # fmt: skip
