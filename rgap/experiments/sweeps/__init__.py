"""Many attacks and analyses as tables; only here and in notebooks do attack and truth meet. One module a subject."""

from rgap.experiments.sweeps.attacks import attack_each, layer_errors, wrong_signs
from rgap.experiments.sweeps.audits import attacks_under_defence, audited_and_attacked
from rgap.experiments.sweeps.batches import COSINE, attack_batches, batch_outcome, sample_batches, width_table
from rgap.experiments.sweeps.chains import kind_table, sample_chains
from rgap.experiments.sweeps.conv_batches import batch_limits, sample_conv_batches
from rgap.experiments.sweeps.cost import costs, deficits, exponents
from rgap.experiments.sweeps.methods import (
    METHODS,
    compare_methods,
    networks_won,
    quality_table,
    time_ratios,
    time_table,
)
from rgap.experiments.sweeps.noise import (
    defended_attacks,
    plain_attack,
    predicted_and_true,
    reference,
    sample_noisy_attacks,
)
from rgap.experiments.sweeps.random_chains import random_chain
from rgap.experiments.sweeps.ranks import predicted_and_measured, rank_law_sample, rank_table
from rgap.experiments.sweeps.real_networks import attacked_and_ranked, least_widths, missing_ranks, recovered_or_short
from rgap.experiments.sweeps.refinement import STAGES, attack_stages, normal_weights
from rgap.experiments.sweeps.soundness import soundness
from rgap.experiments.sweeps.trained import trained_attacks
from rgap.experiments.sweeps.twins import dlg_on_twins, enlarged, margin_curve, true_margins, twin_census, twin_pairs

__all__ = [
    "COSINE",
    "METHODS",
    "STAGES",
    "attack_batches",
    "attack_each",
    "attack_stages",
    "attacked_and_ranked",
    "attacks_under_defence",
    "audited_and_attacked",
    "batch_limits",
    "batch_outcome",
    "compare_methods",
    "costs",
    "defended_attacks",
    "deficits",
    "dlg_on_twins",
    "enlarged",
    "exponents",
    "kind_table",
    "layer_errors",
    "least_widths",
    "margin_curve",
    "missing_ranks",
    "networks_won",
    "normal_weights",
    "plain_attack",
    "predicted_and_measured",
    "predicted_and_true",
    "quality_table",
    "random_chain",
    "rank_law_sample",
    "rank_table",
    "recovered_or_short",
    "reference",
    "sample_batches",
    "sample_chains",
    "sample_conv_batches",
    "sample_noisy_attacks",
    "soundness",
    "time_ratios",
    "time_table",
    "trained_attacks",
    "true_margins",
    "twin_census",
    "twin_pairs",
    "width_table",
    "wrong_signs",
]
