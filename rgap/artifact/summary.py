"""What the terminal shows at the end of a run: every figure against the committed one, every claim, and the sums."""

from __future__ import annotations

import os
import sys
import textwrap
import unicodedata

import pandas as pd

from rgap.artifact.claims import read_claims, report
from rgap.artifact.compare import committed_dir, compare_run, restore_missing
from rgap.artifact.outputs import figures_dir, profile

COLUMNS_SHOWN = 100  # of the terminal
ID_COLUMNS = 25
VALUE_COLUMNS = 14
SPELLED = {"✓": "ok", "✗": "!!", "≥": ">=", "≤": "<=", "±": "+-", "×": "x", "→": "->", "σ": "sigma", "μ": "mu"}
SPELLED |= {"…": "...", "–": "-", "—": "-", "−": "-", "’": "'"}


def print_report() -> int:
    """Prints how the run compares with the committed figures, its claims and what is wrong; returns 1 if something is.

    Only the default profile has committed figures, and `make refresh` writes over them instead of comparing; what is
    missing from figures/ is copied there from the run.

    Example:
        >>> import contextlib, io
        >>> from rgap import artifact
        >>> with contextlib.redirect_stdout(io.StringIO()) as table:
        ...     status = artifact.print_report()
        >>> status in (0, 1)
        True
    """
    rows, problems = report()
    committed = profile() == "default" and figures_dir() != committed_dir()
    lines, failed = _comparison() if committed else ([], 0)
    held = sum(rows["holds"] == "True")
    lines += [*_claims(rows), "", f"{held} of {len(read_claims())} claims hold"]
    for line in lines:
        print(spelled(line))
    for problem in problems:
        print(spelled(problem), file=sys.stderr)
    return 1 if problems or failed else 0


def _comparison() -> tuple[list[str], int]:
    """A line for each figure and table, the verdict over all, and how many differ."""
    comparisons = compare_run()
    restored = restore_missing(comparisons)
    lines = []
    for each in comparisons:
        head = f"{'✓' if each.agrees else '✗'} {each.name}"
        lines += _wrapped(f"{head:{ID_COLUMNS + 13}} ", each.text)
    failed = sum(not each.agrees for each in comparisons)
    verdict = f"{failed} differ from the committed ones"
    verdict = verdict if failed else "all agree with the committed ones within tolerance"
    copied = [f"{len(restored)} that figures/ did not have were copied there"] if restored else []
    return [*lines, "", f"{len(comparisons)} tables and figures: {verdict}", *copied], failed


def _claims(rows: pd.DataFrame) -> list[str]:
    """The claims by notebook: a tick, the id, the statement, what is expected and what was measured."""
    lines, claims = [], read_claims()
    order = list(claims)
    rows = rows.sort_values("id", key=lambda ids: ids.map(lambda i: order.index(i) if i in order else len(order)))
    width = COLUMNS_SHOWN - ID_COLUMNS - 2 * VALUE_COLUMNS - 4
    for notebook, group in rows.groupby("notebook"):
        lines += ["", notebook]
        for row in group.to_dict("records"):
            expected = " ".join([row["expected"], row["unit"]]).strip()
            asserted = profile() in claims.get(row["id"], {"profiles": [profile()]})["profiles"]
            tick = "✓" if row["holds"] == "True" else "✗" if asserted else "-"
            first, *more = textwrap.wrap(claims.get(row["id"], {}).get("short") or row["statement"], width) or [""]
            values = f"{expected:{VALUE_COLUMNS}} {row['measured']:>{VALUE_COLUMNS - 1}}"
            lines.append(f"{tick} {row['id']:{ID_COLUMNS - 1}} {first:{width}} {values}".rstrip())
            lines += [" " * (ID_COLUMNS + 2) + line for line in more]
    return lines


def _wrapped(head: str, text: str) -> list[str]:
    return textwrap.wrap(head + text, COLUMNS_SHOWN, subsequent_indent="    ", break_on_hyphens=False) or [head]


def spelled(text: str) -> str:
    """A text as the terminal can show it: with signs spelled in ASCII where its encoding or the locale C needs it."""
    encoding = sys.stdout.encoding or "ascii"
    if os.environ.get("LC_ALL") in ("C", "POSIX"):
        encoding = "ascii"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        plain = [sign for sign in unicodedata.normalize("NFKD", text) if not unicodedata.combining(sign)]
        text = "".join(SPELLED.get(sign, sign) for sign in plain).encode(encoding, "replace").decode(encoding)
    return text
