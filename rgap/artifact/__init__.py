"""What a run leaves behind: figures, tables and checked claims; the strict notebook runner and the report."""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from rgap.artifact.outputs import ROOT, figures_dir, profile, save_figure, save_table, write_atomically

if TYPE_CHECKING:
    from rgap.artifact.claims import (
        CLAIMS,
        COLUMNS,
        check_claim,
        expected_outputs,
        forget_claims,
        read_claims,
        report,
        run_alone,
        usual_seconds,
    )
    from rgap.artifact.summary import print_report

__all__ = [
    "CLAIMS", "COLUMNS", "ROOT", "check_claim", "expected_outputs", "figures_dir", "forget_claims", "print_report",
    "profile", "read_claims", "report", "run_alone", "save_figure", "save_table", "usual_seconds",
    "write_atomically",
]  # fmt: skip


HOW = "the extra `artifact` brings it: pip install '.[artifact]' in a checkout of this repository"


def from_extra(module: str) -> ModuleType:
    """Imports a module of the extra `artifact`, without which the core works; else an error that says how to get it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error.name or module} is not installed; {HOW}", name=error.name) from error


def __getattr__(name: str):
    """Claims on first use: they need packages of the extra `artifact`, which files written by an attack do not."""
    if name in __all__:
        return getattr(
            importlib.import_module(f"rgap.artifact.{'summary' if name == 'print_report' else 'claims'}"), name
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
