"""Is a flipped bit named before the file is used, and does the way on that is named end with the same result?"""

from __future__ import annotations

import io
import os
import random
import shlex
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k5cache.shared.errors import K5Error
from pipelines.measure.trust.template import ENCODE, options
from pipelines.measure.trust.trial import Place, Trial, Wrong, finished_base, finished_cache, finished_run, must, run
from tests.store_samples import flip

CACHES, STATES, LORAS, BASES = "flips in caches", "flips in run states", "flips in LoRAs of runs", "flips in bases"
HOME = "prepared"
"""Beside the template: K5_HOME with the toy checkpoint's int8 base."""
_ENDS = 64
_HARMLESS = " has the same values"
"""A recipe for people: a changed comment or space is no damage."""


@dataclass(frozen=True)
class Case:
    """A kind of file."""

    pattern: str
    """Of its paths in the template."""
    problem: Callable[[Path, Path], str | None]
    """Uses the file, in a folder and at a path. Returns what was said, or None."""
    mend: Callable[[Place, Path, Path, dict[str, Any]], None]
    """After a flip, follows the advice of the commands and compares the end with the undisturbed results.

    Raises:
        Wrong: they do not name the file, do not go on, or end with another result.
    """


def cases(row: str) -> dict[str, Case]:
    """The files of a row of the table."""
    cache, four, state = "cache/whole/", "runs/four/", "runs/four/state/step-000004/"
    return {
        CACHES: {
            "manifest": Case(f"{cache}manifest.json", _cache, _new_cache),
            "index": Case(f"{cache}index-*", _cache, _repair),
            "locations": Case(f"{cache}locations-*", _cache, _repair),
            "latents": Case(f"{cache}latents/*", _cache, _repair),
            "text": Case(f"{cache}text/*", _cache, _repair),
        },
        STATES: {
            "adapter": Case(f"{state}adapter.safetensors", _state, _step_before),
            "average": Case(f"{state}ema.safetensors", _state, _step_before),
            "optimizer": Case(f"{state}optimizer.safetensors", _state, _step_before),
            "step.json": Case(f"{state}step.json", _state, _step_before),
            "metrics": Case(f"{four}metrics.jsonl", _state, _without_metrics),
            "run.json": Case(f"{four}run.json", _recipe, _run_again),
            "recipe.toml": Case(f"{four}recipe.toml", _recipe, _without_recipe),
            "result.json": Case(f"{four}result.json", _result, _step_again),
        },
        LORAS: {
            "finished": Case(f"{four}four.safetensors", _lora, _lora_again),
            "average": Case(f"{four}four-ema.safetensors", _lora, _lora_again),
            "checkpoint": Case(f"{four}checkpoints/step-000004.safetensors", _lora, _lora_again),
            "loras.json": Case(f"{four}loras.json", _any_lora, _list_again),
        },
        BASES: {"base": Case("home/base/*.safetensors", _base, _base_again)},
    }[row]


def flips(place: Place, trial: Trial, expected: dict[str, Any]) -> None:
    """Flip ``trial.count`` bits of a file, one at a time, and let it be used; then one more, and run the commands.

    Raises:
        Wrong: a flip was not noticed or not named, or the end is another than without it.
    """
    case, chance = cases(trial.row)[trial.case], random.Random(trial.seed)
    with place.copy() as root:
        if trial.row == BASES:
            shutil.copytree(place.template.parent / HOME, root / "home")
        path = chance.choice(sorted(root.glob(case.pattern)))
        if (said := case.problem(root, path)) and not said.endswith(_HARMLESS):
            raise AssertionError(f"damaged before any flip: {said}")
        for i in range(trial.count):
            bit = _bit(path, chance, i)
            flip(path, bit)
            if i < trial.count - 1:
                _check(case, root, path, bit)
                flip(path, bit)
        before = path.read_bytes()
        case.mend(place, root, path, expected)
        assert not path.exists() or path.read_bytes() != before, "the damaged file has stayed"


def _bit(path: Path, chance: random.Random, number: int) -> int:
    """A third of them near the ends of the file, where headers and footers are."""
    bits = 8 * path.stat().st_size
    end = min(bits, 8 * _ENDS)
    return (chance.randrange(end), bits - 1 - chance.randrange(end), chance.randrange(bits))[min(number % 4, 2)]


