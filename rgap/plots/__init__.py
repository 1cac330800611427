"""Figures from results and tables; nothing here computes. One module a subject, all names here."""

from rgap.plots.audit import audit_steps
from rgap.plots.batches import found_against_batch, seconds_against_batch
from rgap.plots.conv_batches import against_batch
from rgap.plots.images import gallery, rescale
from rgap.plots.layers import error_growth, phase_transition, wrong_signs
from rgap.plots.methods import cost_against_size, quality_against_time
from rgap.plots.noise import defence_quality, predicted_against_measured, stage_quality
from rgap.plots.ranks import deficit_against_psnr, law_against_number, ra_along_depth
from rgap.plots.real_networks import least_widths
from rgap.plots.style import MARKERS, PALETTE
from rgap.plots.trained import trained
from rgap.plots.twins import ambiguity, twin_branches

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
