"""Figures from results and tables; nothing here computes. One module a subject, all names here."""

from rgap.plots.images import gallery, rescale
from rgap.plots.layers import error_growth, phase_transition, wrong_signs
from rgap.plots.noise import defence_quality, predicted_against_measured
from rgap.plots.ranks import deficit_against_psnr, law_against_number, ra_along_depth
from rgap.plots.style import MARKERS, PALETTE
from rgap.plots.twins import ambiguity, twin_branches

__all__ = [
    "MARKERS",
    "PALETTE",
    "ambiguity",
    "defence_quality",
    "deficit_against_psnr",
    "error_growth",
    "gallery",
    "law_against_number",
    "phase_transition",
    "predicted_against_measured",
    "ra_along_depth",
    "rescale",
    "twin_branches",
    "wrong_signs",
]
