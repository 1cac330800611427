"""The command line: one parser, one line for what is wrong, and no torch where it is not needed."""

import subprocess
import sys

import pytest

import rgap
from rgap import __main__ as command_line
from rgap import commands, models
from rgap.client import LOSSES


def run(capsys, *arguments):
    """Exit status, standard output, standard error."""
    try:
        status = command_line.main(list(arguments))
    except SystemExit as end:
        status = end.code
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_the_help_names_every_command_and_each_has_its_own(capsys):
    status, out, _ = run(capsys, "--help")
    assert status == 0
    for command in ("reconstruct", "train", "audit", "verify", "bench", "notebook", "report"):
        assert f"\n    {command}" in out
        assert run(capsys, command, "--help")[1].startswith(f"usage: rgap {command} ")


def test_the_help_names_the_models_and_losses_there_are(capsys):
    assert command_line.MODELS == tuple(models.IMAGE_SHAPES) and command_line.LOSSES == LOSSES
    assert (*command_line.MODELS, "resnet18") == tuple(models.ANALYSIS_SHAPES)
    out = " ".join(run(capsys, "audit", "--help")[1].split())
    assert "lenet, resnet18, or module:function" in out and "1 leaks: they do" in out and "rgap audit --model" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "rgap: the following arguments are required: COMMAND"),
        (["attack"], "rgap: argument COMMAND: invalid choice: 'attack'"),
        (["reconstruct", "--index", "x"], "rgap reconstruct: argument --index: invalid int value: 'x'"),
        (["audit", "--batches", "2"], "rgap: unrecognized arguments: --batches 2"),
        (["notebook", "a.ipynb", "-p", "number", "2"], "rgap notebook: parameters need a TARGET"),
        (["notebook", "no/such.ipynb"], "rgap notebook: there is no notebook no/such.ipynb"),
    ],
)
def test_wrong_arguments_get_one_line_and_status_two(capsys, arguments, message):
    status, out, err = run(capsys, *arguments)
    assert status == 2 and out == "" and err.startswith(message) and err.count("\n") == 1


def test_an_interruption_gets_one_line(capsys, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "train", interrupted)
    assert run(capsys, "train") == (130, "", "rgap train: interrupted\n")


@pytest.mark.slow
def test_a_notebook_is_started_without_torch_and_every_public_name_comes_when_asked_for():
    code = """
import sys, rgap.__main__
status = rgap.__main__.main(["notebook", "no/such.ipynb"])
print(status, "torch" in sys.modules, [name for name in rgap.__all__ if not hasattr(rgap, name)])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "2 False []\n"
    with pytest.raises(AttributeError, match="'rgap' has no attribute 'nothing'"):
        rgap.nothing  # noqa: B018
