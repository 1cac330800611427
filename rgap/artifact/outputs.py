"""What a run leaves behind: figures and tables, each written whole or not at all.

Paths are relative to the checkout that this package lies in; only without one, where it was installed from a wheel, to
the working directory. Two environment variables control a run, and the
Makefile sets both: RGAP_FIGURES is the folder to write to (build/figures/ unless given; never the committed figures/,
which only `make refresh` writes), RGAP_PROFILE is `default`, `paper` or `custom`.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING

from rgap.artifact.columns import rounded

if TYPE_CHECKING:  # matplotlib takes as long to import as everything else here
    import pandas as pd
    from matplotlib.figure import Figure

CHECKOUT = Path(__file__).resolve().parents[2]
"""Where this package lies; in a checkout of the repository the notebooks and their claims lie there, too."""

ROOT = CHECKOUT if (CHECKOUT / "notebooks" / "claims.yml").is_file() else Path.cwd()
"""The folder of build/, figures/ and notebooks/: that of the checkout, or of an installed package the working one."""


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


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> Path:
    """Writes a file so that a reader sees the old one or the new one, never a part.

    Args:
        path: The file to write, or a symbolic link to it; its folder is made if need be.
        write: Called with a binary file open for writing.

    Returns:
        The path.

    Raises:
        ValueError: If there is something else than a regular file, such as a folder, a device or a pipe.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from rgap import artifact
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     artifact.write_atomically(Path(folder) / "a.txt", lambda file: file.write(b"whole")).read_text()
        'whole'
    """
    target = path.resolve()
    if target.exists() and not target.is_file():
        raise ValueError(f"path {path} is no regular file, and would be replaced by one; give the path of a file")
    target.parent.mkdir(parents=True, exist_ok=True)
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

    Numbers have the digits that repeat on other machines; `rgap.artifact.columns` says which.

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
