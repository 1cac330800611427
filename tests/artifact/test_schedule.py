import os
import sys
import time

import pytest

from rgap.artifact import schedule
from rgap.artifact.schedule import Job, run_jobs

STAMP = "import sys, time; print(sys.argv[1], 'begins', time.time()); time.sleep(0.4); print('ends', time.time())"


def job(name, script="pass", seconds=1.0, **options):
    return Job(name, [sys.executable, "-c", script, name], seconds, **options)


def span(folder, name):
    first, last = (folder / f"{name}.log").read_text().splitlines()
    return float(first.split()[-1]), float(last.split()[-1])


def test_the_longest_comes_first_and_what_measures_times_runs_alone(tmp_path, capsys):
    jobs = [job("short", STAMP, 1), job("long", STAMP, 9), job("timed", STAMP, 5, alone=True)]
    assert run_jobs(jobs, 2, tmp_path) == []
    (timed, long, short) = (span(tmp_path, name) for name in ("timed", "long", "short"))
    assert timed[1] < min(long[0], short[0])
    assert max(long[0], short[0]) < min(long[1], short[1])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[1/3] timed: runs, as a rule 0:05"
    assert [line for line in lines if "as a rule" in line][1:] == [
        "[2/3] long: runs, as a rule 0:09",
        "[3/3] short: runs, as a rule 0:01",
    ]
    assert lines[1].startswith("[1/3] timed: done in 0:0") and " left" in lines[1]
    assert " left" not in lines[-1]


def test_one_worker_runs_one_at_a_time(tmp_path):
    run_jobs([job("one", STAMP), job("two", STAMP)], 1, tmp_path)
    spans = sorted(span(tmp_path, name) for name in ("one", "two"))
    assert spans[0][1] < spans[1][0]


def test_a_failure_stops_nothing_and_everything_that_it_printed_is_shown(tmp_path, capsys):
    jobs = [job("bad", "print('a reason'); raise SystemExit(3)", 9), job("good", "print('= 5 passed in 2 s =')", 1)]
    failed = run_jobs(jobs, 1, tmp_path)
    assert [(each.name, each.status) for each in failed] == [("bad", 3)]
    printed = capsys.readouterr().out
    assert "[1/2] bad: FAILED after 0:0" in printed and "\na reason\n" in printed
    assert ": done in 0:00, 5 passed\n" in printed


def test_a_terminal_sees_what_runs_how_far_it_is_and_how_long_is_left(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(schedule.sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "70")
    bar = "[time.sleep(0.7) for _ in progress(range(3), 'attacks')]"
    script = f"import time\nfrom rgap.artifact.progress import progress\n{bar}"
    run_jobs([job("bar", script, 30)], 1, tmp_path)
    printed = capsys.readouterr().out
    assert "\r0 of 1 done, about 0:" in printed and "bar 0:01 (attacks 1 of 3)" in printed
    assert max(len(part) for part in printed.replace("\n", "\r").split("\r")) < 70
    assert "as a rule" not in printed
    assert (tmp_path / "bar.log").read_text() == ""


def test_the_pace_of_what_has_ended_tells_how_long_is_left(tmp_path):
    jobs = [job("done", seconds=10), job("next", seconds=30), job("last", seconds=20)]
    assert schedule.Board(jobs, 1, tmp_path).seconds_left() == 60
    assert schedule.Board(jobs, 2, tmp_path).seconds_left() == 30
    jobs[0].status, jobs[0].took = 0, 20.0
    assert schedule.Board(jobs, 1, tmp_path).seconds_left() == 100


def test_an_interruption_ends_what_runs(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    sleeper = job("sleeper", "import time; time.sleep(60)")
    monkeypatch.setattr(schedule, "INTERRUPT_SECONDS", 0.2)
    monkeypatch.setattr(schedule.Board, "show", interrupt)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_jobs([sleeper], 1, tmp_path)
    assert sleeper.process.poll() is not None and time.monotonic() - start < 30


def test_the_cores_are_those_of_this_process():
    assert 1 <= schedule.usable_cores() <= os.cpu_count()
