"""Trained weights: a few epochs of plain training, and checkpoints.

`python -m rgap.client.training --model cnn6` trains one.
"""

import argparse
import copy
import math
import pickle
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from rgap import artifact, data
from rgap.client import loss_value
from rgap.experiments.command_line import add_case, file_stem, load_case, one_line

OPTIMISERS = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}


def train(model: nn.Module, images: Tensor, labels: Tensor, loss: str = "logistic", **options) -> nn.Module:
    """The trained copy of a model, in eval mode.

    Args:
        model: Where training starts; it stays as it is.
        images: (N, C, H, W) in [0, 1].
        labels: (N,), int64.
        loss: A name in `rgap.client.LOSSES`.
        **options: As `training` takes them.
    """
    *_, (_, trained) = training(model, images, labels, loss, **options)
    return trained


def training(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    loss: str = "logistic",
    *,
    epochs: int = 3,
    seed: int = 0,
    optimiser: str = "adam",
    learning_rate: float = 1e-3,
    batch_size: int = 32,
) -> Iterator[tuple[float, nn.Module]]:
    """Trains a copy of a model and yields it before the first epoch and after each.

    Args:
        model: Where training starts; it stays as it is.
        images: (N, C, H, W) in [0, 1].
        labels: (N,), int64.
        loss: A name in `rgap.client.LOSSES`.
        epochs: Passes over the images.
        seed: Of their order.
        optimiser: "adam" or "sgd".
        learning_rate: Of the optimiser.
        batch_size: Images a step.

    Yields:
        The mean loss over the images, in eval mode, and a copy of the network as it then is, in eval mode.

    Raises:
        ValueError: If an argument is out of range, or the loss is no longer finite.
    """
    if optimiser not in OPTIMISERS:
        raise ValueError(f"optimiser is {optimiser!r}; it must be one of {', '.join(OPTIMISERS)}")
    if epochs < 0 or batch_size < 1 or not 0 < learning_rate < math.inf:
        raise ValueError(
            f"epochs {epochs}, batch_size {batch_size}, learning_rate {learning_rate}: epochs must be at least 0, a "
            "batch hold an image, and the rate be positive"
        )
    if len(images) == 0 or len(images) != len(labels):
        raise ValueError(f"there are {len(images)} images and {len(labels)} labels; give as many of each, at least one")
    student = copy.deepcopy(model)
    steps = OPTIMISERS[optimiser](student.parameters(), learning_rate)
    generator = torch.Generator().manual_seed(seed)
    total = epochs * math.ceil(len(images) / batch_size)
    with tqdm(total=total, desc="training", disable=not sys.stderr.isatty()) as bar:
        yield _state(student, images, labels, loss, 0)
        for epoch in range(1, epochs + 1):
            student.train()
            for batch in torch.randperm(len(images), generator=generator).split(batch_size):
                steps.zero_grad()
                loss_value(loss, student(images[batch]), labels[batch]).backward()
                steps.step()
                bar.update()
            yield _state(student, images, labels, loss, epoch)


def _state(student: nn.Module, images: Tensor, labels: Tensor, loss: str, epoch: int) -> tuple[float, nn.Module]:
    now = copy.deepcopy(student).eval()
    with torch.no_grad():
        batches = zip(images.split(256), labels.split(256), strict=True)
        value = sum(len(y) * loss_value(loss, now(x), y).item() for x, y in batches) / len(images)
    if not math.isfinite(value):
        raise ValueError(f"the loss is {value} after epoch {epoch}; take a smaller learning_rate")
    return value, now


def save_weights(model: nn.Module, path: Path, facts: Mapping[str, object]) -> Path:
    """Writes a checkpoint, whole or not at all.

    Args:
        model: The network.
        path: A .safetensors file.
        facts: What to keep beside the weights: model, seed, epochs, data.

    Returns:
        The path.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    content = safetensors.torch.save(state, {name: str(value) for name, value in facts.items()})
    return artifact.write_atomically(Path(path), lambda file: file.write(content))


def load_weights(model: nn.Module, path: Path | str) -> nn.Module:
    """A copy of a model with the weights of a checkpoint.

    Args:
        model: The network.
        path: A .safetensors file, or a .pt or .pth file with a state dict (read without running code from it).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint, or not one of this network.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        elif path.suffix in (".pt", ".pth"):
            state = torch.load(path, map_location="cpu", weights_only=True)
        else:
            raise ValueError(f"{path} is no .safetensors, .pt or .pth file")
    except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        raise ValueError(f"{path} cannot be read as a checkpoint: {reason}") from error
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


def main(arguments: list[str] | None = None) -> int:
    """Trains a network, on two classes where it has one output, and leaves a checkpoint in build/weights/.

    Args:
        arguments: The command line; `--help` explains it.

    Returns:
        0; or 2 after one line that says what is wrong with the arguments.
    """
    options = _parser().parse_args(arguments)
    try:
        _train(options)
    except (ValueError, FileNotFoundError) as error:
        print(f"train: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _parser():
    parser = argparse.ArgumentParser(prog="python -m rgap.client.training", description=__doc__)
    add_case(parser)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--output", type=Path, default=artifact.ROOT / "build" / "weights", help="where to write")
    return parser


def _train(options):
    if options.epochs < 1:
        raise ValueError(f"epochs is {options.epochs}; it must be at least 1")
    model, shape, loss, classes = load_case(options)
    images, labels = data.load_images(options.data, None, shape, split="train", classes=classes)
    course = training(model, images, labels, loss, epochs=options.epochs, seed=options.seed)
    for epoch, (value, trained) in enumerate(course):
        with torch.no_grad():
            outputs = torch.cat([trained(x) for x in images.split(256)])
        found = (outputs[:, 0] > 0).long() if outputs.shape[1] == 1 else outputs.argmax(1)
        print(f"epoch {epoch}  loss {value:.4f}  right {(found == labels).double().mean():.1%}")
    name = f"{file_stem(options.model)}_{file_stem(options.data)}_{options.epochs}_{options.seed}.safetensors"
    facts = {key: getattr(options, key) for key in ("model", "seed", "epochs", "data")}
    print(f"written  {save_weights(trained, options.output / name, facts)}")


if __name__ == "__main__":
    sys.exit(main())
