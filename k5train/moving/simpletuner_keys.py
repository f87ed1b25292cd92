"""What becomes of the keys of SimpleTuner that are no single option here: sizes, betas, EMA, LyCORIS, TREAD?"""

from __future__ import annotations

import ast
import json
import re
from typing import Any

from k5cache.shared.errors import RecipeError
from k5cache.shared.inside import name_problem
from k5cache.shared.model import FLAVOURS
from k5train.moving.draft import Draft, Entry, flag, number, text, wrong_type
from k5train.moving.read import locate, read
from k5train.moving.rules import Rule, special

FAMILY = "kandinsky5-image"
_EMA = 0.999  # where use_ema is set without ema_decay


def take_family(draft: Draft, entry: Entry) -> None:
    """Refuse another model."""
    if text(entry).lower() != FAMILY:
        raise RecipeError(
            f"{entry.where} trains {entry.value}, and here only Kandinsky 5.0 Image is trained",
            f"Give a config with model_family {FAMILY}",
        )
    draft.say(entry, "not needed", "no other model is trained here")


def take_flavour(draft: Draft, entry: Entry) -> None:
    """The published checkpoint."""
    if text(entry) not in FLAVOURS:
        raise RecipeError(
            f"{entry.where}: {entry.key} is {entry.value!r:.60}, and there is no such Kandinsky 5.0 Image",
            f"Set it to one of {', '.join(FLAVOURS)}",
        )
    draft.take(entry, "model.flavour", entry.value)


def take_model(draft: Draft, entry: Entry) -> None:
    """A folder or repository."""
    by_repository = {repository: flavour for flavour, repository in FLAVOURS.items()}
    path = text(entry)
    if path in by_repository:
        draft.take(entry, "model.flavour", by_repository[path])
    else:
        draft.take(entry, "model.path", path)


def take_name(draft: Draft, entry: Entry) -> None:
    """The name of a run, which is that of its folder and of its LoRA."""
    problem = name_problem(text(entry))
    if problem:
        draft.say(entry, "not supported", f"as train.name it {problem}")
    else:
        draft.take(entry, "train.name", text(entry))


def take_output(draft: Draft, entry: Entry) -> None:
    """The folder of runs."""
    draft.run = text(entry)
    draft.say(entry, "taken over", "k5train run -o, if the folder is new or a run: see the commands")


def take_size(draft: Draft, entry: Entry) -> None:
    """``1024x1024``, ``1024`` or several of these."""
    sizes = text(entry).replace(" ", "").split(",")
    match = re.fullmatch(r"(\d{1,5})(?:\.0)?(?:[xX*](\d{1,5}))?", sizes[0])
    if not match:
        raise wrong_type(entry, "a size such as 1024x1024")
    width, height = int(match[1]), int(match[2] or match[1])
    note = f"the first of {len(sizes)} sizes" if len(sizes) > 1 else ""
    draft.take(entry, "train.validation.width", width, note)
    draft.take(entry, "train.validation.height", height)


def above_zero(option: str, otherwise: str) -> Rule:
    """A number of which 0 means that it is not set."""

    def act(draft: Draft, entry: Entry) -> None:
        if number(entry) > 0:
            draft.take(entry, option, entry.value)
        else:
            draft.say(entry, "not needed", otherwise)

    return special(f"`{option}`; 0 is: {otherwise}", act)


def take_betas(draft: Draft, entry: Entry) -> None:
    """One of the two betas."""
    place = 1 if entry.key.endswith("2") else 0
    betas = list(draft.value("train.optim.betas") or (0.9, 0.95))
    betas[place] = number(entry)
    draft.take(entry, "train.optim.betas", betas)


def take_lr_end(draft: Draft, entry: Entry) -> None:
    """A rate there, a share of the rate here."""
    lr = draft.value("train.optim.lr")
    if not lr:
        draft.say(entry, "not supported", "train.optim.lr_end is a share of the rate, and learning_rate is not set")
        return
    draft.take(entry, "train.optim.lr_end", float(f"{number(entry) / lr:.6g}"), "a share of lr here")


def take_optimizer_config(draft: Draft, entry: Entry) -> None:
    """``weight_decay=0.01,betas=(0.9,0.99)``, or a table."""
    pairs = entry.value.items() if isinstance(entry.value, dict) else optimizer_pairs(text(entry))
    for key, value in pairs:
        inner = Entry(entry.where, f"{entry.key}.{key}", value)
        take_optimizer_argument(draft, inner, key)


