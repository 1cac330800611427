import math
from dataclasses import replace

import pytest
import torch
from cases import randn, small_cnn

import rgap
from rgap.attack.descent import descend
from rgap.attack.propagation import start_probe
from rgap.attack.verdict import Weighed, judge, weigh
from rgap.head import read_head
from rgap.head.hypothesis import Start, starts_of
from rgap.results import Candidate, PixelRange
from rgap.shared_gradient import receive

LABEL = torch.tensor([1])


@pytest.fixture(scope="module")
def recovered():
    """A network, its gradients in float32 as received, the start and its descent."""
    model = small_cnn()
    chain = rgap.prepare(model, (3, 8, 8))
    gradients = [g.float() for g in rgap.client_gradients(model, randn(1, 3, 8, 8).abs(), LABEL)]
    received = receive(chain, gradients)
    (start,) = starts_of(chain, read_head("logistic", chain.layers[-1], received, 1).hypotheses[:1])
    probe = start_probe(chain, received, start, "logistic")
    return chain, received, start, descend(chain, received, start, probe=probe)


def with_one_unit_turned(chain, descent):
    """The descent with an image beyond the kink of the second layer closest to it, and how far that is."""
    name = chain.layers[0].name
    x = descent.layer_inputs[name].clone().requires_grad_()
    second = chain.layers[1]
    z = second.apply(chain.layers[0].activation.forward(chain.layers[0].apply(x))).flatten()
    unit = z.abs().argmin()
    (slope,) = torch.autograd.grad(z[unit], x)
    step = -1.5 * z[unit].detach() * slope / slope.square().sum()
    return replace(descent, layer_inputs={**descent.layer_inputs, name: x.detach() + step}), step.square().mean().sqrt()


def test_a_unit_that_flips_when_the_image_goes_forward_says_nothing_against_it(recovered):
    chain, received, start, descent = recovered
    name = chain.layers[0].name
    turned, by = with_one_unit_turned(chain, descent)
    close = replace(turned, probe=replace(turned.probe, x=(by / turned.probe.error) * turned.probe.x))
    assert close.probe.error == pytest.approx(by.item())
    candidate = weigh(chain, received, start, close, "logistic", PixelRange(-9.0, 9.0)).joint
    assert candidate.gradient_residual < 0.1 * candidate.residual_allowed
    assert (candidate.images - descent.layer_inputs[name]).square().mean().sqrt() < by
    assert torch.equal(candidate.layer_inputs[name], candidate.images)


def test_an_image_is_not_moved_beyond_its_error(recovered):
    chain, received, start, descent = recovered
    turned, by = with_one_unit_turned(chain, descent)
    assert turned.probe.error < by / 50
    candidate = weigh(chain, received, start, turned, "logistic", PixelRange(-9.0, 9.0)).joint
    assert not candidate.consistent and candidate.gradient_residual > 1e-3
    assert torch.equal(candidate.images, turned.layer_inputs[chain.layers[0].name])


def candidate(residual, size=1.0):
    return Candidate(torch.full((1, 1, 2, 2), size).double(), LABEL, residual, 0 <= size <= 1, residual_allowed=1e-3)


@pytest.mark.parametrize(
    ("residuals", "verdict", "kept"),
    [
        ([1e-2, 1.001e-2], "inconsistent", 2),
        ([1e-2, 2e-2], "inconsistent", 1),
        ([math.inf, math.inf], "inconsistent", 1),
        ([1e-4, 1e-2], "exact", 1),
        ([1e-4, 2e-4], "ambiguous", 2),
    ],
)
def test_twins_that_miss_the_gradient_alike_stay_together(residuals, verdict, kept):
    none = Start(0, LABEL, torch.zeros(1, 4), torch.zeros(1, 4), ((),), ())
    result = judge([Weighed(none, candidate(residual, 0.9)) for residual in residuals], [], PixelRange())
    assert result.verdict == verdict and len(result.candidates) == kept
