"""Is a changed byte of our small files found: JSON with its own checksum, and the recipe of a run?"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from k5cache.shared.errors import K5Error, RunError
from k5cache.shared.model import ModelConfig
from k5cache.shared.sealed import Changed, seal, unseal, unseal_if_sealed
from k5cache.store.manifest import encode_document
from k5train.options.train import TrainConfig
from k5train.runs import recipe
from k5train.runs.folder import create_run, open_run
from k5train.runs.recipe import read_facts, write_recipe

# As the first version of the cache wrote it. Caches are never written anew to be read.
MANIFEST = (
    b'{\n "sha256": "8cf40040a65db9e6d40634dcccbbfe9c12f0b859f487326f9dfd6c589d48b6f0",\n "created_by": {},\n'
    b' "format": 1,\n "index": null,\n "locations": null,\n "prompts": {\n  "": "t"\n },\n "recipe": {\n'
    b'  "name": "\\u00fc/\\"x\\"",\n  "scale": 0.3611\n },\n "shards": []\n}\n'
)
CONFIG = TrainConfig(name="run", steps=20)


def test_a_manifest_is_sealed_byte_for_byte_as_the_first_version_did():
    document = {
        "recipe": {"name": 'ü/"x"', "scale": 0.3611}, "format": 1, "shards": [], "index": None, "locations": None,
        "prompts": {"": "t"}, "created_by": {},
    }  # fmt: skip
    assert encode_document(document) == MANIFEST
    assert unseal(MANIFEST) == document
    with pytest.raises(ValueError, match="not JSON compliant"):
        encode_document({"scale": float("nan")})


def test_every_flipped_bit_of_a_sealed_file_is_found_also_where_earlier_versions_wrote_no_seal():
    raw = seal({"cache": "cache/a", "versions": {"torch": "2.11"}})
    for position in range(len(raw)):
        for bit in range(8):
            changed = bytearray(raw)
            changed[position] ^= 1 << bit
            with pytest.raises(ValueError, match=r"."):
                unseal_if_sealed(bytes(changed), ("cache", "versions"))
    assert unseal_if_sealed(b'{"cache": "c"}', ("cache", "versions")) == {"cache": "c"}
    for text in (b"", b"[]", b'{"cache": "c", "other": 1}', b"[" * 10**5, b"9" * 10**5):
        with pytest.raises(ValueError, match=r"."):
            unseal_if_sealed(text, ("cache", "versions"))
    with pytest.raises(Changed):
        unseal(b'{"cache": "c"}')


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return create_run(tmp_path / "run", Path("cache"), ModelConfig(path="model"), CONFIG).root


def flipped(path: Path, count: int) -> Iterator[str]:
    raw, chance = path.read_bytes(), random.Random(7)
    for _ in range(count):
        position, bit = chance.randrange(len(raw)), chance.randrange(8)
        changed = bytearray(raw)
        changed[position] ^= 1 << bit
        path.write_bytes(changed)
        yield f"bit {bit} of byte {position} of {path}"
    path.write_bytes(raw)


def what_is_said_of(run: Path, before: Any) -> str | None:
    """The error about a run, or None if it is the same as before."""
    try:
        assert open_run(run) == before
    except K5Error as error:
        return error.problem
    return None


@pytest.mark.parametrize("count", [80, pytest.param(5000, marks=pytest.mark.long)])
def test_a_flipped_bit_in_the_recipe_of_a_run_is_named_or_changes_nothing(run, count):
    before = open_run(run)
    named = 0
    for name in ("run.json", "recipe.toml"):
        for where in flipped(run / name, count):
            problem = what_is_said_of(run, before)
            named += bool(problem)
            assert problem is None or (str(run / name) in problem and "\n" not in problem), where
    assert named > count  # all of run.json, and most of recipe.toml: 1.0 may become 1., and a space a comment
    assert open_run(run) == before


def test_an_edit_of_a_runs_recipe_is_neither_obeyed_nor_passed_over(run):
    path = run / "recipe.toml"
    text = path.read_text(encoding="utf-8")
    path.write_text("# mine\n" + text, encoding="utf-8")
    assert open_run(run)[2] == CONFIG  # a comment is no change
    path.write_text(text.replace("steps = 20", "steps = 30"), encoding="utf-8")
    with pytest.raises(RunError) as refused:
        open_run(run)
    assert refused.value.problem == f"{path} was changed since the run began: train.steps: 20, now 30"
    assert refused.value.fix == (
        f"Undo that, or delete the file: {run / 'run.json'} has the recipe too. To train on with the change: "
        f"k5train resume {run} --set train.steps=30"
    )
    for steps in (20, 30):  # either decides about it
        _, model, config, _ = open_run(run, [f"train.steps={steps}"])
        assert config == replace(CONFIG, steps=steps)
    write_recipe(run, model, config)
    assert open_run(run)[2] == replace(CONFIG, steps=30)
    path.unlink()
    assert open_run(run)[2] == replace(CONFIG, steps=30)
    write_recipe(run, model, config)
    assert path.read_text(encoding="utf-8") == text.replace("steps = 20", "steps = 30")
    for wrong, problem in (("steps = 30 30", "is not valid TOML"), ("stfps = 30", "unknown key 'stfps'")):
        path.write_text(text.replace("steps = 20", wrong), encoding="utf-8")
        with pytest.raises(RunError, match=problem) as refused:
            open_run(run)
        assert "or delete the file" in refused.value.fix


def test_a_run_whose_recipe_is_being_replaced_when_it_is_killed_opens_with_the_new_one(run, monkeypatch):
    new = replace(CONFIG, steps=30)
    for name in ("_write_text", "_write_facts"):
        write_recipe(run, ModelConfig(path="model"), CONFIG)
        with monkeypatch.context() as killing:
            original, calls = getattr(recipe, name), []

            def killed(*args, original=original, calls=calls, name=name):
                calls.append(args)
                if name == "_write_text" or len(calls) == 2:
                    raise KeyboardInterrupt
                original(*args)

            killing.setattr(recipe, name, killed)
            with pytest.raises(KeyboardInterrupt):
                write_recipe(run, ModelConfig(path="model"), new)
        assert open_run(run)[2] == new
        write_recipe(run, ModelConfig(path="model"), new)
        assert read_facts(run).before is None
        assert "steps = 30" in (run / "recipe.toml").read_text(encoding="utf-8")


def test_a_run_of_a_version_without_this_opens_by_its_recipe_and_a_damaged_run_json_says_how_to_go_on(run):
    facts = run / "run.json"
    facts.write_text("{", encoding="utf-8")
    with pytest.raises(RunError, match=r"run\.json is not the file that was written") as refused:
        open_run(run)
    assert 'write {"cache": "PATH"} into it' in refused.value.fix
    for text in ('{"cache": "moved"}', json.dumps({"cache": "moved", "versions": {"torch": "2.11"}})):
        facts.write_text(text, encoding="utf-8")
        assert open_run(run)[1:] == (ModelConfig(path="model"), CONFIG, Path("moved"))
    write_recipe(run, ModelConfig(path="model"), CONFIG)
    assert read_facts(run).recipe == (run / "recipe.toml").read_text(encoding="utf-8")
