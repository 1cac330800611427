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


@pytest.mark.slow
def test_forty_noisy_attacks_without_a_false_certificate():
    sample = experiment.sample_noisy_attacks(40, seed=1)
    assert list(sample.columns[:3]) == ["case", "verdict", "psnr_db"] and len(sample) == 40
    assert sample["ok"].all(), sample[~sample["ok"]].to_string()
    assert (sample["verdict"] == "exact").sum() >= 5 and sample["psnr_db"].notna().all()


def test_the_sample_sees_exceptions_nan_and_false_certificates(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no convergence")

    monkeypatch.setattr(experiment, "reconstruct", broken)
    failed = experiment.sample_noisy_attacks(2)
    assert failed["why"].tolist() == ["RuntimeError: no convergence"] * 2 and not failed["ok"].any()
    result = rgap.reconstruct(
        small_cnn(), rgap.client_gradients(small_cnn(), IMAGES[:1], LABELS[:1]), SHAPE, gradient_scale=1.0
    )
    assert experiment._complaint(result, {"predicted": 1e-9, "rmse": 0.1}).startswith("certified, and off by 0.1")
    assert experiment._complaint(result, {"predicted": 0.05, "rmse": 0.1}) == ""
    lost = [rgap.Candidate(math.nan * c.images, c.labels, 0.0, True) for c in result.candidates]
    nan = rgap.Reconstruction(result.images, result.labels, "inconsistent", tuple(lost), ())
    assert experiment._complaint(nan, {}) == "the image holds NaN or infinity"


def make(seed):
    return small_cnn(seed).float()


def test_every_stage_has_its_row_and_its_image_and_noise_is_found():
    strengths = {"noise": [1e-3], "quantise": ["bfloat16"]}
    table, found = experiment.attack_stages({"a": make}, IMAGES, LABELS, [0, 1], strengths, steps=3)
    assert len(table) == 2 * 2 * 2 * 5 and table["method"].tolist()[:5] == list(experiment.STAGES)
    assert set(found) == {("a", d, s, m) for d, (s,) in strengths.items() for m in experiment.STAGES}
    assert all(images.shape == (2, 3, 8, 8) for images in found.values())
    gradients = experiment.defend(rgap.client_gradients(make(0), IMAGES[:1], LABELS[:1]), "noise", 1e-3, seed=0)
    result = rgap.reconstruct(make(0), gradients, (3, 8, 8), gradient_scale=1.0)
    torch.testing.assert_close(found["a", "noise", 1e-3, "+ noise found"][:1], result.images)
    row = table.query("defence == 'noise' and method == '+ noise found' and seed == 0 and image == 0")
    assert row["psnr_db"].item() == pytest.approx(rgap.metrics.psnr_db(result.images, IMAGES[:1].double()).item())


def test_no_stage_gets_an_image(monkeypatch):
    def spy(chain, gradients, label, steps):
        assert isinstance(chain, rgap.Chain) and all(torch.is_tensor(g) for g in gradients) and label.shape == (1,)
        return {"only": torch.zeros(1, 3, 8, 8).double()}

    monkeypatch.setattr(experiment, "_stages", spy)
    table, _ = experiment.attack_stages({"a": make}, IMAGES, LABELS, [0], {"noise": [0.1]}, steps=3)
    assert table["method"].tolist() == ["only"] * 2


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
    assert len(figure.axes) == 4 and all(axis.get_xscale() == "log" for axis in figure.axes)
    errors = pd.DataFrame({"defence": ["noise", "prune"], "rmse": [1e-6, 1e-2], "predicted": [2e-6, 1e-2]})
    (axis,) = experiment.plot_predicted(errors).axes
    assert axis.get_xscale() == axis.get_yscale() == "log" and len(axis.collections[0].get_offsets()) == 2


def test_the_figure_has_a_panel_for_each_kind_of_weights_and_a_marker_for_each_method():
    rows = [
        {"weights": w, "defence": "noise", "strength": s, "method": m, "psnr_db": 20.0}
        for w, strengths in (("a", (0.1, 0.2)), ("b", (0.1,))) for s in strengths for m in experiment.STAGES
    ]  # fmt: skip
    figure = experiment.plot_stages(pd.DataFrame(rows), experiment.STAGES)
    figure.canvas.draw()
    assert [axis.get_title() for axis in figure.axes] == ["a", "b"]
    assert all(len(axis.lines) == len(experiment.STAGES) for axis in figure.axes)
    assert len({line.get_marker() for line in figure.axes[0].lines}) == len(experiment.STAGES)
