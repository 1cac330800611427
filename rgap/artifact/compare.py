"""A run's figures and tables against the committed ones, column by column.

`rgap.artifact.outputs` says how far each kind of column may be off; a claim's measured value may be off by the claim's
own tolerance, or by that of its unit.
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from PIL import Image

from rgap.artifact import outputs
from rgap.artifact.claims import CLAIM_TABLES, expected_outputs, read_claims
from rgap.artifact.outputs import DECIBELS, NUMBERS, ROUNDING, Kind, kind_of

UNITS = {"dB": DECIBELS, "": NUMBERS}
MAGNITUDE = re.compile(r"\d+(?:\.\d+)?e[+-]\d+")  # a number in a sentence of which the order of magnitude counts
MAGNITUDE_FACTOR = 4.0

PICTURE_SIDE = 64  # pixels of the side to which pictures are reduced before they are compared
PICTURE_SHARE = 0.1  # of the ink of two reduced pictures that may lie elsewhere
PICTURE_SIZE_SHARE = 0.03  # of a picture's width or height


class Comparison(NamedTuple):
    """How a file compares with the committed one, whether that is in order, and whether it is missing from figures/."""

    name: str
    agrees: bool
    text: str
    restorable: bool = False


def compare_run() -> list[Comparison]:
    """Compares every file that this run had to write with the committed one of figures/.

    A file that lies in figures/ is the committed one; for a file that is missing there git is asked.
    """
    expected = [name for names in expected_outputs().values() for name in names]
    names = sorted({*expected, *(name for name in CLAIM_TABLES if (outputs.figures_dir() / name).exists())})
    stale = sorted({path.name for path in committed_dir().glob("*.*")} - set(names) - set(CLAIM_TABLES))
    return [_compared(name) for name in names] + [
        Comparison(name, False, "no notebook writes it; remove it from figures/") for name in stale
    ]


def restore_missing(comparisons: list[Comparison]) -> list[str]:
    """Copies what figures/ lacks from the run, unless it differs from what was committed; never replaces a file."""
    restored = [each.name for each in comparisons if each.restorable and each.agrees]
    committed_dir().mkdir(exist_ok=True)
    for name in restored:
        shutil.copy(outputs.figures_dir() / name, committed_dir() / name)
    return restored


def committed_dir() -> Path:
    """The folder of the committed figures."""
    return outputs.ROOT / "figures"


def _compared(name: str) -> Comparison:
    path, lying = outputs.figures_dir() / name, committed_dir() / name
    missing = not lying.exists()
    if not path.is_file():
        return Comparison(name, False, "missing: the run did not write it")
    ours = path.read_bytes()
    theirs = _from_git(name) if missing else lying.read_bytes()
    if theirs is None:
        return Comparison(name, True, "new: nothing is committed to compare with", missing)
    if ours == theirs:
        return Comparison(name, True, "identical", missing)
    if "_times." in name and path.suffix == ".png":
        return Comparison(name, True, "shows measured times", missing)
    compare = _compare_pictures if path.suffix == ".png" else _compare_tables
    return Comparison(name, *compare(name, ours, theirs), missing)


def _from_git(name: str) -> bytes | None:
    command = ["git", "-C", str(outputs.ROOT), "show", f"HEAD:./figures/{name}"]
    try:
        shown = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        return None
    return shown.stdout if shown.returncode == 0 else None


def _compare_pictures(_, ours: bytes, theirs: bytes) -> tuple[bool, str]:
    images = [Image.open(io.BytesIO(data)).convert("L") for data in (ours, theirs)]
    apart = max(abs(a - b) / b for a, b in zip(images[0].size, images[1].size, strict=True))
    if apart > PICTURE_SIZE_SHARE:
        return False, f"{images[0].width}×{images[0].height} pixels, committed {images[1].width}×{images[1].height}"
    small = [image.resize((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.BOX) for image in images]
    ink = [255.0 - np.asarray(image) for image in small]
    share = np.abs(ink[0] - ink[1]).sum() / max(np.maximum(*ink).sum(), 1.0)
    return bool(share <= PICTURE_SHARE), f"{share:.1%} of the ink elsewhere, allowed {PICTURE_SHARE:.0%}"


def _compare_tables(name: str, ours: bytes, theirs: bytes) -> tuple[bool, str]:
    tables = [pd.read_csv(io.BytesIO(data), dtype=str, keep_default_na=False) for data in (ours, theirs)]
    if list(tables[0]) != list(tables[1]) or len(tables[0]) != len(tables[1]):
        return False, "has other columns or another number of rows"
    if "_times." in name and name not in CLAIM_TABLES:
        return True, "measured times, not compared"
    differences = list(_claim_differences(*tables) if name in CLAIM_TABLES else _column_differences(*tables))
    wrong = [text for fits, text in differences if not fits]
    return not wrong, "; ".join(wrong or [text for _, text in differences])


def _column_differences(ours: pd.DataFrame, theirs: pd.DataFrame) -> Iterator[tuple[bool, str]]:
    """For each column with a difference whether it is within tolerance, and the largest in words."""
    for column in ours:
        kind = kind_of(column, theirs[column])
        pairs = [pair for pair in zip(ours[column], theirs[column], strict=True) if pair[0] != pair[1]]
        if pairs:
            outside = [pair for pair in pairs if not agree(*pair, kind)]
            a, b = (outside or pairs)[0]
            yield not outside, f"{column} {_short(b)} → {_short(a)}{_allowed(kind) if outside else ''}"


def _claim_differences(ours: pd.DataFrame, theirs: pd.DataFrame) -> Iterator[tuple[bool, str]]:
    """The same for a table of claims: by the claim's own tolerance or else by its unit, and times not at all."""
    claims = read_claims()
    for (_, a), (_, b) in zip(ours.iterrows(), theirs.iterrows(), strict=True):
        claim = claims.get(a["id"], {})
        kind = UNITS.get(a["unit"], NUMBERS)
        if "equals" in claim:
            kind = Kind("the claim's", "", absolute=claim["tolerance"])
        elif "e-" in b["measured"]:
            kind = ROUNDING
        timed = claim.get("times") and a["holds"] == b["holds"]
        if a["measured"] != b["measured"] or a["holds"] != b["holds"]:
            fits = a["holds"] == b["holds"] and (timed or agree(a["measured"], b["measured"], kind))
            yield fits, f"{a['id']} {b['measured']} → {a['measured']}"
        elif a["id"] != b["id"] or a["expected"] != b["expected"]:
            yield False, f"{a['id']} is another claim than the committed one"


