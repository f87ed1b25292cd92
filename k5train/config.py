"""The options of stage 2, each written once. The docstring under an option is its help."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Literal

from k5cache.console import parse_bytes
from k5train.objective import DataConfig, ObjectiveConfig, RolloutConfig, TreadConfig


@dataclass(frozen=True)
class RankConfig:
    """``[[train.lora.ranks]]``: another rank for some modules."""

    target: str
    """A preset or pattern, as in ``targets``; where several match a module, the last one counts."""
    rank: int
    """Rank of the modules that it matches."""

    def check(self) -> list[str]:
        """What is out of range."""
        return [] if self.rank >= 1 else [f"rank must be at least 1, found {self.rank}"]


@dataclass(frozen=True)
class LoraConfig:
    """``[train.lora]``: the adapter."""

    algo: Literal["lora", "rslora", "dora", "lokr"] = "lora"
    """``rslora``: scaled by alpha / sqrt(rank), for high ranks. ``dora``: a trained magnitude for each output besides;
    every step computes the norm of every weight. ``lokr``: Kronecker products, small files; diffusers loads them
    by ``pipe.transformer.load_lora_adapter(FILE, prefix="transformer")``, not by ``pipe.load_lora_weights``. ``dora``
    and ``lokr`` run as peft's modules, not compiled."""
    rank: int = 32
    """Rank of each pair of matrices."""
    ranks: tuple[RankConfig, ...] = ()
    """``[[train.lora.ranks]]`` entries, each ``target`` and ``rank``: another rank for the modules that match."""
    alpha: float | None = None
    """Strength: the adapter is scaled by alpha / rank. None: alpha = rank, as the official trainer does."""
    dropout: float = 0.0
    """Share of the adapter's inputs dropped in training."""
    targets: tuple[str, ...] = ("official",)
    """Presets (``official``, ``attention``, ``qkv``) or patterns of module names; a pattern must match something."""
    init_lora: str | None = None
    """Start from this .safetensors file: one of ours, diffusers', peft's, ComfyUI's or kohya's keys. Its rank may be
    smaller than ``rank``."""
    init_lora_weights: str = "default"
    """Stays ``default``, peft's start. PiSSA and its like are refused, with the reason."""
    decompose_factor: int = -1
    """Of ``lokr``: how large the first factor may be. -1: as near to square as it goes, the smallest file."""

    def check(self) -> list[str]:
        """What is out of range."""
        problems = []
        if self.rank < 1:
            problems.append(f"rank must be at least 1, found {self.rank}")
        if self.alpha is not None and not 0 < self.alpha < inf:
            problems.append(f"alpha must be above 0, found {self.alpha}")
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout must be in [0, 1), found {self.dropout}")
        if self.decompose_factor != -1 and self.decompose_factor < 1:
            problems.append(f"decompose_factor must be -1 or at least 1, found {self.decompose_factor}")
        if not self.targets:
            problems.append("targets must name at least one preset or pattern")
        if self.init_lora_weights != "default":
            problems.append(
                "init_lora_weights must be 'default': PiSSA, OLoRA, CorDA and EVA move part of the base's weights into"
                " the adapter, and the base here is frozen, int8 and shared by every run; a LoRA made so would need"
                f" that same changed base to be loaded, found {self.init_lora_weights!r}"
            )
        if self.algo == "lokr" and (self.ranks or self.dropout or self.init_lora or self.alpha is not None):
            problems.append("algo 'lokr' takes rank and targets only: ranks, alpha, dropout and init_lora are for LoRA")
        if self.algo == "dora" and self.init_lora:
            problems.append("init_lora must be a plain LoRA's start: algo 'dora' has magnitudes besides")
        return problems


OptimizerName = Literal["adamw", "adamw8bit", "adafactor", "prodigy", "lion", "schedulefree", "muon"]
ScheduleName = Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "rex"]


