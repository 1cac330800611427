import math

import dp_accounting
import pytest
import torch
from cases import drawn, randn, small_cnn
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import rgap
from rgap import client

DEFENCES = {
    "gaussian_noise": lambda g: client.gaussian_noise(g, 1e-3, seed=1),
    "clip_and_noise": lambda g: client.clip_and_noise(g, 0.5, 1e-3, seed=1),
    "prune": lambda g: client.prune(g, 0.5),
    "float16": lambda g: client.quantise(g, "float16"),
    "bfloat16": lambda g: client.quantise(g, "bfloat16"),
    "int8": lambda g: client.quantise(g, "int8"),
}
GRADIENTS = [randn(4, 3, 3, 3), randn(4, seed=1), randn(1, 7, seed=2)]
NAMED = dict(zip(["a", "b", "c"], GRADIENTS, strict=True))


@st.composite
def gradients(draw):
    """One to three tensors of up to three axes and any size of entries, some of them empty, zero or single numbers."""
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    shapes = draw(st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=3))
    sizes = draw(st.sampled_from([0.0, 1e-12, 1.0, 1e3]))
    return [(sizes * randn(1, *shape, seed=i)[0]).to(dtype) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("defend", DEFENCES.values(), ids=DEFENCES)
@drawn
@given(given_=gradients())
def test_kind_order_shapes_and_dtypes_stay_and_so_does_the_input(defend, given_):
    before = [g.clone() for g in given_]
    listed, named = defend(given_), defend({f"p{i}": g for i, g in enumerate(given_)})
    assert isinstance(listed, list) and list(named) == [f"p{i}" for i in range(len(given_))]
    for g, copy, one, other in zip(given_, before, listed, named.values(), strict=True):
        assert g.equal(copy) and one.equal(other) and one.shape == g.shape and one.dtype == g.dtype
        assert one.data_ptr() != g.data_ptr() or not g.numel()
        assert not one.requires_grad


@pytest.mark.parametrize("random", ["gaussian_noise", "clip_and_noise"])
def test_noise_is_the_seeds_alone(random):
    defend = getattr(client, random)
    arguments = (0.1,) if random == "gaussian_noise" else (1.0, 0.1)
    state = torch.get_rng_state()
    first, again, other = (defend(GRADIENTS, *arguments, seed=seed) for seed in (1, 1, 2))
    assert torch.get_rng_state().equal(state)
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))
    assert not any(a.equal(b) for a, b in zip(first, other, strict=True))


def test_gaussian_noise_has_its_standard_deviation_and_is_one_stream():
    zeros = [torch.zeros(200, 200), torch.zeros(200, 200)]
    first, second = client.gaussian_noise(zeros, 0.25, seed=3)
    assert first.std().item() == pytest.approx(0.25, rel=0.02) and abs(first.mean().item()) < 0.005
    assert abs((first * second).mean().item()) < 0.001  # not the same numbers twice
    single = client.gaussian_noise([g.double() for g in zeros], 0.25, seed=3)
    assert_close(single[0].float(), first)  # whatever the dtype
    assert all(g.equal(n) for g, n in zip(GRADIENTS, client.gaussian_noise(GRADIENTS, 0.0), strict=True))


@drawn
@given(st.floats(1e-6, 1e3))
def test_clipping_bounds_the_norm_of_all_tensors_together_and_keeps_the_direction(clip_norm):
    norm = math.hypot(*(g.norm().item() for g in GRADIENTS))
    clipped = client.clip_and_noise(GRADIENTS, clip_norm, 0.0)
    for g, c in zip(GRADIENTS, clipped, strict=True):
        assert_close(c, g * min(1.0, clip_norm / norm))


def test_the_noise_of_dp_sgd_is_in_units_of_the_clip_norm():
    (noisy,) = client.clip_and_noise([torch.zeros(300, 300)], 4.0, 0.5, seed=1)
    assert noisy.std().item() == pytest.approx(2.0, rel=0.02)


@drawn
@given(st.floats(0, 1, exclude_max=True))
def test_pruning_leaves_the_largest_of_every_tensor_as_they_are(share):
    for g, p in zip(GRADIENTS, client.prune(GRADIENTS, share), strict=True):
        gone = p == 0
        assert gone.sum() == math.floor(share * g.numel()) < g.numel()
        assert p[~gone].equal(g[~gone])
        assert not gone.any() or g[gone].abs().max() <= g[~gone].abs().min()


