"""The claims: one module for each notebook, read top to bottom.

A module holds all that is particular to its figure, in this order:

- ``Params``, what the notebook varies, and ``Params.specs()``, the artifacts that follow from it;
- ``CLAIM``, the claim and its verdict rule, fixed before the runs;
- ``measure(P, made)``, from artifacts to tidy tables and the verdict;
- ``draw(runs, summary)``, the picture.

What several figures share is in `rlhfscale.study`. Importing this package registers every figure's parameters
(`study.params.FIGURES`) and every claim (`study.rules.CLAIMS`).
"""

from rlhfscale.claims import (
    benchmarks,
    c01_policy_size,
    c02_reward_model_size,
    c03_training_data,
    c04_prompt_vs_response_diversity,
    c05_responses_per_prompt,
    c06_best_of_n,
    c07_data_composition,
    c08_process_supervision,
    c09_algorithms,
    c10_pretraining_vs_rlhf,
    learning_rates,
    ledger,
    real_model,
    test_bed,
    throughput,
    walkthrough,
)

MODULES = (
    test_bed,
    learning_rates,
    walkthrough,
    c01_policy_size,
    c02_reward_model_size,
    c03_training_data,
    c04_prompt_vs_response_diversity,
    c05_responses_per_prompt,
    c06_best_of_n,
    c07_data_composition,
    c08_process_supervision,
    c09_algorithms,
    c10_pretraining_vs_rlhf,
    real_model,
    benchmarks,
    throughput,
    ledger,
)
"""In the order in which a reader would open them."""
