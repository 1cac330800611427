import pandas as pd
from torch import nn

from rgap import equations
from rgap.equations.proofs import LayerShape
from rgap.experiments import rank_proofs

SQUARE = LayerShape(1, 1, (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), (6, 6), 1)


def test_shapes_are_those_of_layers_with_weights_and_batches():
    net = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    found = rank_proofs.layer_shapes({"net": (net, (4, 6, 6)), "again": (net, (4, 6, 6))}, (1, 2))
    linear = LayerShape(144, 2, (1,), (1,), ((0, 0),), (1,), (1,), 1)
    assert set(found) == {shape._replace(batch=batch) for shape in (SQUARE, linear) for batch in (1, 2)}


def test_the_table_has_what_elimination_proves_and_no_shape_that_needs_none(monkeypatch, tmp_path):
    strided = SQUARE._replace(stride=(2, 2), filters=2)
    linear = LayerShape(144, 2, (1,), (1,), ((0, 0),), (1,), (1,), 1)
    monkeypatch.setattr(rank_proofs, "table_shapes", lambda: [linear, strided])
    monkeypatch.setattr(equations, "__file__", str(tmp_path / "__init__.py"))
    table = pd.read_csv(rank_proofs.write_proofs())
    assert table["shape"].tolist() == [strided.text] and table["both"].tolist() == [strided.laws().both]
    assert rank_proofs.prove([strided], most_work=0).empty


def test_laws_of_random_layers_are_proved_and_a_wrong_one_is_refuted(monkeypatch):
    table = rank_proofs.sample_rank_proofs(8, seed=1)
    assert (table["verdict"] == "proved").all() and table["ok"].all()
    laws = LayerShape.laws
    monkeypatch.setattr(
        LayerShape,
        "laws",
        lambda self, tested=True: laws(self, tested)._replace(both=1) if tested else laws(self, False),
    )
    wrong = rank_proofs.sample_rank_proofs(3, seed=1)
    assert not wrong["ok"].any() and wrong["why"].str.startswith("bounds and laws").all()
