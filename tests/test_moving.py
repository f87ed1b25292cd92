"""Moving over: setups of SimpleTuner, kohya, musubi-tuner and ai-toolkit become recipes, and every key is answered."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest

from k5cache.cli import app as cache_app
from k5cache.options import CacheConfig
from k5cache.shared import option_list
from k5cache.shared.errors import OutputError, RecipeError
from k5cache.shared.model import ModelConfig
from k5cache.shared.recipe import parse, read, to_dict
from k5train.cli import app
from k5train.moving import ai_toolkit, kohya, kohya_data, simpletuner, simpletuner_data
from k5train.moving.move import move
from k5train.moving.target import Moved, check_target
from k5train.options.train import TrainConfig
from tests.cli import Cli
from tests.test_readme import command_of

ROOT = Path(__file__).parent.parent
SCHEMAS = {"model": ModelConfig, "cache": CacheConfig, "train": TrainConfig}

# The quickstart's own pieces: documentation/quickstart/KANDINSKY5_IMAGE.md of SimpleTuner.
QUICKSTART = {
    "--model_type": "lora", "model_family": "kandinsky5-image", "--model_flavour": "t2i-lite-sft",
    "output_dir": "output/models", "train_batch_size": 1, "gradient_accumulation_steps": 1,
    "validation_resolution": "1024x1024", "validation_guidance": 5.0, "flow_schedule_shift": 1.0,
    "user_prompt_library": "config/user_prompt_library.json", "base_model_precision": "int8-quanto",
    "text_encoder_1_precision": "no_change", "text_encoder_2_precision": "no_change", "lora_rank": 16,
    "base_model_default_dtype": "bf16", "enable_group_offload": True, "group_offload_type": "block_level",
    "group_offload_blocks_per_group": 1, "group_offload_use_stream": True, "offload_during_startup": True,
    "tread_config": {"routes": [{"selection_ratio": 0.5, "start_layer_idx": 2, "end_layer_idx": -2}]},
    "data_backend_config": "config/multidatabackend.json",
}  # fmt: skip
BACKENDS: list[dict[str, Any]] = [
    {"id": "my-image-dataset", "type": "local", "dataset_type": "image", "instance_data_dir": "datasets/my_images",
     "caption_strategy": "textfile", "resolution": 1024, "crop": True, "crop_aspect": "square", "repeats": 10},
    {"id": "text-embeds", "type": "local", "dataset_type": "text_embeds", "default": True,
     "cache_dir": "cache/text/kandinsky5", "disabled": False},
]  # fmt: skip
LIBRARY = {
    "portrait": "A high quality portrait of a woman, cinematic lighting, 8k",
    "landscape": "A beautiful mountain landscape at sunset, oil painting style",
}


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A folder with the quickstart's data, which is the current one."""
    monkeypatch.chdir(tmp_path)
    write("config/multidatabackend.json", json.dumps(BACKENDS))
    write("config/user_prompt_library.json", json.dumps(LIBRARY))
    Path("datasets/my_images").mkdir(parents=True)
    return tmp_path


def write(name: str, text: str) -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def turn(path: Path, trainer: Any = None, data: Path | None = None, prompts: Path | None = None) -> Moved:
    return move(path, data, prompts, trainer, Path("my.toml"), SCHEMAS)


def simple(config: dict[str, Any], backends: list[dict[str, Any]] | None = None) -> Moved:
    """A setup of SimpleTuner's."""
    data = write("b.json", json.dumps(backends)) if backends is not None else None
    return turn(write("c.json", json.dumps({"model_family": "kandinsky5-image", **config})), data=data)


def values_of(moved: Moved) -> dict[str, Any]:
    """What the recipe sets, read by our own parser; without what it leaves at its default."""
    path = write("read_back.toml", moved.text)
    configs = parse(read(path, []), SCHEMAS)

    def changed(config: Any, default: Any) -> dict[str, Any]:
        ours, theirs = to_dict(config), to_dict(default)
        return {
            key: changed_table(value, theirs.get(key)) if isinstance(value, dict) else value
            for key, value in ours.items()
            if value != theirs.get(key)
        }

    def changed_table(ours: dict[str, Any], theirs: Any) -> dict[str, Any]:
        return {key: value for key, value in ours.items() if value != (theirs or {}).get(key)}

    return {name: changed(config, type(config)()) for name, config in zip(SCHEMAS, configs, strict=True)}


def said(moved: Moved) -> dict[str, str]:
    return {row.key: f"{row.outcome}: {row.text}" for row in moved.rows}


def check_commands(moved: Moved) -> None:
    """Each command parses, with values that our options take."""
    for line in moved.commands:
        words = shlex.split(line)
        command, rest = command_of(words)
        command.make_context(command.name, rest)
        parse(read(None, [b for a, b in itertools.pairwise(words) if a == "--set"]), SCHEMAS)


