import math

import numpy as np
import pytest
import torch
from torch import nn

import rgap
from rgap import models
from rgap.equations.gradient import blocks, gradient_matrix
from rgap.equations.weights import weight_matrix
from rgap.network.folding import linear_layer
from rgap.ranks.numbers import numerical_ranks


def row(analysis, name):
    return next(layer for layer in analysis.layers if layer.name == name)


def dense_ranks(layer, batch, seed):
    """Ranks of W, K and [W; K] from dense matrices of the whole layer, δz drawn as the analysis draws it."""
    generator = torch.Generator().manual_seed(seed)
    total = np.zeros(3, int)
    for part in layer.split_groups():
        W = torch.from_numpy(weight_matrix(part).toarray())
        dz = torch.randn(batch, *part.output_shape, generator=generator, dtype=torch.float64)
        channels, pixels = part.input_shape[0], math.prod(part.input_shape[1:])
        rows = []
        for block in blocks(part):
            M = [gradient_matrix(part, block, image) for image in dz]
            K = torch.zeros(channels, len(M[0]), batch, channels, pixels, dtype=torch.float64)
            for c in range(channels):
                for b in range(batch):
                    K[c, :, b, c, block.pixels] = M[b]
            rows.append(K.flatten(2).flatten(0, 1))
        W, K = torch.block_diag(*[W] * batch), torch.cat(rows)
        total += [int(torch.linalg.matrix_rank(A)) for A in (W, K, torch.cat([W, K]))]
    return tuple(total.tolist())


def random_modules(count):
    rng = np.random.default_rng(3)
    while count:
        groups, batch, axes = int(rng.choice([1, 1, 2, 3])), int(rng.choice([1, 1, 2])), int(rng.choice([1, 2, 2, 2]))
        kernel, stride, dilation = (tuple(rng.integers(1, top, axes).tolist()) for top in (4, 4, 3))
        padding, image = tuple(rng.integers(0, 2, axes).tolist()), tuple(rng.integers(4, 9, axes).tolist())
        channels, filters = groups * int(rng.integers(1, 4)), groups * int(rng.integers(1, 7))
        if all(n + 2 * p > d * (k - 1) for n, p, d, k in zip(image, padding, dilation, kernel, strict=True)):
            kind = nn.Conv1d if axes == 1 else nn.Conv2d
            yield kind(channels, filters, kernel, stride, padding, dilation, groups), (channels, *image), batch
            count -= 1


def test_numerical_ranks_agree_with_dense_ones_on_60_random_layers():
    torch.manual_seed(0)
    for module, shape, batch in random_modules(60):
        module = module.double()
        layer = linear_layer(module, shape, tuple(module(torch.zeros(1, *shape, dtype=torch.float64)).shape[1:]))
        numbers = numerical_ranks(layer, batch, seed=5)
        found = (numbers.weights, numbers.gradients, numbers.both)
        assert found == dense_ranks(layer, batch, seed=5), (module, shape, batch)


def test_ranks_by_number_are_those_of_the_models_own_weights():
    conv = nn.Conv2d(2, 6, 3, padding=1, bias=False)
    with torch.no_grad():
        conv.weight[3:] = conv.weight[:3]
    layer = rgap.rank_analysis(nn.Sequential(conv), (2, 5, 5)).layers[0]
    assert layer.law_weights == 50 and layer.rank_weights == 50
    with torch.no_grad():
        conv.weight[1:] = 0
    layer = rgap.rank_analysis(nn.Sequential(conv), (2, 5, 5)).layers[0]
    assert layer.law_weights == 50 and layer.rank_weights == 25
    with torch.no_grad():
        conv.weight.zero_()
    layer = rgap.rank_analysis(nn.Sequential(conv), (2, 8, 8)).layers[0]
    assert layer.rank_weights == 0 and layer.rank == layer.rank_gradients == 108 and layer.deficit == 20


