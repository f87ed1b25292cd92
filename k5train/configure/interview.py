"""Which questions are asked, and what do they offer? Options that are given are not asked for; nothing is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k5cache.shared import console
from k5cache.shared.errors import DatasetError, RecipeError
from k5cache.shared.foreign import shown
from k5cache.shared.kind import Kind
from k5cache.shared.model import FLAVOURS
from k5train.configure import card
from k5train.configure.ask import Asker, Question, one_of
from k5train.configure.look import Seen, is_on_hub, lines, look

GOALS = {
    "style": "how pictures look: a painter's hand, a film, a kind of drawing",
    "character": "one person, animal or figure",
    "object": "one thing: a product, a toy, a building",
    "edit": "what is done to a picture, from pairs before and after (image-to-image)",
}
_ONE_CAPTION = {"style": "a picture", "character": "a person", "object": "an object"}
_FURTHER = {
    "style": "a lighthouse on a cliff at dusk",
    "character": "riding a bicycle through a city",
    "object": "on a wooden table by a window",
}
_UNRELATED = "a red bicycle leaning against a brick wall"
_USUAL_IMAGES = 200


@dataclass(frozen=True)
class Given:
    """Answers that the command line gives, as they were written. None: to be asked for."""

    source: str | None = None
    goal: str | None = None
    flavour: str | None = None
    sources: str | None = None
    images: str | None = None
    trigger: str | None = None
    captions: str | None = None
    caption: str | None = None
    vram: str | None = None
    prompts: Sequence[str] | None = None


def ask_source(asker: Asker, given: Given, offered: str | None) -> tuple[Path, Seen | None]:
    """Where the images are, and what is there. It is looked at for text-to-image, whose images need no source."""
    source, seen = asker.ask(
        Question(
            "Where are your images?", "SOURCE", _check_source, offered or _only_dataset(),
            ("A folder, a table or tars (.csv, .jsonl, .parquet, .tar), or a dataset on the hub (owner/name).",),
        ),
        given.source,
    )  # fmt: skip
    for line in lines(source, seen, "t2i"):
        console.note(line)
    return source, seen


def interview(source: Path, images: Seen | None, given: Given, offered: dict[str, Any], asker: Asker) -> dict[str, Any]:
    """All other answers, by their names in ``Answers``, and ``captions``: those of the images, without the trigger.

    Args:
        images: what is in ``source``, as ``ask_source`` gives it.
        offered: the answers of an earlier time, by the same names.
    """
    goal = _ask_goal(asker, given, offered)
    flavour = _ask_flavour(asker, given, offered, goal)
    kind: Kind = "i2i" if goal == "edit" else "t2i"
    sources, seen = _ask_sources(asker, given, offered, source) if kind == "i2i" else (None, images)
    if kind == "i2i":
        for line in lines(source, seen, kind):
            console.note(line)
    elif given.sources is not None:
        raise RecipeError("--sources is for image-to-image", "Leave it out, or add --goal edit")
    trigger = _ask_trigger(asker, given, offered, goal, seen)
    strategy, caption = _ask_captions(asker, given, offered, goal, seen)
    num_images = seen.captioned(strategy) if seen else asker.ask(
        Question("How many images has it?", "--images", _check_count, str(offered.get("num_images", _USUAL_IMAGES))),
        given.images,
    )  # fmt: skip
    if not num_images:
        raise DatasetError(f"None of the images in {source} has a caption", "Write captions, or answer with filename")
    size = card.size_of_card()
    vram = asker.ask(
        Question(
            "How much memory has your card?", "--vram", card.check_size, offered.get("vram") or size or card.USUAL,
            (f"A card of {size} is in this machine." if size else "No NVIDIA card was found here.",),
        ),
        given.vram,
    )  # fmt: skip
    prompts = _ask_prompts(asker, given, offered, goal, trigger, seen, caption)
    in_captions = bool(trigger and seen and _share_with(trigger, seen) > 0.5)
    return {
        "goal": goal, "flavour": flavour, "vram": vram, "num_images": num_images,
        "trigger": "" if in_captions else trigger, "prompts": tuple(prompts), "source": str(source),
        "sources": None if sources is None else str(sources), "caption_strategy": strategy, "instance_prompt": caption,
        "captions": (caption,) if caption else (seen.captions if seen else ()),
    }  # fmt: skip


def _check_source(answer: str) -> tuple[Path, Seen | None]:
    path = Path(answer).expanduser()
    if not answer:
        raise DatasetError("There must be images", "Name their folder")
    if not (path.exists() or is_on_hub(path) or any(mark in answer for mark in "*?[")):
        raise DatasetError(f"There is no folder or file {shown(answer)}", "Correct the path")
    return path, look(path)


def _only_dataset() -> str | None:
    folders = [path for path in Path("datasets").glob("*") if path.is_dir()] if Path("datasets").is_dir() else []
    return str(folders[0]) if len(folders) == 1 else None


def _ask_goal(asker: Asker, given: Given, offered: dict[str, Any]) -> str:
    if given.goal is None and given.flavour is not None and given.flavour.startswith("i2i"):
        return "edit"
    help = [f"{number}  {name:<10} {text}" for number, (name, text) in enumerate(GOALS.items(), 1)]
    return asker.ask(
        Question("What do you teach?", "--goal", one_of(list(GOALS)), offered.get("goal", "style"), help), given.goal
    )


def _ask_flavour(asker: Asker, given: Given, offered: dict[str, Any], goal: str) -> str:
    kind = "i2i" if goal == "edit" else "t2i"
    flavours = [flavour for flavour in FLAVOURS if flavour.startswith(kind)]
    before = offered.get("flavour")
    default = before if before in flavours else flavours[0]
    help = (
        f"1  {flavours[0]:<18} the finished model, which most people draw with",
        f"2  {flavours[1]:<18} the model before its finishing; the encoders, and so the cache, are the same",
    )
    question = Question("Which model?", "--flavour", one_of(flavours), default, help)
    return asker.ask(question, given.flavour)


def _ask_sources(asker: Asker, given: Given, offered: dict[str, Any], source: Path) -> tuple[Path | None, Seen | None]:
    """The folder of the sources of image-to-image, and what is in both."""
    if given.sources is None and not offered.get("sources"):
        try:
            return None, look(source, "i2i")  # pairs in one folder, or a table with a column of sources
        except DatasetError as error:
            if not source.is_dir():
                raise
            console.note(error.problem)

    def check(answer: str) -> tuple[Path, Seen | None]:
        folder = Path(answer).expanduser()
        if not answer or not folder.is_dir():
            raise DatasetError(f"There is no folder {shown(answer)}", "Correct the path")
        return folder, look(source, "i2i", folder)

    help = (f"The folder of the same pictures before the edit, under the same names as in {shown(str(source))}.",)
    return asker.ask(
        Question("Where are the pictures before the edit?", "--sources", check, offered.get("sources"), help),
        given.sources,
    )


def _ask_trigger(asker: Asker, given: Given, offered: dict[str, Any], goal: str, seen: Seen | None) -> str:
    before = offered.get("trigger")
    default = before if before is not None else ("ohwx" if goal in ("character", "object") else "")
    where = "behind each instruction" if goal == "edit" else "before each caption"
    help = [f"It is put {where}, and calls the LoRA when you draw. Answer - for none."]
    if goal in ("character", "object"):
        help.append('Use a word that means nothing, and perhaps a word for its kind behind it: "ohwx cat".')
    trigger = asker.ask(Question("Which trigger word?", "--trigger", str.strip, default, help), given.trigger)
    if trigger and seen and (share := _share_with(trigger, seen)) > 0.5:
        console.note(f"{share:.0%} of the captions have {shown(trigger)} already: it is not added again")
    return trigger


def _share_with(trigger: str, seen: Seen) -> float:
    """The share of captions that contain a trigger."""
    return sum(trigger in caption for caption in seen.captions) / max(1, len(seen.captions))


def _ask_captions(
    asker: Asker, given: Given, offered: dict[str, Any], goal: str, seen: Seen | None
) -> tuple[Any, str | None]:
    """Where captions come from, asked only where images lack them."""
    usual = (seen.strategy if seen else None) or "textfile"
    if given.captions is None and (seen is None or not seen.num_without_caption):
        return usual, None
    text = "instruction" if goal == "edit" else "caption"
    lacking = f"{seen.num_without_caption} of {seen.num_images + seen.num_without_caption}" if seen else "no"
    choices = [usual, "filename", "instanceprompt"]
    has_some = bool(seen and seen.num_images)
    default = offered.get("caption_strategy") if offered.get("caption_strategy") in choices else None
    default = default or (usual if has_some else "instanceprompt")
    stop = "use only those with one" if has_some else f"stop, and write {text}s first: cat.txt beside cat.jpg"
    help = (
        f"1  {usual:<15} {stop}",
        f"2  {'filename':<15} all from the names of the files: red_fox.jpg becomes red fox",
        f"3  {'instanceprompt':<15} one {text} for all",
    )
    question = Question(f"{lacking} images have no {text}. Where from?", "--captions", one_of(choices), default, help)
    strategy = asker.ask(question, given.captions)
    if strategy == usual and seen and not has_some:
        raise DatasetError(
            f"No image has a {text}",
            "Write cat.txt beside cat.jpg and so on, then run this again; or choose --captions instanceprompt",
        )
    if strategy != "instanceprompt":
        return strategy, None
    caption = asker.ask(
        Question(
            f"Which {text} for all?", "--caption", _check_caption,
            offered.get("instance_prompt") or _ONE_CAPTION.get(goal),
            ("Say what is in every picture, without the trigger word." if goal != "edit" else "Say what is done.",),
        ),
        given.caption,
    )  # fmt: skip
    return strategy, caption


def _ask_prompts(
    asker: Asker, given: Given, offered: dict[str, Any], goal: str, trigger: str, seen: Seen | None, caption: str | None
) -> list[str]:
    """What is drawn during training. For image-to-image, pairs that are held out are drawn instead."""
    if goal == "edit":
        if given.prompts:
            raise RecipeError("--prompt is for text-to-image", "Leave it out: pairs that are held out are drawn")
        return []
    example = caption or next(iter(seen.captions if seen else ()), "")
    begin = f"{trigger}, " if trigger and trigger not in example else ""
    usual = [f"{begin}{example}"] if example else []
    usual += [f"{trigger}, {_FURTHER[goal]}" if trigger else _FURTHER[goal], _UNRELATED]
    defaults = _renamed(offered.get("prompts", ()), offered.get("trigger"), trigger) or list(dict.fromkeys(usual))
    help = (
        "One a line; an empty line is the end. An empty line alone takes these, - alone draws none:",
        "They are encoded once into the cache; the last shows what pictures without your subject look like.",
    )
    return asker.ask_lines(
        Question("What is drawn during training?", "--prompt", _check_prompt, help=help), defaults, given.prompts
    )


def _renamed(prompts: Sequence[str], before: str | None, now: str) -> list[str]:
    """Prompts of an earlier time with the trigger of now."""
    if not before or not now:
        return list(prompts)
    return [prompt.replace(before, now) for prompt in prompts]


def _check_prompt(answer: str) -> str:
    if "\0" in answer:
        raise RecipeError("A prompt cannot contain a null character", "Leave it out")
    return answer


def _check_caption(answer: str) -> str:
    if not answer.strip():
        raise RecipeError("It is empty", "Say what is in every picture")
    return answer


def _check_count(answer: str) -> int:
    if not answer.isdecimal() or not 1 <= int(answer) <= 10**9:
        raise RecipeError(f"{shown(answer)!r} is not a number of images", "Answer with a whole number")
    return int(answer)
