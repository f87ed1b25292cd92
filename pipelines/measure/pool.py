"""How are many jobs done in several processes, and only those whose results are not there yet? Imports no torch."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures import TimeoutError as FuturesTimeout
from math import inf
from pathlib import Path
from typing import Any

from k5cache.shared.errors import OutputError
from k5cache.shared.files import write_whole
from k5cache.shared.system import variables_set

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""Libraries read them when they are imported: processes that start with 1 compute with one thread each."""


def do_all(
    work: Callable[..., Any],
    jobs: Mapping[str, tuple[Any, ...]],
    file: Path,
    setting: Mapping[str, Any],
    workers: int = 1,
    report: Callable[[str], object] = lambda line: None,
    until: float = inf,
) -> dict[str, Any]:
    """Do each job, and write its result into ``file`` as soon as it is done. What the file has is not done again.

    Args:
        work: a module's own function, so that another process can import it. Its result can be JSON.
        jobs: a name, and the arguments of ``work``.
        setting: whatever decides the results. A file with another setting is refused.
        workers: processes of one thread each. 1: do the jobs in this process.
        until: of ``time.monotonic``. Jobs that are not done then are given up; the same call later does them.

    Returns:
        the result of each job that is done, in the order of ``jobs``.

    Raises:
        OutputError: ``file`` is not from the same trial with the same setting.
    """
    document = read_results(file, setting)
    results: dict[str, Any] = document["results"]
    missing = {name: arguments for name, arguments in jobs.items() if name not in results}
    done = _here(work, missing, until) if workers == 1 else _in_processes(work, missing, workers, until)
    for name, result in done:
        results[name] = result
        write_whole(file, lambda path: path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8"))
        report(f"{name}: {len(set(results) & set(jobs))} of {len(jobs)} done")
    return {name: results[name] for name in jobs if name in results}


def read_results(file: Path, setting: Mapping[str, Any]) -> dict[str, Any]:
    """What an earlier call with the same setting wrote, or a document without results.

    Raises:
        OutputError: ``file`` is something else.
    """
    setting = json.loads(json.dumps(setting))
    if not file.exists():
        return {"setting": setting, "results": {}}
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        is_same = document["setting"] == setting and isinstance(document["results"], dict)
    except (ValueError, LookupError, TypeError):
        is_same = False
    if not is_same:
        raise OutputError(f"{file} is not from this trial with this setting", "Give another file with -o")
    return dict(document)


def _here(work: Callable[..., Any], jobs: Mapping[str, tuple[Any, ...]], until: float) -> Iterator[tuple[str, Any]]:
    for name, arguments in jobs.items():
        if time.monotonic() >= until:
            return
        yield name, work(*arguments)


def _in_processes(
    work: Callable[..., Any], jobs: Mapping[str, tuple[Any, ...]], workers: int, until: float
) -> Iterator[tuple[str, Any]]:
    fresh = multiprocessing.get_context("spawn")  # a fork of a process in which torch has computed may wait for ever
    with variables_set(dict.fromkeys(_THREADS, "1")), ProcessPoolExecutor(workers, fresh, _be_quiet) as pool:
        futures = {pool.submit(work, *arguments): name for name, arguments in jobs.items()}
        try:
            for future in as_completed(futures, None if until == inf else max(0, until - time.monotonic())):
                yield futures[future], future.result()
        except FuturesTimeout:
            for process in multiprocessing.active_children():
                process.terminate()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _be_quiet() -> None:
    """Drop a job's notes and progress, which nobody could read beside those of others. Its errors reach the caller."""
    sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 (for as long as the process lives)
