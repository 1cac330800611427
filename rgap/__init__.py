"""rgap: what a shared gradient reveals, computed in closed form.

R-GAP (Zhu & Blaschko, ICLR 2021) computes a client's image back from its gradient, layer by layer, by solving linear
systems. The letters, as in the paper and in every module here:

    x_i    input of layer i; x_1 is the image          z_i    pre-activation, W_i x_i + b_i
    W_i    weight of layer i, and its matrix           G_i    ∂ℓ/∂W_i, what the client shares
    δz_i   ∂ℓ/∂z_i (`dz` in the code)                  δx_i   ∂ℓ/∂x_i = W_iᵀ δz_i
    K_i    gradient constraints, K_i x_i = vec(G_i)    M      one channel's part of them, K = I ⊗ M
    μ      margin y f(x), with y = 2·label − 1         c      ⟨G_d, W_d⟩ of the last layer, −μ / (1 + e^μ)
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rgap import artifact, baselines, client, data, metrics, models
    from rgap.attack.local_steps import reconstruct_update
    from rgap.attack.reconstruct import reconstruct
    from rgap.client import client_gradients
    from rgap.network.chain import Chain, Layer, prepare
    from rgap.ranks.analysis import rank_analysis
    from rgap.ranks.largest_batch import LargestBatch, largest_batch
    from rgap.results import (
        Candidate,
        GradientMismatchError,
        LayerRank,
        LayerReport,
        RankAnalysis,
        Reconstruction,
        UnsupportedLayerError,
    )

__all__ = [
    "Candidate", "Chain", "GradientMismatchError", "LargestBatch", "Layer", "LayerRank", "LayerReport",
    "RankAnalysis", "Reconstruction", "UnsupportedLayerError", "__version__", "artifact", "baselines", "client",
    "client_gradients", "data", "largest_batch", "metrics", "models", "prepare", "rank_analysis", "reconstruct",
    "reconstruct_update",
]  # fmt: skip

_MODULES = {
    "rgap.attack.local_steps": ("reconstruct_update",),
    "rgap.attack.reconstruct": ("reconstruct",),
    "rgap.network.chain": ("Chain", "Layer", "prepare"),
    "rgap.client": ("client_gradients",),
    "rgap.ranks.analysis": ("rank_analysis",),
    "rgap.ranks.largest_batch": ("LargestBatch", "largest_batch"),
    "rgap.results": (
        "Candidate", "GradientMismatchError", "LayerRank", "LayerReport", "RankAnalysis", "Reconstruction",
        "UnsupportedLayerError",
    ),
}  # fmt: skip
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def _version() -> str:
    """The version that was installed, or of a checkout that was not, the one in its pyproject.toml."""
    import importlib.metadata
    import tomllib
    from pathlib import Path

    project = Path(__file__).resolve().parents[1] / "pyproject.toml"
    if project.is_file():
        return tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"]
    return importlib.metadata.version("rgap")


def __getattr__(name: str):
    """Resolves names on first use: `python -m rgap` often needs none of them, and torch takes seconds to import."""
    if name == "__version__":
        return _version()
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in __all__:
        return importlib.import_module(f"rgap.{name}")
    raise AttributeError(f"module 'rgap' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
