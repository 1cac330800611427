import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from rgap import artifact
from rgap.__main__ import main
from rgap.artifact import claims, notebooks, schedule

# A notebook that needs no import worth mentioning, because every run starts a fresh kernel.
CELLS = [
    nbformat.v4.new_markdown_cell("# A number", id="title"),
    nbformat.v4.new_code_cell('number = 1\ncolor = "embedded"', id="parameters", metadata={"tags": ["parameters"]}),
    nbformat.v4.new_code_cell(
        "import os, pathlib\nfigures = pathlib.Path(os.environ['RGAP_FIGURES'])\nfigures.mkdir(exist_ok=True)\n"
        "(figures / '01_numbers.csv').write_text(f'{number}, {color}');",
        id="table",
    ),
    nbformat.v4.new_code_cell("assert number < 10, 'too large'\nprint('it holds')", id="claim"),
]
CLAIM = {"notebook": "01_sum", "statement": "the number", "source": "ours", "at_most": 10}
SOURCE, TARGET = "notebooks/01_sum.ipynb", "build/default/01_sum.ipynb"


@pytest.fixture
def project(root, write_outputs):
    """A folder with one notebook and its claims.yml."""
    metadata = {"kernelspec": {"name": "python3", "display_name": "mine", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=CELLS, metadata=metadata), root / SOURCE)
    write_outputs(["01_numbers.csv"])
    return root


@pytest.fixture
def write_outputs(write_claims):
    return lambda names: write_claims({"small": CLAIM}, {"01_sum": names})


def test_run_writes_the_target_and_its_table_and_drops_claims_of_an_earlier_run(project):
    rows = [
        {**CLAIM, "id": i, "notebook": i, "expected": "", "measured": "", "unit": "", "holds": True}
        for i in ("01_sum", "02_other")
    ]
    (project / "figures").mkdir()
    pd.DataFrame(rows)[claims.COLUMNS].to_csv("figures/claims.csv", index=False)
    assert main(["notebook", SOURCE, TARGET]) == 0
    executed = nbformat.read(TARGET, 4)
    assert [cell.execution_count for cell in executed.cells[1:]] == [1, 2, 3]
    assert Path("figures/01_numbers.csv").read_text() == "1, embedded"
    assert pd.read_csv("figures/claims.csv")["id"].tolist() == ["02_other"]
    assert [path.name for path in Path("build/default").iterdir()] == ["01_sum.ipynb"]


def test_parameters_come_from_the_notebooks_section_of_a_file_and_from_the_command_line(project):
    Path("some.yml").write_text("01_sum: {number: 5}\n02_other: {unknown: 1}\n")
    options = ["-f", "some.yml", "-p", "number", "7.5", "-o", "color", "folder:a b", "-o", "gray", "mnist"]
    assert main(["notebook", SOURCE, TARGET, *options]) == 0
    assert Path("figures/01_numbers.csv").read_text() == "7.5, folder:a b"
    assert notebooks.read_parameters(Path("some.yml"), "01_sum") == {"number": 5}
    assert notebooks.read_parameters(Path("some.yml"), "03_third") == {}


@pytest.mark.parametrize("from_file", [True, False])
def test_an_unknown_parameter_fails_before_anything_runs(project, capsys, from_file):
    Path("some.yml").write_text("01_sum: {nummber: 5}")
    assert main(["notebook", SOURCE, TARGET, *(["-f", "some.yml"] if from_file else ["-p", "nummber", "1"])]) == 2
    assert "has no parameter nummber; it has number, color" in capsys.readouterr().err
    assert not Path("build").exists() and not Path("figures").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("notebook none.ipynb out.ipynb", "there is no notebook none.ipynb"),
        ("notebook . out.ipynb", "there is no notebook ."),
        ("notebook some.yml", "some.yml is no notebook: "),
        ("notebook empty.ipynb", "empty.ipynb is no notebook: "),
        (f"notebook {SOURCE} . -p number 1", "path . is no regular file"),
        (f"notebook {SOURCE} some.yml/out.ipynb", "path some.yml/out.ipynb cannot be written"),
        (f"notebook {SOURCE} out.ipynb -p number [", "parameter number is no YAML: "),
        (f"notebook {SOURCE} out.ipynb -f none.yml", "there is no file of parameters none.yml"),
        (f"notebook {SOURCE} out.ipynb -f broken.yml", "broken.yml is no YAML: "),
        (f"notebook {SOURCE} out.ipynb -f some.yml", "some.yml has no mapping from notebook to mapping"),
        ("notebooks run none.ipynb", "there is no file none.ipynb"),
        (f"notebooks run {SOURCE} --jobs 0", "jobs is 0; it must be at least 1"),
        (f"notebooks run {SOURCE} -f none.yml", "there is no file none.yml"),
        (f"notebooks run {SOURCE} --into some.yml", "path some.yml/logs/log cannot be written"),
    ],
)
def test_wrong_arguments_get_one_line_and_status_two(project, capsys, arguments, message):
    Path("some.yml").write_text("- 1")
    Path("broken.yml").write_text("a: [1")
    Path("empty.ipynb").write_text("{}")
    assert main(arguments.split()) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"rgap {arguments.split()[0]}: {message}") and printed.count("\n") == 1