def test_simpletuners_quickstart_becomes_the_recipe_that_it_describes_in_each_of_its_forms(home):
    keys = {key.lstrip("-"): value for key, value in QUICKSTART.items()}
    tread = json.dumps(keys.pop("tread_config"))
    plain = "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
    env = "# mine\n" + "".join(f"export {key.upper()}={value!r} # so\n" for key, value in keys.items())
    quoted = tread.replace('"', '\\"')
    forms = [
        write("config/config.json", json.dumps(QUICKSTART)),
        write("config/config.toml", f"{plain}tread_config = {{routes = [{{selection_ratio = 0.5, start_layer_idx = 2, "
                                    "end_layer_idx = -2}]}\n"),
        write("config/config.env", f"{env}TRAINER_EXTRA_ARGS=\"--tread_config='{quoted}'\"\n"),
    ]  # fmt: skip
    for form in forms:
        moved = turn(form)
        assert values_of(moved) == {
            "model": {},
            "cache": {"buckets": "square"},
            "train": {
                "repeats": 11,
                "base_model_precision": "int8-quanto",  # not auto: quanto's stays quanto's
                "lora": {"rank": 16, "targets": ["qkv"]},
                "tread": {"routes": [{"selection_ratio": 0.5, "start_layer_idx": 2, "end_layer_idx": -2}]},
                "memory": {"enable_group_offload": True},
                "validation": {"width": 1024, "height": 1024, "prompt_library": "config/user_prompt_library.json"},
            },
        }, form
        assert moved.commands == [
            "k5cache encode datasets/my_images --recipe my.toml --out cache/my-image-dataset",
            "k5train run cache/my-image-dataset --recipe my.toml --out output/models",
        ]
        assert not [row for row in moved.rows if row.outcome in ("unknown", "not supported")]
        keys_said = {row.key for row in moved.rows}
        assert {*keys, "tread_config", *BACKENDS[0], *BACKENDS[1]} <= keys_said
    check_commands(moved)
    assert said(moved)["repeats"] == "taken over: repeats = 11, because 10 there is 11 passes"
    assert said(moved)["offload_during_startup"].startswith("not needed: stage 1 loads one encoder at a time")


# A key of SimpleTuner -> what it sets here, as a recipe that differs from the defaults.
TAKEN: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"model_flavour": "t2i-lite-pretrain"}, {"model": {"flavour": "t2i-lite-pretrain"}}),
    ({"pretrained_model_name_or_path": "kandinskylab/Kandinsky-5.0-T2I-Lite-pretrain-Diffusers"},
     {"model": {"flavour": "t2i-lite-pretrain"}}),
    ({"max_train_steps": "2000", "num_train_epochs": 0}, {"steps": 2000}),
    ({"max_train_steps": 0, "num_train_epochs": 7}, {"epochs": 7}),
    ({"optimizer": "prodigy", "learning_rate": 1, "adam_beta2": "0.99"},
     {"optim": {"optimizer": "prodigy", "lr": 1.0, "betas": [0.9, 0.99]}}),
    ({"optimizer": "bnb-lion8bit", "optimizer_config": "weight_decay=0.01,betas=(0.8,0.9)"},
     {"optim": {"optimizer": "lion", "weight_decay": 0.01, "betas": [0.8, 0.9]}}),
    ({"optimizer": "adamw_schedulefree", "lr_scheduler": "polynomial"}, {"optim": {"optimizer": "schedulefree"}}),
    ({"lr_end": "1e-5", "learning_rate": 1e-4, "lr_scheduler": "cosine"},
     {"optim": {"lr": 1e-4, "lr_end": 0.1, "lr_scheduler": "cosine"}}),
    ({"use_ema": True, "ema_decay": 0.99}, {"optim": {"ema_decay": 0.99}}),
    ({"use_ema": "false", "ema_decay": 0.99}, {}),
    ({"lora_alpha": 8, "lora_dropout": 0.1, "init_lora": "a.safetensors"},
     {"lora": {"alpha": 8.0, "dropout": 0.1, "init_lora": "a.safetensors"}}),
    ({"lora_type": "lycoris", "lora_rank": 4, "lycoris_config": {
        "algo": "lokr", "multiplier": 1.0, "linear_dim": 10000, "linear_alpha": 1, "factor": 10,
        "apply_preset": {"target_module": ["Attention", "FeedForward"], "module_algo_map": {}}}},
     {"lora": {"algo": "lokr", "rank": 10000, "decompose_factor": 10}}),
    ({"use_dora": True}, {"lora": {"algo": "dora"}}),
    ({"base_model_precision": "no_change", "enable_group_offload": True}, {"base_model_precision": "no_change"}),
    ({"checkpointing_steps": 100, "checkpoints_total_limit": 3},
     {"checkpoint_every": 100, "checkpoints_total_limit": 3}),
    ({"report_to": "wandb,comet_ml", "tracker_project_name": "p"}, {"trackers": {"use": ["wandb"], "project": "p"}}),
    ({"validation_prompt": "a cat", "validation_steps": 50, "validation_resolution": "768", "disable_benchmark": True},
     {"validation": {"prompts": ["a cat"], "every": 50, "width": 768, "height": 768, "before": False}}),
    ({"validation_prompt": "a cat", "validation_disable": True}, {}),
    ({"flow_use_beta_schedule": True, "flow_beta_schedule_alpha": 3},
     {"objective": {"sigma_sampling": "beta", "beta_schedule_alpha": 3.0}}),
    ({"disable_segmented_timestep_sampling": False, "masked_loss_probability": 1.0},
     {"objective": {"stratified_sigmas": True, "masked_loss": True}}),
    ({"scheduled_sampling_max_step_offset": 5, "scheduled_sampling_probability": 0.2},
     {"rollout": {"max_steps": 5, "probability": 0.2}}),
    ({"text_encoder_1_precision": "int8-quanto", "vae_dtype": "bf16", "tokenizer_max_length": 256},
     {"cache": {"text_encoder_1_precision": "int8", "vae_precision": "bf16", "max_sequence_length": 256}}),
]  # fmt: skip


