"""Records that an attack or an analysis returns, all frozen, and the errors with which either refuses its arguments."""

from rgap.results.display import reports_frame
from rgap.results.ranks import LayerRank, RankAnalysis
from rgap.results.reconstruction import (
    MAX_CERTIFIED_ERROR,
    PIXEL_SLACK_FACTOR,
    VERDICTS,
    Candidate,
    GradientMismatchError,
    LayerReport,
    PixelRange,
    Reconstruction,
    UnsupportedLayerError,
    certified_psnr_db,
    noise_limit,
    with_accuracy,
)

__all__ = [
    "MAX_CERTIFIED_ERROR", "PIXEL_SLACK_FACTOR", "VERDICTS", "Candidate", "GradientMismatchError", "LayerRank",
    "LayerReport", "PixelRange", "RankAnalysis", "Reconstruction", "UnsupportedLayerError", "certified_psnr_db",
    "noise_limit", "reports_frame", "with_accuracy",
]  # fmt: skip