@dataclass(frozen=True)
class OptimConfig:
    """``[train.optim]``: the optimizer and its learning rate. Defaults are the official trainer's."""

    optimizer: OptimizerName = "adamw"
    """``adafactor``, ``muon`` and ``adamw`` are torch's. ``adamw8bit``, ``prodigy``, ``lion`` and ``schedulefree``
    (AdamW) need the extra of their name: pip install "kandinsky5-lora[lion]". Prodigy finds its own rate: lr = 1.0."""
    lr: float = 1e-4
    """Learning rate after warm-up."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Averaging of gradient and of its square. ``adafactor`` has none, ``muon`` uses the first."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    eps: float = 1e-8
    """What keeps AdamW's division finite; for AdamW's kin (8-bit, Prodigy, schedule-free) too."""
    lr_scheduler: ScheduleName = "constant"
    """How the learning rate goes on after warm-up, until the last step."""
    lr_num_cycles: int = 1
    """Of ``cosine_with_restarts``: how many times it falls."""
    lr_power: float = 1.0
    """Of ``polynomial``: 1 is a straight line, 2 a parabola."""
    lr_end: float = 0.0
    """Where ``linear``, ``polynomial``, ``cosine``, ``cosine_with_restarts`` and ``rex`` end, as a share of ``lr``."""
    warmup_steps: int = 100
    """Optimizer steps over which the learning rate rises from 0 to ``lr``."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm. 0: never."""
    ema_decay: float = 0.0
    """Also keep an average of the adapter, each step this share old: 0.99 to 0.9999. 0: none. It is saved beside the
    LoRA, as ``-ema``, and drawn as a row of its own."""

    def check(self) -> list[str]:
        """What is out of range."""
        problems = []
        positive = (("lr", self.lr), ("eps", self.eps), ("lr_power", self.lr_power))
        problems += [f"{name} must be above 0, found {value}" for name, value in positive if not 0 < value < inf]
        if not all(0 <= beta < 1 for beta in self.betas):
            problems.append(f"betas must be at least 0 and below 1, found {list(self.betas)}")
        for name, value in (("weight_decay", self.weight_decay), ("max_grad_norm", self.max_grad_norm)):
            if not 0 <= value < inf:
                problems.append(f"{name} must be 0 or more, found {value}")
        if self.warmup_steps < 0:
            problems.append(f"warmup_steps must be 0 or more, found {self.warmup_steps}")
        if self.lr_num_cycles < 1:
            problems.append(f"lr_num_cycles must be at least 1, found {self.lr_num_cycles}")
        if not 0 <= self.lr_end <= 1:
            problems.append(f"lr_end must be 0 to 1, found {self.lr_end}")
        if not 0 <= self.ema_decay < 1:
            problems.append(f"ema_decay must be at least 0 and below 1, found {self.ema_decay}")
        if self.optimizer == "schedulefree" and (self.lr_scheduler != "constant" or self.ema_decay):
            problems.append("optimizer 'schedulefree' averages by itself: lr_scheduler must be constant, ema_decay 0")
        return problems


@dataclass(frozen=True)
class MemoryConfig:
    """``[train.memory]``: what is traded for memory."""

    vram: str | None = None
    """VRAM to plan for and never exceed, as a card's size: "12GB". None: what is free on the GPU."""
    activations: Literal["auto", "nothing", "attention", "selective", "matmuls", "all"] = "auto"
    """What blocks keep from forward to backward; the rest is computed again. auto: as much as fits (`k5train plan`)."""
    execution: Literal["auto", "compiled", "eager", "diffusers"] = "auto"
    """How blocks run: compiled, one op at a time, or as diffusers' own modules. auto: compiled, diffusers on a CPU."""
    enable_group_offload: bool = False
    """Hold the blocks' weights in host memory and copy them ahead of use. Without it: only as many as must be."""
    group_offload_type: Literal["block_level", "leaf_level"] = "block_level"
    """What is copied at a time. leaf_level: one block, the smallest group here."""
    group_offload_blocks_per_group: int = 1
    """Blocks of a group; two groups have room on the GPU, with group_offload_use_stream."""
    group_offload_use_stream: bool = True
    """Copy on a stream of its own while blocks are computed."""
    enable_model_cpu_offload: bool = False
    """Known from elsewhere, refused here: stage 2 never holds two models at once, so there is none to move away."""

    def check(self) -> list[str]:
        """What is out of range or cannot be had together."""
        problems = []
        if self.vram is not None:
            try:
                parse_bytes(self.vram)
            except ValueError:
                problems.append(f'vram must be an amount such as "12GB", found {self.vram!r}')
        if self.enable_model_cpu_offload:
            conflict = " and enable_group_offload exclude each other" if self.enable_group_offload else " is not needed"
            problems.append(f"enable_model_cpu_offload{conflict}; enable_group_offload moves weights block by block")
        if self.group_offload_blocks_per_group < 1:
            problems.append(
                f"group_offload_blocks_per_group must be at least 1, found {self.group_offload_blocks_per_group}"
            )
        if self.group_offload_type == "leaf_level" and self.group_offload_blocks_per_group > 1:
            problems.append("group_offload_blocks_per_group belongs to group_offload_type = block_level")
        if self.execution == "diffusers" and self.enable_group_offload:
            problems.append("enable_group_offload needs execution = compiled or eager")
        if self.execution == "diffusers" and self.activations not in ("auto", "nothing", "all"):
            problems.append(f"activations = {self.activations} needs execution = compiled or eager")
        return problems


