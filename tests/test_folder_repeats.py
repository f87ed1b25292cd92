"""Are images used as often as the names of their folders say, where that is asked for?"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
import torch

from k5cache.shared.errors import RecipeError
from k5train.data import mixture as mixtures
from k5train.data.folder_repeats import described, folder_repeats
from k5train.data.mixture import Mixture, Source, epoch_batches, open_mixture
from k5train.options.data import DataConfig
from k5train.options.train import TrainConfig
from k5train.training.cautions import _of_folders
from k5train.training.start import named, open_data

PATHS = ["10_sks cat/a.png", "10_sks cat/b.png", "3_dog/c.png", "d.png", "plain/e.png"]


class Named:
    """As much of a cache as a mixture of one bucket needs."""

    root, kind = Path("cache/named"), "t2i"
    manifest = SimpleNamespace(recipe={})

    def __init__(self, paths: list[str]) -> None:
        self.table = pa.table({"path": paths, "bucket_width": [64] * len(paths), "bucket_height": [64] * len(paths)})

    def __len__(self) -> int:
        return len(self.table)

    def columns(self, *names: str) -> pa.Table:
        return self.table.select(names)


def seen(mixture: Mixture, epoch: int = 0) -> Counter:
    batches = epoch_batches(mixture.pools, 2, epoch, torch.Generator().manual_seed(epoch))
    return Counter(row for rows in batches for row in rows)


@pytest.mark.parametrize(
    ("path", "repeats"),
    [
        ("10_cat/a.png", 10), ("sub/3_dog/deep/a.png", 3), ("5_a/7_b/a.png", 5), ("a.png", 1), ("10_a.png", 1),
        ("10/a.png", 1), ("10_/a.png", 1), ("x10_cat/a.png", 1), ("0_cat/a.png", 0), ("\u0661_x/a.png", 1),
        ("cats.tar/2_x/a.png", 2),
    ],
)  # fmt: skip
def test_the_number_is_that_of_the_first_folder_with_one(path, repeats):
    assert folder_repeats(path) == repeats


def test_an_epoch_has_every_image_as_often_as_its_folder_says(tmp_path):
    source = Source(Named(PATHS), repeats_by_folder=True)
    for epoch in range(2):
        assert seen(Mixture([source]), epoch) == {0: 10, 1: 10, 2: 3, 3: 1, 4: 1}
    assert seen(Mixture([replace(source, repeats=2)])) == {0: 20, 1: 20, 2: 6, 3: 2, 4: 2}
    assert seen(Mixture([replace(source, split=frozenset({0, 4}))])) == {1: 10, 2: 3, 3: 1}
    assert seen(Mixture([replace(source, repeats_by_folder=False)])) == dict.fromkeys(range(5), 1)


def test_weights_divide_an_epoch_between_caches_and_folders_divide_a_caches_share():
    pair = [Source(Named(PATHS[:3]), weight=1.0, repeats_by_folder=True), Source(Named(PATHS[:1]), weight=1.0)]
    (pools,) = Mixture(pair).pools.values()
    # 24 rows an epoch (10 + 10 + 3, and 1), half of them from each cache
    assert [(pool.rows, pytest.approx(pool.rate)) for pool in pools] == [
        ([0, 1], 12 * 20 / 23), ([2], 12 * 3 / 23), ([3], 12.0),
    ]  # fmt: skip


def test_what_the_names_say_is_said_and_a_0_is_refused(monkeypatch):
    monkeypatch.setattr(mixtures, "open_cache", lambda path: Named([*PATHS, "0_owl/f.png"]))
    with pytest.raises(RecipeError, match=r"the folder of 0_owl/f.png says 0 times"):
        open_data(Path("cache"), TrainConfig(repeats_by_folder=True))
    assert len(open_mixture([DataConfig("cache")])) == 6
    assert _of_folders(Mixture([Source(Named(PATHS), repeats_by_folder=True)])) == [
        "By the names of their folders, an epoch has 2 images 10 times, 1 image 3 times, 2 images once"
    ]
    idle = "repeats_by_folder does nothing here: no image is in a folder with a name such as 10_cat"
    assert _of_folders(Mixture([Source(Named(["a.png"]), repeats_by_folder=True)])) == [idle]
    assert _of_folders(Mixture([Source(Named(PATHS))])) == []
    assert described(["2_a/x.png"]) == "1 image 2 times"


def test_several_caches_of_a_command_all_have_the_option():
    config = named([Path("a"), Path("b")], TrainConfig(repeats_by_folder=True, repeats=2))[1]
    assert config.data == tuple(DataConfig(name, repeats=2, repeats_by_folder=True) for name in "ab")
