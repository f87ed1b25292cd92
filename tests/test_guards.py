"""Guards: what the architecture promises, checked on the source and in fresh interpreters."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.other_systems import ATTRIBUTES, MODULES, OTHERWISE

ROOT = Path(__file__).parent.parent
MOST_LINES = 400
MOST_LINES_OF_SCRIPTS = 400
"""Of all JavaScript together, so that it stays what a person can check."""

FLOORS = {
    "k5train": ("__main__", "cli", "commands", "ui", "configure", "moving", "recipes", "doctor", "publish", "exact",
                "bench", "training", "data", "objective", "pictures", "forward", "planning", "adapter runs",
                "base options parallel"),
    "k5cache": ("__main__", "cli", "commands", "exact", "upkeep", "bench", "engines", "encode", "encoders sources",
                "store", "remote", "options", "buckets", "shared"),
}  # fmt: skip
"""The rooms of each package from the top floor down; each imports only from floors below its own."""
SHARED = {"shared", "store", "buckets", "options"}
"""What the trainer uses of k5cache; of ``options`` only ``configure``, the page and the commands, which list and
check all tables of a recipe."""


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imports_of(path: Path) -> set[str]:
    """Every dotted name that a file imports, inside functions and for type checkers too."""
    plain = {name.name for node in ast.walk(tree_of(path)) if isinstance(node, ast.Import) for name in node.names}
    return plain | {
        f"{node.module}.{name.name}"
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ImportFrom) and node.module
        for name in node.names
    }


def files(*patterns: str) -> list[Path]:
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern))


OURS = files("k5*/**/*.py", "pipelines/**/*.py")
TRAINER, CACHE = files("k5train/**/*.py"), files("k5cache/**/*.py")


def fresh(code: str) -> str:
    """Run ``code`` in a new interpreter; returns what it prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_between_rooms(package: str) -> Iterator[tuple[Path, str, str]]:
    """(file, its room, the room that it imports from) of every import within a package; a room is a folder or a file
    of the package's own folder."""
    for path in files(f"{package}/**/*.py"):
        room = path.relative_to(ROOT / package).with_suffix("").parts[0]
        for name in imports_of(path):
            if name.startswith(f"{package}."):
                yield path, room, name.split(".")[1]


@pytest.mark.parametrize("package", sorted(FLOORS))
def test_a_room_imports_only_from_the_floors_below_it(package):
    floor_of = {room: number for number, floor in enumerate(FLOORS[package]) for room in floor.split()}
    rooms = {p.stem if p.is_file() else p.name for p in (ROOT / package).iterdir() if p.suffix in ("", ".py")}
    assert rooms - {"__init__", "__pycache__"} == set(floor_of)
    upwards = [
        f"{path.relative_to(ROOT)} imports {package}.{other}"
        for path, room, other in imports_between_rooms(package)
        if room not in (other, "__init__") and floor_of[other] <= floor_of[room]
    ]
    assert not upwards


def test_no_modules_import_each_other_in_a_circle():
    paths = {module_of(path): path for path in OURS}

    def imported(name: str) -> str | None:
        """The module that a dotted name is, or is in."""
        return name if name in paths else next((m for m in (name.rpartition(".")[0],) if m in paths), None)

    below = {module: {imported(n) for n in imports_of(path)} - {module, None} for module, path in paths.items()}
    while leaves := [module for module, names in below.items() if not names]:
        below = {module: names - {*leaves} for module, names in below.items() if module not in leaves}
    assert not below, f"in a circle, or above one: {sorted(below)}"


def test_no_file_is_longer_than_its_reader_can_hold():
    long = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in OURS}
    assert not {str(path.relative_to(ROOT)): n for path, n in long.items() if n > MOST_LINES}