def test_every_key_of_simpletuners_config_is_taken_over_as_the_value_that_it_means(home):
    for config, expected in TAKEN:
        moved = simple(config)
        values = values_of(moved)
        values["train"].get("lora", {}).pop("targets", None) if config.get("lora_type") is None else None
        train = {key: value for key, value in values["train"].items() if value != {}}
        ours = {"model": expected.get("model", {}), "cache": expected.get("cache", {})}
        wanted = {key: value for key, value in expected.items() if key not in ours}
        assert (values["model"], values["cache"], train) == (ours["model"], ours["cache"], wanted), config
        assert config.keys() <= {row.key.partition(".")[0] for row in moved.rows}


# A backend of SimpleTuner -> [cache] and the options of the data.
DATA: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"resolution": 1.0}, {}), ({"resolution": 0.25, "resolution_type": "area"}, {"resolution": 512}),
    ({"resolution": 1.05, "resolution_type": "area", "crop": True, "crop_aspect": "closest"}, {}),
    ({"resolution": 500, "resolution_type": "pixel"}, {"resolution": 496}),
    ({"crop": False, "crop_aspect": "square"}, {"crop": "none"}), ({"crop_aspect": "preserve"}, {"crop": "none"}),
    ({"crop_style": "random", "crop": True}, {"crop": "random"}),
    ({"crop": True, "crop_style": "random"}, {"crop": "random"}),
    ({"caption_strategy": "filename", "instance_prompt": "x"}, {"caption_strategy": "filename"}),
    ({"caption_strategy": "instanceprompt", "instance_prompt": 'a "b"\n'},
     {"caption_strategy": "instanceprompt", "instance_prompt": 'a "b"\n'}),
    ({"only_instance_prompt": True, "instance_prompt": "a b"},
     {"caption_strategy": "instanceprompt", "instance_prompt": "a b"}),
    ({"prepend_instance_prompt": True, "instance_prompt": "sks"}, {"trigger": "sks"}),
    ({"minimum_image_size": 512}, {"minimum_image_size": 512}),
    ({"minimum_image_size": 0.25, "resolution": 1, "resolution_type": "area"}, {"minimum_image_size": 512}),
    ({"disable_multiline_split": True}, {"caption_lines": "whole"}), ({"caption_shuffle": {"enable": False}}, {}),
    ({"caption_shuffle": {"enable": True, "count": 2, "position_start": 1, "seed": 4}},
     {"shuffle_tags": True, "caption_variants": 3, "keep_tokens": 1}),
    ({"caption_strategy": "parquet", "parquet": {"path": "t.parquet", "caption_column": "c", "filename_column": "f"}},
     {"caption_strategy": "metadata", "caption_column": "c", "image_column": "f"}),
]  # fmt: skip


def test_every_key_of_a_backend_is_an_option_of_its_cache(home):
    for backend, expected in DATA:
        moved = simple({}, [{"id": "a", "instance_data_dir": "datasets/my_images", **backend}])
        assert values_of(moved)["cache"] == expected, backend
        assert backend.keys() <= {row.key.partition(".")[0] for row in moved.rows}
        check_commands(moved)
    assert "encode t.parquet" in moved.commands[0]


