"""Malformed arguments of every public function: each is taken, or refused by this library with the argument's name."""

import re
import tempfile
import traceback
import warnings
from pathlib import Path

import pandas as pd
import pytest
import torch
from cases import rand, sequential
from torch import nn

import rgap
from rgap import artifact, baselines, client, data, metrics, models
from rgap.client.files import load_weights
from rgap.client.training import training
from rgap.ranks.audit import audit

SHAPE = (1, 4, 4)
HUGE = 10**12


def network():
    return sequential(nn.Conv2d(1, 4, 2), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(36, 1))


def classifier():
    return sequential(nn.Flatten(), nn.Linear(16, 12), nn.LeakyReLU(0.2), nn.Linear(12, 3))


def with_nan():
    model = network()
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = torch.nan
    return model


def lazy():
    return nn.Sequential(nn.LazyConv2d(4, 2), nn.LeakyReLU(0.2), nn.Flatten(), nn.LazyLinear(1))


def zero_width():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 0), nn.LeakyReLU(0.2), nn.Linear(0, 1))


def odd_tensors(shape):
    """Tensors of a shape that are no plain floating-point tensors with values on this machine."""
    x = torch.rand(shape)
    odd = {
        "sparse": x.to_sparse(), "meta": x.to("meta"), "complex": x.to(torch.complex64), "bool": x > 0.5,
        "int": (x > 0.5).long(), "float8": x.to(torch.float8_e4m3fn),
        "quantised": torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        "nested": torch.nested.nested_tensor([torch.rand(2), torch.rand(3)]), "nan": x * torch.nan,
        "empty": torch.zeros(0), "scalar": torch.tensor(1.0), "None": None, "string": "image", "dict": {"a": 1},
        "object": object(), "ragged": [[1.0], [1.0, 2.0]], "strings": ["a", "b"],
    }  # fmt: skip
    if torch.backends.mkldnn.is_available():
        odd["mkldnn"] = x.to_mkldnn()
    return odd


def odd_gradients(model):
    """Lists of gradients whose first tensor is odd, and what is no list of gradients at all."""
    first, *others = [rand(*p.shape, seed=i) - 0.5 for i, p in enumerate(model.parameters())]
    odd = {f"one {name}": [value, *others] for name, value in odd_tensors(first.shape).items()}
    whole = {
        "None": None, "int": 3, "string": "gradients", "bytes": b"abc", "empty": [], "empty dict": {},
        "nan": torch.nan,
    }  # fmt: skip
    whole |= {"set": {first, *others}, "tensor": first, "nested list": [[first, *others]], "object": object()}
    whole |= {"too few": [first], "too many": [first, *others, first], "wrong names": {"a": first, "b": others[0]}}
    whole |= {"nan keys": dict.fromkeys([float("nan"), 2.5], first)}
    return odd | whole


NUMBERS = {
    "string": "many", "None": None, "complex": 1 + 2j, "list": [1], "dict": {}, "nan": torch.nan, "negative": -1,
    "inf": torch.inf, "huge": 1e300, "tensor": torch.rand(2), "object": object(), "bool": True,
}  # fmt: skip
COUNTS = NUMBERS | {"float": 1.5, "zero": 0, "meta": torch.ones((), device="meta")}
LABELS = {
    "strings": ["cat"], "string": "cat", "None inside": [None], "complex": [1j], "dict": {0: 1}, "huge": [HUGE],
    "beyond int64": [2**70], "negative": [-1], "float": [0.5], "bool": torch.tensor([True]), "nested": [[1]],
    "int32": torch.tensor([1], dtype=torch.int32), "empty": [], "object": object(), "number": 1, "ragged": [[1], 2],
    "sparse": torch.tensor([1]).to_sparse(), "meta": torch.ones(1, dtype=torch.int64, device="meta"), "set": {1},
}  # fmt: skip
DEVICES = {
    "unknown": "abacus", "absent": "cuda:7", "list": ["cpu"], "number": 10**6, "float": 1.5, "meta": "meta",
    "mps": "mps", "dict": {}, "empty": "",
}  # fmt: skip
DTYPES = {
    "string": "float64", "None": None, "int": torch.int64, "half": torch.float16, "complex": torch.complex64,
    "type": float, "float8": torch.float8_e4m3fn, "list": [torch.float64],
}  # fmt: skip
SHAPES = {
    "huge": (1, 10**6, 10**6), "negative": (1, -4, 4), "zero": (1, 0, 4), "float": (1, 4.0, 4), "string": "1,4,4",
    "int": 16, "None inside": (1, None, 4), "bool": (True, 4, 4), "nested": ((1, 4), 4), "empty": (), "set": {1, 4},
    "five": (1, 1, 1, 4, 4), "dict": {1: 4}, "tensor": torch.tensor([1.5]), "beyond int64": (1, 2**70, 1),
}  # fmt: skip
RANGES = {
    "strings": ("a", "b"), "string": "01", "None": None, "inside": (None, 1), "complex": (0j, 1j), "one": (1.0,),
    "reversed": (1, 0), "nan": (0, torch.nan), "equal": (1, 1), "number": 1.0, "three": (0, 1, 2), "dict": {},
    "huge": (0, 1e300), "lists": ([0], [1]), "set": {0.0, 1.0}, "tensors": torch.rand(2, 2),
}  # fmt: skip
MODELS = {
    "string": "cnn6", "None": None, "class": nn.Linear, "list": [nn.Linear(16, 1)], "function": torch.relu,
    "nan": with_nan(), "meta": network().to("meta"), "lazy": lazy(), "zero width": zero_width(),
    "no parameters": nn.Sequential(nn.Flatten(), nn.ReLU()), "state": network().state_dict(), "tensor": torch.rand(3),
    "half a linear": nn.Flatten(), "none returned": nn.Identity(),
}  # fmt: skip
NAMES = {"None": None, "int": 3, "unknown": "hinge", "list": ["logistic"], "object": object(), "bytes": b"mse", "": ""}

