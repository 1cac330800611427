"""The package where it was installed from a wheel, and where a script beside a clone imports it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import rgap

CHECKOUT = Path(rgap.__file__).parents[1]


def run(arguments, folder, path):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RGAP_")}
    command = [sys.executable, "-P", *arguments] if path else [sys.executable, *arguments]
    environment["PYTHONPATH"] = str(path or "")
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder as a wheel's installation leaves it: the package and its metadata, nothing else of the checkout."""
    folder = tmp_path_factory.mktemp("site-packages")
    shutil.copytree(CHECKOUT / "rgap", folder / "rgap", ignore=shutil.ignore_patterns("__pycache__"))
    facts = folder / "rgap-0.1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: rgap\nVersion: 0.1.0\n")
    return folder


@pytest.mark.slow
def test_an_installed_package_writes_to_the_working_directory(installed, tmp_path):
    done = run(["-m", "rgap", "audit", "--model", "fcn3"], tmp_path, installed)
    assert done.returncode == 1, done.stderr
    assert (tmp_path / "build" / "audit" / "fcn3.json").is_file()
    assert not (installed / "build").exists() and not (installed.parent / "build").exists()


@pytest.mark.slow
def test_its_claims_are_found_in_a_checkout_alone_and_it_says_so(installed, tmp_path):
    done = run(["-m", "rgap", "report", "--claims"], tmp_path, installed)
    assert done.returncode == 2
    assert "notebooks and their claims are no part of the installed package; run this in a checkout" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    (tmp_path / "notebooks").mkdir()
    shutil.copy(CHECKOUT / "notebooks" / "claims.yml", tmp_path / "notebooks")
    done = run(["-m", "rgap", "report", "--claims"], tmp_path, installed)
    assert done.returncode == 1 and "was not measured" in done.stderr


def test_its_version_is_that_of_its_metadata(installed, tmp_path):
    done = run(["-c", "import rgap; print(rgap.__version__, rgap.__file__)"], tmp_path, installed)
    assert done.stdout.split() == [rgap.__version__, str(installed / "rgap" / "__init__.py")]


@pytest.mark.slow
def test_a_script_beside_a_clone_imports_the_package(tmp_path):
    (tmp_path / "rgap").symlink_to(CHECKOUT)
    (tmp_path / "script.py").write_text(
        "import rgap, rgap.results\nprint(rgap.__version__, len(rgap.results.VERDICTS))"
    )
    done = run(["script.py"], tmp_path, None)
    assert done.stdout.split() == [rgap.__version__, "4"], done.stderr