def optimizer_pairs(given: str) -> list[tuple[str, str]]:
    """``a=1,betas=(0.9,0.95)`` as pairs."""
    return re.findall(r"(\w+)=((?:\([^)]*\)|\[[^\]]*\]|[^,\s])*)", given)


def take_optimizer_argument(draft: Draft, entry: Entry, key: str) -> None:
    """Take over one argument of an optimizer."""
    if key in ("weight_decay", "eps"):
        draft.take(entry, f"train.optim.{key}", entry.value)
    elif key == "betas":
        given = re.findall(r"[\d.eE+-]+", entry.value) if isinstance(entry.value, str) else entry.value
        if not isinstance(given, list) or len(given) < 2:
            raise wrong_type(entry, "two numbers")
        betas = [number(Entry(entry.where, entry.key, value)) for value in given[:2]]
        draft.take(entry, "train.optim.betas", betas)
    else:
        draft.say(entry, "not supported", "of an optimizer's arguments only betas, eps and weight_decay exist here")


def take_ema(draft: Draft, entry: Entry) -> None:
    """Whether there is a moving average."""
    if not flag(entry):
        draft.say(entry, "not needed", "it is off")
        draft.drop("train.optim.ema_decay", "use_ema is off", "not needed")
    elif draft.value("train.optim.ema_decay"):
        draft.say(entry, "taken over", "train.optim.ema_decay above 0")
    else:
        draft.take(entry, "train.optim.ema_decay", _EMA, "use_ema names no decay")


def take_trackers(draft: Draft, entry: Entry) -> None:
    """Names, in a list or with commas."""
    names = entry.value if isinstance(entry.value, list) else text(entry).split(",")
    names = [str(name).strip().lower() for name in names]
    known = [name for name in names if name in ("tensorboard", "wandb", "trackio")]
    if known:
        others = [name for name in names if name not in known]
        draft.take(entry, "train.trackers.use", known, f"without {', '.join(others)}" if others else "")
    elif names == ["none"]:
        draft.say(entry, "not needed", "metrics.jsonl is always written")
    else:
        draft.say(entry, "not supported", "train.trackers.use has tensorboard, wandb, trackio")


def take_prompt(draft: Draft, entry: Entry) -> None:
    """One prompt."""
    draft.take(entry, "train.validation.prompts", [text(entry)])


def nested(draft: Draft, entry: Entry, what: str) -> Any:
    """A table in the config, as text in it, or in a file that it names.

    Raises:
        RecipeError: it is none of them.
    """
    value = entry.value
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            try:
                value = ast.literal_eval(value)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                raise wrong_type(entry, what) from None
    if isinstance(value, str):
        path = locate(value, draft.config)
        if path is None:
            raise RecipeError(
                f"{entry.where}: {entry.key} names {value!r:.200}, and there is no such file",
                f"Put the file there, or write {what} in its place",
            )
        value = read(path)
    if not isinstance(value, dict):
        raise wrong_type(entry, what)
    return value


def take_tread(draft: Draft, entry: Entry) -> None:
    """Routes: a table, text or a file."""
    config = nested(draft, entry, "a table with routes")
    routes = config.get("routes")
    keys = ("selection_ratio", "start_layer_idx", "end_layer_idx")
    if not isinstance(routes, list) or not all(isinstance(r, dict) and set(r) == set(keys) for r in routes):
        raise wrong_type(entry, f"a table with routes, each with {', '.join(keys)}")
    numbers = [{key: number(Entry(entry.where, f"{entry.key}.{key}", r[key])) for key in keys} for r in routes]
    plain = [{key: int(v) if key != keys[0] and v.is_integer() else v for key, v in r.items()} for r in numbers]
    draft.take(entry, "train.tread.routes", plain)
    for key in config.keys() - {"routes"}:
        draft.say(Entry(entry.where, f"{entry.key}.{key}", config[key]), "unknown", "not in its documentation")


