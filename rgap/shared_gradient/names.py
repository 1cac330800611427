"""Which of the gradients that were given belongs to which parameter: lists and mappings as users bring them."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence, Set

from torch import Tensor, nn

from rgap.models import trained_names
from rgap.results import GradientMismatchError

WRAPPERS = {"module", "_module", "_orig_mod"}  # parts of names by DataParallel, Opacus and torch.compile


def gradients_by_name(
    parameters: Mapping[str, Tensor], gradients: Sequence[Tensor] | Mapping[str, Tensor], model: nn.Module | None = None
) -> tuple[dict[str, object], dict[str, Hashable]]:
    """Every parameter's gradient, None where it is not shared, and its key: its name or place among those given.

    A list has one gradient a parameter, one a trained parameter, or those of the whole state in its order; a mapping
    has the parameters' names, all with one prefix or with those of wrappers, and may have buffers, too. For lists and
    buffers other than those of all parameters the model is needed. Refuses whatever leaves a choice.
    """
    if not isinstance(gradients, Iterable) or isinstance(gradients, str | bytes | Set):
        order = "; a set has no order" if isinstance(gradients, Set) else ""
        kind = type(gradients).__name__
        raise GradientMismatchError(f"gradients are a {kind}{order}; give a list or a mapping of tensors")
    if isinstance(gradients, Tensor):
        raise GradientMismatchError(_about_vector(parameters, gradients))
    state = () if model is None else tuple(model.state_dict())
    if isinstance(gradients, Mapping) and not all(isinstance(key, int) for key in gradients):
        keys = _keys(parameters, gradients, state)
        given = gradients
    else:
        given = dict(gradients) if isinstance(gradients, Mapping) else dict(enumerate(gradients))
        trained = () if model is None else trained_names(model)
        keys = dict(zip(_order(parameters, list(given.values()), trained, state), given, strict=True))
    keys = {name: keys[name] for name in parameters if name in keys}
    return {name: given[keys[name]] if name in keys else None for name in parameters}, keys


def _keys(parameters: Mapping[str, Tensor], gradients: Mapping, state: Sequence[str]) -> dict[str, Hashable]:
    """Name -> key in a mapping; buffers and names that are missing stay out."""
    if (exact := {*parameters, *state}).issuperset(gradients) and not gradients.keys().isdisjoint(parameters):
        return {name: name for name in gradients}
    own = {_bare(name): name for name in exact}
    for prefix in dict.fromkeys(("", *_prefixes(parameters, gradients))):
        found = {key: own.get(_bare(key).removeprefix(prefix)) for key in gradients if isinstance(key, str)}
        fits = len(found) == len(gradients) and None not in found.values() and len(set(found.values())) == len(found)
        if fits and len(own) == len(exact) and any(name in parameters for name in found.values()):
            return {name: key for key, name in found.items()}
    missing, extra = [n for n in parameters if n not in gradients], [n for n in gradients if n not in parameters]
    raise GradientMismatchError(f"gradients do not fit the parameters: missing {missing}, unknown {extra}")


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _prefixes(parameters: Mapping[str, Tensor], gradients: Mapping) -> list[str]:
    """What may stand before every name: the first key's beginning, before a parameter's name."""
    first = _bare(str(next(iter(gradients), "")))
    return [first.removesuffix(_bare(name)) for name in parameters if first.endswith(f".{_bare(name)}")]


def _order(
    parameters: Mapping[str, Tensor], given: Sequence, trained: Sequence[str], state: Sequence[str]
) -> Sequence[str]:
    """The names of a list's entries."""
    if len(given) == len(parameters):
        return list(parameters)
    if 0 < len(given) == len(trained):
        return trained
    counts = f"{len(given)} gradients for {len(parameters)} parameters"
    for names in (state, [name for name in state if not name.endswith("num_batches_tracked")]):
        if len(given) == len(names):
            pairs = [(name, parameters[name], g) for name, g in zip(names, given, strict=True) if name in parameters]
            unlike = [name for name, p, g in pairs if g is not None and getattr(g, "shape", None) != p.shape]
            if not unlike:
                return names
            counts += f", as many as parameters and buffers together, but {unlike[0]!r} has another shape in that order"
    if len(given) == 1 and isinstance(given[0], Tensor):
        raise GradientMismatchError(f"{counts}: {_about_vector(parameters, given[0])}")
    raise GradientMismatchError(f"{counts}; give one for each, in the order of model.parameters()")


def _about_vector(parameters: Mapping[str, Tensor], given: Tensor) -> str:
    entries = sum(math.prod(p.shape) for p in parameters.values())
    if given.ndim == 1 and len(given) == entries:
        return (
            f"gradients are one vector of all {entries} entries; take it apart by rgap.client.unflatten(model, vector)"
        )
    shape = "a nested tensor" if given.is_nested else f"one tensor of shape {tuple(given.shape)}"
    return f"gradients are {shape}, and the parameters have {entries} entries; give a list or a mapping of tensors"
