import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rgap


def row(analysis, name):
    return next(layer for layer in analysis.layers if layer.name == name)


class Everything(nn.Module):
    """Every kind of step, some that cannot be analysed among them."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.dilated = nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        self.mirrored = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.shared = nn.Conv2d(8, 8, 1)
        self.up = nn.ConvTranspose2d(8, 8, 2, 2)
        self.norm = nn.LayerNorm(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x):
        x = torch.tanh(self.depthwise(self.stem(x)))
        x = x + self.mirrored(self.dilated(x))
        x = self.shared(F.relu(self.shared(x)))
        x = torch.cat([x, self.up(F.avg_pool2d(x, 2))], 1).mean([2, 3])
        x = self.norm(x[:, :8] * self.scale)
        return self.head(self.drop(x.view(x.size(0), -1)))


def test_every_step_is_listed_and_what_cannot_be_analysed_says_why():
    analysis = rgap.rank_analysis(Everything(), (3, 8, 8))
    kinds = {layer.name: layer.kind for layer in analysis.layers}
    notes = {layer.name: layer.note for layer in analysis.layers}
    assert {
        "stem.0": "convolution",
        "stem.1": "batch norm",
        "stem.2": "activation",
        "stem.3": "pooling",
    }.items() <= kinds.items()
    assert {
        "depthwise": "convolution",
        "tanh": "activation",
        "drop": "reshape",
        "view": "reshape",
        "mean": "pooling",
    }.items() <= kinds.items()
    assert {
        "up": "not analysed",
        "norm": "not analysed",
        "cat": "not analysed",
        "head": "linear",
    }.items() <= kinds.items()
    assert "invertible" == notes["tanh"] and notes["stem.2"].startswith("not invertible")
    assert "ConvTranspose2d is not a layer kind known here" in notes["up"]
    assert "joins 2 paths" in notes["cat"] and "training mode" in notes["stem.1"] and "eval mode" in notes["drop"]
    assert "padding mode 'reflect'" in notes["mirrored"] and row(analysis, "mirrored").law_rank is None
    assert "inside add" in notes["mirrored"] and row(analysis, "add").kind == "residual block"
    uses = [layer for layer in analysis.layers if layer.name == "shared"]
    assert [layer.law_rank is None for layer in uses] == [True, True] and "used 2 times" in uses[1].note
    assert row(analysis, "stem.3").deficit == 8 * 64 - 8 * 16 and "lower bound" in notes["stem.3"]
    assert row(analysis, "mean").rank == 16 and row(analysis, "depthwise").rank_weights == 128
    assert row(analysis, "dilated").rank == row(analysis, "dilated").law_rank == 128
    assert all(name in analysis.verdict for name in ("norm", "cat", "not analysed"))


class Block(nn.Module):
    def __init__(self, channels, other):
        super().__init__()
        self.first, self.second = nn.Conv2d(4, channels, 3, padding=1), nn.Conv2d(channels, 24, 3, 2, 1)
        self.act, self.other = nn.LeakyReLU(0.2), other

    def forward(self, x):
        return self.other(x) + self.second(self.act(self.first(x)))


@pytest.mark.parametrize(("channels", "deficit"), [(12, 0), (2, None)])
def test_a_residual_block_is_one_step_through_its_last_convolution(channels, deficit):
    model = nn.Sequential(Block(channels, nn.Conv2d(4, 24, 1, 2)), nn.Flatten(), nn.Linear(384, 1))
    analysis = rgap.rank_analysis(model, (4, 8, 8))
    block = row(analysis, "0")
    assert block.kind == "residual block"
    assert (block.unknowns, block.weight_rows) == (256, 384)
    assert block.gradient_rows == 24 * channels * 9 + 24 * 4
    assert block.ra_index == 256 - 384 - block.gradient_rows and block.deficit == deficit
    assert "'0.second' and '0.other'" in block.note
    assert row(analysis, "0.first").ra_index is None and row(analysis, "0.first").law_rank is not None
    assert row(analysis, "0.first").note.startswith("inside 0")
    assert row(analysis, "2").virtual_constraints is None  # the sum hides z


@pytest.mark.slow
def test_torchvisions_networks_are_analysed_in_four_gigabytes():
    code = """
import resource, sys, torch, torchvision, rgap
from pathlib import Path
models = [getattr(torchvision.models, name)() for name in sys.argv[1:]]
for model in models:
    analysis = rgap.rank_analysis(model, (3, 224, 224))
    assert all(layer.kind != "not analysed" for layer in analysis.layers), analysis.verdict
    weighted = [layer for layer in analysis.layers if layer.kind in {"convolution", "linear"}]
    assert len(weighted) == sum(isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)) for m in model.modules())
    assert all(layer.law_rank is not None for layer in weighted)
    assert all(layer.rank is not None or layer.note for layer in weighted)
status = Path("/proc/self/status")  # where there is one: the other number starts at the memory of the parent process
lines = status.read_text().splitlines() if status.exists() else []
peaks = [line.split()[1] for line in lines if line.startswith("VmHWM")]
print(float(peaks[0] if peaks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1e6)
"""
    names = ["resnet18", "resnet152", "vgg16", "alexnet", "mobilenet_v2"]
    run = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 4


class Joined(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, x):
        return torch.cat([self.left(x), self.right(x)], 1)


def test_where_no_step_stands_alone_there_is_no_index():
    analysis = rgap.rank_analysis(Joined(), (4,))
    assert analysis.max_ra_index is None and analysis.leaking == () and analysis.verdict.startswith("unknown")
    assert [layer.law_rank for layer in analysis.layers] == [4, 4, None]


@pytest.mark.parametrize(
    ("function", "note"),
    [
        (F.selu, "invertible"),
        (F.logsigmoid, "invertible"),
        (nn.PReLU(), "invertible"),
        (F.gelu, "not invertible"),
        (F.hardtanh, "not invertible"),
        (lambda x: F.leaky_relu(x, 0.0), "not invertible"),
        (nn.PReLU(init=-0.5), "not invertible"),
        (nn.ELU(-1.0), "not invertible"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),  # an address would differ from worker to worker
)
def test_whether_an_activation_is_invertible_depends_on_its_arguments(function, note):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.act, self.last = nn.Linear(4, 4), function, nn.Linear(4, 2)

        def forward(self, x):
            return self.last(self.act(self.first(x)))

    step = rgap.rank_analysis(Net(), (4,)).layers[1]
    assert step.kind == "activation" and step.note.split(":")[0] == note
