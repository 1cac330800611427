"""Runs one command a notebook, several side by side, the longest first, and shows how far each is and how long is left.

On a terminal a status line says what runs; elsewhere, as in a log, each start and end is a line.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rgap.artifact.progress import PROGRESS_FILE

POLL_SECONDS = 0.2
INTERRUPT_SECONDS = 10.0  # that interrupted commands have to clean up before they are ended


@dataclass
class Job:
    """A command, how many seconds it takes as a rule, and whether nothing may run beside it."""

    name: str
    command: Sequence[str]
    seconds: float
    alone: bool = False
    number: int = 0
    status: int | None = None
    started: float = 0.0
    took: float = 0.0
    process: subprocess.Popen | None = field(default=None, repr=False)


def usable_cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(jobs: Sequence[Job], workers: int, logs: Path) -> list[Job]:
    """Runs every job, `workers` at a time, goes on after one that fails, and returns those that failed.

    Jobs that run alone come first, then the longest. `logs` is the folder for NAME.log, what a job prints, and
    NAME.progress, where its progress bars write. A KeyboardInterrupt is raised after every running job has ended.
    """
    logs.mkdir(parents=True, exist_ok=True)
    waiting = sorted(jobs, key=lambda job: (not job.alone, -job.seconds))
    for number, job in enumerate(waiting, 1):
        job.number = number
    board = Board(jobs, workers, logs)
    running: list[Job] = []
    try:
        while waiting or running:
            while waiting and len(running) < workers and not (running and (waiting[0].alone or running[0].alone)):
                running.append(_start(waiting.pop(0), logs))
                board.say(running[-1], f"runs, as a rule {minutes(running[-1].seconds)}")
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                job.status, job.took = job.process.returncode, time.monotonic() - job.started
                board.say(job, board.outcome(job))
            board.show(running)
            time.sleep(POLL_SECONDS)
    finally:
        _end(running)
        board.clear()
    return [job for job in jobs if job.status]


def _start(job: Job, logs: Path) -> Job:
    progress = (logs / f"{job.name}.progress").absolute()
    progress.unlink(missing_ok=True)
    environment = {**os.environ, PROGRESS_FILE: str(progress)}
    with (logs / f"{job.name}.log").open("wb") as log:
        job.process = subprocess.Popen(job.command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    job.started = time.monotonic()
    return job


def _end(running: Sequence[Job]) -> None:
    """Waits for jobs that an interrupt has reached, too, and ends those that go on."""
    deadline = time.monotonic() + INTERRUPT_SECONDS
    for job in running:
        try:
            job.process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            job.process.terminate()
            job.process.wait()


@dataclass
class Board:
    """What the terminal shows of the jobs."""

    jobs: Sequence[Job]
    workers: int
    logs: Path
    live: bool = field(default_factory=lambda: sys.stdout.isatty())

    def say(self, job: Job, text: str) -> None:
        """One line about a job; that it starts is said only where no status line shows it."""
        if self.live and job.status is None:
            return
        self.clear()
        digits = len(str(len(self.jobs)))
        print(f"[{job.number:>{digits}}/{len(self.jobs)}] {job.name}: {text}", flush=True)

    def outcome(self, job: Job) -> str:
        """How a job ended: with everything that it printed if it failed, else with the tests that it counted."""
        printed = (self.logs / f"{job.name}.log").read_text(errors="replace").strip()
        left = self.seconds_left()
        rest = f"; about {minutes(left)} left" if left else ""
        if job.status:
            return f"FAILED after {minutes(job.took)}{rest}\n{printed}"
        counted = re.findall(r"\d+ passed", printed)
        return f"done in {minutes(job.took)}{f', {counted[-1]}' if counted else ''}{rest}"

    def show(self, running: Sequence[Job]) -> None:
        """The status line: what runs, how far it is, how long is left."""
        if not self.live or not running:
            return
        parts = [f"{job.name} {minutes(time.monotonic() - job.started)}{self._progress(job)}" for job in running]
        done = sum(job.status is not None for job in self.jobs)
        width = shutil.get_terminal_size().columns - 1
        line = f"{done} of {len(self.jobs)} done, about {minutes(self.seconds_left())} left: {', '.join(parts)}"
        print(f"\r{line[:width]:{width}}", end="", flush=True)

    def clear(self) -> None:
        """Takes the status line away."""
        if self.live:
            print("\r" + " " * (shutil.get_terminal_size().columns - 1), end="\r", flush=True)

    def seconds_left(self) -> float:
        """Seconds until all have ended, by their rule and this machine's pace so far."""
        ended = [job for job in self.jobs if job.status is not None]
        usual, now = sum(job.seconds for job in ended), time.monotonic()
        pace = sum(job.took for job in ended) / usual if usual else 1.0
        left = [
            max(pace * job.seconds - (now - job.started if job.process else 0.0), 0.0)
            for job in self.jobs
            if job.status is None
        ]
        return max(sum(left) / self.workers, max(left, default=0.0))

    def _progress(self, job: Job) -> str:
        path = self.logs / f"{job.name}.progress"
        parts = re.split(r"[\r\n]", path.read_text(errors="replace")) if path.exists() else []
        last = next((part.strip() for part in reversed(parts) if part.strip()), "")
        return f" ({last})" if last else ""


def minutes(seconds: float) -> str:
    """A duration as minutes and seconds: "1:05"."""
    return f"{round(seconds) // 60}:{round(seconds) % 60:02}"
