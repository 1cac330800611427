"""The Makefile, run with stand-ins for Python and uv, so that it needs no network and no time."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REPORT = "-m rgap report --claims"
RUN = "-m rgap notebooks run"
ONE, TWO = "notebooks/01_one.ipynb", "notebooks/02_two.ipynb"
TOOLS = ["bash", "awk", "cmp", "echo", "find", "grep", "mkdir", "printf", "rm", "sed", "touch", "true"]


@pytest.fixture
def clone(tmp_path):
    """The Makefile in a folder with a space in its name, two notebooks, and a PATH without any Python."""
    folder = tmp_path / "a clone"
    (folder / "notebooks").mkdir(parents=True)
    (folder / "rgap").mkdir()
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    for name in (ONE, TWO, "notebooks/claims.yml", "notebooks/paper.yml", "rgap/solve.py"):
        (folder / name).touch()
    (tmp_path / "bin").mkdir()
    for tool in TOOLS:
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    return folder


def put_program(clone, name, script):
    """A program on the clone's PATH."""
    path = clone.parent / "bin" / name
    path.write_text(f"#!{shutil.which('bash')}\n{script}\n")
    path.chmod(0o755)


def make(clone, *arguments, **environment):
    command = [shutil.which("make"), "--no-print-directory", *arguments]
    environment = {"PATH": str(clone.parent / "bin"), "LC_ALL": "C.UTF-8", **environment}
    return subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, check=False)


def put_runner(clone):
    """In place of Python: notes its arguments and the profile, and makes the targets of the notebooks that it runs."""
    note = 'echo "$RGAP_PROFILE|${RGAP_FIGURES##*/a clone/}|$*" >> calls'
    target = 'mkdir -p "build/$RGAP_PROFILE"; echo ran > "build/$RGAP_PROFILE/${each##*/}"'
    run = f'if [ "$3$4" = notebooksrun ]; then for each in "$@"; do case $each in *.ipynb) {target};; esac; done; fi'
    put_program(clone, "runner", f"{note}; {run}")


def calls(clone):
    """What was run since the last question."""
    log = clone / "calls"
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return lines


def test_help_is_the_default_and_lists_every_target(clone):
    listed = make(clone).stdout
    assert listed == make(clone, "help").stdout
    targets = "help env figures test test-fast verify bench lab test-lab refresh reconstruction train audit report"
    for target in [*targets.split(), "clean"]:
        assert f"make {target} " in listed
    lines = listed.splitlines()
    assert len(lines) <= 23 and max(map(len, lines)) <= 100
    assert f"{'':21}CASES='cnn6 fcn3-B5' ROUNDS=5 AGAINST=FILE.csv" in lines


def test_figures_run_only_what_changed(clone):
    put_runner(clone)
    run = ["figures", "PYTHON=runner"]
    assert make(clone, *run).returncode == 0
    assert calls(clone) == [
        f"default|build/default/figures|{RUN} {ONE} {TWO} --into build/default",
        f"default|build/default/figures|{REPORT}",
    ]
    assert make(clone, *run).returncode == 0
    assert calls(clone) == [f"default|build/default/figures|{REPORT}"]
    for changed, notebooks in [(TWO, TWO), ("rgap/solve.py", f"{ONE} {TWO}"), ("notebooks/claims.yml", f"{ONE} {TWO}")]:
        later = (clone / "build/default/02_two.ipynb").stat().st_mtime + 1
        for target in (clone / "build/default").glob("*.ipynb"):
            os.utime(target, (later, later))
        os.utime(clone / changed, (later + 1, later + 1))
        make(clone, *run)
        assert calls(clone)[0] == f"default|build/default/figures|{RUN} {notebooks} --into build/default", changed
        os.utime(clone / changed, (0, 0))


def test_a_failing_notebook_fails_make_and_runs_again(clone):
    put_program(clone, "runner", 'echo "$3" >> calls; [ "$3" != notebooks ]')
    for _ in range(2):
        assert make(clone, "figures", "PYTHON=runner").returncode != 0
        assert calls(clone) == ["notebooks"]


def test_how_many_run_at_a_time_is_for_the_caller(clone):
    put_runner(clone)
    make(clone, "figures", "PYTHON=runner", "JOBS=3")
    assert calls(clone)[0].endswith("--into build/default --jobs 3")


def test_a_failing_claims_table_fails_make(clone):
    put_program(clone, "runner", '[ "$3" != report ]')
    assert make(clone, "figures", "PYTHON=runner").returncode != 0


def test_other_profiles_write_beside_the_figures(clone):
    put_runner(clone)
    make(clone, "figures", "PYTHON=runner", "PROFILE=paper")
    run = f"{RUN} {ONE} {TWO} --into build/paper -f notebooks/paper.yml"
    assert calls(clone)[0] == f"paper|build/paper/figures|{run}"
    custom = ["figures", "PYTHON=runner", "COLOR=folder:my own/it's here"]
    make(clone, *custom)
    run = f"{RUN} {ONE} {TWO} --into build/custom -o color folder:my own/it's here"
    assert calls(clone)[0] == f"custom|build/custom/figures|{run}"
    make(clone, *custom)
    assert calls(clone) == [f"custom|build/custom/figures|{REPORT}"]
    make(clone, *custom, "GRAY=mnist")
    assert calls(clone)[0].partition(" -o ")[2] == "color folder:my own/it's here -o gray mnist"


