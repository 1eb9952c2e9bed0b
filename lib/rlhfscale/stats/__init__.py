"""Statistics: bootstrap intervals over seeds and prompts (bootstrap.py), and laws fitted to results (fits.py)."""
