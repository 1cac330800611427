"""All executed notebooks as one static report, with an index of every figure, table and claim.

The pages need no network: styles and pictures are in them, no script is loaded, and formulas are drawn by matplotlib's
mathtext; the few that it does not know stay TeX, readable as source.
"""

from __future__ import annotations

import base64
import html
import io
import re
import shutil
from pathlib import Path

import jinja2
import nbformat
import pandas as pd
from matplotlib.font_manager import FontProperties
from matplotlib.mathtext import math_to_image
from nbconvert import HTMLExporter

from rgap.artifact import outputs as artifact

ROWS = 60  # of a table that the index shows; the file has all
FORMULA = re.compile(r"\$\$(.+?)\$\$|(?<![\\$])\$(?!\s)([^$\n]+?)(?<!\s)\$(?!\d)", re.DOTALL)
SPELLINGS = {r"\lVert": r"\Vert ", r"\rVert": r"\Vert ", r"\tfrac": r"\frac", r"\dfrac": r"\frac", r"\text": r"\mathrm"}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
img { max-width: 100% } figure { margin: 1.5rem 0 } figcaption { color: #555; font-size: .9rem }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem }
.scroll { overflow-x: auto } .fails { background: #fdd } code { font-size: .9em }
"""
# nbconvert's page without what it would load from elsewhere: MathJax, require.js, mermaid.
PAGE = """{%- extends 'lab/index.html.j2' -%}
{%- block html_head_js -%}{%- endblock -%}
{%- block jupyter_widgets -%}{%- endblock -%}
{%- block html_head_js_mathjax -%}{%- endblock -%}
{%- block html_head_js_mermaidjs -%}{%- endblock -%}
{%- block html_head_css -%}<style>main { max-width: 68rem; margin: 0 auto } img.formula { display: inline }</style>
{%- endblock -%}
{%- block body_header -%}
{{ super() }}<p style="padding: 0 1rem"><a href="index.html"><u>All figures, tables and claims</u></a></p>
{%- endblock -%}"""
INDEX = """<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>rgap: report</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{{ style }}</style></head><body>
<h1>rgap: what a shared gradient gives away</h1>
<p>Profile <b>{{ profile }}</b>. Every figure, table and claim of the notebooks; each heading leads to the notebook.</p>
<nav>{% for page in pages %}<a href="#{{ page.stem }}">{{ page.stem }}</a>{% endfor %}</nav>
<h2 id="claims">Claims</h2><div class="scroll"><table><thead><tr>
{% for name in claims.columns %}<th>{{ name }}</th>{% endfor %}</tr></thead><tbody>
{% for row in claims.itertuples(index=False) %}<tr{% if row.holds != "True" %} class="fails"{% endif %}>
{% for value in row %}<td>{% if loop.index0 == 1 and value in stems %}<a href="{{ value }}.html">{{ value }}</a>
{% else %}{{ value }}{% endif %}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% if problems %}<h2>Not in order</h2><ul>{% for line in problems %}<li>{{ line }}</li>{% endfor %}</ul>{% endif %}
{% for page in pages %}<h2 id="{{ page.stem }}"><a href="{{ page.stem }}.html">{{ page.title }}</a></h2>
{% if not page.executed %}<p>As committed: this profile has not run it.</p>{% endif %}
{% for name in page.figures %}<figure><a href="{{ page.stem }}.html"><img src="figures/{{ name }}" alt="{{ name }}"></a>
<figcaption>{{ name }}</figcaption></figure>{% endfor %}
{% for name, table, more in page.tables %}
<details open><summary><a href="figures/{{ name }}">{{ name }}</a>{% if more %}
(first rows; {{ more }} more in the file){% endif %}</summary><div class="scroll">{{ table | safe }}</div></details>
{% endfor %}{% endfor %}</body></html>
"""


def build(target: Path | None = None) -> Path:
    """Writes the report of this run's profile.

    Notebooks come from build/<profile>/, or as committed where they have not been run; figures, tables and claims from
    `rgap.artifact.figures_dir()`. An older report of the same place is replaced when the new one is complete.

    Args:
        target: The folder, by default build/report/.

    Returns:
        The index page.
    """
    target = target or artifact.ROOT / "build" / "report"
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "figures").mkdir(parents=True)
    pages = [_page(path, partial) for path in sorted((artifact.ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))]
    claims, problems = artifact.report()
    for path in artifact.figures_dir().glob("*"):
        if path.suffix in (".png", ".csv"):
            shutil.copy(path, partial / "figures")
    template = jinja2.Environment(autoescape=True).from_string(INDEX)
    stems = [page["stem"] for page in pages]
    text = template.render(
        style=STYLE, profile=artifact.profile(), pages=pages, stems=stems, claims=claims, problems=problems
    )
    (partial / "index.html").write_text(text, encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    return target / "index.html"


def with_formulas(text: str) -> str:
    """Markdown with its formulas drawn as pictures; what cannot be drawn stays TeX, set as code.

    Args:
        text: Markdown with formulas between dollars.
    """
    parts = re.split(r"(```.*?```|`[^`\n]*`)", text, flags=re.DOTALL)  # dollars in code are dollars
    parts[::2] = [FORMULA.sub(_drawn, part) for part in parts[::2]]
    return "".join(parts)


def _drawn(found: re.Match) -> str:
    tex = (found[1] or found[2]).strip()
    shown = tex
    for spelling, known in SPELLINGS.items():
        shown = re.sub(re.escape(spelling) + r"(?![A-Za-z])", lambda _, known=known: known, shown)
    buffer = io.BytesIO()
    try:
        depth = math_to_image(f"${shown}$", buffer, prop=FontProperties(size=11, math_fontfamily="cm"), format="svg")
    except ValueError:
        return f"<code>{html.escape(tex)}</code>"
    picture = base64.b64encode(buffer.getvalue()).decode()
    style = f"vertical-align: -{depth:.1f}px" if found[2] else "display: block; margin: 1em auto"
    alt = html.escape(tex, quote=True)
    return f'<img class="formula" alt="{alt}" title="{alt}" style="{style}" src="data:image/svg+xml;base64,{picture}">'


def _page(path: Path, folder: Path) -> dict:
    """Converts one notebook; returns what the index says of it."""
    executed = artifact.ROOT / "build" / artifact.profile() / path.name
    notebook = nbformat.read(executed if executed.is_file() else path, as_version=4)
    title = next((line.lstrip("# ") for c in notebook.cells for line in c.source.splitlines() if line[:2] == "# "), "")
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = with_formulas(cell.source)
    notebook.metadata["title"] = title or path.stem
    exporter = HTMLExporter(raw_template=PAGE, template_name="lab")
    body, _ = exporter.from_notebook_node(notebook)
    (folder / f"{path.stem}.html").write_text(body, encoding="utf-8")
    names = artifact.expected_outputs().get(path.stem, [])
    files = [name for name in names if (artifact.figures_dir() / name).is_file()]
    return {
        "stem": path.stem,
        "title": title or path.stem,
        "executed": executed.is_file(),
        "figures": [name for name in files if name.endswith(".png")],
        "tables": [_table(name) for name in files if name.endswith(".csv")],
    }


def _table(name: str) -> tuple[str, str, int]:
    """Name, the first rows as HTML, and how many more there are."""
    frame = pd.read_csv(artifact.figures_dir() / name, dtype=str, keep_default_na=False)
    return name, frame.head(ROWS).to_html(index=False, border=0), max(0, len(frame) - ROWS)
