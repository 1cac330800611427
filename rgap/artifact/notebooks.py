"""Runs a notebook strictly: an unknown parameter, an error, or an absent figure fails and leaves no target."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from pathlib import Path

import nbformat
import papermill
import yaml
from nbclient.exceptions import CellExecutionError
from nbconvert.preprocessors import ExecutePreprocessor

from rgap.artifact.claims import expected_outputs, forget_claims
from rgap.artifact.outputs import ROOT, check_writable, figures_dir, write_atomically

KERNEL = "python3"  # under this name jupyter runs the interpreter that started it; no kernel needs to be registered
# Replaces what the kernel writes: a version of Python and a display name that differ from machine to machine.
SPEC = {"display_name": "Python 3", "language": "python", "name": KERNEL}
METADATA = {"kernelspec": SPEC, "language_info": {"name": "python"}}
# At every start the kernel would warn that its connection is not encrypted; it stays on one machine.
QUIET = ["--IPKernelApp.log_level=ERROR"]


class NotebookError(RuntimeError):
    """A notebook did not write what it must."""


FAILURES = (NotebookError, papermill.PapermillExecutionError, CellExecutionError)  # the notebook is at fault


def run(source: Path, target: Path, parameters: dict | None = None, offered: dict | None = None) -> Path:
    """Runs a notebook by papermill and moves the executed copy to its target when everything has succeeded.

    The source's name begins with its number. `parameters` are values for the cell tagged `parameters`; each of those
    `offered` is used only if the notebook has such a parameter. The working directory stays the caller's, so that
    relative paths in parameters refer to it. A failed run is left beside the target, as `*.partial.ipynb`.

    Raises:
        ValueError: If a parameter is unknown to the notebook, or the target cannot be written.
        NotebookError: If the figures and tables that it wrote are not those that notebooks/claims.yml lists.
        papermill.PapermillExecutionError: If a cell fails.
    """
    known = papermill.inspect_notebook(source).keys()
    if unknown := (parameters or {}).keys() - known:  # papermill itself would only warn
        raise ValueError(f"{source.name} has no parameter {', '.join(sorted(unknown))}; it has {', '.join(known)}")
    values = {name: value for name, value in (offered or {}).items() if name in known} | (parameters or {})
    check_writable(target)
    partial = target.with_suffix(".partial.ipynb")
    options = {"kernel_name": KERNEL, "extra_arguments": QUIET, "progress_bar": sys.stderr.isatty()}
    with _outputs_checked(source.stem):
        papermill.execute_notebook(source, partial, values, **options)
    os.replace(partial, target)
    return target


def refresh(source: Path) -> Path:
    """Runs a notebook in its own folder and replaces its outputs, only if all succeeds; two runs give the same file.

    What went to standard error, such as warnings, and this checkout's path are left out.

    Raises:
        NotebookError: As for `run`.
        nbclient.exceptions.CellExecutionError: If a cell fails.
    """
    notebook = nbformat.read(source, as_version=4)
    executor = ExecutePreprocessor(timeout=None, kernel_name=KERNEL, record_timing=False, extra_arguments=QUIET)
    with _outputs_checked(source.stem):
        executor.preprocess(notebook, {"metadata": {"path": source.parent}})
    notebook.metadata |= METADATA
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    text = nbformat.writes(notebook).replace(f"{ROOT}{os.sep}", "") + "\n"
    return write_atomically(source, lambda file: file.write(text.encode()))


def read_parameters(path: Path, notebook: str) -> dict:
    """A notebook's section of a parameter file: `{notebook: {parameter: value}}`, empty if it has none."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of parameters {path}")
    sections = read_yaml(path.read_text(encoding="utf-8"), str(path)) or {}
    section = sections.get(notebook) or {} if isinstance(sections, dict) else None
    if not isinstance(section, dict):
        raise ValueError(f"{path} has no mapping from notebook to mapping from parameter to value")
    return section


def read_yaml(text: str, name: str) -> object:
    """A value written as YAML; `name` begins the error message if it is not."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is no YAML: {error}") from error


def check_notebook(path: Path) -> None:
    """Refuses what is no notebook."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no notebook {path}")
    try:
        nbformat.read(path, as_version=4)
    except Exception as error:  # on files of another kind the reader raises errors of several classes
        raise ValueError(f"{path} is no notebook: {error}") from error


def _written(stem):
    """Name -> modification time of every file of this notebook in the figures folder."""
    return {path.name: path.stat().st_mtime_ns for path in figures_dir().glob(f"{stem[:2]}_*")}


@contextmanager
def _outputs_checked(stem):
    """Forgets a notebook's claims, and after its run refuses outputs other than those that claims.yml lists."""
    before = _written(stem)
    forget_claims(stem)
    yield
    expected = set(expected_outputs().get(stem, []))
    written = {name for name, time in _written(stem).items() if time != before.get(name)}
    if written != expected:
        raise NotebookError(
            f"{stem} did not write {sorted(expected - written)} and wrote {sorted(written - expected)} unasked; "
            "correct the notebook, or its outputs in notebooks/claims.yml"
        )
