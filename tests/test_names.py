"""Names of the library: no two classes share one, and a numeric constant says more than one word."""

import ast
from collections import defaultdict
from pathlib import Path

import pytest

import rgap

ROOT = Path(rgap.__file__).parent
TREES = {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}


def is_number(node):
    """Whether an expression is made of numbers alone, such as 1e-3, -4, 2.0**-53 or 1 / 3."""
    numeric = (ast.Constant, ast.UnaryOp, ast.BinOp, ast.unaryop, ast.operator)
    parts = list(ast.walk(node))
    return all(isinstance(part, numeric) for part in parts) and all(
        isinstance(part.value, int | float) and not isinstance(part.value, bool)
        for part in parts
        if isinstance(part, ast.Constant)
    )


def numeric_constants(tree):
    """Names of the numbers at the top of a module."""
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None and is_number(node.value):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))


def test_what_counts_as_a_numeric_constant():
    source = "A = 1e-3; B: float = -2.0**-53; C = 'text'; D = (1, 2); E = True; F = A; G = 1 / 3; H: int; I = []"
    assert list(numeric_constants(ast.parse(source))) == ["A", "B", "G"]


ROOMS = sorted({path.split("/")[0].removesuffix(".py") for path in TREES})


def test_no_two_classes_share_a_name():
    homes = defaultdict(list)
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                homes[node.name.lstrip("_")].append(path)
    assert {name: paths for name, paths in homes.items() if len(paths) > 1} == {}


@pytest.mark.parametrize("room", ROOMS)
def test_every_numeric_constant_names_its_quantity_and_its_role(room):
    one_word = [
        f"{path}: {name}"
        for path, tree in TREES.items()
        if path.split("/")[0].removesuffix(".py") == room
        for name in numeric_constants(tree)
        if "_" not in name.strip("_")
    ]
    assert one_word == []
