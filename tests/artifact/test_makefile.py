"""The Makefile, run with stand-ins for Python and uv, so that it needs no network and no time."""

import os

import pytest
from makefile import ROOT, calls, make, make_clone, put_program, put_runner

REPORT = "-m rgap report --claims"


@pytest.fixture
def clone(tmp_path):
    return make_clone(tmp_path)


def test_help_is_the_default_and_lists_every_target(clone):
    listed = make(clone).stdout
    assert listed == make(clone, "help").stdout
    targets = "help env figures test test-fast verify lab test-lab notebooks reconstruction train audit report clean"
    for target in targets.split():
        assert f"make {target} " in listed


def test_figures_run_only_what_changed(clone):
    put_runner(clone)
    run = ["figures", "PYTHON=runner"]
    assert make(clone, *run).returncode == 0
    assert calls(clone) == [
        "default|figures|-m rgap notebook notebooks/01_one.ipynb build/default/01_one.ipynb",
        "default|figures|-m rgap notebook notebooks/02_two.ipynb build/default/02_two.ipynb",
        f"default|figures|{REPORT}",
    ]
    assert make(clone, *run).returncode == 0
    assert calls(clone) == [f"default|figures|{REPORT}"]
    for changed, notebooks in [("notebooks/02_two.ipynb", 1), ("rgap/solve.py", 2), ("notebooks/claims.yml", 2)]:
        later = (clone / "build/default/02_two.ipynb").stat().st_mtime + 1
        for target in (clone / "build/default").glob("*.ipynb"):
            os.utime(target, (later, later))
        os.utime(clone / changed, (later + 1, later + 1))
        make(clone, *run)
        assert len(calls(clone)) == notebooks + 1, changed
        os.utime(clone / changed, (0, 0))


def test_a_failing_notebook_fails_make_and_leaves_no_target(clone):
    put_program(clone, "runner", 'mkdir -p "${5%/*}"; echo part > "$5"; exit 3')
    done = make(clone, "figures", "PYTHON=runner")
    assert done.returncode != 0
    assert not list((clone / "build/default").glob("*.ipynb"))


def test_a_failing_claims_table_fails_make(clone):
    put_program(clone, "runner", '[ "$3" != report ]')
    assert make(clone, "figures", "PYTHON=runner").returncode != 0


def test_other_profiles_write_beside_the_figures(clone):
    put_runner(clone)
    make(clone, "figures", "PYTHON=runner", "PROFILE=paper")
    source_and_target = "-m rgap notebook notebooks/01_one.ipynb build/paper/01_one.ipynb -f notebooks/paper.yml"
    assert calls(clone)[0] == f"paper|build/paper/figures|{source_and_target}"
    custom = ["figures", "PYTHON=runner", "COLOR=folder:my own/it's here"]
    make(clone, *custom)
    source_and_target = (
        "-m rgap notebook notebooks/01_one.ipynb build/custom/01_one.ipynb -o color folder:my own/it's here"
    )
    assert calls(clone)[0] == f"custom|build/custom/figures|{source_and_target}"
    make(clone, *custom)
    assert calls(clone) == [f"custom|build/custom/figures|{REPORT}"]
    make(clone, *custom, "GRAY=mnist")
    assert [line.partition(" -o ")[2] for line in calls(clone)[:2]] == [
        "color folder:my own/it's here -o gray mnist"
    ] * 2


def test_a_scheduler_reaches_the_notebooks_and_only_from_the_command_line(clone):
    put_program(
        clone, "runner", 'echo "${RGAP_SCHEDULER-none}" >> calls; mkdir -p "${5%/*}"; echo ran > "${5:-/dev/null}"'
    )
    make(clone, "build/default/01_one.ipynb", "PYTHON=runner", "SCHEDULER=tcp://host:8786")
    make(clone, "build/default/02_two.ipynb", "PYTHON=runner", SCHEDULER="tcp://other:1")
    assert calls(clone) == ["tcp://host:8786", "none"]


def test_variables_of_the_environment_change_nothing(clone):
    put_runner(clone)
    make(clone, "figures", "PYTHON=runner", COLOR="always", PROFILE="mine", DATA="/data", PYTHON="nothing")
    assert calls(clone)[-1] == f"default|figures|{REPORT}"


@pytest.mark.parametrize("values", [["PROFILE=fast"], ["PROFILE=paper", "COLOR=mnist"]])
def test_profiles_that_make_no_sense_are_refused(clone, values):
    done = make(clone, "figures", "PYTHON=runner", *values)
    assert done.returncode != 0
    assert f"{values[0]} " in done.stderr


def test_reconstruction_hands_its_values_on(clone):
    put_runner(clone)
    make(clone, "reconstruction", "PYTHON=runner", "MODEL=fcn3", "INDEX=3", "DATA=folder:a b")
    assert calls(clone) == [
        "||-m rgap reconstruct --model fcn3 --index 3 --data folder:a b --seed 0 --batch 1 --weights "
    ]


def test_training_hands_its_values_on(clone):
    put_runner(clone)
    make(clone, "train", "PYTHON=runner", "MODEL=fcn3", "DATA=folder:a b", "EPOCHS=5")
    assert calls(clone) == ["||-m rgap train --model fcn3 --data folder:a b --epochs 5 --seed 0"]


def test_audit_hands_its_values_on_and_fails_where_the_network_leaks(clone):
    put_runner(clone)
    assert make(clone, "audit", "PYTHON=runner").returncode == 0
    assert calls(clone) == ["||-m rgap audit --model cnn6 --batch 1"]
    make(clone, "audit", "PYTHON=runner", "MODEL=my.nets:small", "SHAPE=3,32,32", "BATCH=4")
    assert calls(clone) == ["||-m rgap audit --model my.nets:small --shape 3,32,32 --batch 4"]
    put_program(clone, "runner", "exit 1")
    assert make(clone, "audit", "PYTHON=runner").returncode != 0


def test_a_report_is_of_its_profile(clone):
    put_runner(clone)
    make(clone, "report", "PYTHON=runner")
    make(clone, "report", "PYTHON=runner", "PROFILE=paper")
    assert calls(clone) == [
        "default|figures|-m rgap report",
        "paper|build/paper/figures|-m rgap report",
    ]


def test_the_fast_tests_are_those_without_the_mark(clone):
    put_runner(clone)
    assert make(clone, "test-fast", "PYTHON=runner").returncode == 0
    assert calls(clone) == ["||-m pytest -m not slow -n auto"]


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


def test_notebooks_are_refreshed_every_time_with_figures_elsewhere(clone):
    put_runner(clone)
    for _ in range(2):
        assert make(clone, "notebooks", "PYTHON=runner").returncode == 0
        names = ("01_one", "02_two")
        assert calls(clone) == [f"default|build/refresh|-m rgap notebook notebooks/{name}.ipynb" for name in names]


def test_clean_keeps_what_was_downloaded(clone):
    for name in ("data/archive", "default/01_one.ipynb", ".claims.lock"):
        (clone / "build" / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / "build" / name).touch()
    assert make(clone, "clean").returncode == 0
    assert [path.name for path in (clone / "build").iterdir()] == ["data"]
    assert make(clone, "clean").returncode == 0
