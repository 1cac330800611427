import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import dense_group, random_layer

from rgap.equations.rank_laws import rank_laws

CNN6_SECOND = {"kernel": (3, 3), "stride": 2, "padding": 1, "image": (17, 17)}


def dense_ranks(layer, seed=0):
    groups = layer["groups"]
    total = [0, 0, 0]
    for group in range(groups):
        shape = (layer["out_channels"] // groups, layer["in_channels"] // groups, layer["batch"])
        geometry = (layer[key] for key in ("kernel", "stride", "padding", "dilation", "image"))
        W, K = dense_group(*shape, *geometry, seed=100 * seed + group)
        for i, A in enumerate((W, K, torch.cat([W, K]))):
            total[i] += int(torch.linalg.matrix_rank(A))
    return tuple(total)


@pytest.mark.slow
@pytest.mark.parametrize(("usual", "known"), [(True, (0.95, 0.95, 0.85)), (False, (0.95, 0.95, 0.80))])
def test_laws_are_exact_or_none_on_1000_random_layers_of_each_kind(usual, known):
    rng = np.random.default_rng(7)
    layers = [random_layer(rng, usual) for _ in range(1000)]
    laws = [tuple(rank_laws(**layer)) for layer in layers]
    for layer, law in zip(layers, laws, strict=True):
        ranks = dense_ranks(layer)
        if any(r not in (None, n) for r, n in zip(law, ranks, strict=True)):
            ranks = tuple(map(max, ranks, dense_ranks(layer, seed=1)))  # a nearly singular draw
        assert all(r in (None, n) for r, n in zip(law, ranks, strict=True)), (layer, law, ranks)
    shares = np.mean([[r is not None for r in law] for law in laws], 0)
    assert (shares >= known).all(), shares
    # Enough of the hard ones: neither system determines the layer, but together they say more than each.
    hard = [None not in law and max(law[:2]) < law[2] < size(layer) for layer, law in zip(layers, laws, strict=True)]
    assert sum(hard) > 50
    assert sum(max(layer["stride"]) > 1 and max(layer["dilation"]) > 1 for layer in layers) > 100


def size(layer):
    return layer["in_channels"] * layer["batch"] * math.prod(layer["image"])


def test_the_dense_systems_are_those_of_torchs_layer():
    x = torch.rand(1, 2, 6, 5, dtype=torch.float64)
    arguments = (3, 2, 1, (3, 2), (2, 1), ((1, 1), (0, 0)), (1, 2), (6, 5))
    W, K = dense_group(*arguments, seed=0)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 12, generator=generator, dtype=torch.float64).reshape(3, 2, 3, 2).requires_grad_()
    dz = torch.randn(1, 3, 9, generator=generator, dtype=torch.float64).reshape(1, 3, 3, 3)
    z = F.conv2d(x, weight, None, (2, 1), (1, 0), (1, 2))
    z.backward(dz)
    torch.testing.assert_close(W @ x.flatten(), z.flatten())
    torch.testing.assert_close(K @ x.flatten(), weight.grad.flatten())


def test_check_values_of_cnn6_and_its_width_family():
    assert rank_laws(3, 12, (4, 4), 2, 2, image=(32, 32)) == (3072, 576, 3072)
    assert rank_laws(12, 36, **CNN6_SECOND) == (2916, 2928, 3468)
    assert rank_laws(12, 20, **CNN6_SECOND) == (1620, 1968, 3188)
    deficits = {40: 0, 36: 0, 24: 0, 23: 0, 22: 82, 21: 180, 20: 280, 19: 382, 18: 486, 16: 700, 12: 1344}
    assert {width: 3468 - rank_laws(12, width, **CNN6_SECOND).both for width in deficits} == deficits


def test_batches_multiply_unknowns_and_weight_constraints_alone():
    assert all(rank_laws(12, 36, **CNN6_SECOND, batch=B).both == 3468 * B for B in (1, 2, 3, 4))
    assert rank_laws(12, 36, **CNN6_SECOND, batch=5).both == 5 * 3468 - 168
    assert rank_laws(12, 36, **CNN6_SECOND, batch=6).both == 6 * 2916 + 3888 - 36**2


@pytest.mark.parametrize("outputs", [1, 3, 5])
@pytest.mark.parametrize("inputs", [1, 4, 6])
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_linear_layers(outputs, inputs, batch):
    w, k = min(outputs, inputs), min(outputs, batch)
    both = batch * inputs - (inputs - w) * (batch - k)
    assert rank_laws(inputs, outputs, batch=batch) == (batch * w, inputs * k, both)


@pytest.mark.parametrize(
    ("layer", "ranks"),
    [
        ({"in_channels": 2, "out_channels": 3, "kernel": (1, 1), "stride": 2, "image": (5, 5)}, (18, 6, 18)),
        ({"in_channels": 2, "out_channels": 3, "kernel": (1,), "padding": 3, "stride": 9, "image": (2,)}, (0, 0, 0)),
        # Two bilinear polynomials have two common zeros: 142, not 144.
        ({"in_channels": 1, "out_channels": 2, "kernel": (2, 2), "image": (12, 12)}, (None, 8, None)),
        # A proved bound undercuts the law: 56, not 57.
        (
            {"in_channels": 3, "out_channels": 4, "kernel": (3,), "stride": 2, "padding": 1, "image": (19,)},
            (40, 36, None),
        ),
    ],
)
def test_limits_of_the_laws(layer, ranks):
    assert rank_laws(**layer) == ranks


def test_groups_add_up():
    one = rank_laws(3, 5, (3, 3), 2, 1, image=(9, 9))
    assert rank_laws(12, 20, (3, 3), 2, 1, groups=4, image=(9, 9)) == tuple(4 * rank for rank in one)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"in_channels": 3, "out_channels": 4, "kernel": (9,), "image": (3,)},
            "9 taps with dilation 1 do not fit 3 pixels",
        ),
        ({"in_channels": 3, "out_channels": 4, "groups": 2}, "2 groups must divide 3 and 4 channels"),
    ],
)
def test_impossible_layers_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        rank_laws(**arguments)
