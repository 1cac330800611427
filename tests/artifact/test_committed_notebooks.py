"""What must hold for every notebook of this project."""

import ast
import types
from pathlib import Path

import nbformat
import pytest
import yaml

from rgap import artifact

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

    def test_what_it_uses_of_a_module_is_there(self, path):
        nodes, names = [node for cell in code_cells(path) for node in ast.walk(ast.parse(cell.source))], {}
        for node in nodes:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                exec(ast.unparse(node), names)
        used = [(names.get(node.value.id), node.attr) for node in nodes
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]  # fmt: skip
        assert not [(m, name) for m, name in used if isinstance(m, types.ModuleType) and not hasattr(m, name)]

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

    def test_no_progress_bar_stands_in_it(self, path):
        assert "application/vnd.jupyter.widget" not in path.read_text()


def test_claims_outputs_and_paper_parameters_belong_to_notebooks():
    names = {path.stem for path in NOTEBOOKS}
    paper = yaml.safe_load((artifact.CLAIMS.parent / "paper.yml").read_text())
    assert {claim["notebook"] for claim in artifact.read_claims().values()} <= names
    assert set(artifact.expected_outputs()) <= names
    assert set(paper) <= names
    assert set(artifact.usual_seconds()) == names
    assert set(artifact.run_alone()) <= names
    for notebook, outputs in artifact.expected_outputs().items():
        assert all(name.startswith(notebook[:3]) for name in outputs)
