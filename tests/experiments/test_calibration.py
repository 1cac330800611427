import math

import numpy as np
import pandas as pd
import pytest
import torch

from rgap.experiments import calibration
from rgap.experiments.calibration import calibration_table, false_rate, sample_calibration
from rgap.experiments.clients import ALL_CLIENTS, CLIENTS, random_case
from rgap.results import Candidate, Reconstruction


def test_small_networks_are_attacked_and_no_certificate_is_false():
    sample = sample_calibration(len(CLIENTS), seed=5)
    assert sample["ok"].all() and set(sample["client"]) == set(CLIENTS)
    clean = sample[sample["client"] == "clean"]
    assert (clean["verdict"] == "exact").all() and (clean["psnr_db"] > 100).all()
    certified = sample["verdict"] == "exact"
    assert sample["certified_psnr_db"].notna().equals(certified)
    assert np.allclose(sample["certified_psnr_db"][certified], -20 * np.log10(sample["predicted"][certified]))
    assert sample_calibration(2, seed=5).equals(sample_calibration(2, seed=5))


def test_a_certificate_of_another_image_is_false():
    case = random_case(np.random.default_rng(0))
    other = torch.zeros_like(case.images)
    candidate = Candidate(case.images.double(), case.labels, 0.0, True, predicted_error=1e-3)
    result = Reconstruction(candidate.images, case.labels, "exact", (candidate,), ())
    assert calibration.attack_outcome(result, case.images)["ok"]
    found = calibration.attack_outcome(result, other)
    assert not found["ok"] and "certified, and off by" in found["why"]
    assert calibration.attack_outcome(result, other, second=case.images)["ok"]
    assert not calibration.attack_outcome(result, other, second=1 - case.images)["ok"]


def attacks(ratios, predicted=1e-3, ok=True):
    rmse = predicted * np.array(ratios)
    return pd.DataFrame({"verdict": "exact", "predicted": predicted, "rmse": rmse, "ok": ok})


def test_certified_attacks_are_binned_by_their_predicted_error():
    table = calibration_table(pd.concat([attacks([1.0, 2.0, 4.0], 2e-3), attacks([0.5], 2e-5)]))
    assert table["certified"].tolist() == [1, 3] and table["median"].tolist() == pytest.approx([0.5, 2.0])
    assert table["within_3"].tolist() == pytest.approx([1.0, 2 / 3])
    assert table["quantile_95"].iloc[1] == pytest.approx(3.8)
    unsure = attacks([100.0]).assign(verdict="inconsistent")
    assert calibration_table(pd.concat([attacks([1.0]), unsure]))["certified"].sum() == 1


def test_long_runs_are_joined_into_the_tables_that_the_notebook_reads(tmp_path):
    for seed in (1, 2):
        sample_calibration(2, seed).to_csv(tmp_path / f"{seed}.csv", index=False)
    rate = calibration.write_verified([tmp_path / "1.csv", tmp_path / "2.csv"], tmp_path / "verified")
    bins, clients, read = calibration.read_verified(tmp_path / "verified")
    assert rate["attacks"] == read["attacks"] == clients["attacks"].sum() == 4 and read["seeds"] == "1 to 2"
    assert bins["certified"].sum() == rate["certified"] and (bins["above"] < bins["up_to"]).all()
    assert clients.set_index("client").loc["clean"].tolist() == [2, 2, 0, 2, 1.0]
    with pytest.raises(ValueError, match="cases in common"):
        calibration.write_verified([tmp_path / "1.csv"] * 2, tmp_path)


def test_the_rate_of_false_certificates_has_its_clopper_pearson_bound():
    rate = false_rate(attacks(np.ones(1000)))
    assert rate["false"] == 0 and rate["certified"] == 1000
    assert rate["at_most"] == pytest.approx(1 - 0.05 ** (1 / 1000))
    some = pd.concat([attacks(np.ones(98)), attacks([9.0, 9.0], ok=False)])
    assert false_rate(some)["false"] == 2 and 0.02 < false_rate(some)["at_most"] < 0.07
    assert math.isclose(false_rate(attacks([]))["at_most"], 1.0)


def test_every_kind_of_client_is_attacked_and_none_certified_wrongly():
    rows = calibration.sample_clients(26, 3)
    assert list(rows["client"].unique()) == list(ALL_CLIENTS) and rows["ok"].all()
    table = calibration.clients_by_kind(rows)
    assert table["attacks"].tolist() == [2] * 13 + [26] and table["wrong_exact"].sum() == 0


def test_the_table_counts_what_was_found_and_certified():
    rows = pd.DataFrame({
        "client": ["clipped", "clipped", "clipped", "autocast"],
        "verdict": ["exact", "inconsistent", "exact", "exact"],
        "psnr_db": [90.0, 80.0, 20.0, 90.0],
        "identifiable": [True, True, True, True],
        "ok": [True, True, False, True],
    })  # fmt: skip
    table = calibration.clients_by_kind(rows).set_index("client")
    counted = table.loc["clipped", ["attacks", "exact", "wrong_exact", "recovered", "certified"]]
    assert counted.tolist() == [3, 2, 1, 2, 1]
    assert table.loc["clipped", "certified_share"] == 0.5 and table.loc["autocast", "recovered"] == 0
    assert table.loc["all", "attacks"] == 4