def test_several_backends_become_several_caches_and_those_left_out_are_named(home):
    moved = simple(
        {"resolution": 512},
        [
            {"id": "a/1", "instance_data_dir": "it's \"A\" картинки", "repeats": 0},
            {"id": "a_1", "instance_data_dir": "B", "resolution": 768, "crop": False, "repeats": "2"},
            {"id": "reg", "instance_data_dir": "R", "is_regularisation_data": True,
             "caption_strategy": "instanceprompt", "instance_prompt": "a 'cat'"},
            {"id": "off", "instance_data_dir": "O", "disabled": True},
            {"id": "s3", "type": "aws", "aws_secret_access_key": "AKIAABCDEFGHIJKLMNOP", "aws_bucket_name": "b"},
        ],
    )  # fmt: skip
    values = values_of(moved)
    assert values["cache"] == {}
    assert values["train"]["data"] == [
        {"cache": "cache/a_1", "repeats": 1, "repeats_by_folder": False, "is_regularisation_data": False},
        {"cache": "cache/a_1-2", "repeats": 3, "repeats_by_folder": False, "is_regularisation_data": False},
        {"cache": "cache/reg", "repeats": 1, "repeats_by_folder": False, "is_regularisation_data": True},
    ]
    assert [shlex.split(line) for line in moved.commands] == [
        ["k5cache", "encode", "it's \"A\" картинки", "--recipe", "my.toml", "--set", "cache.resolution=512",
         "--out", "cache/a_1"],
        ["k5cache", "encode", "B", "--recipe", "my.toml", "--set", 'cache.crop="none"', "--set",
         "cache.resolution=768", "--out", "cache/a_1-2"],
        ["k5cache", "encode", "R", "--recipe", "my.toml", "--set", 'cache.caption_strategy="instanceprompt"', "--set",
         "cache.resolution=512", "--set", 'cache.instance_prompt="a \'cat\'"', "--out", "cache/reg"],
        ["k5train", "run", "--recipe", "my.toml"],
    ]  # fmt: skip
    left_out = {row.where: row.text for row in moved.rows if row.text.startswith("left out")}
    assert left_out == {
        "b.json, off": "left out: it is disabled",
        "b.json, s3": "left out: images are read from this machine or the hub: download them",
    }


def test_for_image_to_image_the_conditioning_data_are_the_sources(home):
    config = {"model_flavour": "i2i-lite-sft", "validation_prompt": "a cat"}
    after = {"id": "after", "instance_data_dir": "A", "conditioning_data": "before"}
    before = {"id": "before", "dataset_type": "conditioning", "conditioning_type": "reference_strict",
              "instance_data_dir": "B"}  # fmt: skip
    moved = simple(config, [after, before])
    assert moved.commands[0] == "k5cache encode A --sources B --recipe my.toml --out cache/after"
    assert values_of(moved)["train"].get("validation", {}) == {}
    assert said(moved)["validation_prompt"].startswith("not supported: image-to-image draws pairs")
    check_commands(moved)


def test_values_that_are_not_here_are_named_and_never_dropped_in_silence(home):
    answers = {
        "optimizer": ("soap", "not supported: train.optim.optimizer has adafactor"),
        "lr_scheduler": ("sine", "not supported: train.optim.lr_scheduler has constant"),
        "base_model_precision": ("int4-quanto", "not supported: the base is int8 or bf16"),
        "group_offload_type": ("leaf_level", "not supported: it does not exist: one block is the smallest group"),
        "lora_rank": (0, "not supported: train.lora.rank must be at least 1, found 0"),
        "snr_gamma": (5, "not supported: weights by noise"),
        "push_to_hub": (True, "not supported: upload"),
        "noise_offset": (0, "not needed: this is what happens here anyway"),
        "frobnicate": ([1], "unknown: "),
        "validation_resolution": ("1000x1000", "not supported: train.validation.height must be a multiple of 16"),
        "max_grad_norm": (None, "not needed: it is not set"),
        "model_type": ("full", 'not supported: it must be "lora"'),
        "resolution": (512, "not supported: it is about data"),
    }
    moved = simple({key: value for key, (value, _) in answers.items()})
    found = said(moved)
    for key, (_, answer) in answers.items():
        assert found[key].startswith(answer), (key, found[key])
    comments = "\n".join(line for line in moved.text.splitlines() if line.startswith("#"))
    assert all(f"  {key}: " in comments for key in answers if found[key].startswith(("not supported", "unknown")))


# musubi-tuner's docs/dataset_config.md and a fork's docs/kandinsky5.md, without what belongs to video.
MUSUBI_DATA = """
[general]
resolution = [960, 544]
caption_extension = ".txt"
batch_size = 1
enable_bucket = true
bucket_no_upscale = false

[[datasets]]
image_directory = "datasets/my_images"
cache_directory = "/path/to/cache_directory"
num_repeats = 2
"""
MUSUBI = r"""
accelerate launch --num_cpu_threads_per_process 1 --mixed_precision bf16 \
    kandinsky5_train_network.py \
    --mixed_precision bf16 \
    --dataset_config dataset.toml --task k5-pro-t2v-5s-sd --dit k5.safetensors --vae v.safetensors \
    --fp8_base --sdpa --gradient_checkpointing --max_data_loader_n_workers 1 --persistent_data_loader_workers \
    --learning_rate 1e-4 --optimizer_type AdamW8Bit --optimizer_args "weight_decay=0.001" "betas=(0.9,0.95)" \
    --max_grad_norm 1.0 --lr_scheduler constant_with_warmup --lr_warmup_steps 100 \
    --network_module networks.lora_kandinsky --network_dim 16 --network_alpha 8 \
    --timestep_sampling shift --discrete_flow_shift 5.0 --min_timestep 0 --max_timestep 875 \
    --output_dir path/to/output --output_name k5_lora --save_every_n_epochs 1 --max_train_epochs 50
"""


