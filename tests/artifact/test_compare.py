import subprocess

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from rgap import artifact
from rgap.artifact import compare, outputs

TABLE = "name,deficit,psnr_db,residual,verdict,note\na,280,104,2e-9,exact,a gap of 5e+06\nb,0,30,1e-9,exact,none\n"
CLAIMS = {
    "good": {"notebook": "01_one", "statement": "share", "source": "ours", "equals": 1, "tolerance": 0.1},
    "decibels": {"notebook": "01_one", "statement": "PSNR", "source": "ours", "at_least": 90, "unit": "dB"},
}


@pytest.fixture
def project(root, write_claims, monkeypatch):
    """A project with one committed table, and a run that wrote the same elsewhere."""
    write_claims(CLAIMS, {"01_one": ["01_runs.csv"]})
    monkeypatch.setenv("RGAP_FIGURES", str(root / "build" / "run"))
    for folder in (root / "figures", root / "build" / "run"):
        folder.mkdir(parents=True)
        (folder / "01_runs.csv").write_text(TABLE)
    return root


def run_writes(project, text, name="01_runs.csv"):
    (project / "build" / "run" / name).write_text(text)
    return compare.compare_run()[-1]


def test_what_is_identical_agrees(project):
    assert compare.compare_run() == [("01_runs.csv", True, "identical", False)]


@pytest.mark.parametrize(
    ("old", "new", "agrees", "said"),
    [
        ("104", "116", True, "psnr_db 104 → 116"),
        ("104", "120", False, "psnr_db 104 → 120, allowed 2 + 10%"),
        ("30", "27", True, "psnr_db 30 → 27"),
        ("30", "24", False, "psnr_db 30 → 24"),
        ("280", "281", False, "deficit 280 → 281, allowed no difference"),
        ("2e-9", "7e-9", True, "residual 2e-9 → 7e-9"),
        ("2e-9", "2e-7", False, "residual 2e-9 → 2e-7, allowed 1e-12 + a factor of 10"),
        ("5e+06", "6e+06", True, "note a gap of 5e+06 → a gap of 6e+06"),
        ("5e+06", "6e+08", False, "note"),
        ("exact,none", "ambiguous,none", False, "verdict exact → ambiguous"),
        ("b,0,30", "b,0,", False, "psnr_db 30 → "),
        ("b,0,30", "c,0,30", False, "name b → c"),
        ("deficit", "deficits", False, "has other columns"),
        ("b,0,30,1e-9,exact,none\n", "", False, "another number of rows"),
    ],
)
def test_columns_are_compared_by_the_tolerance_of_their_kind(project, old, new, agrees, said):
    found = run_writes(project, TABLE.replace(old, new))
    assert found.agrees == agrees and said in found.text
    assert (project / "figures" / "01_runs.csv").read_text() == TABLE


def test_every_difference_out_of_tolerance_is_named(project):
    text = run_writes(project, TABLE.replace("280", "9").replace("exact,none", "wrong,none")).text
    assert "deficit 280 → 9" in text and "verdict exact → wrong" in text


@pytest.mark.parametrize(
    ("good", "decibels", "agrees"), [(1, 104, True), (1.08, 109, True), (0.92, 104, True), (1, 130, False)]
)
def test_claims_are_compared_by_their_own_tolerance_or_unit(project, monkeypatch, good, decibels, agrees):
    for folder, values in (("figures", (1, 104)), ("build/run", (good, decibels))):
        monkeypatch.setenv("RGAP_FIGURES", str(project / folder))
        for claim_id, value in zip(CLAIMS, values, strict=True):
            artifact.check_claim(claim_id, value)
    found = compare.compare_run()[-1]
    assert (found.name, found.agrees) == ("claims.csv", agrees)


def test_times_are_not_compared_but_must_be_there(project, write_claims):
    write_claims(CLAIMS, {"01_one": ["01_a_times.csv"]})
    (project / "figures" / "01_runs.csv").unlink()
    (project / "figures" / "01_a_times.csv").write_text("seconds\n1\n")
    assert run_writes(project, "seconds\n50\n", "01_a_times.csv").agrees
    assert not run_writes(project, "minutes\n50\n", "01_a_times.csv").agrees
    (project / "build" / "run" / "01_a_times.csv").unlink()
    assert compare.compare_run()[0].text == "missing: the run did not write it"


def picture(path, shift=0, size=300, noise=0):
    pixels = np.full((size, size), 255, dtype=np.uint8)
    pixels[40 + shift : 60 + shift, 20:280] = 0
    pixels[:noise] -= 9
    Image.fromarray(pixels).save(path)


@pytest.mark.parametrize(
    ("changed", "agrees"),
    [({}, True), ({"noise": 5}, True), ({"shift": 100}, False), ({"size": 400}, False), ({"size": 304}, True)],
)
def test_pictures_are_compared_by_size_and_ink(project, write_claims, changed, agrees):
    write_claims(CLAIMS, {"01_one": ["01_line.png"]})
    (project / "figures" / "01_runs.csv").unlink()
    picture(project / "figures" / "01_line.png")
    picture(project / "build" / "run" / "01_line.png", **changed)
    assert compare.compare_run()[0].agrees == agrees


def test_a_file_that_no_notebook_writes_is_told(project):
    (project / "figures" / "01_old.png").touch()
    assert compare.compare_run()[-1] == ("01_old.png", False, "no notebook writes it; remove it from figures/", False)


def git(project, *arguments):
    names = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *names, *arguments], cwd=project, check=True, capture_output=True)


def test_what_figures_lacks_is_compared_with_git_and_copied_from_the_run_only_if_it_agrees(project):
    git(project, "init")
    git(project, "add", "figures")
    git(project, "commit", "-m", "figures")
    committed = project / "figures" / "01_runs.csv"
    committed.unlink()
    assert run_writes(project, TABLE.replace("280", "9")).text.startswith("deficit 280 → 9")
    assert compare.restore_missing(compare.compare_run()) == [] and not committed.exists()
    near = TABLE.replace("104", "105")
    assert run_writes(project, near).agrees
    assert compare.restore_missing(compare.compare_run()) == ["01_runs.csv"]
    assert committed.read_text() == near
    run_writes(project, TABLE)
    assert compare.restore_missing(compare.compare_run()) == [] and committed.read_text() == near


def test_without_git_a_missing_file_is_new_and_copied(project):
    (project / "figures" / "01_runs.csv").unlink()
    (comparison,) = compare.compare_run()
    assert comparison.agrees and comparison.text.startswith("new")
    assert compare.restore_missing([comparison]) == ["01_runs.csv"]


def test_every_column_of_this_projects_tables_agrees_with_itself_and_not_with_another_verdict():
    for path in (artifact.ROOT / "figures").glob("*.csv"):
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
        for column in set(frame):
            kind = outputs.kind_of(column, frame[column])
            assert all(compare.agree(value, value, kind) for value in frame[column])
            assert not compare.agree("exact", "ambiguous", kind)
