import pytest
import torch
from cases import drawn, last_layer, rand, randn, read_sample
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import rgap
from rgap.head import read_head
from rgap.shared_gradient import SharedGradient, receive

ACCURACY = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 0.03, torch.bfloat16: 0.2}
"""Largest relative error of the input, by the gradient's format; it is that of the scale."""


@st.composite
def heads(draw, losses=("cross_entropy", "mse", "logistic")):
    loss = draw(st.sampled_from(losses))
    classes = 1 if loss == "logistic" else draw(st.integers(2 if loss == "cross_entropy" else 1, 20))
    inputs, bias, seed = draw(st.integers(5, 60)), draw(st.booleans()), draw(st.integers(0, 10_000))
    model = last_layer(classes, inputs, bias, seed, draw(st.sampled_from([0.1, 0.5, 2.0])))
    return model, rand(1, 1, 1, inputs, seed=seed + 2), draw(st.integers(0, max(classes, 2) - 1)), loss


@pytest.mark.parametrize("dtype", ACCURACY)
@settings(drawn, max_examples=60)
@given(heads())
def test_one_hypothesis_is_the_sample(dtype, case):
    model, image, label, loss = case
    found, gradients = read_sample(model, image, label, loss, dtype)
    x = image.to(dtype).double().flatten()
    mine = [h for h in found.hypotheses if h.label == label]
    best = min(mine, key=lambda h: (h.x - x).norm().item())
    assert (best.x - x).norm() < ACCURACY[dtype] * x.norm()
    z, tolerance = model.to(dtype).double()(image), max(ACCURACY[dtype], 1e-8)
    for h in found.hypotheses:
        assert h.x.isfinite().all() and h.dz.isfinite().all() and h.residual >= 0
        product, shared = h.dz[:, None] * h.x, gradients[0].double()
        assert (product - shared).norm() < tolerance * shared.norm()
    assert len(found.hypotheses) <= 4 and z.isfinite().all()


@pytest.mark.slow
@settings(drawn, max_examples=15)
@given(heads(losses=["cross_entropy", "mse"]))
def test_every_label_of_three_or_more_classes_is_inferred(case):
    model, image, _, loss = case
    classes = len(model[1].weight)
    for label in range(classes) if classes > 2 else ():
        found, _ = read_sample(model, image, label, loss, torch.float32)
        assert {h.label for h in found.hypotheses} == {label}
        assert len(found.misfits) == classes and min(found.misfits, key=found.misfits.get) == label
        (note,) = found.notes
        assert note.startswith(f"label {label} by the head's equations, missed by")
        assert "the next best" in note


@pytest.mark.slow
def test_hundreds_of_labels_are_inferred():
    right = total = 0
    for seed in range(15):
        model, image = last_layer(12, 20, False, seed), rand(1, 1, 1, 20, seed=seed)
        for loss in ("cross_entropy", "mse"):
            chain = rgap.prepare(model, (1, 1, 20))
            for label in range(12):
                gradients = rgap.client_gradients(model.float(), image, torch.tensor([label]), loss)
                found = read_head(loss, chain.layers[-1], receive(chain, gradients))
                right += {h.label for h in found.hypotheses} == {label}
                total += 1
    assert (right, total) == (360, 360)


@settings(drawn, max_examples=40)
@given(heads(), st.sampled_from(["altered", "noise", "batch", "zero bias", "one row"]))
def test_gradients_of_no_sample_give_finite_hypotheses_and_a_note(case, how):
    model, image, label, loss = case
    G, *rest = rgap.client_gradients(model, image, torch.tensor([label]), loss)
    if how == "altered":
        G = randn(*G.shape) * G.norm()
    elif how == "noise":
        G, rest = G + 0.3 * G.abs().mean() * randn(*G.shape), [b + 0.3 * b.abs().mean() * randn(len(b)) for b in rest]
    elif how == "batch":
        labels = torch.arange(5) % max(len(G), 2)
        G, *rest = rgap.client_gradients(model, rand(5, *image.shape[1:]), labels, loss)
    elif how == "zero bias":
        rest = [torch.zeros_like(b) for b in rest]
    else:
        G = torch.where(torch.arange(len(G))[:, None] == 0, 5.0, 0.0) * G
    if not G.any():
        return
    chain = rgap.prepare(model, image.shape[1:])
    given_gradients = dict(zip(chain.parameters, [G, *rest], strict=True))
    shared = SharedGradient(given_gradients, 2e-16, 1e-5)
    if how == "zero bias" and rest and loss != "cross_entropy":
        with pytest.raises(rgap.GradientMismatchError, match=r"last layer's bias '1.bias' is zero or not shared"):
            read_head(loss, chain.layers[-1], shared)
        return
    found = read_head(loss, chain.layers[-1], shared)
    assert found.hypotheses
    for h in found.hypotheses:
        assert h.x.isfinite().all() and h.dz.isfinite().all() and h.dz.any() and h.residual == h.residual


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_label_that_was_given_is_used_and_checked(loss, bias):
    model, image = last_layer(7, 30, bias, seed=3), rand(1, 1, 1, 30)
    right, _ = read_sample(model, image, 4, loss, known=4)
    assert {h.label for h in right.hypotheses} == {4} and right.notes == ()
    assert_close(right.hypotheses[0].x, image.flatten(), rtol=1e-9, atol=0)
    with pytest.raises(rgap.GradientMismatchError, match="label 2 was given; the last layer's gradient is that of 4"):
        read_sample(model, image, 4, loss, known=2)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "logistic"])
def test_a_given_label_that_fits_badly_is_used_where_nothing_fits_well(loss):
    model = last_layer(1 if loss == "logistic" else 5, 30, True, seed=3)
    labels = torch.tensor([0, 1, 1])
    G, b = rgap.client_gradients(model, rand(3, 1, 1, 30), labels, loss)
    chain = rgap.prepare(model, (1, 1, 30))
    received = SharedGradient(dict(zip(chain.parameters, [randn(*G.shape) * G.norm(), b], strict=True)), 2e-16, 1e-5)
    for label in (0, 1):
        found = read_head(loss, chain.layers[-1], received, known=label)
        assert {h.label for h in found.hypotheses} == {label}


@settings(drawn, max_examples=40)
@given(heads())
def test_a_batch_is_noted(case):
    model, image, _, loss = case
    if len(model[1].weight) < 3:
        return  # one equation for one unknown: any gradient looks like a sample's
    batch = rand(4, *image.shape[1:])
    G, *rest = rgap.client_gradients(model, batch, torch.tensor([0, 1, 2, 0]), loss)
    chain = rgap.prepare(model, image.shape[1:])
    found = read_head(loss, chain.layers[-1], receive(chain, [G, *rest]))
    assert any("belongs to a batch" in note for note in found.notes)


@pytest.mark.parametrize("factor", [1e-250, 1e200])
@pytest.mark.parametrize(("loss", "classes"), [("logistic", 1), ("cross_entropy", 5)])
def test_tiny_and_huge_gradients_give_finite_hypotheses(loss, classes, factor):
    model, image = last_layer(classes, 10, False, seed=0), rand(1, 1, 1, 10)
    chain = rgap.prepare(model, (1, 1, 10))
    G = [factor * g for g in rgap.client_gradients(model, image, torch.tensor([0]), loss)]
    for h in read_head(loss, chain.layers[-1], receive(chain, G)).hypotheses:
        assert h.x.isfinite().all() and h.dz.isfinite().all() and h.dz.any()