def test_a_scheduler_reaches_the_notebooks_and_only_from_the_command_line(clone):
    put_program(clone, "runner", '[ "$3" = report ] || echo "${RGAP_SCHEDULER-none}" >> calls')
    make(clone, "figures", "PYTHON=runner", "SCHEDULER=tcp://host:8786")
    make(clone, "figures", "PYTHON=runner", SCHEDULER="tcp://other:1")
    assert calls(clone) == ["tcp://host:8786", "none"]


def test_variables_of_the_environment_change_nothing(clone):
    put_runner(clone)
    make(clone, "figures", "PYTHON=runner", COLOR="always", PROFILE="mine", DATA="/data", PYTHON="nothing")
    assert calls(clone)[-1] == f"default|build/default/figures|{REPORT}"


@pytest.mark.parametrize("values", [["PROFILE=fast"], ["PROFILE=paper", "COLOR=mnist"]])
def test_profiles_that_make_no_sense_are_refused(clone, values):
    done = make(clone, "figures", "PYTHON=runner", *values)
    assert done.returncode != 0
    assert f"{values[0]} " in done.stderr


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["reconstruction", "MODEL=fcn3", "INDEX=3", "DATA=folder:a b"],
         "rgap reconstruct --model fcn3 --index 3 --data folder:a b --seed 0 --batch 1 --weights "),
        (["train", "MODEL=fcn3", "DATA=folder:a b", "EPOCHS=5"],
         "rgap train --model fcn3 --data folder:a b --epochs 5 --seed 0"),
        (["audit"], "rgap audit --model cnn6 --batch 1"),
        (["audit", "MODEL=my.nets:small", "SHAPE=3,32,32", "BATCH=4"],
         "rgap audit --model my.nets:small --shape 3,32,32 --batch 4"),
        (["test-fast"], "pytest -m not slow -n auto"),
    ],
)  # fmt: skip
def test_targets_hand_their_values_on(clone, arguments, command):
    put_runner(clone)
    assert make(clone, *arguments, "PYTHON=runner").returncode == 0
    assert calls(clone) == [f"||-m {command}"]


def test_an_audit_fails_where_the_network_leaks(clone):
    put_program(clone, "runner", "exit 1")
    assert make(clone, "audit", "PYTHON=runner").returncode != 0


def test_a_report_is_of_its_profile_and_before_a_run_of_what_is_committed(clone):
    put_runner(clone)
    make(clone, "report", "PYTHON=runner")
    (clone / "build" / "default" / "figures").mkdir(parents=True)
    make(clone, "report", "PYTHON=runner")
    make(clone, "report", "PYTHON=runner", "PROFILE=paper")
    folders = ["default|figures", "default|build/default/figures", "paper|build/paper/figures"]
    assert calls(clone) == [f"{folder}|-m rgap report" for folder in folders]


def test_notebooks_are_tested_side_by_side_after_the_unit_tests(clone):
    put_runner(clone)
    assert make(clone, "test", "PYTHON=runner").returncode == 0
    assert calls(clone) == [
        "||-m pytest --cov -n auto",
        f"default|build/nbval/figures|-m rgap notebooks test {ONE} {TWO} --into build/nbval",
    ]


def test_lab_opens_the_audit_and_its_test_is_run_by_itself(clone):
    put_runner(clone)
    make(clone, "lab", "PYTHON=runner")
    make(clone, "test-lab", "PYTHON=runner")
    (lab, test) = calls(clone)
    assert lab.endswith(
        "jupyterlab --ServerApp.root_dir=notebooks --LabApp.default_url=/lab/tree/08_audit_your_model.ipynb"
    )
    assert test == "||-m pytest tests/lab/test_lab.py"
    assert (ROOT / "notebooks" / "08_audit_your_model.ipynb").is_file() and (ROOT / "tests/lab/test_lab.py").is_file()


@pytest.mark.parametrize("target", ["refresh", "notebooks"])
def test_notebooks_and_committed_figures_are_refreshed_every_time(clone, target):
    put_runner(clone)
    for _ in range(2):
        assert make(clone, target, "PYTHON=runner").returncode == 0
        assert calls(clone) == [
            f"default|figures|-m rgap notebooks refresh {ONE} {TWO} --into build/refresh",
            f"default|figures|{REPORT}",
            "||-m rgap report --readme",
        ]


def test_clean_keeps_what_was_downloaded(clone):
    for name in ("data/archive", "default/01_one.ipynb", ".claims.lock"):
        (clone / "build" / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / "build" / name).touch()
    assert make(clone, "clean").returncode == 0
    assert [path.name for path in (clone / "build").iterdir()] == ["data"]
    assert make(clone, "clean").returncode == 0


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
    """A Python on the clone's PATH, by default one with which `make env` succeeds."""
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
    assert calls(clone)[-2:] == ["pip -m pip install -r requirements.txt", "pip -m pip install --no-deps -e ."]


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
