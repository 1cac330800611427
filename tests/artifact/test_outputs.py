"""Figures, tables and claims; and what must hold for every notebook."""

import ast
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest
import yaml
from PIL import Image

from rgap.artifact import outputs as artifact

CLAIMS = {
    "quality": {"notebook": "01_one", "statement": "smallest PSNR", "source": "ours", "at_least": 90, "unit": "dB"},
    "few": {"notebook": "01_one", "statement": "iterations", "source": "paper", "at_most": 8},
    "share": {"notebook": "02_two", "statement": "share", "source": "paper", "equals": 0.5, "tolerance": 0.01},
    "verdict": {"notebook": "02_two", "statement": "verdict", "source": "ours", "equals": "exact"},
    "fast": {"notebook": "01_one", "statement": "median", "source": "ours", "at_most": 0.5, "unit": "s", "times": True},
    "full": {"notebook": "02_two", "statement": "all", "source": "paper", "equals": 1, "profiles": ["paper"]},
}
GOOD = {"quality": 101.23456, "few": 8, "share": 0.509, "verdict": "exact", "fast": 0.1, "full": 1}


@pytest.fixture
def figures(tmp_path, monkeypatch):
    """A folder for figures and a claims.yml of our own."""
    monkeypatch.setattr(artifact, "ROOT", tmp_path)
    monkeypatch.setattr(artifact, "CLAIMS", tmp_path / "claims.yml")
    monkeypatch.setenv("RGAP_FIGURES", str(tmp_path / "figures"))
    monkeypatch.delenv("RGAP_PROFILE", raising=False)
    write_claims(CLAIMS)
    return tmp_path / "figures"


def write_claims(claims, outputs=None):
    artifact.CLAIMS.write_text(yaml.safe_dump({"outputs": outputs or {}, "claims": claims}))


def check_all(**changed):
    for claim_id, measured in {**GOOD, **changed}.items():
        artifact.check_claim(claim_id, measured)


def draw(height=1.0):
    fig, ax = plt.subplots(figsize=(2, 1))
    ax.plot([0, 1], [0, height])
    plt.close(fig)
    return fig


# ---- Figures and tables


def test_paths_are_anchored_on_the_package(monkeypatch, tmp_path):
    monkeypatch.delenv("RGAP_FIGURES", raising=False)
    monkeypatch.chdir(tmp_path)
    assert artifact.figures_dir() == Path(artifact.__file__).parents[2] / "figures"


def test_the_same_figure_gives_the_same_bytes_and_names_no_software(figures):
    first = artifact.save_figure(draw(), "01_line").read_bytes()
    assert artifact.save_figure(draw(), "01_line").read_bytes() == first
    with Image.open(figures / "01_line.png") as image:
        assert round(image.info["dpi"][0]) == 150
        assert image.info.keys() == {"dpi"}


def test_tables_are_rounded_and_times_go_to_a_file_of_their_own(figures):
    frame = pd.DataFrame({"name": ["a", "σ"], "count": [1234567, 2], "value": [1 / 3, 2e-15]})
    path = artifact.save_table(frame, "01_layers")
    assert path == figures / "01_layers.csv"
    assert path.read_text() == "name,count,value\na,1234567,0.333333\nσ,2,2e-15\n"
    assert artifact.save_table(frame, "01_layers", times=True).name == "01_layers_times.csv"
    assert artifact.save_figure(draw(), "01_cost", times=True).name == "01_cost_times.png"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize("name", ["layers", "1_layers", "01_layers.csv", "../01_layers"])
def test_a_name_without_its_notebooks_number_is_refused(figures, name):
    with pytest.raises(ValueError, match="must begin with the notebook's number"):
        artifact.save_table(pd.DataFrame(), name)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(figures):
    path = artifact.save_table(pd.DataFrame({"a": [1]}), "01_layers")

    def fail(file):
        file.write(b"part")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        artifact.write_atomically(path, fail)
    assert path.read_text() == "a\n1\n"
    assert list(figures.iterdir()) == [path]


# ---- Claims


def test_claims_that_hold_are_printed_without_the_measured_number_and_recorded_sorted(figures, capsys):
    check_all()
    assert capsys.readouterr().out.splitlines()[:3] == [
        "quality smallest PSNR: ≥ 90 dB: True",
        "few iterations: ≤ 8: True",
        "share share: = 0.5 ± 0.01: True",
    ]
    rows = pd.read_csv(figures / "claims.csv", dtype=str, keep_default_na=False)
    assert list(rows) == ["id", "notebook", "statement", "source", "expected", "measured", "unit", "holds"]
    assert rows["id"].tolist() == ["few", "full", "quality", "share", "verdict"]
    assert rows.iloc[2].tolist() == ["quality", "01_one", "smallest PSNR", "ours", "≥ 90", "101.2", "dB", "True"]
    assert pd.read_csv(figures / "claims_times.csv")["id"].tolist() == ["fast"]


