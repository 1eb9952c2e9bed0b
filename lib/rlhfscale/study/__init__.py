"""What the claims share.

params.py     parameters of a figure: typed, read from params/<tier>/, checked before anything is computed
strict_yaml.py  the reader of these files, for plain values alone
figure.py     what these parameters have in common: a recipe, seeds, a rung
recipes.py    the settings that all figures of a tier hold fixed
roles.py      the specs of each role (SFT model, reward model, policy) on either ladder of models
artifacts.py  reading what was made
tables.py     from artifacts to tidy tables
rules.py      verdict rules: from an interval to reproduced, contradicted or inconclusive
style.py      what the pictures share
results.py    the folder of a figure's results, written whole or not at all
ledger.py     the verdicts of all figures in one table
runner.py     runs figures: artifacts, then notebooks, then the ledger; plan.py says beforehand what it takes
notebook.py   one notebook executed by papermill
by_hand.py    PPO computed by hand, for the walkthrough
"""
