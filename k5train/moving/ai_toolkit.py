"""What do the keys of ai-toolkit's YAML mean here? A dataset with several resolutions becomes several caches.

The meanings are those of the comments in its published example configs.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from k5cache.shared.errors import RecipeError
from k5cache.shared.model import FLAVOURS
from k5train.moving import simpletuner_keys as keys
from k5train.moving.data_keys import (
    take_flip,
    take_keep,
    take_random_crop,
    take_rectangle,
    take_regularisation,
    take_repeats,
    take_shuffle,
    take_side,
)
from k5train.moving.draft import CacheDraft, Draft, Entry, flag, number, text
from k5train.moving.kohya_data import DATA_RULES as KOHYA_DATA
from k5train.moving.read import locate
from k5train.moving.rules import SAME, Rules, apply, many, needless, special, takes, takes_choice, unsupported

OPTIMIZERS = {
    "adamw": "adamw", "adamw8bit": "adamw8bit", "adam": "adamw", "adam8bit": "adamw8bit", "lion": "lion",
    "lion8bit": "lion", "adafactor": "adafactor", "prodigy": "prodigy",
}  # fmt: skip
_SCHEDULES = {name: name for name in ("constant", "linear", "cosine", "cosine_with_restarts", "polynomial")} | {
    "constant_with_warmup": "constant"
}


def _ignored(draft: Draft, entry: Entry) -> None:
    """It is read together with another key."""


def _network(draft: Draft, entry: Entry) -> None:
    name = text(entry).lower()
    if name in ("lora", "lokr", "dora"):
        draft.take(entry, "train.lora.algo", name)
    else:
        draft.say(entry, "not supported", "train.lora.algo has lora, rslora, dora, lokr")


def _model(draft: Draft, entry: Entry) -> None:
    by_repository = {repository: flavour for flavour, repository in FLAVOURS.items()}
    if text(entry) in by_repository:
        draft.take(entry, "model.flavour", by_repository[text(entry)])
    else:
        draft.say(entry, "not supported", "Kandinsky 5.0 Image is trained here: model.flavour or model.path")


def _quantize(draft: Draft, entry: Entry) -> None:
    precision = "int8-quanto" if flag(entry) else "no_change"
    draft.take(entry, "train.base_model_precision", precision)


def _optimizer_params(draft: Draft, entry: Entry) -> None:
    if not isinstance(entry.value, dict):
        draft.say(entry, "not supported", "it is no table of arguments")
        return
    for key, value in entry.value.items():
        keys.take_optimizer_argument(draft, Entry(entry.where, f"{entry.key}.{key}", value), key)


def _ema(draft: Draft, entry: Entry) -> None:
    table = entry.value if isinstance(entry.value, dict) else {"use_ema": entry.value}
    if table.get("ema_decay") is not None and flag(Entry(entry.where, entry.key, table.get("use_ema", True))):
        draft.take(Entry(entry.where, f"{entry.key}.ema_decay", table["ema_decay"]), "train.optim.ema_decay",
                   table["ema_decay"])  # fmt: skip
    keys.take_ema(draft, Entry(entry.where, f"{entry.key}.use_ema", table.get("use_ema", True)))
    for key in table.keys() - {"use_ema", "ema_decay"}:
        draft.say(Entry(entry.where, f"{entry.key}.{key}", table[key]), "unknown", "not in its examples")


def _timesteps(draft: Draft, entry: Entry) -> None:
    kinds = {"sigmoid": "sigmoid", "linear": "uniform"}
    if str(entry.value) in kinds:
        draft.take(entry, "train.objective.sigma_sampling", kinds[str(entry.value)])
    elif entry.value == "flux_shift":
        draft.take(entry, "train.objective.flow_schedule_auto_shift", True, "Flux's rule")
    else:
        draft.say(
            entry, "not supported", "train.objective.sigma_sampling has sigmoid, uniform, logit_normal, mode, beta"
        )


def _prompts(draft: Draft, entry: Entry) -> None:
    given = entry.value if isinstance(entry.value, list) else [entry.value]
    prompts = [p.get("prompt") if isinstance(p, dict) else p for p in given]
    draft.take(entry, "train.validation.prompts", prompts)


def _before(draft: Draft, entry: Entry) -> None:
    draft.take(entry, "train.validation.before", not flag(entry))


def _no_pictures(draft: Draft, entry: Entry) -> None:
    keys.leave_out_validation(draft, entry)


def _encoder(draft: Draft, entry: Entry) -> None:
    draft.say(entry, *(("not supported", "text encoders are never trained") if flag(entry) else ("not needed", SAME)))


RULES: Rules = {
    "name": special("`train.name`", keys.take_name),
    "type": needless("LoRAs are trained here"),
    "training_folder": special("`k5train run -o`, with the name", _ignored),
    "trigger_word": special("`cache.trigger`, and in prompts", _ignored),
    **many(needless("one GPU is found by itself: train.device"), "device"),
    **many(needless("metrics.jsonl has the time of every step"), "performance_log_every", "logging"),
    "network.type": special("`train.lora.algo`", _network),
    "network.linear": takes("train.lora.rank"),
    "network.linear_alpha": takes("train.lora.alpha"),
    "network.dropout": takes("train.lora.dropout"),
    "network.lokr_factor": takes("train.lora.decompose_factor"),
    "network.pretrained_lora_path": takes("train.lora.init_lora"),
    **many(needless("this model has no convolutions to adapt"), "network.conv", "network.conv_alpha"),
    **many(unsupported("set train.lora.targets", False), "network.network_kwargs", "network.lokr_full_rank",
           "network.old_lokr_format"),
    "save.save_every": takes("train.checkpoint_every"),
    "save.max_step_saves_to_keep": takes("train.checkpoints_total_limit"),
    **many(needless("the file has the precision that it was trained in; `k5train export --dtype` changes it"),
           "save.dtype", "save.save_format"),
    "save.push_to_hub": unsupported("upload the LoRA with `hf upload`", False),
    **many(needless("upload the LoRA with `hf upload`"), "save.hf_repo_id", "save.hf_private"),
    "train.batch_size": takes("train.batch_size"),
    "train.steps": takes("train.steps"),
    **many(takes("train.gradient_accumulation_steps"), "train.gradient_accumulation_steps",
           "train.gradient_accumulation"),
    "train.lr": takes("train.optim.lr"),
    "train.unet_lr": takes("train.optim.lr"),
    "train.optimizer": takes_choice("train.optim.optimizer", OPTIMIZERS),
    "train.optimizer_params": special("`train.optim.betas`, `eps` and `weight_decay`", _optimizer_params),
    "train.lr_scheduler": takes_choice("train.optim.lr_scheduler", _SCHEDULES),
    "train.max_grad_norm": takes("train.optim.max_grad_norm"),
    "train.ema_config": special("`train.optim.ema_decay`", _ema),
    "train.seed": takes("train.seed"),
    "train.dtype": takes_choice("train.mixed_precision", {"bf16": "bf16", "bfloat16": "bf16", "float32": "fp32",
                                                          "fp32": "fp32"}),
    "train.noise_scheduler": unsupported("this model is trained by flow matching", "flowmatch"),
    "train.timestep_type": special("`train.objective.sigma_sampling`", _timesteps),
    **many(unsupported("a range of noise is train.objective.sigma_min to sigma_max", 0, 999, 1000),
           "train.min_denoising_steps", "train.max_denoising_steps"),
    **many(special("`train.objective.preservation_weight`", _ignored), "train.diff_output_preservation",
           "train.diff_output_preservation_multiplier"),
    "train.diff_output_preservation_class": special("`cache.class_word`", _ignored),
    "train.blank_prompt_preservation": unsupported("train.objective.preservation_weight preserves a class", False),
    "train.blank_prompt_preservation_multiplier": needless("blank_prompt_preservation says whether"),
    "train.loss_type": takes_choice("train.objective.loss_type", {"mse": "l2"}),
    "train.content_or_style": unsupported("train.objective and flow_schedule_shift say which noise", "balanced"),
    "train.linear_timesteps": unsupported('weights by noise are train.objective.weighting: "bell"', False),
    "train.train_unet": needless("the transformer is what is trained"),
    "train.train_text_encoder": special("not supported, unless it is `false`", _encoder),
    "train.skip_first_sample": special("the opposite of `train.validation.before`", _before),
    "train.disable_sampling": special("no `train.validation.prompts`", _no_pictures),
    **many(needless("the plan says what is computed again, and stage 1 encodes the captions"),
           "train.gradient_checkpointing", "train.unload_text_encoder", "train.cache_text_embeddings",
           "train.force_first_sample"),
    **many(unsupported("it does not exist here", False, 0),
           "train.bypass_guidance_embedding", "train.noise_offset", "train.min_snr_gamma",
           "train.switch_boundary_every"),
    "model.name_or_path": special("`model.flavour`, for a Kandinsky 5.0 Image", _model),
    "model.quantize": special("`train.base_model_precision`", _quantize),
    "model.qtype": takes_choice("train.base_model_precision", {"int8": "int8-quanto", "qint8": "int8-quanto"},
                                "the base is int8 or bf16 here: train.base_model_precision"),
    **many(needless("one model is trained here, and a plan fits it to the card"), "model.arch", "model.is_flux",
           "model.low_vram", "model.layer_offloading", "model.quantize_te", "model.qtype_te"),
    "sample.sample_every": takes("train.validation.every"),
    "sample.width": takes("train.validation.width"),
    "sample.height": takes("train.validation.height"),
    "sample.prompts": special("`train.validation.prompts`", _prompts),
    "sample.neg": takes("train.validation.negative_prompt"),
    "sample.seed": takes("train.validation.seed"),
    "sample.guidance_scale": takes("train.validation.guidance_scale"),
    "sample.sample_steps": takes("train.validation.num_inference_steps"),
    "sample.sampler": unsupported("pictures are drawn by the pipeline's Euler steps", "flowmatch"),
    "sample.sample_start_step": unsupported("pictures are drawn from the first row on", 0),
    "sample.walk_seed": unsupported("every prompt is drawn on the same noise in each row", False),
    **many(needless("pictures are single PNG files"), "sample.num_frames", "sample.fps", "sample.format"),
}  # fmt: skip


def _dropout(draft: Draft, entry: Entry) -> None:
    KOHYA_DATA["caption_dropout_rate"].act(draft, entry)


def _default_caption(draft: Draft, entry: Entry) -> None:
    draft.say(entry, "not supported", "images without a caption are reported; one for all is cache.instance_prompt")


DATA_RULES: Rules = {
    "folder_path": special("the argument of `k5cache encode`", _ignored),
    "resolution": special("`cache.resolution`; a cache for each of several", _ignored),
    "caption_ext": KOHYA_DATA["caption_extension"],
    "caption_dropout_rate": special("`train.caption_dropout_probability`, of the first dataset", _dropout),
    "num_repeats": special("`repeats`", take_repeats),
    "is_reg": special("`is_regularisation_data` of [[train.data]]", take_regularisation),
    "flip_x": special("`cache.flip`", take_flip),
    "random_crop": special("`cache.crop`", take_random_crop),
    "default_caption": special("not supported: one caption for all is `cache.instance_prompt`", _default_caption),
    "control_path": KOHYA_DATA["control_directory"],
    **many(needless("stage 1 encodes everything into the cache"), "cache_latents_to_disk", "cache_latents",
           "cache_text_embeddings"),
    "shuffle_tokens": special("`cache.shuffle_tags`", take_shuffle),
    "keep_tokens": special("`cache.keep_tokens`, with shuffle_tokens", _ignored),
    "token_dropout_rate": unsupported("no tags are left out of captions", False, 0),
    **many(unsupported("pictures are only mirrored from left to right", False), "flip_y", "augments", "random_scale"),
    **many(unsupported("masks are NAME.mask.png beside their images"), "mask_path", "mask_min_value"),
    **many(unsupported("weight in [[train.data]] is the share of an epoch's rows", 1), "network_weight",
           "loss_multiplier"),
    **many(unsupported("only images are trained on", 1, False), "num_frames", "shrink_video_to_frames", "do_i2v"),
    "buckets": needless("images go into the sizes that the model was trained at"),
}  # fmt: skip


def take(draft: Draft, config: Path, values: Mapping[str, Any]) -> None:
    """Take over the first process of a job.

    Raises:
        RecipeError: it is not a job, or a value has the wrong type.
    """
    where = str(config)
    job = values.get("config")
    processes = job.get("process") if isinstance(job, dict) else None
    if not isinstance(job, dict) or not isinstance(processes, list) or not processes:
        raise RecipeError(f"{config} has no config.process, as ai-toolkit's jobs have", "Give a job's YAML")
    process = processes[0]
    if not isinstance(process, dict):
        raise RecipeError(f"{config}: config.process is not a list of tables", "Give a job's YAML")
    for key, value in {k: v for k, v in values.items() if k != "config"}.items():
        known = key in ("job", "meta")
        draft.say(Entry(where, key, value), "not needed" if known else "unknown", "of no effect on training")
    for number_, other in enumerate(processes[1:], 2):
        draft.say(Entry(where, f"process {number_}", other), "not supported", "one process is one recipe")
    flat = {**{k: v for k, v in job.items() if k != "process"}, **flattened(process)}
    late = {k: flat[k] for k in ("model.qtype", "train.disable_sampling") if k in flat}
    datasets = flat.pop("datasets", None)
    apply(draft, RULES, where, {k: v for k, v in flat.items() if k not in late} | late)
    _take_folder(draft, where, flat)
    _take_datasets(draft, where, datasets)
    _take_trigger(draft, where, flat.get("trigger_word"))
    _take_preservation(draft, where, flat)


def flattened(process: Mapping[str, Any]) -> dict[str, Any]:
    """``train: {lr: 1}`` as ``train.lr``; deeper tables stay."""
    flat: dict[str, Any] = {}
    for key, value in process.items():
        if isinstance(value, dict) and key in ("network", "save", "train", "model", "sample"):
            flat |= {f"{key}.{inner}": each for inner, each in value.items()}
        else:
            flat[key] = value
    return flat


def _take_folder(draft: Draft, where: str, flat: Mapping[str, Any]) -> None:
    folder = flat.get("training_folder")
    if not folder:
        return
    entry = Entry(where, "training_folder", folder)
    keys.take_output(draft, Entry(where, "training_folder", str(Path(text(entry)) / str(flat.get("name", "lora")))))


def _take_trigger(draft: Draft, where: str, trigger: Any) -> None:
    prompts = draft.value("train.validation.prompts") or []
    if trigger:
        entry = Entry(where, "trigger_word", trigger)
        for cache in draft.caches:
            cache.options["trigger"] = text(entry)
        draft.say(entry, "taken over", "cache.trigger: before every caption, also where it is in it already")
    if any("[trigger]" in prompt for prompt in prompts):
        filled = [prompt.replace("[trigger]", str(trigger or "").strip()) for prompt in prompts]
        draft.put("train.validation.prompts", filled, "sample.prompts")


def _take_preservation(draft: Draft, where: str, flat: Mapping[str, Any]) -> None:
    """Differential output preservation: three keys, and the trigger."""
    name = "train.diff_output_preservation"
    whether, weight, class_ = (
        Entry(where, key, flat.get(key)) for key in (name, f"{name}_multiplier", f"{name}_class")
    )
    entries = [entry for entry in (whether, weight, class_) if entry.value not in (None, "")]
    is_on = whether.value is not None and flag(whether)
    if not is_on or not class_.value or not flat.get("trigger_word"):
        for entry in entries:
            if is_on:
                draft.say(entry, "not supported", "it needs trigger_word and diff_output_preservation_class")
            else:
                draft.say(entry, "not needed", SAME)
        return
    for cache in draft.caches:
        if not cache.is_regularisation_data:
            cache.options["class_word"] = text(class_)
    draft.say(class_, "taken over", "cache.class_word, in the place of cache.trigger")
    draft.say(whether, "taken over", "train.objective.preservation_weight")
    given = weight if weight in entries else Entry(where, weight.key, 1.0)
    draft.take(given, "train.objective.preservation_weight", given.value)


def _take_datasets(draft: Draft, where: str, datasets: Any) -> None:
    if datasets is None:
        return
    if not isinstance(datasets, list) or not all(isinstance(dataset, dict) for dataset in datasets):
        raise RecipeError(f"{where}: datasets must be a list of tables", "Write it as in ai-toolkit's examples")
    for number_, dataset in enumerate(datasets, 1):
        _take_dataset(draft, f"{where}, dataset {number_}", dataset)


def _take_dataset(draft: Draft, where: str, dataset: dict[str, Any]) -> None:
    entry = Entry(where, "folder_path", dataset.get("folder_path"))
    if not entry.value:
        raise RecipeError(f"{where} has no folder_path", "Give it one")
    folder = locate(text(entry), draft.config)
    source = folder or Path(text(entry)).expanduser()
    draft.cache = CacheDraft(source.name or "images", str(source))
    missing = "" if folder else ": it is not there yet"
    draft.say(entry, "taken over", f"the argument of k5cache encode{missing}")
    apply(draft, DATA_RULES, where, dataset)
    if dataset.get("keep_tokens") is not None:
        take_keep(draft, Entry(where, "keep_tokens", dataset["keep_tokens"]), dataset.get("shuffle_tokens"))
    draft.cache.options["caption_lines"] = "whole"  # ai-toolkit takes a file as one caption
    given = dataset.get("resolution")
    sides = given if isinstance(given, list) else [given]
    base = draft.cache
    draft.say_of_rest(where, {k: v for k, v in dataset.items() if k != "resolution"}, "it has no meaning here")
    for side in sides:
        draft.cache = deepcopy(base)
        resolution = Entry(where, "resolution", side)
        if len(sides) > 1:
            draft.cache.name = f"{base.name}-{number(resolution):g}"
            take_side(draft, resolution, number(resolution), f"cache/{draft.cache.name}")
        elif side is not None:
            take_rectangle(draft, resolution)
        draft.caches.append(draft.cache)