@dataclass(frozen=True)
class ValidationConfig:
    """``[train.validation]``: pictures along the way, from prompts that the cache holds."""

    prompts: tuple[str, ...] = ()
    """What to draw. `k5cache encode` puts them in the cache, so no text encoder is loaded here."""
    negative_prompt: str = ""
    """What guidance moves away from."""
    every: int = 250
    """Optimizer steps between sample grids. 0: only before and after."""
    guidance_scale: float = 5.0
    """Classifier-free guidance. 1.0: none, and half the time."""
    num_inference_steps: int = 50
    """Euler steps a picture."""
    width: int | None = None
    """Pixels. None: the cache's resolution."""
    height: int | None = None
    """Pixels. None: the cache's resolution."""
    seed: int = 42
    """Noise of the samples: the same for every checkpoint, so that rows can be compared."""
    before: bool = True
    """Also draw the base model's pictures before the first step."""
    prompt_library: str | None = None
    """A JSON file of further prompts, a list or an object of names to prompts. The run's recipe then holds them all."""
    split: float = 0.0
    """Share of the cache's rows that are held out of training, to measure the loss on. 0: none."""
    held_out_every: int = 100
    """Optimizer steps between measurements of the held-out loss. 0: only before and after."""
    held_out_sigmas: int = 4
    """Noise levels at which each held-out row is measured, one in each equal part of 0 to 1."""
    patience: int = 0
    """End once the held-out loss has not fallen for this many measurements. 0: never."""

    def check(self) -> list[str]:
        """What is out of range."""
        problems = [
            f"{name} must be a multiple of 16 and at least 16, found {side}"
            for name, side in (("width", self.width), ("height", self.height))
            if side is not None and (side < 16 or side % 16)
        ]
        if self.num_inference_steps < 1:
            problems.append(f"num_inference_steps must be at least 1, found {self.num_inference_steps}")
        if not 0 <= self.split <= 0.5:
            problems.append(f"split must be 0 to 0.5, found {self.split}")
        if self.held_out_sigmas < 1:
            problems.append(f"held_out_sigmas must be at least 1, found {self.held_out_sigmas}")
        if self.patience and not self.split:
            problems.append("patience needs rows to measure on: set split, for example split = 0.1")
        if self.patience and not self.held_out_every:
            problems.append("patience counts measurements along the way: held_out_every must be above 0")
        if not 0 <= self.guidance_scale < inf:
            problems.append(f"guidance_scale must be 0 or more, found {self.guidance_scale}")
        problems += [f"{name} must be 0 or more, found {value}" for name, value in
                     (("every", self.every), ("held_out_every", self.held_out_every), ("patience", self.patience))
                     if value < 0]  # fmt: skip
        return problems


@dataclass(frozen=True)
class TrackersConfig:
    """``[train.trackers]``: where a run is also shown. ``metrics.jsonl`` is always written."""

    use: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Each is an extra: pip install "kandinsky5-lora[tensorboard]"."""
    project: str = "kandinsky5-lora"
    """Name under which wandb and trackio group runs."""
    offline: bool = False
    """wandb writes only into the run's folder, for `wandb sync` to send later. TensorBoard and trackio are local."""


