"""The client replayed: the label by the head's gradient, and the gradient that a recovered image has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median

import torch
from torch import Tensor, nn

from rgap.client import check_label, gradients_of, loss_value, outputs_fit
from rgap.results import UnsupportedLayerError
from rgap.shared_gradient import SharedGradient

MIN_RELATIVE_RMS = 1e-3
"""Smallest root mean square of a gradient, relative to the median over the parameters, to which a miss is compared.

The gradient of a key's bias is zero but for rounding: a shift of all its arguments leaves a softmax as it is.
"""

EXCESS_SAFETY = 2.0  # times the noise found by one draw of the predicted error, which may be larger than most
MAX_LABEL_MISFIT = 0.05  # misfit of the head's gradient above which the target of a squared error is no label
MAX_FLOAT64_PARAMETERS = 20_000_000  # parameters up to which gradients are computed in float64 whatever the precision
MAX_LABELS_TRIED = 16  # most labels whose gradients are compared where the head's gradient alone does not decide
LABEL_MISFIT_RATIO = 1.01  # misfit of the head's gradient, relative to the smallest, up to which a label is tried


def gradient_sizes(gradients: Mapping[str, Tensor]) -> dict[str, float]:
    """Norm of each gradient, those that are nothing but rounding at that of the smallest that is more."""
    rms = {n: g.norm().item() / g.numel() ** 0.5 for n, g in gradients.items()}
    least = MIN_RELATIVE_RMS * median(size for size in rms.values() if size > 0)
    return {n: max(rms[n], least) * g.numel() ** 0.5 for n, g in gradients.items()}


@dataclass(frozen=True)
class Replay:
    """The network with a loss, beside the gradients that were shared."""

    model: nn.Module
    received: SharedGradient
    loss: str
    label_smoothing: float | None = None
    gradient_scale: float | None = None  # κ of the shared gradient κ ∇ℓ; None to estimate it

    @property
    def asserted(self) -> float | None:
        """The given factor in units of the gradients as received."""
        return None if self.gradient_scale is None else self.gradient_scale * self.received.unit

    @cached_property
    def parameters(self) -> dict[str, Tensor]:
        """In float64; in float32 where the network is large and the shared gradients are no finer."""
        parameters = dict(self.model.named_parameters())
        large = sum(p.numel() for p in parameters.values()) > MAX_FLOAT64_PARAMETERS
        coarse = self.received.precision >= torch.finfo(torch.float32).eps
        return {n: p.detach().to(torch.float32 if large and coarse else torch.float64) for n, p in parameters.items()}

    @cached_property
    def shared(self) -> dict[str, Tensor]:
        """The shared gradients that did not underflow."""
        return self.received.usable

    @cached_property
    def sizes(self) -> dict[str, float]:
        """`gradient_sizes` of the shared gradients."""
        return gradient_sizes(self.shared)

    def gradients(self, image: Tensor, label: Tensor) -> dict[str, Tensor]:
        """The gradient that an image has."""
        with torch.random.fork_rng(devices=[]):  # dropout draws from the global generator
            smoothing = {"label_smoothing": self.label_smoothing or 0.0}
            mine = gradients_of(self.model, self.parameters, image, label, self.loss, **smoothing)
        return {name: g.cpu() for name, g in mine.items()}

    def match(self, image: Tensor, label: Tensor) -> tuple[float, float]:
        """κ and the largest over the tensors of ‖κ g′ − g‖ / ‖g‖, g′ an image's own gradient.

        κ is as given; else 1 where the residual is then within the tolerance, and that of least squares elsewhere.
        """
        mine = self.gradients(image, label)
        scale = self.asserted or 1.0
        residual = self._residual(mine, scale)
        if self.gradient_scale is None and residual > self.received.tolerance:
            found = self.scale(mine)
            if found > 0 and (scaled := self._residual(mine, found)) < residual:
                scale, residual = found, scaled
        return scale / self.received.unit, residual

    def _residual(self, mine: dict[str, Tensor], scale: float) -> float:
        return max((scale * mine[n] - g).norm().item() / self.sizes[n] for n, g in self.shared.items())

    def scale(self, mine: dict[str, Tensor]) -> float:
        """The factor by which a gradient comes nearest to the shared one, over all parameters."""
        product = sum((mine[n] * g).sum().item() for n, g in self.shared.items())
        square = sum(mine[n].square().sum().item() for n in self.shared)
        return product / square if square else 0.0

    def excess(self, image: Tensor, perturbed: Tensor, label: Tensor, stds: Mapping[str, Tensor]) -> float:
        """Times its expected size by which an image's own gradient, scaled, misses the shared one; at least 1.

        `perturbed` is the image with a draw of its predicted error, `stds` the shared gradient's by parameter name.
        """
        mine, other = self.gradients(image, label), self.gradients(perturbed, label)
        scale, ratios = self.scale(mine), [1.0]
        for name, std in stds.items():
            expected = std.square().sum() + (scale * (other[name] - mine[name])).square().sum()
            miss = (scale * mine[name] - self.received.gradients[name]).square().sum()
            ratios.append(EXCESS_SAFETY * (miss / expected.clamp(min=1e-300)).sqrt().item())
        return max(ratios)

    def find_label(self, image: Tensor, known: Tensor | Sequence | None) -> tuple[Tensor, list[str]]:
        """The label (1,), as known or by the outputs of the recovered image (1, C, H, W), and on what it was decided.

        Raises an UnsupportedLayerError if the loss does not take the network's outputs, and a ValueError if a label
        that was given is out of range, or the gradient decides nothing between many classes.
        """
        z = self._outputs(image)
        if (given := check_label(known, self.loss, z.shape[1])) is not None:
            return (given[None] if isinstance(given, Tensor) else torch.tensor([given])), []
        classes = max(z.shape[1], 2)
        every = torch.arange(classes)
        logits = z.expand(classes, -1).clone().requires_grad_()
        with torch.enable_grad():
            value = loss_value(self.loss, logits, every, label_smoothing=self.label_smoothing or 0.0)
            dz = torch.autograd.grad(classes * value, logits)[0]
        misfits = self._head_misfits(dz)
        missed = self.loss == "mse" and misfits.min() > max(MAX_LABEL_MISFIT, self.received.tolerance)
        if missed and (target := self._real_target(z)) is not None:
            return target, ["no label explains the head's gradient; the target is real-valued"]
        likely = every[misfits <= LABEL_MISFIT_RATIO * misfits.min() + 1e-9]
        if len(likely) == 1:
            return likely, [f"label {likely.item()} by the head's gradient, missed by {misfits.min():.2g}"]
        if len(likely) > MAX_LABELS_TRIED:
            raise ValueError(f"the head's gradient leaves {len(likely)} labels open; give labels=")
        best = min(likely, key=lambda label: self.match(image, label[None])[1])
        return best[None], [f"label {best.item()} by the whole gradient, the best of {len(likely)} that were tried"]

    def _outputs(self, image: Tensor) -> Tensor:
        """The network's outputs for an image, (1, classes), which the loss must take."""
        buffers = {name: b.detach().clone() for name, b in self.model.named_buffers()}
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            z = torch.func.functional_call(self.model, buffers, image.to(next(self.model.parameters())))
        if not isinstance(z, Tensor):
            raise UnsupportedLayerError(f"the network gives a {type(z).__name__}; the {self.loss} loss takes a tensor")
        if z.ndim != 2 or not outputs_fit(self.loss, z.shape[1]):
            raise UnsupportedLayerError(f"the network gives {tuple(z.shape)}; the {self.loss} loss does not take that")
        return z.double().cpu()

    def _real_target(self, z: Tensor) -> Tensor | None:
        """The real-valued target of a squared error, (1, C), by the gradient of the last bias; None without one."""
        G = next((g for g in reversed(list(self.received.gradients.values())) if g.shape == z.shape[1:]), None)
        if G is None or not G.any():
            return None
        return z - z.shape[1] / 2 * G / (self.asserted or self.received.unit)

    def _head_misfits(self, dz: Tensor) -> Tensor:
        """How far each label's ∂ℓ/∂z, a row of `dz`, is from the head's gradient, the bias's or a rank-one weight's."""
        for G in reversed(list(self.received.gradients.values())):
            if G.shape[:1] == dz.shape[1:] and G.ndim == 1 and G.any():
                scales = dz @ G / dz.square().sum(1).clamp(min=1e-300)
                scales = scales.clamp(min=0)  # the loss may be summed or clipped
                return (scales[:, None] * dz - G).norm(dim=1) / G.norm()
            if G.shape[:1] == dz.shape[1:] and G.ndim == 2 and G.any():
                u = torch.linalg.svd(G, full_matrices=False)[0][:, 0]
                return 1 - (dz @ u).abs() / dz.norm(dim=1).clamp(min=1e-300)
        return torch.zeros(len(dz), dtype=dz.dtype)
