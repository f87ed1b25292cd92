"""What does the table of a plan say?"""

from __future__ import annotations

from k5cache.shared.console import human_bytes
from k5cache.shared.units import count_of
from k5train.planning.memory import LEVELS, Plan


def describe(plan: Plan) -> list[tuple[str, str]]:
    """A plan as rows of a table: a use or a number of blocks, and its bytes or an explanation."""
    rows = [(name, human_bytes(size)) for name, size in plan.parts.items() if size]
    budget = f" of {human_bytes(plan.budget)}" if plan.budget is not None else ""
    rows.append(("predicted peak, torch reserved", human_bytes(plan.peak) + budget))
    rows += [
        (f"{count_of(plan.levels.count(name), 'block')}: {name}", LEVELS[name].help)
        for name in dict.fromkeys(plan.levels)
    ]
    if plan.streaming:
        how = "ahead of their use" if plan.streaming.prefetch else "when they are needed"
        streamed = f"{count_of(plan.streaming.num_blocks, 'block')} streamed"
        rows.append((streamed, f"{human_bytes(plan.host_bytes)} of pinned host memory, copied {how}"))
    if plan.is_captured:
        rows.append(("steps", "captured as CUDA graphs, which repeat without being launched kernel by kernel"))
    return rows
