"""What do the keys of kohya's sd-scripts and of musubi-tuner mean here? Their datasets are read in ``kohya_data.py``.

The meanings are those of the public documentation of both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from k5cache.shared.errors import RecipeError
from k5train.moving import simpletuner_keys as keys
from k5train.moving.draft import Draft, Entry, flag, number, text
from k5train.moving.kohya_data import take_datasets
from k5train.moving.read import locate, read, subfolders
from k5train.moving.rules import SAME, Rules, apply, many, needless, special, takes, takes_choice, unsupported, words

_SCHEDULES = {"constant_with_warmup": "constant"} | {
    name: name for name in ("constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "rex")
}
OPTIMIZERS = {
    "adamw": "adamw", "adamw8bit": "adamw8bit", "pagedadamw8bit": "adamw8bit", "lion": "lion", "lion8bit": "lion",
    "adafactor": "adafactor", "prodigy": "prodigy", "adamwschedulefree": "schedulefree", "muon": "muon",
    "bitsandbytes.optim.adamw8bit": "adamw8bit", "torch.optim.adamw": "adamw", "torch.optim.muon": "muon",
    "schedulefree.adamwschedulefree": "schedulefree", "prodigyopt.prodigy": "prodigy",
}  # fmt: skip


def _ignored(draft: Draft, entry: Entry) -> None:
    """It is read together with another key."""


def _module(draft: Draft, entry: Entry) -> None:
    name = text(entry).lower()
    if name in ("networks.lokr", "networks.lora_lokr"):
        draft.take(entry, "train.lora.algo", "lokr")
    elif name.startswith("networks.lora"):
        draft.say(entry, "not needed", "a LoRA is what is trained here")
    elif name.startswith("lycoris"):
        draft.say(entry, "taken over", "train.lora.algo, as network_args say")
    else:
        draft.say(entry, "not supported", "train.lora.algo has lora, rslora, dora, lokr")


def _pairs(entry: Entry) -> list[tuple[str, str]]:
    """``["a=1", "b=2"]`` or ``"a=1"`` as pairs."""
    given = entry.value if isinstance(entry.value, list) else [entry.value]
    return [(str(pair).partition("=")[0].strip(), str(pair).partition("=")[2].strip()) for pair in given]


def _network_args(draft: Draft, entry: Entry) -> None:
    algos = {"lokr": "lokr", "lora": "lora", "locon": "lora"}
    for key, value in _pairs(entry):
        inner = Entry(entry.where, f"network_args.{key}", value)
        if key == "algo" and value.lower() in algos:
            draft.take(inner, "train.lora.algo", algos[value.lower()])
        elif key == "factor":
            draft.take(inner, "train.lora.decompose_factor", value)
        elif key == "dora_wd" and value.lower() == "true":
            draft.take(inner, "train.lora.algo", "dora")
        else:
            draft.say(inner, "not supported", "of network_args, algo (lora, lokr), factor and dora_wd exist here")


def _optimizer_args(draft: Draft, entry: Entry) -> None:
    for key, value in _pairs(entry):
        keys.take_optimizer_argument(draft, Entry(entry.where, f"optimizer_args.{key}", value), key)


def _warmup(draft: Draft, entry: Entry) -> None:
    if 0 < number(entry) < 1:
        draft.say(entry, "not supported", "a share of the steps: set train.optim.warmup_steps to a number of them")
    else:
        draft.take(entry, "train.optim.warmup_steps", entry.value)


def _alpha(draft: Draft, entry: Entry) -> None:
    if number(entry) > 0:
        draft.take(entry, "train.lora.alpha", entry.value, "folded into the file, which needs no alpha")
    else:
        draft.say(entry, "not needed", "0 is alpha = rank, as here")


def _steps(draft: Draft, entry: Entry) -> None:
    if "train.epochs" in draft.taken:
        draft.say(entry, "not needed", "max_train_epochs says how long it trains, as there")
    else:
        draft.take(entry, "train.steps", entry.value)


def _timesteps(draft: Draft, entry: Entry) -> None:
    name = text(entry).lower()
    if name in ("sigmoid", "shift"):
        draft.take(entry, "train.objective.sigma_sampling", "sigmoid")
    elif name == "uniform":
        draft.take(entry, "train.objective.sigma_sampling", "uniform")
    elif name in ("flux_shift", "flux"):
        draft.take(entry, "train.objective.flow_schedule_auto_shift", True, "Flux's rule")
    elif name == "sigma":
        draft.say(entry, "taken over", "train.objective.sigma_sampling, as weighting_scheme says")
    else:
        draft.say(
            entry, "not supported", "train.objective.sigma_sampling has sigmoid, uniform, logit_normal, mode, beta"
        )


def _timestep(draft: Draft, entry: Entry) -> None:
    end = entry.key[:3]
    note = "the distribution keeps its shape in the range, as with preserve_distribution_shape"
    if number(entry) == {"min": 0, "max": 1000}[end]:
        draft.say(entry, "not needed", SAME)
    else:
        draft.take(entry, f"train.objective.sigma_{end}", number(entry) / 1000, note)


def _scheme(draft: Draft, entry: Entry) -> None:
    name = text(entry).lower()
    if name in ("logit_normal", "mode"):
        draft.take(entry, "train.objective.sigma_sampling", name)
    elif name == "cosmap":
        draft.take(entry, "train.objective.weighting", "cosmap")
    elif name == "none":
        draft.say(entry, "not needed", "errors count alike at every sigma")
    else:
        draft.say(entry, "not supported", "train.objective.weighting has none, cosmap, bell, min_snr")


def _save_epochs(draft: Draft, entry: Entry) -> None:
    draft.say(entry, "not supported", "a number of steps is train.checkpoint_every; it is 250 unless it is set")


def _masked(draft: Draft, entry: Entry) -> None:
    draft.take(entry, "train.objective.masked_loss", flag(entry), "where a cache has masks")


RULES: Rules = {
    # The model
    **many(needless("the checkpoint is model.flavour or model.path, a folder in the diffusers layout"),
           "pretrained_model_name_or_path", "dit", "vae", "task", "text_encoder", "text_encoder1", "text_encoder2",
           "text_encoder_qwen", "text_encoder_clip", "t5", "t5xxl", "clip", "clip_l", "clip_g", "ae", "qwen3",
           "vae_dtype", "v2", "v_parameterization", "model_version", "scheduler_scale"),
    # The run
    "output_dir": special("`k5train run -o`, if the folder is new or a run", keys.take_output),
    "output_name": special("`train.name`", keys.take_name),
    "max_train_epochs": takes("train.epochs"),
    "max_train_steps": special("`train.steps`, without max_train_epochs", _steps),
    "train_batch_size": takes("train.batch_size"),
    "gradient_accumulation_steps": takes("train.gradient_accumulation_steps"),
    "seed": takes("train.seed"),
    "save_every_n_steps": takes("train.checkpoint_every"),
    **many(special("not supported: `train.checkpoint_every` counts steps", _save_epochs), "save_every_n_epochs",
           "save_n_epoch_ratio"),
    **many(unsupported("a number of LoRAs is train.checkpoints_total_limit"), "save_last_n_steps", "save_last_n_epochs",
           "save_last_n_steps_state", "save_last_n_epochs_state"),
    **many(needless("a LoRA and a state to resume from are saved at every checkpoint"), "save_state",
           "save_state_on_train_end", "save_model_as", "save_precision", "no_metadata", "training_comment"),
    "resume": unsupported("a state of kohya cannot be gone on from: start from its LoRA with train.lora.init_lora"),
    "log_with": special("`train.trackers.use`", keys.take_trackers),
    "log_tracker_name": takes("train.trackers.project"),
    **many(needless("metrics.jsonl is always written, into the run"), "logging_dir", "log_prefix", "log_config",
           "wandb_run_name", "log_tracker_config"),
    **many(needless("upload the LoRA with `hf upload`"), "huggingface_repo_id", "huggingface_repo_type",
           "huggingface_path_in_repo", "huggingface_repo_visibility", "save_state_to_huggingface", "async_upload"),
    **many(unsupported("give what it holds in one file", ""), "config_file"),
    # Precision and memory
    "mixed_precision": takes_choice("train.mixed_precision", {"bf16": "bf16", "no": "fp32"}),
    **many(unsupported("the base is int8 or bf16 here: train.base_model_precision", False), "fp8_base", "fp8_scaled",
           "full_bf16", "full_fp16", "fp8_base_unet", "fp8_llm", "fp8_vl"),
    "blocks_to_swap": needless("the plan streams as many blocks as necessary; train.memory.vram sets the card's size"),
    **words("gradient_checkpointing", "sdpa", "xformers", "cache_latents", "cache_latents_to_disk",
            "cache_text_encoder_outputs", "enable_bucket", "noise_offset"),
    **many(needless("memory and kernels follow from the plan"), "gradient_checkpointing_cpu_offload", "flash_attn",
           "flash3", "sage_attn", "split_attn", "mem_eff_attn", "lowram", "highvram", "vae_tiling",
           "vae_batch_size", "vae_chunk_size", "vae_spatial_tile_sample_min_size", "torch_compile",
           "dynamo_backend", "compile",
           "force_nabla_attention", "offload_dit_during_sampling", "img_in_txt_in_offloading", "blocks_to_swap_text"),
    **many(needless("rows are read ahead without being asked"), "max_data_loader_n_workers",
           "persistent_data_loader_workers", "num_cpu_threads_per_process"),
    "cache_text_encoder_outputs_to_disk": needless("stage 1 encodes everything into the cache"),
    # The adapter
    "network_module": special("a LoRA, or `train.lora.algo`", _module),
    "network_dim": takes("train.lora.rank"),
    "network_alpha": special("`train.lora.alpha`", _alpha),
    "network_dropout": takes("train.lora.dropout"),
    "network_weights": takes("train.lora.init_lora"),
    "network_args": special("`train.lora.algo` and `decompose_factor`", _network_args),
    "network_train_unet_only": needless("text encoders are never trained"),
    "network_train_text_encoder_only": unsupported("text encoders are never trained", False),
    "dim_from_weights": unsupported("set train.lora.rank", False),
    "scale_weight_norms": unsupported("the norm of an adapter is not limited", 0),
    # The optimizer
    "learning_rate": takes("train.optim.lr"),
    "unet_lr": takes("train.optim.lr"),
    "text_encoder_lr": needless("text encoders are never trained"),
    "optimizer_type": takes_choice("train.optim.optimizer", OPTIMIZERS),
    "optimizer_args": special("`train.optim.betas`, `eps` and `weight_decay`", _optimizer_args),
    **many(unsupported("optimizer_type names it", False), "use_8bit_adam", "use_lion_optimizer"),
    "lr_scheduler": takes_choice("train.optim.lr_scheduler", _SCHEDULES),
    "lr_warmup_steps": special("`train.optim.warmup_steps`", _warmup),
    "lr_scheduler_num_cycles": takes("train.optim.lr_num_cycles"),
    "lr_scheduler_power": takes("train.optim.lr_power"),
    "lr_scheduler_min_lr_ratio": takes("train.optim.lr_end"),
    "max_grad_norm": takes("train.optim.max_grad_norm"),
    # The objective
    "timestep_sampling": special("`train.objective.sigma_sampling`", _timesteps),
    "discrete_flow_shift": takes("train.flow_schedule_shift"),
    "sigmoid_scale": takes("train.objective.sigmoid_scale"),
    "weighting_scheme": special("`train.objective.sigma_sampling` or `weighting`", _scheme),
    "logit_mean": takes("train.objective.logit_mean"),
    "logit_std": takes("train.objective.logit_std"),
    "mode_scale": takes("train.objective.mode_scale"),
    "loss_type": takes_choice("train.objective.loss_type", {"l2": "l2", "mse": "l2", "huber": "huber"}),
    "huber_c": takes("train.objective.huber_c"),
    "huber_schedule": unsupported("train.objective.huber_c is the same at every sigma", "constant"),
    "min_snr_gamma": unsupported('min-SNR is train.objective.weighting = "min_snr" with snr_gamma', 0),
    "prior_loss_weight": takes("train.objective.prior_loss_weight"),
    "masked_loss": special("`train.objective.masked_loss`", _masked),
    "min_timestep": special("`train.objective.sigma_min`, a thousandth of it", _timestep),
    "max_timestep": special("`train.objective.sigma_max`, a thousandth of it", _timestep),
    "preserve_distribution_shape": needless("a range of sigma always keeps the distribution's shape"),
    **many(unsupported("it belongs to other models", 0, False, 1), "multires_noise_iterations",
           "multires_noise_discount", "ip_noise_gamma", "adaptive_noise_scale", "zero_terminal_snr", "clip_skip",
           "guidance_scale", "scale_v_pred_loss_like_noise_pred", "debiased_estimation_loss"),
    "model_prediction_type": needless("this model predicts the velocity"),
    # Pictures
    "sample_prompts": special("`train.validation.prompts`", _ignored),
    "sample_every_n_steps": takes("train.validation.every"),
    "sample_every_n_epochs": unsupported("train.validation.every counts steps"),
    "sample_at_first": takes("train.validation.before"),
    "sample_sampler": unsupported("pictures are drawn by the pipeline's Euler steps", "euler"),
    # The data, where a command line has it
    "dataset_config": special("read, unless `--data` names another", _ignored),
    **many(special("a dataset of its own", _ignored), "train_data_dir", "reg_data_dir"),
    **many(special("of each cache; see the data below", _ignored), "resolution", "caption_extension", "flip_aug",
           "random_crop", "shuffle_caption", "keep_tokens", "caption_prefix", "caption_suffix", "enable_wildcard",
           "caption_separator", "color_aug"),
    "max_token_length": needless("512 tokens of a caption are used: cache.max_sequence_length"),
    "caption_dropout_rate": takes("train.caption_dropout_probability"),
    **many(needless("images go into the sizes that the model was trained at"), "min_bucket_reso", "max_bucket_reso",
           "bucket_reso_steps"),
    "bucket_no_upscale": unsupported("cache.no_upscale skips images that would be enlarged", False),
}  # fmt: skip
DATA_DEFAULTS = ("resolution", "caption_extension", "flip_aug", "random_crop", "shuffle_caption", "keep_tokens",
                 "caption_prefix", "caption_suffix", "enable_wildcard", "caption_separator", "color_aug")  # fmt: skip
_LATE = ("max_train_steps",)


def flattened(values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a config whose tables only order them, as sd-scripts' ``--config_file`` has them.

    Raises:
        RecipeError: a key is in two tables.
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inner = value if isinstance(value, dict) and key != "general" else {key: value}
        for name, each in inner.items():
            if name in flat:
                raise RecipeError(f"The config has the key {name!r:.60} twice", "Remove one of them")
            flat[name] = each
    return {key.replace("-", "_") if "." not in key else key: value for key, value in flat.items()}


def take(draft: Draft, config: Path, values: Mapping[str, Any], data: Path | None, prompts: Path | None) -> None:
    """Take over a setup of kohya's: a config or a command line, and a dataset config.

    Raises:
        RecipeError: a file is missing, or a value has the wrong type.
    """
    tables = {key: values[key] for key in ("general", "datasets") if key in values}
    flat = flattened({key: value for key, value in values.items() if key not in tables})
    late = {key: flat[key] for key in _LATE if key in flat}
    defaults = {key: flat[key] for key in DATA_DEFAULTS if key in flat}
    apply(draft, RULES, str(config), {k: v for k, v in flat.items() if k not in (*late, *defaults)} | late)
    _settle_shift(draft, flat)
    _take_prompts(draft, config, flat, prompts)
    named = flat.get("dataset_config")
    entry = Entry(str(config), "dataset_config", named)
    path = data or (_file(draft, entry, "--data") if named else None)
    if named:
        draft.say(entry, "taken over", f"instead of it, --data {data}" if data else "read: see its rows")
    if path is not None:
        tables = read(path)
    if not tables and ("train_data_dir" in flat or "reg_data_dir" in flat):
        tables = _plain_folders(draft, str(config), flat)
    elif not tables:
        for key, value in defaults.items():
            draft.say(Entry(str(config), key, value), "not supported", "it is about data: give that with --data")
    if tables:
        take_datasets(draft, path or config, tables, defaults)
    draft.say_of_rest(str(config), {k: v for k, v in flat.items() if k not in defaults}, "--data has the data")


def _settle_shift(draft: Draft, flat: Mapping[str, Any]) -> None:
    """A shift that kohya does not use with these timesteps."""
    if str(flat.get("timestep_sampling", "")).lower() in ("sigmoid", "uniform", "flux_shift", "flux"):
        draft.drop("train.flow_schedule_shift", "timestep_sampling does not use it", "not needed")
    scheme = str(flat.get("weighting_scheme", "none")).lower()
    if str(flat.get("timestep_sampling", "")).lower() == "sigma" and scheme not in ("logit_normal", "mode"):
        draft.put("train.objective.sigma_sampling", "uniform", "timestep_sampling = sigma")


def _plain_folders(draft: Draft, where: str, flat: Mapping[str, Any]) -> dict[str, Any]:
    """``train_data_dir`` and ``reg_data_dir`` as the datasets that they are: each folder ``10_a cat`` in them is a
    subset with 10 repeats, whose images are of "a cat" if they have no captions."""
    subsets: list[dict[str, Any]] = []
    for key in ("train_data_dir", "reg_data_dir"):
        if not flat.get(key):
            continue
        entry = Entry(where, key, flat[key])
        root = locate(text(entry), draft.config) or Path(text(entry)).expanduser()
        named = [(path, re.match(r"(\d{1,6})_(.+)", path.name)) for path in subfolders(root)]
        parts = [{"image_dir": str(p), "num_repeats": int(m[1]), "class_tokens": m[2]} for p, m in named if m]
        own = parts or [{"image_dir": str(root)}]
        subsets += [{**part, **({"is_reg": True} if key == "reg_data_dir" else {})} for part in own]
        draft.say(entry, "taken over", f"{len(own)} cache{'s' if parts[1:] else ''}: see the data below")
    return {"datasets": [{"subsets": subsets}]}


def _file(draft: Draft, entry: Entry, option: str) -> Path:
    path = locate(text(entry), draft.config)
    if path is None or not path.is_file():
        raise RecipeError(
            f"{entry.where}: {entry.key} names {entry.value!r:.200}, and there is no such file",
            f"Say where it is: {option} FILE",
        )
    return path


def _take_prompts(draft: Draft, config: Path, flat: Mapping[str, Any], prompts: Path | None) -> None:
    """Prompts of a text file, one a line, without their ``--w 832`` and the like."""
    entry = Entry(str(config), "sample_prompts", str(prompts) if prompts else flat.get("sample_prompts"))
    if not entry.value:
        return
    path = prompts or _file(draft, entry, "--prompts")
    found = prompt_lines(path)
    draft.take(entry, "train.validation.prompts", found, "without the options of each line")


def prompt_lines(path: Path) -> list[str]:
    """The prompts of a file: one a line, or a JSON or TOML list of tables with ``prompt``.

    Raises:
        RecipeError: it cannot be read, or has none.
    """
    from k5cache.shared.plain import read_text

    try:
        lines = [line.strip() for line in read_text(path, 1 << 20).splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read as text: {error}", "Give a text file with a prompt a line") from None
    plain = [line.partition(" --")[0].strip() for line in lines if line and not line.startswith("#")]
    if path.suffix.lower() not in (".json", ".toml"):
        if plain:
            return plain
        raise RecipeError(f"{path} has no prompt", "Write one a line")
    values = read(path)
    entries = values if isinstance(values, list) else [t for t in values.values() if isinstance(t, list)][:1]
    entries = entries[0] if len(entries) == 1 and isinstance(entries[0], list) else entries
    if isinstance(values, dict) and isinstance(values.get("prompt"), dict):
        entries = values["prompt"].get("subset", [])
    found: list[Any] = [e.get("prompt") if isinstance(e, dict) else e for e in entries]
    if not found or not all(isinstance(prompt, str) for prompt in found):
        raise RecipeError(f"{path} is not a list of prompts", 'It must be like ["a red bicycle"]')
    return found
