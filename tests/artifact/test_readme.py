"""The README's claims table is the one that notebooks/claims.yml states."""

import re

import pytest

from rgap import artifact

README = (artifact.ROOT / "README.md").read_text(encoding="utf-8")
ROWS = {
    row[0]: row
    for row in re.findall(r"^\| `([\w-]+)` (.*?) \| (\w+) \| `(.*?)` \| (.*?) \| (.*?) \| (.*?) \|$", README, re.M)
}


def test_every_claim_stands_in_the_table_and_no_other():
    assert ROWS.keys() == artifact.read_claims().keys()


@pytest.mark.parametrize("claim_id", sorted(ROWS))
def test_a_row_says_what_the_check_demands(claim_id):
    claim = artifact.read_claims()[claim_id]
    _, _, source, command, expected, _, _ = ROWS[claim_id]
    demanded = f"{claim['expected']} {claim['unit']}".strip()
    assert source == claim["source"] and command == claim["command"] and expected == demanded


@pytest.mark.parametrize("path", re.findall(r"\]\((figures/[^)]+)\)", README))
def test_every_picture_is_one_that_a_notebook_writes(path):
    assert path.removeprefix("figures/") in {name for names in artifact.expected_outputs().values() for name in names}
