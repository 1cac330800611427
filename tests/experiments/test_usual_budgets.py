from rgap.experiments import usual_budgets as experiment


def test_an_optimiser_stands_beside_the_closed_form_and_chunks_go_on_where_others_end(monkeypatch):
    monkeypatch.setattr(experiment, "USUAL_STEPS", {"DLG": 3, "Inverting Gradients": 3})
    monkeypatch.setattr(experiment, "USUAL_RESTARTS", 1)
    table = experiment.sample_opponents(count=2, seed=4)
    assert table["case"].tolist() == ["fcn3, image 0, DLG", "fcn3, image 0, Inverting Gradients"]
    assert (table["ours_db"] > 100).all() and table["ok"].all() and (table["steps"] == 3).all()
