"""What attacks and audits cost in CPU seconds, case by case: the benchmark of `rgap bench`."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from rgap import data, models
from rgap.attack.reconstruct import reconstruct
from rgap.client import client_gradients
from rgap.equations.gradient import blocks
from rgap.experiments.common import one_thread, progress
from rgap.experiments.cost import expanding_for
from rgap.metrics import match, psnr_db
from rgap.network.chain import prepare
from rgap.network.layer import Chain
from rgap.ranks.audit import audit
from rgap.results import Reconstruction

PASS, FIRST, PREPARED, AUDIT = "forward and backward", "R-GAP, first attack", "R-GAP, prepared", "rank audit"
"""What is timed; the first three are methods of figures/04_cost_times.csv, too."""

PASSES_PER_RUN = 10  # one pass takes about a millisecond, so that several are timed as one

MAX_REPEATED_SECONDS = 10.0  # CPU seconds of a case from which one round is enough


class BenchCase(NamedTuple):
    """A network, and how many images share its gradient; 0 for an audit, which needs none."""

    make: Callable[[], nn.Module]
    shape: tuple[int, int, int]
    batch: int = 1
    loss: str = "logistic"


def _torchvision(name: str) -> nn.Module:
    return models.load_model(f"torchvision.models:{name}", 0)[0]


COLOUR, GREY = (3, 32, 32), (1, 28, 28)
AUDITED = ("resnet18", "resnet152", "vgg16", "alexnet", "mobilenet_v2")

CASES = {
    "cnn6": BenchCase(models.cnn6, COLOUR),
    "cnn6_d": BenchCase(models.cnn6_d, COLOUR),
    "fcn3": BenchCase(models.fcn3, GREY),
    "fcn3-B5": BenchCase(models.fcn3, GREY, 5),
    "fcn3-B50": BenchCase(models.fcn3, GREY, 50),
    "cnn6_batch-B2": BenchCase(models.cnn6_batch, COLOUR, 2, "cross_entropy"),
    "cnn6_batch-B4": BenchCase(models.cnn6_batch, COLOUR, 4, "cross_entropy"),
    "cnn6_batch-128-64-B6": BenchCase(partial(models.cnn6_batch, hidden=(128, 64)), COLOUR, 6, "cross_entropy"),
    "expanding-64": BenchCase(partial(expanding_for, 64), (3, 64, 64)),
    "expanding-224": BenchCase(partial(expanding_for, 224), (3, 224, 224)),
} | {f"audit-{name}": BenchCase(partial(_torchvision, name), (3, 224, 224), 0) for name in AUDITED}

LARGE_CASES = ("expanding-224",)  # cases that take minutes; they run only where they are named

NOTEBOOK_CASES = {("cnn6", 32): "cnn6", ("fcn3", 1000): "fcn3", ("expanding", 64): "expanding-64",
                  ("expanding", 224): "expanding-224"}  # fmt: skip
"""Network and side or width in figures/04_cost_times.csv -> case."""


def bench(names: Sequence[str] = (), rounds: int = 5) -> pd.DataFrame:
    """CPU seconds of cases, keys of `CASES` (by default all but `LARGE_CASES`), in one process with one thread.

    Every round runs each case once, so that what else the machine does meanwhile falls on all alike; a case that takes
    more than `MAX_REPEATED_SECONDS` runs in the first alone. Attacks get float64 gradients of embedded images. Returns
    a row for each case and method (forward and backward of the network in float64; the first attack, with the network's
    preparation; an attack on a prepared network; a rank audit): runs, median_s and least_s (CPU seconds), ratio (of the
    medians, to forward and backward; NaN for audits), peak_mib (most memory above what the process held before the
    call; NaN where the system does not tell), verdict, psnr_db (least over the images), floor_gflop (of a prepared
    attack, by `floor_gflop`), floor_share (of median_s that the machine's own matrix products, of `gemm_gflops` a
    second just before, would take for them), torch. Raises ValueError if a name is unknown, or there is no round.
    """
    if unknown := [name for name in names if name not in CASES]:
        raise ValueError(f"no case {', '.join(map(repr, unknown))}; there are {', '.join(map(repr, CASES))}")
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; it must be at least 1")
    chosen = names or [name for name in CASES if name not in LARGE_CASES]
    with one_thread():
        rate = gemm_gflops()
        runs = {name: _run_of(CASES[name]) for name in chosen}
        turns = [(name, run) for _ in range(rounds) for name, run in runs.items()]
        rows, slow = [], set()
        for name, run in progress(turns, "runs"):
            found = [] if name in slow else [{"case": name} | row for row in run()]
            slow |= {name} if sum(row["seconds"] for row in found) > MAX_REPEATED_SECONDS else set()
            rows += found
    groups = pd.DataFrame(rows).groupby(["case", "method"], sort=False)
    table = groups.agg(runs=("seconds", "size"), median_s=("seconds", "median"), least_s=("seconds", "min"),
                       peak_mib=("peak_mib", "max"), verdict=("verdict", "first"), psnr_db=("psnr_db", "min"),
                       floor_gflop=("floor_gflop", "first")).reset_index()  # fmt: skip
    passes = table[table["method"] == PASS].set_index("case")["median_s"]
    table.insert(5, "ratio", table["median_s"] / table["case"].map(passes))
    share = table["floor_gflop"] / rate / table["median_s"]
    return table.assign(floor_share=share, gemm_gflops=rate, torch=torch.__version__)


def gemm_gflops(side: int = 1000) -> float:
    """Billions of multiplications and additions a second in float64 products of square matrices, best of five."""
    A = torch.ones(side, side, dtype=torch.float64)
    return 2e-9 * side**3 / min(measured(torch.mm, A, A)[1]["seconds"] for _ in range(5))


def floor_gflop(chain: Chain, layers: pd.DataFrame, images: int) -> float:
    """Billions of multiplications and additions that the dense systems of an attack take, each made once.

    `layers` is a result's `to_frame()`. A layer's gradient equations take the Gram matrices and Cholesky factors of
    M's blocks, W's equations the factor of what they leave open; virtual constraints once their product with the open
    directions, its Gram matrix and factor. What W alone determines, and products with convolutions, count nothing.
    """
    total, rows = 0.0, {row.name: row for row in layers.fillna(0).itertuples()}
    for layer in chain.layers:
        row = rows.get(layer.name)
        if row is None or not row.rank_gradients or layer.is_dense:
            continue
        for block in blocks(layer):
            columns = images * len(block.pixels)
            total += len(layer.weight) * len(block.taps) * columns**2 + columns**3 / 3
        total += (row.unknowns - row.rank_gradients) ** 3 / 3
        if row.virtual_constraints:
            total += row.virtual_constraints * row.deficit * (2 * row.unknowns + row.deficit) + row.deficit**3 / 3
    return total / 1e9


def _run_of(case: BenchCase) -> Callable[[], list[dict]]:
    """What measures the case once: a row for each method."""
    if not case.batch:
        return partial(_audited, case.make(), case.shape)
    classes = 2 if case.loss == "logistic" else None
    images, labels = data.load_images("embedded", case.batch, case.shape, classes=classes)
    model = case.make().double()
    return partial(_attacked, model, images.double(), labels, case.loss)


def _audited(model: nn.Module, shape: tuple[int, int, int]) -> list[dict]:
    _forget_laws()
    result, spent = measured(audit, model, shape)
    return [{"method": AUDIT, "verdict": result.exposure.outcome, "psnr_db": np.nan, "floor_gflop": np.nan} | spent]


def _forget_laws() -> None:
    """Empties the caches of rank laws: an audit as a rule meets shapes that its process has not seen."""
    rooms = [module for name, module in sys.modules.items() if name.startswith("rgap.equations.")]
    for function in (value for room in rooms for value in vars(room).values()):
        if hasattr(function, "cache_clear"):
            function.cache_clear()


def _attacked(model: nn.Module, images: Tensor, labels: Tensor, loss: str) -> list[dict]:
    """Passes, a first attack, and one more on the network that the first has prepared, lazily made factors included."""
    shape = tuple(images.shape[1:])

    def passes() -> list[Tensor]:
        return [client_gradients(model, images, labels, loss) for _ in range(PASSES_PER_RUN)][-1]

    def attack(chain: Chain | None = None) -> tuple[Chain, Reconstruction]:
        chain = chain or prepare(model, shape)
        return chain, reconstruct(chain, gradients, loss=loss, batch_size=len(images), gradient_scale=1.0)

    gradients, spent = measured(passes)
    rows = [{"method": PASS} | spent | {"seconds": spent["seconds"] / PASSES_PER_RUN}]
    chain = None
    for method in (FIRST, PREPARED):
        (chain, result), spent = measured(attack, chain)
        truth = images[match(result.images, images)]
        quality = min(psnr_db(result.images, truth).tolist(), default=np.nan)
        floor = floor_gflop(chain, result.to_frame(), len(images)) if method == PREPARED else np.nan
        rows.append({"method": method, "verdict": result.verdict, "psnr_db": quality, "floor_gflop": floor} | spent)
    return rows


def measured(function: Callable, *arguments) -> tuple[Any, dict[str, float]]:
    """What a call returns, and its CPU `seconds` and `peak_mib`, the most memory above what was held before."""
    gc.collect()
    before = _restart_peak()
    start = time.process_time()
    result = function(*arguments)
    return result, {"seconds": time.process_time() - start, "peak_mib": _resident("VmHWM") - before}


def _restart_peak() -> float:
    """Gives free memory back and restarts the system's record of the most held, in MiB; NaN where it has none."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError, TypeError):
        return np.nan
    return _resident("VmRSS")


