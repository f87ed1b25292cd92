"""What do other trainers call our options, and which of their options need nothing here?

One table of SimpleTuner's, kohya's and diffusers' words. A recipe that has one of them is told the name here, or why
there is none; where its value asks for what happens here anyway, nothing is said.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ANYTHING: Any = object()
"""In ``harmless``: whatever the value."""


@dataclass(frozen=True)
class Word:
    """What a word of another trainer means here."""

    option: str | None = None
    """The full name of our option. None: there is none."""
    harmless: tuple[Any, ...] = ()
    """Values that ask for what happens here anyway."""
    why: str = ""
    """A phrase after the word, about every other value. Empty: that it is called ``option`` here."""
    tables: tuple[str, ...] | None = None
    """The tables in which it means this; empty is the recipe itself. None: in all."""
    because: str = ""
    """A sentence on why a harmless value needs nothing. Empty: it asks for what happens here anyway."""

    def asks_nothing(self, value: Any) -> bool:
        """Whether a value changes nothing here."""
        return ANYTHING in self.harmless or any(_same(value, harmless) for harmless in self.harmless)


def _same(value: Any, other: Any) -> bool:
    if isinstance(value, str) and isinstance(other, str):
        return value.lower() == other.lower()
    if isinstance(other, bool) and isinstance(value, str):  # env files have no other values than text
        return value.lower() == str(other).lower()
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


def _not_needed(because: str, *names: str) -> dict[str, Word]:
    return dict.fromkeys(names, Word(harmless=(ANYTHING,), because=because))


def _called(option: str, *names: str) -> dict[str, Word]:
    return dict.fromkeys(names, Word(option))


_DATA = ("", "cache", "train", "train.data")
_FOLDER_OF_IMAGES = "is an argument here: k5cache encode FOLDER"
_FOLDER_OF_CACHE = "is an option of the command here: k5cache encode FOLDER -o CACHE"
_FROM_A_SAVED_STATE = "is a command here: k5train resume RUN"

WORDS: Mapping[str, Word] = {
    # The model
    "model_type": Word(None, ("lora",), 'must be "lora": only adapters are trained here'),
    "model_family": Word(None, ("kandinsky5-image",), "does not exist: Kandinsky 5 Image is trained here, no other"),
    **_called("model.flavour", "model_flavour"),
    **_called("model.path", "pretrained_model_name_or_path", "pretrained_transformer_model_name_or_path"),
    # Precision and memory
    "text_encoder_1_precision": Word("cache.text_encoder_1_precision", ("no_change",)),
    "text_encoder_2_precision": Word("cache.text_encoder_2_precision", ("no_change",)),
    "base_model_default_dtype": Word("train.mixed_precision", ("bf16",)),
    "gradient_precision": Word(None, ("fp32", "unmodified"), "does not exist: gradients are added up in float32"),
    "group_offload_type": Word(
        None,
        ("block_level",),
        "does not exist: one block is the smallest group. Use group_offload_blocks_per_group for larger ones",
    ),
    "enable_model_cpu_offload": Word(
        None,
        (False,),
        "does not exist: stage 2 never loads two models at once. enable_group_offload moves weights block by block",
    ),
    **_called("train.memory.vram", "blocks_to_swap"),
    **_not_needed("stage 1 loads one encoder at a time, and training loads none", "offload_during_startup"),
    **_not_needed("the plan says what is computed again", "gradient_checkpointing", "gradient_checkpointing_interval"),
    **_not_needed("the base is quantised once, tensor by tensor", "quantize_via"),
    **_not_needed(
        "the kernels are chosen by the card", "fused_qkv_projections", "allow_tf32", "attention_mechanism", "sdpa",
        "xformers",
    ),
    # The adapter
    "lora_type": Word("train.lora.algo", ("standard",)),
    "network_module": Word("train.lora.algo", ("networks.lora",)),
    "lycoris_config": Word(None, (), 'is train.lora.algo = "lokr" and train.lora.decompose_factor here'),
    **_called("train.lora.rank", "network_dim", "lora_dim", "linear"),
    **_called("train.lora.alpha", "network_alpha", "linear_alpha"),
    **_called("train.lora.dropout", "network_dropout"),
    **_called("train.lora.init_lora", "network_weights"),
    **_called("train.lora.targets", "lora_target", "lora_layers", "target_modules", "kandinsky5_lora_target"),
    "init_lora_weights": Word(
        None,
        ("default",),
        "does not exist: PiSSA, OLoRA, CorDA and EVA move part of the base's weights into the adapter, and the base"
        " here is frozen, int8 and shared by every run. Leave it out; to start from a LoRA use init_lora",
    ),
    # The optimizer
    **_called("train.optim.lr", "learning_rate", "unet_lr"),
    **_called("train.optim.warmup_steps", "lr_warmup_steps"),
    **_called("train.optim.optimizer", "optimizer_type"),
    **_called("train.optim.weight_decay", "adam_weight_decay"),
    **_called("train.optim.eps", "adam_epsilon"),
    **_called("train.optim.betas", "adam_beta1", "adam_beta2", "optimizer_beta1", "optimizer_beta2"),
    "use_ema": Word("train.optim.ema_decay", (False,)),
    # The objective
    **_called("train.flow_schedule_shift", "discrete_flow_shift", "timestep_shift"),
    **_called("train.objective.sigma_sampling", "timestep_sampling", "weighting_scheme", "flow_schedule_type"),
    **_called("train.objective.sigmoid_scale", "flow_sigmoid_scale"),
    **_called("train.objective.snr_gamma", "min_snr_gamma"),
    **_called("train.objective.preservation_weight", "diff_output_preservation_multiplier"),
    **_called("cache.class_word", "diff_output_preservation_class"),
    "diff_output_preservation": Word("train.objective.preservation_weight", (False,)),
    "min_timestep": Word("train.objective.sigma_min", (0,)),
    "max_timestep": Word("train.objective.sigma_max", (1000,)),
    "tread_config": Word("train.tread.routes"),
    "noise_offset": Word(
        None,
        (0.0,),
        "does not exist: it corrects schedules that never reach pure noise, and flow matching reaches it at sigma 1."
        " For darker or brighter pictures train more on noisy inputs: flow_schedule_shift = 3",
    ),
    # The run
    "output_dir": Word(None, (), "is an option of the command here: k5train run -o RUN"),
    **_called("train.name", "output_name", "tracker_run_name"),
    **_called("train.batch_size", "train_batch_size"),
    "max_train_steps": Word("train.steps", (0,)),
    "num_train_epochs": Word("train.epochs", (0,)),
    **_called("train.epochs", "max_train_epochs"),
    **_called("train.checkpoint_every", "checkpointing_steps", "checkpoint_step_interval", "save_every_n_steps"),
    **_called("train.checkpoints_total_limit", "save_last_n_steps"),
    "resume_from_checkpoint": Word(None, ("latest", ""), _FROM_A_SAVED_STATE),
    "resume": Word(None, (), _FROM_A_SAVED_STATE),
    "report_to": Word("train.trackers.use", ("none",)),
    **_called("train.trackers.project", "tracker_project_name"),
    "push_to_hub": Word(None, (False,), "does not exist: upload the LoRA with `hf upload`"),
    # Pictures
    **_called("train.validation.prompts", "validation_prompt", "sample_prompts"),
    **_called("train.validation.prompt_library", "user_prompt_library"),
    **_called("train.validation.every", "validation_steps", "validation_step_interval", "sample_every_n_steps"),
    **_called("train.validation.guidance_scale", "validation_guidance"),
    "validation_resolution": Word(None, (), "is train.validation.width and train.validation.height here"),
    **_called("train.validation.split", "eval_split", "validation_split"),
    # The data
    **_not_needed(
        "stage 1 encodes everything into the cache", "write_batch_size", "vae_batch_size", "vae_cache_ondemand",
        "compress_disk_cache", "cache_latents", "cache_latents_to_disk", "cache_text_encoder_outputs",
    ),
    **_not_needed(
        "k5cache encode names what has changed and encodes only that", "preserve_data_backend_cache",
        "override_dataset_config",
    ),
    **_not_needed(
        "images always go into the sizes that the model was trained at", "enable_bucket", "aspect_bucket_rounding",
        "aspect_bucket_alignment",
    ),
    **_not_needed("rows are read ahead without being asked", "max_workers", "dataloader_prefetch"),
    **_not_needed("the base model's pictures are the first row of a grid: train.validation.before",
                  "disable_benchmark"),
    "id": Word(None, (ANYTHING,), tables=_DATA),
    "default": Word(None, (ANYTHING,), tables=_DATA),
    "type": Word(None, ("local",), "does not exist: k5cache encode takes folders, tables, tars and datasets of the hub",
                 tables=_DATA),
    "dataset_type": Word(None, ("image", "text_embeds"), "does not exist: images are encoded, with their captions"),
    "disabled": Word(None, (False,), "does not exist: leave the data out", tables=_DATA),
    **dict.fromkeys(("instance_data_dir", "train_data_dir", "image_dir"), Word(None, (), _FOLDER_OF_IMAGES)),
    "data_backend_config": Word(None, (), _FOLDER_OF_IMAGES),
    **dict.fromkeys(("cache_dir", "cache_dir_vae", "cache_dir_text"), Word(None, (), _FOLDER_OF_CACHE)),
    **_called("train.data", "reg_data_dir", "regularisation_data"),
    **_called("train.repeats", "num_repeats"),
    "crop_style": Word("cache.crop", ("center", "centre")),
    "crop_aspect": Word(
        None,
        ("closest",),
        'is cache.buckets here: "square", or "native" for the sizes that the model was trained at',
    ),
    "resolution_type": Word(None, ("pixel_area",), "does not exist: cache.resolution is the side of the square bucket"),
    **_called("cache.flip", "flip_aug"),
    **_called("cache.crop", "random_crop", "center_crop"),
    **_called("cache.max_sequence_length", "tokenizer_max_length", "max_token_length"),
}  # fmt: skip


def word(name: str, where: str) -> Word | None:
    """What a name means in a table; None if no trainer is known to have it there.

    Args:
        where: the table; empty for the recipe itself.
    """
    meaning = WORDS.get(name)
    table = where.partition("[")[0]
    return meaning if meaning and (meaning.tables is None or table in meaning.tables) else None


VALUES: Mapping[str, Mapping[Any, Any]] = {
    "cache.crop": {True: "center", False: "none"},
    "cache.text_encoder_1_precision": {"no_change": "bf16"},
    "cache.text_encoder_2_precision": {"no_change": "bf16"},
    "train.optim.lr_scheduler": {"constant_with_warmup": "constant"},
    "train.mixed_precision": {"no": "fp32"},
}
"""Our option -> a value that another trainer has for it -> the same value here."""


def our_value(option: str, value: Any) -> Any:
    """A value of one of our options as it is called here."""
    values = VALUES.get(option, {})
    return values[value] if isinstance(value, str | bool) and value in values else value
