"""Many attacks and analyses as tables; only here and in notebooks do attack and truth meet. One module a subject."""

from rgap.sweeps.attacks import attack_each, layer_errors, wrong_signs
from rgap.sweeps.chains import kind_table, sample_chains
from rgap.sweeps.random_chains import random_chain
from rgap.sweeps.ranks import predicted_and_measured, rank_law_sample, rank_table

__all__ = [
    "attack_each",
    "kind_table",
    "layer_errors",
    "predicted_and_measured",
    "random_chain",
    "rank_law_sample",
    "rank_table",
    "sample_chains",
    "wrong_signs",
]
