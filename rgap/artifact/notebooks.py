"""Runs a notebook strictly: an unknown parameter, an error, or an absent figure fails and leaves no target."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbformat
import papermill
import yaml
from nbclient.exceptions import CellExecutionError
from nbconvert.preprocessors import ExecutePreprocessor

from rgap.artifact.claims import expected_outputs, forget_claims
from rgap.artifact.outputs import figures_dir, write_atomically

KERNEL = "python3"  # jupyter runs the interpreter that started it under this name, so no kernel needs to be registered
# Instead of what the kernel writes: a version of Python and a display name that differ from machine to machine.
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": KERNEL},
    "language_info": {"name": "python"},
}
# The kernel would warn at every start that it talks to this process without encryption; both are on one machine.
QUIET = ["--IPKernelApp.log_level=ERROR"]


class NotebookError(RuntimeError):
    """A notebook cannot be run as asked, or did not write what it must."""


FAILURES = (NotebookError, papermill.PapermillExecutionError, CellExecutionError)
"""What `run` and `refresh` raise where the notebook is at fault."""


def run(source: Path, target: Path, parameters: dict | None = None, offered: dict | None = None) -> Path:
    """Runs a notebook by papermill and moves it to its place when everything succeeded.

    The working directory stays the caller's, so that relative paths in parameters mean what they say.

    Args:
        source: The notebook; its name begins with its number.
        target: Where the executed copy goes; a failed run is left beside it, as `*.partial.ipynb`.
        parameters: Values for the cell tagged `parameters`.
        offered: Values too, but used only if the notebook has such a parameter.

    Returns:
        The target.

    Raises:
        NotebookError: If a parameter is unknown to the notebook, or the figures and tables that it wrote are not those
            that notebooks/claims.yml lists.
        papermill.PapermillExecutionError: If a cell fails.
    """
    known = papermill.inspect_notebook(source).keys()
    if unknown := (parameters or {}).keys() - known:  # papermill itself would only warn
        raise NotebookError(f"{source.name} has no parameter {', '.join(sorted(unknown))}; it has {', '.join(known)}")
    values = {name: value for name, value in (offered or {}).items() if name in known} | (parameters or {})
    partial = target.with_suffix(".partial.ipynb")
    target.parent.mkdir(parents=True, exist_ok=True)
    before = _written(source.stem)
    forget_claims(source.stem)
    options = {"kernel_name": KERNEL, "extra_arguments": QUIET, "progress_bar": sys.stderr.isatty()}
    papermill.execute_notebook(source, partial, values, **options)
    _check_outputs(source.stem, before)
    os.replace(partial, target)
    return target


def refresh(source: Path) -> Path:
    """Runs a notebook where it lies and replaces its outputs; two runs give the same file.

    Args:
        source: The notebook, changed only if every cell succeeds.

    Returns:
        The source.

    Raises:
        NotebookError: As for `run`.
        nbclient.exceptions.CellExecutionError: If a cell fails.
    """
    notebook = nbformat.read(source, as_version=4)
    before = _written(source.stem)
    forget_claims(source.stem)
    executor = ExecutePreprocessor(timeout=None, kernel_name=KERNEL, record_timing=False, extra_arguments=QUIET)
    executor.preprocess(notebook, {"metadata": {"path": source.parent}})
    _check_outputs(source.stem, before)
    notebook.metadata |= METADATA
    return write_atomically(source, lambda file: file.write((nbformat.writes(notebook) + "\n").encode()))


def read_parameters(path: Path, notebook: str) -> dict:
    """A notebook's section of a parameter file: `{notebook: {parameter: value}}`, empty if it has none."""
    return yaml.safe_load(path.read_text(encoding="utf-8")).get(notebook) or {}


def parse_value(text: str) -> object:
    """A parameter's value, written as YAML."""
    return yaml.safe_load(text)


def _written(stem):
    """Name and time of everything that the notebook of this number has in the figures folder."""
    return {path.name: path.stat().st_mtime_ns for path in figures_dir().glob(f"{stem[:2]}_*")}


def _check_outputs(stem, before):
    expected = set(expected_outputs().get(stem, []))
    written = {name for name, time in _written(stem).items() if time != before.get(name)}
    if written != expected:
        raise NotebookError(
            f"{stem} did not write {sorted(expected - written)} and wrote {sorted(written - expected)} unasked; "
            "correct the notebook, or its outputs in notebooks/claims.yml"
        )
