"""All executed notebooks and the pages of docs/ as static web pages, with an index of every figure, table and claim.

The pages need no network: styles and pictures are in them, no script is loaded, and formulas are drawn by matplotlib's
mathtext; the few that it does not know stay TeX.
"""

from __future__ import annotations

import base64
import html
import io
import re
import shutil
from pathlib import Path

import nbformat
import pandas as pd
from matplotlib.font_manager import FontProperties
from matplotlib.mathtext import math_to_image
from nbconvert import HTMLExporter
from nbformat.v4 import new_markdown_cell, new_notebook

from rgap.artifact import outputs
from rgap.artifact.claims import expected_outputs, report
from rgap.artifact.reference import reference

TABLE_ROWS = 60  # the first rows of a table, which the index shows
FORMULA = re.compile(r"\$\$(.+?)\$\$|(?<![\\$])\$(?!\s)([^$\n]+?)(?<!\s)\$(?!\d)", re.DOTALL)
# TeX's name of a command -> mathtext's, where they differ.
SPELLINGS = {r"\lVert": r"\Vert ", r"\rVert": r"\Vert ", r"\tfrac": r"\frac", r"\dfrac": r"\frac", r"\text": r"\mathrm"}
HEAD = """<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>rgap: report</title><style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
img { max-width: 100% } div { overflow-x: auto } table { border-collapse: collapse; font-size: .85rem }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top }
</style></head><body><h1>rgap: what a shared gradient gives away</h1>"""
# nbconvert's page without the scripts that it would load from elsewhere: MathJax, require.js, mermaid.
BLOCKS = dict.fromkeys(("html_head_js", "jupyter_widgets", "html_head_js_mathjax", "html_head_js_mermaidjs"), "") | {
    "html_head_css": "<style>main { max-width: 68rem; margin: 0 auto } img.formula { display: inline } "
    ".highlight { margin-bottom: 1em }</style>",
    "body_header": '{{ super() }}<p><a href="index.html"><u>All figures, tables and claims</u></a></p>',
}
PAGE = "{%- extends 'lab/index.html.j2' -%}" + "".join(
    f"{{%- block {name} -%}}{content}{{%- endblock -%}}" for name, content in BLOCKS.items()
)


def build(target: Path | None = None) -> Path:
    """Writes the report of this run's profile into a folder, by default build/report/, and returns the index page.

    Notebooks come from build/<profile>/, or as committed where they have not been run; figures, tables and claims from
    `rgap.artifact.figures_dir()`. An older report there is replaced when the new one is complete.
    """
    target = target or outputs.ROOT / "build" / "report"
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "figures").mkdir(parents=True)
    for path in outputs.figures_dir().glob("*"):
        if path.suffix in (".png", ".csv"):
            shutil.copy(path, partial / "figures")
    docs = {path.stem: path.read_text(encoding="utf-8") for path in sorted((outputs.ROOT / "docs").glob("*.md"))}
    links = [_document(name, text, partial) for name, text in (docs | {"reference": reference()}).items()]
    sections = [_section(path, partial) for path in sorted((outputs.ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))]
    index = [
        HEAD,
        f"<p>{' · '.join(links)}</p>",
        f"<p>Profile <b>{outputs.profile()}</b>; every heading leads to its notebook.</p>",
        *_claims(),
    ]
    (partial / "index.html").write_text("\n".join([*index, *sections, "</body></html>"]), encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    return target / "index.html"


def _claims() -> list[str]:
    rows, problems = report()
    rows["notebook"] = [f'<a href="{name}.html">{name}</a>' for name in rows["notebook"]]
    for column in set(rows) - {"notebook"}:
        rows[column] = rows[column].map(html.escape)
    rows["holds"] = rows["holds"].where(rows["holds"] == "True", "<mark>" + rows["holds"] + "</mark>")
    table = rows.to_html(index=False, border=0, escape=False)
    marked = [f"<p><mark>{html.escape(line)}</mark></p>" for line in problems]
    return ["<h2>Claims</h2>", f"<div>{table}</div>", *marked]


def _section(path: Path, folder: Path) -> str:
    """Converts one notebook; returns its section of the index."""
    executed = outputs.ROOT / "build" / outputs.profile() / path.name
    notebook = nbformat.read(executed if executed.is_file() else path, as_version=4)
    title = next((line[2:] for c in notebook.cells for line in c.source.splitlines() if line[:2] == "# "), path.stem)
    _write(notebook, title, folder / f"{path.stem}.html")
    parts = [f'<h2><a href="{path.stem}.html">{html.escape(title)}</a></h2>']
    if not executed.is_file():
        parts.append("<p>As committed: this profile has not run it.</p>")
    for name in expected_outputs().get(path.stem, []):
        file = outputs.figures_dir() / name
        if file.is_file():
            shown = f'<img src="figures/{name}" alt="{name}">' if file.suffix == ".png" else _first_rows(file)
            parts.append(f'<div><a href="figures/{name}">{name}</a><br>{shown}</div>')
    return "\n".join(parts)


def _document(name: str, text: str, folder: Path) -> str:
    """Converts a page of Markdown, as a notebook of one cell; returns the link to it."""
    text = re.sub(r"\]\((?:\.\./)?(?:notebooks/)?([\w/]+)\.(?:md|ipynb)(#[\w-]+)?\)", r"](\1.html\2)", text)
    text = text.replace("](../figures/", "](figures/")
    title = text.partition("\n")[0].removeprefix("# ")
    _write(new_notebook(cells=[new_markdown_cell(text)]), title, folder / f"{name}.html")
    return f'<a href="{name}.html">{html.escape(title)}</a>'


def _write(notebook: nbformat.NotebookNode, title: str, path: Path) -> None:
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = with_formulas(cell.source)
    notebook.metadata["title"] = title
    page, _ = HTMLExporter(raw_template=PAGE, template_name="lab").from_notebook_node(notebook)
    path.write_text(page, encoding="utf-8")


def _first_rows(file: Path) -> str:
    frame = pd.read_csv(file, dtype=str, keep_default_na=False)
    more = f"<p>{len(frame) - TABLE_ROWS} more in the file</p>" if len(frame) > TABLE_ROWS else ""
    return frame.head(TABLE_ROWS).to_html(index=False, border=0) + more


def with_formulas(text: str) -> str:
    """Markdown with its formulas, between dollars, drawn as pictures; what cannot be drawn stays TeX, set as code."""
    parts = re.split(r"(```.*?```|`[^`\n]*`)", text, flags=re.DOTALL)  # dollars in code are dollars
    parts[::2] = [FORMULA.sub(_drawn, part) for part in parts[::2]]
    return "".join(parts)


def _drawn(found: re.Match) -> str:
    tex = known = " ".join((found[1] or found[2]).split())  # mathtext takes a single line
    for spelling, other in SPELLINGS.items():
        known = re.sub(re.escape(spelling) + r"(?![A-Za-z])", lambda _, other=other: other, known)
    picture = io.BytesIO()
    try:
        depth = math_to_image(f"${known}$", picture, prop=FontProperties(size=11, math_fontfamily="cm"), format="svg")
    except ValueError:
        return f"<code>{html.escape(tex)}</code>"
    data = base64.b64encode(picture.getvalue()).decode()
    style = f"vertical-align: -{depth:.1f}px" if found[2] else "display: block; margin: 1em auto"
    alt = html.escape(tex, quote=True)
    return f'<img class="formula" alt="{alt}" title="{alt}" style="{style}" src="data:image/svg+xml;base64,{data}">'
