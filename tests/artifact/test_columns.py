import pandas as pd
import pytest

from rgap.artifact import columns


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
    found = columns.rounded(pd.DataFrame({column: values}))[column].tolist()
    assert [None if pd.isna(value) else value for value in found] == written


def test_a_table_without_rows_keeps_its_columns():
    assert list(columns.rounded(pd.DataFrame({"a": [], "b": []}))) == ["a", "b"]
    assert columns.rounded(pd.DataFrame()).empty


@pytest.mark.parametrize(
    ("column", "values", "kind"),
    [("psnr_db", ["104"], "decibels"), ("psnr_db_std", ["1.2"], "spreads of few runs"),
     ("rank", ["3", ""], "counts and texts"),
     ("share", ["0.5", "1"], "numbers"), ("twin_mu", ["0.3"], "ends of descents")],
)  # fmt: skip
def test_a_column_has_the_kind_of_its_name_or_values(column, values, kind):
    assert columns.kind_of(column, pd.Series(values)).name == kind
