import numpy as np
import scipy.sparse as sp
import torch
from cases import conv_layers, drawn
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from rgap.equations.banded import band_by_taps, band_of
from rgap.equations.weights import weight_matrix


def dense(found):
    """The whole matrix, its unknowns in their own order."""
    below = sum(np.diag(row[: len(found.order) - i], -i) for i, row in enumerate(found.band))
    result = np.empty_like(below)
    result[np.ix_(found.order, found.order)] = below + np.tril(below, -1).T
    return result


@drawn
@given(conv_layers(), st.booleans())
def test_the_band_is_the_gram_matrix_of_the_weights(layer, masked):
    layer = layer.split_groups()[0]
    known = torch.rand(layer.output_shape, generator=torch.Generator().manual_seed(0)) < 0.7 if masked else None
    W = weight_matrix(layer)[slice(None) if known is None else known.flatten().numpy()]
    S = (W.T @ W).tocsr()
    if layer.before is layer.after is None:
        assert_allclose(dense(band_by_taps(layer, known)), S.toarray(), atol=1e-12)
    assert_allclose(dense(band_of(S)), S.toarray(), atol=1e-12)


def test_a_factor_solves_for_vectors_and_exists_for_positive_definite_matrices_alone():
    A = np.tril(np.triu(np.random.default_rng(0).standard_normal((40, 40)), -5)) + 5 * np.eye(40)
    order = np.random.default_rng(1).permutation(40)
    S = (A @ A.T)[np.ix_(order, order)]
    band = band_of(sp.csr_array(S))
    assert len(band.band) < 20
    factor = band.factored()
    for right in (np.ones(40), np.eye(40)):
        assert_allclose(S @ factor.solve(right), right, atol=1e-9)
    assert band_of(sp.csr_array(S - 2 * np.diag(np.diag(S)))).factored() is None
