import io
import sys

import pytest

from rgap.artifact.progress import PROGRESS_FILE, progress


def stream(terminal):
    text = io.StringIO()
    text.isatty = lambda: terminal
    return text


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_shows_on_a_terminal_alone(monkeypatch, terminal):
    monkeypatch.delenv(PROGRESS_FILE, raising=False)
    monkeypatch.setattr(sys, "stderr", stream(terminal))
    assert list(progress(range(3), "attacks")) == [0, 1, 2]
    assert ("attacks" in sys.stderr.getvalue()) == terminal


def test_a_bar_goes_to_the_file_that_is_asked_for_and_nowhere_else(tmp_path, monkeypatch):
    monkeypatch.setenv(PROGRESS_FILE, str(tmp_path / "bars"))
    monkeypatch.setattr(sys, "stderr", stream(True))
    list(progress(range(3), "attacks"))
    with progress(title="training", total=2) as bar:
        bar.update(2)
    written = (tmp_path / "bars").read_text()
    assert "attacks 3 of 3" in written and "training 2 of 2" in written
    assert sys.stderr.getvalue() == ""


def test_a_notebooks_bar_is_text_for_the_file_and_no_widget_among_its_outputs():
    assert type(progress(range(2), "attacks")).__module__ == "tqdm.std"
