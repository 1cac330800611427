"""What a run leaves behind: figures, tables and checked claims; the strict notebook runner and the report."""

from rgap.artifact.claims import (
    CLAIMS,
    COLUMNS,
    check_claim,
    expected_outputs,
    forget_claims,
    print_report,
    read_claims,
    report,
)
from rgap.artifact.outputs import ROOT, figures_dir, profile, save_figure, save_table, write_atomically

__all__ = [
    "CLAIMS",
    "COLUMNS",
    "ROOT",
    "check_claim",
    "expected_outputs",
    "figures_dir",
    "forget_claims",
    "print_report",
    "profile",
    "read_claims",
    "report",
    "save_figure",
    "save_table",
    "write_atomically",
]