def test_a_command_line_of_musubi_tuner_becomes_a_recipe(home):
    write("dataset.toml", MUSUBI_DATA)
    moved = turn(write("train.sh", MUSUBI))
    assert values_of(moved) == {
        "model": {},
        "cache": {"resolution": 720, "caption_lines": "whole"},
        "train": {
            "name": "k5_lora", "epochs": 50, "repeats": 2, "flow_schedule_shift": 5.0,
            "lora": {"rank": 16, "alpha": 8.0},
            "optim": {"optimizer": "adamw8bit", "lr": 1e-4, "weight_decay": 0.001},
            "objective": {"sigma_max": 0.875},
        },
    }  # fmt: skip
    assert said(moved)["min_timestep"] == "not needed: this is what happens here anyway"
    assert said(moved)["fp8_base"].startswith("not supported: the base is int8 or bf16")
    assert said(moved)["dit"].startswith("not needed: the checkpoint is model.flavour")
    assert moved.commands[-1] == "k5train run cache/my_images --recipe my.toml --out path/to/output"
    check_commands(moved)


# sd-scripts' docs/config_README-en.md.
SD_SCRIPTS = r"""
[general]
shuffle_caption = true
caption_extension = '.txt'
keep_tokens = 1

[[datasets]]
resolution = 512
batch_size = 4
keep_tokens = 2
  [[datasets.subsets]]
  image_dir = 'C:\hoge'
  class_tokens = 'hoge girl'
  [[datasets.subsets]]
  is_reg = true
  image_dir = 'C:\reg'
  class_tokens = 'human'

[[datasets]]
resolution = [768, 768]
batch_size = 2
  [[datasets.subsets]]
  image_dir = 'C:\piyo'
  flip_aug = true
"""


def test_a_dataset_config_of_sd_scripts_becomes_a_cache_a_subset(home):
    moved = turn(write("data.toml", SD_SCRIPTS))
    values = values_of(moved)
    assert values["cache"] == {"shuffle_tags": True}
    assert values["train"]["batch_size"] == 4
    assert [entry["is_regularisation_data"] for entry in values["train"]["data"]] == [False, True, False]
    assert "--set cache.resolution=768" in moved.commands[2]
    assert "--set cache.flip=true" in moved.commands[2]
    assert "--set 'cache.instance_prompt=\"hoge girl\"'" in moved.commands[0]
    keeps = [re.search(r"cache.keep_tokens=(\d)", line) for line in moved.commands[:3]]
    assert [keep[1] for keep in keeps if keep] == ["2", "2", "1"]
    assert "--set 'cache.caption_lines=\"first\"'" in moved.commands[2]  # no instance_prompt: its captions are in files
    third = [row for row in moved.rows if row.where == "data.toml, dataset 2.1"]
    assert {row.key for row in third} >= {"resolution", "batch_size", "image_dir", "flip_aug", "keep_tokens"}


CAPTION_KEYS: list[tuple[str, dict[str, Any]]] = [
    ("caption_extension = '.caption'", {"caption_extension": "caption", "caption_lines": "first"}),
    ("caption_prefix = 'sks,'\ncaption_suffix = 'at dusk'",
     {"caption_prefix": "sks, ", "caption_suffix": " at dusk", "caption_lines": "first"}),
    ("shuffle_caption = true\nkeep_tokens = 2", {"shuffle_tags": True, "keep_tokens": 2, "caption_lines": "first"}),
    ("shuffle_caption = false\nkeep_tokens = 2", {"caption_lines": "first"}),
    ("enable_wildcard = true", {"wildcards": True}),
    ("caption_separator = ','\ncaption_separator2 = 1", {"caption_lines": "first"}),
]  # fmt: skip


def test_keys_about_captions_mean_the_same_here(home):
    """sd-scripts: a prefix and a suffix stand beside a space, and without wildcards only the first line is used."""
    for keys, expected in CAPTION_KEYS:
        moved = turn(write("d.toml", f'[[datasets]]\n[[datasets.subsets]]\nimage_dir = "datasets/my_images"\n{keys}\n'))
        assert values_of(moved)["cache"] == expected, keys
        check_commands(moved)
    assert [row.key for row in moved.rows if row.outcome == "unknown"] == ["caption_separator2"]