@pytest.mark.parametrize(
    ("claim_id", "measured"),
    [("quality", 89.99), ("few", 9), ("share", 0.511), ("share", 0.489), ("verdict", "ambiguous"), ("verdict", 1),
     ("fast", 0.6), ("quality", float("nan")), ("few", float("nan")), ("share", float("nan"))],
)  # fmt: skip
def test_a_false_claim_is_recorded_and_raises(figures, capsys, claim_id, measured):
    with pytest.raises(AssertionError, match=f"claim {claim_id} fails: measured"):
        artifact.check_claim(claim_id, measured)
    assert capsys.readouterr().out.endswith(": False\n")
    assert artifact.report()[0]["holds"].tolist() == ["False"]


@pytest.mark.parametrize(("profile", "asserted"), [("default", False), ("paper", True), ("custom", False)])
def test_a_claim_is_asserted_only_in_its_profiles(figures, monkeypatch, profile, asserted):
    monkeypatch.setenv("RGAP_PROFILE", profile)
    if asserted:
        with pytest.raises(AssertionError):
            artifact.check_claim("full", 0.5)
    else:
        artifact.check_claim("full", 0.5)


def test_other_images_never_fail_a_claim(figures, monkeypatch):
    monkeypatch.setenv("RGAP_PROFILE", "custom")
    check_all(quality=1, few=99, share=7, verdict="rank-deficient", fast=60, full=0)
    assert artifact.report()[1] == []


def test_an_unknown_claim_is_refused(figures):
    with pytest.raises(ValueError, match=r"'speed' is not in claims\.yml; it has fast, few"):
        artifact.check_claim("speed", 1)


@pytest.mark.parametrize("change", [{"at_most": 3}, {"unitt": "dB"}, {"source": None}, {"at_least": None}])
def test_a_malformed_claim_is_refused(figures, change):
    claim = {name: value for name, value in {**CLAIMS["quality"], **change}.items() if value is not None}
    write_claims({"quality": claim})
    with pytest.raises(ValueError, match=r"claim quality in claims.yml lacks .* exactly one of"):
        artifact.read_claims()


def test_notebooks_that_run_at_the_same_time_lose_no_row(figures):
    many = {f"c{i:02}": {**CLAIMS["few"], "notebook": f"{i:02}_x"} for i in range(24)}
    write_claims(many)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda claim_id: artifact.check_claim(claim_id, 1), many))
    assert artifact.report()[0]["id"].tolist() == list(many)
    artifact.forget_claims("07_x")
    assert artifact.report()[1] == ["claim c07 was not measured by 07_x"]


def test_the_report_names_whatever_is_wrong(figures, capsys):
    check_all()
    assert artifact.print_report() == 0
    assert "smallest PSNR" in capsys.readouterr().out
    with pytest.raises(AssertionError):
        artifact.check_claim("quality", 20.7)
    artifact.forget_claims("02_two")
    write_claims(CLAIMS, outputs={"01_one": ["01_picture.png"]})
    assert artifact.print_report() == 1
    problems = capsys.readouterr().err
    for problem in ("01_picture.png is missing", "claim quality fails", "claim share was not measured by 02_two"):
        assert problem in problems


# ---- The notebooks of this project

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def code_cells(path):
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


def claim_ids(path):
    calls = [
        node for cell in code_cells(path) for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Call)
    ]
    named = [call for call in calls if getattr(call.func, "attr", getattr(call.func, "id", None)) == "check_claim"]
    return {ast.literal_eval(call.args[0]) for call in named}


def test_there_is_a_notebook_with_the_reconstruction():
    assert "01_reconstruction" in [path.stem for path in NOTEBOOKS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestNotebook:
    def test_every_cell_was_executed_in_order_without_an_error(self, path):
        cells = code_cells(path)
        assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
        assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]

    def test_one_cell_is_tagged_parameters_and_holds_literals_only(self, path):
        (cell,) = [cell for cell in code_cells(path) if "parameters" in cell.metadata.get("tags", [])]
        for statement in ast.parse(cell.source).body:
            assert isinstance(statement, ast.Assign)
            ast.literal_eval(statement.value)

    def test_a_checked_cell_prints_something(self, path):
        checked = [cell for cell in code_cells(path) if "# NBVAL_CHECK_OUTPUT" in cell.source]
        assert checked and all(cell.outputs for cell in checked)

    def test_no_path_of_the_machine_stands_in_it(self, path):
        assert "Path('/" not in path.read_text() and str(path.parents[1]) not in path.read_text()

    def test_no_function_is_longer_than_five_lines(self, path):
        nodes = [node for cell in code_cells(path) for node in ast.walk(ast.parse(cell.source))]
        functions = [node for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
        assert not [f.name for f in functions if f.end_lineno - f.lineno >= 5]

    def test_its_claims_are_those_of_claims_yml_and_the_last_run_measured_them(self, path):
        assert claim_ids(path) == {i for i, claim in artifact.read_claims().items() if claim["notebook"] == path.stem}


def test_claims_outputs_and_paper_parameters_belong_to_notebooks():
    names = {path.stem for path in NOTEBOOKS}
    paper = yaml.safe_load((artifact.CLAIMS.parent / "paper.yml").read_text())
    assert {claim["notebook"] for claim in artifact.read_claims().values()} <= names
    assert set(artifact.expected_outputs()) <= names
    assert set(paper) <= names
    for notebook, outputs in artifact.expected_outputs().items():
        assert all(name.startswith(notebook[:3]) for name in outputs)
