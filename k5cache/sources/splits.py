"""Which files and rows belong to a split? `datasets` defines it; its rules are applied to a list of file names.

`datasets` itself would look for the files by glob patterns that include the folder's own path, which then must not
contain ``[``, ``*``, ``?`` or ``::``. Here its patterns are matched against names relative to the folder.
"""

from __future__ import annotations

import math
import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from k5cache.options import CacheConfig
from k5cache.shared.errors import DatasetError
from k5cache.shared.patterns import Pattern, Steps
from k5cache.shared.plain import open_plain, read_text
from k5cache.sources.folder import walk
from k5cache.sources.items import Skipped

CARDS = ("README.md", ".huggingface.yaml")  # datasets' config.REPOCARD_FILENAME and REPOYAML_FILENAME
_MOST_CARD_BYTES = 4 << 20
_MOST_STARS = 4
_IN_A_SLICE = re.compile(r"[\[(+]")


def files_of_split(folder: Path, config: CacheConfig) -> list[Path]:
    """The files of a local dataset that belong to ``cache.split``, as `datasets` divides the folder.

    Its README may name them; otherwise their names and folders do (``train/``, ``test-00000-of-00002.parquet``), and
    without such names all of them are ``train``. A slice (``train[:10]``) is not cut here.

    Raises:
        DatasetError: there is no such split or configuration.
    """
    unread: list[Skipped] = []
    names = [prefix + entry.name for files, prefix in walk(folder, unread) for entry in files]
    return [folder / name for name in names_of_split(str(folder), names, read_card(folder), config)]


def names_of_split(title: str, names: Iterable[str], card: Any | None, config: CacheConfig) -> list[str]:
    """Those of ``names`` that belong to ``cache.split``.

    Args:
        title: what the dataset is called in messages.
        names: of all its files, relative to it, with forward slashes.
        card: what its README declares, as ``huggingface_hub.DatasetCardData``.
    """
    try:
        splits = _splits(title, sorted(names), card, config.dataset_config)
    except DatasetError:
        raise
    except (ValueError, TypeError, AttributeError, KeyError) as error:  # what `datasets` raises on a faulty card
        reason = " ".join(str(error).split())[:300]
        raise DatasetError(f"The README of {title} cannot be used: {reason}", "Repair its field `configs`") from None
    wanted = split_names(config.split)
    for split in wanted:
        if split not in splits:
            has = f"it has {', '.join(splits)}" if splits else "it has no data files"
            raise DatasetError(f"{title} has no split {split}; {has}", "Set cache.split to one that it has")
    return list(dict.fromkeys(name for split in wanted for name in splits[split]))


def read_card(folder: Path) -> Any | None:
    """What the README and ``.huggingface.yaml`` of a dataset declare; None if it has neither.

    Raises:
        DatasetError: their YAML is damaged.
    """
    readme, plain = (folder / name for name in CARDS)
    if not readme.is_file() and not plain.is_file():
        return None
    import yaml
    from huggingface_hub import DatasetCard, DatasetCardData

    try:
        block = _block_of(readme) if readme.is_file() else ""
        others = read_text(plain, _MOST_CARD_BYTES) if plain.is_file() else ""
        for text in (block, others):
            # An alias stands for a value that may hold aliases: a kilobyte of them means a billion values.
            if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=_loader())):
                raise ValueError("its YAML has aliases (*name)")
        # Of a README that declares nothing, the library would print a remark.
        card: Any = DatasetCard(f"---\n{block}---\n").data if block else DatasetCardData()
        declared = yaml.safe_load(others) if others else None
        return DatasetCardData(**{**card.to_dict(), **declared}) if declared else card
    except (ValueError, TypeError, OSError, RecursionError, yaml.YAMLError) as error:
        text = "its YAML is nested too deeply" if isinstance(error, RecursionError) else str(error)
        reason = " ".join(text.split())[:300]
        raise DatasetError(f"The README of {folder} cannot be read: {reason}", "Repair it, or remove it") from None


