"""Measure in a new process what a test says of a whole process, such as the memory that torch reserves."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


def in_a_new_process(function: Callable[..., Result], *arguments: object) -> Result:
    """Call a function of a module in a new process, and return or raise what it returns or raises.

    Memory that earlier tests left in this process is partly used again, so that it can be neither counted nor
    subtracted.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()
