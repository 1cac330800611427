"""The pages of docs/: every pointer to code, test, figure, notebook and page exists, and every formula is drawn."""

import re
from pkgutil import resolve_name

import pytest

from rgap import artifact
from rgap.artifact import pages
from rgap.artifact.reference import reference

DOCS = sorted((artifact.ROOT / "docs").glob("*.md"))
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in DOCS}
POINTERS = {pointer for text in TEXTS.values() for pointer in re.findall(r"`(rgap(?:\.\w+)+)`", text)}
TESTS = {found for text in TEXTS.values() for found in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text)}


def test_the_pages_are_there():
    assert TEXTS.keys() == {"claims.md", "guide.md", "method.md"}
    assert len(POINTERS) > 60 and len(TESTS) > 50


@pytest.mark.parametrize("pointer", sorted(POINTERS))
def test_every_name_of_the_library_exists(pointer):
    resolve_name(pointer)


@pytest.mark.parametrize(("file", "test"), sorted(TESTS))
def test_every_test_exists(file, test):
    assert re.search(rf"^\s*def {test}\(" if test else "def test_", (artifact.ROOT / file).read_text(), re.M)


@pytest.mark.parametrize("name", TEXTS)
def test_every_link_leads_somewhere(name):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", TEXTS[name]):
        assert (artifact.ROOT / "docs" / target).exists(), target


@pytest.mark.parametrize("name", TEXTS)
def test_every_formula_is_drawn(name):
    drawn = pages.with_formulas(TEXTS[name])
    assert "<code>" not in drawn and not re.search(r"(?<!`)\$[^`$]+\$", re.sub(r"```.*?```", "", drawn, flags=re.S))


def test_the_reference_has_every_function_with_arguments_and_example():
    text = reference()
    part = text[text.index("### `rgap.reconstruct`") : text.index("### `rgap.reconstruct_update`")]
    assert "- `gradient_scale`: Factor κ" in part and ">>> result = rgap.reconstruct(" in part
    assert "- `GradientMismatchError`: " in part and "rgap.reconstruct(model, gradients, image_shape=None" in part


@pytest.mark.slow
def test_the_guides_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", TEXTS["guide.md"], re.M | re.S)
    assert len(blocks) >= 6
    exec(compile("\n".join(blocks), "guide.md", "exec"), {})
