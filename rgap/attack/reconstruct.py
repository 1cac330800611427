"""`reconstruct`: the hypotheses, each followed down, and a verdict that needs no ground truth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from rgap.attack.arguments import check_arguments, checked_chain, checked_labels
from rgap.attack.batch import recover_through_convolutions
from rgap.attack.batch_recovery import recover_batch
from rgap.attack.descent import REFUTED, Descent, descend
from rgap.attack.propagation import draw_noise, start_probe
from rgap.attack.verdict import judge, make_candidate
from rgap.head import Hypothesis, read_head
from rgap.network.layer import Chain
from rgap.noise import entry_noise
from rgap.results import GradientMismatchError, Reconstruction
from rgap.separation.subspaces import find_batch_size, first_dense
from rgap.shared_gradient import SharedGradient, receive

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
        loss: A name in `rgap.client.LOSSES`.
        batch_size: Images in the batch, or None to find it from the gradient's rank. More than one need two or more
            fully connected layers at the network's end; the result then has `per_image`.
        labels: Labels if they are known, (B,), of a batch in any order: other hypotheses are then not considered.
        virtual_constraints: Whether the layer before may close the deficit of a rank-deficient layer.
        pixel_range: Smallest and largest value of a pixel; chooses between twins, where it can.
        rcond: Singular values below rcond times the largest count as zero; by default matched to the gradient's
            precision (1e-4 for float32, 1e-5 for float64).
        noise_std: Standard deviation of noise known to be on every gradient entry; widens cutoff and tolerance.
        seed: Seed of a batch's random starts; a single image needs none.
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
    head = chain.layers[-1]
    known = checked_labels(labels, loss, head.output_shape[0]) if batch_size == 1 else None
    received = receive(chain, gradients, rcond, noise_std)
    found_size: tuple[str, ...] = ()
    if batch_size != 1:
        size = find_batch_size(chain, received, batch_size)
        if size.size != 1:
            options = {"labels": labels, "pixel_range": pixel_range, "seed": seed, "device": device}
            if first_dense(chain):
                options["virtual_constraints"] = virtual_constraints
                return recover_through_convolutions(chain, received, size, loss, **options)
            return recover_batch(chain, received, size, loss, **options)
        known, found_size = checked_labels(labels, loss, head.output_shape[0]), size.notes
    reading = read_head(loss, head, received, known)
    hypotheses = list(reading.hypotheses)
    received = replace(received, rounding=max(h.rounding for h in hypotheses))
    stds = _entry_noise(chain, received.gradients, noise_std, received.known)
    attack = _Attack(chain, received, stds, loss, virtual_constraints)
    descents, refuted = _follow(attack, hypotheses)
    if noise_std is None:
        attack, descents, refuted = _with_noise_found(attack, hypotheses, descents, refuted, rcond)
    notes = [*found_size, *received.notes, *reading.notes, *refuted]
    candidates = [make_candidate(chain, attack.received, attack.stds, h, d, loss, pixel_range) for h, d in descents]
    return judge(candidates, notes, pixel_range, device)


@dataclass(frozen=True)
class _Attack:
    """What stays the same for every hypothesis."""

    chain: Chain
    received: SharedGradient
    stds: Mapping[str, Tensor]  # standard deviation of every gradient entry's error
    loss: str
    virtual_constraints: bool

    @cached_property
    def noise(self) -> dict[str, Tensor]:
        """One draw of the errors, for all hypotheses."""
        return draw_noise(self.stds)

    def read(self, gradients: Mapping[str, Tensor], label: int) -> Sequence[Hypothesis]:
        """The head's hypotheses for other gradients."""
        try:
            received = replace(self.received, gradients=dict(gradients))
            return read_head(self.loss, self.chain.layers[-1], received, label).hypotheses
        except GradientMismatchError:  # with so much noise the label may look like another
            return ()

    def descend(self, hypothesis: Hypothesis, give_up: float) -> Descent:
        """Follows one hypothesis."""
        read = partial(self.read, label=hypothesis.label)
        probe = start_probe(self.chain.layers[-1], self.received.gradients, self.noise, hypothesis, read)
        options = {"virtual_constraints": self.virtual_constraints, "give_up": give_up}
        return descend(self.chain, self.received, hypothesis, probe=probe, **options)