def _check(case: Case, root: Path, path: Path, bit: int) -> None:
    where = f"bit {bit} of {path.relative_to(root)}"
    try:
        said = case.problem(root, path)
    except Wrong:
        raise
    except Exception as error:
        raise Wrong("traceback", f"{where}: {error!r}") from error
    if said is None:
        raise Wrong("silent", f"{where} was not noticed")
    if path.name not in said or "\n" in said.strip():
        raise Wrong("traceback", f"{where}: {said}")


def _said(use: Callable[[], object]) -> str | None:
    try:
        use()
    except K5Error as error:
        return error.problem
    return None


# What uses a file without a whole command


def _cache(root: Path, path: Path) -> str | None:
    from k5cache.upkeep.verify import verify_cache
    from pipelines.measure.trust.trial import rows_of

    cache = root / "cache" / "whole"
    said = _said(lambda: rows_of(cache))
    problems = verify_cache(cache).problems
    if bool(problems) != bool(said):
        raise Wrong("silent", f"verify: {problems}; reading: {said}")
    return said


def _state(root: Path, path: Path) -> str | None:
    from k5train.runs.metrics import check_metrics
    from k5train.runs.resume_state import latest_state

    def use() -> None:
        saved = latest_state(root / "runs" / "four" / "state")
        assert saved is not None
        saved.check()
        check_metrics(root / "runs" / "four" / "metrics.jsonl", saved.progress.metrics)

    return _said(use)


def _recipe(root: Path, path: Path) -> str | None:
    import tomllib

    from k5cache.shared.recipe import to_dict
    from k5train.runs.folder import open_run
    from k5train.runs.recipe import read_facts

    run = path.parent
    said = _said(lambda: open_run(run))
    if said is None and path.name == "recipe.toml":
        recipe = read_facts(run).recipe
        assert recipe is not None
        is_same = to_dict(open_run(run)[2]) == tomllib.loads(recipe)["train"]
        return f"{path}{_HARMLESS}" if is_same else None
    return said


def _result(root: Path, path: Path) -> str | None:
    from k5train.training.sweep_folder import outcome_of

    return outcome_of(root / "runs" / "four").problem


def _lora(root: Path, path: Path) -> str | None:
    from k5train.runs.written import check_recorded

    return _said(lambda: check_recorded(path))


def _any_lora(root: Path, path: Path) -> str | None:
    return _lora(root, path.parent / "four.safetensors")


def _base(root: Path, path: Path) -> str | None:
    import torch

    from k5train.base import prepared
    from k5train.base.prepared_files import Damaged
    from k5train.base.quantize import empty_transformer

    try:
        prepared._fill(empty_transformer(_model_of(root)), path, torch.device("cpu"), lambda *_: False)
    except Damaged as damage:
        return f"{path}: {damage}"
    return None


def _model_of(root: Path) -> Path:
    from k5train.runs.folder import open_run

    return Path(str(open_run(root / "runs" / "four")[1].path))


# What the commands say, and the way on that they name


def _refused(root: Path, path: Path, *line: str) -> str:
    done = run(root, line)
    assert done is not None
    if done.code == 0:
        raise Wrong("silent", f"{' '.join(line)} did not notice {path.name}")
    if path.name not in done.err + done.out:
        raise Wrong("traceback", f"{' '.join(line)} does not name {path.name}: {done.err[-800:]}")
    return done.err


def _same(left: Any, expected: Any) -> None:
    if left != expected:
        names = [name for name in {**left, **expected} if left.get(name) != expected.get(name)]
        raise Wrong("silent", f"another result than without the flip: {names[:5]}")


def _repair(place: Place, root: Path, path: Path, expected: dict[str, Any]) -> None:
    _refused(root, path, "k5cache", "verify", "cache/whole")
    encode = ("k5cache", "encode", "pictures", "--model", str(place.model), *ENCODE)
    must(root, *encode, "-o", "cache/whole", "--repair")
    _same(finished_cache(root / "cache" / "whole"), expected["whole"])


