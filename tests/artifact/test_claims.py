from concurrent.futures import ThreadPoolExecutor

import pandas as pd
import pytest

from rgap.artifact import claims

CLAIMS = {
    "quality": {"notebook": "01_one", "statement": "smallest PSNR", "source": "ours", "at_least": 90, "unit": "dB"},
    "few": {"notebook": "01_one", "statement": "iterations", "source": "paper", "at_most": 8},
    "share": {"notebook": "02_two", "statement": "share", "source": "paper", "equals": 0.5, "tolerance": 0.01},
    "verdict": {"notebook": "02_two", "statement": "verdict", "source": "ours", "equals": "exact"},
    "fast": {"notebook": "01_one", "statement": "median", "source": "ours", "at_most": 0.5, "unit": "s", "times": True},
    "full": {"notebook": "02_two", "statement": "all", "source": "paper", "equals": 1, "profiles": ["paper"]},
}
GOOD = {"quality": 101.23456, "few": 8, "share": 0.509, "verdict": "exact", "fast": 0.1, "full": 1}


@pytest.fixture
def figures(root, write_claims):
    write_claims(CLAIMS)
    return root / "figures"


def check_all(**changed):
    for claim_id, measured in {**GOOD, **changed}.items():
        claims.check_claim(claim_id, measured)


def test_claims_that_hold_are_printed_without_the_measured_number_and_recorded_sorted(figures, capsys):
    check_all()
    assert capsys.readouterr().out.splitlines()[:3] == [
        "quality smallest PSNR: ≥ 90 dB: True",
        "few iterations: ≤ 8: True",
        "share share: = 0.5 ± 0.01: True",
    ]
    rows = pd.read_csv(figures / "claims.csv", dtype=str, keep_default_na=False)
    assert list(rows) == ["id", "notebook", "statement", "source", "expected", "measured", "unit", "holds"]
    assert rows["id"].tolist() == ["few", "full", "quality", "share", "verdict"]
    assert rows.iloc[2].tolist() == ["quality", "01_one", "smallest PSNR", "ours", "≥ 90", "101.2", "dB", "True"]
    assert pd.read_csv(figures / "claims_times.csv")["id"].tolist() == ["fast"]


@pytest.mark.parametrize(
    ("claim_id", "measured"),
    [("quality", 89.99), ("few", 9), ("share", 0.511), ("share", 0.489), ("verdict", "ambiguous"), ("verdict", 1),
     ("fast", 0.6), ("quality", float("nan")), ("few", float("nan")), ("share", float("nan"))],
)  # fmt: skip
def test_a_false_claim_is_recorded_and_raises(figures, capsys, claim_id, measured):
    with pytest.raises(AssertionError, match=f"claim {claim_id} fails: measured"):
        claims.check_claim(claim_id, measured)
    assert capsys.readouterr().out.endswith(": False\n")
    assert claims.report()[0]["holds"].tolist() == ["False"]


@pytest.mark.parametrize(("profile", "asserted"), [("default", False), ("paper", True), ("custom", False)])
def test_a_claim_is_asserted_only_in_its_profiles(figures, monkeypatch, profile, asserted):
    monkeypatch.setenv("RGAP_PROFILE", profile)
    if asserted:
        with pytest.raises(AssertionError):
            claims.check_claim("full", 0.5)
    else:
        claims.check_claim("full", 0.5)


def test_other_images_never_fail_a_claim(figures, monkeypatch):
    monkeypatch.setenv("RGAP_PROFILE", "custom")
    check_all(quality=1, few=99, share=7, verdict="rank-deficient", fast=60, full=0)
    assert claims.report()[1] == []


def test_an_unknown_claim_is_refused(figures):
    with pytest.raises(ValueError, match=r"'speed' is not in claims\.yml; it has quality, few"):
        claims.check_claim("speed", 1)


@pytest.mark.parametrize("change", [{"at_most": 3}, {"unitt": "dB"}, {"source": None}, {"at_least": None}])
def test_a_malformed_claim_is_refused(figures, write_claims, change):
    claim = {name: value for name, value in {**CLAIMS["quality"], **change}.items() if value is not None}
    write_claims({"quality": claim})
    with pytest.raises(ValueError, match=r"claim quality in claims.yml lacks .* exactly one of"):
        claims.read_claims()


def test_notebooks_that_run_at_the_same_time_lose_no_row(figures, write_claims):
    many = {f"c{i:02}": {**CLAIMS["few"], "notebook": f"{i:02}_x"} for i in range(24)}
    write_claims(many)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda claim_id: claims.check_claim(claim_id, 1), many))
    assert claims.report()[0]["id"].tolist() == list(many)
    claims.forget_claims("07_x")
    assert claims.report()[1] == ["claim c07 was not measured by 07_x"]


def test_the_report_names_whatever_is_wrong(figures, write_claims):
    check_all()
    assert claims.report()[1] == []
    with pytest.raises(AssertionError):
        claims.check_claim("quality", 20.7)
    claims.forget_claims("02_two")
    write_claims(CLAIMS, files={"01_one": ["01_picture.png"]})
    problems = "\n".join(claims.report()[1])
    for problem in ("01_picture.png is missing", "claim quality fails", "claim share was not measured by 02_two"):
        assert problem in problems
