"""What is imported when, and what the core does without the extra `artifact`."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from rgap.artifact import from_extra

ROOT = Path(__file__).parents[1]
EXTRA = (
    "dp_accounting",
    "filelock",
    "joblib",
    "matplotlib",
    "nbformat",
    "papermill",
    "seaborn",
    "torchmetrics",
    "yaml",
)
SLOW = {"pandas", "scipy.optimize", "skimage", "torchvision", "PIL", *EXTRA}


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def without_extra(*commands):
    """Commands of `rgap` where no module of the extra can be imported, and their exit status.

    None in sys.modules makes Python raise what it raises where there is no such module.
    """
    code = f"import sys; sys.modules.update(dict.fromkeys({EXTRA!r})); from rgap.__main__ import main"
    return python(f"{code}; print('status', [main(list(each)) for each in {commands!r}])")


@pytest.mark.slow
def test_an_import_brings_what_it_needs_and_no_more():
    """Modules are counted, not seconds, which other work on the machine would change."""
    code = f"""
import sys
import rgap
heavy = {SLOW | {"torch", "numpy", "scipy"}!r}
print(sorted(heavy & set(sys.modules)), "reconstruct" in dir(rgap), "check_claim" in dir(rgap.artifact))
heavy -= {{"torch", "numpy", "scipy"}}
from rgap import rank_analysis, reconstruct
print(sorted(heavy & set(sys.modules)))
"""
    assert python(code).stdout == "[] True True\n[]\n"


@pytest.mark.slow
def test_without_the_extra_core_commands_run_and_others_say_what_is_missing(tmp_path):
    audit = ("audit", "--model", "cnn6", "--json", str(tmp_path / "audit.json"))
    attack = ("reconstruct", "--model", "fcn3", "--output", str(tmp_path))
    done = without_extra(audit, attack, ("verify",), ("report",))
    assert "leaks" in done.stdout and "verdict  exact" in done.stdout, done.stderr
    assert done.stdout.endswith("status [1, 0, 2, 2]\n")
    said = done.stderr.splitlines()
    assert [line.split()[1] for line in said] == ["verify:", "report:"]
    assert all("is not installed; the extra `artifact` brings it: pip install '.[artifact]'" in line for line in said)


def test_a_function_that_needs_the_extra_says_so(monkeypatch):
    assert from_extra("json.decoder").JSONDecoder
    monkeypatch.setitem(sys.modules, "seaborn", None)
    with pytest.raises(ModuleNotFoundError, match="seaborn is not installed; the extra `artifact` brings it"):
        from_extra("seaborn")


def test_the_wheel_holds_every_file_that_is_no_module():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["rgap"]
    held = {path for pattern in patterns for path in (ROOT / "rgap").glob(pattern)}
    others = {path for path in (ROOT / "rgap").rglob("*") if path.is_file() and path.suffix not in {".py", ".pyc"}}
    assert others == held


def test_every_dependency_is_pinned_with_hashes():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + extras["artifact"] + extras["dev"] + extras["lab"]
    text = (ROOT / "requirements.txt").read_text()
    entries = re.findall(r"^([\w.-]+)==.*\\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", text, re.MULTILINE)
    assert len(entries) == len(re.findall("^[^ #]", text, re.MULTILINE)) > 150
    assert {re.split("[>=<\\[]", each)[0] for each in wanted} <= {name for name, _ in entries}
