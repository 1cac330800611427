import math

import pandas as pd
import pytest
import torch
from cases import rand, small_cnn

import rgap
from rgap.experiments import noise as experiment

SHAPE, IMAGES, LABELS = (3, 8, 8), rand(2, 3, 8, 8), torch.tensor([0, 1])


def defended(network, defence, strength, seed=1):
    return experiment.defend(rgap.client_gradients(network, IMAGES[:1], LABELS[:1]), defence, strength, seed)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("strength", [1e-9, 1e-6, 1e-4])
def test_predicted_errors_of_every_layer_are_the_measured_ones(bias, strength):
    network = small_cnn(bias=bias)
    chain = rgap.prepare(network, SHAPE)
    shared = defended(network, "noise", strength)
    std = strength * experiment.root_mean_square(rgap.client_gradients(network, IMAGES[:1], LABELS[:1]))
    result = rgap.reconstruct(chain, shared, noise_std=std, gradient_scale=1.0)
    table = experiment.predicted_and_true(chain, IMAGES[:1], result)
    assert table["layer"].tolist() == ["5", "2", "0"]
    assert (table["predicted"] / table["rmse"]).between(1 / 4, 4).all()


def test_every_defence_has_its_name_and_others_are_refused():
    network = small_cnn()
    plain = rgap.client_gradients(network, IMAGES[:1], LABELS[:1])
    for defence, strength in [("noise", 0.1), ("dp-sgd", 0.1), ("prune", 0.5), ("quantise", "int8")]:
        assert not defended(network, defence, strength)[0].equal(plain[0])
    with pytest.raises(ValueError, match="defence is 'hope'; it must be noise, dp-sgd"):
        defended(network, "hope", 1)


def test_a_sweep_has_a_row_for_each_attack_and_repeats():
    strengths = {"noise": [1e-6, 1e-3], "dp-sgd": [1e-9], "quantise": ["float16"]}
    table, results = experiment.defended_attacks(small_cnn, IMAGES, LABELS, [0, 1], strengths, dtype="float64")
    assert len(table) == len(results) == 16 and table["verdict"].tolist() == [r.verdict for r in results]
    assert table.groupby("defence").size().to_dict() == {"dp-sgd": 4, "noise": 8, "quantise": 4}
    again, _ = experiment.defended_attacks(small_cnn, IMAGES, LABELS, [0, 1], strengths, dtype="float64")
    pd.testing.assert_frame_equal(table, again)
    assert table[table["strength"] == 1e-6]["psnr_db"].min() > 40
    # Clipping makes the brightness unknowable, and only that.
    assert table[table["defence"] == "dp-sgd"]["psnr_db"].min() > 60


def make(seed):
    return small_cnn(seed).float()


def test_normal_weights_are_drawn_anew_by_the_seed():
    draw = experiment.normal_weights(make, 0.01)
    values = torch.cat([p.detach().flatten() for p in draw(0).parameters()])
    assert values.std().item() == pytest.approx(0.01, rel=0.2) and abs(values.mean().item()) < 0.001
    assert all(p.equal(q) for p, q in zip(draw(0).parameters(), draw(0).parameters(), strict=True))
    assert not next(draw(0).parameters()).equal(next(draw(1).parameters()))


def test_the_figures_show_every_numeric_defence_and_every_point():
    rows = [
        {"defence": d, "strength": s, "psnr_db": 50.0, "plain_db": 10.0, "ssim": 0.9}
        for d in ("noise", "prune") for s in (0.01, 0.1)
    ]  # fmt: skip
    runs = pd.DataFrame([*rows, rows[0] | {"defence": "quantise", "strength": "int8"}])
    figure = experiment.plot_quality(runs)
    figure.canvas.draw()
    assert len(figure.axes) == 2 and all(axis.get_xscale() == "log" for axis in figure.axes)
    errors = pd.DataFrame({"defence": ["noise", "prune"], "rmse": [1e-6, 1e-2], "predicted": [2e-6, 1e-2]})
    (axis,) = experiment.plot_predicted(errors).axes
    assert axis.get_xscale() == axis.get_yscale() == "log" and len(axis.collections) == 2


def test_means_have_the_share_lost_and_the_epsilon_of_dp_sgd():
    rows = [("noise", 1e-3, 30.0, 5.0, 0.9), ("noise", 1e-3, 10.0, 5.0, 0.7), ("dp-sgd", 1.0, 5.0, 5.0, 0.1)]
    runs = pd.DataFrame(rows, columns=["defence", "strength", "psnr_db", "plain_db", "ssim"])
    noise, private = experiment.mean_quality(runs).to_dict("records")
    assert (noise["psnr_db"], noise["lost"], private["lost"]) == (20.0, 0.5, 1.0) and math.isnan(noise["epsilon"])
    assert private["epsilon"] == pytest.approx(rgap.client.epsilon(1.0))
