"""`reconstruct`: the hypotheses, each followed down, and a verdict that needs no ground truth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from rgap.chain import Chain
from rgap.door import check_arguments, checked_chain, checked_labels
from rgap.evidence import Evidence, weigh
from rgap.head import Hypothesis, logistic_hypotheses
from rgap.noise import entry_noise
from rgap.prediction import start_probe
from rgap.recursion import REFUTED, Descent, descend
from rgap.results import GradientMismatchError, Reconstruction
from rgap.verdict import judge, make_candidate

UNKNOWN = 3.0
"""Times the noise that was known of from which what surplus equations betray is believed."""


def reconstruct(
    model: nn.Module | Chain,
    gradients: Sequence[Tensor] | Mapping[str, Tensor],
    image_shape: tuple[int, int, int] | None = None,
    loss: str = "logistic",
    *,
    batch_size: int | None = 1,
    labels: Tensor | Sequence[int] | None = None,
    virtual_constraints: bool = True,
    pixel_range: tuple[float, float] = (0.0, 1.0),
    rcond: float | None = None,
    noise_std: float | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Reconstruction:
    """Computes a client's image back from its gradient (R-GAP; Zhu & Blaschko, ICLR 2021).

    The attack knows the network and the gradient. It solves for the input of each layer in turn, from the last to the
    first, for every hypothesis on label and margin that the last layer's gradient allows, in float64 throughout.

    Args:
        model: The network, or a `Chain` from `rgap.prepare`, which keeps its factorisations for the next attack.
        gradients: One tensor for each parameter, in the order of `model.parameters()`, or a mapping from name.
        image_shape: (C, H, W) of one image; may be left out with a `Chain`.
        loss: "logistic".
        batch_size: Images in the batch; 1.
        labels: Labels if they are known, (B,): other hypotheses are then not considered.
        virtual_constraints: Whether the layer before may close the deficit of a rank-deficient layer.
        pixel_range: Smallest and largest value of a pixel; chooses between twins, where it can.
        rcond: Singular values below rcond times the largest count as zero; by default matched to the gradient's
            precision (1e-4 for float32, 1e-5 for float64).
        noise_std: Standard deviation of noise known to be on every gradient entry; widens cutoff and tolerance.
        seed: Seed of random starts; a single image needs none.
        device: Where the returned images and labels live, by default the CPU, on which the systems are solved.

    Returns:
        A `Reconstruction`; read its `verdict` before its images.

    Raises:
        UnsupportedLayerError: If the network is not a chain of invertible layers.
        GradientMismatchError: If the gradients do not belong to the network or are not finite.
        ValueError: If another argument is out of range.
    """
    chain = checked_chain(model, image_shape)
    check_arguments(chain, loss, batch_size, pixel_range, rcond, noise_std)
    known = checked_labels(labels)
    evidence = weigh(chain, gradients, rcond, noise_std)
    hypotheses, notes = _read_head(chain, evidence.gradients)
    if known is not None:
        hypotheses = [h for h in hypotheses if h.label == known]
        if not hypotheses:
            raise GradientMismatchError(f"label {known} was given; the last layer's gradient is that of {1 - known}")
    evidence, stds, descents, found = _descents(
        chain, gradients, evidence, rcond, noise_std, hypotheses, virtual_constraints
    )
    candidates = [make_candidate(chain, evidence, stds, h, d, loss, pixel_range) for h, d in descents]
    return judge(candidates, [*notes, *found], pixel_range, device)


def _read_head(chain: Chain, gradients: Mapping[str, Tensor]) -> tuple[list[Hypothesis], list[str]]:
    head = chain.layers[-1]
    bias = gradients[head.bias_name] if head.bias_name else None
    return logistic_hypotheses(head, gradients[head.weight_name], bias)


def _descents(chain, gradients, evidence, rcond, noise_std, hypotheses, virtual_constraints):
    """Follows the hypotheses; a second time where surplus equations betray more noise than was known of.

    Returns the evidence, the standard deviation of every entry's error, the descents, and a note on the noise.
    """
    stds = entry_noise(evidence.gradients, noise_std)
    descents = _follow(chain, evidence, stds, hypotheses, virtual_constraints)
    found = min((d.misfits[0] for _, d in descents if d.misfits), default=0.0)
    known = max(std.square().mean().sqrt().item() for std in stds.values())
    if noise_std is not None or found <= UNKNOWN * known:
        return evidence, stds, descents, []
    noisy = weigh(chain, gradients, rcond, found)
    noisy_stds = entry_noise(evidence.gradients, found)
    again = _follow(chain, noisy, noisy_stds, hypotheses, virtual_constraints)
    if not any(d.mismatch <= REFUTED and max(d.misfits, default=0.0) <= UNKNOWN * found for _, d in again):
        return evidence, stds, descents, []  # no white noise: the layers contradict each other
    note = f"noise of standard deviation {found:.2g} on the gradient, by the misfit of equations that are to spare"
    return noisy, noisy_stds, again, [note]


def _follow(
    chain: Chain,
    evidence: Evidence,
    stds: Mapping[str, Tensor],
    hypotheses: list[Hypothesis],
    virtual_constraints: bool,
) -> list[tuple[Hypothesis, Descent]]:
    """Follows each hypothesis down; twins are scaled copies; where all are refuted the least unlikely is followed."""
    found: dict[int, list[tuple[Hypothesis, Descent]]] = {}

    def go(hypothesis: Hypothesis, give_up: float) -> Descent:
        probe = start_probe(
            chain.layers[-1], evidence.gradients, stds, hypothesis, lambda changed: _read_head(chain, changed)[0]
        )
        options = {"virtual_constraints": virtual_constraints, "give_up": give_up}
        return descend(chain, evidence, hypothesis, probe=probe, **options)

    for hypothesis in hypotheses:
        twins = found.setdefault(hypothesis.label, [])
        if twins and chain.homogeneous:
            twins.append((hypothesis, _scaled(twins[0][1], hypothesis.mu / twins[0][0].mu)))
        else:
            twins.append((hypothesis, go(hypothesis, REFUTED)))
    every = [pair for pairs in found.values() for pair in pairs]
    complete = [pair for pair in every if pair[1].complete]
    if complete:
        return complete
    hypothesis, _ = min(every, key=lambda pair: pair[1].mismatch)
    return [(hypothesis, go(hypothesis, math.inf))]


def _scaled(descent: Descent, factor: float) -> Descent:
    """The twin's descent: with positively homogeneous activations every layer's input scales with the image."""
    scaled = {
        key: {name: factor * x for name, x in getattr(descent, key).items()} for key in ("layer_inputs", "beliefs")
    }
    errors = [None if r.predicted_error is None else abs(factor) * r.predicted_error for r in descent.reports]
    reports = tuple(replace(r, predicted_error=e) for r, e in zip(descent.reports, errors, strict=True))
    probe = None if descent.probe is None else replace(descent.probe, x=factor * descent.probe.x)
    return replace(descent, **scaled, reports=reports, probe=probe)
