"""What do the keys of SimpleTuner's config mean here? Its data backends are read in ``simpletuner_data.py``.

The meanings are those of its public documentation: OPTIONS.md, TREAD.md, LYCORIS.md and the quickstart for Kandinsky 5.
"""

from __future__ import annotations

from typing import Any

from k5cache.shared.errors import RecipeError
from k5train.moving import simpletuner_keys as keys
from k5train.moving.read import arguments
from k5train.moving.rules import Rules, many, needless, special, takes, takes_choice, unsupported, words

_SEPARATE = "stage 1 alone loads encoders, and encodes everything before training"
_SIZES = "images are resized to their bucket before they are cropped"
_SHOWN_ELSEWHERE = "this program prints and stores it by itself"

ENV = {
    "dataloader_config": "data_backend_config", "model_name": "pretrained_model_name_or_path",
    "max_num_steps": "max_train_steps", "num_epochs": "num_train_epochs", "lr_schedule": "lr_scheduler",
    "checkpointing_limit": "checkpoints_total_limit", "hub_model_name": "hub_model_id", "training_seed": "seed",
    "training_num_processes": "num_processes", "training_dynamo_backend": "dynamo_backend",
}  # fmt: skip
"""Names of env files that are called otherwise in config.json."""


OPTIMIZERS = {
    **dict.fromkeys(("adamw", "adamw_bf16", "optimi-adamw", "bnb-adamw", "bnb-adamw-paged"), "adamw"),
    **dict.fromkeys(("adamw8bit", "bnb-adamw8bit", "bnb-adamw8bit-paged", "ao-adamw8bit"), "adamw8bit"),
    **dict.fromkeys(
        ("adamw_schedulefree", "adamw_schedulefree+aggressive", "adamw_schedulefree+no_kahan"), "schedulefree"
    ),
    **dict.fromkeys(
        ("lion", "optimi-lion", "bnb-lion", "bnb-lion8bit", "bnb-lion-paged", "bnb-lion8bit-paged"), "lion"
    ),
    "prodigy": "prodigy", "adafactor": "adafactor", "muon": "muon",
}  # fmt: skip
_PRECISIONS = {"int8-quanto": "int8-quanto", "int8-torchao": "int8-quanto", "no_change": "no_change"}
_TEXT_1 = {"no_change": "bf16", "int8-quanto": "int8", "int8-torchao": "int8", "bf16": "bf16"}
_VAE = {"default": "fp32", "fp32": "fp32", "fp16": "fp16", "bf16": "bf16"}
_SCHEDULES = {"constant_with_warmup": "constant"} | {
    name: name for name in ("constant", "linear", "cosine", "cosine_with_restarts", "polynomial")
}


