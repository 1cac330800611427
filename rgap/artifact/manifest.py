"""What evaluators' forms ask for, from notebooks and claims: codecheck.yml, and the table of ARTIFACT-APPENDIX.md."""

from __future__ import annotations

import nbformat
import yaml

from rgap.artifact import outputs
from rgap.artifact.claims import expected_outputs, read_claims, usual_seconds
from rgap.artifact.schedule import minutes

CODECHECK_VERSION = "https://codecheck.org.uk/spec/config/2.0/"

HEAD = """---
# Written by `python -m rgap report --readme` from notebooks/claims.yml. `make figures` writes the files of the manifest
# into build/figures/ and compares them with these. Codechecker, summary, report and certificate are the checker's to
# add, ORCIDs the authors'.
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
