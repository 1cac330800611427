import json

import pytest

from rgap import models
from rgap.ranks import audit as audits


@pytest.fixture(scope="module")
def cnn6():
    return audits.audit(models.cnn6(), (3, 32, 32), limit=0)


def test_the_table_has_what_decides(cnn6):
    table = cnn6.table()
    assert table.columns.tolist() == audits.COLUMNS and len(table) == 7
    assert set(table["status"]) == {"determined"}
    assert set(audits.COLUMNS) < set(cnn6.to_frame().columns)


def test_the_sentences_give_the_outcome_and_the_advice(cnn6):
    assert cnn6.sentences[0] == cnn6.exposure.sentence
    assert len(cnn6.sentences) == 2 + len(cnn6.advice)
    assert audits.audit(models.cnn6(width=14), (3, 32, 32), limit=0).sentences[0].startswith("stops: ")


def test_as_a_dictionary_it_is_plain_json(cnn6):
    found = json.loads(json.dumps(cnn6.to_dict(), allow_nan=False))
    assert found["outcome"] == "leaks" and found["batch_size"] == 1 and found["image_shape"] == [3, 32, 32]
    assert len(found["layers"]) == len(cnn6.analysis.layers)
    assert [layer["status"] for layer in found["layers"][:2]] == ["determined", None]
    assert found["advice"][0]["sentence"] == cnn6.advice[0].sentence
