import pandas as pd
import pytest
import torch
from cases import rendered, small_cnn

from rgap.experiments import cost


def test_costs_are_measured_and_their_exponents_fitted(monkeypatch):
    monkeypatch.setattr(cost, "cnn6_for", lambda side: small_cnn().float())
    measured = cost.costs([8], [8], [4, 8])
    assert len(measured) == 16 and (measured["seconds"] > 0).all()
    found = measured.dropna().groupby("network")["psnr_db"].min()
    assert set(found.index) == {"cnn6", "expanding", "fcn3"} and (found > 60).all()
    table = pd.DataFrame({"network": "n", "against": "side", "value": [1, 2, 4], "method": "m", "seconds": [3, 12, 48]})
    assert cost.exponents(table)["exponent"].tolist() == [pytest.approx(2)]
    monkeypatch.undo()
    assert cost.cnn6_for(16)(torch.zeros(1, 3, 16, 16)).shape == (1, 1)


def test_the_deficit_of_cnn6_grows_with_the_image():
    table = cost.deficits([32, 57, 58, 64])
    assert table["deficit"].tolist() == [0, 0, 108, 72]
    assert table["layer"].tolist()[2:] == ["2", "2"] and table["rank"].tolist()[3] == 12996


def test_cost_has_a_panel_a_network_and_names_the_exponent():
    rows = [("n", "side", v, m, k * v) for v in (1, 2) for m, k in (("a", 1.0), ("b", 5.0))]
    table = pd.DataFrame(rows, columns=["network", "against", "value", "method", "seconds"])
    slopes = pd.DataFrame({"network": "n", "against": "side", "method": ["a", "b"], "exponent": [1.0, 1.0]})
    (axis,) = rendered(cost.plot_cost(table, slopes, {"b": "ours", "a": "theirs"}))
    assert axis.get_xscale() == axis.get_yscale() == "log" and "pixels" in axis.get_xlabel()
    assert {t.get_text() for t in axis.texts} == {"ours", "theirs"} and "ours ∝ side" in axis.get_title()


def test_an_optimiser_stands_beside_the_closed_form_and_chunks_go_on_where_others_end(monkeypatch):
    monkeypatch.setattr(cost, "USUAL_STEPS", {"DLG": 3, "Inverting Gradients": 3})
    monkeypatch.setattr(cost, "USUAL_RESTARTS", 1)
    table = cost.sample_opponents(count=2, seed=4)
    assert table["case"].tolist() == ["fcn3, image 0, DLG", "fcn3, image 0, Inverting Gradients"]
    assert (table["ours_db"] > 100).all() and table["ok"].all() and (table["steps"] == 3).all()
