"""The import rule: a package imports only from lines below its own (rgap/README.md draws them)."""

import ast
from pathlib import Path

import pytest

import rgap

ROOT = Path(rgap.__file__).parent

FLOORS = (
    "arguments isolation",
    "artifact linalg models results",
    "data metrics",
    "network",
    "shared_gradient",
    "client",
    "equations tokens",
    "head virtual",
    "separation residual",
    "attack ranks",
    "baselines",
    "experiments",
    "commands",
    "__main__",
)
LEVELS = {room: level for level, rooms in enumerate(FLOORS) for room in rooms.split()}


def room(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0]


def imports(path):
    """Rooms that a module imports, those for type checkers apart."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "rgap":
            names = [f"{node.module}.{a.name}" if node.module == "rgap" else node.module for a in node.names]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names if a.name.startswith("rgap.")]
        yield from (name.split(".")[1] for name in names)


MODULES = sorted(path for path in ROOT.rglob("*.py") if path.name != "__init__.py" or path.parent != ROOT)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_package_imports_only_from_below(path):
    here = room(path)
    for other in imports(path):
        assert other == here or LEVELS[other] < LEVELS[here], f"{here} imports {other}, which is not below it"


BELOW_BASELINES = [path for path in MODULES if LEVELS["data"] < LEVELS[room(path)] < LEVELS["baselines"]]


@pytest.mark.parametrize("path", BELOW_BASELINES, ids=lambda path: str(path.relative_to(ROOT)))
def test_an_attack_sees_no_original_image(path):
    """Data and metrics know the true images; only baselines, experiments and the command line may import them."""
    assert not {"data", "metrics"} & set(imports(path))
