"""What does a network give away? `python -m rgap.ranks.audit --model torchvision.models:resnet18 --shape 3,224,224`.

Exit status, so that it can stand in a pipeline: 0 if the linear equations stop before the image, 1 if it leaks, 2 if an
argument is wrong, 3 if neither is shown. The analysis needs no data; what it says is no guarantee.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import pandas as pd
from torch import nn

from rgap import artifact, models
from rgap.experiments.command_line import file_stem, load_model, load_model_for, one_line
from rgap.ranks.advice import Change, advise
from rgap.ranks.analysis import rank_analysis
from rgap.ranks.exposure import Exposure, exposure
from rgap.ranks.numbers import UNKNOWNS
from rgap.results import LayerRank, RankAnalysis

__all__ = ["Audit", "audit", "load_model"]

STATUS = {"stops": 0, "leaks": 1, "unknown": 3}
"""Outcome -> exit status; 2 is for wrong arguments."""

COLUMNS = ["name", "kind", "unknowns", "weight_rows", "gradient_rows", "ra_index", "deficit", "supply", "status"]


@dataclass(frozen=True)
class Audit:
    """A rank analysis with what it means and what would help.

    Attributes:
        image_shape: Shape of one image, without the batch dimension.
        analysis: The rank analysis.
        exposure: What follows from it for the whole network.
        advice: Changes that would close the leak, computed on changed copies.
    """

    image_shape: tuple[int, ...]
    analysis: RankAnalysis
    exposure: Exposure
    advice: tuple[Change, ...]

    def to_frame(self) -> pd.DataFrame:
        """The counted steps, columns as in `LayerRank`, and `supply` and `status` as in `StepExposure`."""
        steps = self.exposure.to_frame()
        return self.analysis.to_frame(counted=True).assign(supply=steps["supply"], status=steps["status"])

    def table(self) -> pd.DataFrame:
        """The columns of `to_frame` that decide: counts, counting index, deficit, supply and status."""
        return self.to_frame()[COLUMNS]

    @property
    def sentences(self) -> tuple[str, ...]:
        """The outcome and the advice in words."""
        if not self.advice:
            return (self.exposure.sentence,)
        return (
            self.exposure.sentence,
            "the analysis would say that it stops after any of:",
            *(f"  {change.sentence}" for change in self.advice),
        )

    def to_dict(self) -> dict:
        """Everything as plain numbers, texts, lists and dictionaries, None where something is not known."""
        judged = iter(self.exposure.steps)  # by order: a name may come twice where a module does
        layers = []
        for layer in self.analysis.layers:
            step = None if layer.ra_index is None else next(judged)
            more = {"supply": step and step.supply, "status": step and step.status}
            layers.append({f.name: _plain(getattr(layer, f.name)) for f in fields(LayerRank)} | more)
        return {
            "image_shape": list(self.image_shape),
            "batch_size": self.analysis.batch_size,
            "outcome": self.exposure.outcome,
            "sentence": self.exposure.sentence,
            "max_ra_index": self.analysis.max_ra_index,
            "copa_index": self.analysis.copa_index,
            "layers": layers,
            "advice": [asdict(change) | {"sentence": change.sentence} for change in self.advice],
        }


def audit(model: nn.Module, image_shape: tuple[int, ...], batch_size: int = 1, *, limit: int = UNKNOWNS) -> Audit:
    """Analyses a network, judges it, and looks for changes that would close the leak.

    Args:
        model: Any module that `torch.fx` can trace.
        image_shape: Shape of one image, without the batch dimension.
        batch_size: Images behind one gradient.
        limit: Most unknowns of a layer for which ranks are computed by number too; 0 for laws alone, which are quick.

    Returns:
        An `Audit`.

    Raises:
        TypeError, UnsupportedLayerError, ValueError: As `rgap.rank_analysis` does.
    """
    analysis = rank_analysis(model, image_shape, batch_size, limit=limit)
    changes = tuple(advise(model, image_shape, batch_size))
    return Audit(tuple(image_shape), analysis, exposure(analysis), changes)


def main(arguments: list[str] | None = None) -> int:
    """Prints the audit and leaves it as JSON in build/audit/.

    Args:
        arguments: The command line; `--help` explains it.

    Returns:
        0 where the equations stop, 1 where the image leaks, 3 where neither is shown; or 2 after one line that says
        what is wrong with the arguments.
    """
    options = _parser().parse_args(arguments)
    try:
        model, shape = load_model_for(options.model, options.shape)
        result = audit(model, shape, options.batch)
    except (TypeError, ValueError) as error:
        print(f"audit: {one_line(error)}", file=sys.stderr)
        return 2
    text = json.dumps({"model": options.model} | result.to_dict(), indent=2, allow_nan=False) + "\n"
    if options.json == "-":
        sys.stdout.write(text)
    else:
        path = Path(options.json or _default_path(options.model))
        artifact.write_atomically(path, lambda file: file.write(text.encode()))
        with pd.option_context("display.width", None, "display.max_rows", None):
            print(result.table().to_string(index=False, na_rep="?"))
        print("", *result.sentences, f"written {path}", sep="\n")
    return STATUS[result.exposure.outcome]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rgap.ranks.audit", description=__doc__)
    parser.add_argument("--model", default="cnn6", help=f"{', '.join(models.ANALYSIS_SHAPES)}, or module:function")
    parser.add_argument("--shape", help="shape of one image, e.g. 3,224,224; known for the models of this package")
    parser.add_argument("--batch", type=int, default=1, help="images behind one gradient")
    parser.add_argument("--json", help="file for the JSON, or - for the JSON alone on standard output")
    return parser


def _default_path(model: str) -> Path:
    return artifact.ROOT / "build" / "audit" / f"{file_stem(model)}.json"


def _plain(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