def _resident(key: str) -> float:
    """An entry of the system's record of this process's memory, MiB; NaN where there is none."""
    status = Path("/proc/self/status")
    found = re.search(rf"{key}:\s*(\d+) kB", status.read_text()) if status.is_file() else None
    return int(found[1]) / 1024 if found else np.nan


def earlier_times(path: Path) -> pd.DataFrame:
    """The seconds of another run: case, method, before_s.

    The path is its CSV, or figures/04_cost_times.csv, whose seconds are wall time and the least of few runs; another
    file raises ValueError.
    """
    try:
        earlier = pd.read_csv(path)
    except ValueError as error:  # pandas' errors of an empty file, of a malformed one, of bytes that are no text
        raise ValueError(f"{path} is no table ({error}); give one that `rgap bench` wrote") from error
    if {"network", "value", "method", "seconds"} <= set(earlier):
        keys = zip(earlier["network"], earlier["value"], strict=True)
        earlier = earlier.assign(case=[NOTEBOOK_CASES.get(key) for key in keys], least_s=earlier["seconds"])
    if missing := {"case", "method", "least_s"} - set(earlier):
        raise ValueError(f"{path} has no column {', '.join(sorted(missing))}; give a table that `rgap bench` wrote")
    return earlier.rename(columns={"least_s": "before_s"})[["case", "method", "before_s"]]


def compared(table: pd.DataFrame, before: pd.DataFrame) -> pd.DataFrame:
    """The cases of a table that an earlier one has, too: case, method, least_s, before_s and speedup (before over now).

    `before` is what `earlier_times` reads.
    """
    both = table[["case", "method", "least_s"]].merge(before, on=["case", "method"])
    return both.assign(speedup=both["before_s"] / both["least_s"])