def test_a_training_folder_of_sd_scripts_has_its_repeats_in_the_names_of_its_folders(home):
    for name in ("10_sks cat", "2_sks dog", "notes"):
        (home / "imgs" / name).mkdir(parents=True)
    write("imgs/2_sks dog/a.txt", "a dog")
    config = '[network]\nnetwork_dim = 4\nnetwork_alpha = 0\n[train]\ntrain_data_dir = "imgs"\nresolution = "768,768"\n'
    moved = turn(write("k.toml", config))
    assert [entry["repeats"] for entry in values_of(moved)["train"]["data"]] == [10, 2]
    assert values_of(moved)["cache"] == {"resolution": 768}
    cat, dog, _ = map(shlex.split, moved.commands)
    assert cat[2:3] == ["imgs/10_sks cat"]
    assert 'cache.instance_prompt="sks cat"' in cat
    assert [b for a, b in itertools.pairwise(dog) if a == "--set"] == ['cache.caption_lines="first"']
    assert said(moved)["train_data_dir"] == "taken over: 2 caches: see the data below"
    prompts = write("p.txt", "# mine\na cat --w 832 --d 1\n\na dog\n")
    assert values_of(turn(Path("k.toml"), prompts=prompts))["train"]["validation"]["prompts"] == ["a cat", "a dog"]


# ai-toolkit's config/examples/train_lora_flux_24gb.yaml.
AI_TOOLKIT = """
---
job: extension
config:
  name: "my_first_lora_v1"
  process:
    - type: 'sd_trainer'
      training_folder: "output"
      device: cuda:0
      trigger_word: "p3r5on"
      network:
        type: "lora"
        linear: 16
        linear_alpha: 16
      save:
        dtype: float16
        save_every: 250
        max_step_saves_to_keep: 4
        push_to_hub: false
      datasets:
        - folder_path: "/path/to/images/folder"
          caption_ext: "txt"
          caption_dropout_rate: 0.05
          shuffle_tokens: false
          cache_latents_to_disk: true
          resolution: [ 512, 768, 1024 ]
      train:
        batch_size: 1
        steps: 2000
        gradient_accumulation_steps: 1
        train_unet: true
        train_text_encoder: false
        gradient_checkpointing: true
        noise_scheduler: "flowmatch"
        optimizer: "adamw8bit"
        lr: 1e-4
        diff_output_preservation: true
        diff_output_preservation_multiplier: 0.8
        diff_output_preservation_class: "person"
        ema_config:
          use_ema: true
          ema_decay: 0.99
        dtype: bf16
      model:
        name_or_path: "black-forest-labs/FLUX.1-dev"
        is_flux: true
        quantize: true
      sample:
        sampler: "flowmatch"
        sample_every: 200
        sample_start_step: 0
        width: 1024
        height: 1024
        prompts:
          - "[trigger] holding a coffee cup"
        neg: ""
        seed: 42
        walk_seed: true
        guidance_scale: 4
        sample_steps: 20
meta:
  name: "[name]"
  version: '1.0'
"""


def test_a_job_of_ai_toolkit_becomes_a_recipe_and_each_resolution_a_cache(home):
    moved = turn(write("train.yaml", AI_TOOLKIT))
    assert values_of(moved) == {
        "model": {},
        "cache": {"caption_lines": "whole", "trigger": "p3r5on", "class_word": "person"},
        "train": {
            "name": "my_first_lora_v1", "steps": 2000, "caption_dropout_probability": 0.05,
            "checkpoints_total_limit": 4, "base_model_precision": "int8-quanto",
            "lora": {"rank": 16, "alpha": 16.0},
            "optim": {"optimizer": "adamw8bit", "lr": 1e-4, "ema_decay": 0.99},
            "objective": {"preservation_weight": 0.8},
            "validation": {"prompts": ["p3r5on holding a coffee cup"], "every": 200, "width": 1024, "height": 1024,
                           "guidance_scale": 4.0, "num_inference_steps": 20},
            "data": [
                {"cache": f"cache/folder-{side}", "repeats": 1, "repeats_by_folder": False,
                 "is_regularisation_data": False}
                for side in (512, 768, 1024)
            ],
        },
    }  # fmt: skip
    assert [row.key for row in moved.rows if row.outcome == "unknown"] == []
    lost = {row.key for row in moved.rows if row.outcome == "not supported"}
    assert lost == {"model.name_or_path", "sample.walk_seed"}
    check_commands(moved)
    off = turn(write("off.yaml", AI_TOOLKIT.replace("preservation: true", "preservation: false")))
    assert "class_word" not in values_of(off)["cache"]
    assert said(off)["train.diff_output_preservation_class"] == "not needed: this is what happens here anyway"
    without = turn(write("without.yaml", AI_TOOLKIT.replace('trigger_word: "p3r5on"', 'trigger_word: ""')))
    assert said(without)["train.diff_output_preservation"].startswith("not supported: it needs trigger_word")