def test_a_failing_cell_fails_the_run_and_leaves_no_target(project, capsys):
    assert main(["notebook", SOURCE, TARGET, "-p", "number", "11"]) == 1
    assert "too large" in capsys.readouterr().err
    assert not Path(TARGET).exists() and Path("build/default/01_sum.partial.ipynb").exists()


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (["01_numbers.csv", "01_picture.png"], "did not write ['01_picture.png']"),
        ([], "wrote ['01_numbers.csv'] unasked"),
    ],
)
def test_an_output_that_is_missing_or_unlisted_fails(project, write_outputs, capsys, outputs, message):
    (project / "figures").mkdir()
    (project / "figures" / "01_picture.png").write_bytes(b"left by an earlier run")
    write_outputs(outputs)
    assert main(["notebook", SOURCE, TARGET]) == 1
    assert message in capsys.readouterr().err
    assert not Path(TARGET).exists()


@pytest.mark.slow
def test_refresh_twice_gives_the_same_bytes_and_a_failure_changes_nothing(project, capsys):
    assert main(["notebook", SOURCE]) == 0
    first = Path(SOURCE).read_bytes()
    executed = nbformat.reads(first.decode(), 4)
    assert [cell.execution_count for cell in executed.cells[1:]] == [1, 2, 3]
    assert executed.cells[-1].outputs[0].text == "it holds\n"
    assert executed.metadata == notebooks.METADATA
    assert main(["notebook", SOURCE]) == 0
    assert Path(SOURCE).read_bytes() == first
    broken = first.replace(b"number = 1", b"number = 11")
    Path(SOURCE).write_bytes(broken)
    assert main(["notebook", SOURCE]) == 1
    assert "too large" in capsys.readouterr().err
    assert Path(SOURCE).read_bytes() == broken


@pytest.mark.slow
def test_refresh_leaves_out_warnings_and_this_checkouts_path(project, monkeypatch):
    monkeypatch.setattr(notebooks, "ROOT", project)
    noisy = nbformat.v4.new_code_cell(
        "import sys, os; print('warned', file=sys.stderr); print(os.path.abspath('../x'))"
    )
    notebook = nbformat.read(SOURCE, 4)
    notebook.cells.append(noisy)
    nbformat.write(notebook, SOURCE)
    notebooks.refresh(Path(SOURCE))
    (output,) = nbformat.read(SOURCE, 4).cells[-1].outputs
    assert output.text == "x\n"


@pytest.mark.parametrize(
    ("arguments", "workers", "command"),
    [
        (["run", "--into", "build/x", "-f", "a.yml", "-o", "color", "folder:a b"], None,
         f"rgap notebook {SOURCE} build/x/01_sum.ipynb -f a.yml -o color folder:a b"),
        (["run", "--into", "build/x", "--jobs", "5"], 5, f"rgap notebook {SOURCE} build/x/01_sum.ipynb"),
        (["refresh", "--into", "build/x", "--jobs", "5"], 1, f"rgap notebook {SOURCE}"),
        (["test", "--into", "build/x"], None,
         f"pytest -q -p no:cacheprovider --nbval-lax --nbval-current-env {SOURCE}"),
    ],
)  # fmt: skip
def test_several_notebooks_are_jobs_of_their_own(project, monkeypatch, capsys, arguments, workers, command):
    seen = []
    for name in ("notebooks/04_timing_vs_dlg.ipynb", "a.yml"):
        Path(name).touch()
    monkeypatch.setattr(artifact, "usual_seconds", lambda: {"01_sum": 7})
    monkeypatch.setattr(artifact, "run_alone", lambda: ["04_timing_vs_dlg"])
    monkeypatch.setattr(schedule, "run_jobs", lambda *given: seen.append(given) or [given[0][0]])
    assert main(["notebooks", arguments[0], SOURCE, "notebooks/04_timing_vs_dlg.ipynb", *arguments[1:]]) == 1
    ((one, timed), count, logs), *_ = seen
    assert count == (workers or schedule.usable_cores()) and logs == Path("build/x/logs")
    assert " ".join(one.command[2:]) == command and one.command[0] == sys.executable
    assert (one.name, one.alone, timed.alone) == ("01_sum", False, True)
    assert one.seconds == 7 and timed.seconds == 60
    assert capsys.readouterr().err == "01_sum failed; what it printed is in build/x/logs/01_sum.log\n"


def test_an_interrupted_run_says_what_comes_next(project, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(notebooks, "run", interrupted)
    assert main(["notebook", SOURCE, TARGET]) == 130
    assert capsys.readouterr().err == f"{SOURCE}: interrupted; the next run begins this notebook again\n"
