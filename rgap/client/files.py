"""Gradients in files: as a client would send them, and as an audit takes them in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from rgap.artifact.outputs import write_atomically
from rgap.results import GradientMismatchError

SUFFIXES = (".safetensors", ".pt", ".pth")
"""Kinds of files that are known."""

Gradients = list[Tensor] | dict[str, Tensor]


def save_gradients(path: str | Path, gradients: Sequence[Tensor] | Mapping[str, Tensor]) -> Path:
    """Writes gradients to a file that `load_gradients` reads.

    Args:
        path: The file; its suffix, one of `SUFFIXES`, decides the format.
        gradients: One tensor for each parameter, in the order of `model.parameters()`, or a mapping from name. A
            safetensors file has names only: there a sequence gets its places as names, "0", "1" and so on.

    Returns:
        The path.

    Raises:
        ValueError: If the suffix is unknown.
        GradientMismatchError: If the gradients are no tensors, or there are none.
    """
    path = _checked_path(path)
    tensors = _checked(gradients, "gradients")
    if path.suffix != ".safetensors":
        return write_atomically(path, lambda file: torch.save(_map(tensors, Tensor.detach), file))
    named = tensors if isinstance(tensors, dict) else {str(i): g for i, g in enumerate(tensors)}
    # Tensors that share memory, such as views of one flat gradient, have no place in the format: each gets its own.
    content = safetensors.torch.save({name: g.detach().cpu().clone().contiguous() for name, g in named.items()})
    return write_atomically(path, lambda file: file.write(content))


def load_gradients(path: str | Path) -> Gradients:
    """Reads gradients from a file, for `rgap.reconstruct`. Nothing in the file is run.

    Args:
        path: A `.safetensors` file, or a `.pt` or `.pth` file by `torch.save`, read with `weights_only=True`.

    Returns:
        A list in the order of `model.parameters()`, or a mapping from parameter name, whichever was saved; on the CPU.
        Tensors named "0", "1", … are a list.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If its suffix is unknown, or it is no readable file of its kind.
        GradientMismatchError: If it holds something else than tensors, or none.
    """
    path = _checked_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; give the gradient's file")
    try:
        if path.suffix == ".safetensors":
            content = safetensors.torch.load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a reader may stumble over bytes of another kind in any way
        raise ValueError(
            f"{path} is no readable {path.suffix} file of tensors ({_first_line(error)}); "
            "save a list of tensors, or a mapping from parameter name, by rgap.client.save_gradients"
        ) from error
    tensors = _checked(content, str(path))
    if isinstance(tensors, dict) and set(tensors) == {str(i) for i in range(len(tensors))}:
        return [tensors[str(i)] for i in range(len(tensors))]
    return tensors


def _checked_path(path: str | Path) -> Path:
    path = Path(path).expanduser()
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"{path} ends in {path.suffix!r}; gradients are read from and written to {', '.join(SUFFIXES)}"
        )
    return path


def _checked(gradients, what: str) -> Gradients:
    """A list or a dictionary of tensors, or a refusal by name."""
    if isinstance(gradients, Tensor) or not isinstance(gradients, Mapping | Sequence):
        raise GradientMismatchError(
            f"{what}: a {type(gradients).__name__}, and a list or a mapping with a tensor for each parameter is needed"
        )
    if not gradients:
        raise GradientMismatchError(f"{what}: no tensor; one for each parameter is needed")
    named = gradients if isinstance(gradients, Mapping) else dict(enumerate(gradients))
    for name, g in named.items():
        if not isinstance(g, Tensor):
            raise GradientMismatchError(f"{what}: {name!r} is a {type(g).__name__}; it must be a tensor")
    return dict(gradients) if isinstance(gradients, Mapping) else list(gradients)


def _map(gradients: Gradients, change) -> Gradients:
    if isinstance(gradients, dict):
        return {name: change(g) for name, g in gradients.items()}
    return [change(g) for g in gradients]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