SECRET = "hf_" + "abcdefghijklmnopqrst"


def test_credentials_are_neither_shown_nor_written(home):
    config = {
        "model_family": "kandinsky5-image", "hub_token": "s3cr3t-1", "WANDB_API_KEY": "s3cr3t-2",
        "webhook_config": {"webhook_url": "https://x/s3cr3t-3"}, "validation_prompt": f"a cat {SECRET}",
        "tracker_project_name": "0123456789abcdef0123456789abcdef01234567", "x": [{"y": SECRET}],
        "lora_rank": SECRET, "pretrained_model_name_or_path": "https://me:s3cr3t-4@example.org/x",
    }  # fmt: skip
    write("c.json", json.dumps(config))
    done = Cli(home)(app, "import", "c.json", "-o", "my.toml", "--json")
    assert done.code == 0
    text = done.out + done.err + Path("my.toml").read_text(encoding="utf-8")
    assert not re.search(r"s3cr3t|hf_a|0123456789abcdef", text)
    rows = {row["key"]: row for row in json.loads(done.out)["keys"]}
    assert rows["hub_token"]["value"] == "(hidden)"
    assert rows["hub_token"]["text"].startswith("credentials are not copied")


# A file -> words of the error; None where a name, not its content, is what is wrong.
BAD: dict[str, tuple[str | bytes, str]] = {
    "no.json": ("{", "no.json is not JSON"), "list.json": ("[{}]", "list.json is a list"),
    "text.json": ('"x"', "text.json is no config"), "deep.json": ('{"a":' + "[" * 100_000, "nested too deeply"),
    "half of a letter.json": ('{"seed": "\\ud800"}', "is not Unicode"),
    "twice.json": ('{"a": 1, "a": 2}', "has the key a twice"), "big.json": (b" " * (2 << 20), "at most"),
    "spelt.json": ('{"--seed": 1, "seed": 2}', "has the key seed twice, in two spellings"),
    "nobody.json": ('{"a": 1}', "has no key of SimpleTuner"), "bytes.json": (b"\xff\xfe{", "is not UTF-8"),
    "ours.toml": ("[train]\nsteps = 5\n", "is a recipe of k5train already"),
    "empty.env": ("# nothing\n", "is empty"), "twice.env": ("SEED=1\nSEED=2\n", "has the key SEED twice"),
    "quote.env": ("SEED='1\n", "has a quote that does not end"), "twice.toml": ("a = 1\na = 2\n", "is not TOML"),
    "twice.yaml": ("job: x\njob: y\n", "has the key job twice"), "no.yaml": ("a: [1\nb: }", "at line"),
    "code.yaml": ("job: !!python/object/apply:os.system ['x']\n", "at line 1"),
    "bomb.yaml": ("job: x\na: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
        f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)), "more than"),
    "other.json": ('{"model_family": "flux"}', "trains flux, and here only Kandinsky 5.0 Image is trained"),
    "video.json": ('{"model_family": "kandinsky5-video"}', "trains kandinsky5-video"),
    "flavour.json": ('{"model_family": "kandinsky5-image", "model_flavour": "t2v"}', "there is no such"),
    "type.json": ('{"model_family": "kandinsky5-image", "lora_rank": "many"}', "must be a whole number, found many"),
    "half.json": ('{"model_family": "kandinsky5-image", "lora_rank": 1.5}', "must be a whole number, found 1.5"),
    "bool.json": ('{"model_family": "kandinsky5-image", "seed": true}', "must be a whole number, found true"),
    "nan.json": ('{"model_family": "kandinsky5-image", "learning_rate": [1]}', "must be a number, found [1]"),
    "inf.json": ('{"model_family": "kandinsky5-image", "max_train_steps": Infinity}', "must be a whole number"),
    "flag.json": ('{"model_family": "kandinsky5-image", "use_ema": "perhaps"}', "must be true or false"),
    "tread.json": ('{"model_family": "kandinsky5-image", "tread_config": {"routes": [1]}}', "a table with routes"),
    "lyco.json": ('{"model_family": "kandinsky5-image", "lycoris_config": "gone.json"}', "there is no such file"),
    "data.json": ('{"model_family": "kandinsky5-image", "data_backend_config": "gone.json"}', "--data FILE"),
    "job.yaml": ("job: x\nconfig: [1]\n", "has no config.process"),
    "general.toml": ("general = 1\n[[datasets]]\nimage_dir = 'x'\n", "general must be a table"),
    "sets.toml": ("datasets = [1]\n", "dataset 1 is not a table"),
    "nothing.toml": ("[[datasets]]\nvideo_directory = 'x'\n", "has no folder of images"),
}  # fmt: skip


