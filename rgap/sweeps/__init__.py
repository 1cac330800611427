"""Many attacks and analyses as tables; only here and in notebooks do attack and truth meet. One module a subject."""

from rgap.sweeps.attacks import attack_each, layer_errors, wrong_signs
from rgap.sweeps.audits import attacks_under_defence, audited_and_attacked
from rgap.sweeps.ranks import predicted_and_measured, rank_law_sample, rank_table

__all__ = [
    "attack_each",
    "attacks_under_defence",
    "audited_and_attacked",
    "layer_errors",
    "predicted_and_measured",
    "rank_law_sample",
    "rank_table",
    "wrong_signs",
]
