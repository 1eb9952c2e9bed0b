"""Importing this module registers the parameters of every figure (`params.FIGURES`)."""

from rlhfscale.study import figures, real_model, sweeps, sweeps_compute, sweeps_data, sweeps_process

__all__ = ["figures", "real_model", "sweeps", "sweeps_compute", "sweeps_data", "sweeps_process"]
