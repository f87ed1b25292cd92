"""The pages and the recipes: every command, option, file, link and function that they name exists."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer
import typer.exceptions
from typer.testing import CliRunner

from k5cache.cli import app as cache_app
from k5cache.options import CacheConfig
from k5cache.remote import mirror
from k5cache.shared.model import ModelConfig
from k5cache.shared.recipe import parse, read
from k5train.cli import app as train_app
from k5train.options.train import TrainConfig
from k5train.training.sweep_runs import sweep_runs
from tests.test_guards import FLOORS

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))]
OTHER_PAGES = [ROOT / "k5cache/store/FORMAT.md", *sorted(ROOT.glob("pipelines/**/*.md"))]
LISTS = [ROOT / "pipelines" / "which-rate.toml"]
"""Not recipes, but what ``k5train sweep --list`` takes."""
RECIPES = [path for path in sorted(ROOT.glob("pipelines/**/*.toml")) if path not in LISTS]
TABLES: dict[str, type[Any]] = {"model": ModelConfig, "cache": CacheConfig, "train": TrainConfig}
COMMANDS: dict[str, Any] = {
    "k5cache": typer.main.get_command(cache_app),
    "k5train": typer.main.get_command(train_app),
}
MOST_LINES_OF_README = 150


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of every fenced block of a page."""
    return re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def spans(page: Path) -> list[str]:
    """Every span of code in a page's prose, on one line."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def shown_lines() -> Iterator[tuple[Path, str]]:
    """Every line that a reader may type: of a page's blocks, and of the comment that opens a recipe."""
    for page in [*PAGES, *OTHER_PAGES]:
        for _, text in blocks(page):
            yield from ((page, line.strip().removeprefix("$ ")) for line in text.replace("\\\n", " ").splitlines())
    for recipe in [*RECIPES, *LISTS]:
        comments = re.findall(r"^#(.*)$", recipe.read_text(encoding="utf-8"), flags=re.MULTILINE)
        yield from ((recipe, comment.strip()) for comment in comments)


def command_lines() -> list[tuple[Path, str]]:
    """The shown lines that run one of our commands."""
    return [(page, line) for page, line in shown_lines() if re.match(r"k5(cache|train) [a-z]", line)]


def words_of(line: str) -> list[str]:
    return shlex.split(line, comments=True)


def command_of(words: list[str]) -> tuple[Any, list[str]]:
    """The command that a line runs, and what is left of the line for it."""
    command = COMMANDS[words[0]]
    rest = words[1:]
    while hasattr(command, "commands"):
        command, rest = command.commands[rest[0]], rest[1:]
    return command, rest


def test_every_command_line_that_a_page_shows_parses(monkeypatch):
    monkeypatch.setattr(mirror, "folder_of", lambda path, is_new=False: path)  # no store is asked
    lines = command_lines()
    assert len(lines) > 40
    for page, line in lines:
        command, rest = command_of(words_of(line))
        try:
            command.make_context(command.name, rest)
        except typer.exceptions.TyperException as error:
            pytest.fail(f"{page.name}: {line}\n{error}")


def test_every_command_that_a_sentence_names_exists_with_its_options():
    for page in PAGES:
        if page.name == "CHANGELOG.md":  # it tells what was, too
            continue
        for span in spans(page):
            if re.match(r"k5(cache|train) [a-z]", span):
                command, rest = command_of(words_of(span))
                options = {n for parameter in command.params for n in (*parameter.opts, *parameter.secondary_opts)}
                used = {word.partition("=")[0] for word in rest if word.startswith("-")}
                assert used <= options, f"{page.name}: {span}"


def test_every_option_that_a_command_line_overrides_takes_that_value():
    lines = [line for _, line in command_lines()]
    lines += [span for page in PAGES for span in spans(page) if span.startswith(("k5cache ", "k5train "))]
    seen = 0
    for line in lines:
        words = words_of(line)
        for option, value in pairwise(words):
            if option in ("--set", "--grid"):
                first = value if option == "--set" else value.split(",")[0]
                parse(read(None, [first]), TABLES)
                seen += 1
    assert seen > 5


def test_the_page_of_options_is_the_one_that_the_command_writes():
    done = CliRunner().invoke(train_app, ["options", "--markdown"])
    assert done.exit_code == 0
    assert (ROOT / "docs" / "options.md").read_text(encoding="utf-8") == done.stdout


