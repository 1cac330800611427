"""Many attacks and analyses as tables; only here and in notebooks do attack and truth meet. One module a subject."""

from rgap.sweeps.attacks import attack_each, layer_errors, wrong_signs
from rgap.sweeps.ranks import predicted_and_measured, rank_law_sample, rank_table
from rgap.sweeps.twins import enlarged, margin_curve, true_margins, twin_census, twin_pairs

__all__ = [
    "attack_each",
    "enlarged",
    "layer_errors",
    "margin_curve",
    "predicted_and_measured",
    "rank_law_sample",
    "rank_table",
    "true_margins",
    "twin_census",
    "twin_pairs",
    "wrong_signs",
]