@pytest.mark.slow
def test_an_ill_conditioned_square_layer_still_has_full_rank():
    layer = row(rgap.rank_analysis(models.lenet(), (3, 32, 32)), "0")  # σ_max / σ_min of W is 5e7
    assert (layer.rank_weights, layer.rank, layer.law_weights) == (3072, 3072, 3072) and layer.condition < 100


def test_the_dtype_decides_which_singular_values_count():
    linear = nn.Linear(6, 6, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.diag(torch.tensor([1.0, 1, 1, 1, 1, 1e-7])))
    ranks = [
        rgap.rank_analysis(linear, (6,), dtype=dtype).layers[0].rank_weights for dtype in (torch.float64, torch.float32)
    ]
    assert ranks == [6, 5]


def test_numbers_of_a_batch_agree_with_the_laws():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 4, 3, 2, 1), nn.Flatten(), nn.Linear(36, 5)
    )
    for batch in (1, 2, 3):
        for layer in rgap.rank_analysis(model, (3, 12, 12), batch).layers:
            if layer.law_rank is not None:
                assert (layer.law_weights, layer.law_gradients) == (layer.rank_weights, layer.rank_gradients)
                assert layer.law_rank == layer.rank


def test_average_pooling_is_a_matrix_without_weights():
    model = nn.Sequential(nn.AvgPool2d((2, 3), (2, 1), (0, 1)), nn.Conv2d(2, 4, 3), nn.AdaptiveAvgPool2d((3, 2)))
    first, _, last = rgap.rank_analysis(model, (2, 8, 6)).layers
    assert (first.rank_weights, first.gradient_rows, first.deficit) == (2 * 4 * 6, 0, 96 - 48)
    assert last.unknowns == 4 * 2 * 4 and last.rank == last.law_rank == 4 * 2 * 2


def test_the_limit_on_numbers_is_named_and_the_law_stays():
    analysis = rgap.rank_analysis(models.cnn6(), (3, 32, 32), limit=1000)
    assert row(analysis, "2").rank is None and row(analysis, "2").law_rank == 3468
    assert row(analysis, "2").deficit == 0
    assert row(analysis, "2").note == "law only: 3468 unknowns, over the limit of 1000"
    wide = rgap.rank_analysis(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 1)), (1, 40, 40))
    assert "share a block of M, over the limit of 1200" in wide.layers[0].note
    deep = rgap.rank_analysis(nn.Conv2d(80, 80, 3, padding=1, groups=80), (80, 14, 14)).layers[0]
    assert deep.note == "numbers: 1 of 80 groups, which stand for all" and deep.rank == deep.law_rank == 80 * 14 * 14
    heavy = rgap.rank_analysis(nn.Conv2d(4, 4, 3, padding=1, groups=4), (4, 33, 33)).layers[0]
    assert heavy.note == "law only: numbers would take too much work" and heavy.deficit == 0
    cube = rgap.rank_analysis(nn.Conv3d(1, 30, 2), (1, 3, 3, 3)).layers[0]
    assert cube.law_rank == 27 and cube.note == "no numbers: Conv3d has no constraint matrices here"


def test_where_law_and_gram_matrix_disagree_the_singular_values_themselves_decide():
    """A ratio of 1e-9 lies below what a Gram matrix resolves and far above rounding."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(450, 420, bias=False).double()
    U, S, Vh = torch.linalg.svd(torch.randn(420, 450, generator=generator, dtype=torch.float64), full_matrices=False)
    S[-3:] = 1e-9 * S[0]
    with torch.no_grad():
        linear.weight.copy_(U @ torch.diag(S) @ Vh)
    layer = rgap.rank_analysis(linear, (450,)).layers[0]
    assert (layer.rank_weights, layer.law_weights) == (420, 420)
    with torch.no_grad():
        linear.weight[-1] = linear.weight[0]
    layer = rgap.rank_analysis(linear, (450,)).layers[0]
    assert (layer.rank_weights, layer.law_weights) == (419, 420)
