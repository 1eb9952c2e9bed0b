"""Importing this module registers the parameters of every figure (`params.FIGURES`)."""

from rlhfscale import figures, real_model, sweeps

__all__ = ["figures", "real_model", "sweeps"]
