"""rlhfscale: a reproducible study of "Does RLHF Scale?" (arXiv 2412.06000)."""

__version__ = "0.1.0"
