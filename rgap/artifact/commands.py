"""The commands of `python -m rgap` that run notebooks and write pages, without torch: each returns the exit status."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rgap import artifact
from rgap.artifact.outputs import check_writable

UNKNOWN_SECONDS = 60.0  # what a notebook takes of which notebooks/claims.yml does not say how long it takes


def notebook(options: argparse.Namespace) -> int:
    """Runs one notebook, or refreshes its committed outputs."""
    from rgap.artifact import notebooks as runner

    if not options.target and (options.file or options.parameter or options.offer):
        raise ValueError("parameters need a TARGET; committed outputs are those of the notebook's own values")
    runner.check_notebook(options.source)
    parameters = runner.read_parameters(options.file, options.source.stem) if options.file else {}
    parameters |= {name: runner.read_yaml(text, f"parameter {name}") for name, text in options.parameter}
    try:
        if options.target:
            runner.run(options.source, options.target, parameters, dict(options.offer))
        else:
            runner.refresh(options.source)
    except runner.FAILURES as error:
        print(f"{options.source}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{options.source}: interrupted; the next run begins this notebook again", file=sys.stderr)
        return 130
    return 0


def notebooks(options: argparse.Namespace) -> int:
    """Runs several notebooks side by side."""
    from rgap.artifact import schedule

    if missing := [path for path in (*options.sources, options.file) if path and not path.is_file()]:
        raise FileNotFoundError(f"there is no file {missing[0]}")
    if options.jobs is not None and options.jobs < 1:
        raise ValueError(f"jobs is {options.jobs}; it must be at least 1")
    check_writable(options.into / "logs" / "log")
    seconds, alone = artifact.usual_seconds(), artifact.run_alone()
    given = ["-f", str(options.file)] if options.file else []
    given += [text for pair in options.offer for text in ("-o", *pair)]

    def command(source: Path) -> list[str]:
        commands = {
            "run": ["rgap", "notebook", str(source), str(options.into / source.name), *given],
            "refresh": ["rgap", "notebook", str(source)],
            "test": ["pytest", "-q", "-p", "no:cacheprovider", "--nbval-lax", "--nbval-current-env", str(source)],
        }
        return [sys.executable, "-m", *commands[options.action]]

    # Committed tables and the seconds in them are written by one notebook at a time.
    workers = 1 if options.action == "refresh" else options.jobs or schedule.usable_cores()
    jobs = [
        schedule.Job(source.stem, command(source), seconds.get(source.stem, UNKNOWN_SECONDS), source.stem in alone)
        for source in options.sources
    ]
    failed = schedule.run_jobs(jobs, workers, options.into / "logs")
    for job in failed:
        print(f"{job.name} failed; what it printed is in {options.into / 'logs' / job.name}.log", file=sys.stderr)
    return 1 if failed else 0


def report(options: argparse.Namespace) -> int:
    """Writes the pages, compares a run with the committed one, or writes the tables of claims."""
    if options.claims:
        return artifact.print_report()
    if options.readme:
        from rgap.artifact import readme

        print(*(f"written  {path}" for path in readme.update()), sep="\n")
        return 0
    from rgap.artifact import pages

    print(f"written  {pages.build()}")
    return 0
