import base64
import re

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from rgap import artifact
from rgap.__main__ import main
from rgap.artifact import pages

OUTPUTS = {"01_one": ["01_line.png", "01_numbers.csv"], "02_two": ["02_absent.png"]}
CLAIMS = {"01-good": {"notebook": "01_one", "statement": "share & more", "source": "ours", "equals": 1}}


def notebook(title, result):
    output = new_output("execute_result", {"text/plain": result}, execution_count=1)
    code = new_code_cell("price = '$5 and $6'", execution_count=1, outputs=[output])
    return new_notebook(cells=[new_markdown_cell(f"# {title}\n\nwith $x^2$ and `$code$`"), code])


@pytest.fixture
def project(root, write_claims):
    """A project of two notebooks, of which this profile has run the first."""
    for path, content in {
        "notebooks/01_one.ipynb": notebook("01 · One", "committed"),
        "notebooks/02_two.ipynb": notebook("02 · Two", "as it was committed"),
        "build/default/01_one.ipynb": notebook("01 · One", "freshly run"),
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(content, root / path)
    write_claims(CLAIMS, OUTPUTS)
    artifact.check_claim("01-good", 1)
    artifact.save_table(pd.DataFrame({"n": range(70)}), "01_numbers")
    (root / "figures" / "01_line.png").write_bytes(b"a picture")
    return root


def test_the_index_shows_every_figure_table_and_claim_and_leads_to_the_notebooks(project):
    index = pages.build()
    assert index == project / "build" / "report" / "index.html"
    text = index.read_text()
    parts = ['<img src="figures/01_line.png"', 'href="figures/01_numbers.csv"', "10 more in the file", "02 · Two"]
    parts += ["share &amp; more", '<a href="01_one.html">01_one</a>', "02_absent.png is missing"]
    for part in parts:
        assert part in text
    assert text.count("As committed: this profile has not run it.") == 1
    for link in re.findall(r'(?:href|src)="([^"#]+)"', text):
        assert (index.parent / link).is_file(), link


def test_pages_of_docs_and_the_reference_stand_beside_the_notebooks(project):
    (project / "docs").mkdir()
    links = "[one](../notebooks/01_one.ipynb), [itself](guide.md#a-guide), ![line](../figures/01_line.png)"
    (project / "docs" / "guide.md").write_text(f"# A guide\n\nwith $x^2$, {links}")
    folder = pages.build().parent
    index, guide = (folder / "index.html").read_text(), (folder / "guide.html").read_text()
    assert '<a href="guide.html">A guide</a> · <a href="reference.html">Reference</a>' in index
    for part in ('href="01_one.html"', 'href="guide.html#a-guide"', 'src="figures/01_line.png"', 'class="formula"'):
        assert part in guide
    assert "rgap.reconstruct_update" in (folder / "reference.html").read_text()


def test_pages_have_the_executed_notebook_or_the_committed_one(project):
    folder = pages.build().parent
    assert "freshly run" in (folder / "01_one.html").read_text()
    assert "as it was committed" in (folder / "02_two.html").read_text()


def test_pages_load_nothing_from_elsewhere(project):
    for page in pages.build().parent.glob("*.html"):
        text = page.read_text()
        assert "<script" not in text
        assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", text)
        assert not re.search(r"""(?:@import|url\()\s*["']?https?:""", text)


def test_a_second_report_replaces_the_first_and_leaves_nothing_else(project):
    pages.build()
    (project / "build" / "report" / "stale.html").touch()
    assert main(["report"]) == 0
    assert not (project / "build" / "report" / "stale.html").exists()
    assert {path.name for path in (project / "build").iterdir() if "report" in path.name} == {"report"}


def test_formulas_become_pictures_with_their_source_as_text():
    shown = pages.with_formulas(r"with $x_2 = \sigma(W_1 x_1)$ and $$\lVert A \rVert$$")
    assert shown.count('<img class="formula"') == 2
    assert r'alt="x_2 = \sigma(W_1 x_1)"' in shown and "display: block" in shown and "vertical-align" in shown
    for picture in re.findall(r"base64,([^\"]+)", shown):
        assert b"<svg" in base64.b64decode(picture)


def test_what_cannot_be_drawn_stays_readable_and_other_dollars_stay():
    assert pages.with_formulas(r"$\begin{cases} a < b \end{cases}$") == (
        r"<code>\begin{cases} a &lt; b \end{cases}</code>"
    )
    for text in ("it costs $5 or $6", "`$x$`", "```\n$x$ and $y$\n```", r"\$x\$", "no formula"):
        assert pages.with_formulas(text) == text


@pytest.mark.slow
def test_every_formula_of_this_projects_notebooks_is_drawn():
    for path in sorted((artifact.ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        for cell in nbformat.read(path, 4).cells:
            if cell.cell_type == "markdown":
                assert "<code>" not in pages.with_formulas(cell.source), path.name
