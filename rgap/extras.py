"""Packages of the extra `artifact`, without which the core works."""

import importlib
from types import ModuleType

HOW = "the extra `artifact` brings it: pip install '.[artifact]' in a checkout of this repository"


def from_extra(module: str) -> ModuleType:
    """Imports a module of the extra; raises ModuleNotFoundError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error.name or module} is not installed; {HOW}", name=error.name) from error