@dataclass(frozen=True)
class TrainConfig:
    """``[train]``: stage 2, a cache to a LoRA."""

    name: str | None = None
    """Folder under ``runs/``. None: the cache's name."""
    steps: int = 1000
    """Optimizer updates."""
    epochs: int | None = None
    """Passes over the data, in place of ``steps``."""
    max_hours: float | None = None
    """End after the step at which this much time has passed, as if it were the last."""
    batch_size: int = 1
    """Rows of a micro-batch. They share a bucket; ``unequal_captions`` says what becomes of their captions."""
    unequal_captions: Literal["split", "mask"] = "split"
    """Captions of different lengths in a batch. ``split``: one forward pass a length. ``mask``: one for all, padded."""
    gradient_accumulation_steps: int = 1
    """Forward passes of one optimizer update."""
    repeats: int = 1
    """How often each image counts in one epoch."""
    caption_dropout_probability: float = 0.1
    """Share of rows trained with the empty prompt, so that guidance keeps working."""
    caption_choice: Literal["random", "first"] = "random"
    """Which of an image's captions a step trains on."""
    base_model_precision: Literal["int8-quanto", "int8-dynamic", "no_change"] = "int8-quanto"
    """The frozen transformer: int8 weights by quanto's ``qint8`` scheme, the same on int8 tensor cores, or bf16."""
    mixed_precision: Literal["bf16", "fp32"] = "bf16"
    """Number format of activations and of unquantised weights. fp32 is for CPUs and tests."""
    flow_schedule_shift: float = 1.0
    """``sigma -> s*sigma / (1 + (s-1)*sigma)``; above 1 trains more on noisy inputs. The official trainer uses 3."""
    seed: int = 42
    """Order, noise, sigma and dropout are functions of this and the step."""
    checkpoint_every: int = 250
    """Optimizer steps between saved LoRAs, each with all that `k5train resume` needs. 0: only the last."""
    checkpoints_total_limit: int | None = None
    """How many of these LoRAs are kept, the newest; the best is kept besides. None: all. The state to resume from is
    always one."""
    loss_limit: float = 20.0
    """A loss above this ends the run before its update: predicting nothing at all gives about 2. 0: no limit."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: the GPU where there is one."""
    deterministic: bool = False
    """On a GPU: only kernels that give the same bits every time, so that a resumed run ends with the bits of a run
    without a break; it may be slower. A CPU always does."""
    data: tuple[DataConfig, ...] = ()
    """``[[train.data]]`` entries in place of CACHE arguments, each ``cache``, ``weight`` (share of the rows),
    ``repeats`` and ``is_regularisation_data`` (weighed by ``objective.prior_loss_weight``)."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    tread: TreadConfig = field(default_factory=TreadConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    trackers: TrackersConfig = field(default_factory=TrackersConfig)

    def check(self) -> list[str]:
        """What is out of range."""
        problems = [
            f"{name} must be at least 1, found {value}"
            for name, value in (
                ("steps", self.steps),
                ("batch_size", self.batch_size),
                ("gradient_accumulation_steps", self.gradient_accumulation_steps),
                ("repeats", self.repeats),
            )
            if value < 1
        ]
        if not 0 <= self.caption_dropout_probability <= 1:
            problems.append(f"caption_dropout_probability must be 0 to 1, found {self.caption_dropout_probability}")
        if not 0 < self.flow_schedule_shift < inf:
            problems.append(f"flow_schedule_shift must be above 0, found {self.flow_schedule_shift}")
        if self.flow_schedule_shift != 1 and self.objective.flow_schedule_auto_shift:
            problems.append("flow_schedule_shift must be 1 where objective.flow_schedule_auto_shift finds the shift")
        if self.epochs is not None and self.epochs < 1:
            problems.append(f"epochs must be at least 1, found {self.epochs}")
        if self.checkpoint_every < 0:
            problems.append(f"checkpoint_every must be 0 or more, found {self.checkpoint_every}")
        if self.checkpoints_total_limit is not None and self.checkpoints_total_limit < 1:
            problems.append(f"checkpoints_total_limit must be at least 1, found {self.checkpoints_total_limit}")
        if not self.loss_limit >= 0:  # NaN too
            problems.append(f"loss_limit must be 0 or more, found {self.loss_limit}")
        if self.max_hours is not None and not self.max_hours > 0:
            problems.append(f"max_hours must be above 0, found {self.max_hours}")
        if len({entry.weight is None for entry in self.data}) > 1:
            problems.append("data has entries with a weight and entries without: give one to all, or to none")
        if self.lora.algo in ("dora", "lokr") and self.base_model_precision == "int8-dynamic":
            problems.append(
                f"lora.algo is {self.lora.algo}, which runs as peft's modules, and these multiply in 16 bits:"
                " base_model_precision must be int8-quanto or no_change"
            )
        if self.base_model_precision == "no_change" and self.memory.enable_group_offload:
            problems.append("memory.enable_group_offload moves int8 weights: base_model_precision = no_change has none")
        if self.base_model_precision == "int8-dynamic" and self.memory.execution == "diffusers":
            problems.append("base_model_precision = int8-dynamic needs memory.execution = compiled or eager")
        return problems
