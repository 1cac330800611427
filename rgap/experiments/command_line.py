"""What the command lines share: a network by name with its loss, an image shape as text, an error in one line."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys

import torch
from torch import nn

from rgap import models
from rgap.client import LOSSES, check_loss
from rgap.results import UnsupportedLayerError


def load_model(name: str, seed: int = 0) -> tuple[nn.Module, tuple[int, ...] | None]:
    """Finds a network by name.

    Args:
        name: A name in `rgap.models.ANALYSIS_SHAPES`, or `module:attribute` with a function that returns a network when
            called without arguments, or a network; modules in the working directory are found, too.
        seed: Of the weights; a function is called with torch's generator at this seed, which is put back afterwards.

    Returns:
        The network, and the image shape it takes where it is one of this package, else None.

    Raises:
        ValueError: If there is none of this name; the message says what is there instead.
    """
    if name in models.ANALYSIS_SHAPES:
        return getattr(models, name)(seed=seed), models.ANALYSIS_SHAPES[name]
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        known = ", ".join(models.ANALYSIS_SHAPES)
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
                raise ValueError(
                    f"model is {name!r}; calling it without arguments failed: {one_line(error)}"
                ) from error
    if not isinstance(found, nn.Module):
        raise ValueError(f"model is {name!r}; that is a {type(found).__name__}, and a torch.nn.Module is needed")
    return found, None


def load_model_for(name: str, shape: str | None, seed: int = 0) -> tuple[nn.Module, tuple[int, ...]]:
    """A network by name, and the shape of its images, which must be given unless the package knows it.

    Args:
        name: As for `load_model`.
        shape: As for `parse_shape`; empty or None for a network of this package.
        seed: As for `load_model`.

    Raises:
        ValueError: As `load_model` and `parse_shape` do, or if the shape is missing.
    """
    model, known = load_model(name, seed)
    if not shape and known is None:
        raise ValueError(f"shape is missing; give the image shape that {name} takes, e.g. 3,224,224")
    return model, parse_shape(shape) if shape else known


def parse_shape(text: str) -> tuple[int, ...]:
    """The shape that "3,224,224" says.

    Raises:
        ValueError: If it is something else than whole numbers with commas between.
    """
    if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", text):
        raise ValueError(f"shape is {text!r}; give whole numbers with commas between, e.g. 3,224,224")
    return tuple(int(number) for number in text.split(","))


def add_case(parser: argparse.ArgumentParser) -> None:
    """Gives a parser the arguments that `load_case` reads, and the data that the network sees."""
    parser.add_argument("--model", default="cnn6", help=f"{', '.join(models.IMAGE_SHAPES)}, or module:function")
    parser.add_argument("--shape", help="shape of one image, e.g. 3,32,32; known for the models of this package")
    parser.add_argument("--loss", help=f"{', '.join(LOSSES)}; by default the one that fits the number of outputs")
    parser.add_argument("--seed", type=int, default=0, help="seed of the model's weights")
    parser.add_argument("--data", default="embedded", help="embedded, cifar10, mnist or folder:PATH")


def load_case(options: argparse.Namespace) -> tuple[nn.Module, tuple[int, ...], str, int | None]:
    """The network that the arguments of `add_case` name, with what its images and labels must be like.

    Args:
        options: The parsed arguments.

    Returns:
        The network in eval mode, the shape of an image, the loss (unless given, logistic for one output and
        cross-entropy for several), and what `rgap.data.load_images` needs as `classes`: 2 for one output, else None.

    Raises:
        ValueError: As `load_model_for` does, or if the loss is unknown or no image of this shape passes the network.
    """
    model, shape = load_model_for(options.model, options.shape, options.seed)
    model = model.eval()
    try:
        with torch.no_grad():
            outputs = model(torch.zeros(1, *shape)).flatten(1).shape[1]
    except RuntimeError as error:
        raise ValueError(f"an image of shape {shape} does not pass {options.model}: {one_line(error)}") from error
    loss = options.loss or ("logistic" if outputs == 1 else "cross_entropy")
    check_loss(loss)
    return model, shape, loss, 2 if outputs == 1 else None


def file_stem(text: str) -> str:
    """A text, such as a path or `module:function`, as a plain file name: everything else becomes a dash."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", text).strip("-")


def one_line(error: Exception) -> str:
    """An error in one line; with its kind, unless this package or its caller worded it."""
    text = " ".join(str(error).split())
    ours = isinstance(error, UnsupportedLayerError) or type(error) in (TypeError, ValueError, FileNotFoundError)
    return text if ours else f"{type(error).__name__}: {text}"


def _imported(module: str):
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        return importlib.import_module(module)
    except Exception as error:
        raise ValueError(f"module {module!r} cannot be imported: {one_line(error)}") from error
    finally:
        if here in sys.path:
            sys.path.remove(here)
