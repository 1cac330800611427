"""Many attacks and analyses as tables; only here and in notebooks do attack and truth meet. One module a subject."""

from rgap.sweeps.attacks import attack_each, layer_errors, wrong_signs
from rgap.sweeps.noise import defended_attacks, plain_attack, predicted_and_true, reference, sample_noisy_attacks
from rgap.sweeps.ranks import predicted_and_measured, rank_law_sample, rank_table
from rgap.sweeps.twins import enlarged, margin_curve, true_margins, twin_census, twin_pairs

__all__ = [
    "attack_each",
    "defended_attacks",
    "enlarged",
    "layer_errors",
    "margin_curve",
    "plain_attack",
    "predicted_and_measured",
    "predicted_and_true",
    "rank_law_sample",
    "rank_table",
    "reference",
    "sample_noisy_attacks",
    "true_margins",
    "twin_census",
    "twin_pairs",
    "wrong_signs",
]
