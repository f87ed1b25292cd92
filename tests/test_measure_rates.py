"""Does the trial of learning rates train with the options that it names, and does its table hold the judged losses?"""

from __future__ import annotations

from pipelines.measure import rates


def test_every_kind_is_a_recipe_and_has_its_row_with_the_spread_of_its_seeds(monkeypatch):
    for options, _ in rates.KINDS.values():
        train = rates.read_recipe(7, *options, "optim.lr=0.5").train
        assert (train.steps, train.optim.lr, train.device) == (7, 0.5, "cpu")
    assert rates.read_recipe(None, *rates.KINDS["LoKr"][0]).train.lora.algo == "lokr"
    kinds = {"LoKr": ((), (1e-3, 2e-3))}
    results = {"base": {"held_out": [0.5, 1.5], "known": [2.0, 2.0]}}
    for rate, seed, loss in ((1e-3, 0, 0.5), (1e-3, 1, 0.7), (2e-3, 0, 3.0), (2e-3, 1, 3.0)):
        results[rates.job_name("LoKr", rate, seed)] = {"held_out": [loss, loss], "known": [1.0, 2.0]}
    first, second = rates.table_rows(results, kinds, 2)
    assert first["held_out"] == {"mean": 0.6, "lowest": 0.5, "highest": 0.7}
    assert (second["rate"], second["held_out"]["mean"], second["known"]["lowest"]) == (2e-3, 3.0, 0.75)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert [name for name, (options, _) in rates.KINDS.items() if rates.missing_extra(options)] == [
        "Lion", "schedule-free AdamW", "Prodigy",
    ]  # fmt: skip
