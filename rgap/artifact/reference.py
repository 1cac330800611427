"""The reference of the public interface as Markdown, from the docstrings of the modules that users import."""

from __future__ import annotations

import dataclasses
import inspect
import re
from importlib import import_module

MODULES = ("rgap", "rgap.client", "rgap.baselines", "rgap.models", "rgap.data", "rgap.metrics", "rgap.artifact")
LISTS = ("Args", "Attributes", "Raises")
SECTION = re.compile(rf"^({'|'.join((*LISTS, 'Returns', 'Example'))}):\n((?:(?: .*)?\n)*)", re.MULTILINE)


def reference() -> str:
    """A page with signature, docstring and example of everything public, module by module."""
    parts = ["# Reference", "From the docstrings; the examples are tests (`tests/test_examples.py`)."]
    for module in MODULES:
        parts += [f"## `{module}`", inspect.cleandoc(import_module(module).__doc__)]
        for name, value in public(module).items():
            parts += [f"### `{name}`", f"```python\n{name}{_signature(value)}\n```", markdown(inspect.getdoc(value))]
    return "\n\n".join(parts) + "\n"


def public(module: str) -> dict[str, object]:
    """Full name -> function or record of a module: those in its `__all__`, without one those that it defines."""
    found = import_module(module)
    own = [name for name, value in vars(found).items() if getattr(value, "__module__", None) == module]
    names = [name for name in getattr(found, "__all__", own) if not name.startswith("_")]
    values = {f"{module}.{name}": getattr(found, name) for name in names}
    return {name: value for name, value in values.items() if inspect.isroutine(value) or inspect.isclass(value)}


def markdown(doc: str) -> str:
    """A Google docstring as Markdown: lists of arguments, attributes and errors, and the example as code."""
    return SECTION.sub(lambda found: _section(found[1], inspect.cleandoc(found[2])), doc + "\n").strip()


def _section(title: str, body: str) -> str:
    if title == "Example":
        return f"```python\n{body}\n```\n"
    if title in LISTS:
        body = re.sub(r"^([\w., *]+): ", r"- `\1`: ", body, flags=re.MULTILINE)
    return f"**{title}**\n\n{body}\n\n"


def _signature(value: object) -> str:
    """Parameters and defaults without annotations, which the docstring explains; of a record, its fields."""
    if dataclasses.is_dataclass(value):
        return f"({', '.join(field.name for field in dataclasses.fields(value))})"
    if inspect.isclass(value):
        return ""
    given = inspect.signature(value)
    plain = [one.replace(annotation=inspect.Parameter.empty) for one in given.parameters.values()]
    return str(given.replace(parameters=plain, return_annotation=inspect.Signature.empty))
