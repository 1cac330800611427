"""The audit: its table and sentences, and changes of a network that the analysis then says stop the leak."""

import json

import pytest
from torch import nn

import rgap
from rgap import models
from rgap.ranks import audit as audits
from rgap.ranks.audit import ARGUMENTS, advice_frame, advise, changed
from rgap.ranks.exposure import exposure
from rgap.ranks.rebuild import with_convolution


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


SHAPE = (3, 32, 32)


def judged(model, shape, batch=1):
    return exposure(rgap.rank_analysis(model, shape, batch, limit=0))


def outcome(model, shape, batch=1):
    return judged(model, shape, batch).outcome


@pytest.fixture(scope="module")
def advice():
    return advise(models.cnn6(), SHAPE)


def test_each_change_is_the_smallest_of_its_kind(advice):
    assert {change.what for change in advice} == {*ARGUMENTS, "batch size"}
    for change in advice:
        step = 1 if change.after > change.before else -1
        for value, stops in ((change.after, True), (change.after - step, False)):
            if change.what == "batch size":
                assert (judged(models.cnn6(), SHAPE, value).missing_share >= 0.1) == stops
            elif value != change.before:
                other = with_convolution(models.cnn6(), SHAPE, change.layer, **{ARGUMENTS[change.what]: value})
                assert (judged(other, SHAPE).missing_share >= 0.1) == stops


def test_the_second_layers_width_is_where_virtual_constraints_leave_a_tenth_open(advice):
    every = advise(models.cnn6(), SHAPE, least_share=0)
    (ends,) = [c for c in every if c.what == "output channels" and c.layer == "2"]
    assert (ends.before, ends.after, ends.stops_at, ends.deficit, ends.supply) == (36, 14, "2", 1018, 972)
    (change,) = [c for c in advice if c.what == "output channels" and c.layer == "2"]
    assert (change.before, change.after, change.stops_at, change.deficit, change.supply) == (36, 12, "2", 1344, 972)
    assert change.sentence == (
        "output channels of '2': with 12 instead of 36, '2' would lack 1344 of 3468 equations, "
        "and the step before it could add 972 at most"
    )
    (batch,) = [c for c in advice if c.what == "batch size"]
    assert batch.sentence.startswith("batch size: with 28 instead of 1, '8' would lack 20208 of 81648 equations")


def test_a_network_that_stops_already_needs_no_advice_unless_little_is_missing():
    assert advise(models.cnn6(width=8), SHAPE) == []
    assert {(c.what, c.layer) for c in advise(models.cnn6(width=14), SHAPE)} >= {("output channels", "2")}


def test_for_a_network_with_branches_only_the_batch_size_is_tried():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1)
            self.head = nn.Linear(288, 1)

        def forward(self, x):
            x = self.first(x).tanh()
            return self.head((x + self.second(x)).flatten(1))

    assert outcome(Skip(), (3, 12, 12)) == "leaks"
    assert {change.what for change in advise(Skip(), (3, 12, 12))} == {"batch size"}


def test_what_cannot_be_adapted_is_left_out():
    layers = [nn.Conv2d(3, 12, 3, 2, 1), nn.Tanh(), nn.Conv2d(12, 8, 3, 1, 1), nn.Flatten(), nn.Linear(128, 1)]
    assert ("output channels", "0") in {(c.what, c.layer) for c in advise(nn.Sequential(*layers), (3, 8, 8))}
    layers[2] = nn.Conv2d(12, 8, 3, 1, 1, groups=2)
    assert ("output channels", "0") not in {(c.what, c.layer) for c in advise(nn.Sequential(*layers), (3, 8, 8))}


def test_a_change_can_be_made(advice):
    model = models.cnn6()
    for change in advice:
        new = changed(model, SHAPE, change)
        if change.what == "batch size":
            assert new is model
        else:
            assert outcome(new, SHAPE) == "stops"


def test_as_a_table(advice):
    frame = advice_frame(advice)
    assert len(frame) == len(advice) and frame["after"].dtype == "int64"
    assert advice_frame([]).columns.tolist() == frame.columns.tolist()
