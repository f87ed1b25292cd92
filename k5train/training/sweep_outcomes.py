"""How have the runs of a sweep ended so far? Kept in ``sweep.json``, which is written after each of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from k5cache.shared.errors import K5Error
from k5train.runs.folder import Run
from k5train.runs.outcomes import FILE, Outcome, write_outcomes
from k5train.runs.resume_state import remove_states
from k5train.training.sweep_folder import outcome_of, outcomes_before


class Outcomes:
    """The outcomes of every run in a sweep's folder: first those of earlier sweeps, then those of this one in order.

    Args:
        labels: of the runs of this sweep.
    """

    def __init__(self, out: Path, labels: Sequence[str]) -> None:
        self.out, self.labels = out, labels
        self._by_label = outcomes_before(out, labels)
        self.advice: dict[str, str] = {}
        """What would help each run that failed now, by its label."""
        if not (out / FILE).exists():  # from now on the folder is a sweep's
            write_outcomes(out, self.all())

    def all(self) -> list[Outcome]:
        """Those that are known, in the order of the table."""
        earlier = [outcome for label, outcome in self._by_label.items() if label not in self.labels]
        return earlier + [self._by_label[label] for label in self.labels if label in self._by_label]

    def note(self, label: str, error: K5Error | None) -> Outcome:
        """A run has ended, or was finished before. Its saved states are removed if nothing is wrong with it.

        Args:
            error: what ended it.
        """
        problem = error.problem if error else None
        if error is not None:
            self.advice[label] = error.fix
        root = self.out / label
        if root.is_dir():
            outcome = outcome_of(root, problem)
        else:  # it was never begun
            outcome = Outcome(label, f"{label}/{label}.safetensors", problem=problem)
        self._by_label[label] = outcome
        if not outcome.problem:
            remove_states(Run(root).state)  # three times the size of the LoRA. Also what a kill kept of a finished run
        write_outcomes(self.out, self.all())
        return outcome
