"""A picture that is held out of one cache of a run is held out of all, and what is measured on which rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from k5cache.shared.errors import RecipeError, RunError
from k5cache.shared.model import ModelConfig
from k5cache.store.reader import open_cache
from k5train.adapter.files import load_lora
from k5train.base.quantize import load_transformer
from k5train.data.loader import Loader
from k5train.data.mixture import Mixture, Source, open_mixture
from k5train.data.split import held_out_rows, probe_rows, split_off, split_rows
from k5train.forward.predict_velocity import predict_velocity
from k5train.options.data import DataConfig
from k5train.options.optimizer import OptimConfig
from k5train.options.validation import ValidationConfig
from k5train.runs.folder import Run, create_run, open_run
from k5train.training import loop, validation
from k5train.training import train as training
from k5train.training.held_out_loss import HeldOutLoss
from k5train.training.more_pictures import drawings_to_draw, held_out_items
from k5train.training.result import Result
from k5train.training.train import train
from tests.edit_training import make_pairs
from tests.runs import CONFIG, metrics_of, numbers, only_training, same, state_of
from tests.workshop import Workshop

SHARE = 0.25  # of six pictures two are held out, of five one


@pytest.fixture(scope="module")
def caches(once, toy_model) -> list[DataConfig]:
    """The same six pictures at two resolutions, once with their mirror images; and a regularisation cache of five:
    the two that the first cache holds out, of which its own share can be one only, a third of them, and two others."""

    def make(root: Path) -> None:
        shop = Workshop(root / "shop", toy_model)
        for i in range(6):
            shop.put(f"{i}.png", f"a cat {'that sleeps ' * i}", seed=i)
        shop.encode(resolution=80)
        shop.root.rename(root / "large")
        shop.encode(flip=True)
        held_out = held_out_of(split_off(Mixture([Source(shop.cache)]), SHARE))
        kept = {*held_out, next(f"{i}.png" for i in range(6) if f"{i}.png" not in held_out)}
        shop.root.rename(root / "small")
        for path in shop.source.glob("*.png"):
            if path.name not in kept:
                path.unlink()
                path.with_suffix(".txt").unlink()
        shop.put("7.png", "a dog", seed=7)
        shop.put("8.png", "a dog", seed=8)
        shop.encode()
        shop.root.rename(root / "class")

    root = once("caches_of_the_same_pictures", make)
    return [
        DataConfig(str(root / name), is_regularisation_data=name == "class") for name in ("small", "large", "class")
    ]


def held_out_of(data: Mixture) -> set[str]:
    """The names of the pictures that are held out of any cache: a picture has the same name in each."""
    return {source.cache.row(item).path for source in data.sources for item in source.split}


def test_no_row_of_any_batch_shows_a_held_out_picture(caches):
    data = split_off(open_mixture(caches), SHARE)
    held_out = held_out_of(data)
    hashes = {s.cache.row(i).content_hash for s in data.sources for i in s.split}
    for entries in (caches, caches[::-1], [replace(entry, repeats=3, weight=2.0) for entry in caches]):
        mixture = split_off(open_mixture(entries), SHARE)
        assert held_out_of(mixture) == held_out  # whichever cache comes first
        assert all(source.split for source in mixture.sources)
        loader = Loader(mixture, CONFIG, 1.0)
        batches = [loader.batch(micro) for micro in range(loader.micro_batches(2))]
        seen = [mixture.row(row) for batch in batches for row in batch.rows]
        assert not {row.path for row in seen} & held_out
        assert not {row.content_hash for row in seen} & hashes
        everything = {mixture.row(row).path for row in range(len(mixture))}
        assert {row.path for row in seen} == everything - held_out
        assert {row.flipped for row in seen} == {False, True}


def test_one_cache_is_split_as_by_every_version_before(caches):
    assert split_rows([f"image {i}" for i in range(10)], 0.3) == {4, 5, 8}
    data = split_off(open_mixture(caches[:1]), SHARE)
    (source,) = data.sources
    assert source.split == split_rows(source.cache.columns("content_hash").column(0).to_pylist(), SHARE)
    assert len(source.split) == 4  # two pictures and their mirror images
    assert held_out_rows(data) == (sorted(source.split), [])
    unsplit = open_mixture(caches)
    assert split_off(unsplit, 0) is unsplit


def test_held_out_rows_of_regularisation_data_are_apart(caches):
    data = split_off(open_mixture(caches), SHARE)
    of_subject, of_prior = held_out_rows(data)
    assert {data.locate(row)[0].cache.root.name for row in of_subject} == {"small", "large"}
    assert {data.locate(row)[0].cache.root.name for row in of_prior} == {"class"}
    assert len(of_subject) + len(of_prior) == sum(len(source.split) for source in data.sources)
    only_prior = split_off(open_mixture(caches[2:]), SHARE)  # beside nothing, it is what is learned
    assert held_out_rows(only_prior) == (sorted(only_prior.sources[0].split), [])


def test_the_probe_is_one_row_an_image_that_is_trained_on(caches):
    data = split_off(open_mixture(caches), SHARE)
    rows = probe_rows(data, 8)
    paths = [data.row(row).path for row in rows]
    assert sorted(paths) == sorted({f"{i}.png" for i in range(6)} - held_out_of(data))
    assert probe_rows(data, 2) == rows[:2]
    assert probe_rows(data, 0) == []
    without = [data.row(row).path for row in probe_rows(open_mixture(caches), 8)]
    assert [path for path in without if path in paths] == paths  # the split takes some away, and moves none


def test_a_split_that_leaves_nothing_of_a_cache_names_it(caches):
    small = Source(open_cache(Path(caches[0].cache)))
    two = held_out_of(split_off(Mixture([small]), 0.34))
    assert len(two) == 2
    one_picture, both_held_out = Source(_Part(small.cache, {"0.png"}, "one")), Source(_Part(small.cache, two, "two"))
    fixes = "Set train.validation.split=0, or encode more images"
    for sources, problem, fix in (
        ([one_picture], "holds out 1 of 1 row", fixes),
        ([small, one_picture], "holds out 1 of the 1 row of /one", f"{fixes} into it, or leave this cache out"),
        ([small, both_held_out], "holds out 2 of the 2 rows of /two, because its images are held out of other caches"
         " of the run too", f"{fixes} into it, or leave this cache out"),
    ):  # fmt: skip
        with pytest.raises(RecipeError) as refused:
            split_off(Mixture(sources), 0.34)
        assert (refused.value.problem, refused.value.fix) == (f"train.validation.split of 0.34 {problem}", fix)


class _Part:
    """Some pictures of a cache, without their mirror images."""

    def __init__(self, cache, paths, name):
        rows = [cache.row(item) for item in range(len(cache))]
        self.items = [i for i, row in enumerate(rows) if row.path in paths and not row.flipped]
        self.cache, self.root = cache, Path("/") / name

    def __len__(self):
        return len(self.items)

    def columns(self, *names):
        return self.cache.columns(*names).take(self.items)


# A run with all that is measured. What is drawn and measured in it, and when, depends on nothing but the step.
MEASURED = replace(
    CONFIG, steps=3, checkpoint_every=0,
    optim=OptimConfig(lr=1e-2, warmup_steps=2, lr_scheduler="cosine", ema_decay=0.9),
    validation=ValidationConfig(split=SHARE, held_out_every=1, held_out_sigmas=2, patience=3, probe_images=2),
)  # fmt: skip

LOSSES = ("best_step", "best_loss", "base_held_out_loss", "held_out_loss", "ema_held_out_loss", "base_probe_loss",
          "probe_loss")  # fmt: skip


def run_on(root: Path, entries: list[DataConfig], model: Path, config=MEASURED, **more: bool) -> Result:
    config = replace(config, name=root.name, data=tuple(entries))
    run = create_run(root, Path(entries[0].cache), ModelConfig(path=str(model)), config)
    with only_training():
        return train(open_mixture(entries), model, config, run, **more)


def resumed(root: Path, **changes: int) -> Result:
    run, model, config, _ = open_run(root)
    with only_training():
        return train(open_mixture(config.data), Path(str(model.path)), replace(config, **changes), run)


@pytest.fixture(scope="module")
def measured(tmp_path_factory, caches, toy_model) -> tuple[Path, Result]:
    root = tmp_path_factory.mktemp("measured") / "run"
    return root, run_on(root, caches, toy_model)


def test_a_measurement_is_one_line_with_every_loss_and_its_parts(measured, caches, toy_model):
    root, result = measured
    rows = [row for row in metrics_of(root) if "held_out_loss" in row]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    names = ["held_out", "held_out_prior", "probe"]
    for row in rows:
        here = [*names, "ema_held_out"] if row["step"] else names  # the average begins as the adapter
        losses = {name for name in row if name.endswith(("_loss", "_by_sigma"))}
        assert losses == {f"{name}_{of}" for name in here for of in ("loss", "by_sigma")}
        for name in here:
            assert len(row[f"{name}_by_sigma"]) == 2
            assert row[f"{name}_loss"] == pytest.approx(sum(row[f"{name}_by_sigma"]) / 2, rel=1e-12)
    first, last = rows[0], rows[-1]
    assert (result.base_held_out_loss, result.held_out_loss) == (first["held_out_loss"], last["held_out_loss"])
    assert (result.base_probe_loss, result.probe_loss) == (first["probe_loss"], last["probe_loss"])
    assert result.ema_held_out_loss == last["ema_held_out_loss"] != last["held_out_loss"]
    best = min(rows, key=lambda row: row["held_out_loss"])
    assert (result.best_step, result.best_loss) == (best["step"], best["held_out_loss"])
    # The base's, of each kind of rows, by the base alone: the mean over the rows of its caches.
    transformer = load_transformer(toy_model, "no_change", torch.float32, "cpu").eval()
    data, predict = split_off(open_mixture(caches), SHARE), partial(predict_velocity, transformer)
    scaling_factor = data.first.manifest.recipe["latents"]["scaling_factor"]
    for name, sources in (("held_out", data.sources[:2]), ("held_out_prior", data.sources[2:])):
        alone = [HeldOutLoss(Mixture([source]), 2, scaling_factor) for source in sources]
        sums = [sum(loss.measure(predict, torch.device("cpu"))) / 2 * len(loss.rows) for loss in alone]
        assert first[f"{name}_loss"] == pytest.approx(sum(sums) / sum(len(loss.rows) for loss in alone), rel=1e-6)
    # Of each file, by the file: loaded as `k5train sample` does.
    for path, loss in ((Run(root).lora, result.held_out_loss), (Run(root).ema, result.ema_held_out_loss),
                       (Run(root).best, result.best_loss)):  # fmt: skip
        load_lora(transformer, path)
        by_sigma = HeldOutLoss(data, 2, scaling_factor).measure(predict, torch.device("cpu"))
        transformer.unload_lora()
        assert sum(by_sigma) / 2 == pytest.approx(loss, rel=1e-6)  # float32, with alpha / rank in lora_B


def test_measuring_changes_no_bit_of_training_and_the_bar_ends_full(tmp_path, measured, caches, toy_model, monkeypatch):
    counts: list[tuple[float, float]] = []

    class Bars:
        """Counts what a progress bar is told."""

        def __init__(self) -> None:
            self.tasks: list[list] = []

        def add_task(self, name, total, **more):
            self.tasks.append([name, total, 0])
            return len(self.tasks) - 1

        def advance(self, task, count=1):
            self.tasks[task][2] += count

        def remove_task(self, task):
            if self.tasks[task][1] is not None:  # the others are spinners
                counts.append(tuple(self.tasks[task][1:]))

        def update(self, task, **values):
            """The bar of the steps."""

    @contextmanager
    def progress() -> Iterator[Bars]:
        yield Bars()

    monkeypatch.setattr(loop.console, "progress", progress)
    config = replace(MEASURED, validation=replace(MEASURED.validation, held_out_every=0, patience=0, probe_images=0))
    run_on(tmp_path / "run", caches, toy_model, config)
    assert same(state_of(tmp_path / "run"), state_of(measured[0]))
    of_subject, of_prior = held_out_rows(split_off(open_mixture(caches), SHARE))
    passes = 2 * (len(of_subject) + len(of_prior))
    assert counts == [(passes, passes), (passes + 2 * len(of_subject),) * 2]  # the average's, after a step


def test_a_run_stopped_while_it_measures_measures_again_to_the_same_bits(
    tmp_path, measured, caches, toy_model, monkeypatch
):
    original, left = HeldOutLoss.measure, 0

    def stopping(self, *arguments):
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(HeldOutLoss, "measure", stopping)
    # A measurement has three sets of rows, and from step 1 on those of the average.
    left = 3 + 3  # before the probe of step 1
    with pytest.raises(KeyboardInterrupt, match="saved at step 1"):
        run_on(tmp_path / "run", caches, toy_model)
    left = 4 + 4  # before the average's of step 2
    with pytest.raises(KeyboardInterrupt, match="saved at step 2"):
        resumed(tmp_path / "run")
    monkeypatch.undo()
    result = resumed(tmp_path / "run")
    assert [getattr(result, name) for name in LOSSES] == [getattr(measured[1], name) for name in LOSSES]
    assert same(state_of(tmp_path / "run"), state_of(measured[0]))
    assert numbers(metrics_of(tmp_path / "run")) == numbers(metrics_of(measured[0]))


def test_a_run_of_a_version_that_split_one_cache_only_is_not_gone_on_with(tmp_path, caches, toy_model, monkeypatch):
    current = training.identity
    monkeypatch.setattr(training, "identity", lambda *a: {k: v for k, v in current(*a).items() if k != "split"})
    measuring = ValidationConfig(split=SHARE, held_out_sigmas=1, probe_images=0)
    config = replace(MEASURED, steps=1, optim=OptimConfig(warmup_steps=0), validation=measuring)
    run_on(tmp_path / "run", caches, toy_model, config)
    monkeypatch.undo()
    before = sorted(Run(tmp_path / "run").state.rglob("*"))
    with pytest.raises(RunError, match="earlier version, which held images out of its first cache only"):
        resumed(tmp_path / "run", steps=3)
    assert sorted(Run(tmp_path / "run").state.rglob("*")) == before
    assert Run(tmp_path / "run").is_finished


def test_the_probe_is_measured_at_both_ends_without_a_split_if_that_is_asked(tmp_path, caches, toy_model, monkeypatch):
    config = replace(MEASURED, steps=2, checkpoint_every=1, validation=ValidationConfig(held_out_sigmas=2))
    original = loop.Loop.step

    def stopping(self, *arguments):
        if self.progress.step == 1:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(loop.Loop, "step", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_on(tmp_path / "run", caches[1:2], toy_model, config, always_probe=True)
    monkeypatch.undo()
    result = resumed(tmp_path / "run")  # without asking again, as `k5train resume` does
    rows = [row for row in metrics_of(tmp_path / "run") if "probe_loss" in row]
    assert [row["step"] for row in rows] == [0, 2]
    assert not any("held_out" in name for row in rows for name in row)
    assert (result.base_probe_loss, result.probe_loss) == tuple(row["probe_loss"] for row in rows)
    assert (result.best_step, result.held_out_loss, result.base_held_out_loss) == (None, None, None)
    assert not Run(tmp_path / "run").best.exists()


def test_a_loss_that_is_not_finite_is_null_and_never_the_best(tmp_path, caches, toy_model, monkeypatch):
    losses = iter([float("nan"), 0.5, 0.4, float("inf")])
    monkeypatch.setattr(HeldOutLoss, "measure", lambda self, *a: [next(losses), 0.5])
    measuring = ValidationConfig(split=SHARE, held_out_every=1, held_out_sigmas=2, probe_images=0)
    config = replace(MEASURED, steps=3, optim=OptimConfig(warmup_steps=0), validation=measuring)
    result = run_on(tmp_path / "run", caches[1:2], toy_model, config)
    rows = [row for row in metrics_of(tmp_path / "run") if "held_out_loss" in row]
    assert [row["held_out_loss"] for row in rows] == [None, 0.5, 0.45, None]
    assert rows[0]["held_out_by_sigma"] == [None, 0.5]
    assert (result.base_held_out_loss, result.held_out_loss) == (None, None)
    assert (result.best_step, result.best_loss) == (2, 0.45)
    progress = validation.Progress(step=1, best_step=0, best_loss=float("nan"))  # which earlier versions could save
    validation._keep_the_best(0.7, progress, list)
    assert (progress.best_step, progress.best_loss, progress.not_better) == (1, 0.7, 0)


def test_sample_draws_the_pairs_that_the_run_held_out_of_its_first_cache(tmp_path, toy_edit_model):
    """Two caches of pairs, whose second has fewer: its own share holds a pair out of the first that is not in its."""
    make_pairs(tmp_path / "all", toy_edit_model)
    cache = open_cache(tmp_path / "all")
    make_pairs(tmp_path / "two", toy_edit_model, buckets=((64, 64), (64, 64)))
    entries = (DataConfig(str(tmp_path / "all")), DataConfig(str(tmp_path / "two")))
    data = split_off(open_mixture(entries), 0.25)
    held_out = data.sources[0].split
    alone = split_off(open_mixture(entries[:1]), 0.25).sources[0].split
    config = replace(
        CONFIG, data=entries, validation=ValidationConfig(pairs=len(held_out), split=0.25, guidance_scale=1.0)
    )
    assert held_out_items(cache, config) == held_out
    drawn = drawings_to_draw(Run(Path("run")), cache, config)
    assert {int(drawing.label.partition(".")[0]) for drawing in drawn} == held_out > alone
