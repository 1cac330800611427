"""The tables of claims in README.md and docs/claims.md, written from claims.yml and from what the last run measured."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import nbformat
import pandas as pd

from rgap.artifact import outputs
from rgap.artifact.claims import CLAIM_TABLES, read_claims
from rgap.artifact.outputs import write_atomically

BEGIN, END = "<!-- claims: written by `python -m rgap report --readme` -->", "<!-- end of claims -->"
BLOCK = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
PAGE = """# Every claim

What `make figures` asserts, one row a claim; the long statements are in `notebooks/claims.yml`. *n* is what a claim
rests on in the default run, *expected* what the check demands, *measured* what the committed run gave. Source *paper*
means that the paper claims the direction, as the authors' program and later work have it; its text was not at hand,
and no number here is taken from it. Written by
`python -m rgap report --readme`.
"""


def update() -> list[Path]:
    """Writes the table of README.md, one row a notebook, and docs/claims.md, one row a claim; returns both paths.

    Raises:
        ValueError: If README.md has no place for its table, between the two comments `BEGIN` and `END`.
    """
    readme = outputs.ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    if not BLOCK.search(text):
        raise ValueError(f"README.md has no lines {BEGIN!r} and {END!r} with the table between them")
    pages = {readme: BLOCK.sub(lambda _: summary(), text), outputs.ROOT / "docs" / "claims.md": page()}
    return [write_atomically(path, lambda file, new=new: file.write(new.encode())) for path, new in pages.items()]


def summary() -> str:
    """README's table: of each notebook its first claim, and how many of all hold, with the comments around it."""
    columns = {"notebook": "notebook", "short": "first of its claims", "n": "n", "expected": "expected",
               "measured": "measured", "hold": "all hold", "minutes": "min."}  # fmt: skip
    rows = []
    for name, claims in _table().groupby("notebook"):
        held, minutes = f"{(claims['holds'] == 'True').sum()} of {len(claims)}", claims["minutes"].max()
        number = f"[{name[:2]}](notebooks/{name}.ipynb)"
        rows.append({**claims.iloc[0], "notebook": number, "hold": held, "minutes": minutes})
    return "\n".join([BEGIN, _markdown(pd.DataFrame(rows), columns), END])


def page() -> str:
    """docs/claims.md: every claim, grouped by notebook."""
    columns = {"id": "claim", "short": "what", "n": "n", "source": "source", "expected": "expected",
               "measured": "measured"}  # fmt: skip
    parts = [PAGE]
    for name, claims in _table().groupby("notebook"):
        parts.append(f"## [{name}](../notebooks/{name}.ipynb)\n\n{_markdown(claims, columns)}\n")
    return "\n".join(parts)


def _table() -> pd.DataFrame:
    """The claims of claims.yml in their order, with `n` filled in, units, and what the last run measured."""
    tables = [pd.read_csv(outputs.ROOT / "figures" / name, dtype=str).fillna("") for name in CLAIM_TABLES]
    run = pd.concat(tables).set_index("id")
    rows = []
    for claim_id, claim in read_claims().items():
        measured, holds = run.loc[claim_id, ["measured", "holds"]] if claim_id in run.index else ("–", "")
        shown = {
            "expected": f"{claim['expected']} {claim['unit']}",
            "measured": f"{_rounded(measured)} {claim['unit']}",
        }
        rows.append({**claim, "id": claim_id, "n": sample_size(claim), "holds": holds, **shown})
    return pd.DataFrame(rows)


def sample_size(claim: dict) -> str:
    """On how many images, networks or attacks a claim rests: its `n`, filled from the notebook's parameters."""
    path = outputs.ROOT / "notebooks" / f"{claim['notebook']}.ipynb"
    values = _parameters(path) if "{" in claim["n"] else {}
    counts = {name: len(value) if isinstance(value, (list, dict)) else value for name, value in values.items()}
    return re.sub(r"\b1 (\w+)s\b", r"1 \1", claim["n"].format(**counts))


def _parameters(path: Path) -> dict:
    (cell,) = [c for c in nbformat.read(path, 4).cells if "parameters" in c.metadata.get("tags", [])]
    assigned = [node for node in ast.parse(cell.source).body if isinstance(node, ast.Assign)]
    return {node.targets[0].id: ast.literal_eval(node.value) for node in assigned}


def _rounded(measured: str) -> str:
    """Three significant digits, as in 104, 0.97, 4.5e-12; a text stays."""
    try:
        return f"{float(measured):.3g}"
    except ValueError:
        return measured


def _markdown(rows: pd.DataFrame, columns: dict[str, str]) -> str:
    lines = [list(columns.values()), ["---"] * len(columns), *rows[list(columns)].astype(str).to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(cell.strip() for cell in line)} |" for line in lines)
