"""Floor 3: closed forms that make new layers compute what trained blocks computed, from moments.

It works on (new layer, dense block, moments) and knows no swap; `lightning_bfmoe.calibrated`
joins the two.
"""

from lightning_bfmoe.calibrate.correction import fit_correction_, low_rank_correction
from lightning_bfmoe.calibrate.descend import descend_trits
from lightning_bfmoe.calibrate.equalize import column_equalizer
from lightning_bfmoe.calibrate.feed_forward import BlockFit, Dense, fit_inputs_, fit_output_
from lightning_bfmoe.calibrate.gptq import gptq_ternary
from lightning_bfmoe.calibrate.matrix import MatrixChoice, Recipe
from lightning_bfmoe.calibrate.moments import Moments
from lightning_bfmoe.calibrate.orbit import place_orbit_
from lightning_bfmoe.calibrate.refit import refit_output
from lightning_bfmoe.calibrate.report import CalibrationReport
from lightning_bfmoe.calibrate.router import router_weight, spherical_centroids
from lightning_bfmoe.calibrate.run import Job, calibrate_layers
from lightning_bfmoe.calibrate.settings import Calibration

__all__ = [
    "BlockFit",
    "Calibration",
    "CalibrationReport",
    "Dense",
    "Job",
    "MatrixChoice",
    "Moments",
    "Recipe",
    "calibrate_layers",
    "column_equalizer",
    "descend_trits",
    "fit_correction_",
    "fit_inputs_",
    "fit_output_",
    "gptq_ternary",
    "low_rank_correction",
    "place_orbit_",
    "refit_output",
    "router_weight",
    "spherical_centroids",
]
