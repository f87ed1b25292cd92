"""The defaults and choices that pages, recipes and help name are the code's, and no sentence on one goes unchecked.

A sentence with the word "default" names the option with its value (`rank = 32`), or a choice that only one option has
(`int8-quanto` (the default)); both are compared with the code. Any other such sentence is listed in ``NO_VALUES``.
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
import re
import tomllib
import typing
from collections.abc import Iterator
from typing import Any, Literal

import pytest

from k5cache.options import DEFAULT_TEXT_TOKENS
from k5cache.shared.option_list import _helps
from k5cache.shared.recipe import parse, read, to_dict
from k5cache.shared.template import pipeline_source
from k5cache.sources.table_columns import CAPTION_COLUMNS, PATH_COLUMNS
from k5train.options.adapter import LoraConfig
from k5train.options.optimizer import OptimConfig
from k5train.options.rate import with_usual_rate
from k5train.options.train import TrainConfig
from tests.test_readme import LISTS, OTHER_PAGES, PAGES, RECIPES, ROOT, TABLES, blocks, table_under

# The changelog tells what was, too, and the page of options has the helps, which are checked as they are.
CHECKED_PAGES = [page for page in [*PAGES, *OTHER_PAGES] if page.name not in ("CHANGELOG.md", "options.md")]
UNSET = "unset"

NO_VALUES = {
    # of all options
    "Everything has a default, so the commands work without a recipe too.",
    "`k5train options` prints every option with its default and its help, as a recipe to copy from; "
    "[a page](options.md) has them as tables.",
    "Write it once, as a field of the dataclass of its table, with its default, its unit, and its help as the "
    "docstring under it.",
    # compared by the tests below: the table of docs/training.md, and the columns of a table of images
    "[Which defaults are the official trainer's](#which-defaults-are-the-official-trainers) compares them one by one.",
    "## Which defaults are the official trainer's",
    "The defaults are the official trainer's.",
    "The default is ``text``, ``caption``, ``captions``, ``prompt`` or ``txt``, whichever exists.",
    "The default is the column that contains images, or ``image``, ``file_name``, ``image_path``, ``path`` or "
    "``filename``.",
    # of all options, on the page
    "Begin with a packaged recipe, a recipe of the project (a `.toml` beside `cache/`), the recipe of an earlier run, "
    "or the defaults, and choose one or several caches.",
    "- **The form** has every option, with its help and default.",
    'A field that is left empty leaves its option out of the recipe, which is its default; `""` is an empty text.',
    "What differs from its default is marked.",
    "- **Settings** that differ from the defaults, all of them, and the recipe as TOML.",
    # of a folder and of another library
    "The result is a file under `K5_HOME` (`~/.cache/k5` by default) that is named by what it was made of.",
}
"""Sentences that name no value of an option as its default."""

NO_OPTIONS = {"x", "latents", "scale_factor"}
"""What stands left of an equals sign in a sentence and is no option."""

OFFICIAL = {
    # The official trainer's configs/trainer/lora_image.yaml, configs/data/lora_image_dataloader.yaml (uncond_prob,
    # max_seq_len) and train/lora_train.py, as Zahed-Riyaz/Kandinsky-5 has them at ecf33f1d; and for drawing
    # configs/config_t2i.yaml of kandinskylab/kandinsky-5 at 57bcb40a.
    "train.lora.rank": 32,
    "train.lora.alpha": 32,
    "train.lora.dropout": 0.0,
    "train.optim.optimizer": "adamw",
    "train.optim.lr": 1e-4,
    "train.optim.betas": [0.9, 0.95],
    "train.optim.eps": 1e-8,
    "train.optim.weight_decay": 0.0,
    "train.optim.max_grad_norm": 1.0,
    "train.optim.lr_scheduler": "constant",
    "train.optim.warmup_steps": 100,
    "train.batch_size": 1,
    "train.objective.sigma_sampling": "sigmoid",
    "train.objective.loss_type": "l2",
    "train.objective.weighting": "none",
    "train.validation.num_inference_steps": 50,
    "train.flow_schedule_shift": 3.0,
    "train.caption_dropout_probability": 0.5,
    "train.base_model_precision": "no_change",
    "train.validation.guidance_scale": 3.5,
}
QUICKSTART = {  # SimpleTuner's documentation/quickstart/KANDINSKY5_IMAGE.md at 1961b003
    "train.lora.rank": 16,
    "train.optim.lr": 1e-4,
    "train.batch_size": 1,
    "train.flow_schedule_shift": 1.0,
    "train.base_model_precision": "int8-quanto",
    "train.validation.guidance_scale": 5.0,
}


@dataclasses.dataclass(frozen=True)
class Option:
    """An option of a recipe: its dotted name, its default as TOML gives it, and its choices if it has a fixed set."""

    name: str
    default: Any
    choices: tuple[str, ...]


def options_of(schema: type[Any], table: str) -> Iterator[Option]:
    """Every option of a table and of the tables below it; of the entries of [[tables]] too."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        name, hint = f"{table}.{field.name}", hints[field.name]
        for inner in tables_in(hint):
            yield from options_of(inner, name)
        if not dataclasses.is_dataclass(hint):
            default = None if field.default is dataclasses.MISSING else field.default
            yield Option(name, list(default) if isinstance(default, tuple) else default, choices_of(hint))


