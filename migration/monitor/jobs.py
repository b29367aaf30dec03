"""Long commands that go on after their reply: QEMU's jobs, as far as snapshots need them.

A job is created, runs, and is concluded until somebody dismisses it; each step is an event
``JOB_STATUS_CHANGE``. Source: QEMU ``qapi/job.json``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from .errors import QMPError, as_qmp_error

JOBS_MAX = 64

StatusListener = Callable[[dict[str, object]], None]


@dataclass
class Job:
    """One job.

    :ivar status: ``created``, ``running``, ``aborting``, ``concluded`` or ``null``.
    :ivar error: why it failed.
    """

    id: str
    type: str
    status: str = "created"
    error: str | None = None

    def as_json(self) -> dict[str, object]:
        """One entry of ``query-jobs``; how far a job is, is only known at its ends."""
        done = int(self.status in ("concluded", "null") and self.error is None)
        info: dict[str, object] = {
            "id": self.id,
            "type": self.type,
            "status": self.status,
            "current-progress": done,
            "total-progress": 1,
        }
        return info if self.error is None else info | {"error": self.error}


class Jobs:
    """The jobs of one VM. Any thread.

    :ivar on_change: told of every step, in order, from the job's thread.
    """

    def __init__(self) -> None:
        self.on_change: StatusListener = lambda data: None
        self._lock = threading.Lock()
        self._jobs: dict[str, Job] = {}

    def start(self, job_id: str, kind: str, work: Callable[[], object]) -> None:
        """Run ``work`` in a thread of its own; returns at once.

        :raises QMPError: an id that is in use, or none; too many jobs.
        """
        job = Job(job_id, kind)
        with self._lock:
            if not job_id:
                raise QMPError("Invalid job ID ''")
            if job_id in self._jobs:
                raise QMPError(f"Job ID '{job_id}' already in use")
            if len(self._jobs) >= JOBS_MAX:
                raise QMPError(f"{JOBS_MAX} jobs are not dismissed yet: 'job-dismiss' them")
            self._jobs[job_id] = job
        self._tell(job)
        thread = threading.Thread(target=self._run, args=(job, work), name=kind, daemon=True)
        thread.start()

    def _run(self, job: Job, work: Callable[[], object]) -> None:
        self._enter(job, "running")
        try:
            work()
        except Exception as error:
            job.error = as_qmp_error(error, doing=job.type).desc
            self._enter(job, "aborting")
        self._enter(job, "concluded")

    def _enter(self, job: Job, status: str) -> None:
        job.status = status
        self._tell(job)

    def _tell(self, job: Job) -> None:
        self.on_change({"id": job.id, "status": job.status})

    def query(self) -> list[dict[str, object]]:
        """``query-jobs``."""
        with self._lock:
            return [job.as_json() for job in self._jobs.values()]

    def dismiss(self, job_id: str) -> None:
        """Forget a job that has ended. :raises QMPError: no such job, or it has not."""
        with self._lock:
            job = self._jobs.get(job_id)
            if job is None:
                raise QMPError(f"Job not found: '{job_id}'")
            if job.status != "concluded":
                raise QMPError(f"Job '{job_id}' in state '{job.status}' cannot be dismissed")
            del self._jobs[job_id]
        self._enter(job, "null")