def test_the_trainer_imports_only_the_shared_parts_of_the_cache_package():
    for path in TRAINER:
        used = {name.split(".")[1] for name in imports_of(path) if name.startswith("k5cache.")}
        # ``configure`` and the page prepare both stages: they look at images as an encode does.
        is_of_both = path.is_relative_to(ROOT / "k5train/configure") or path.is_relative_to(ROOT / "k5train/ui")
        assert used <= (SHARED | {"sources"} if is_of_both else SHARED), path
        assert "options" not in used or is_of_both or path.parent == ROOT / "k5train/commands", path


def test_no_file_of_the_trainer_names_the_encoders_library():
    for path in TRAINER:
        assert not re.search(r"(?<!diffusers\.models\.)\btransformers\b", path.read_text(encoding="utf-8")), path


def test_only_the_encoders_name_their_library_and_the_cache_needs_only_the_options_of_the_trainer():
    for path in CACHE:
        names = {name.split(".")[0] for name in imports_of(path)}
        of_trainer = {".".join(name.split(".")[:2]) for name in imports_of(path) if name.startswith("k5train.")}
        # Its options alone, so that both stages check the whole recipe. They are dataclasses and need no torch.
        assert not of_trainer or (of_trainer == {"k5train.options"} and path.parent == ROOT / "k5cache/commands"), path
        assert "transformers" not in names or path.parent.name == "encoders", path


def test_nothing_imports_torchvision_or_reads_pickles():
    for path in OURS:
        assert not {name.split(".")[0] for name in imports_of(path)} & {"torchvision", "pickle", "dill", "joblib"}, path
        if path != ROOT / "k5cache" / "bench" / "reading.py":  # measures what others do, .pt files among them
            assert "torch.load(" not in path.read_text(encoding="utf-8"), path


def test_only_one_file_names_what_other_systems_lack():
    for path in {*CACHE, *TRAINER} - {ROOT / "k5cache/shared/system.py"}:
        assert not {name.split(".")[0] for name in imports_of(path)} & {*MODULES}, path
        names = {
            (node.value.id, node.attr)
            for node in ast.walk(tree_of(path))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        }
        used = [f"{module}.{name}" for module, name in names if name in ATTRIBUTES.get(module, "").split()]
        assert not used + sorted(names & OTHERWISE), path
        # Without O_BINARY, Windows changes the bytes of a file that is opened by a number.
        assert ("os", "open") not in names or path.name == "console.py", path


@pytest.mark.parametrize("module", ["k5cache.cli", "k5train.cli"])
def test_help_imports_no_heavy_library(module):
    heavy = fresh(
        f"import sys, {module}\n"
        "heavy = {'torch', 'transformers', 'diffusers', 'pyarrow', 'datasets', 'peft', 'numpy', 'PIL'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert heavy == "[]"


def test_the_page_of_all_views_is_up_without_a_heavy_library():
    """What needs one of the last four runs in another process; the others are imported when they are first needed."""
    heavy = fresh(
        "import sys\nfrom pathlib import Path\nimport k5train.ui.runs.report\n"
        "assert not {'starlette', 'uvicorn'} & set(sys.modules)  # a report needs no server\n"
        "from k5train.ui import app, serve\n"
        "from k5train.ui.project import Project\n"
        "app.create_app(Project(Path.cwd()))\n"
        "heavy = {'pyarrow', 'numpy', 'PIL', 'torch', 'transformers', 'diffusers', 'datasets', 'peft'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert heavy == "[]"


def test_the_scripts_of_the_page_stay_few():
    lines = [line for path in files("k5train/ui/**/*.js") for line in path.read_text(encoding="utf-8").splitlines()]
    assert 0 < len(lines) < MOST_LINES_OF_SCRIPTS


def test_the_store_needs_no_torch_to_be_imported():
    assert fresh("import sys, k5cache, k5cache.store.reader\nprint('torch' in sys.modules)") == "False"


def test_every_file_says_first_which_question_it_answers():
    for path in [*OURS, *files("tests/**/*.py")]:
        first = path.read_text(encoding="utf-8").split("\n", 1)[0]
        assert first.startswith('"""') or first.startswith("#!"), path
