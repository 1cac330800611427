"""What a run leaves behind: figures and tables, each written whole or not at all, tables with the digits that repeat.

Machines differ in the last bits, and what is made of them (the error of an image that is exact up to rounding, where an
optimiser or a training ends) differs far more; counts and verdicts do not. The kinds of columns say how many digits
are written, and how far a value may be off on another machine.

Paths are relative to the checkout that this package lies in; only without one, where it was installed from a wheel, to
the working directory. Two environment variables, set by the Makefile, control a run: RGAP_FIGURES is the folder to
write to (build/figures/ unless given; never the committed figures/, which only `make refresh` writes), RGAP_PROFILE is
`default`, `paper` or `custom`.
"""

from __future__ import annotations

import math
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # matplotlib takes as long to import as everything else here
    import pandas as pd
    from matplotlib.figure import Figure

CHECKOUT = Path(__file__).resolve().parents[2]
"""Where this package lies; in a checkout of the repository the notebooks and their claims lie there, too."""

ROOT = CHECKOUT if (CHECKOUT / "notebooks" / "claims.yml").is_file() else Path.cwd()
"""The folder of build/, figures/ and notebooks/: that of the checkout, or of an installed package the working one."""

SIGNIFICANT_DIGITS = 3
LARGEST_WHOLE_NUMBER = 1e9  # that is taken for a count
IN_DECIBELS = r"psnr|_db$|^\+ |plain R-GAP|Inverting Gradients|smoothest image|ridge regression|least squares"


def figures_dir() -> Path:
    """The folder that this run writes to: RGAP_FIGURES, or build/figures/ beside the package.

    Example:
        >>> from rgap import artifact
        >>> artifact.figures_dir().is_absolute()
        True
    """
    return Path(os.environ.get("RGAP_FIGURES") or ROOT / "build" / "figures").absolute()


def profile() -> str:
    """The profile of this run: RGAP_PROFILE, or `default`.

    Example:
        >>> from rgap import artifact
        >>> artifact.profile()
        'default'
    """
    return os.environ.get("RGAP_PROFILE") or "default"


def check_writable(path: Path) -> Path:
    """The file that is written at a path, beyond a symbolic link; its folder is made if need be.

    Raises:
        ValueError: If there is something else than a regular file, such as a folder, a device or a pipe, or no file can
            be made in that folder.
    """
    target = path.resolve()
    if target.exists() and not target.is_file():
        raise ValueError(f"path {path} is no regular file, and would be replaced by one; give the path of a file")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        folder = f"{target.parent} cannot be made a folder ({error.strerror})"
        raise ValueError(f"path {path} cannot be written: {folder}; give a file in a folder of yours") from error
    if not os.access(target.parent, os.W_OK):
        raise ValueError(f"path {path} cannot be written: no right to write to {target.parent}; give another folder")
    return target


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> Path:
    """Writes a file so that a reader sees the old one or the new one, never a part.

    Args:
        path: The file to write, or a symbolic link to it; its folder is made if need be.
        write: Called with a binary file open for writing.

    Returns:
        The path.

    Raises:
        ValueError: If there is something else than a regular file, or the folder takes none.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from rgap import artifact
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     artifact.write_atomically(Path(folder) / "a.txt", lambda file: file.write(b"whole")).read_text()
        'whole'
    """
    target = check_writable(path)
    # In the same folder, because a rename is atomic only within one file system.
    file = tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False)  # noqa: SIM115
    try:
        with file:
            write(file)
        os.chmod(file.name, 0o644)  # temporary files are private, a result is not
        os.replace(file.name, target)
    except BaseException:
        os.unlink(file.name)
        raise
    return path


def save_figure(fig: Figure, name: str, *, times: bool = False) -> Path:
    """Writes a figure as PNG at 150 dots per inch; the same figure gives the same bytes.

    Args:
        fig: The figure.
        name: `NN_name`, NN being the notebook's number.
        times: Whether it shows measured times; the file is then `NN_name_times.png`, free to differ from run to run.

    Returns:
        The path of the file.

    Raises:
        ValueError: If the name does not begin with the notebook's number.

    Example:
        >>> import matplotlib.pyplot as plt
        >>> from rgap import artifact
        >>> artifact.save_figure(plt.figure(), "01_example").name
        '01_example.png'
    """
    # Software would name matplotlib's version in the file, and an upgrade would then change every figure.
    if not hasattr(fig, "savefig"):
        raise ValueError(f"fig is a {type(fig).__name__}; it must be a matplotlib Figure")
    options = {"format": "png", "dpi": 150, "bbox_inches": "tight", "metadata": {"Software": None}}
    return write_atomically(_output(name, ".png", times), lambda file: fig.savefig(file, **options))


def save_table(frame: pd.DataFrame, name: str, *, times: bool = False) -> Path:
    """Writes a table as CSV without its index, and returns the path of the file.

    Numbers have the digits that repeat on other machines, by the kind of their column.

    `name`, `times` and the errors are those of `save_figure`; call `reset_index()` first if the index has information.

    Example:
        >>> import pandas as pd
        >>> from rgap import artifact
        >>> artifact.save_table(pd.DataFrame({"psnr_db": [104.123456789]}), "01_example").name
        '01_example.csv'
    """
    if not hasattr(frame, "to_csv"):
        raise ValueError(f"frame is a {type(frame).__name__}; it must be a pandas DataFrame")
    return save_csv(rounded(frame), _output(name, ".csv", times))


def save_csv(frame: pd.DataFrame, path: Path) -> Path:
    """Writes a table as CSV, numbers with six significant digits, without the index; returns the path."""
    options = {"index": False, "float_format": "%.6g", "lineterminator": "\n"}
    return write_atomically(path, lambda file: frame.to_csv(file, **options))


def _output(name: str, suffix: str, times: bool) -> Path:
    if not isinstance(name, str) or not re.fullmatch(r"\d\d_\w+", name):
        raise ValueError(f"name is {name!r}; it must begin with the notebook's number, as in '01_layers'")
    return figures_dir() / f"{name}{'_times' if times else ''}{suffix}"


class Kind(NamedTuple):
    """A kind of column: the columns' names, how far two values may lie apart, and the decimals that are written."""

    name: str
    columns: str
    absolute: float = 0.0
    relative: float = 0.0
    factor: float = 1.0
    decimals: int | None = None


DECIBELS = Kind("decibels", IN_DECIBELS, 2, 0.1, decimals=0)  # at 100 dB a factor of 4 of what rounding leaves
NUMBERS = Kind("numbers", "", relative=0.05)
COUNTS = Kind("counts and texts", "")
ROUNDING = Kind("rounding errors", r"residual|error|^mse|cosine", 1e-12, factor=10)
KINDS = (
    Kind("spreads of few runs", r"_std$", 6, factor=10), DECIBELS, ROUNDING,
    Kind("similarities", r"ssim", absolute=0.03, decimals=2),
    Kind("what training changes", r"condition|gradient_norm", factor=2),
    Kind("ends of descents", r"^from_|mu$", absolute=0.05, relative=0.05),
)  # fmt: skip
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
