import pandas as pd
import pytest

from rgap.experiments import sweeps, verify


def table(count, seed=0, wrong=0):
    numbers = range(count)
    columns = {"case": [str(seed + i) for i in numbers], "verdict": "exact", "psnr_db": [70.0 + i for i in numbers]}
    return pd.DataFrame(columns | {"ok": [i >= wrong for i in numbers], "why": ""})


@pytest.fixture
def samples(monkeypatch):
    """Two samples in place of those of the package."""
    monkeypatch.setattr(sweeps, "sample_good", lambda count, seed=0: table(count, seed), raising=False)
    monkeypatch.setattr(sweeps, "sample_bad", lambda count=3, seed=0: table(count, seed, wrong=1), raising=False)
    monkeypatch.setattr(sweeps, "__all__", ["attack_each", "sample_good", "sample_bad"])


def test_every_sample_of_the_sweeps_is_run_and_written(samples, tmp_path, capsys):
    output = tmp_path / "verify.csv"
    assert verify.main(["good", "--count", "4", "--seed", "5", "--output", str(output)]) == 0
    written = pd.read_csv(output)
    assert written.columns.tolist() == ["sample", *verify.COLUMNS]
    assert written["case"].tolist() == [5, 6, 7, 8] and written["ok"].all()
    out = capsys.readouterr().out
    assert "good" in out and "70.0" in out and "not in order" not in out


def test_a_row_that_is_not_in_order_is_shown_and_fails_the_run(samples, tmp_path, capsys):
    assert verify.main(["--output", str(tmp_path / "verify.csv")]) == 1
    assert len(pd.read_csv(tmp_path / "verify.csv")) == 203
    out = capsys.readouterr().out
    assert "not in order: 1 of 203" in out
    counted = verify.summary(verify.run({"bad": sweeps.sample_bad}, None, 0))
    assert counted.to_dict("records") == [
        {"sample": "bad", "verdict": "exact", "rows": 3, "in_order": 2, "least_psnr_db": 71.0}
    ]


def test_an_unknown_sample_and_a_table_without_its_columns_are_refused(samples, tmp_path, capsys):
    assert verify.main(["gone", "--output", str(tmp_path / "x.csv")]) == 2
    assert "no sample gone; there are good, bad" in capsys.readouterr().err and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="sample_thin has no column psnr_db, ok"):
        verify.run({"thin": lambda count, seed: table(count).drop(columns=["psnr_db", "ok"])}, 2, 0)


def test_the_package_has_samples():
    assert "chains" in verify.all_samples()
