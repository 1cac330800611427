"""What a run leaves behind: figures, tables and checked claims; the strict notebook runner and the report."""

from rgap.artifact.claims import CLAIMS, check_claim, expected_outputs, forget_claims, print_report, read_claims
from rgap.artifact.outputs import ROOT, figures_dir, profile, save_figure, save_table, write_atomically

__all__ = [
    "CLAIMS",
    "ROOT",
    "check_claim",
    "expected_outputs",
    "figures_dir",
    "forget_claims",
    "print_report",
    "profile",
    "read_claims",
    "save_figure",
    "save_table",
    "write_atomically",
]
