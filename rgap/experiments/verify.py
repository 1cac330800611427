"""The long random sampling.

`python -m rgap.experiments.verify` runs every `sample_*` of `rgap.experiments.sweeps` and judges every row.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from rgap import artifact
from rgap.experiments import sweeps

COLUMNS = ("case", "verdict", "psnr_db", "ok", "why")
"""Columns that every sample has; it may have more."""

COUNT = 200
"""Cases of each sample, unless it has a default of its own."""


def main(arguments: list[str] | None = None) -> int:
    """Writes build/verify.csv and prints a summary and every row that is not in order.

    Args:
        arguments: The command line; `--help` explains it.

    Returns:
        0; 1 where a row is not in order; 2 after one line that says what is wrong with the arguments.
    """
    options = _parser().parse_args(arguments)
    samples = all_samples()
    if unknown := set(options.only) - set(samples):
        print(f"verify: no sample {', '.join(sorted(unknown))}; there are {', '.join(samples)}", file=sys.stderr)
        return 2
    chosen = {name: sample for name, sample in samples.items() if not options.only or name in options.only}
    table = run(chosen, options.count, options.seed)
    artifact.write_atomically(options.output, lambda file: table.to_csv(file, index=False, float_format="%.6g"))
    print(summary(table).to_string(index=False))
    wrong = table[~table["ok"]]
    if len(wrong):
        print(f"\nnot in order: {len(wrong)} of {len(table)}")
        print(wrong[["sample", *COLUMNS]].to_string(index=False))
    print(f"\nwritten  {options.output}")
    return int(len(wrong) > 0)


def all_samples() -> dict[str, Callable[..., pd.DataFrame]]:
    """Name without "sample_" -> function, of everything that `rgap.experiments.sweeps` exports under such a name."""
    prefix = "sample_"
    return {name.removeprefix(prefix): getattr(sweeps, name) for name in sweeps.__all__ if name.startswith(prefix)}


def run(samples: dict[str, Callable[..., pd.DataFrame]], count: int | None, seed: int) -> pd.DataFrame:
    """Runs samples one after the other.

    Args:
        samples: From `all_samples`.
        count: Cases of each; None for the default of each.
        seed: For all of them.

    Returns:
        All rows, with the sample's name first.

    Raises:
        ValueError: If a sample lacks one of `COLUMNS`.
    """
    tables = []
    for name, sample in tqdm(samples.items(), desc="samples", disable=not sys.stderr.isatty()):
        default = inspect.signature(sample).parameters["count"].default
        table = sample((COUNT if default is inspect.Parameter.empty else default) if count is None else count, seed)
        if missing := [column for column in COLUMNS if column not in table]:
            raise ValueError(f"sample_{name} has no column {', '.join(missing)}")
        table.insert(0, "sample", name)
        tables.append(table.astype({"ok": bool}))
    return pd.concat(tables, ignore_index=True)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """How many rows of each sample and verdict there are, how many in order, and their smallest PSNR.

    Args:
        table: From `run`.

    Returns:
        sample, verdict, rows, in_order, least_psnr_db (of the rows in order).
    """
    groups = table.assign(least=table["psnr_db"].where(table["ok"])).groupby(["sample", "verdict"], sort=True)
    counted = groups.agg(rows=("ok", "size"), in_order=("ok", "sum"), least_psnr_db=("least", "min"))
    return counted.round(1).reset_index()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rgap.experiments.verify", description=__doc__)
    parser.add_argument("only", nargs="*", help="samples to run; all by default")
    parser.add_argument("--count", type=int, help=f"cases of each sample; {COUNT} unless it says otherwise")
    parser.add_argument("--seed", type=int, default=0, help="seed of the cases")
    parser.add_argument("--output", type=Path, default=artifact.ROOT / "build" / "verify.csv", help="where to write")
    return parser


if __name__ == "__main__":
    sys.exit(main())
