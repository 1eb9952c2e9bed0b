"""Our PPO, reward-model training and sampler timed against the library one would otherwise take.

`run.timed` times one of the `cases`; `report` writes tables and figure. Each side is a child process that speaks
peers/protocol.py: ours is `ours`, the others are the scripts below peers/, which an environment of their own can run
(requirements/bench.txt).
"""
