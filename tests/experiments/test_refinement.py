"""What each part of the attack adds, and Inverting Gradients beside it."""

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from cases import rand, small_cnn

import rgap
from rgap.experiments import plots, sweeps
from rgap.experiments.sweeps import refinement

IMAGES, LABELS = rand(2, 3, 8, 8).float(), torch.tensor([0, 1])


def make(seed):
    return small_cnn(seed).float()


def test_every_stage_has_its_row_and_its_image_and_noise_is_found():
    strengths = {"noise": [1e-3], "quantise": ["bfloat16"]}
    table, found = sweeps.attack_stages({"a": make}, IMAGES, LABELS, [0, 1], strengths, steps=3)
    assert len(table) == 2 * 2 * 2 * 5 and table["method"].tolist()[:5] == list(sweeps.STAGES)
    assert set(found) == {("a", d, s, m) for d, (s,) in strengths.items() for m in sweeps.STAGES}
    assert all(images.shape == (2, 3, 8, 8) for images in found.values())
    gradients = sweeps.noise.defend(rgap.client_gradients(make(0), IMAGES[:1], LABELS[:1]), "noise", 1e-3, seed=0)
    result = rgap.reconstruct(make(0), gradients, (3, 8, 8))
    torch.testing.assert_close(found["a", "noise", 1e-3, "+ noise found"][:1], result.images)
    row = table.query("defence == 'noise' and method == '+ noise found' and seed == 0 and image == 0")
    assert row["psnr_db"].item() == pytest.approx(rgap.metrics.psnr_db(result.images, IMAGES[:1].double()).item())


def test_no_stage_gets_an_image(monkeypatch):
    def spy(chain, gradients, label, steps):
        assert isinstance(chain, rgap.Chain) and all(torch.is_tensor(g) for g in gradients) and label.shape == (1,)
        return {"only": torch.zeros(1, 3, 8, 8).double()}

    monkeypatch.setattr(refinement, "_stages", spy)
    table, _ = sweeps.attack_stages({"a": make}, IMAGES, LABELS, [0], {"noise": [0.1]}, steps=3)
    assert table["method"].tolist() == ["only"] * 2


def test_normal_weights_are_drawn_anew_by_the_seed():
    draw = sweeps.normal_weights(make, 0.01)
    values = torch.cat([p.detach().flatten() for p in draw(0).parameters()])
    assert values.std().item() == pytest.approx(0.01, rel=0.2) and abs(values.mean().item()) < 0.001
    assert all(p.equal(q) for p, q in zip(draw(0).parameters(), draw(0).parameters(), strict=True))
    assert not next(draw(0).parameters()).equal(next(draw(1).parameters()))


def test_the_figure_has_a_panel_for_each_kind_of_weights_and_a_marker_for_each_method():
    rows = [
        {"weights": w, "defence": "noise", "strength": s, "method": m, "psnr_db": 20.0}
        for w, strengths in (("a", (0.1, 0.2)), ("b", (0.1,))) for s in strengths for m in sweeps.STAGES
    ]  # fmt: skip
    figure = plots.stage_quality(pd.DataFrame(rows), sweeps.STAGES)
    figure.canvas.draw()
    assert [axis.get_title() for axis in figure.axes] == ["a", "b"]
    assert all(len(axis.lines) == len(sweeps.STAGES) for axis in figure.axes)
    assert len({line.get_marker() for line in figure.axes[0].lines}) == len(sweeps.STAGES)
    plt.close(figure)
