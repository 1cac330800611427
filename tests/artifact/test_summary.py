import io
import sys

import pandas as pd
import pytest

from rgap import artifact
from rgap.artifact import claims, summary

CLAIMS = {
    "quality": {"notebook": "01_one", "statement": "PSNR " * 20, "source": "ours", "at_least": 90, "unit": "dB"},
    "few": {"notebook": "01_one", "statement": "iterations", "source": "paper", "at_most": 8},
    "share": {"notebook": "02_two", "statement": "share of σ", "source": "paper", "equals": 0.5, "tolerance": 0.01},
    "full": {"notebook": "02_two", "statement": "all", "source": "paper", "equals": 1, "profiles": ["paper"]},
}


@pytest.fixture
def run(root, write_claims, monkeypatch):
    monkeypatch.setenv("RGAP_FIGURES", str(root / "build" / "run"))
    write_claims(CLAIMS, {"01_one": ["01_numbers.csv"]})
    for claim_id, measured in {"quality": 101.2, "few": 8, "share": 0.5, "full": 0}.items():
        artifact.check_claim(claim_id, measured)
    artifact.save_table(pd.DataFrame({"n": [1]}), "01_numbers")
    return root


def test_claims_fit_a_hundred_columns_by_notebook_in_their_own_order_with_ticks_and_a_sum(run, capsys):
    assert summary.print_report() == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert [line for line in lines if line[:2] in ("01", "02")] == ["01_one", "02_two"]
    assert [line.split()[1] for line in lines if line[:1] in "✓✗-" and ".csv" not in line and line] == list(CLAIMS)
    assert lines[-1] == "3 of 4 claims hold"
    assert "2 tables and figures: all agree with the committed ones within tolerance" in lines
    (quality,) = [line for line in lines if " quality " in line]
    assert quality.startswith("✓ quality") and quality.split()[-4:] == ["≥", "90", "dB", "101.2"]


def test_whatever_is_wrong_is_named_and_fails(run, capsys, write_claims):
    with pytest.raises(AssertionError):
        artifact.check_claim("quality", 20.7)
    claims.forget_claims("02_two")
    write_claims(CLAIMS, {"01_one": ["01_numbers.csv", "01_picture.png"]})
    assert summary.print_report() == 1
    said = capsys.readouterr()
    for problem in ("01_picture.png is missing", "claim quality fails", "claim share was not measured by 02_two"):
        assert problem in said.err
    assert "✗ quality" in said.out and "✗ 01_picture.png" in said.out
    assert "1 differ from the committed ones" in said.out


def test_other_profiles_have_nothing_to_compare_with(run, capsys, monkeypatch):
    monkeypatch.setenv("RGAP_PROFILE", "custom")
    assert summary.print_report() == 0
    assert "tables and figures" not in capsys.readouterr().out


def test_a_refresh_writes_over_the_committed_figures_and_compares_nothing(run, capsys, monkeypatch):
    monkeypatch.setenv("RGAP_FIGURES", str(run / "figures"))
    summary.print_report()
    assert "tables and figures" not in capsys.readouterr().out


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_of_any_encoding_is_written_to(run, monkeypatch, encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    monkeypatch.setattr(sys, "stdout", stream)
    assert summary.print_report() == 0
    stream.flush()
    text = stream.buffer.getvalue().decode(encoding)
    assert ("✓" in text) == (encoding == "utf-8") and ("ok quality" in text) == (encoding != "utf-8")
    assert max(map(len, text.splitlines())) <= 105


def test_the_locale_c_gets_ascii(monkeypatch):
    monkeypatch.setenv("LC_ALL", "C")
    assert summary.spelled("✓ ≥ 90 ± 1 µé²…♞") == "ok >= 90 +- 1 mue2...?"