def test_bad_files_end_with_two_lines_and_write_nothing(home):
    for name, (content, words) in BAD.items():
        Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
        with pytest.raises(RecipeError) as caught:
            turn(Path(name))
        assert words in str(caught.value), name
        assert len(str(caught.value).splitlines()) == 2, name
    cli = Cli(home)
    for name in ("no.json", "gone.json", ".", "/dev/zero"):
        done = cli(app, "import", name)
        assert (done.code, len(done.err.splitlines()), "Traceback" in done.err) == (2, 2, False), (name, done)
    assert not Path("imported.toml").exists()


@pytest.mark.parametrize(
    ("backends", "words"),
    [
        ({}, "is not a list of data backends"), ([1], "is not a list of data backends"),
        ([], "has no backend with images"), ([{"id": "a"}], "names no images"),
        ([{"id": "a", "instance_data_dir": "d", "repeats": -1}], "repeats must be a whole number of at least 0"),
        ([{"id": "a", "instance_data_dir": "d", "resolution": "big"}], "resolution must be a number, found big"),
        ([{"id": "a", "instance_data_dir": "d", "resolution_type": "x"}], "pixel, area or pixel_area"),
        ([{"id": "a", "instance_data_dir": ["d"]}], "instance_data_dir must be text"),
        ([{"id": "a", "instance_data_dir": "d", "disabled": "maybe"}], "disabled must be true or false"),
        ([{"id": "a", "instance_data_dir": "d", "caption_strategy": "instanceprompt"}], "asks for an instance_prompt"),
    ],
)  # fmt: skip
def test_bad_backends_are_refused(home, backends, words):
    with pytest.raises(RecipeError, match=words):
        simple({}, backends)


def test_a_recipe_is_replaced_only_if_nobody_has_edited_it(home):
    cli, config = Cli(home), write("config/config.json", json.dumps(QUICKSTART))
    first = cli(app, "import", str(config), "-o", "my.toml")
    assert (first.code, first.err.count("error")) == (0, 0)
    for option in ("gradient_accumulation_steps", "train.validation.prompt_library", "train.base_model_precision"):
        assert option in first.out, "a name is cut within a word"
    before = Path("my.toml").read_text(encoding="utf-8")
    write("config/config.json", json.dumps({**QUICKSTART, "seed": 7}))
    assert cli(app, "import", str(config), "-o", "my.toml").code == 0
    assert tomllib.loads(Path("my.toml").read_text(encoding="utf-8"))["train"]["seed"] == 7
    edited = write("my.toml", before.replace("rank = 16", "rank = 8"))
    done = cli(app, "import", str(config), "-o", "my.toml")
    assert (done.code, "has been edited since it was made" in done.err) == (2, True)
    assert edited.read_text(encoding="utf-8") == before.replace("rank = 16", "rank = 8")
    with pytest.raises(OutputError, match="not of this command"):
        check_target(write("other.toml", "[train]\n"), "new")
    assert cli(cache_app, "encode", "nothing", "--recipe", "my.toml").code == 2  # it parses there too


TABLES_OF_THE_PAGE = {
    "SimpleTuner: config.json": simpletuner.RULES,
    "SimpleTuner: multidatabackend.json": simpletuner_data.DATA_RULES,
    "kohya and musubi-tuner: training": kohya.RULES,
    "kohya and musubi-tuner: datasets": kohya_data.DATA_RULES,
    "ai-toolkit: the job": ai_toolkit.RULES,
    "ai-toolkit: datasets": ai_toolkit.DATA_RULES,
}


def test_the_page_has_every_key_that_is_known():
    page = (ROOT / "docs" / "moving_over.md").read_text(encoding="utf-8")
    for heading, rules in TABLES_OF_THE_PAGE.items():
        by_meaning: dict[str, list[str]] = {}
        for key, rule in rules.items():
            by_meaning.setdefault(rule.says, []).append(f"`{key}`")
        rows = [f"| {', '.join(names)} | {says.replace('|', chr(92) + '|')} |" for says, names in by_meaning.items()]
        table = "\n".join(["| there | here |", "|---|---|", *rows])
        assert f"## {heading}\n\n{table}\n" in page, f"Write this under {heading}:\n\n{table}"


def test_every_option_that_a_rule_names_is_one():
    named = {
        name
        for rules in TABLES_OF_THE_PAGE.values()
        for rule in rules.values()
        for name in re.findall(r"\b(?:train|cache|model)\.[a-z_.0-9]*[a-z0-9]\b", rule.says)
    }
    assert len(named) > 60
    options = option_list.as_toml(SCHEMAS)
    tables = dict(re.findall(r"^\[([\w.]+)\]\n(.*?)(?=^\[|\Z)", options, re.M | re.S))
    for name in named - {"train.objective", "train.data"}:
        table, _, key = name.rpartition(".")
        assert re.search(rf"^(?:# )?{key} =", tables[table], re.M), name