def test_pruning_counts_entries_of_one_size():
    assert client.prune([torch.ones(4)], 0.5)[0].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(("name", "precision"), [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_float_formats_round_to_nearest_and_the_attack_sees_it(name, precision):
    network = small_cnn(bias=True)
    shared = rgap.client_gradients(network, randn(1, 3, 8, 8).abs(), torch.tensor([1]))
    rounded = client.quantise(shared, name)
    for g, r in zip(shared, rounded, strict=True):
        assert r.equal(g.to(getattr(torch, name)).double())
        assert ((r - g).abs() <= precision * g.abs() + 1e-7).all()
    chain = rgap.prepare(network, (3, 8, 8))
    assert rgap.reconstruct(chain, rounded, gradient_scale=1.0).images.equal(
        rgap.reconstruct(chain, [r.to(getattr(torch, name)) for r in rounded], gradient_scale=1.0).images
    )


@drawn
@given(st.sampled_from([1e-30, 1.0, 1e30]), st.integers(0, 5))
def test_int8_is_within_half_a_step_on_at_most_255_values_and_idempotent(size, seed):
    g = size * randn(400, seed=seed)
    (rounded,) = client.quantise([g], "int8")
    step = g.abs().max() / 127
    assert ((rounded - g).abs() <= 0.5001 * step).all() and rounded.unique().numel() <= 255
    assert_close(rounded / step, (rounded / step).round(), rtol=0, atol=1e-9)
    assert_close(client.quantise([rounded], "int8")[0], rounded, rtol=1e-12, atol=0)


@pytest.mark.parametrize("steps", [1, 10])
@pytest.mark.parametrize("noise", [0.1, 1.0, 10.0])
def test_epsilon_bounds_the_exact_one_of_the_gaussian_mechanism_closely(noise, steps):
    exact = dp_accounting.get_epsilon_gaussian(noise / steps**0.5, 1e-5)
    assert exact <= client.epsilon(noise, steps=steps) <= 1.2 * exact


def test_epsilon_falls_with_noise_and_sampling_and_rises_with_steps():
    assert client.epsilon(0.0) == math.inf
    assert client.epsilon(2.0) < client.epsilon(1.0) < client.epsilon(1.0, steps=2)
    assert client.epsilon(1.0, sample_rate=0.01) < client.epsilon(1.0)
    assert client.epsilon(1.0, delta=1e-3) < client.epsilon(1.0, delta=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: client.gaussian_noise(GRADIENTS, -1.0), "std is -1.0; it must be at least 0 and finite"),
        (lambda: client.gaussian_noise(GRADIENTS, math.nan), "std is nan"),
        (lambda: client.gaussian_noise(GRADIENTS, math.inf), "std is inf"),
        (lambda: client.gaussian_noise(GRADIENTS, 1.0, seed=0.5), "seed is 0.5; it must be an integer"),
        (lambda: client.clip_and_noise(GRADIENTS, 0.0, 1.0), "clip_norm is 0.0; it must be above 0"),
        (lambda: client.clip_and_noise(GRADIENTS, math.inf, 1.0), "clip_norm is inf"),
        (lambda: client.clip_and_noise(GRADIENTS, 1.0, -0.1), "noise_multiplier is -0.1; it must be at least 0"),
        (lambda: client.prune(GRADIENTS, 1.0), "share is 1.0; it must be at least 0 and below 1"),
        (lambda: client.prune(GRADIENTS, -0.1), "share is -0.1"),
        (lambda: client.quantise(GRADIENTS, "int4"), "dtype is 'int4'; it must be one of float16, bfloat16, int8"),
        (lambda: client.quantise([torch.tensor([1e6])], "float16"), "an entry overflows float16: 1e.06 is beyond"),
        (lambda: client.gaussian_noise([torch.ones(9).half()], 1e6), "an entry of gradient 0 overflows float16"),
        (lambda: client.epsilon(-1.0), "noise_multiplier is -1.0"),
        (lambda: client.epsilon(1.0, sample_rate=0.0), "sample_rate is 0.0; it must be above 0 and at most 1"),
        (lambda: client.epsilon(1.0, steps=0), "steps is 0; it must be an integer of at least 1"),
        (lambda: client.epsilon(1.0, steps=1.5), "steps is 1.5"),
        (lambda: client.epsilon(1.0, delta=1.0), "delta is 1.0; it must be above 0 and below 1"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("defend", DEFENCES.values(), ids=DEFENCES)
@pytest.mark.parametrize(
    ("given_", "message"),
    [
        (torch.ones(3), "gradients: a Tensor; give a list or a mapping with a tensor"),
        (None, "gradients: a NoneType"),
        ({**NAMED, "b": 1.0}, "gradients: 'b' is a float; it must be a tensor"),
        ([*GRADIENTS, torch.ones(2).long()], "gradient 3 is torch.int64"),
        ({**NAMED, "c": torch.tensor([1.0, math.nan])}, "gradient 'c' holds NaN or infinity"),
        ([torch.tensor([math.inf])], "gradient 0 holds NaN or infinity"),
    ],
)
def test_what_is_no_gradient_is_refused_by_name(defend, given_, message):
    with pytest.raises(rgap.GradientMismatchError, match=message):
        defend(given_)
