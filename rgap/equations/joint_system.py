"""One layer of several images as a linear system in what one kind of constraints leaves open.

Weight constraints hold for each image alone, W x_b = z_b − b. Gradient constraints are shared, and the same for every
channel: [M_1 … M_B] [x_1c; …; x_Bc] = vec(G[:, c]). Either kind can go first; the other decides what it leaves open.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor

from rgap.equations.blocks import blocks, gradient_matrix, gradient_values, weight_matrix
from rgap.equations.joint_dense import Normal
from rgap.equations.joint_weights import WeakSubspace
from rgap.linalg import svd
from rgap.network.layer import Layer

DENSE = 6000
"""Unknowns of an image up to which WᵀW is held dense (288 MB): its zeros cost less than sparse products."""


@dataclass(frozen=True)
class ReducedSystem:
    """x = x0 + N y over all images, and the equations for y.

    Attributes:
        x0: (B, n).
        spread: y (k,) or (k, m) -> N y, (B, n) or (B, n, m).
        project: Nᵀ of vectors (B, n), (k,).
        seen_by: (image, L) with L (q, n) -> the columns of y that this image depends on, and L N of them.
        normal: The equations for y.
        b: Their right-hand side.
        rank_gradients: Of [M_1 … M_B] times the channels, None where it was not computed.
        size: What the residual of the equations is relative to.
        change: How x0 and b change with G and z, (O, C, kh, kw) and (B, O, H′, W′) -> (B, n) and as b.
    """

    x0: Tensor
    spread: Callable[[Tensor], Tensor]
    project: Callable[[Tensor], Tensor]
    seen_by: Callable[[int, Tensor], tuple[slice, Tensor]]
    normal: Normal
    b: Tensor
    rank_gradients: int | None
    size: float
    change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class SharedRows:
    """What the shared gradient says of a channel of all images: x_c = x0[:, :, c] + V y_c, ‖sigmas ∘ y_c‖ small.

    Attributes:
        x0: (B, H·W, C).
        V: What it leaves open or sees too dimly to be trusted alone, (B, H·W, k); empty where everything is seen.
        sigmas: Their singular values, 0 where they do not count, (k,).
        rank: Of [M_1 … M_B].
        above, below: Smallest singular value kept and largest dropped, relative to the largest.
        residual: Of the gradient constraints, relative.
        sensitivity: How x0 changes with G.
    """

    x0: Tensor
    V: Tensor
    sigmas: Tensor
    rank: int
    above: float
    below: float | None
    residual: float
    sensitivity: Callable[[Tensor], Tensor]


def shared_gradient(layer: Layer, G: Tensor, dz: Tensor, rcond: float, trusted: float = 0.02) -> SharedRows:
    """Factors [M_1 … M_B] block by block of the stride.

    Args:
        layer: Without groups.
        G: (O, C, kh, kw), of the mean loss.
        dz: (B, O, H′, W′), of the same.
        rcond: Singular values below rcond times the largest count as zero.
        trusted: Directions below this share of the largest are left to W.
    """
    count, pixels, channels = len(dz), math.prod(layer.input_shape[1:]), layer.input_shape[0]
    systems = []
    for block in blocks(layer):
        M = torch.cat([gradient_matrix(layer, block, image) for image in dz], 1)
        systems.append((block.pixels, gradient_values(layer, block, G), *svd(M, full_matrices=M.shape[0] < M.shape[1])))
    largest = max(S[0].item() for *_, S, _ in systems)
    x0, missed = G.new_zeros(count, pixels, channels), 0.0
    untouched = torch.ones(pixels, dtype=torch.bool)
    bases, sigmas = [], []
    for places, values, U, S, Vh in systems:
        rank = int((S > rcond * largest).sum())
        coefficients = U[:, :rank].T @ values
        x0[:, places] = (Vh[:rank].T @ (coefficients / S[:rank, None])).reshape(count, -1, channels)
        missed += max(values.square().sum().item() - coefficients.square().sum().item(), 0.0)
        untouched[places] = False
        bases.append(_placed(Vh.T.reshape(count, len(places), -1), places, pixels))
        sigmas.append(F.pad(S, (0, len(Vh) - len(S))))
    sigma = torch.cat(sigmas) / largest if largest > 0 else torch.cat(sigmas)
    kept, dropped = sigma[sigma > rcond], sigma[sigma <= rcond]
    full = len(kept) == count * pixels
    open_ = sigma <= (min(trusted, rcond) if full and kept.min() > trusted else max(rcond, trusted))
    unread = torch.einsum(
        "ab,pu->apbu", torch.eye(count, dtype=G.dtype), torch.eye(pixels, dtype=G.dtype)[:, untouched]
    )
    V = torch.cat([torch.cat(bases, 2)[:, :, open_], unread.flatten(2)], 2)
    weights = F.pad(torch.where(sigma > rcond, sigma, 0.0)[open_] * largest, (0, count * int(untouched.sum())))
    size = G.norm().item()

    def sensitivity(dG: Tensor) -> Tensor:
        x = torch.zeros_like(x0)
        for block, (places, _, U, S, Vh) in zip(blocks(layer), systems, strict=True):
            rank = int((S > rcond * largest).sum())
            solved = Vh[:rank].T @ (U[:, :rank].T @ gradient_values(layer, block, dG) / S[:rank, None])
            x[:, places] = solved.reshape(count, -1, channels)
        return x

    return SharedRows(
        x0,
        V,
        weights,
        len(kept),
        kept.min().item() if len(kept) else 0.0,
        dropped.max().item() if len(dropped) else None,
        missed**0.5 / size if size > 0 else 0.0,
        sensitivity,
    )


def gradient_first(layer: Layer, G: Tensor, z: Tensor, found: SharedRows) -> ReducedSystem:
    """W's equations for what the shared gradient leaves open.

    Both kinds of rows are scaled by the size of their right-hand side. The Gram matrix (I ⊗ V_b)ᵀ WᵀW (I ⊗ V_b) is
    made from WᵀW, at H·W operations an entry in place of O·H′·W′.

    Args:
        layer: Without groups.
        G: (O, C, kh, kw).
        z: Pre-activations less the bias, (B, O, H′, W′).
        found: From `shared_gradient`.
    """
    channels, (_, _, k) = layer.input_shape[0], found.V.shape
    images = (len(z), *layer.input_shape)
    x0 = found.x0.transpose(1, 2).reshape(images)

    def spread(y: Tensor) -> Tensor:
        return torch.einsum("bpk,ck...->bcp...", found.V, y.reshape(channels, k, *y.shape[1:])).flatten(1, 2)

    def apply(y: Tensor) -> Tensor:
        return layer.apply(spread(y).reshape(images))

    def project(x: Tensor) -> Tensor:
        return torch.einsum("bpk,bcp->ck", found.V, x.reshape(len(x), channels, -1)).flatten()

    def adjoint(r: Tensor) -> Tensor:
        return project(layer.adjoint(r))

    def seen_by(image: int, L: Tensor) -> tuple[slice, Tensor]:
        return slice(None), torch.einsum("qcp,pk->qck", L.reshape(len(L), channels, -1), found.V[image]).flatten(1)

    gram, T = x0.new_zeros(channels * k, channels * k), _weight_gram(layer)
    for V in found.V:
        product = torch.from_numpy(T @ V.numpy()).reshape(channels, len(V), channels * k)
        gram += (V.T @ product).reshape(gram.shape)
    scale = _rms(z) / _rms(G) if G.any() else 0.0
    damping = (scale * found.sigmas).repeat(channels)
    gram.diagonal().add_(damping.square())
    b = z - layer.apply(x0)
    normal = Normal((gram + gram.T) / 2, apply, adjoint, damping)

    def change(dG: Tensor, z_change: Tensor) -> tuple[Tensor, Tensor]:
        moved = found.sensitivity(dG).transpose(1, 2).reshape(images)
        return moved.flatten(1), z_change - layer.apply(moved)

    rank, size = channels * found.rank, z.norm().item()
    return ReducedSystem(x0.flatten(1), spread, project, seen_by, normal, b, rank, size, change)


def _weight_gram(layer: Layer):
    """WᵀW with a row for each (channel, pixel, other channel), a column for each pixel of that; dense where small."""
    W = weight_matrix(layer)
    gram = (W.T @ W).tocoo()
    channels, pixels = layer.input_shape[0], math.prod(layer.input_shape[1:])
    row, column = (index.astype(np.int64) for index in gram.coords)
    places = (row * channels + column // pixels, column % pixels)
    sliced = sp.csr_array((gram.data, places), shape=(layer.unknowns * channels, pixels))
    return sliced.toarray() if layer.unknowns <= DENSE else sliced


def weights_first(layer: Layer, G: Tensor, dz: Tensor, z: Tensor, dim: WeakSubspace) -> ReducedSystem:
    """The shared gradient's equations for what W leaves open of each image or says dimly: x_b = W⁺ z_b + N u_b.

    Args:
        layer: Without groups, with no more outputs than inputs.
        G: (O, C, kh, kw).
        dz: (B, O, H′, W′).
        z: Pre-activations less the bias, (B, O, H′, W′).
        dim: The directions N.
    """
    count, channels, N = len(z), layer.input_shape[0], dim.basis
    x0, q = dim.factor.minimum_norm(z).flatten(1), N.shape[1]
    by_pixel = N.reshape(channels, -1, q)
    parts = [[gradient_matrix(layer, block, image) for image in dz] for block in blocks(layer)]

    def right_side(G: Tensor, x0: Tensor) -> Tensor:
        rest = []
        for block, matrices in zip(blocks(layer), parts, strict=True):
            known = [x.reshape(channels, -1)[:, block.pixels] @ M.T for M, x in zip(matrices, x0, strict=True)]
            rest.append((gradient_values(layer, block, G).T - torch.stack(known).sum(0)).flatten())
        return torch.cat(rest)

    A = torch.cat(
        [
            torch.cat([M @ by_pixel[:, block.pixels] for M in matrices], 2).flatten(0, 1)
            for block, matrices in zip(blocks(layer), parts, strict=True)
        ]
    )

    def spread(y: Tensor) -> Tensor:
        return torch.einsum("nq,bq...->bn...", N, y.reshape(count, q, *y.shape[1:]))

    def project(x: Tensor) -> Tensor:
        return (x @ N).flatten()

    def seen_by(image: int, L: Tensor) -> tuple[slice, Tensor]:
        return slice(image * q, (image + 1) * q), L @ N

    damping = (dim.sigmas * (_rms(G) / _rms(z) if z.any() else 0.0)).repeat(count)
    gram = _gram(A)
    gram.diagonal().add_(damping.square())
    normal = Normal(gram, lambda y: A @ y, lambda r: A.T @ r, damping)

    def change(dG: Tensor, z_change: Tensor) -> tuple[Tensor, Tensor]:
        moved = dim.factor.minimum_norm(z_change).flatten(1)
        return moved, right_side(dG, moved)

    b = right_side(G, x0)
    return ReducedSystem(x0, spread, project, seen_by, normal, b, None, G.norm().item(), change)


def _gram(A: Tensor) -> Tensor:
    """AᵀA at half the cost of a product."""
    upper = torch.from_numpy(scipy.linalg.blas.dsyrk(1.0, A.numpy().T)).triu()  # A's memory is Aᵀ in Fortran's order
    return upper + upper.triu(1).T


def _placed(values: Tensor, places: Tensor, pixels: int) -> Tensor:
    result = values.new_zeros(len(values), pixels, values.shape[2])
    result[:, places] = values
    return result


def _rms(values: Tensor) -> float:
    largest = values.abs().max()  # squares of the smallest gradients underflow
    return (largest * (values / largest).square().mean().sqrt()).item() if largest > 0 else 0.0
