"""Figures from results and tables; nothing here computes. One module a subject, all names here."""

from rgap.experiments.plots.audit import audit_steps
from rgap.experiments.plots.batches import found_against_batch, seconds_against_batch
from rgap.experiments.plots.conv_batches import against_batch
from rgap.experiments.plots.images import gallery, rescale
from rgap.experiments.plots.layers import error_growth, phase_transition, wrong_signs
from rgap.experiments.plots.methods import cost_against_size, quality_against_time
from rgap.experiments.plots.noise import defence_quality, predicted_against_measured, stage_quality
from rgap.experiments.plots.ranks import deficit_against_psnr, law_against_number, ra_along_depth
from rgap.experiments.plots.real_networks import least_widths
from rgap.experiments.plots.style import MARKERS, PALETTE
from rgap.experiments.plots.trained import trained
from rgap.experiments.plots.twins import ambiguity, twin_branches

__all__ = [
    "MARKERS",
    "PALETTE",
    "against_batch",
    "ambiguity",
    "audit_steps",
    "cost_against_size",
    "defence_quality",
    "deficit_against_psnr",
    "error_growth",
    "found_against_batch",
    "gallery",
    "law_against_number",
    "least_widths",
    "phase_transition",
    "predicted_against_measured",
    "quality_against_time",
    "ra_along_depth",
    "rescale",
    "seconds_against_batch",
    "stage_quality",
    "trained",
    "twin_branches",
    "wrong_signs",
]
