"""Our PPO, reward-model training and sampler timed against the library one would otherwise take.

    cases.py   what is timed, as data
    run.py     one case from start to finish; rounds.py lets both sides take turns; flops.py measures the machine
    ours.py    our side of every case; peers/ has the other sides, scripts for environments of their own
    report.py  tables and picture

Each side is a child process that speaks peers/protocol.py. requirements/bench.txt lists what the peers need.
"""
