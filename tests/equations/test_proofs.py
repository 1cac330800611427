import csv
import math
from importlib import resources

import numpy as np
import pytest
import torch
from cases import dense_group, random_layer

from rgap.equations import proofs
from rgap.equations.proofs import LayerShape, elimination_work, is_proved, rank_bounds

CNN6_D_SECOND = LayerShape(12, 20, (3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1), (17, 17), 1)


def table():
    with resources.files("rgap.equations").joinpath(proofs.PROOF_TABLE).open(newline="") as file:
        return list(csv.DictReader(file))


def shape_of(layer):
    """The shape of one group of a layer as `random_layer` draws it."""
    groups, axes = layer["groups"], len(layer["image"])
    stride, dilation = ((tuple(v) * axes)[:axes] for v in (layer["stride"], layer["dilation"]))
    sizes = (layer["in_channels"] // groups, layer["out_channels"] // groups)
    return LayerShape(*sizes, layer["kernel"], stride, layer["padding"], dilation, layer["image"], layer["batch"])


def test_w_and_m_are_those_of_torchs_convolution():
    shape = LayerShape(2, 3, (3, 2), (2, 1), ((1, 0), (0, 2)), (1, 2), (6, 5), 2)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 2 * 6, generator=generator, dtype=torch.float64)
    W, K = (A.numpy() for A in dense_group(3, 2, 2, *shape[2:6], shape.image, seed=0))
    ours = proofs._weight_matrix(shape, weight.reshape(3, 2, 6).numpy())
    np.testing.assert_array_equal(ours, W[: len(ours), : ours.shape[1]])
    dz = torch.randn(2, 3, math.prod(proofs._outputs(shape)), generator=generator, dtype=torch.float64).numpy()
    M = proofs._gradient_matrix(shape, dz).reshape(3, 6, 2, 30)
    np.testing.assert_array_equal(M, K.reshape(3, 2, 6, 2, 2, 30)[:, 0, :, :, 0])


@pytest.mark.slow
def test_elimination_proves_every_law_of_400_random_layers_and_bounds_what_has_none():
    rng = np.random.default_rng(11)
    shapes = [shape_of(random_layer(rng, usual=number % 2 == 0)) for number in range(400)]
    for shape in shapes:
        pairs = zip(rank_bounds(shape), shape.laws(), shape.laws(tested=False), strict=True)
        for bound, law, settled in pairs:
            assert law is None or bound == law, shape
            assert settled in (None, law), shape
    assert sum(None in shape.laws(tested=False) for shape in shapes) > 150


def test_a_bound_never_exceeds_what_numbers_show_where_there_is_no_law():
    shape = LayerShape(1, 2, (2, 2), (1, 1), ((0, 0), (0, 0)), (1, 1), (12, 12), 1)  # two bilinear polynomials
    W, K = dense_group(2, 1, 1, *shape[2:6], shape.image, seed=0)
    measured = tuple(int(torch.linalg.matrix_rank(A)) for A in (W, K, torch.cat([W, K])))
    assert shape.laws()[0] is None and tuple(rank_bounds(shape)) == measured
    assert is_proved(shape) is None


def test_a_wrong_law_would_be_caught(monkeypatch):
    """Of equal filters W has less rank than generic ones, so that the bound stays below the law."""
    monkeypatch.setattr(proofs, "_random", lambda rng, *shape: np.ones(shape))
    assert rank_bounds(CNN6_D_SECOND._replace(image=(7, 7))) < CNN6_D_SECOND._replace(image=(7, 7)).laws()


def test_laws_are_proved_for_every_shape_by_the_table_or_not_at_all():
    assert is_proved(LayerShape(64, 10, (1,), (1,), ((0, 0),), (1,), (1,), 4)) is True  # a linear layer
    assert CNN6_D_SECOND.laws(tested=False).both is None and is_proved(CNN6_D_SECOND) is True
    assert is_proved(CNN6_D_SECOND._replace(image=(19, 19))) is False


def test_the_table_of_proofs_repeats_at_other_weights():
    """All rows state the laws; those of little work are eliminated again."""
    rows = table()
    assert len(rows) > 60
    repeated = 0
    for row in rows:
        shape = LayerShape(*eval(row["shape"]))
        laws = shape.laws()
        assert shape.text == row["shape"] and tuple(laws) == tuple(int(row[name]) for name in laws._fields)
        if elimination_work(shape) < 3e7:
            assert rank_bounds(shape, seed=5) == laws
            repeated += 1
    assert repeated > 10
