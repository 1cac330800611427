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
    """Calls a function with each tuple of arguments, in this process, in several, or on a Dask cluster.

    Args:
        function: A function of a module, so that other processes can import it.
        arguments: One tuple for each call.
        jobs: Processes on this machine; 1 stays in this one, as timings need it.
        scheduler: Address of a Dask scheduler that runs the calls instead, as `tcp://host:8786`; by default
            RGAP_SCHEDULER, which the Makefile sets from SCHEDULER=.
        title: Of the progress bar.

    Returns:
        What each call returned, in the order of the arguments.

    Raises:
        ModuleNotFoundError: If a scheduler is named and Dask is not installed.
        OSError: If no scheduler answers there.
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