def test_every_make_target_and_module_that_a_page_names_is_there():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    shown = [*shown_lines(), *((page, span) for page in PAGES for span in spans(page))]
    shown = [(page, line) for page, line in shown if line != "make it red, sks"]  # a caption
    missing = set()
    for page, line in shown:
        if match := re.match(r"make ([a-z-]+)(?: |$)", line):
            missing |= {f"{page.name}: make {match[1]}"} if match[1] not in targets else set()
        if match := re.search(r"python -m (pipelines[\w.]*\w)", line):
            module = ROOT / match[1].replace(".", "/")
            if not module.with_suffix(".py").is_file() and not (module / "__main__.py").is_file():
                missing.add(f"{page.name}: {match[1]}")
        if match := re.search(r"-m pytest (tests/\S+)", line):
            missing |= {f"{page.name}: {match[1]}"} if not (ROOT / match[1]).exists() else set()
    assert not missing


def test_every_file_that_a_page_names_is_there():
    named = {
        (page.name, span)
        for page in PAGES
        for span in spans(page)
        if re.fullmatch(r"(k5cache|k5train|tests|docs|pipelines|\.ci)/[\w./*-]*", span)
    }
    assert len(named) > 40
    assert sorted(f"{page}: {name}" for page, name in named if not list(ROOT.glob(name.rstrip("/")))) == []


def anchors(page: Path) -> set[str]:
    """The names under which GitHub links to a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_leads_to_a_file_and_a_heading_that_are_there():
    seen, lost = 0, []
    for page in [*PAGES, *OTHER_PAGES]:
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if link.startswith("https://"):
                continue
            seen += 1
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            if not target.exists() or (anchor and anchor not in anchors(target)):
                lost.append(f"{page.name}: {link}")
    assert seen > 30
    assert lost == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= MOST_LINES_OF_README


def table_under(page: Path, heading: str) -> list[list[str]]:
    """The rows of all tables of a section, without their heads, as lists of cells."""
    section = page.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    return [row for row in rows if not set(row[0]) <= {"-"}]


def defined_in(path: Path) -> set[str]:
    """The functions, classes, methods and constants of a file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def functions_named_in(cell: str) -> Iterator[tuple[Path, str]]:
    """(file, name) of every name in a cell that follows the path of its file."""
    path = None
    for name in re.findall(r"`([^`]+)`", cell):
        if "/" in name and name.endswith(".py"):
            path = ROOT / name
        elif re.fullmatch(r"\w+", name):
            assert path is not None, cell
            yield path, name


def test_the_answers_on_where_things_are_name_functions_that_are_there():
    rows = table_under(ROOT / "docs" / "architecture.md", "Where is it?")[1:]
    assert len(rows) >= 10
    for question, answer in rows:
        for path, name in functions_named_in(answer):
            assert name in defined_in(path), f"{question}: {path.name} has no {name}"


def test_every_promise_of_reliability_names_tests_that_are_there():
    rows = table_under(ROOT / "docs" / "reliability.md", "What is promised")[1:]
    assert len(rows) >= 20
    for after, _, held_by in rows:
        tests = list(functions_named_in(held_by))
        assert tests, after
        for path, name in tests:
            assert name.startswith("test_"), after
            assert name in defined_in(path), f"{after}: {path.name} has no {name}"


def test_the_architecture_page_has_the_rooms_in_the_order_that_the_guard_holds_them_to():
    floors: dict[str, list[str]] = {}
    for first, *_ in table_under(ROOT / "docs" / "architecture.md", "The rooms"):
        names = re.findall(r"`([\w./]+)`", first)
        if names in (["k5train/"], ["k5cache/"]):
            floors[package := names[0].rstrip("/")] = []
        elif names:  # a row that begins with a dash goes on with the room above
            floors[package].append(" ".join(name.rstrip("/").removesuffix(".py") for name in names))
    assert floors == {package: list(rooms) for package, rooms in FLOORS.items()}


def test_every_recipe_on_disk_parses():
    for path in RECIPES:
        model, cache, train = parse(read(path, []), TABLES)
        assert (model, cache, train) != (ModelConfig(), CacheConfig(), TrainConfig()), path


def test_the_runs_that_answer_which_rate_differ_only_in_their_rate():
    _, runs = sweep_runs(read(None, []), [], LISTS[0])
    assert [run.config.optim.lr for run in runs] == [3e-5, 1e-4, 3e-4, 1e-3]
    alike = {replace(run.config, optim=replace(run.config.optim, lr=1.0)) for run in runs}
    assert len(alike) == 1
    (config,) = alike
    assert config.validation.split  # or no run could be called the best
    assert config.steps % config.validation.held_out_every == 0  # the last measurement is one of the others'


def test_every_toml_block_of_a_page_is_toml():
    for page in PAGES:
        for language, text in blocks(page):
            if language == "toml":
                tomllib.loads(text)