COMMON = "model gradients image_shape loss batch_size labels pixel_range noise_std seed device"
KINDS = {
    "model": MODELS, "image_shape": SHAPES | {"other": (3, 5, 5), "flat": (7,)},
    "gradients": odd_gradients(network()), "loss": NAMES, "labels": LABELS, "pixel_range": RANGES, "device": DEVICES,
    "dtype": DTYPES, **dict.fromkeys(["seed", "batch_size", "limit", "steps", "restarts", "count"], COUNTS),
    **dict.fromkeys(["rcond", "noise_std"], NUMBERS), "images": odd_tensors((1, *SHAPE)),
}  # fmt: skip


def _cases():
    """(function's name, function, argument, kind of its value, arguments) of every case."""
    model = network()
    x, y = rand(1, *SHAPE), torch.tensor([1])
    g = client.client_gradients(model, x, y)
    attack = {"model": model, "gradients": g, "image_shape": SHAPE}
    optimiser = attack | {"steps": 2}
    pictures = rand(2, 1, 12, 12)
    odd = odd_tensors(pictures.shape)
    private = {"gradients": g, "clip_norm": 1.0, "noise_multiplier": 0.1}
    trained = {"model": model, "images": x, "labels": y}
    few, classes = {"gradients": g}, {"width": COUNTS, "classes": COUNTS, "seed": COUNTS}
    calls = [
        (rgap.reconstruct, attack, f"{COMMON} rcond"),
        (rgap.prepare, {"model": model, "image_shape": SHAPE}, "model image_shape"),
        (rgap.rank_analysis, {"model": model, "image_shape": SHAPE}, "model image_shape batch_size dtype limit seed"),
        (rgap.largest_batch, {"model": classifier(), "image_shape": SHAPE}, "model image_shape loss"),
        (audit, {"model": model, "image_shape": SHAPE}, "model image_shape batch_size limit"),
        (rgap.client_gradients, trained, "model images labels loss"),
        (baselines.dlg, optimiser, f"{COMMON} dtype steps restarts"),
        (baselines.inverting_gradients, optimiser, f"{COMMON} dtype steps restarts"),
        (baselines.hybrid, optimiser, f"{COMMON} rcond dtype steps".replace("batch_size ", "")),
        (client.gaussian_noise, few | {"std": 0.1}, "gradients seed"),
        (client.clip_and_noise, private, "gradients seed"),
        (client.prune, few | {"share": 0.5}, "gradients"),
        (client.quantise, few | {"dtype": "int8"}, "gradients dtype"),
        (
            client.gradients_of,
            trained | {"parameters": dict(model.named_parameters()), "loss": "logistic"},
            "model images labels loss",
        ),
        (data.load_images, {"image_shape": (1, 25, 25)}, "count image_shape seed"),
    ]
    extra = [
        (rgap.reconstruct, attack, {"gradient_scale": NUMBERS, "label_smoothing": NUMBERS}),
        (rgap.client_gradients, trained, {"label_smoothing": NUMBERS}),
        (baselines.inverting_gradients, optimiser, {"tv_weight": NUMBERS, "rate": NUMBERS}),
        (baselines.hybrid, optimiser, {"tv_weight": NUMBERS}),
        (client.gaussian_noise, few | {"std": 0.1}, {"std": NUMBERS}),
        (client.clip_and_noise, private, {"clip_norm": NUMBERS, "noise_multiplier": NUMBERS}),
        (client.prune, few | {"share": 0.5}, {"share": NUMBERS}),
        (
            client.epsilon,
            {"noise_multiplier": 1.0},
            {"noise_multiplier": NUMBERS, "sample_rate": NUMBERS, "steps": COUNTS, "delta": NUMBERS},
        ),
        (
            client.loss_value,
            {"loss": "logistic", "outputs": torch.ones(1, 1), "labels": y},
            {"loss": NAMES, "outputs": odd_tensors((1, 1)), "labels": LABELS},
        ),
        (client.check_loss, {}, {"loss": NAMES}),
        (client.outputs_fit, {"loss": "mse", "outputs": 1}, {"loss": NAMES, "outputs": COUNTS}),
        (
            client.gradients_from_update,
            {"before": model, "after": {n: p - 0.1 for n, p in model.named_parameters()}, "learning_rate": 0.1},
            {
                "before": odd_gradients(model),
                "after": odd_gradients(model),
                "learning_rate": NUMBERS,
                "steps": COUNTS,
                "momentum": NUMBERS,
                "weight_decay": NUMBERS,
            },
        ),
        *(
            (f, {"x": pictures, "y": pictures}, {"x": odd, "y": odd})
            for f in (metrics.mse, metrics.psnr_db, metrics.ssim)
        ),
        (metrics.match, {"images": pictures, "references": pictures}, {"images": odd, "references": odd}),
        (
            data.load_images,
            {"image_shape": (1, 25, 25), "count": 1},
            {"source": NAMES, "index": COUNTS | LABELS, "split": NAMES, "classes": COUNTS},
        ),
        (models.cnn6, {}, classes),
        (models.cnn6_batch, {}, classes | {"hidden": SHAPES | {"number": 3}}),
        (models.fcn3, {}, {"widths": SHAPES, "seed": COUNTS}),
        (
            models.lenet,
            {},
            {
                "widths": SHAPES,
                "strides": SHAPES,
                "classes": COUNTS,
                "seed": COUNTS,
                "uniform": NUMBERS,
                "activation": NAMES | {"module": nn.ReLU()},
            },
        ),
        (models.resnet18, {}, {"cut": NAMES | {"strings": ["layer9"]}, "seed": COUNTS, "classes": COUNTS}),
        (models.load_model, {"name": "fcn3"}, {"name": NAMES, "seed": COUNTS}),
        (
            client.save_gradients,
            {"path": Path(tempfile.gettempdir()) / "malformed.pt", "gradients": g},
            {"path": NAMES | {"folder": "/tmp"}, "gradients": odd_gradients(model)},
        ),
        (client.load_gradients, {}, {"path": NAMES | {"folder": "/tmp", "absent": "/tmp/absent.pt"}}),
        (load_weights, {"model": model}, {"path": NAMES | {"absent": "/tmp/absent.pt"}}),
        (artifact.save_table, {"frame": pd.DataFrame(), "name": "01_x"}, {"frame": NUMBERS, "name": NAMES}),
        (artifact.save_figure, {"name": "01_x"}, {"fig": NUMBERS}),
        (artifact.check_claim, {"measured": 1.0}, {"claim_id": NAMES}),
        (
            lambda **options: next(training(**options)),
            trained,
            {
                "epochs": COUNTS,
                "seed": COUNTS,
                "optimiser": NAMES,
                "learning_rate": NUMBERS,
                "batch_size": COUNTS,
                "labels": LABELS,
                "images": odd_tensors(x.shape),
                "loss": NAMES,
            },
        ),
    ]
    calls = [(function, good, {name: KINDS[name] for name in names.split()}) for function, good, names in calls]
    for function, good, tables in calls + extra:
        for name, values in tables.items():
            for kind, value in values.items():
                yield f"{function.__module__}.{function.__name__}", function, name, kind, good | {name: value}


