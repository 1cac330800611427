"""How the Makefile comes to a Python: `make env`, conda, and what is said where something is missing."""

import os
import shutil

import pytest
from makefile import ROOT, calls, make, make_clone, put_program


@pytest.fixture
def clone(tmp_path):
    return make_clone(tmp_path)


# A Python that can do what a real one can, by name of what it is asked for.
FAKE_PYTHON = """
case "$*" in
  *version_info*) exit {old} ;;
  --version) echo "Python {version}" ;;
  *"-m venv"*) mkdir -p .venv/bin; {venv} ;;
  *"-m pip install"*) echo "pip $*" >> calls; {pip} ;;
  *) echo "other $*" >> calls ;;
esac
"""
GOOD_PYTHON = {
    "old": 0,
    "version": "3.12.1",
    "venv": 'cp "$0" .venv/bin/python; printf "%s\\n" "$UV" > .venv/bin/uv; chmod +x .venv/bin/uv',
    "pip": "true",
}


def put_python(clone, name="python3", **changed):
    put_program(clone, name, FAKE_PYTHON.format(**{**GOOD_PYTHON, **changed}))
    for tool in ("cp", "chmod"):
        link = clone.parent / "bin" / tool
        link.exists() or link.symlink_to(shutil.which(tool))


UV = f'#!{shutil.which("bash")}\necho "uv $*" >> calls; '


def test_env_installs_once_by_uv_and_again_when_the_pins_change(clone):
    put_python(clone)
    assert make(clone, "env", "PIP_ARGS=--find-links wheels", UV=UV + "true").returncode == 0
    pin = next(
        line.split()[0] for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("uv==")
    )
    assert calls(clone) == [
        f"pip -m pip install --find-links wheels {pin}",
        "uv pip install --python .venv/bin/python --find-links wheels -r requirements.txt -e .",
    ]
    make(clone, "env")
    assert calls(clone) == []
    later = (clone / ".venv/.installed").stat().st_mtime + 1
    os.utime(clone / "requirements.txt", (later, later))
    make(clone, "env")
    assert len(calls(clone)) == 2


def test_env_falls_back_to_pip_where_uv_fails(clone):
    put_python(clone)
    assert make(clone, "env", UV=UV + "exit 2").returncode == 0
    assert calls(clone)[-1] == "pip -m pip install -r requirements.txt -e ."


def test_env_takes_a_newer_python_of_another_name(clone):
    put_python(clone, old=1, version="3.9.2")
    put_python(clone, "python3.12")
    assert make(clone, "env", UV=UV + "true").returncode == 0


@pytest.mark.parametrize(
    ("python", "message"),
    [
        (None, "no Python 3.11 or later on the PATH; install one"),
        ({"old": 1, "version": "3.9.2"}, "no Python 3.11 or later on the PATH (python3 is Python 3.9.2); install one"),
        ({"venv": "exit 1"}, "python3 cannot make a virtual environment; install its venv module"),
        ({"pip": "exit 1"}, "the packages could not be installed; connect to a network"),
    ],
)
@pytest.mark.parametrize("target", ["env", "figures", "test", "reconstruction"])
def test_env_says_in_one_line_what_is_missing(clone, python, message, target):
    if python is not None:
        put_python(clone, **python)
    done = make(clone, target)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if not line.startswith("make: ***")]
    assert len(said) == 1
    assert said[0].startswith(f"make env: {message}")
    if python == {"venv": "exit 1"}:
        assert not (clone / ".venv").exists()


@pytest.mark.parametrize("has_package", [True, False])
def test_an_active_conda_environment_is_used_if_it_has_this_package(clone, has_package):
    conda = clone.parent / "conda env"
    (conda / "bin").mkdir(parents=True)
    shutil.copy(shutil.which("true" if has_package else "false"), conda / "bin" / "python")
    done = make(clone, "-n", "reconstruction", CONDA_PREFIX=str(conda))
    assert (f'"{conda}/bin/python" -m rgap reconstruct' in done.stdout) == has_package
    assert (".venv/bin/python -m rgap reconstruct" in done.stdout) != has_package
