"""Workers that die: the processes of Ray import them from here."""

from __future__ import annotations

import os
import signal

import pyarrow as pa

from k5cache.encode.job import Job
from k5cache.engines.wire import Report
from k5cache.engines.workers import Shards, VaeWorker


class DiesOnce(VaeWorker):
    """Is killed after it has written the shards of an order, before it can report them; only the first time."""

    def encode(self, job: Job, sink: Shards, order: pa.Table) -> Report:
        report = super().encode(job, sink, order)
        try:
            (job.root.parent / "died").touch(exist_ok=False)
        except FileExistsError:
            return report
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("still alive")


class DiesAlways(VaeWorker):
    """Is killed by every order, as one whose images take all memory."""

    def encode(self, job: Job, sink: Shards, order: pa.Table) -> Report:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("still alive")
