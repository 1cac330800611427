"""The steps of a rank analysis: every traced operation with its kind, and each residual block as one step."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass, field

from torch import nn

from rgap.network.operations import DROPOUTS, MEANS, RESHAPES, SUMS, as_module, from_module, pooling
from rgap.network.steps import Step

SHARED = "its weight is used"
MIXING = (nn.MultiheadAttention, nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin, nn.GLU)


@dataclass(frozen=True)
class CountedStep:
    """A traced step with its path as `name`, its kind and a note on it, as in `LayerRank`."""

    step: Step  # the traced step; for a residual block the sum at its end
    name: str
    kind: str
    note: str
    inside: str  # name of the block or join that it is part of; empty on the main line
    input_shape: tuple[int, ...]  # shape of its input; for a residual block at the fork of its paths
    # modules whose weights count: one, or for a block the last convolution and that of the other path
    weights: tuple[nn.Module, ...] = ()
    path: tuple[Step, ...] = field(default=(), repr=False)  # for a block, the steps of its main path, in order

    @property
    def counted(self) -> bool:
        """Whether it has a counting index."""
        return not self.inside and self.kind in {"convolution", "linear", "pooling", "residual block"}


@dataclass(frozen=True)
class _Join:
    """Where several paths meet: the steps between the fork and here, and the paths themselves."""

    name: str
    inside: tuple[str, ...]
    fork: Step
    paths: tuple[tuple[Step, ...], ...]

    @property
    def is_residual(self) -> bool:
        """Whether there are two paths, at most one of them with more than one convolution or linear layer."""
        counts = [sum(is_layer(step) for step in path) for path in self.paths]
        return len(counts) == 2 and min(counts) <= 1 <= max(counts)


def counted_steps(steps: list[Step]) -> list[CountedStep]:
    """Classifies every traced step but the input, in the order of execution; none is dropped."""
    joins = _joins(steps)
    inside: dict[str, str] = {}
    for step in steps:  # the outermost block wins: only that one is counted
        if step.name in joins:
            inside |= dict.fromkeys(joins[step.name].inside, joins[step.name].name)
    uses = Counter(id(step.module.weight) for step in steps if is_layer(step))
    return [
        _joined(step, joins[step.name], inside.get(step.name, ""))
        if step.name in joins
        else _single(step, inside.get(step.name, ""), uses)
        for step in steps
        if step.kind != "input"
    ]


def is_layer(step: Step) -> bool:
    """Whether a step is a convolution or a linear layer, and so has constraints of its own."""
    transposed = isinstance(step.module, nn.modules.conv._ConvTransposeNd)
    return isinstance(step.module, nn.Linear | nn.modules.conv._ConvNd) and not transposed


def kind_of(step: Step) -> tuple[str, str]:
    """The kind of a step that reads one tensor, as in `LayerRank`, and a note on it."""
    module, operation = step.module or as_module(step.operation, step.arguments, step.options), step.operation
    if is_layer(step):
        return ("linear" if isinstance(module, nn.Linear) else "convolution"), ""
    if pooling_of(step):
        return "pooling", ""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        if lost := 0 if module.weight is None else int((module.weight == 0).sum()):
            return "not analysed", f"{lost} channels are multiplied by zero and lost"
        return "batch norm", (
            "one affine map a channel in eval mode, folded into its neighbour and not counted"
            + ("; in training mode it couples the images of a batch, which is not analysed" if module.training else "")
        )
    if isinstance(module, nn.modules.dropout._DropoutNd) or operation in DROPOUTS:
        return "reshape", "dropout, which is the identity in eval mode; in training mode it is random"
    same_size = math.prod(step.input_shape) == math.prod(step.output_shape)
    if step.kind == "reshape" or (operation in RESHAPES and same_size):
        return "reshape", ""
    activation = from_module(module)
    if activation is not None and activation.one_to_one:
        return "activation", "invertible"
    if type(module).__module__ == "torch.nn.modules.activation" and not isinstance(module, MIXING):
        return "activation", "not invertible: W's equations hold where it tells z, so that ranks are upper bounds"
    return "not analysed", _reason(step)


def pooling_of(step: Step) -> str:
    """What a step that reads one tensor pools by, "avg" or "max"; "" where it is no pooling."""
    if step.module is None and step.call is None:
        return ""
    if step.operation in MEANS:
        return "avg"
    return pooling(step.module or step.operation)


def _reason(step: Step) -> str:
    """Why a step is not analysed."""
    if step.module is not None:
        return f"{type(step.module).__name__} is not a layer kind known here"
    if step.operation is None:
        return "a parameter or buffer that the network reads by itself"
    name = step.operation if isinstance(step.operation, str) else getattr(step.operation, "__name__", step.name)
    return f"the operation {name} is not a layer kind known here"


def _single(step: Step, inside: str, uses: Counter[int]) -> CountedStep:
    kind, note = kind_of(step) if len(step.sources) == 1 else ("not analysed", _reason(step))
    if step.kind == "reshape" and not step.sources:
        kind, note = "reshape", "a number, not a tensor"
    weights = ()
    if kind in {"convolution", "linear"}:
        weights = (step.module,)
        if (count := uses[id(step.module.weight)]) > 1:
            note = f"{SHARED} {count} times: its gradient is a sum, for which there is no rank"
    if inside:
        note = f"inside {inside}" + (f"; {note}" if note else "")
    return CountedStep(step, step.path, kind, note, inside, step.input_shape, weights)


def _joined(step: Step, join: _Join, inside: str) -> CountedStep:
    where = f"inside {inside}; " if inside else ""
    if step.operation not in SUMS or not join.is_residual:
        note = f"{_reason(step)}: it joins {len(step.sources)} paths"
        return CountedStep(step, join.name, "not analysed", where + note, inside, step.input_shape)
    other, main = sorted(join.paths, key=lambda path: sum(map(is_layer, path)))
    layers = [[s for s in path if is_layer(s)] for path in (main, other)]
    counted = (layers[0][-1], *layers[1])
    note = f"{where}one step, with the weights of {' and '.join(repr(s.path) for s in counted)}; "
    note += f"{len(join.inside)} steps inside"
    weights = tuple(s.module for s in counted)
    return CountedStep(step, join.name, "residual block", note, inside, join.fork.output_shape, weights, main)


def _joins(steps: list[Step]) -> dict[str, _Join]:
    """Every step that reads several tensors that depend on the image, by name."""
    order = {step.name: i for i, step in enumerate(steps)}
    images = {step.name for step in steps if step.kind == "input"}
    above: dict[str, set[str]] = {}  # a step and all that it rests on
    result = {}
    for step in steps:
        above[step.name] = {step.name}.union(*(above[source] for source in step.sources))
        sources = [above[source] for source in step.sources if above[source] & images]
        if len(sources) < 2:
            continue
        common = set.intersection(*sources)
        fork = steps[max(order[name] for name in common)]
        known = above[fork.name]
        paths = tuple(tuple(steps[i] for i in sorted(order[name] for name in source - known)) for source in sources)
        inside = tuple(sorted(set().union(*sources) - known, key=order.__getitem__))
        name = _common_path([steps[order[name]] for name in inside]) or step.path
        result[step.name] = _Join(name, inside, fork, paths)
    return result


def _common_path(steps: list[Step]) -> str:
    """The longest path of which all modules are parts, e.g. layer1.0."""
    paths = [step.path.split(".")[:-1] for step in steps if step.module is not None]
    common = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))
    return ".".join(names[0] for names in common)