def _entry_noise(
    chain: Chain, gradients: Mapping[str, Tensor], noise_std: float | None, known=None
) -> dict[str, Tensor]:
    """The entries' errors; behind activations that have an inverse no gradient has single zeros of its own."""
    has_zeros = not all(layer.activation.one_to_one for layer in chain.layers)
    return entry_noise(gradients, noise_std, known, has_zeros=has_zeros)


def _with_noise_found(attack: _Attack, hypotheses: list[Hypothesis], descents: list, refuted: list[str], rcond):
    """The attack, its descents and notes; made again where surplus equations betray more noise than was known of."""
    found = min((d.misfits[0] for _, d in descents if d.misfits), default=0.0)
    known = max(std.norm().item() / std.numel() ** 0.5 for std in attack.stds.values())
    if found <= UNKNOWN * known:
        return attack, descents, refuted
    gradients = attack.received.gradients
    received = replace(receive(attack.chain, gradients, rcond, found), underflowed=attack.received.underflowed)
    noisy = replace(attack, received=received, stds=_entry_noise(attack.chain, gradients, found))
    again, others = _follow(noisy, hypotheses)
    if not any(d.mismatch <= REFUTED and max(d.misfits, default=0.0) <= UNKNOWN * found for _, d in again):
        return attack, descents, refuted  # no white noise: the layers contradict each other
    note = f"noise of standard deviation {found:.2g} on the gradient, by the misfit of equations that are to spare"
    return noisy, again, [*others, note]


def _follow(attack: _Attack, hypotheses: list[Hypothesis]) -> tuple[list[tuple[Hypothesis, Descent]], list[str]]:
    """Follows each hypothesis down; twins are scaled copies; where all are refuted the least unlikely is followed.

    Returns the descents that are complete, and a note where the layers decided between labels.
    """
    found: dict[object, list[tuple[Hypothesis, Descent]]] = {}

    for number, hypothesis in enumerate(hypotheses):
        twins = found.setdefault(hypothesis.scale > 0 if attack.chain.homogeneous else number, [])
        if twins:
            twins.append((hypothesis, _scaled(twins[0][1], hypothesis.scale / twins[0][0].scale)))
        else:
            twins.append((hypothesis, attack.descend(hypothesis, REFUTED)))
    every = [pair for pairs in found.values() for pair in pairs]
    complete = [pair for pair in every if pair[1].complete]
    if not complete:
        hypothesis, _ = min(every, key=lambda pair: pair[1].mismatch)
        return [(hypothesis, attack.descend(hypothesis, math.inf))], []
    kept = {h.label for h, _ in complete}
    against = {h.label: d.mismatch for h, d in every if h.label not in kept}
    if not against:
        return complete, []
    least = min(d.mismatch for _, d in complete)
    others = ", ".join(f"label {label} by {mismatch:.2g}" for label, mismatch in against.items())
    labels = " and ".join(f"label {label}" for label in sorted(kept))
    return complete, [f"{labels} by the identities of the layers, missed by {least:.2g}; {others}"]


def _scaled(descent: Descent, factor: float) -> Descent:
    """The twin's descent: with positively homogeneous activations every layer's input scales with the image."""
    scaled = {
        key: {name: factor * x for name, x in getattr(descent, key).items()} for key in ("layer_inputs", "beliefs")
    }
    errors = [None if r.predicted_error is None else abs(factor) * r.predicted_error for r in descent.reports]
    reports = tuple(replace(r, predicted_error=e) for r, e in zip(descent.reports, errors, strict=True))
    probe = None if descent.probe is None else replace(descent.probe, x=factor * descent.probe.x)
    return replace(descent, **scaled, reports=reports, probe=probe)