def agree(ours: str, theirs: str, kind: Kind) -> bool:
    """Whether two cells agree: numbers within the kind's tolerance, texts but for orders of magnitude in them."""
    try:
        a, b = float(ours), float(theirs)
    except ValueError:
        return MAGNITUDE.sub("", ours) == MAGNITUDE.sub("", theirs) and all(
            _within_factor(float(x), float(y), MAGNITUDE_FACTOR)
            for x, y in zip(MAGNITUDE.findall(ours), MAGNITUDE.findall(theirs), strict=True)
        )
    if abs(a - b) <= kind.absolute + kind.relative * abs(b) or a == b:
        return True
    return kind.factor > 1 and _within_factor(a, b, kind.factor)


def _within_factor(a: float, b: float, factor: float) -> bool:
    return min(a, b) > 0 and max(a, b) <= factor * min(a, b)


def _allowed(kind: Kind) -> str:
    parts = [f"{kind.absolute:g}"] if kind.absolute else []
    parts += [f"{kind.relative:.0%}"] if kind.relative else []
    parts += [f"a factor of {kind.factor:g}"] if kind.factor > 1 else []
    return f", allowed {' + '.join(parts) or 'no difference'}"


def _short(value: str, width: int = 24) -> str:
    return value if len(value) <= width else f"{value[: width - 1]}…"
