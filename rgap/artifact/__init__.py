"""What a run leaves behind: figures, tables and checked claims; the strict notebook runner and the report."""

from rgap.artifact.outputs import (
    CLAIMS,
    COLUMNS,
    ROOT,
    check_claim,
    expected_outputs,
    figures_dir,
    forget_claims,
    print_report,
    profile,
    read_claims,
    save_figure,
    save_table,
    write_atomically,
)

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
    "save_figure",
    "save_table",
    "write_atomically",
]
