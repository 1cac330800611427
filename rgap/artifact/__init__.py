"""What a run leaves behind: figures, tables and checked claims; the strict notebook runner and the report."""

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
from rgap.artifact.outputs import ROOT, figures_dir, profile, save_figure, save_table, write_atomically
from rgap.artifact.summary import print_report

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
    "run_alone",
    "save_figure",
    "save_table",
    "usual_seconds",
    "write_atomically",
]
