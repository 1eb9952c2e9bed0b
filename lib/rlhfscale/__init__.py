"""A reproducible study of "Does RLHF Scale?" (arXiv 2412.06000).

The rooms of the package, from the study down to the models; imports go down only:

    cli.py     the command line: rlhfscale run | plan | status | claims | bench | evaluate
    claims/    one module for each notebook: its parameters, artifacts, verdict rule, tables and picture
    study/     what the claims share: typed parameters, recipes, tidy tables, verdict rules, the style of pictures
    bench/     our trainers' speed and memory against their peers'
    bed/       the laptop bed: tasks, a ladder of small models, demonstrations, labelled responses, and its stages
    chat/      the same stages on published language models
    evals/     best-of-N, AlpacaEval, Arena-Hard, MT-Bench, verifiers and judges
    planning/  memory, floating-point operations and GPU-hours of a stage, by formula
    runs/      the graph of artifacts: specs and their keys, the store, worker processes, Ray
    rl/        PPO, GRPO and RLOO, and what they are made of
    rewards/   outcome and process reward models, ensembles, mixtures
    samplers/  decoding: in process, by vLLM, or shared by several processes
    models/    loading in fp32, bf16 or NF4; fused LoRA and Llama layers for CPUs; several processes
    stats/     bootstrap intervals and fits

The trainers stand by themselves: ``from rlhfscale.rl import PPO, PPOConfig``.
"""

import logging

__version__ = "0.1.0"

# bitsandbytes says at its import that a kernel, which is not used here, could not be downloaded
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
