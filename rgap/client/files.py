"""Tensors in files: gradients as a client would send them, and checkpoints. Reading a file never executes code."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from rgap.arguments import check_path
from rgap.artifact.outputs import write_atomically
from rgap.client.gradients import named_tensors
from rgap.results import GradientMismatchError

SUFFIXES = (".safetensors", ".pt", ".pth")  # supported formats; the last two are those of `torch.save`


WAYS_OUT = {
    "numpy": "turn arrays and numbers of numpy into tensors by torch.as_tensor before they are saved",
    "": "save the state dict (model.state_dict()) instead of the model, and nothing but tensors in it",
}
"""First part of a class's name -> how what it holds is saved."""


def save_gradients(path: str | Path, gradients: Sequence[Tensor] | Mapping[str, Tensor]) -> Path:
    """Writes gradients to a file that `load_gradients` reads.

    Args:
        path: The file; its suffix, one of `SUFFIXES`, decides the format.
        gradients: One tensor for each parameter, in the order of `model.parameters()`, or a mapping from name. A
            safetensors file has names only: there a sequence gets its places as names, "0", "1" and so on. None, for a
            frozen parameter, stays None in a sequence.

    Returns:
        The path.

    Raises:
        ValueError: If the suffix is unknown.
        GradientMismatchError: If the gradients are not tensors, or there are none.

    Example:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from rgap import client
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     client.save_gradients(Path(folder) / "round_17.safetensors", {"0.weight": torch.ones(2)}).name
        'round_17.safetensors'
    """
    path, named = _known_path(path), _checked(gradients, "gradients")
    if path.suffix == ".safetensors":
        if absent := [name for name, g in named.items() if g is None]:
            advice = "save a mapping from parameter name without it, or a .pt file"
            raise GradientMismatchError(
                f"gradients: {absent[0]!r} is None, and safetensors hold tensors alone; {advice}"
            )
        return _write(path, {str(name): g for name, g in named.items()})
    detached = {name: None if g is None else g.detach() for name, g in named.items()}
    content = detached if isinstance(gradients, Mapping) else list(detached.values())
    return write_atomically(path, lambda file: torch.save(content, file))


def load_gradients(path: str | Path) -> list[Tensor] | dict[str, Tensor]:
    """Reads gradients from a file, for `rgap.reconstruct`.

    Args:
        path: A `.safetensors` file, or a `.pt` or `.pth` file by `torch.save`, read with `weights_only=True`.

    Returns:
        A list in the order of `model.parameters()`, or a mapping from parameter name, whichever was saved; on the CPU.
        Tensors named "0", "1", … are a list.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If its suffix is unknown, or it cannot be read as a file of its kind.
        GradientMismatchError: If it holds anything but tensors, or none.

    Example:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from rgap import client
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = client.save_gradients(Path(folder) / "round_17.safetensors", {"0.weight": torch.ones(2)})
        ...     client.load_gradients(file)
        {'0.weight': tensor([1., 1.])}
    """
    advice = "save a list of tensors, or a mapping from parameter name, by rgap.client.save_gradients"
    named = _checked(_read(path, advice), str(path))
    if {str(name) for name in named} == {str(i) for i in range(len(named))}:
        return [named[name] for name in sorted(named, key=int)]
    return named


def save_weights(model: nn.Module, path: str | Path, facts: Mapping[str, object]) -> Path:
    """Writes a `.safetensors` checkpoint, whole or not at all, with facts such as model, seed and epochs."""
    return _write(Path(path), model.state_dict(), {name: str(value) for name, value in facts.items()})


def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """A copy of a model with the weights of a checkpoint: a `.safetensors` file, or a `.pt` or `.pth` state dict.

    Refuses a file that is missing or not a checkpoint of this network, and weights that are not finite.
    """
    state = _read(path, "a checkpoint is a state dict")
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds a {type(state).__name__}; it must hold a state dict")
    own = model.state_dict()
    missing, extra = [n for n in own if n not in state], [n for n in state if n not in own]
    if missing or extra:
        raise ValueError(f"{path} holds another network's weights: missing {missing}, unknown {extra}")
    for name, tensor in own.items():
        if (shape := tuple(getattr(state[name], "shape", ()))) != tuple(tensor.shape):
            raise ValueError(f"{path} has {name!r} of shape {shape}; the network's is {tuple(tensor.shape)}")
        if not torch.isfinite(state[name]).all():
            raise ValueError(f"{path} has NaN or infinity in {name!r}")
    loaded = copy.deepcopy(model)
    loaded.load_state_dict(dict(state))
    return loaded


def _read(path: str | Path, advice: str):
    """What a file holds, on the CPU; `advice` ends the error message if it cannot be read."""
    path = check_path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give a file of tensors, ending in {', '.join(SUFFIXES)}")
    path = _known_path(path)
    if not path.stat().st_size:
        raise ValueError(f"{path} is no readable {path.suffix} file of tensors (it is empty); {advice}")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on bytes of another kind the readers raise errors of any class
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):  # of torch's reader: a class that it would have to call
            raise ValueError(
                f"{path} holds a {found[1]}, and reading that would run code; it must hold tensors alone: "
                f"{WAYS_OUT.get(found[1].split('.')[0], WAYS_OUT[''])}; {advice}"
            ) from None
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        reason = "its content is another" if "weights_only" in reason else reason  # torch's advice is to run it
        raise ValueError(f"{path} is no readable {path.suffix} file of tensors ({reason}); {advice}") from error


def _write(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str] | None = None) -> Path:
    # Each tensor is copied: the format refuses tensors that share memory, such as views of one flat gradient.
    content = safetensors.torch.save({n: t.detach().cpu().clone().contiguous() for n, t in tensors.items()}, facts)
    return write_atomically(path, lambda file: file.write(content))


def _known_path(path: str | Path) -> Path:
    path = check_path(path)
    if path.suffix not in SUFFIXES:
        ending = f"ends in {path.suffix!r}" if path.suffix else "has no ending"
        raise ValueError(f"{path} {ending}; files of tensors end in {', '.join(SUFFIXES)}")
    return path


def _checked(given, what: str) -> dict[str | int, Tensor | None]:
    named = named_tensors(given, what, frozen=True)
    if all(g is None for g in named.values()):
        raise GradientMismatchError(f"{what}: no tensor; give one for each parameter")
    return named
