"""README.md is short, its table of claims and docs/claims.md are what their generator writes, and its paths exist."""

import json
import re
import shutil
import tomllib

import nbformat
import pytest
import yaml
from nbformat.v4 import new_markdown_cell, new_notebook

from rgap import artifact
from rgap.artifact import outputs, readme

ROOT = artifact.ROOT
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
CLAIMS = artifact.read_claims()


def without_times(text):
    """The text without what is measured anew by every run: the tables of a clone whose figures/ were written again."""
    timed = "|".join(claim_id for claim_id, claim in CLAIMS.items() if claim["times"])
    return re.sub(rf"^(\| (?:{timed}) \|.*\|)[^|]*\|$", r"\1 |", text, flags=re.M)


def test_the_tables_are_what_claims_yml_and_the_committed_run_say():
    assert readme.with_block(TEXT, "notebooks", readme.index()) == TEXT
    assert readme.with_block(TEXT, "claims", readme.summary()) == TEXT
    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    ratio = re.compile(r"(?<=\| )[\d.]+(?:e\+\d+)?(?= \|)")
    assert ratio.sub("", readme.with_block(guide, "times", readme.times())) == ratio.sub("", guide)
    page = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
    assert without_times(page) == without_times(readme.page())
    assert without_times(page).count("| |\n") == sum(claim["times"] for claim in CLAIMS.values())


def test_no_claim_that_readme_shows_is_a_measured_time():
    shown = {claim["notebook"]: claim for claim in reversed(CLAIMS.values())}
    assert not any(claim["times"] for claim in shown.values())


def test_it_can_be_read_in_ten_minutes():
    assert len(TEXT.splitlines()) <= 200 and len(TEXT.split()) <= 2000


def test_its_python_runs_and_gives_the_verdict_that_it_says():
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S):
        exec(compile(block, "README.md", "exec"), names)
    assert names["result"].verdict == "exact" and names["result"].images.shape == (1, 3, 32, 32)


def test_every_notebook_has_a_row_and_every_claim_a_row_of_its_own():
    rows = re.findall(r"^\| \[\d\d\]\(notebooks/(\w+)\.ipynb\) \|", readme.summary(), re.M)
    assert rows == sorted({claim["notebook"] for claim in CLAIMS.values()})
    assert re.findall(r"^\| (\d\d-[\w-]+) \|", readme.page(), re.M) == list(CLAIMS)


@pytest.mark.parametrize("claim_id", CLAIMS)
def test_a_claim_has_a_short_statement_and_says_on_how_much_it_rests(claim_id):
    claim = CLAIMS[claim_id]
    assert claim["short"] != claim["statement"] and len(claim["short"].split()) <= 7
    assert re.fullmatch(r"[\w,–× +-]*\d[\w,–× +-]*", readme.sample_size(claim))


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", TEXT))))
def test_every_path_in_it_exists(path):
    assert (ROOT / path).exists()


