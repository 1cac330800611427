"""What an analysis of an architecture returns: the ranks of its steps, and what they leak."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from rgap.results import display

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class LayerRank:
    """How far one step of a network determines its own input, before any attack.

    Counts are those of the whole batch. Steps that are not counted (activations, modules inside a residual block, what
    cannot be analysed) have no `ra_index`.

    Attributes:
        name: Path of the module in the model, or name of the traced function or block.
        kind: "convolution", "linear", "pooling", "residual block", "batch norm", "activation", "reshape" or
            "not analysed".
        unknowns: Entries of the step's input, |x|.
        weight_rows: Weight constraints, one an entry of the output, |z|.
        gradient_rows: Gradient constraints, one a weight, |W|; biases give none.
        ra_index: The counting index RA_i, > 0 where there are fewer equations than unknowns; None where not counted.
        rank_weights: Numerical rank of W, with the model's own weights.
        rank_gradients: Numerical rank of K = I ⊗ M, for a Gaussian ∂ℓ/∂z.
        rank: Numerical rank of [W; K].
        deficit: unknowns − rank, by number where it was computed, else by law.
        virtual_constraints: Equations that the step before can supply, |z_{i−1}| − rank W_{i−1}.
        condition: Largest over smallest singular value kept, of the system that decides the rank.
        law_weights: Rank of W by the rank laws, for generic weights.
        law_gradients: Rank of K by the rank laws.
        law_rank: Rank of [W; K] by the rank laws.
        note: Why a number is absent, where a step is counted, or what the ranks are based on.
        blind: Of a convolution, for one image: whether its own gradient, and its bias's or batch norm's, determine its
            input and δz by shapes, whatever stands above it. None for other steps.
        law_proved: Whether the laws are proved for this shape, not only tested (`rgap.equations.proofs`); None where
            one is missing.
    """

    name: str
    kind: str
    unknowns: int
    weight_rows: int
    gradient_rows: int = 0
    ra_index: int | None = None
    rank_weights: int | None = None
    rank_gradients: int | None = None
    rank: int | None = None
    deficit: int | None = None
    virtual_constraints: int | None = None
    condition: float | None = None
    law_weights: int | None = None
    law_gradients: int | None = None
    law_rank: int | None = None
    note: str = ""
    blind: bool | None = None
    law_proved: bool | None = None


@dataclass(frozen=True)
class RankAnalysis:
    """What an architecture leaks, predicted without data.

    Attributes:
        layers: Every step of the network, from the image to the output; none is left out.
        batch_size: Number of images behind one gradient.
        max_ra_index: Largest counting index, the network's index; None where no step is counted.
        copa_index: COPA's index Σ round(−deficit_i (L − i − 1) / (L − 1)) over the L − 1 convolutions, i from 0 at the
            image: 0 where none lacks rank, the more negative the more they lack. None where a rank is unknown.
        leaking: Names of the counted steps whose input is determined by the known part of their output.
        verdict: What the network gives away, in one sentence that begins with "leaks", "stops" or "unknown".
        separable: Images of a batch that the fully connected layers at the end usually tell apart; None for one image,
            and where those layers, or convolutions below them, are of a kind through which no batch is taken.
        entry: Of a network with branches or pooling, for one image: how far down its lowest blind layer leads, in words
            that begin with "leaks" or "unknown". Empty for others.
    """

    layers: tuple[LayerRank, ...]
    batch_size: int
    max_ra_index: int | None
    copa_index: int | None
    leaking: tuple[str, ...]
    verdict: str
    separable: int | None = None
    entry: str = ""

    def __repr__(self) -> str:
        """The verdict in one line."""
        return display.ranks_line(self)

    def _repr_html_(self) -> str:
        return display.ranks_page(self)

    def to_frame(self, counted: bool = False) -> pd.DataFrame:
        """The steps as a table, columns as in `LayerRank`; integers stay integers where some are missing.

        Args:
            counted: Whether only steps with a counting index are listed.
        """
        rows = [layer for layer in self.layers if layer.ra_index is not None or not counted]
        frame = display.reports_frame(rows, LayerRank)
        whole = [f.name for f in fields(LayerRank) if "int" in str(f.type)]
        return frame.astype(dict.fromkeys(whole, "Int64") | {"condition": "float64"})
