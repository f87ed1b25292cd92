"""``k5train configure``: questions at a terminal and over a pipe become a recipe, which offers its answers again."""

from __future__ import annotations

import ast
import inspect
import io
import os
import pty
import shlex
import shutil
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from diffusers import Kandinsky5T2IPipeline
from diffusers.pipelines.kandinsky5.pipeline_output import KandinskyImagePipelineOutput

from k5cache.shared.errors import RecipeError
from k5cache.shared.model import FLAVOURS
from k5train.cli import app
from k5train.commands.configure import configure
from k5train.configure import card, implied
from k5train.configure.ask import is_yes, one_of
from k5train.configure.interview import Given
from k5train.configure.read_back import answers_of, edits, flat
from k5train.configure.written import answers_from, compose_from
from k5train.options.train import TrainConfig
from k5train.planning.without_loading import PlanText, plan_without_loading
from k5train.recipes.listed import PACKAGED
from k5train.recipes.needs import kind_of_work
from k5train.recipes.values import values_for
from tests.cli import Cli, Done
from tests.test_readme import ROOT, blocks, command_of


class Place:
    """A folder of a newcomer. ``run`` gives lines over a pipe, ``type_in`` types them at a terminal."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.cli, self.monkeypatch = folder, Cli(folder), monkeypatch
        monkeypatch.setattr(card, "size_of_card", lambda: None)
        # A plan takes 0.3 s, and most of these tests look at none.
        monkeypatch.setattr(implied, "plan_without_loading", lambda *_, **__: PlanText("no plan", []))

    def with_plans(self) -> Place:
        self.monkeypatch.setattr(implied, "plan_without_loading", plan_without_loading)
        return self

    def put(self, *names: str, source: str = "my pics") -> Path:
        """Pictures, which are not opened, each with the caption ``a NAME`` if the name says ``+``."""
        folder = self.folder / source
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            (folder / name.rstrip("+")).touch()
            if name.endswith("+"):
                (folder / name.rstrip("+")).with_suffix(".txt").write_text(f"a {name.partition('.')[0]}", "utf-8")
        return folder

    def run(self, *arguments: str, lines: str = "") -> Done:
        return self.cli(app, "configure", *arguments, stdin=io.StringIO(lines))

    def type_in(self, *arguments: str, keys: str) -> Done:
        ours, theirs = pty.openpty()
        os.write(ours, keys.encode())
        with os.fdopen(theirs, encoding="utf-8") as terminal:
            done = self.cli(app, "configure", *arguments, stdin=terminal)
        os.close(ours)
        return done

    def recipe(self, name: str = "my pics.toml") -> dict[str, Any]:
        return flat(tomllib.loads(self.text(name)))

    def text(self, name: str = "my pics.toml") -> str:
        return (self.folder / name).read_text(encoding="utf-8")


@pytest.fixture
def place(tmp_path, monkeypatch) -> Place:
    return Place(tmp_path, monkeypatch)


ANSWERS = "my pics\ncharacter\n\nohwx fox\n12 gb\na fox\nno fox\n\n"


def check_answered(place: Place, done: Done) -> None:
    assert done.code == 0, done.err
    recipe = place.recipe()
    assert recipe["model.flavour"] == "t2i-lite-sft"
    assert recipe["cache.trigger"] == "ohwx fox"
    assert recipe["train.memory.vram"] == "12GB"
    assert recipe["train.validation.prompts"] == ["a fox", "no fox"]
    told = {"goal": "character", "num_images": 2, "source": "my pics", "cache": "cache/my pics"}
    assert told.items() <= answers_of(place.text()).items()


def test_answers_come_over_a_pipe_from_options_or_from_a_person_and_make_the_same_recipe(place):
    place.put("b.png+", "c.jpg+")
    done = place.with_plans().run(lines=ANSWERS)
    check_answered(place, done)
    over_a_pipe = place.text()
    *_, wrote, encode, train = done.out.splitlines()
    assert wrote == "Wrote my pics.toml"
    assert encode == "Next, encode: k5cache encode 'my pics' -o 'cache/my pics' --recipe 'my pics.toml'"
    assert train == "then train: k5train run 'cache/my pics' --recipe 'my pics.toml'"
    assert "of 11.2 GiB" in done.out  # the plan of a card of 12 GB
    assert "my pics: 2 images with captions, 0 without" in done.err

    (place.folder / "my pics.toml").unlink()
    options = (
        "--goal",
        "character",
        "--trigger",
        "ohwx fox",
        "--vram",
        "12",
        "--prompt",
        "a fox",
        "--prompt",
        "no fox",
    )
    check_answered(place, place.run("my pics", *options, "-y"))
    assert place.text() == over_a_pipe

    (place.folder / "my pics.toml").unlink()
    wrong = "nowhere\nmy pics\n7\ncharacter\n1\nohwx fox\nlots\n12 gb\na fox\nno fox\n\n"
    done = place.type_in(keys=wrong)
    check_answered(place, done)
    assert place.text() == over_a_pipe
    for problem in ("There is no folder or file nowhere", "'7' is none of style", "'lots' is not an amount of memory"):
        assert problem in done.err


def test_every_answer_is_an_option_and_what_is_given_is_not_asked_for(place):
    assert set(Given.__dataclass_fields__) <= set(configure.__annotations__)
    place.put("b.png", "c.png")
    given = {
        "--goal": "object", "--flavour": "pretrain", "--trigger": "-", "--captions": "instanceprompt",
        "--caption": "a mug", "--vram": "24GB", "--prompt": "-",
    }  # fmt: skip
    done = place.run("my pics", *(word for pair in given.items() for word in pair))
    assert done.code == 0, done.err
    assert [line for line in done.err.splitlines() if "?" in line] == []
    recipe = place.recipe()
    assert (recipe["cache.caption_strategy"], recipe["cache.instance_prompt"]) == ("instanceprompt", "a mug")
    assert recipe["model.flavour"] == "t2i-lite-pretrain"
    assert not {"cache.trigger", "train.validation.prompts"} & set(recipe)


def test_the_end_of_the_lines_means_the_defaults_and_a_question_without_one_is_named(place):
    done = place.run()
    assert done.code == 2
    assert "There is no answer to: Where are your images?" in done.err
    assert "k5train configure SOURCE" in done.err
    place.put("b.png+", source="datasets/foxes")
    for answered in (place.run, lambda: place.type_in(keys="\n\x04")):
        done = answered()
        assert done.code == 0, done.err
        assert place.recipe("foxes.toml")["train.memory.vram"] == "16GB"
        (place.folder / "foxes.toml").unlink()
    place.monkeypatch.setattr(card, "size_of_card", lambda: "24GB")
    assert place.run().code == 0
    assert place.recipe("foxes.toml")["train.memory.vram"] == "24GB"


WRONG = {
    ("nowhere",): "SOURCE nowhere: There is no folder or file nowhere",
    ("empty",): "empty has no image",
    ("my pics", "--goal", "song"): "--goal song: 'song' is none of style, character, object, edit",
    ("my pics", "--flavour", "i2i-lite-sft", "--goal", "style"): "--flavour i2i-lite-sft: 'i2i-lite-sft' is none of",
    ("my pics", "--vram", "0"): "--vram 0: '0' is not an amount of memory",
    ("my pics", "--vram", "200MB"): "--vram 200MB: 200MB is no card's memory",
    ("my pics", "--sources", "empty"): "--sources is for image-to-image",
    ("my pics", "--captions", "textfile"): "No image has a caption",
    ("my pics", "--captions", "instanceprompt", "--caption", " "): "It is empty",
    ("my pics", "--goal", "edit", "--sources", "empty"): "The folder of sources empty has no images",
    ("me/foxes", "--images", "many"): "--images many: 'many' is not a number of images",
    ("my pics", "-o", "my.txt"): "my.txt does not end in .toml",
    ("my pics", "-o", "other.toml"): "other.toml is there and is not a recipe: it has project",
    ("my pics", "-o", "broken.toml"): "broken.toml is there and is not valid TOML",
}  # fmt: skip


def test_a_wrong_option_is_refused_with_a_way_out_and_nothing_is_written(place):
    place.put("b.png")
    place.put(source="empty")
    (place.folder / "other.toml").write_text("[project]\n", encoding="utf-8")
    (place.folder / "broken.toml").write_text("[cache\n", encoding="utf-8")
    before = sorted(place.with_plans().folder.iterdir())
    for arguments, problem in WRONG.items():
        done = place.run(*arguments, "-y")
        assert (done.code, done.err.count("  fix: ")) == (2, 1), (arguments, done.err)
        assert problem in done.err, arguments
        assert sorted(place.folder.iterdir()) == before
    done = place.run("my pics", "--captions", "filename", "--vram", "2GB", "-y")
    assert done.code == 2
    assert "  fix: Use a GPU with at least" in done.err
    done = place.run("my pics", "--captions", "filename", "--vram", "4GB", "-y")
    assert "for 512: k5train recipes quick-512" in done.err
    done = place.run(lines="my pics\nsong\n")
    assert "error: Line 2 of the answers: 'song' is none of style" in done.err
    assert "or give it with --goal" in done.err


def test_pictures_without_captions_get_one_for_all_or_their_names_or_are_left_out(place):
    place.put("red_fox.png", "c.png", "d.psd")
    done = place.run("my pics", lines="character\n\n\n\n\n")
    assert done.code == 0, done.err
    assert "my pics: 0 images with captions, 2 without" in done.err
    assert "not used: d.psd is a Photoshop document" in done.err
    recipe = place.recipe()
    assert (recipe["cache.instance_prompt"], recipe["cache.trigger"]) == ("a person", "ohwx")
    assert recipe["train.validation.prompts"][0] == "ohwx, a person"
    assert answers_of(place.text())["num_images"] == 2
    place.put("e.png+")
    for captions, num_images in (("textfile", 1), ("filename", 3)):
        done = place.run("my pics", "--captions", captions, "-y", "-o", f"{captions}.toml")
        assert done.code == 0, done.err
        assert place.recipe(f"{captions}.toml").get("cache.caption_strategy", "textfile") == captions
        assert answers_of(place.text(f"{captions}.toml"))["num_images"] == num_images


def test_a_trigger_that_the_captions_have_already_is_not_added_again(place):
    place.put("b.png+", "c.png+")
    done = place.run("my pics", "--goal", "object", "--trigger", "a", "-y")
    assert "100% of the captions have a already" in done.err
    assert "cache.trigger" not in place.recipe()


def test_run_again_it_offers_the_answers_of_its_own_recipe_and_those_that_were_changed_in_it(place):
    place.put("b.png+", "c.png+")
    place.run(lines=ANSWERS)
    first = place.text()
    for arguments in (("my pics.toml",), ("my pics",), ("-o", "my pics.toml"), ("-o", f"{place.folder}/my pics.toml")):
        done = place.run(*arguments)
        assert done.code == 0, done.err
        assert "its answers are offered" in done.err
        assert place.text().replace(f"{place.folder}/", "") == first
        (place.folder / "my pics.toml").write_text(first, encoding="utf-8")
    (place.folder / "my pics.toml").write_text(first.replace("ohwx fox", "zorb"), encoding="utf-8")
    assert place.run("my pics.toml", lines="\n\n\n\n8\n").code == 0
    assert place.recipe()["cache.trigger"] == "zorb"
    assert place.recipe()["train.memory.vram"] == "8GB"
    assert place.recipe()["train.validation.prompts"] == ["a fox", "no fox"]
    for trigger, prompt in (("zorb", "zorb, a b"), ("quux", "quux, a b"), ("-", "quux, a b")):
        assert place.run("my pics", "-y", "--trigger", trigger, "-o", "again.toml").code == 0
        assert place.recipe("again.toml")["train.validation.prompts"][0] == prompt


def test_a_recipe_that_was_edited_by_hand_is_replaced_only_if_its_owner_says_so(place):
    place.put("b.png+", "c.png+")
    place.run(lines=ANSWERS)
    steps = place.recipe()["train.steps"]
    edited = place.text().replace(f"steps = {steps}", "steps = 77")
    assert edited != place.text()
    for text, said in (
        (edited, f"train.steps = 77 instead of {steps}"),
        (f"{place.text()}# mine\n", "its comments"),
    ):
        (place.folder / "my pics.toml").write_text(text, encoding="utf-8")
        done = place.run("my pics.toml", "-y")
        assert done.code == 2
        assert f"but edited by hand or another recipe: {said}" in done.err
        assert "-o 'my pics-2.toml'" in done.err
        assert place.text() == text
    done = place.type_in("my pics.toml", keys="\n\n\n\n\n\n\n\n")
    assert done.code == 0, done.err
    assert place.text() == text
    assert place.recipe("my pics-2.toml")["train.steps"] == steps
    done = place.run("my pics.toml", "-y", "--overwrite")
    assert done.code == 0
    assert place.recipe()["train.steps"] == steps


def test_ctrl_c_at_a_question_writes_nothing(place):
    class Stopped(io.StringIO):
        def readline(self, size: int = -1) -> str:
            raise KeyboardInterrupt

    place.put("b.png+")
    done = place.cli(app, "configure", "my pics", stdin=Stopped())
    assert (done.code, done.err.splitlines()[-1]) == (130, "Stopped: nothing was written")
    assert [path.name for path in place.folder.iterdir()] == ["my pics"]


def test_an_edit_asks_for_the_pictures_before_it_and_draws_pairs(place):
    place.put("b.png+", "c.png+", source="after")
    place.put("b.jpg", "c.jpg", source="before")
    done = place.run("after", "--goal", "edit", lines="\nbefore\n")
    assert done.code == 0, done.err
    assert "after: 2 pairs with instructions, 0 without" in done.err
    assert done.out.splitlines()[-2].endswith("after -o cache/after --sources before --recipe after.toml")
    assert place.recipe("after.toml")["model.flavour"] == "i2i-lite-sft"
    told = answers_of(place.text("after.toml"))
    assert (told["goal"], told["sources"]) == ("edit", "before")
    shutil.copytree(place.folder / "before", place.folder / "mixed")
    for name in ("b", "c"):
        (place.folder / "mixed" / f"{name}.jpg").rename(place.folder / "mixed" / f"{name}.source.jpg")
        (place.folder / "mixed" / f"{name}.png").touch()
        (place.folder / "mixed" / f"{name}.txt").write_text("make it blue", encoding="utf-8")
    assert place.run("mixed", "--flavour", "i2i-lite-sft").code == 0
    assert answers_of(place.text("mixed.toml")).get("sources") is None


def test_a_dataset_on_the_hub_is_not_fetched_and_its_size_is_asked_for(place):
    done = place.run("me/foxes", lines="style\n\n\n3000\n")
    assert done.code == 0, done.err
    assert "me/foxes is a dataset on the hub" in done.err
    assert answers_of(place.text("foxes.toml"))["num_images"] == 3000


def test_the_answers_of_a_recipe_are_those_that_it_was_composed_of():
    for answers in (
        {"goal": "style", "num_images": 40, "vram": "8GB", "prompts": ("a fox", 'it\'s "new" \\ 狐')},
        {"goal": "object", "num_images": 3, "vram": "24GB", "trigger": "ohwx ", "caption_strategy": "filename"},
        {"goal": "character", "num_images": 9, "vram": "12GB", "caption_strategy": "instanceprompt",
         "instance_prompt": "a # man", "flavour": "t2i-lite-pretrain"},
        {"goal": "edit", "num_images": 9, "vram": "16GB", "flavour": "i2i-lite-sft", "sources": "it's before"},
    ):  # fmt: skip
        whole = {"source": "datasets/my pics", "cache": "cache/a b", "recipe": "r.toml", **answers}
        text = compose_from(whole)
        told = answers_of(text)
        assert compose_from(told) == text
        assert {name: told.get(name) for name in whole} == whole
        assert edits(text, text) == []
    for name, recipe in PACKAGED.items():
        if recipe.preset is None:
            assert compose_from(answers_of(recipe.text)) == recipe.text, name


def test_the_quickstart_shows_what_is_asked(place):
    """Its commands run in ``tests/test_pages_run.py``."""
    [dialogue] = [text for language, text in blocks(ROOT / "docs" / "quickstart.md") if language == "text"]
    lines = dialogue.replace("20 images", "10 images").splitlines()
    place.put(*(f"{number}.jpg+" for number in range(10)), source="datasets/my_cat")
    keys = "".join(f"{line[2:]}\n" for line in lines if line.startswith(">"))
    done = place.type_in("datasets/my_cat", keys=keys)
    assert done.code == 0, done.err
    shown = iter(done.err.replace("> ", "").splitlines())  # behind the prompt, a terminal itself shows what is typed
    assert [line for line in lines if not line.startswith(">") and line not in shown] == []  # in this order
    assert place.recipe("my_cat.toml")["train.validation.prompts"] == ["ohwx cat on the moon"]


def test_the_python_of_the_quickstart_uses_the_pipeline_as_it_is():
    [code] = [text for language, text in blocks(ROOT / "docs" / "quickstart.md") if language == "python"]
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    drawn = next(call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "pipe")
    options = {option.arg: ast.literal_eval(option.value) for option in drawn.keywords}
    inspect.signature(Kandinsky5T2IPipeline.__call__).bind(None, *map(ast.literal_eval, drawn.args), **options)
    methods = {call.func.attr for call in calls if isinstance(call.func, ast.Attribute)} - {"save"}
    assert methods == {"from_pretrained", "load_lora_weights", "enable_model_cpu_offload"}
    assert all(hasattr(Kandinsky5T2IPipeline, method) for method in methods)
    assert [field.name for field in fields(KandinskyImagePipelineOutput)] == ["image"]
    assert FLAVOURS["t2i-lite-sft"] in code


def test_the_commands_of_a_recipe_parse():
    text = compose_from({"goal": "style", "source": "my pics", "recipe": "my pics.toml"})
    lines = [line.lstrip("# ") for line in text.splitlines() if line.lstrip("# ").startswith("k5")]
    assert {words[1] for words in map(shlex.split, lines)} >= {"encode", "run", "configure"}
    for words in map(shlex.split, lines):
        command, rest = command_of(words)
        command.make_context(command.name, rest)


def test_a_choice_is_a_number_a_beginning_or_what_follows_a_hyphen():
    check = one_of(["t2i-lite-sft", "t2i-lite-pretrain"])
    assert [check(answer) for answer in ("1", "SFT", "t2i-lite-p")] == [
        "t2i-lite-sft",
        "t2i-lite-sft",
        "t2i-lite-pretrain",
    ]
    for wrong in ("0", "3", "t2i", "", "x"):
        with pytest.raises(RecipeError):
            check(wrong)
    assert (is_yes("Y"), is_yes("no")) == (True, False)
    with pytest.raises(RecipeError):
        is_yes("perhaps")


def test_sizes_of_cards_are_written_in_one_way():
    for answer, size in (("16", "16GB"), ("16 gb", "16GB"), ("7.5GB", "7680MB"), ("8192MB", "8GB")):
        assert card.check_size(answer) == size


def test_the_memory_of_the_card_is_what_nvidias_tool_says(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for said, size in (("echo 24564; echo 8192", "24GB"), ("echo '[N/A]'", None), ("exit 9", None), ("true", None)):
        tool.write_text(f"#!/bin/sh\n{said}\n", encoding="utf-8")
        tool.chmod(0o755)
        assert card.size_of_card() == size


def test_the_longest_caption_is_planned_for():
    assert implied.text_tokens(["a fox", "x" * 600], "t2i", 1024) == 200
    assert implied.text_tokens(["a fox"], "t2i", 1024) == 64
    assert implied.text_tokens(["x" * 9000], "t2i", 1024) == implied.text_tokens([], "t2i", 1024) == 512
    assert implied.text_tokens(["a fox"], "i2i", 512) == 64 + 81  # a quarter of the 324 tokens of a source at 1024


def test_the_time_is_that_of_a_measurement_or_not_known(monkeypatch):
    answers = {"goal": "style", "num_images": 20, "vram": "12GB"}
    train = TrainConfig(steps=1200, batch_size=2, gradient_accumulation_steps=3, repeats=4)
    assert implied.length(train, 20) == "1,200 steps of 6 rows: each of 20 images 90 times"
    monkeypatch.setattr(implied, "known", dict)
    assert "k5train plan" in implied.time(answers, train)
    kind = kind_of_work(values_for(answers_from(answers)))
    assert kind == "t2i 1024 px int8-dynamic r32 official on 12GB"  # auto
    measured = {kind: {"measured": {"milliseconds": 500, "card": "NVIDIA H100"}}}
    monkeypatch.setattr(implied, "known", lambda: measured)
    measured[kind]["measured"]["precision"] = "int8-quanto"
    assert "on one NVIDIA H100 (int8-quanto); " in implied.time(answers, train)
    del measured[kind]["measured"]["precision"]
    assert implied.time(answers, train).startswith("1 h 0 min for the steps on one NVIDIA H100; ")
