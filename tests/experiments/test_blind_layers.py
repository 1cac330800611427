"""The sample of blind layers: its certificates hold, and it sees a wrong one."""

from dataclasses import replace

import rgap.experiments.blind_layers as experiment


def test_no_false_certificate_in_a_sample_of_convolutions():
    table = experiment.sample_blind(14, seed=100)
    assert table["ok"].all(), table[~table["ok"]].to_string()
    assert (table["verdict"] == "certified").sum() >= 4


def test_the_sample_sees_a_wrong_certificate(monkeypatch):
    solve = experiment.solve_blind

    def shifted(*arguments, **options):
        solution = solve(*arguments, **options)
        return solution if solution.x is None else replace(solution, x=solution.x + 1e-3, certified=True)

    monkeypatch.setattr(experiment, "solve_blind", shifted)
    table = experiment.sample_blind(14, seed=100)
    assert (~table["ok"]).sum() >= 4
