"""The networks of the paper and of gradient attacks, seeded and in eval mode; but for ResNet-18 `Sequential`s."""

from __future__ import annotations

import importlib
import os
import sys

import torch
from torch import nn

from rgap.arguments import check_seed, shown
from rgap.models.chains import LEAKY_SLOPE, cnn6, cnn6_batch, cnn6_d, fcn3, lenet
from rgap.models.residual import RESNET18_BLOCKS, ResidualBlock, resnet, resnet18

__all__ = [
    "ANALYSIS_SHAPES", "IMAGE_SHAPES", "LEAKY_SLOPE", "RESNET18_BLOCKS", "ResidualBlock", "cnn6", "cnn6_batch",
    "cnn6_d", "fcn3", "lenet", "load_model", "resnet", "resnet18", "trained_names",
]  # fmt: skip

IMAGE_SHAPES = dict.fromkeys(("cnn6", "cnn6_d", "cnn6_batch", "fcn3", "lenet"), (3, 32, 32)) | {"fcn3": (1, 28, 28)}
"""Model name -> the image shape (C, H, W) that it takes, of the models that `rgap.reconstruct` attacks."""

ANALYSIS_SHAPES = IMAGE_SHAPES | {"resnet18": (3, 32, 32)}  # the same of all that can be analysed


def trained_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the parameters that a client trains, and whose gradients it therefore shares.

    They are those with `requires_grad`; where none has it, the network was frozen for evaluation, and they are all.

    Example:
        >>> import torch
        >>> from rgap.models import trained_names
        >>> trained_names(torch.nn.Linear(2, 1, bias=False))
        ('weight',)
    """
    every = dict(model.named_parameters())
    return tuple(name for name, p in every.items() if p.requires_grad) or tuple(every)


def load_model(name: str, seed: int = 0) -> tuple[nn.Module, tuple[int, ...] | None]:
    """Finds a network by name.

    Args:
        name: A name in `ANALYSIS_SHAPES`, or `module:attribute` with a network, or with a function that returns one
            when called without arguments; modules in the working directory are found, too.
        seed: Of the weights; a function is called with torch's generator at this seed, which is restored afterwards.

    Returns:
        The network, and the image shape that it takes if it is one of this module, else None.

    Raises:
        ValueError: If there is no network of this name; the message says what there is instead.

    Example:
        >>> from rgap import models
        >>> network, shape = models.load_model("cnn6")
        >>> shape
        (3, 32, 32)
    """
    if not isinstance(name, str):
        raise ValueError(f"model's name is {shown(name)}; give a text, such as cnn6")
    check_seed(seed)
    if name in ANALYSIS_SHAPES:
        return globals()[name](seed=seed), ANALYSIS_SHAPES[name]
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        known = ", ".join(ANALYSIS_SHAPES)
        raise ValueError(f"model is {name!r}; give {known}, or module:function, e.g. torchvision.models:resnet18")
    found = _imported(module)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ValueError(f"model is {name!r}; {module} has no {attribute!r}")
        found = getattr(found, part)
    if callable(found) and not isinstance(found, nn.Module):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                found = found()
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                raise ValueError(f"model is {name!r}; calling it without arguments failed: {reason}") from error
    if not isinstance(found, nn.Module):
        raise ValueError(f"model is {name!r}; that is a {type(found).__name__}, and a torch.nn.Module is needed")
    return found, None


def _imported(module: str):
    """A module by name, looked for in the working directory first."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        return importlib.import_module(module)
    except Exception as error:
        raise ValueError(f"module {module!r} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        if here in sys.path:
            sys.path.remove(here)
