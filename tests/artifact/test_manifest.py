"""Files that evaluators' forms ask for: generated ones are as their generator writes them, and all agree."""

import json
import re
import tomllib

import yaml

from rgap import artifact
from rgap.artifact import manifest, readme

ROOT = artifact.ROOT


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_codecheck_and_appendix_are_what_claims_yml_says():
    assert read("codecheck.yml") == manifest.codecheck()
    appendix = read("ARTIFACT-APPENDIX.md")
    assert readme.with_block(appendix, "experiments", manifest.experiments()) == appendix


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