def tables_in(hint: Any) -> list[type[Any]]:
    """The dataclasses of a type: the type itself, or that of its entries."""
    return [part for part in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(part)]


def choices_of(hint: Any) -> tuple[str, ...]:
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)
    return next((found for part in typing.get_args(hint) if (found := choices_of(part))), ())


OPTIONS = [option for table, schema in TABLES.items() for option in options_of(schema, table)]


def option_named(name: str) -> Option:
    """The option of a full or shortened name (``optim.lr``, ``rank``).

    A short name means the option closest to the top: ``rank`` is that of [train.lora], not that of its [[ranks]].
    """
    ends = [option for option in OPTIONS if f".{option.name}".endswith(f".{name}")]
    assert ends, f"there is no option {name}"
    top = min(option.name.count(".") for option in ends)
    shortest = [option for option in ends if option.name.count(".") == top]
    assert len(shortest) == 1, f"{name} may be any of {[option.name for option in shortest]}: give its table, too"
    return shortest[0]


def sentences(text: str) -> Iterator[str]:
    """The sentences of a page's prose: of paragraphs, list items, headings and rows of tables, each on one line."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    units = re.split(r"\n\s*\n|\n(?=\s*(?:[-*|#]|\d+\.)\s?)", prose)
    for unit in units:
        yield from re.split(r"(?<=[.?!])\s+(?=[A-Z`\"*(\[])", " ".join(unit.split()))


def claims(sentence: str) -> list[tuple[str, Any]]:
    """The defaults that a sentence claims, as (option, value)."""
    sentence = sentence.replace("``", "`")
    values = [
        (name, tomllib.loads(f"value = {value}")["value"])
        for name, value in re.findall(r"`([a-z][\w.]*) = ([^`]+)`", sentence)
    ]
    choice = r'`"?([\w-]+)"?`'
    named = re.findall(rf"{choice}(?:,? \(?the| is the| stays the) default", sentence)
    named += re.findall(rf"[Tt]he default,? {choice}", sentence)
    for value in named:
        owners = [option.name for option in OPTIONS if value in option.choices]
        assert len(owners) == 1, f"{value} is a choice of {owners or 'no option'}: name the option"
        values.append((owners[0], value))
    return values


def texts() -> Iterator[tuple[str, str]]:
    """(where, text) of all that names options: pages, the comments that open recipes, and the help of every table."""
    for page in CHECKED_PAGES:
        text = page.read_text(encoding="utf-8")
        # Its tables list the keys of other trainers, some of which are called default; tests/test_moving.py holds them.
        yield page.name, text.partition("\n## SimpleTuner: ")[0] if page.name == "moving_over.md" else text
    for recipe in [*RECIPES, *LISTS]:
        comments = re.findall(r"^# ?(.*)$", recipe.read_text(encoding="utf-8"), flags=re.MULTILINE)
        yield recipe.name, "\n".join(comments)
    for schema in schemas():
        yield schema.__name__, "\n\n".join([(schema.__doc__ or "").split("\n")[0], *_helps(schema).values()])


def schemas() -> list[type[Any]]:
    """The dataclasses of all tables."""
    found = list(TABLES.values())
    for schema in found:
        found += [inner for hint in typing.get_type_hints(schema).values() for inner in tables_in(hint)]
    return found


def test_every_default_that_a_sentence_names_is_the_codes_and_no_sentence_escapes():
    seen, checked = set(), 0
    for where, text in texts():
        for sentence in sentences(text):
            if not re.search("default", sentence, flags=re.IGNORECASE):
                continue
            if sentence in NO_VALUES:
                seen.add(sentence)
                continue
            named = claims(sentence)
            assert named, f"{where}: name the option and its value, as `batch_size = 1`, in: {sentence}"
            for name, value in named:
                assert value == option_named(name).default, f"{where}: {sentence}"
                checked += 1
    assert checked > 8
    assert seen == NO_VALUES


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("By default, `rank = 32` and `optim.betas = [0.9, 0.95]`.", [("rank", 32), ("optim.betas", [0.9, 0.95])]),
        ("So `int8-quanto` is the default.", [("train.base_model_precision", "int8-quanto")]),
        ("The default, ``exact``, is slow.", [("cache.text_batching", "exact")]),
        ("| `t2i-lite-sft` (the default) | `t2i-lite-pretrain` |", [("model.flavour", "t2i-lite-sft")]),
        ("The default is low.", []),
    ],
)
def test_what_a_sentence_claims(sentence, expected):
    assert claims(sentence) == expected


def test_every_option_that_a_sentence_sets_exists_and_takes_that_value():
    seen = 0
    for page in CHECKED_PAGES:
        for sentence in sentences(page.read_text(encoding="utf-8")):
            settings = re.findall(r"`([a-z][a-z_.]*) = ([^`]+)`", sentence)
            overrides = [f"{option_named(name).name}={value}" for name, value in settings if name not in NO_OPTIONS]
            if overrides:
                parse(read(None, overrides), TABLES)
                seen += len(overrides)
    assert seen > 20


def recipe_blocks() -> Iterator[tuple[str, str]]:
    """(page, text) of the blocks of TOML that are pieces of a recipe."""
    for page in CHECKED_PAGES:
        for language, text in blocks(page):
            if language == "toml":
                yield page.name, text


def test_every_toml_block_of_a_page_is_a_piece_of_a_recipe_that_parses():
    seen = 0
    for where, text in recipe_blocks():
        document = tomllib.loads(text)
        for piece in document.get("run", [document]):  # of a sweep: one piece for each run
            assert set(piece) - {"name"}, where
            parse({key: value for key, value in piece.items() if key != "name"}, TABLES)
            seen += 1
    assert seen > 10


def test_a_comment_that_lists_choices_lists_all_of_them_and_marks_the_default():
    seen = 0
    for where, text in recipe_blocks():
        table = ""
        for line in text.splitlines():
            if header := re.match(r"\[+([\w.]+)\]+$", line):
                table = header[1]
            if not (listing := re.match(r"(\w+) = (.*?)\s*# or ([^:]+)", line)):
                continue
            option = option_named(f"{table}.{listing[1]}")
            if not option.choices:
                continue
            value = tomllib.loads(f"value = {listing[2]}")["value"]
            others = re.split(r",? and |, ", listing[3].strip())
            for other in others:
                if other.endswith(" (the default)"):
                    assert other == f"{option.default} (the default)", f"{where}: {line}"
            listed = [other.removesuffix(" (the default)") for other in others]
            values = value if isinstance(value, list) else [value]
            assert sorted([*values, *listed]) == sorted(option.choices), f"{where}: {line}"
            seen += 1
    assert seen >= 9


def test_no_other_comment_of_a_recipe_names_a_default():
    for where, text in recipe_blocks():
        for line in text.splitlines():
            if "default" in line.lower():
                assert re.search(r"# or .*\(the default\)", line), f"{where}: {line}"


def test_a_table_of_an_options_choices_has_a_row_for_each_of_them():
    seen = set()
    for page in CHECKED_PAGES:
        for table in re.findall(r"^(?:\|.*\n)+", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
            head, _, *rows = table.splitlines()
            if first := re.fullmatch(r"`([a-z_.]+)`", head.split("|")[1].strip()):
                listed = {choice for row in rows for choice in re.findall(r"`([\w-]+)`", row.split("|")[1])}
                assert listed == set(option_named(first[1]).choices), f"{page.name}: {head}"
                seen.add(first[1])
    assert seen == {"algo", "optimizer"}


def cell_value(cell: str) -> Any:
    """The value that a cell of the table of defaults gives: of its first code span; None for ``unset``."""
    if not (span := re.match(r"`([^`]+)`", cell)):
        return cell
    return None if span[1] == UNSET else tomllib.loads(f"value = {span[1]}")["value"]


def test_the_table_of_defaults_has_the_codes_values_the_official_ones_and_the_quickstarts():
    head, *rows = table_under(ROOT / "docs" / "training.md", "Which defaults are the official trainer's")
    assert head[:4] == ["option", "here", "official", "quickstart"]
    here, official, quickstart, reasons = {}, {}, {}, {}
    for name, *cells, reason in rows:
        option = option_named(name.strip("`"))
        assert f"`{option.name}`" == name
        assert cell_value(cells[0]) == option.default, name
        here[option.name], official[option.name] = option.default, cell_value(cells[1])
        quickstart |= {option.name: cell_value(cells[2])} if cells[2] != "-" else {}
        reasons[option.name] = reason
    # In a sentence: tests/test_lora.py compares the preset's layers with the official list.
    assert official.pop("train.lora.targets") == "the same ten layers of a block"
    assert official == OFFICIAL
    assert quickstart == QUICKSTART
    # Unset, alpha is the rank (tests/test_lora.py), which is 32 too. The warm-up's numbers agree.
    same = {name for name, value in official.items() if here[name] == value} | {"train.lora.alpha", "train.optim.lr"}
    assert with_usual_rate(TrainConfig()).optim.lr == OFFICIAL["train.optim.lr"]
    assert {name for name, reason in reasons.items() if reason} == set(official) - same | {"train.optim.warmup_steps"}


def test_the_block_with_the_official_values_makes_all_numbers_the_official_ones():
    section = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    section = section.split("\n## Which defaults are the official trainer's\n")[1].split("\n## ")[0]
    _, _, train = parse(tomllib.loads(re.findall(r"^```toml\n(.*?)^```", section, flags=re.M | re.S)[0]), TABLES)
    values = {"train": to_dict(with_usual_rate(train))}
    for name, official in OFFICIAL.items():
        value: Any = values
        for key in name.split("."):
            value = value.get(key)
        assert value == official or name == "train.lora.alpha", name


def test_tables_whose_help_says_so_have_the_official_trainers_defaults():
    for schema in schemas():
        if "efaults are the official trainer's" not in (schema.__doc__ or ""):
            continue
        table = next(
            option.name for option in OPTIONS if option.name.endswith(f".{dataclasses.fields(schema)[0].name}")
        )
        prefix = table.rpartition(".")[0] + "."
        assert sum(name.startswith(prefix) for name in OFFICIAL) >= 3
        for name, value in OFFICIAL.items():
            if name.startswith(prefix) and name != "train.optim.lr":  # whose default depends on the adapter
                assert option_named(name).default == value, name


def test_the_table_of_rates_has_the_codes():
    head, *rows = table_under(ROOT / "docs" / "training.md", "Optimizers and schedules")
    columns = [re.findall(r"`(\w+)`", cell) for cell in head]
    checked = 0
    for names, _, *cells in rows:
        for algos, cell in zip(columns[2:], cells, strict=True):
            for optimizer, algo in itertools.product(re.findall(r"`(\w+)`", names), algos):
                config = TrainConfig(lora=LoraConfig(algo=algo), optim=OptimConfig(optimizer=optimizer))
                assert with_usual_rate(config).optim.lr == float(cell), (optimizer, algo)
                checked += 1
    assert checked == len(option_named("optimizer").choices) * len(option_named("algo").choices)


def test_the_columns_that_the_help_names_as_defaults_are_those_that_are_tried():
    helps = _helps(TABLES["cache"])
    for option, columns in (("caption_column", CAPTION_COLUMNS), ("image_column", PATH_COLUMNS)):
        listing = helps[option].split("The default is")[1]
        assert tuple(re.findall(r"``(\w+)``", listing)) == columns


def test_what_the_pages_say_of_the_pipelines_defaults_is_in_the_installed_pipeline():
    tree = ast.parse(pipeline_source("t2i"))
    call = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "__call__")
    names = [argument.arg for argument in call.args.args][-len(call.args.defaults) :]
    defaults = {
        name: node.value for name, node in zip(names, call.args.defaults, strict=True) if isinstance(node, ast.Constant)
    }
    assert (defaults["guidance_scale"], defaults["num_inference_steps"]) == (3.5, 50)
    assert defaults["max_sequence_length"] == DEFAULT_TEXT_TOKENS["t2i"] == 512
    assert f"max_sequence_length: int = {DEFAULT_TEXT_TOKENS['i2i']}" in pipeline_source("i2i").decode()
    assert option_named("max_sequence_length").default is None
    pages = {page.name: " ".join(page.read_text(encoding="utf-8").split()) for page in CHECKED_PAGES}
    assert "the pipeline draws with guidance 3.5 and 50 steps" in pages["training.md"]
    assert "the pipeline: guidance 3.5, 50 steps" in pages["architecture.md"]
    help_of_tokens = _helps(TABLES["cache"])["max_sequence_length"]
    assert help_of_tokens.endswith("as many as the pipeline takes: 512, and 1024 for image-to-image.")
