"""What the caller's program sets, and its other threads, change no result; and a computation here changes neither."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from cases import rand, small_cnn
from torch import nn

import rgap
from rgap.isolation import _blas_libraries, isolated

SHAPE = (3, 8, 8)
IMAGE, LABEL = rand(1, *SHAPE), torch.tensor([1])


def attack(model=None, gradients=None):
    model = model or small_cnn()
    return rgap.reconstruct(model, gradients or rgap.client_gradients(model, IMAGE, LABEL), SHAPE)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def default_dtype(dtype):
    class Context(nullcontext):
        def __enter__(self):
            torch.set_default_dtype(dtype)

        def __exit__(self, *_):
            torch.set_default_dtype(torch.float32)

    return Context()


SETTINGS = {
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "float64 by default": lambda: default_dtype(torch.float64),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "meta device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_of_the_program_change_no_result(setting):
    model, expected = small_cnn(), attack()
    expected_ranks, chain = rgap.rank_analysis(model, SHAPE), rgap.prepare(model, SHAPE)
    with SETTINGS[setting]():
        found, ranks = attack(model), rgap.rank_analysis(model, SHAPE)
        prepared = rgap.prepare(model, SHAPE)
    assert (
        found.verdict == expected.verdict and found.images.equal(expected.images) and found.labels.device.type == "cpu"
    )
    assert ranks == expected_ranks
    assert all(a.equal(b) for a, b in zip(prepared.parameters.values(), chain.parameters.values(), strict=True))


def test_everything_made_in_inference_mode_is_taken():
    with torch.inference_mode():
        model = small_cnn()
        images = IMAGE.clone()
        gradients = rgap.client_gradients(model, images, LABEL)
        again = [g.clone() for g in gradients]
        assert again[0].is_inference()
        assert attack(model, again).images.equal(attack().images)
    assert attack(model, again).images.equal(attack().images)


@pytest.mark.usefixtures("two_threads")
def test_linear_algebra_has_one_thread_meanwhile_in_every_library():
    before = [library["num_threads"] for library in _blas_libraries().info()]
    seen = []

    @isolated()
    def watch():
        seen.append(
            (torch.get_num_threads(), *(b["num_threads"] for b in _blas_libraries().select(user_api="blas").info()))
        )

    watch()
    assert set(seen[0]) == {1}
    assert torch.get_num_threads() == 2
    assert [library["num_threads"] for library in _blas_libraries().info()] == before


@pytest.mark.usefixtures("two_threads")
def test_threads_are_as_before_where_computations_overlap_and_fail():
    entered, leave = threading.Event(), threading.Event()

    @isolated()
    def long():
        entered.set()
        leave.wait(10)
        raise ValueError

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(long)
        entered.wait(10)
        isolated()(lambda: None)()
        assert torch.get_num_threads() == 2
        leave.set()
        assert isinstance(running.exception(), ValueError)
        assert pool.submit(torch.get_num_threads).result() == 2


def test_attacks_in_several_threads_are_those_of_one():
    models = [small_cnn(seed=seed) for seed in range(6)]
    gradients = [rgap.client_gradients(model, IMAGE, LABEL) for model in models]
    expected = [attack(*pair) for pair in zip(models, gradients, strict=True)]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(attack, models, gradients))
    assert [r.verdict for r in found] == [r.verdict for r in expected]
    assert all(torch.allclose(r.images, e.images, atol=1e-9) for r, e in zip(found, expected, strict=True))


def test_forward_passes_of_other_threads_are_left_alone_while_a_network_is_traced():
    tracing, leave = threading.Event(), threading.Event()

    class Slow(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, x):
            tracing.set()
            leave.wait(10)
            return self.linear(x.flatten(1))

    shared = Slow()
    with ThreadPoolExecutor(1) as pool:
        prepared = pool.submit(rgap.prepare, shared, (1, 2, 2))
        tracing.wait(10)
        foreign = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
        outputs, own = foreign(torch.ones(1, 4)), shared.linear(torch.ones(1, 4))
        leave.set()
        assert [layer.name for layer in prepared.result().layers] == ["linear"]
    assert outputs.shape == (1, 3) and type(own) is torch.Tensor
    assert nn.Module.__call__.__name__ == "_wrapped_call_impl"


def test_lazy_modules_stay_as_they_are_and_are_refused():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LeakyReLU(0.2), nn.Flatten(), nn.LazyLinear(1))
    for call in (lambda: rgap.prepare(model, SHAPE), lambda: rgap.rank_analysis(model, SHAPE)):
        with pytest.raises(ValueError, match=r"lazy modules: '0.weight' has no shape yet; run the network on an image"):
            call()
    assert isinstance(model[0].weight, nn.UninitializedParameter)


def test_the_device_is_checked_before_everything_else():
    with pytest.raises(ValueError, match="device is 'abacus'"):
        rgap.reconstruct("no model", None, None, "no loss", device="abacus")
