"""The laptop bed: made-up reasoning tasks, and language models small enough to be trained on a CPU in minutes.

tasks/             the tasks: chains of steps in two families, with a verifier that checks every step
demonstrations.py  prompts with a demonstrator's response, as tokens
responses.py       sampled responses with the verifier's labels
labels.py          what these labels give a reward model to learn from
ladder.py          the sizes of model; rungs.py makes a model of each size
specs.py           what each stage makes, and from what
stages.py          the stages: pretraining, fine-tuning, sampling, reward models, policies, evaluation
workloads.py       what each stage computes, for the planner; flops.py counts its operations
recipe.py          the settings that the figures of a tier hold fixed
"""
