"""What the tables' columns hold: how many digits of it repeat on another machine, and how far it may be off there.

Machines differ in the last bits, and what is made of them (the error of an image that is exact up to rounding, where an
optimiser or a training ends) differs far more; counts and verdicts do not.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import pandas as pd

SIGNIFICANT_DIGITS = 3
LARGEST_WHOLE_NUMBER = 1e9  # that is taken for a count


class Kind(NamedTuple):
    """A kind of column: the columns' names, how far two values may lie apart, and the decimals that are written."""

    name: str
    columns: str
    absolute: float = 0.0
    relative: float = 0.0
    factor: float = 1.0
    decimals: int | None = None


IN_DECIBELS = r"psnr|_db$|^\+ |plain R-GAP|Inverting Gradients|smoothest image|ridge regression|least squares"
DECIBELS = Kind("decibels", IN_DECIBELS, 2, 0.1, decimals=0)  # at 100 dB a factor of 4 of what rounding leaves
NUMBERS = Kind("numbers", "", relative=0.05)
COUNTS = Kind("counts and texts", "")
ROUNDING = Kind("rounding errors", r"residual|error|^mse|cosine", 1e-12, factor=10)
KINDS = (
    Kind("spreads of few runs", r"_std$", 6, factor=10),
    DECIBELS,
    ROUNDING,
    Kind("similarities", r"ssim", absolute=0.03, decimals=2),
    Kind("what training changes", r"condition|gradient_norm", factor=2),
    Kind("ends of descents", r"^from_|mu$", absolute=0.05, relative=0.05),
)
"""The first whose pattern is found in a column's name. Else whole numbers and texts are COUNTS, compared exactly,
and other numbers NUMBERS. A `factor` is for quantities of which only the order of magnitude repeats."""


def kind_of(column: str, values: pd.Series) -> Kind:
    """The kind of a column, by its name and its values as they were written."""
    found = next((kind for kind in KINDS if re.search(kind.columns, column)), None)
    return found or (COUNTS if all(re.fullmatch(r"-?\d*", value) for value in values) else NUMBERS)


def rounded(frame: pd.DataFrame) -> pd.DataFrame:
    """A table as it is written: each number that is not whole as a text of the digits that repeat on other machines."""
    return frame.apply(lambda column: column.astype(object).map(lambda value: _written(str(column.name), value)))


def _written(column: str, value: object) -> object:
    if not isinstance(value, float) or not math.isfinite(value):
        return value
    kind = next((kind for kind in KINDS if re.search(kind.columns, column)), NUMBERS)
    value = value if kind.decimals is None else round(value, kind.decimals)
    # What is whole is a count, however many digits it has; adding 0 takes the sign off -0.
    whole = value == round(value) and abs(value) < LARGEST_WHOLE_NUMBER
    return f"{value + 0.0:.0f}" if whole else f"{value:.{SIGNIFICANT_DIGITS}g}"