def test_what_a_table_says_of_a_claim(root, write_claims, monkeypatch):
    marks = "<!-- {0}: written by `python -m rgap report --readme` -->\n<!-- end of {0} -->\n"
    (root / "README.md").write_text(f"before\n{marks.format('notebooks')}{marks.format('claims')}after\n")
    (root / "ARTIFACT-APPENDIX.md").write_text(marks.format("experiments"))
    shutil.copy(ROOT / "CITATION.cff", root)
    nbformat.write(new_notebook(cells=[new_markdown_cell("# 01 · One\n\nText")]), root / "notebooks" / "01_one.ipynb")
    first = {"statement": "long", "short": "PSNR", "n": "{seeds} networks", "at_least": 90, "unit": "dB"}
    second = {"statement": "not measured", "equals": 1}
    origin = {"notebook": "01_one", "source": "ours"}
    write_claims({"01-one": first | origin, "01-two": second | origin})
    monkeypatch.setenv("RGAP_FIGURES", str(root / "figures"))
    monkeypatch.setattr(readme, "_parameters", lambda path: {"seeds": [7]})
    artifact.check_claim("01-one", 104.4321)
    (root / "figures" / "claims_times.csv").write_text((root / "figures" / "claims.csv").read_text().splitlines()[0])
    (root / "docs").mkdir()
    (root / "docs" / "guide.md").write_text(marks.format("times"))
    times = "network,method,seconds,seconds_prepared,seconds_to_best\ncnn6,virtual constraints,4,2,4\ncnn6,DLG,9,,3\n"
    (root / "figures" / "04_quality_times.csv").write_text(times)
    written = ["README.md", "guide.md", "claims.md", "ARTIFACT-APPENDIX.md", "codecheck.yml"]
    assert [path.name for path in readme.update()] == written
    assert "| cnn6 | 1.5 | 0.75 |" in (root / "docs" / "guide.md").read_text()
    row = "| [01](notebooks/01_one.ipynb) | PSNR | 1 network | ≥ 90 dB | 104 dB | 1 of 2 | – |"
    text = (root / "README.md").read_text()
    assert (
        row in text
        and "- [01 · One](notebooks/01_one.ipynb)" in text
        and text.startswith("before\n")
        and text.endswith("after\n")
    )
    assert "| 01-two | not measured |  | ours | = 1 | – |" in (root / "docs" / "claims.md").read_text()
    assert outputs.ROOT == root


def test_a_readme_without_a_place_for_them_is_refused(root):
    (root / "README.md").write_text("no table")
    with pytest.raises(ValueError, match=r"must have a block of notebooks"):
        readme.update()


ROOT = artifact.ROOT


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_codecheck_and_appendix_are_what_claims_yml_says():
    assert read("codecheck.yml") == readme.codecheck()
    appendix = read("ARTIFACT-APPENDIX.md")
    assert readme.with_block(appendix, "experiments", readme.experiments()) == appendix


def test_the_manifest_names_every_output_once_with_the_notebook_that_writes_it():
    content = yaml.safe_load(read("codecheck.yml"))
    assert content["version"].endswith("/2.0/") and content["paper"]["authors"][0] == {"name": "Junyi Zhu"}
    files = [entry["file"] for entry in content["manifest"]]
    outputs = [f"figures/{name}" for names in artifact.expected_outputs().values() for name in names]
    assert sorted(files) == sorted(outputs) and len(set(files)) == len(files)
    for entry in content["manifest"]:
        assert (ROOT / entry["comment"].partition(":")[0]).is_file()


def test_every_claim_stands_in_the_appendix():
    appendix = read("ARTIFACT-APPENDIX.md")
    assert all(f"{claim['short']}: {claim['expected']}" in appendix for claim in artifact.read_claims().values())


def test_the_appendix_has_the_sections_that_an_evaluator_looks_for():
    heads = re.findall(
        r"^#+ (.*)", re.sub(r"```.*?```", "", read("ARTIFACT-APPENDIX.md"), flags=re.DOTALL), re.MULTILINE
    )
    wanted = ["Hardware Requirements", "Software Requirements", "Environment", "Main Results and Claims", "Experiments"]
    assert {*wanted, "Estimated Time and Storage Consumption", "Limitations", "Notes on Reusability"} <= set(heads)


def test_versions_and_commands_agree():
    version = tomllib.loads(read("pyproject.toml"))["project"]["version"]
    assert json.loads(read(".zenodo.json"))["version"] == version == yaml.safe_load(read("CITATION.cff"))["version"]
    assert f"## {version} (" in read("CHANGELOG.md")
    container = json.loads(re.sub(r"^//.*\n", "", read(".devcontainer/devcontainer.json")))
    assert container["postCreateCommand"] == "make env" and "RUN make env" in read("Dockerfile")
    for name in ("Dockerfile", ".devcontainer/devcontainer.json", "ARTIFACT-APPENDIX.md"):
        assert "make figures" in read(name) and "make test" in read(name)
