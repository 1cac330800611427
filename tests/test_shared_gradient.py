import copy
from dataclasses import replace

import pytest
import torch
from cases import rand, small_cnn
from torch.testing import assert_close

import rgap
from rgap.shared_gradient import receive

NETWORK = small_cnn(bias=True)
CHAIN = rgap.prepare(NETWORK, (3, 8, 8))
NAMES = list(CHAIN.parameters)
GRADIENTS = rgap.client_gradients(NETWORK, rand(1, 3, 8, 8), torch.tensor([1]))


def changed(place, value):
    """The gradients with one of them replaced by `value(gradient)`."""
    return [value(g) if i == place else g for i, g in enumerate(GRADIENTS)]


def with_entry(g, value):
    g = g.clone()
    g.view(-1)[3] = value
    return g


@pytest.mark.parametrize(
    ("dtype", "precision", "rcond"),
    [
        (torch.float64, 2.2e-16, 1e-5),
        (torch.float32, 1.2e-7, 1e-4),
        (torch.float16, 9.8e-4, 9e-3),
        (torch.bfloat16, 7.8e-3, 2.6e-2),
    ],
)
@pytest.mark.parametrize("cast", [False, True], ids=["as it is", "cast to float64"])
def test_precision_is_that_of_the_coarsest_format_whatever_it_was_cast_to(dtype, precision, rcond, cast):
    rounded = [g.to(dtype) for g in GRADIENTS]
    found = receive(CHAIN, [g.double() for g in rounded] if cast else rounded)
    assert found.precision == pytest.approx(precision, rel=0.02)
    assert found.rcond == pytest.approx(rcond, rel=0.02)
    for (name, g), expected in zip(found.gradients.items(), rounded, strict=True):
        assert name in NAMES and g.equal(expected.double())


def test_a_gradient_of_zeros_says_nothing_about_precision():
    assert receive(CHAIN, changed(0, torch.zeros_like)).precision < 1e-15


def test_one_coarse_tensor_decides():
    assert receive(CHAIN, changed(2, lambda g: g.half())).precision == pytest.approx(9.8e-4, rel=0.02)


def test_entries_next_to_float16s_smallest_number_widen_the_precision():
    small = [g.half() if i else (1e-5 * g / g.abs().max()).half() for i, g in enumerate(GRADIENTS)]
    found = receive(CHAIN, small)
    assert 2e-3 < found.precision < 0.05 and found.absent == ()


