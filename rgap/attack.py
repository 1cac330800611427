"""`reconstruct`: the hypotheses, each followed down, and a verdict that needs no ground truth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from rgap.batch_recovery import recover_batch
from rgap.batch_size import find_batch_size
from rgap.chain import Chain
from rgap.client import gradients_of
from rgap.door import check_arguments, checked_chain, checked_labels
from rgap.evidence import Evidence, weigh
from rgap.head import Hypothesis, read_head
from rgap.recursion import REFUTED, Descent, descend
from rgap.results import Candidate, Reconstruction


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
        batch_size: Images in the batch, or None to find it from the gradient's rank. More than one need a fully
            connected network; the result then has `per_image`.
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
    evidence = weigh(chain, gradients, rcond, noise_std)
    found_size: tuple[str, ...] = ()
    if batch_size != 1:
        size = find_batch_size(chain, evidence, batch_size)
        if size.size != 1:
            options = {"labels": labels, "pixel_range": pixel_range, "seed": seed, "device": device}
            return recover_batch(chain, evidence, size, loss, **options)
        known, found_size = checked_labels(labels, loss, head.output_shape[0]), size.notes
    reading = read_head(loss, head, evidence, known)
    hypotheses = list(reading.hypotheses)
    evidence = replace(evidence, rounding=max(h.rounding for h in hypotheses))
    notes = [*found_size, *evidence.notes, *reading.notes]
    descents, refuted = _follow(chain, evidence, hypotheses, virtual_constraints)
    candidates = [_candidate(chain, evidence, h, d, loss, pixel_range) for h, d in descents]
    return _judge(candidates, evidence, [*notes, *refuted], device)


def _follow(
    chain: Chain, evidence: Evidence, hypotheses: list[Hypothesis], virtual_constraints: bool
) -> tuple[list[tuple[Hypothesis, Descent]], list[str]]:
    """Follows each hypothesis down; twins are scaled copies; where all are refuted the least unlikely is followed.

    Returns the descents that are complete, and a note where the layers decided between labels.
    """
    found: dict[object, list[tuple[Hypothesis, Descent]]] = {}

    def go(hypothesis: Hypothesis, give_up: float) -> Descent:
        return descend(chain, evidence, hypothesis, virtual_constraints=virtual_constraints, give_up=give_up)

    for number, hypothesis in enumerate(hypotheses):
        twins = found.setdefault(hypothesis.scale > 0 if chain.homogeneous else number, [])
        if twins:
            twins.append((hypothesis, _scaled(twins[0][1], hypothesis.scale / twins[0][0].scale)))
        else:
            twins.append((hypothesis, go(hypothesis, REFUTED)))
    every = [pair for pairs in found.values() for pair in pairs]
    complete = [pair for pair in every if pair[1].complete]
    if not complete:
        hypothesis, _ = min(every, key=lambda pair: pair[1].mismatch)
        return [(hypothesis, go(hypothesis, math.inf))], []
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
    return replace(descent, **scaled)


def _candidate(
    chain: Chain,
    evidence: Evidence,
    hypothesis: Hypothesis,
    descent: Descent,
    loss: str,
    pixel_range: tuple[float, float],
) -> Candidate:
    image = descent.layer_inputs[chain.layers[0].name].reshape(1, *chain.image_shape)
    label = torch.tensor([hypothesis.label])
    residual = math.inf
    if torch.isfinite(image).all():
        mine = gradients_of(chain.model, chain.parameters, image, label, loss)
        heard = {name: g for name, g in evidence.gradients.items() if name not in evidence.lost}
        residual = max(_relative(mine[name], g, heard) for name, g in heard.items())
    width = pixel_range[1] - pixel_range[0]
    slack = (width if math.isfinite(width) else 1.0) * min(evidence.tolerance, 0.1)
    excess = max((pixel_range[0] - image).max().item(), (image - pixel_range[1]).max().item())
    inside = excess <= slack
    return Candidate(
        image, label, residual, inside, descent.layer_inputs, descent.reports, descent.open_layers, descent.beliefs
    )


def _relative(mine: Tensor, shared: Tensor, gradients: Mapping[str, Tensor]) -> float:
    """‖g′ − g‖ / ‖g‖, for a gradient that vanishes relative to the largest of all."""
    unit = shared.abs().max() if shared.any() else max(g.abs().max() for g in gradients.values())
    difference = ((mine.cpu() - shared) / unit).norm()  # in this unit squares cannot underflow
    return (difference / (shared / unit).norm().clamp(min=1.0)).item()


def _judge(candidates: list[Candidate], evidence: Evidence, notes: list[str], device) -> Reconstruction:
    """Ranks the candidates and gives the verdict."""

    def order(candidate: Candidate) -> tuple:  # outside the range, the smaller of two twins is the likelier
        size = 0.0 if candidate.in_pixel_range else candidate.images.abs().max().item()
        return candidate.gradient_residual > evidence.tolerance, size, candidate.gradient_residual

    candidates.sort(key=order)
    best = candidates[0]
    consistent = [c for c in candidates if c.gradient_residual <= evidence.tolerance]
    inside = [c for c in consistent if c.in_pixel_range]
    short = [f"{r.name!r} by {r.deficit}" for r in best.layers if r.deficit]
    if silent := [f"{r.saturated} at {r.name!r}" for r in best.layers if r.saturated]:
        notes = [
            *notes,
            f"outputs that do not tell their pre-activation (zeros of a ReLU, saturation): {', '.join(silent)}",
        ]
    if short and not best.open_layers:
        notes = [*notes, f"layers short of full rank, closed by virtual constraints: {', '.join(short)}"]
    if best.open_layers:
        notes = [*notes, f"layers short of full rank: {', '.join(short)}; what they leave open was not determined"]
        verdict = "rank-deficient"
    elif not consistent:
        notes = [
            *notes,
            f"no hypothesis reproduces the gradient: the best misses it by {best.gradient_residual:.2g}; "
            f"{evidence.tolerance:.2g} is allowed at this precision",
        ]
        verdict = "inconsistent"
    elif len(inside) > 1:
        notes = [*notes, f"{len(inside)} hypotheses inside the pixel range have this very gradient (twin data)"]
        verdict = "ambiguous"
    else:
        verdict = "exact"
        if len(inside) == 1 and len(consistent) > 1:
            notes = [*notes, f"the pixel range chose between {len(consistent)} hypotheses with this gradient"]
        elif not inside:
            notes = [*notes, "no consistent hypothesis lies inside the pixel range; the best by gradient was taken"]
            verdict = "ambiguous" if len(consistent) > 1 else "exact"
    kept = tuple(consistent or [best])
    if device is not None:
        kept = tuple(replace(c, images=c.images.to(device), labels=c.labels.to(device)) for c in kept)
    return Reconstruction(kept[0].images, kept[0].labels, verdict, kept, best.layers, tuple(notes))
