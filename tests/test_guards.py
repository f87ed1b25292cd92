"""Guards: what the architecture promises, checked on the source and in fresh interpreters."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHARED = {"errors", "console", "recipe", "config", "hub", "buckets", "store", "fingerprint", "compare", "ram", "toy"}


def imports_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    plain = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    return plain | {
        f"{node.module}.{name.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module
        for name in node.names
    }


def fresh(code: str) -> str:
    """Run ``code`` in a new interpreter; what it prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("path", sorted(ROOT.glob("k5train/**/*.py")), ids=lambda p: p.name)
def test_the_trainer_imports_only_the_shared_parts_of_the_cache_package(path):
    used = {name.split(".")[1] for name in imports_of(path) if name.startswith("k5cache.")}
    assert used <= SHARED


@pytest.mark.parametrize("path", sorted(ROOT.glob("k5train/**/*.py")), ids=lambda p: p.name)
def test_no_file_of_the_trainer_names_the_encoders_library(path):
    assert not re.search(r"(?<!diffusers\.models\.)\btransformers\b", path.read_text(encoding="utf-8"))


FLOORS = ("store", "sources", "encoders", "encode", "commands", "bench")
"""Packages of k5cache: each may import those before it."""


@pytest.mark.parametrize("path", sorted(ROOT.glob("k5cache/*/*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_package_of_the_cache_imports_only_those_below_it(path):
    own = FLOORS.index(path.parent.name)
    used = {name.split(".")[1] for name in imports_of(path) if name.startswith("k5cache.")} & {*FLOORS}
    assert used <= {*FLOORS[: own + 1]} - ({"commands"} if path.parent.name == "bench" else set())


@pytest.mark.parametrize("path", sorted(ROOT.glob("k5cache/**/*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_encoders_name_their_library_and_the_cache_never_needs_the_trainer(path):
    names = imports_of(path)
    assert not any(name.startswith("k5train") for name in names)
    if path.parent.name != "encoders":
        assert not any(name.split(".")[0] == "transformers" for name in names)


OURS = sorted([*ROOT.glob("k5*/**/*.py"), *ROOT.glob("pipelines/**/*.py")])


@pytest.mark.parametrize("path", OURS, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_imports_torchvision_or_reads_pickles(path):
    names = {name.split(".")[0] for name in imports_of(path)}
    assert not names & {"torchvision", "pickle", "dill", "joblib"}
    if path != ROOT / "k5cache" / "bench" / "reading.py":  # measures what others do, .pt files among them
        assert "torch.load(" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("module", ["k5cache.cli", "k5train.cli"])
def test_help_imports_no_heavy_library(module):
    heavy = fresh(
        f"import sys, {module}\n"
        "heavy = {'torch', 'transformers', 'diffusers', 'pyarrow', 'datasets', 'peft', 'numpy', 'PIL'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert heavy == "[]"


def test_the_store_needs_no_torch_to_be_imported():
    assert fresh("import sys, k5cache, k5cache.store.reader\nprint('torch' in sys.modules)") == "False"


def test_every_file_says_first_which_question_it_answers():
    for path in [*ROOT.glob("k5*/**/*.py"), *ROOT.glob("pipelines/**/*.py"), *ROOT.glob("tests/**/*.py")]:
        first = path.read_text(encoding="utf-8").split("\n", 1)[0]
        assert first.startswith('"""') or first.startswith("#!"), path
