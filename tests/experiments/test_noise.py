"""Noise: what the values betray, predicted errors, verdicts, and the sweeps and figures over them."""

import math

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from cases import rand, randn, small_cnn

import rgap
from rgap import client
from rgap.experiments import plots, sweeps
from rgap.experiments.sweeps import noise as noise_sweeps
from rgap.noise import entry_noise

SHAPE, IMAGES, LABELS = (3, 8, 8), rand(2, 3, 8, 8), torch.tensor([0, 1])
GRADIENTS = {"w": randn(40, 30), "b": randn(40, seed=1)}


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def rms(x):
    return x.square().mean().sqrt().item()


@pytest.mark.parametrize("name", ["float16", "bfloat16", "int8"])
def test_formats_and_grids_betray_their_rounding(name):
    shared = client.quantise(GRADIENTS, name)
    stds = entry_noise(shared)
    for key, g in GRADIENTS.items():
        assert stds[key].shape == g.shape
        assert rms(shared[key] - g) / 1.6 < rms(stds[key]) < 1.6 * rms(shared[key] - g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_saturated_softmax_is_no_coarse_grid_and_no_coarse_format(dtype):
    bias = torch.full((200,), 1e-250 if dtype == torch.float64 else 0.0, dtype=torch.float64)
    bias[3], bias[7] = 1.0, -1.0
    stds = entry_noise({"w": GRADIENTS["w"].to(dtype).double(), "b": bias})
    eps = torch.finfo(dtype).eps
    assert 0.1 * eps < rms(stds["w"]) < 2 * eps and stds["b"].max() < 2 * eps
    assert (entry_noise({"b": bias.sign()})["b"] < 1e-15).all()


def test_a_network_with_a_saturated_softmax_predicts_its_error():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        conv = torch.nn.Conv2d(3, 20, 3, 2, 1)
        modules = [conv, torch.nn.LeakyReLU(0.2), torch.nn.Flatten(), torch.nn.Linear(320, 120)]
        network = torch.nn.Sequential(*modules).double()
        with torch.no_grad():
            network[3].weight.uniform_(-30, 30)
    gradients = rgap.client_gradients(network, IMAGES[:1], torch.tensor([5]), "cross_entropy")
    assert gradients[-1].abs().sort().values[-3:].tolist() == pytest.approx([0, 1, 1], abs=1e-3)
    result = rgap.reconstruct(network, gradients, SHAPE, "cross_entropy")
    rmse = (result.images - IMAGES[:1]).square().mean().sqrt().item()
    assert result.verdict == "exact" and rmse < 1e-8
    assert rmse / 30 < result.candidates[0].predicted_error < 1e-7


def test_pruning_is_betrayed_by_zeros_where_none_would_be():
    shared = client.prune(GRADIENTS, 0.3)
    stds = entry_noise(shared)
    for key, g in GRADIENTS.items():
        gone = shared[key] == 0
        assert rms(g[gone]) / 1.6 < rms(stds[key][gone]) < 1.6 * rms(g[gone])
        assert (stds[key][~gone] < 1e-12).all()
    few = {"w": GRADIENTS["w"].clone()}
    few["w"][0] = 0.0  # a unit that is dead
    assert (entry_noise(few)["w"] < 1e-12).all()


def test_one_zero_is_proof_where_the_network_makes_none():
    draw = torch.randn(40, 50, generator=torch.Generator().manual_seed(0)).double()
    heavy = draw**3  # so heavy-tailed that nothing sets the small entries apart
    light = client.prune({"w": heavy}, 0.03)
    gone = light["w"] == 0
    assert (entry_noise(light)["w"][gone] < 1e-12).all()
    stds = entry_noise(light, has_zeros=False)["w"]
    assert rms(heavy[gone]) / 3 < rms(stds[gone]) < 3 * rms(heavy[gone])
    heavy[3], heavy[:, 7] = 0, 0  # a silent output, a black pixel
    assert not entry_noise({"w": heavy}, has_zeros=False)["w"][heavy == 0].gt(1e-12).any()


def test_declared_noise_is_added_and_zeros_are_exact():
    stds = entry_noise({"w": GRADIENTS["w"], "z": torch.zeros(3)}, 0.5)
    assert rms(stds["w"]) == pytest.approx(0.5) and rms(stds["z"]) == pytest.approx(0.5)
    assert not entry_noise({"z": torch.zeros(3)})["z"].any()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("strength", [1e-9, 1e-6, 1e-4])
def test_predicted_errors_of_every_layer_are_the_measured_ones(bias, strength):
    network = small_cnn(bias=bias)
    chain = rgap.prepare(network, SHAPE)
    shared = sweeps_defend(network, "noise", strength)
    std = strength * noise_sweeps.root_mean_square(rgap.client_gradients(network, IMAGES[:1], LABELS[:1]))
    result = rgap.reconstruct(chain, shared, noise_std=std)
    table = sweeps.predicted_and_true(chain, IMAGES[:1], result)
    assert table["layer"].tolist() == ["5", "2", "0"]
    assert (table["predicted"] / table["rmse"]).between(1 / 4, 4).all()


def sweeps_defend(network, defence, strength, seed=1):
    return noise_sweeps.defend(rgap.client_gradients(network, IMAGES[:1], LABELS[:1]), defence, strength, seed)


def test_every_defence_has_its_name_and_others_are_refused():
    network = small_cnn()
    plain = sweeps_defend(network, "none", 0)
    for defence, strength in [("noise", 0.1), ("dp-sgd", 0.1), ("prune", 0.5), ("quantise", "int8")]:
        assert not sweeps_defend(network, defence, strength)[0].equal(plain[0])
    with pytest.raises(ValueError, match="defence is 'hope'; it must be none, noise"):
        sweeps_defend(network, "hope", 1)


def test_a_sweep_has_a_row_for_each_attack_and_repeats():
    strengths = {"noise": [1e-6, 1e-3], "dp-sgd": [1e-9], "quantise": ["float16"]}
    table, results = sweeps.defended_attacks(small_cnn, IMAGES, LABELS, [0, 1], strengths, dtype="float64")
    assert len(table) == len(results) == 16 and table["verdict"].tolist() == [r.verdict for r in results]
    assert table.groupby("defence").size().to_dict() == {"dp-sgd": 4, "noise": 8, "quantise": 4}
    again, _ = sweeps.defended_attacks(small_cnn, IMAGES, LABELS, [0, 1], strengths, dtype="float64")
    pd.testing.assert_frame_equal(table, again)
    assert table[table["strength"] == 1e-6]["psnr_db"].min() > 40
    # Clipping makes the brightness unknowable, and only that.
    assert table[table["defence"] == "dp-sgd"]["psnr_db"].min() > 60


@pytest.mark.slow
def test_forty_noisy_attacks_without_a_false_certificate():
    sample = sweeps.sample_noisy_attacks(40, seed=1)
    assert list(sample.columns[:3]) == ["case", "verdict", "psnr_db"] and len(sample) == 40
    assert sample["ok"].all(), sample[~sample["ok"]].to_string()
    assert (sample["verdict"] == "exact").sum() >= 5 and sample["psnr_db"].notna().all()


def test_the_sample_sees_exceptions_nan_and_false_certificates(monkeypatch):
    def broken(*_):
        raise RuntimeError("no convergence")

    monkeypatch.setattr(noise_sweeps, "reconstruct", broken)
    failed = sweeps.sample_noisy_attacks(2)
    assert failed["why"].tolist() == ["RuntimeError: no convergence"] * 2 and not failed["ok"].any()
    result = rgap.reconstruct(small_cnn(), rgap.client_gradients(small_cnn(), IMAGES[:1], LABELS[:1]), SHAPE)
    assert noise_sweeps._complaint(result, {"predicted": 1e-9, "rmse": 0.1}).startswith("certified, and off by 0.1")
    assert noise_sweeps._complaint(result, {"predicted": 0.05, "rmse": 0.1}) == ""
    lost = [rgap.Candidate(math.nan * c.images, c.labels, 0.0, True) for c in result.candidates]
    nan = rgap.Reconstruction(result.images, result.labels, "inconsistent", tuple(lost), ())
    assert noise_sweeps._complaint(nan, {}) == "the image holds NaN or infinity"


def test_the_figures_show_every_numeric_defence_and_every_point():
    rows = [
        {"defence": d, "strength": s, "psnr_db": 50.0, "plain_db": 10.0, "ssim": 0.9}
        for d in ("noise", "prune") for s in (0.01, 0.1)
    ]  # fmt: skip
    runs = pd.DataFrame([*rows, rows[0] | {"defence": "quantise", "strength": "int8"}])
    figure = plots.defence_quality(runs)
    figure.canvas.draw()
    assert len(figure.axes) == 4 and all(axis.get_xscale() == "log" for axis in figure.axes)
    errors = pd.DataFrame({"defence": ["noise", "prune"], "rmse": [1e-6, 1e-2], "predicted": [2e-6, 1e-2]})
    (axis,) = plots.predicted_against_measured(errors).axes
    assert axis.get_xscale() == axis.get_yscale() == "log" and len(axis.collections[0].get_offsets()) == 2


def test_noise_that_came_with_one_gradient_is_added_to_that_one():
    plain, noisy = entry_noise(GRADIENTS), entry_noise(GRADIENTS, known={"w": 1e-3})
    assert noisy["b"].equal(plain["b"])
    torch.testing.assert_close(noisy["w"], (plain["w"].square() + 1e-6).sqrt())


def test_the_error_behind_an_update_is_predicted_from_the_weights_rounding():
    network = small_cnn().float()
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    gradients = rgap.client_gradients(network, IMAGES[:1], LABELS[:1])
    after = {name: p - 0.1 * g for (name, p), g in zip(before.items(), gradients, strict=True)}
    result = rgap.reconstruct(network, client.gradients_from_update(before, after, 0.1), SHAPE)
    error = (result.images - IMAGES[:1]).square().mean().sqrt().item()
    assert result.verdict == "exact" and error / 10 < result.candidates[0].predicted_error < 10 * error
