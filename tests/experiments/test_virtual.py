import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from cases import SECOND, convs, rand, rendered
from matplotlib.colors import to_hex
from torch.testing import assert_close

import rgap
from rgap.experiments import virtual as experiment
from rgap.experiments.common import attack_each

DEFICIENT = {
    "make_model": lambda seed: convs(*SECOND, seed=seed),
    "images": rand(1, 3, 12, 12),
    "labels": torch.tensor([0]),
}


def test_wrong_signs_fall_to_none_where_virtual_constraints_close_the_layer():
    table, (result,) = attack_each(seeds=[0], dtypes=["float64"], **DEFICIENT)
    assert table.verdict.tolist() == ["exact"]
    chain = rgap.prepare(DEFICIENT["make_model"](0), (3, 12, 12))
    history = experiment.wrong_signs(chain, DEFICIENT["images"], result)
    assert list(history.columns) == ["layer", "step", "wrong", "largest"] and set(history.layer) == {"2"}
    assert history.step.tolist() == list(range(1, len(history) + 1))
    assert history.wrong.iloc[-1] == 0 <= history.wrong.iloc[0]
    truth, beliefs = chain.layer_inputs(DEFICIENT["images"])["2"].flatten(), result.candidates[0].beliefs["2"]
    wrong = [(x > 0) != (truth > 0) for x in beliefs]
    assert history.wrong.tolist() == [int(w.sum()) for w in wrong] and history.largest.iloc[-1] == 0
    assert history.largest[0] == pytest.approx((truth[wrong[0]].abs().max() / truth.square().mean().sqrt()).item())
    assert_close(beliefs[-1], truth, rtol=0, atol=1e-3)


def test_without_virtual_constraints_there_is_no_history():
    table, (result,) = attack_each(seeds=[0], virtual_constraints=False, **DEFICIENT)
    assert table.verdict.tolist() == ["rank-deficient"] and math.isfinite(table.psnr_db[0])
    chain = rgap.prepare(DEFICIENT["make_model"](0), (3, 12, 12))
    history = experiment.wrong_signs(chain, DEFICIENT["images"], result)
    assert history.empty and list(history.columns) == ["layer", "step", "wrong", "largest"]


def runs(widths=(24, 22, 20, 18), deficits=(0, 82, 280, 486)):
    """PSNR 100 dB with virtual constraints up to a deficit of 280; plain only without a deficit."""
    rows = []
    for width, deficit in zip(widths, deficits, strict=True):
        for virtual in (False, True):
            exact = deficit == 0 or (virtual and deficit <= 280)
            verdict = "exact" if exact else "rank-deficient"
            for noise in (0, 3):
                psnr = (100 if exact else 10) + noise
                rows.append(
                    {"width": width, "deficit": deficit, "psnr_db": psnr, "verdict": verdict, "virtual": virtual}
                )
    return pd.DataFrame(rows)


def test_the_phase_transition_shows_medians_certificates_and_thresholds():
    (axis,) = rendered(experiment.plot_phase_transition(runs(), {"supplied": 396, "never": 9999}))
    assert axis.get_xlabel() == "channels of the second layer" and axis.get_ylabel() == "PSNR, dB"
    assert axis.xaxis_inverted()
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels == ["certified as exact", "not certified"]
    virtual, plain, *edges = axis.lines
    np.testing.assert_allclose(plain.get_ydata(), [101.5, 11.5, 11.5, 11.5])
    np.testing.assert_allclose(virtual.get_ydata(), [101.5, 101.5, 101.5, 11.5])
    assert [edge.get_xdata()[0] for edge in edges] == [23, 19]
    named = ["no deficit\n(deficit ≤ 0)", "supplied\n(deficit ≤ 396)", "with virtual\nconstraints", "plain R-GAP"]
    assert [text.get_text() for text in axis.texts] == named
    filled = [len(c.get_offsets()) for c in axis.collections if to_hex(c.get_facecolor()[0]) != "#ffffff"]
    assert filled[:2] == [6, 2]


def test_where_everything_is_determined_no_threshold_is_drawn():
    (axis,) = rendered(experiment.plot_phase_transition(runs((30, 26), (0, 0)), {"supplied": 396}))
    assert len(axis.lines) == 2 and len(axis.texts) == 2


def test_wrong_signs_have_a_line_for_each_image():
    history = pd.DataFrame({"image": [0, 0, 0, 7, 7], "step": [1, 2, 3, 1, 2], "wrong": [400, 20, 0, 300, 1]})
    history = history.assign(layer="2", largest=3e-7)
    (axis,) = rendered(experiment.plot_wrong_signs(history))
    assert (axis.get_xlabel(), axis.get_ylabel(), axis.get_yscale()) == (
        "step of the inference",
        "wrong signs",
        "symlog",
    )
    assert [text.get_text() for text in axis.texts] == ["entry of at most\n3e-07 rms", "image 0", "image 7"]
    assert axis.get_xticks().tolist() == [1, 2, 3] and axis.get_ylim()[0] == pytest.approx(-0.3)
    np.testing.assert_array_equal(axis.lines[0].get_ydata(), [400, 20, 0])


def test_more_images_than_markers():
    rows = [(i, step, 2 - step, 0.0) for i in range(9) for step in (1, 2)]
    history = pd.DataFrame(rows, columns=["image", "step", "wrong", "largest"])
    assert len(rendered(experiment.plot_wrong_signs(history))[0].texts) == 9


def test_attacks_with_and_without_virtual_constraints_stand_beside_each_other():
    layer = SimpleNamespace(deficit=280, virtual_constraints=960, iterations=4)
    results = [SimpleNamespace(layers=[SimpleNamespace(deficit=0), layer])]
    plain, solved = (
        pd.DataFrame({"psnr_db": [q], "verdict": [v], "seconds": [s]})
        for q, v, s in ((-1.2, "rank-deficient", 1.0), (99.6, "exact", 4.0))
    )
    table, times = experiment.compared(plain, solved, results)
    assert table.iloc[0].tolist() == [280, 960, -1.0, "rank-deficient", 100.0, "exact"]
    assert times.iloc[0].tolist() == [4, 4.0, 1.0]