def _new_cache(place: Place, root: Path, path: Path, expected: dict[str, Any]) -> None:
    _refused(root, path, "k5cache", "verify", "cache/whole")
    encode = ("k5cache", "encode", "pictures", "--model", str(place.model), *ENCODE)
    _refused(root, path, *encode, "-o", "cache/whole", "--repair")
    must(root, *encode, "-o", "cache/whole-2")
    _same(finished_cache(root / "cache" / "whole-2"), expected["whole"])
    path.unlink()


def _step_before(place: Place, root: Path, path: Path, expected: dict[str, Any]) -> None:
    said = _refused(root, path, "k5train", "resume", "runs/four", *options(steps=6))
    command = shlex.split(said.partition("To go on from the state before it: k5train ")[2])
    if command != ["resume", "runs/four", "--step", "3"]:
        raise Wrong("lost", f"the state before it is not offered: {said}")
    must(root, "k5train", *command)
    _same(finished_run(root / "runs" / "four"), expected["four"])


def _without_metrics(place: Place, root: Path, path: Path, expected: dict[str, Any]) -> None:
    _refused(root, path, "k5train", "resume", "runs/four", "--step", "3")
    path.rename(path.with_name("metrics.jsonl.damaged"))
    must(root, "k5train", "resume", "runs/four", "--step", "3")
    _same(
        finished_run(root / "runs" / "four", metrics=False),
        {k: v for k, v in expected["four"].items() if k != "metrics"},
    )


def _run_again(place: Place, root: Path, path: Path, expected: dict[str, Any]) -> None:
    _refused(root, path, "k5train", "resume", "runs/four", "--step", "3")
    path.write_text('{"cache": "cache/whole"}', encoding="utf-8")
    must(root, "k5train", "resume", "runs/four", "--step", "3")
    _same(finished_run(root / "runs" / "four"), expected["four"])


def _without_recipe(place: Place, root: Path, path: Path, expected: dict[str, Any]) -> None:
    path.unlink()
    _step_again(place, root, path, expected)


def _step_again(place: Place, root: Path, path: Path, expected: dict[str, Any]) -> None:
    must(root, "k5train", "resume", "runs/four", "--step", "3")
    _same(finished_run(root / "runs" / "four"), expected["four"])


def _lora_again(place: Place, root: Path, path: Path, expected: dict[str, Any]) -> None:
    _refused(root, path, "k5train", "check-lora", str(path.relative_to(root)), "--model", str(place.model))
    said = _refused(root, path, "k5train", "resume", "runs/four", "--step", "3")  # would write over it
    if f"mv {path.relative_to(root)} " not in said:
        raise Wrong("lost", f"the refusal does not say how to keep {path.name}: {said[-800:]}")
    path.rename(path.with_name(f"{path.name}.kept"))
    _step_again(place, root, path, expected)


def _list_again(place: Place, root: Path, path: Path, expected: dict[str, Any]) -> None:
    _refused(root, path, "k5train", "check-lora", "runs/four/four.safetensors", "--model", str(place.model))
    path.unlink()
    _same({"four.safetensors": finished_run_lora(root)}, {"four.safetensors": expected["four"]["four.safetensors"]})


def finished_run_lora(root: Path) -> dict[str, str]:
    """The bits of the finished LoRA, once check-lora accepts it."""
    from safetensors.torch import load_file

    from pipelines.measure.trust.trial import digest

    lora = root / "runs" / "four" / "four.safetensors"
    must(root, "k5train", "check-lora", str(lora), "--model", str(_model_of(root)))
    return {name: digest([tensor]) for name, tensor in load_file(lora).items()}


def _base_again(place: Place, root: Path, path: Path, expected: dict[str, Any]) -> None:
    """A run on a GPU loads the base so; on the CPU there is none."""
    import torch

    from k5train.base.prepared import load_prepared

    said = io.StringIO()
    os.environ["K5_HOME"] = str(root / "home")
    with redirect_stderr(said):
        load_prepared(place.model, torch.bfloat16, torch.device("cpu"))
    if path.name not in said.getvalue().replace("\n", "") or "is damaged" not in said.getvalue().replace("\n", " "):
        raise Wrong("silent", f"a damaged base was used: {said.getvalue()}")
    if finished_base(root) != expected["base"]:
        raise Wrong("silent", "the base that was made again is another")