@pytest.mark.parametrize("size", [0.0, 1e-8, 5e-8])
def test_a_gradient_that_underflowed_in_float16_is_lost_and_decides_nothing(size):
    halves = [g.half() if i else (size * g / g.abs().max()).half() for i, g in enumerate(GRADIENTS)]
    for given in (halves, [g.double() for g in halves]):
        found = receive(CHAIN, given)
        assert found.absent == ("0.weight",) and found.precision == pytest.approx(9.8e-4, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_in_every_format_a_gradient_of_zeros_is_that_of_a_frozen_parameter(dtype):
    found = receive(CHAIN, [g.to(dtype) for g in changed(0, torch.zeros_like)])
    assert found.absent == ("0.weight",) and "0.weight" not in found.usable
    assert found.notes == ("not shared, or zero, and not used: the gradient of '0.weight'",)


def test_zeros_none_a_shorter_mapping_and_a_shorter_list_say_the_same():
    frozen = copy.deepcopy(NETWORK)
    frozen[2].requires_grad_(False)
    named = dict(zip(NAMES, GRADIENTS, strict=True))
    left = {name: g for name, g in named.items() if not name.startswith("2.")}
    zeros = [g if name in left else torch.zeros_like(g) for name, g in named.items()]
    expected = receive(CHAIN, zeros)
    assert expected.absent == ("2.weight", "2.bias")
    chain = rgap.prepare(frozen, (3, 8, 8))
    assert [layer.is_frozen for layer in chain.layers] == [False, True, False]
    for given in ([left.get(name) for name in NAMES], left, list(left.values())):
        found = receive(chain, given)
        assert (found.absent, found.notes, found.precision) == (expected.absent, expected.notes, expected.precision)
        assert all(g.equal(expected.gradients[name]) for name, g in found.gradients.items())


def test_a_network_that_is_frozen_as_a_whole_shares_everything():
    chain = rgap.prepare(copy.deepcopy(NETWORK).requires_grad_(False), (3, 8, 8))
    assert not any(layer.is_frozen for layer in chain.layers) and receive(chain, GRADIENTS).absent == ()


def test_the_heads_own_rounding_widens_the_tolerance_alone():
    found = replace(receive(CHAIN, GRADIENTS), rounding=1e-3)
    assert found.tolerance == pytest.approx(1e-2) and found.precision < 1e-15


def test_noise_widens_precision_tolerance_and_cutoff():
    clean, noisy = receive(CHAIN, GRADIENTS), receive(CHAIN, GRADIENTS, noise_std=1e-6)
    ratios = [1e-6 * g.numel() ** 0.5 / g.norm().item() for g in GRADIENTS]
    assert noisy.precision == pytest.approx(max(ratios))
    assert noisy.tolerance > clean.tolerance and noisy.rcond > clean.rcond
    assert receive(CHAIN, GRADIENTS, noise_std=0.0).precision == clean.precision
    assert receive(CHAIN, GRADIENTS, noise_std=1e3).tolerance == 0.3


def test_a_given_cutoff_is_used():
    assert receive(CHAIN, GRADIENTS, rcond=0.0).rcond == 0.0
    assert receive(CHAIN, GRADIENTS, rcond=0.01).rcond == 0.01


def test_a_mapping_in_any_order_is_the_sequence_and_gradients_are_not_changed():
    copies = [g.clone() for g in GRADIENTS]
    mapping = dict(reversed(list(zip(NAMES, GRADIENTS, strict=True))))
    found, expected = receive(CHAIN, mapping), receive(CHAIN, iter(GRADIENTS))
    assert list(found.gradients) == list(expected.gradients) == NAMES
    for name in NAMES:
        assert_close(found.gradients[name], expected.gradients[name], rtol=0, atol=0)
    assert all(g.equal(copy) for g, copy in zip(GRADIENTS, copies, strict=True))


def test_gradients_that_track_their_own_gradient_are_taken():
    found = receive(CHAIN, [g.clone().requires_grad_() for g in GRADIENTS])
    assert not any(g.requires_grad for g in found.gradients.values())


@pytest.mark.parametrize(
    ("gradients", "message"),
    [
        (GRADIENTS[:-1], "5 gradients for 6 parameters; give one for each, in the order of model.parameters"),
        ([*GRADIENTS, GRADIENTS[0]], "7 gradients for 6 parameters"),
        ([], "0 gradients for 6 parameters"),
        ({"0.wieght": GRADIENTS[0], "2.weight": GRADIENTS[2]}, r"missing \['0.weight', .*, unknown \['0.wieght'\]"),
        ({}, "0 gradients for 6 parameters"),
        ({**dict(zip(NAMES, GRADIENTS, strict=True)), "9.weight": 0}, r"missing \[\], unknown \['9.weight'\]"),
        (changed(0, lambda g: g[:, :2]), r"'0.weight' has shape \(12, 2, 3, 3\); it must be \(12, 3, 3, 3\)"),
        (changed(5, lambda g: g.reshape(())), r"'5.bias' has shape \(\); it must be \(1,\)"),
        (changed(2, torch.Tensor.long), "'2.weight' is torch.int64; it must be a floating-point tensor"),
        (changed(2, lambda g: g.to(torch.complex128)), "'2.weight' is complex128; it must be real"),
        (changed(3, lambda g: 1.0), "'2.bias' is a float"),
        (changed(4, lambda g: None), "the last layer's gradient '5.weight' is zero or not shared"),
        ([None] * 6, "every gradient is zero"),
        (changed(0, lambda g: with_entry(g, torch.nan)), "'0.weight' holds NaN or infinity"),
        (changed(4, lambda g: with_entry(g, torch.inf)), "'5.weight' holds NaN or infinity"),
        (changed(4, lambda g: with_entry(g, -torch.inf)), "'5.weight' holds NaN or infinity"),
        ([0 * g for g in GRADIENTS], "every gradient is zero"),
        (changed(4, torch.zeros_like), "the last layer's gradient '5.weight' is zero"),
    ],
)
def test_gradients_that_do_not_belong_to_the_network_are_refused(gradients, message):
    with pytest.raises(rgap.GradientMismatchError, match=message):
        receive(CHAIN, gradients)


@pytest.mark.parametrize("defend", [lambda g: rgap.client.quantise(g, "int8"), lambda g: rgap.client.prune(g, 0.3)])
def test_errors_of_entries_are_float64_whatever_was_done_to_them(defend):
    received = receive(CHAIN, defend([g.double() for g in GRADIENTS]))
    assert {std.dtype for std in received.entry_std.values()} == {torch.float64}
