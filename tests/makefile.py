"""A folder with the Makefile and stand-ins for the programs that it calls."""

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOOLS = ["bash", "awk", "cmp", "echo", "find", "grep", "mkdir", "printf", "rm", "sed", "touch", "true"]


def make_clone(tmp_path):
    """The Makefile in a folder with a space in its name, one notebook, and a PATH without any Python."""
    folder = tmp_path / "a clone"
    (folder / "notebooks").mkdir(parents=True)
    (folder / "rgap").mkdir()
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    for name in (
        "notebooks/01_one.ipynb",
        "notebooks/02_two.ipynb",
        "notebooks/claims.yml",
        "notebooks/paper.yml",
        "rgap/solve.py",
    ):
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
    """In place of Python: notes its arguments and the profile, and makes the target of a notebook run."""
    note = 'echo "$RGAP_PROFILE|${RGAP_FIGURES##*/a clone/}|$*" >> calls'
    target = 'if [ "$3" = notebook ] && [ -n "${5:-}" ]; then mkdir -p "${5%/*}"; echo ran > "$5"; fi'
    put_program(clone, "runner", f"{note}; {target}")


def calls(clone):
    """What was run since the last question."""
    log = clone / "calls"
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return lines