def take_lycoris(draft: Draft, entry: Entry) -> None:
    """A LyCORIS config: a table, text or a file."""
    config = nested(draft, entry, "a LyCORIS config")
    algo = str(config.get("algo", "lora")).lower()
    known = {"lokr": "lokr", "lora": "lora", "locon": "lora"}
    if algo not in known:
        draft.say(entry, "not supported", f"of LyCORIS only lokr and lora exist here, and it asks for {algo!r:.40}")
        return
    draft.take(entry, "train.lora.algo", known[algo])
    where = entry.where
    for key, value in config.items():
        _lycoris_key(draft, Entry(where, f"lycoris_config.{key}", value), key, known[algo])


def _lycoris_key(draft: Draft, entry: Entry, key: str, algo: str) -> None:
    options = {"linear_dim": "train.lora.rank"}
    options |= {"factor": "train.lora.decompose_factor"} if algo == "lokr" else {"linear_alpha": "train.lora.alpha"}
    if key in options:
        draft.take(entry, options[key], entry.value)
    elif key == "linear_alpha":
        draft.say(entry, "not needed", "a LoKr has no alpha here: its strength is 1")
    elif key == "apply_preset":
        _lycoris_preset(draft, entry)
    elif key == "algo" or (key == "multiplier" and entry.value == 1):
        draft.say(entry, "not needed", "as train.lora.algo says" if key == "algo" else "1 changes nothing")
    else:
        draft.say(entry, "not supported", "of a LyCORIS config, algo, linear_dim, factor and apply_preset exist here")


def _lycoris_preset(draft: Draft, entry: Entry) -> None:
    targets = entry.value.get("target_module", []) if isinstance(entry.value, dict) else []
    joined = " ".join(map(str, targets)).lower() if isinstance(targets, list) else ""
    if "attention" in joined:
        preset = "official" if "feedforward" in joined else "attention"
        extra = isinstance(entry.value, dict) and set(entry.value) - {"target_module"}
        note = "one factor for all modules: module_algo_map is not supported" if extra else "its modules by our name"
        draft.take(entry, "train.lora.targets", [preset], note)
    else:
        draft.say(entry, "not supported", "train.lora.targets has presets and patterns of module names")


def take_dora(draft: Draft, entry: Entry) -> None:
    """Whether it is a DoRA."""
    if flag(entry):
        draft.take(entry, "train.lora.algo", "dora")
    else:
        draft.say(entry, "not needed", "it is off")


def take_lora_type(draft: Draft, entry: Entry) -> None:
    """Which library trains the adapter."""
    if str(entry.value).lower() == "lycoris":
        draft.say(entry, "taken over", "train.lora.algo, as lycoris_config says")
        for option in ("rank", "alpha"):
            draft.drop(f"train.lora.{option}", "lycoris_config says it: linear_dim and linear_alpha", "not needed")
    elif str(entry.value).lower() == "standard":
        draft.say(entry, "not needed", "a LoRA is what is trained here unless train.lora.algo says otherwise")
    else:
        draft.say(entry, "not supported", "train.lora.algo has lora, rslora, dora, lokr")


def take_benchmark(draft: Draft, entry: Entry) -> None:
    """Whether pictures of the base are left out."""
    draft.take(entry, "train.validation.before", not flag(entry))


def leave_out_validation(draft: Draft, entry: Entry) -> None:
    """Whether nothing is drawn."""
    if not flag(entry):
        draft.say(entry, "not needed", "it is off")
        return
    draft.say(entry, "taken over", "without train.validation.prompts nothing is drawn")
    for option in ("prompts", "prompt_names", "prompt_library"):
        draft.drop(f"train.validation.{option}", "validation_disable is set")


def schedule(kind: str) -> Rule:
    """A flag that sets the distribution of sigma."""

    def act(draft: Draft, entry: Entry) -> None:
        if flag(entry):
            draft.take(entry, "train.objective.sigma_sampling", kind)
        else:
            draft.say(entry, "not needed", "it is off")

    return special(f'`train.objective.sigma_sampling = "{kind}"`', act)


def take_segments(draft: Draft, entry: Entry) -> None:
    """Whether sigmas are not stratified."""
    draft.take(entry, "train.objective.stratified_sigmas", not flag(entry))


def take_masked(draft: Draft, entry: Entry) -> None:
    """How often masks count."""
    share = number(entry)
    if share in (0, 1):
        draft.take(entry, "train.objective.masked_loss", share == 1, "where a cache has masks")
    else:
        draft.say(entry, "not supported", "masks count in all steps or in none: train.objective.masked_loss")
