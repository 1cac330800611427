"""From a shared gradient to the images behind it, in five steps from top to bottom of this file.

    receive   checks the gradient, takes it to float64, and estimates its precision and the noise of every entry.
    read      finds where a descent may start. For one image the last layer's gradient has rank one and gives that
              layer's input, with label and scale; for a batch the first two fully connected layers separate the images.
              Each hypothesis is a `Start`: the inputs x of one layer and the gradients δx by them, for all images.
    follow    descends from each start. With z = σ⁻¹(x) and δz = σ′(z) δx, a layer's own inputs solve the weight
              equations W x_b = z_b − b and the gradient equations Σ_b K(δz_b) x_b = vec(G); Wᵀ δz is the next δx.
              Surplus equations refute wrong labels.
    weigh     compares the gradient of the recovered images with the shared one, and with the effect of noise on both.
    judge     gives a verdict, without any ground truth.

One image is a batch of one. But only a single image passes activations without an inverse, has a noise probe, which
predicts the error of every layer, and has unknown noise estimated. The recursion is the paper's (R-GAP; Zhu & Blaschko,
ICLR 2021); scales, twins, batches, predicted errors and verdicts are ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from rgap.arguments import check_device, check_seed
from rgap.attack.arguments import check_arguments, check_batch, check_options, check_shared, checked_network
from rgap.attack.batch import weigh_batch
from rgap.attack.candidates import Attack, Weighed, foreseen_deficits, twins, weigh_images, without_solving
from rgap.attack.descent import Descent, close_by_virtual_constraints, descend
from rgap.attack.misfit import drawn_head, start_probe
from rgap.attack.verdict import judge
from rgap.client import check_label
from rgap.head import read_head
from rgap.head.hypothesis import Start, starts_of
from rgap.isolation import dense_systems_on, isolated
from rgap.linalg import rms
from rgap.network.layer import Chain
from rgap.residual import ResidualNetwork, reconstruct_residual
from rgap.results import GradientMismatchError, PixelRange, Reconstruction
from rgap.separation.read import read_batch
from rgap.separation.subspaces import batch_given_as_one, find_batch_size
from rgap.shared_gradient import receive
from rgap.tokens import PatchEmbedding, reconstruct_tokens

NOISE_REESTIMATE_RATIO = 3.0  # noise in surplus equations, over that assumed so far, above which it replaces that

REFUTED = (
    "the layers' identities refute every label tried: this is no gradient of one image in this network; if it may be "
    "that of a batch, give batch_size, or None to find it"
)
MAX_IDENTITY_RESIDUAL = 0.3  # residual of identities (0 for the right label, about 0.9 for a wrong one) that refutes


@isolated()
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
    output: str | int | None = None,
    effort: str = "auto",
    gradient_scale: float | None = None,
    label_smoothing: float | None = None,
) -> Reconstruction:
    """Computes a client's images back from their gradient (R-GAP; Zhu & Blaschko, ICLR 2021).

    The attack knows the network and the gradient. It solves for the input of each layer in turn, from the last to the
    first, for every hypothesis on label and scale that the last layers' gradients allow, in float64 throughout. Of a
    vision transformer with learned position embeddings it solves for the patches at once (`rgap.tokens`); a network
    with residual blocks or pooling it enters at a layer whose own gradient gives its input (`rgap.residual`).

    Args:
        model: The network, or a `Chain` from `rgap.prepare`, which keeps its factorisations for the next attack.
        gradients: One tensor for each parameter, in the order of `model.parameters()`, or a mapping from name.
        image_shape: (C, H, W) of one image; may be left out with a `Chain`.
        loss: A name in `rgap.client.LOSSES`.
        batch_size: Images in the batch, or None to find it from the gradient's rank. More than one need two or more
            fully connected layers at the network's end; the result then has `per_image`.
        labels: Labels if they are known, (B,), of a batch in any order: other hypotheses are then not considered. For
            the mse loss also a real-valued target, floating-point (1, outputs).
        virtual_constraints: Whether the layer before may close the deficit of a rank-deficient layer.
        pixel_range: Smallest and largest value of a pixel; chooses between twins, where it can.
        rcond: Singular values below rcond times the largest count as zero; by default matched to the gradient's
            precision (1e-4 for float32, 1e-5 for float64).
        noise_std: Standard deviation of noise known to be on every gradient entry; widens cutoff and tolerance.
        seed: Seed of a batch's random starts; a single image needs none.
        device: Of images and labels, by default the CPU. On "cuda" a chain's large dense systems are solved there.
        output: Name or place of the output that the loss is taken on; by default the first tensor of several.
        effort: "auto" stops at once where by the rank laws nothing determines the image, and solving for a part of it
            takes long; its images are then uniform. It leaves layers open that virtual constraints would take minutes
            to close. "full" solves nevertheless.
        gradient_scale: Factor κ of the shared gradient κ ∇ℓ: 1.0 asserts the gradient of the mean loss, as it stands in
            `rgap.client`, another number a client that sums, accumulates, weights or clips. None estimates it. Without
            biases a single output does not determine it, nor with it the brightness of the image, and a factor that
            takes the image out of `pixel_range` is not believed; under squared error
            a given factor then rests on labels, and the target of a regression must be given as `labels`.
        label_smoothing: ε of smoothed labels under cross-entropy; None estimates it where the equations ask for it.

    Returns:
        A `Reconstruction`; read its `verdict` before its images. Where no label explains a squared error, its labels
            are the real-valued target, (1, outputs), which the gradient of the last bias determines.

    Raises:
        UnsupportedLayerError: If the network is of no supported kind, or a batch cannot be separated.
        GradientMismatchError: If the gradients do not belong to the network or are not finite.
        ValueError: If another argument is out of range.

    Example:
        >>> import rgap
        >>> model = rgap.models.cnn6(seed=0)
        >>> images, labels = rgap.data.load_images("embedded", count=1, classes=2)
        >>> gradients = rgap.client_gradients(model, images, labels)
        >>> result = rgap.reconstruct(model, gradients, image_shape=(3, 32, 32), gradient_scale=1.0)
        >>> result.verdict, result.certified_psnr_db > 90, rgap.metrics.psnr_db(result.images, images).item() > 90
        ('exact', True, True)
    """
    device = check_device(device)
    check_seed(seed)
    check_options(loss, batch_size, pixel_range, rcond, noise_std, gradient_scale, label_smoothing, effort)
    chain = checked_network(model, image_shape, output, batch_size)
    asserted = {"gradient_scale": gradient_scale, "label_smoothing": label_smoothing}
    given = asserted | {"batch_size": batch_size, "labels": labels, "pixel_range": pixel_range, "device": device}
    given |= {"rcond": rcond, "noise_std": noise_std}
    if isinstance(chain, PatchEmbedding):
        return reconstruct_tokens(chain, gradients, loss, virtual_constraints=virtual_constraints, **given)
    if isinstance(chain, ResidualNetwork):
        return reconstruct_residual(chain, gradients, loss, seed=seed, **given)
    check_arguments(chain, loss, batch_size, labels)
    close = partial(close_by_virtual_constraints, full=effort == "full") if virtual_constraints else None
    received = receive(chain, gradients, rcond, noise_std, any_scale=gradient_scale is None)
    if gradient_scale is not None:
        asserted["gradient_scale"] = gradient_scale * received.unit
    attack = Attack(chain, received, loss, close, PixelRange(*pixel_range), **asserted)
    attack, starts, notes = read(attack, batch_size, labels, seed)
    deficits = foreseen_deficits(attack) if effort == "auto" and starts[0].batch_size == 1 else None
    if deficits is not None:
        notes.append("the rank laws say so before any system is solved; effort='full' solves for what is determined")
        return judge([without_solving(attack, start, deficits) for start in starts], notes, attack.pixels, device)
    with dense_systems_on(device if device is not None and device.type == "cuda" else None):
        descents, found = follow(attack, starts)
        if noise_std is None:
            attack, descents, found = _with_noise_found(attack, starts, rcond, descents, found)
        single = starts[0].batch_size == 1
        weighed = weigh_images(attack, descents) if single else [weigh_batch(attack, descents[0])]
        if single and attack.received.is_half and not any(one.joint.consistent for one in weighed):
            weighed, found = _with_coarse_arithmetic(attack, starts, weighed, found)
        return judge(weighed, [*notes, *found], attack.pixels, device)


def read(
    attack: Attack, batch_size: int | None, labels: Tensor | Sequence[int] | None, seed: int
) -> tuple[Attack, list[Start], list[str]]:
    """Finds every start that the last layer's gradient allows, or for a batch a single one from its dense layers.

    Returns the attack, now with the rounding of the head's δz, the starts and notes.
    """
    chain, received, loss = attack.chain, attack.received, attack.loss
    notes: tuple[str, ...] = ()
    if batch_size != 1:
        check_shared(chain, received)
        size = find_batch_size(chain, received, batch_size)
        if size.size > 1:
            known = check_batch(chain, loss, labels, size.size)
            start, batch_notes = read_batch(chain, received, size, loss, known, seed, attack.gradient_scale)
            found = sorted(start.labels.tolist())
            if known is not None and len(found) == size.size and known != found:
                raise GradientMismatchError(f"labels {known} were given; the gradient is that of {found}")
            return attack, [start], batch_notes
        notes = size.notes
    head = chain.layers[-1]
    asserted = {"gradient_scale": attack.gradient_scale, "label_smoothing": attack.label_smoothing}
    reading = read_head(loss, head, received, check_label(labels, loss, head.output_shape[0]), **asserted)
    received = received.with_rounding(max(h.rounding for h in reading.hypotheses))
    starts = starts_of(chain, reading.hypotheses)
    if several := batch_given_as_one(chain, received) if batch_size == 1 else "":
        attack = replace(attack, close=None)  # nothing closes a null space of equations that no image fulfils
    notes = [*notes, *received.notes, *filter(None, [several]), *reading.notes]
    return replace(attack, received=received), starts, notes


def follow(attack: Attack, starts: Sequence[Start]) -> tuple[list[Descent], list[str]]:
    """Follows each start down to the images; where the layers refute all, the one they contradict least.

    Returns the complete descents, also those of a single image's twins, and a note where layers decided between labels.
    """
    chain, received, close = attack.chain, attack.received, attack.close
    if starts[0].batch_size > 1:
        return [descend(chain, received, starts[0], close=close)], []
    drawn = drawn_head(chain, received)

    def down(start: Start, give_up: float) -> Descent:
        probe = start_probe(start, drawn)
        return descend(chain, received, start, probe=probe, close=close, give_up=give_up)

    every = [down(start, MAX_IDENTITY_RESIDUAL) for start in starts]
    complete = [twin for descent in every if descent.complete for twin in twins(descent)]
    if not complete:
        best = min(every, key=lambda descent: descent.mismatch)
        close = None  # nothing closes a null space of equations that no image fulfils
        return [down(best.start, math.inf)], [REFUTED]
    kept = {descent.start.twins[0][0].label for descent in complete}
    refuted = {twin.label: d.mismatch for d in every for twin in d.start.twins[0] if twin.label not in kept}
    if not refuted:
        return complete, []
    least = min(descent.mismatch for descent in complete)
    others = ", ".join(f"{mismatch:.2g} for label {label}" for label, mismatch in refuted.items())
    labels = " and ".join(f"label {label}" for label in sorted(kept))
    return complete, [f"{labels}, decided by the layers' identities: residual {least:.2g}, against {others}"]


def _with_noise_found(
    attack: Attack, starts: Sequence[Start], rcond: float | None, descents: list[Descent], notes: list[str]
) -> tuple[Attack, list[Descent], list[str]]:
    """Follows the starts once more where surplus equations show more noise than was assumed; one image only."""
    received = attack.received
    found = min((descent.noise_stds[0] for descent in descents if descent.noise_stds), default=0.0)
    if starts[0].batch_size > 1 or found <= NOISE_REESTIMATE_RATIO * max(map(rms, received.entry_std.values())):
        return attack, descents, notes
    noisy = receive(attack.chain, received.gradients, rcond, found)
    noisy = replace(attack, received=replace(noisy, absent=received.absent, rounding=received.rounding), inferred=True)
    again, others = follow(noisy, starts)
    most = NOISE_REESTIMATE_RATIO * found
    if not any(d.mismatch <= MAX_IDENTITY_RESIDUAL and max(d.noise_stds, default=0.0) <= most for d in again):
        return attack, descents, notes  # no white noise: the layers contradict each other
    note = f"noise of standard deviation {found:.2g} on the gradient, estimated from the residual of surplus equations"
    return noisy, again, [*others, note]


def _with_coarse_arithmetic(
    attack: Attack, starts: Sequence[Start], weighed: list[Weighed], notes: list[str]
) -> tuple[list[Weighed], list[str]]:
    """Follows and weighs the starts once more, for a client that not only shared but computed in 16 bits."""
    coarse = replace(attack, received=replace(attack.received, coarse=True))
    descents, others = follow(coarse, starts)
    again = weigh_images(coarse, descents)
    if not any(one.joint.consistent for one in again):
        return weighed, notes
    return again, [*others, "the gradient fits a client that computed in 16 bits, not one that rounded to them"]
