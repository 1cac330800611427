"""Outputs are written whole or not at all, and tables with the digits that repeat."""

import os
import stat
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from PIL import Image

from rgap.artifact import outputs


@pytest.fixture
def figures(root):
    return root / "figures"


def draw(height=1.0):
    fig, ax = plt.subplots(figsize=(2, 1))
    ax.plot([0, 1], [0, height])
    plt.close(fig)
    return fig


def test_paths_are_anchored_on_the_package(monkeypatch, tmp_path):
    monkeypatch.delenv("RGAP_FIGURES", raising=False)
    monkeypatch.chdir(tmp_path)
    assert outputs.figures_dir() == Path(outputs.__file__).parents[2] / "build" / "figures"


def test_the_same_figure_gives_the_same_bytes_and_names_no_software(figures):
    first = outputs.save_figure(draw(), "01_line").read_bytes()
    assert outputs.save_figure(draw(), "01_line").read_bytes() == first
    with Image.open(figures / "01_line.png") as image:
        assert round(image.info["dpi"][0]) == 150
        assert image.info.keys() == {"dpi"}


def test_tables_are_rounded_and_times_go_to_a_file_of_their_own(figures):
    frame = pd.DataFrame({"name": ["a", "σ"], "count": [1234567, 2], "value": [1 / 3, 2e-15]})
    path = outputs.save_table(frame, "01_layers")
    assert path == figures / "01_layers.csv"
    assert path.read_text() == "name,count,value\na,1234567,0.333\nσ,2,2e-15\n"
    assert outputs.save_table(frame, "01_layers", times=True).name == "01_layers_times.csv"
    assert outputs.save_figure(draw(), "01_cost", times=True).name == "01_cost_times.png"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize("name", ["layers", "1_layers", "01_layers.csv", "../01_layers"])
def test_a_name_without_its_notebooks_number_is_refused(figures, name):
    with pytest.raises(ValueError, match="must begin with the notebook's number"):
        outputs.save_table(pd.DataFrame(), name)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(figures):
    path = outputs.save_table(pd.DataFrame({"a": [1]}), "01_layers")

    def fail(file):
        file.write(b"part")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        outputs.write_atomically(path, fail)
    assert path.read_text() == "a\n1\n"
    assert list(figures.iterdir()) == [path]


def test_a_link_is_written_through_and_stays(figures):
    figures.mkdir(exist_ok=True)
    target, link = figures / "real.csv", figures / "link.csv"
    target.write_text("old")
    link.symlink_to(target)
    outputs.write_atomically(link, lambda file: file.write(b"new"))
    assert link.is_symlink() and target.read_text() == "new"
    missing = figures / "later.csv"
    missing.symlink_to(figures / "sub" / "file.csv")
    outputs.write_atomically(missing, lambda file: file.write(b"made"))
    assert missing.is_symlink() and (figures / "sub" / "file.csv").read_text() == "made"


def test_what_is_no_regular_file_is_refused_and_stays(figures):
    figures.mkdir(exist_ok=True)
    pipe, null = figures / "pipe", figures / "null"
    os.mkfifo(pipe)
    null.symlink_to("/dev/null")
    for path in (pipe, null, Path("/dev/null"), figures):
        with pytest.raises(ValueError, match=f"path {path} is no regular file"):
            outputs.write_atomically(path, lambda file: file.write(b"x"))
    for path in (figures / "file" / "a.csv", figures / "file" / "sub" / "a.csv"):
        (figures / "file").touch()
        with pytest.raises(ValueError, match=r"cannot be written: .* cannot be made a folder \(.*\); give a file in"):
            outputs.check_writable(path)
    assert stat.S_ISFIFO(pipe.stat().st_mode) and stat.S_ISCHR(Path("/dev/null").stat().st_mode)


@pytest.mark.parametrize(
    ("column", "values", "written"),
    [
        ("psnr_db", [104.37, -0.4, None], ["104", "0", None]),
        ("psnr_db_std", [1.2345], ["1.23"]),
        ("condition", [78.498, 5.95], ["78.5", "5.95"]),
        ("residual", [8.7654e-08], ["8.77e-08"]),
        ("ssim", [0.99991], ["1"]),
        ("unknowns", [16384.0, None], ["16384", None]),
        ("epsilon", [611111111.5, 5.5e15], ["6.11e+08", "5.5e+15"]),
        ("strength", ["bfloat16", 0.0625], ["bfloat16", "0.0625"]),
        ("found", [3, 4], [3, 4]),
        ("agrees", [True, False], [True, False]),
    ],
)
def test_numbers_are_written_with_the_digits_that_repeat(column, values, written):
    found = outputs.rounded(pd.DataFrame({column: values}))[column].tolist()
    assert [None if pd.isna(value) else value for value in found] == written


def test_a_table_without_rows_keeps_its_columns():
    assert list(outputs.rounded(pd.DataFrame({"a": [], "b": []}))) == ["a", "b"]
    assert outputs.rounded(pd.DataFrame()).empty


@pytest.mark.parametrize(
    ("column", "values", "kind"),
    [("psnr_db", ["104"], "decibels"), ("psnr_db_std", ["1.2"], "spreads of few runs"),
     ("rank", ["3", ""], "counts and texts"),
     ("share", ["0.5", "1"], "numbers"), ("twin_mu", ["0.3"], "ends of descents")],
)  # fmt: skip
def test_a_column_has_the_kind_of_its_name_or_values(column, values, kind):
    assert outputs.kind_of(column, pd.Series(values)).name == kind
