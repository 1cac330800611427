"""Runs side by side: in this process, in several, or on a Dask cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import joblib

from rgap.artifact.progress import progress


def run_each(
    function: Callable, arguments: Iterable[tuple], jobs: int = 1, scheduler: str | None = None, title: str = "runs"
) -> list[Any]:
    """Calls a function of a module with each tuple of arguments, and returns what each call returned, in their order.

    The calls run in this process, as timings need it; with `jobs` above 1 in as many; or on the Dask cluster whose
    scheduler's address, such as `tcp://host:8786`, is given, or is in RGAP_SCHEDULER, which the Makefile sets from
    SCHEDULER=. Raises ModuleNotFoundError if a scheduler is named and Dask is not installed, OSError if none answers.
    """
    calls = [joblib.delayed(function)(*each) for each in arguments]
    address = scheduler or os.environ.get("RGAP_SCHEDULER")
    with ExitStack() as stack:
        pool = joblib.Parallel(n_jobs=jobs, return_as="generator")
        if address:
            stack.enter_context(_dask_client(address))
            stack.enter_context(joblib.parallel_config("dask"))
            pool = joblib.Parallel(return_as="list")
        return list(progress(pool(calls), title, total=len(calls)))


def _dask_client(address: str):
    try:
        from distributed import Client
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the scheduler {address} was named, and Dask is not installed; install it by pip install -e '.[dask]' "
            "(in .venv: .venv/bin/uv pip install -e '.[dask]'), or leave SCHEDULER out"
        ) from error
    return Client(address, timeout="10s", set_as_default=True)
