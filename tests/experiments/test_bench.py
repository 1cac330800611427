from functools import partial

import pandas as pd
import pytest
import torch
from cases import small_cnn
from torch import nn

import rgap
from rgap.experiments import bench
from rgap.experiments.bench import BenchCase, compared, earlier_times, measured


@pytest.fixture
def small(monkeypatch):
    """Cases that take no time."""
    audited = partial(nn.Sequential, nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2))
    cases = {"net": BenchCase(small_cnn, (3, 8, 8)), "audit": BenchCase(audited, (3, 8, 8), 0)}
    monkeypatch.setattr(bench, "CASES", cases)
    monkeypatch.setattr(bench, "LARGE_CASES", ())


def test_a_round_times_pass_first_attack_and_prepared_attack_and_audits(small, monkeypatch):
    table = bench.bench(rounds=2)
    assert table["method"].tolist() == [bench.PASS, bench.FIRST, bench.PREPARED, bench.AUDIT]
    assert (table["runs"] == 2).all() and (table["least_s"] <= table["median_s"]).all() and (table["least_s"] > 0).all()
    attacks = table[table["case"] == "net"].set_index("method")
    assert attacks["ratio"][bench.PREPARED] == pytest.approx(
        attacks["median_s"][bench.PREPARED] / attacks["median_s"][bench.PASS]
    )
    assert attacks["ratio"][bench.PASS] == 1 and (attacks["psnr_db"].dropna() > 60).all()
    assert attacks["verdict"][bench.FIRST] == "exact"
    prepared = attacks.loc[bench.PREPARED]
    assert prepared["floor_share"] == pytest.approx(
        prepared["floor_gflop"] / prepared["gemm_gflops"] / prepared["median_s"]
    )
    assert 0 < prepared["floor_share"] < 1 and attacks["floor_gflop"].notna().sum() == 1
    assert table["ratio"].isna().tolist() == [False] * 3 + [True] and table["verdict"].iloc[-1] in {"leaks", "stops"}
    monkeypatch.setattr(bench, "MAX_REPEATED_SECONDS", 0.0)
    assert bench.bench(["audit"], rounds=2)[["method", "runs"]].values.tolist() == [[bench.AUDIT, 1]]  # a slow case


def test_the_floor_counts_each_dense_system_once():
    chain = rgap.prepare(nn.Sequential(nn.Conv2d(2, 4, 2), nn.Flatten(), nn.Linear(16, 1)), (2, 3, 3))
    layer = {"name": "0", "unknowns": 18, "rank_gradients": 12, "deficit": 0, "virtual_constraints": None}
    gram_and_factor = 4 * 4 * 9**2 + 9**3 / 3
    assert bench.floor_gflop(chain, pd.DataFrame([layer]), 1) == pytest.approx((gram_and_factor + 6**3 / 3) / 1e9)
    closed = layer | {"deficit": 2, "virtual_constraints": 5}
    more = bench.floor_gflop(chain, pd.DataFrame([closed]), 1) - bench.floor_gflop(chain, pd.DataFrame([layer]), 1)
    assert more == pytest.approx((5 * 2 * (2 * 18 + 2) + 2**3 / 3) / 1e9)
    assert bench.floor_gflop(chain, pd.DataFrame([layer | {"rank_gradients": None}]), 1) == 0


def test_peak_memory_counts_what_a_call_needs_and_not_what_was_held():
    held = torch.ones(2**24)
    _, spent = measured(lambda: torch.ones(2**23).sum() + held[0])
    if spent["peak_mib"] == spent["peak_mib"]:  # NaN where the system does not tell
        assert 30 < spent["peak_mib"] < 60


def test_an_earlier_table_is_compared_whether_of_the_benchmark_or_of_notebook_04(tmp_path):
    now = pd.DataFrame({"case": ["cnn6", "fcn3"], "method": bench.FIRST, "least_s": [1.0, 2.0]})
    earlier = pd.DataFrame({"case": ["cnn6"], "method": [bench.FIRST], "least_s": [3.0]})
    earlier.to_csv(tmp_path / "bench.csv", index=False)
    assert compared(now, earlier_times(tmp_path / "bench.csv"))["speedup"].tolist() == [3.0]
    rows = [("cnn6", "side", 32, bench.FIRST, 2.0), ("cnn6", "side", 64, bench.FIRST, 9.0)]
    costs = pd.DataFrame(rows, columns=["network", "against", "value", "method", "seconds"])
    costs.to_csv(tmp_path / "costs.csv", index=False)
    assert compared(now, earlier_times(tmp_path / "costs.csv"))["speedup"].tolist() == [2.0]
    now.drop(columns="least_s").to_csv(tmp_path / "other.csv", index=False)
    with pytest.raises(ValueError, match="no column least_s; give a table that `rgap bench` wrote"):
        earlier_times(tmp_path / "other.csv")
    (tmp_path / "empty.csv").touch()
    with pytest.raises(ValueError, match=r"empty.csv is no table \(.*\); give one that `rgap bench` wrote"):
        earlier_times(tmp_path / "empty.csv")


def test_unknown_cases_and_no_rounds_are_refused(small):
    with pytest.raises(ValueError, match="no case 'cnn7'; there are 'net', 'audit'"):
        bench.bench(["cnn7"])
    with pytest.raises(ValueError, match="rounds is 0; it must be at least 1"):
        bench.bench(rounds=0)
