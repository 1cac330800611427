"""What README.md and docs/claims.md say of notebooks and claims, written from these and from the committed run."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import nbformat
import pandas as pd

from rgap.artifact import manifest, outputs
from rgap.artifact.claims import CLAIM_TABLES, read_claims, usual_seconds
from rgap.artifact.outputs import write_atomically
from rgap.artifact.schedule import minutes

PAGE = """# Every claim

What `make figures` asserts, one row a claim; the long statements are in `notebooks/claims.yml`. *n* is what a claim
rests on in the default run, *expected* what the check demands, *measured* what the committed run gave. Source *paper*
means that the paper claims the direction, as the authors' program and later work have it; its text was not at hand,
and no number here is taken from it. Written by `python -m rgap report --readme`.
"""


def update() -> list[Path]:
    """Writes blocks of README.md, guide and ARTIFACT-APPENDIX.md, docs/claims.md and codecheck.yml; returns the paths.

    Raises:
        ValueError: If a page lacks the two comments between which a block stands.
    """
    readme, guide, claims = (outputs.ROOT / name for name in ("README.md", "docs/guide.md", "docs/claims.md"))
    text = with_block(readme.read_text(encoding="utf-8"), "notebooks", index())
    timed = with_block(guide.read_text(encoding="utf-8"), "times", times())
    pages = {readme: with_block(text, "claims", summary()), guide: timed, claims: page()}
    appendix = outputs.ROOT / "ARTIFACT-APPENDIX.md"
    pages[appendix] = with_block(appendix.read_text(encoding="utf-8"), "experiments", manifest.experiments())
    pages[outputs.ROOT / "codecheck.yml"] = manifest.codecheck()
    return [write_atomically(path, lambda file, new=new: file.write(new.encode())) for path, new in pages.items()]


def with_block(text: str, name: str, content: str) -> str:
    """A page with new content between the two comments that mark the block of this name."""
    begin, end = f"<!-- {name}: written by `python -m rgap report --readme` -->\n", f"<!-- end of {name} -->"
    before, begun, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    if not begun or not ended:
        raise ValueError(f"the page must have a block of {name}, between {begin.strip()!r} and {end!r}")
    return f"{before}{begin}{content}\n{end}{after}"


def summary() -> str:
    """README's table: of each notebook its first claim, how many of all hold, and how long it takes as a rule."""
    columns = {"notebook": "notebook", "short": "first of its claims", "n": "n", "expected": "expected",
               "measured": "measured", "hold": "all hold", "minutes": "min:s"}  # fmt: skip
    rows = []
    for name, claims in _table().groupby("notebook"):
        held, seconds = f"{(claims['holds'] == 'True').sum()} of {len(claims)}", usual_seconds().get(name)
        taken = {"hold": held, "minutes": minutes(seconds) if seconds else "–"}
        rows.append({**claims.iloc[0], "notebook": f"[{name[:2]}](notebooks/{name}.ipynb)", **taken})
    return _markdown(pd.DataFrame(rows), columns)


def index() -> str:
    """README's list of notebooks: their titles, which say what each finds."""
    paths = sorted((outputs.ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    titles = {path: nbformat.read(path, 4).cells[0].source.partition("\n")[0].removeprefix("# ") for path in paths}
    return "\n".join(f"- [{title}](notebooks/{path.name})" for path, title in titles.items())


def times() -> str:
    """The guide's table: how many times as long as the closed form DLG needs to come close to its own best image."""
    table = pd.read_csv(outputs.ROOT / "figures" / "04_quality_times.csv").set_index(["method", "network"])
    ours, dlg = table.loc["virtual constraints"], table.loc["DLG", "seconds_to_best"]
    rows = pd.DataFrame({"prepared": dlg / ours["seconds_prepared"], "first": dlg / ours["seconds"]})
    rows = rows.map("{:.2g}".format).reset_index()
    return _markdown(rows, {"network": "network", "prepared": "prepared network", "first": "first attack"})


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
