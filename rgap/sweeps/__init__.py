"""Many attacks and analyses as tables; only here and in notebooks do attack and truth meet. One module a subject."""

from rgap.sweeps.attacks import attack_each, layer_errors, wrong_signs
from rgap.sweeps.audits import attacks_under_defence, audited_and_attacked
from rgap.sweeps.batches import COSINE, attack_batches, batch_outcome, sample_batches, width_table
from rgap.sweeps.chains import kind_table, sample_chains
from rgap.sweeps.random_chains import random_chain
from rgap.sweeps.ranks import predicted_and_measured, rank_law_sample, rank_table

__all__ = [
    "COSINE",
    "attack_batches",
    "attack_each",
    "attacks_under_defence",
    "audited_and_attacked",
    "batch_outcome",
    "kind_table",
    "layer_errors",
    "predicted_and_measured",
    "random_chain",
    "rank_law_sample",
    "rank_table",
    "sample_batches",
    "sample_chains",
    "width_table",
    "wrong_signs",
]
