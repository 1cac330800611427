"""What pages and forms say of notebooks and claims: README, guide, docs/claims.md, codecheck.yml and the appendix."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import nbformat
import pandas as pd
import yaml

from rgap.artifact import outputs
from rgap.artifact.claims import CLAIM_TABLES, expected_outputs, read_claims, usual_seconds
from rgap.artifact.outputs import write_atomically
from rgap.artifact.schedule import minutes

CODECHECK_VERSION = "https://codecheck.org.uk/spec/config/2.0/"

HEAD = """---
# Written by `python -m rgap report --readme` from notebooks/claims.yml. `make figures` writes the files of the manifest
# into build/figures/ and compares them with these. Codechecker, summary, report and certificate are the checker's to
# add, ORCIDs the authors'.
"""

PAGE = """# Every claim

What `make figures` asserts, one row a claim; the long statements are in `notebooks/claims.yml`. *n* is what a claim
rests on in the default run, *expected* what the check demands, *measured* what the committed run gave. Source *paper*
means that the paper claims the direction, as the authors' program and later work have it; its text was not at hand,
and no number here is taken from it. Written by `python -m rgap report --readme`.
"""


def codecheck() -> str:
    """codecheck.yml: the paper, and every figure and table with the notebook that writes it and what it supports."""
    citation = yaml.safe_load((outputs.ROOT / "CITATION.cff").read_text(encoding="utf-8"))["preferred-citation"]
    authors = [{"name": f"{author['given-names']} {author['family-names']}"} for author in citation["authors"]]
    paper = {"title": citation["title"], "authors": authors, "reference": f"https://doi.org/{citation['doi']}"}
    titles = notebook_titles()
    manifest = [
        {"file": f"figures/{name}", "comment": f"notebooks/{notebook}.ipynb: {titles[notebook]}"}
        for notebook, names in sorted(expected_outputs().items())
        for name in names
    ]
    content = {"version": CODECHECK_VERSION, "paper": paper, "manifest": manifest}
    return HEAD + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=200)


def experiments() -> str:
    """The appendix's experiments, one row a notebook: how to run it alone, how long it takes, what must come out."""
    rows = ["| result | command | minutes | claims |", "|---|---|---|---|"]
    claims, seconds, titles = read_claims(), usual_seconds(), notebook_titles()
    for notebook in sorted(expected_outputs()):
        own = [
            f"{c['short']}: {c['expected']} {c['unit']}".strip() for c in claims.values() if c["notebook"] == notebook
        ]
        taken = minutes(seconds[notebook]) if notebook in seconds else "–"
        rows.append(f"| {titles[notebook]} | `make build/default/{notebook}.ipynb` | {taken} | {'; '.join(own)} |")
    return "\n".join(rows)


def notebook_titles() -> dict[str, str]:
    """Name of a notebook -> its title, without the number."""
    paths = sorted((outputs.ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    heads = {path.stem: nbformat.read(path, 4).cells[0].source.partition("\n")[0] for path in paths}
    return {name: head.removeprefix("# ").partition(" · ")[2] for name, head in heads.items()}


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
    pages[appendix] = with_block(appendix.read_text(encoding="utf-8"), "experiments", experiments())
    pages[outputs.ROOT / "codecheck.yml"] = codecheck()
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
    return "\n".join(f"- [{name[:2]} · {title}](notebooks/{name}.ipynb)" for name, title in notebook_titles().items())


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
