import pandas as pd

from rgap.experiments import clients as experiment


def test_every_kind_of_client_is_attacked_and_none_certified_wrongly():
    rows = experiment.sample_clients(26, 3)
    assert list(rows["client"].unique()) == list(experiment.ALL_CLIENTS) and rows["ok"].all()
    table = experiment.clients_by_kind(rows)
    assert table["attacks"].tolist() == [2] * 13 + [26] and table["wrong_exact"].sum() == 0


def test_the_table_counts_what_was_found_and_certified():
    rows = pd.DataFrame({
        "client": ["clipped", "clipped", "clipped", "autocast"],
        "verdict": ["exact", "inconsistent", "exact", "exact"],
        "psnr_db": [90.0, 80.0, 20.0, 90.0],
        "identifiable": [True, True, True, True],
        "ok": [True, True, False, True],
    })  # fmt: skip
    table = experiment.clients_by_kind(rows).set_index("client")
    assert table.loc["clipped", ["attacks", "exact", "wrong_exact", "recovered", "certified"]].tolist() == [
        3,
        2,
        1,
        2,
        1,
    ]
    assert table.loc["clipped", "certified_share"] == 0.5 and table.loc["autocast", "recovered"] == 0
    assert table.loc["all", "attacks"] == 4
