"""The samples of random attacks that `rgap verify` runs: what the modules beside this one define as `sample_*`."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable
from importlib import import_module

import pandas as pd

from rgap import experiments
from rgap.artifact.progress import progress

SAMPLE_COLUMNS = ("case", "verdict", "psnr_db", "ok", "why")  # columns that the table of every sample must have
SAMPLE_CASES = 200  # cases of a sample without a default of its own


def all_samples() -> dict[str, Callable[..., pd.DataFrame]]:
    """Name without "sample_" -> function, for every `sample_*` that a module of `rgap.experiments` defines."""
    infos = pkgutil.walk_packages(experiments.__path__, f"{experiments.__name__}.")
    functions = [pair for info in infos for pair in inspect.getmembers(import_module(info.name), inspect.isfunction)]
    return dict(sorted((n.removeprefix("sample_"), f) for n, f in dict(functions).items() if n.startswith("sample_")))


def run_samples(samples: dict[str, Callable[..., pd.DataFrame]], count: int | None, seed: int) -> pd.DataFrame:
    """All rows of the samples, run one after the other, with the sample's name first.

    Each has `count` cases, or as many as its default where that is None. Refuses rows without `SAMPLE_COLUMNS`.
    """
    tables = []
    for name, sample in progress(samples.items(), "samples"):
        default = inspect.signature(sample).parameters["count"].default
        cases = count or (SAMPLE_CASES if default is inspect.Parameter.empty else default)
        table = sample(cases, seed)
        if missing := [column for column in SAMPLE_COLUMNS if column not in table]:
            raise ValueError(f"sample_{name} has no column {', '.join(missing)}")
        table.insert(0, "sample", name)
        tables.append(table.astype({"ok": bool}))
    return pd.concat(tables, ignore_index=True)


def sample_summary(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of each sample and verdict, how many are in order, and the smallest PSNR of those that are."""
    groups = table.assign(least=table["psnr_db"].where(table["ok"])).groupby(["sample", "verdict"], sort=True)
    counted = groups.agg(rows=("ok", "size"), in_order=("ok", "sum"), least_psnr_db=("least", "min"))
    return counted.round(1).reset_index()