def _block_of(readme: Path) -> str:
    """What stands between the two lines of dashes at the start of a README, without blank lines; "" if there are none.

    The hub's client finds it by an expression that takes minutes for a page of blank lines.
    """
    with open_plain(readme) as file:
        lines = file.read(_MOST_CARD_BYTES).decode("utf-8", "replace").splitlines()
    written = [line for line in lines if line.strip()]
    if not written or written[0].strip() != "---":
        return ""
    end = next((number for number, line in enumerate(written[1:], 1) if line.startswith("---")), 0)
    return "".join(f"{line}\n" for line in written[1:end])


def _loader() -> Any:
    import yaml

    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def split_names(split: str) -> list[str]:
    """The names in the notation of `datasets`: ``train[:10]+test`` names ``train`` and ``test``."""
    names = [_IN_A_SLICE.split(part, maxsplit=1)[0].strip() for part in split.split("+")]
    return list(dict.fromkeys(names))


def rows_of_split(title: str, split: str, num_rows: Mapping[str, int]) -> list[tuple[str, range]]:
    """Which rows of which split are meant by ``cache.split``.

    Args:
        num_rows: of each split that it names.
    """
    if not _IN_A_SLICE.search(split):
        return [(split, range(num_rows[split]))]
    from datasets import ReadInstruction

    try:
        parts = ReadInstruction.from_spec(split).to_absolute(dict(num_rows))
    except (ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DatasetError(f"cache.split is {split!r}, and for {title}: {reason}", "Write it as train[10:20]") from None
    return [(part.splitname, range(part.from_, part.to)) for part in parts]


def _splits(title: str, names: Sequence[str], card: Any | None, dataset_config: str | None) -> dict[str, list[str]]:
    """Split -> its files, of one configuration of a dataset."""
    from datasets.data_files import FILES_TO_IGNORE, sanitize_patterns
    from datasets.utils.metadata import MetadataConfigs

    configs: dict[str, dict[str, Any]] = MetadataConfigs.from_dataset_card_data(card) if card is not None else {}
    chosen = dataset_config or (configs.get_default_config_name() if configs else "default")  # type: ignore[attr-defined]
    if chosen not in (configs or {"default": {}}):
        available = ", ".join(configs) or "none"
        problem = f"has no configuration {chosen}" if chosen else "has several configurations"
        raise DatasetError(f"{title} {problem}; it has {available}", "Set cache.dataset_config to one of them")
    declared = configs.get(chosen, {})
    base = declared.get("data_dir") or ""
    files = _Names(base, [n for n in names if _is_visible(n) and posixpath.basename(n) not in FILES_TO_IGNORE])
    patterns = sanitize_patterns(declared["data_files"]) if declared.get("data_files") else files.default_patterns()
    return {
        split: list(dict.fromkeys(name for pattern in of_split for name in files.matching(pattern)))
        for split, of_split in patterns.items()
    }


class _Names:
    """The names of a dataset's files, matched against patterns as fsspec matches those of `datasets`."""

    def __init__(self, base: str, names: Sequence[str]) -> None:
        self._base, self._names = base.strip("/"), names

    def matching(self, pattern: str) -> list[str]:
        from fsspec.utils import glob_translate

        text = glob_translate(posixpath.normpath(posixpath.join(self._base, pattern)))
        if text.count("*") + text.count("+") > _MOST_STARS:  # re would try every division of a name among them
            pattern_of_stars = Pattern(text, Steps(math.inf))  # without repetitions within others, so it is quick
            return [name for name in self._names if pattern_of_stars.fullmatch(name)]
        regex = re.compile(text)
        return [name for name in self._names if regex.match(name)]

    def default_patterns(self) -> dict[str, list[str]]:
        """Split -> patterns, by the first of the layouts that `datasets` knows and that matches any name."""
        from datasets import data_files

        try:
            patterns: dict[Any, list[str]] = data_files._get_data_files_patterns(self.matching)
        except FileNotFoundError:
            return {}
        return {str(split): list(of_split) for split, of_split in patterns.items()}


def _is_visible(name: str) -> bool:
    parts = name.split("/")
    return not any(part.startswith(".") for part in parts) and not any(part.startswith("__") for part in parts[:-1])
