"""Runs side by side."""

import builtins

import pytest

from rgap.experiments.side_by_side import run_each


def double(x):
    return 2 * x


@pytest.mark.parametrize("jobs", [1, 2])
def test_calls_come_back_in_their_order(jobs, monkeypatch):
    monkeypatch.delenv("RGAP_SCHEDULER", raising=False)
    assert run_each(abs, [(-3,), (2,), (-1,)], jobs=jobs) == [3, 2, 1]


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_a_scheduler_without_dask_says_what_to_install(monkeypatch, by):
    original = builtins.__import__

    def without(name, *args, **options):
        if name.startswith(("distributed", "dask")):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return original(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.delenv("RGAP_SCHEDULER", raising=False)
    if by == "environment":
        monkeypatch.setenv("RGAP_SCHEDULER", "tcp://127.0.0.1:1")
    with pytest.raises(ModuleNotFoundError, match=r"tcp://127.0.0.1:1 was named, and Dask is not installed.*\[dask\]"):
        run_each(double, [(1,)], scheduler="tcp://127.0.0.1:1" if by == "argument" else None)
