"""Progress bars: on a terminal, or in the file that whoever runs a notebook reads; never among a notebook's outputs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from functools import cache
from typing import TextIO

from tqdm import tqdm  # tqdm.auto would show a widget in a notebook, whatever file it is given

PROGRESS_FILE = "RGAP_PROGRESS"  # environment variable: the file that a notebook's progress bars write to


def progress(items: Iterable | None = None, title: str = "", **options) -> tqdm:
    """The items, with tqdm's bar, whose own `disable=None` would show one in notebooks.

    None for a bar that is moved by hand, with `total=`; the title stands before the count.
    """
    path = os.environ.get(PROGRESS_FILE)
    if path:
        options |= {"file": _opened(path), "bar_format": "{desc} {n_fmt} of {total_fmt}", "mininterval": 0.5}
    return tqdm(items, desc=title, disable=not path and not sys.stderr.isatty(), **options)


@cache
def _opened(path: str) -> TextIO:
    return open(path, "a", encoding="utf-8")