RULES: Rules = {
    # The model
    **words("model_type", "gradient_checkpointing", "gradient_checkpointing_interval", "quantize_via"),
    "model_family": special(f"must be `{keys.FAMILY}`: no other model is trained here", keys.take_family),
    "model_flavour": special("`model.flavour`", keys.take_flavour),
    "pretrained_model_name_or_path": special("`model.path`, or `model.flavour` for a published one", keys.take_model),
    "revision": takes("model.revision"),
    "variant": needless("the checkpoint has one variant"),
    "base_dir": needless("paths of an env file have it filled in"),
    **many(unsupported("the parts of a checkpoint stay together: model.path"),
            "pretrained_transformer_model_name_or_path", "pretrained_transformer_subfolder",
            "pretrained_vae_model_name_or_path"),
    # The run
    "output_dir": special("`k5train run -o`, if the folder is new or a run", keys.take_output),
    "train_batch_size": takes("train.batch_size"),
    "gradient_accumulation_steps": takes("train.gradient_accumulation_steps"),
    "max_train_steps": keys.above_zero("train.steps", "num_train_epochs says how long it trains"),
    "num_train_epochs": keys.above_zero("train.epochs", "max_train_steps says how long it trains"),
    "ignore_final_epochs": needless("train.steps is the number of steps in any case"),
    "seed": takes("train.seed"),
    **many(takes("train.checkpoint_every"), "checkpointing_steps", "checkpoint_step_interval"),
    "checkpoints_total_limit": takes("train.checkpoints_total_limit"),
    **many(unsupported("LoRAs are saved every train.checkpoint_every steps", 0), "checkpoint_epoch_interval",
            "checkpointing_rolling_steps", "checkpoints_rolling_total_limit"),
    "checkpointing_use_tempdir": needless("files always appear whole or not at all"),
    "resume_from_checkpoint": unsupported(
        "a state of SimpleTuner cannot be gone on from: start from its LoRA with train.lora.init_lora", "latest"),
    "report_to": special("`train.trackers.use`", keys.take_trackers),
    "tracker_project_name": takes("train.trackers.project"),
    "tracker_run_name": special("`train.name`", keys.take_name),
    "caption_dropout_probability": takes("train.caption_dropout_probability"),
    "num_processes": needless("the command says on how many GPUs to train: k5train run --gpus N"),
    **many(needless("this program names what it does by itself"), "i_know_what_i_am_doing", "logging_dir",
            "simpletuner_log_level", "debug_aspect_buckets", "debug_dataset_loader", "print_filenames",
            "print_sampler_statistics", "tracker_image_layout", "venv_path", "accelerate_extra_args"),
    **many(unsupported("upload the LoRA with `hf upload`", False), "push_to_hub", "push_to_hub_background",
            "push_checkpoints_to_hub"),
    **many(needless("upload the LoRA with `hf upload`"), "hub_model_id", "model_card_private",
            "model_card_safe_for_work", "model_card_note"),
    # Precision and memory
    "base_model_precision": takes_choice(
        "train.base_model_precision", _PRECISIONS, "the base is int8 or bf16 here: train.base_model_precision"),
    "base_model_default_dtype": unsupported("what is not quantised is bf16, and the adapter float32", "bf16"),
    "mixed_precision": takes_choice("train.mixed_precision", {"bf16": "bf16", "no": "fp32", "fp32": "fp32"}),
    "gradient_precision": words("gradient_precision")["gradient_precision"],
    "text_encoder_1_precision": takes_choice("cache.text_encoder_1_precision", _TEXT_1),
    "text_encoder_2_precision": takes_choice(
        "cache.text_encoder_2_precision", {"no_change": "bf16", "bf16": "bf16"}, "CLIP is small: bf16 or fp32 here"),
    **many(needless("this model has two text encoders"), "text_encoder_3_precision", "text_encoder_4_precision"),
    "vae_dtype": takes_choice("cache.vae_precision", _VAE),
    "enable_group_offload": takes("train.memory.enable_group_offload"),
    **words("group_offload_type", "offload_during_startup", "enable_model_cpu_offload", "attention_mechanism",
            "fused_qkv_projections"),
    "group_offload_blocks_per_group": takes("train.memory.group_offload_blocks_per_group"),
    "group_offload_use_stream": takes("train.memory.group_offload_use_stream"),
    "group_offload_to_disk_path": unsupported("weights wait in host memory, not on a disk"),
    **many(needless("the plan streams the weights of as many blocks as necessary"), "ramtorch",
            "ramtorch_target_modules", "ramtorch_text_encoder", "ramtorch_vae", "offload_during_save"),
    **many(needless("blocks are compiled on a GPU without being asked: train.memory.execution"), "dynamo_backend",
            "dynamo_mode", "dynamo_fullgraph", "dynamo_dynamic", "dynamo_use_regional_compilation",
            "validation_torch_compile", "validation_torch_compile_mode"),
    **many(needless("the VAE works in strips where an image does not fit"), "vae_enable_tiling", "vae_enable_slicing",
            "vae_enable_patch_conv"),
    **many(needless("memory and kernels follow from the plan"), "disable_tf32", "set_grads_to_none", "fuse_optimizer",
            "fuse_qkv_projections", "accelerator_cache_clear_interval", "optimizer_release_gradients",
            "optimizer_offload_gradients", "optimizer_cpu_offload_method", "torch_num_threads", "quantize_activations"),
    # The adapter
    "lora_rank": takes("train.lora.rank"),
    "lora_alpha": takes("train.lora.alpha"),
    "lora_dropout": takes("train.lora.dropout"),
    "init_lora": takes("train.lora.init_lora"),
    "lora_type": special("a LoRA, or what `lycoris_config` says", keys.take_lora_type),
    "lycoris_config": special(
        '`train.lora.algo = "lokr"` with rank, `decompose_factor` and `targets`', keys.take_lycoris),
    "use_dora": special('`train.lora.algo = "dora"`', keys.take_dora),
    "lora_init_type": unsupported("the base is frozen, int8 and shared by every run, so a LoRA starts at 0", "default"),
    "peft_lora_mode": unsupported("SingLoRA does not exist here", "standard"),
    "lora_format": needless("the file has keys that diffusers and ComfyUI both load"),
    **many(needless("it belongs to another kind of adapter"), "singlora_ramp_up_steps",
            "validation_lycoris_strength"),
    "init_lokr_norm": unsupported("a LoKr starts at 0"),
    "slider_lora_target": unsupported("sliders do not exist here", False),
    # The optimizer
    "learning_rate": takes("train.optim.lr"),
    "optimizer": takes_choice("train.optim.optimizer", OPTIMIZERS),
    **many(special("`train.optim.betas`", keys.take_betas), "optimizer_beta1", "optimizer_beta2", "adam_beta1",
           "adam_beta2"),
    "adam_weight_decay": takes("train.optim.weight_decay"),
    "adam_epsilon": takes("train.optim.eps"),
    "optimizer_config": special("`train.optim.betas`, `eps` and `weight_decay`", keys.take_optimizer_config),
    "lr_scheduler": takes_choice("train.optim.lr_scheduler", _SCHEDULES),
    "lr_warmup_steps": takes("train.optim.warmup_steps"),
    "lr_num_cycles": takes("train.optim.lr_num_cycles"),
    "lr_power": takes("train.optim.lr_power"),
    "lr_end": special("`train.optim.lr_end`, which is a share of the rate", keys.take_lr_end),
    "max_grad_norm": takes("train.optim.max_grad_norm"),
    "grad_clip_method": unsupported("gradients are clipped by their norm", "norm"),
    **many(unsupported("set the rate itself: train.optim.lr", False), "lr_scale", "lr_scale_sqrt"),
    "use_ema": special("`train.optim.ema_decay` above 0", keys.take_ema),
    "ema_decay": takes("train.optim.ema_decay"),
    **many(needless("the average is small and is updated in every step"), "ema_device", "ema_cpu_only",
            "ema_foreach_disable", "ema_update_interval"),
    "ema_validation": needless("the average has pictures of its own"),
    "train_text_encoder": unsupported("text encoders are never trained", False),
    # The objective
    "flow_schedule_shift": takes("train.flow_schedule_shift"),
    "flow_schedule_auto_shift": takes("train.objective.flow_schedule_auto_shift"),
    "flow_sigmoid_scale": takes("train.objective.sigmoid_scale"),
    "flow_use_uniform_schedule": keys.schedule("uniform"),
    "flow_use_beta_schedule": keys.schedule("beta"),
    "flow_beta_schedule_alpha": takes("train.objective.beta_schedule_alpha"),
    "flow_beta_schedule_beta": takes("train.objective.beta_schedule_beta"),
    "disable_segmented_timestep_sampling": special(
        "the opposite of `train.objective.stratified_sigmas`", keys.take_segments),
    "tread_config": special("`train.tread.routes`", keys.take_tread),
    "loss_type": takes_choice("train.objective.loss_type", {"l2": "l2", "huber": "huber"}),
    "huber_c": takes("train.objective.huber_c"),
    "huber_schedule": unsupported("train.objective.huber_c is the same at every sigma", "constant"),
    **many(unsupported('weights by noise are train.objective.weighting = "min_snr" with snr_gamma', 0, False),
            "snr_gamma", "use_soft_min_snr", "snr_weight", "soft_min_snr_sigma_data"),
    "masked_loss_probability": special("`train.objective.masked_loss`, for 0 and 1", keys.take_masked),
    "noise_offset": words("noise_offset")["noise_offset"],
    "scheduled_sampling_max_step_offset": keys.above_zero("train.rollout.max_steps", "it is off"),
    "scheduled_sampling_probability": takes("train.rollout.probability"),
    "scheduled_sampling_ramp_steps": takes("train.rollout.ramp_steps"),
    "scheduled_sampling_strategy": unsupported("each row draws a number of steps from 1 to max_steps", "uniform"),
    "scheduled_sampling_sampler": unsupported("rollouts are Euler steps, as inference makes", "euler"),
    "scheduled_sampling_ramp_shape": unsupported("the probability rises linearly", "linear"),
    **many(unsupported("the probability rises from 0 to train.rollout.probability", 0),
            "scheduled_sampling_prob_start", "scheduled_sampling_start_step"),
    **many(unsupported("it does not exist here", 0, False, "none"), "input_perturbation", "offset_noise",
            "noise_offset_probability", "distillation_method", "distillation_config", "timestep_bias_strategy",
            "controlnet", "control", "refiner_training", "crepa_enabled", "layer_freeze_strategy",
            "flow_custom_timesteps", "diff2flow_enabled", "prodigy_steps"),
    **many(needless("it belongs to models that do not train by flow matching"), "prediction_type",
            "rescale_betas_zero_snr", "training_scheduler_timestep_spacing", "inference_scheduler_timestep_spacing"),
    # Pictures
    "validation_prompt": special("`train.validation.prompts`", keys.take_prompt),
    "user_prompt_library": special("`train.validation.prompt_library`, or `prompts` with `prompt_names`",
                                   lambda draft, entry: None),
    "validation_negative_prompt": takes("train.validation.negative_prompt"),
    "validation_guidance": takes("train.validation.guidance_scale"),
    "validation_resolution": special("`train.validation.width` and `height`", keys.take_size),
    **many(takes("train.validation.every"), "validation_steps", "validation_step_interval"),
    "validation_num_inference_steps": takes("train.validation.num_inference_steps"),
    "validation_seed": takes("train.validation.seed"),
    "disable_benchmark": special("the opposite of `train.validation.before`", keys.take_benchmark),
    "validation_on_startup": takes("train.validation.before"),
    "validation_disable": special("no `train.validation.prompts`", keys.leave_out_validation),
    "num_validation_images": unsupported("one picture of each prompt", 1),
    **many(unsupported("pictures are drawn of your own prompts", False), "validation_prompt_library",
            "validation_using_datasets", "validation_randomize"),
    **many(unsupported("pictures are drawn as the pipeline draws them", False, 0, 1, "none"),
            "validation_guidance_real", "validation_guidance_rescale", "validation_no_cfg_until_timestep",
            "validation_guidance_skip_layers", "validation_noise_scheduler", "validation_disable_unconditional",
            "validation_adapter_path", "validation_method", "validation_epoch_interval", "validation_preview"),
    **many(needless("the noise is drawn on the CPU, the same on every card"), "validation_seed_source"),
    **many(unsupported("the loss on held-out images is train.validation.split and held_out_every", 0, "none", False),
            "eval_steps_interval", "eval_epoch_interval", "eval_timesteps", "eval_dataset_id", "evaluation_type",
            "num_eval_images", "eval_dataset_pooling"),
    # The data, for backends that do not say it themselves
    "data_backend_config": special("read, unless `--data` names another", lambda draft, entry: None),
    **many(special("of each cache; see the data below", lambda draft, entry: None), "resolution", "resolution_type",
            "caption_strategy", "instance_prompt", "minimum_image_size", "prepend_instance_prompt",
            "only_instance_prompt", "data_backend_sampling"),
    "tokenizer_max_length": takes("cache.max_sequence_length"),
    **many(needless(_SIZES), "maximum_image_size", "target_downsample_size"),
    "max_upscale_threshold": unsupported("cache.no_upscale skips images that would be enlarged"),
    **words("compress_disk_cache", "write_batch_size", "vae_batch_size", "vae_cache_ondemand",
            "override_dataset_config", "preserve_data_backend_cache", "aspect_bucket_rounding",
            "aspect_bucket_alignment", "max_workers", "dataloader_prefetch"),
    **many(needless(_SEPARATE), "cache_dir", "cache_dir_vae", "cache_dir_text", "text_cache_ondemand",
            "text_cache_disable", "vae_cache_disable", "keep_vae_loaded", "text_encoder_batch_size",
            "fully_unload_text_encoder", "save_text_encoder", "vae_cache_scan_behaviour"),
    **many(needless("k5cache encode reads and compares the images by itself"), "skip_file_discovery",
            "dataloader_prefetch_qlen", "read_batch_size", "image_processing_batch_size", "enable_multiprocessing",
            "aspect_bucket_worker_count", "aspect_bucket_disable_rebuild", "metadata_update_interval",
            "ignore_missing_files", "disable_bucket_pruning", "allow_dataset_oversubscription"),
    **many(unsupported("images are never deleted", False), "delete_unwanted_images", "delete_problematic_images"),
}  # fmt: skip


def normal(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Keys without ``--``, in small letters, with ``_``; ``TRAINER_EXTRA_ARGS`` as the keys that it holds.

    Raises:
        RecipeError: a key is there twice, in two spellings.
    """
    spread: list[tuple[str, Any]] = []
    for key, value in values.items():
        name = key.lstrip("-").lower().replace("-", "_")
        if name in ("trainer_extra_args", "debug_extra_args"):
            spread += arguments(str(value)).items() if str(value).strip() else []
        else:
            spread.append((ENV.get(name, name), value))
    normalised: dict[str, Any] = {}
    for key, value in spread:
        key = key.lower().replace("-", "_")
        if key in normalised:
            raise RecipeError(f"{where} has the key {key} twice, in two spellings", "Remove one of them")
        normalised[key] = value
    return normalised