CASES = list(_cases())


def foreign(error, name):
    """What makes an error not this library's own; empty where it is."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    if not isinstance(error, ValueError | TypeError | FileNotFoundError):
        return f"{type(error).__name__}"
    if "/rgap/" not in frame.filename or not frame.line.lstrip().startswith(("raise", ")")):
        return f"raised by {Path(frame.filename).name}:{frame.lineno}"
    names = {
        "claim_id": "claim", "outputs": "labels", "name": "model", "path": "file", "x": "shapes", "y": "shapes",
        "model": "network|parameter|layer|gradient of",
    }  # fmt: skip
    if not re.search(f"{name}|{name.rstrip('s')}|{names.get(name, name)}", str(error)):
        return "does not name the argument"
    return ""


FUNCTIONS = sorted({(name, argument) for name, _, argument, _, _ in CASES})


@pytest.mark.parametrize(("function", "argument"), FUNCTIONS)
def test_malformed_arguments_are_taken_or_refused_by_name(function, argument, tmp_path, monkeypatch):
    monkeypatch.setenv("RGAP_FIGURES", str(tmp_path))
    wrong = []
    for name, call, given, kind, arguments in CASES:
        if (name, given) == (function, argument):
            try:
                call(**arguments)
            except Exception as error:
                if why := foreign(error, argument):
                    wrong.append(f"{kind}: {type(error).__name__}: {error} ({why})")
    assert wrong == []
