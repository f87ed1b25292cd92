"""Are the dependencies there, in versions that fit? What is installed is compared with the package's own ranges."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import k5train
from k5cache.shared.tested_versions import TESTED
from k5train.doctor.check import Check
from k5train.options.optimizer import OptimizerName

DISTRIBUTION = "kandinsky5-lora"
_EXTRA = re.compile(r"""extra\s*==\s*["']([\w.-]+)["']""")


OTHER_USES = {
    "fonts": "letters of Chinese, Japanese and Korean on pictures",
    "ui": "page of k5train ui and k5train report",
    "ray": "encodes on several GPUs",
    "s3": "images and caches at s3:// URLs",
}
"""What the extras are for that are neither an optimizer nor a tracker."""


def installed_versions(requirements: Sequence[str]) -> dict[str, str]:
    """The version of each package that the requirements name and that is installed."""
    versions = {}
    for name in map(_name, requirements):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def judge_versions() -> Check:
    """Which version of this project runs, from where, on which Python and system."""
    version = importlib.metadata.version(DISTRIBUTION)
    system = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    found = f"k5cache and k5train {version}, {system}"
    return Check("versions", "good", found, f"They are in {Path(k5train.__file__).parents[1]}.")


def judge_packages(requirements: Sequence[str], installed: Mapping[str, str]) -> Check:
    """Whether every dependency but torch, which has a line of its own, is there in its range."""
    required = [r for r in requirements if not _EXTRA.search(r) and _name(r) != "torch"]
    missing = [r for r in required if _name(r) not in installed]
    outside = [r for r in required if r not in missing and not _is_in_range(r, installed[_name(r)])]
    found = f"{len(required) - len(missing) - len(outside)} of {len(required)} dependencies fit"
    if missing or outside:
        texts = [f"{_name(r)} is missing" for r in missing]
        texts += [f"{_name(r)} {installed[_name(r)]} is not in the range {_range(r)}" for r in outside]
        wanted = " ".join(f'"{_name(r)}{_range(r)}"' for r in (*missing, *outside))
        return Check("packages", "does not work", f"{found}: {'; '.join(texts)}", "", (f"pip install {wanted}",))
    other = [
        f"{name} {installed[name]} ({TESTED[name]})"
        for name in map(_name, required)
        if name in TESTED and installed[name] != TESTED[name]
    ]
    if other:
        return Check("packages", "good", found, f"The tests ran with other versions of {', '.join(other)}.")
    return Check("packages", "good", found, "All in the versions that the tests ran with.")


def judge_extras(requirements: Sequence[str], installed: Mapping[str, str]) -> Check:
    """Which optional packages are there, and what needs those that are not."""
    extras = {m[1]: r for r in requirements if (m := _EXTRA.search(r)) and m[1] != "test"}
    there = [extra for extra, r in extras.items() if _name(r) in installed]
    absent = [extra for extra in extras if extra not in there]
    old = [extra for extra in there if not _is_in_range(extras[extra], installed[_name(extras[extra])])]
    found = f"{', '.join(there) or 'none'} installed" + (f"; not installed: {', '.join(absent)}" if absent else "")
    if old:
        ranges = [f"{_name(extras[e])} {installed[_name(extras[e])]} is not in {_range(extras[e])}" for e in old]
        return Check("extras", "look at this", found, f"{'; '.join(ranges)}.", _install_extras(old))
    optimizers = [extra for extra in absent if extra in get_args(OptimizerName)]
    trackers = [extra for extra in absent if extra not in (*optimizers, *OTHER_USES)]
    uses = [
        f"{'optimizers' if kind == 'optimizer' and len(names) > 1 else kind + 's' * (len(names) > 1)} "
        f"{', '.join(names)}"
        for kind, names in (("optimizer", optimizers), ("tracker", trackers))
        if names
    ]
    if not absent:
        return Check("extras", "good", found, "Every optimizer and tracker can be used.")
    uses += [use for extra, use in OTHER_USES.items() if extra in absent]
    meaning = f"Only needed for the {' and the '.join(uses)}:"
    return Check("extras", "good", found, meaning, _install_extras(absent))


def _install_extras(extras: Sequence[str]) -> tuple[str, ...]:
    return (f'pip install "{DISTRIBUTION}[{",".join(extras)}]"',)


def _name(requirement: str) -> str:
    match = re.match(r"[\w.-]+", requirement)
    assert match, requirement
    return match[0]


def _range(requirement: str) -> str:
    return re.sub(r"^\s*\[[^\]]*\]", "", requirement.partition(";")[0].removeprefix(_name(requirement))).strip()


def _is_in_range(requirement: str, version: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(_range(requirement)).contains(version, prereleases=True)
