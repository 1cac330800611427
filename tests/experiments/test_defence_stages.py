import pandas as pd
import pytest
import torch
from cases import rand, small_cnn

import rgap
from rgap.experiments import defence_stages as experiment
from rgap.experiments.noise import defend

IMAGES, LABELS = rand(2, 3, 8, 8), torch.tensor([0, 1])


def make(seed):
    return small_cnn(seed).float()


def test_every_stage_has_its_row_and_its_image_and_noise_is_found():
    strengths = {"noise": [1e-3], "quantise": ["bfloat16"]}
    table, found = experiment.attack_stages({"a": make}, IMAGES, LABELS, [0, 1], strengths, steps=3)
    assert len(table) == 2 * 2 * 2 * 5 and table["method"].tolist()[:5] == list(experiment.STAGES)
    assert set(found) == {("a", d, s, m) for d, (s,) in strengths.items() for m in experiment.STAGES}
    assert all(images.shape == (2, 3, 8, 8) for images in found.values())
    gradients = defend(rgap.client_gradients(make(0), IMAGES[:1], LABELS[:1]), "noise", 1e-3, seed=0)
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


def test_the_figure_has_a_panel_for_each_kind_of_weights_and_a_marker_for_each_method():
    rows = [
        {"weights": w, "defence": "noise", "strength": s, "method": m, "psnr_db": 20.0}
        for w, strengths in (("a", (0.1, 0.2)), ("b", (0.1,))) for s in strengths for m in experiment.STAGES
    ]  # fmt: skip
    figure = experiment.plot_stages(pd.DataFrame(rows), experiment.STAGES)
    figure.canvas.draw()
    assert [axis.get_title() for axis in figure.axes] == ["a", "b"]
    assert len(figure.legends[0].get_texts()) == len(experiment.STAGES)
    assert len({line.get_marker() for line in figure.axes[0].lines}) == len(experiment.STAGES)


def test_kinds_of_weights_have_strengths_of_their_own(monkeypatch):
    monkeypatch.setattr(experiment, "_stages", lambda *_: {"only": torch.zeros(1, 3, 8, 8).double()})
    kinds = {"a": (make, {"noise": [0.1, 0.2]}), "b": (make, {"prune": [0.5]})}
    table, guesses = experiment.attack_kinds(kinds, IMAGES[:1], LABELS[:1], [0], steps=3)
    assert table["weights"].tolist() == ["a", "a", "b"] and len(guesses) == 3
