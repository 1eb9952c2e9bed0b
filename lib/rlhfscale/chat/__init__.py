"""The same study on published chat models, from SmolLM2 135M to Llama 3.1 405B.

reasoning.py  questions with one right number as the answer
answers.py    a model's responses to questions, graded
finetune.py   supervised fine-tuning by a LoRA adapter
specs.py      what each stage makes, and from what
stages.py     the stages: fine-tuning, answers, reward models, policies
workloads.py  what each stage computes, for the planner
recipe.py     the settings that the figures of such a tier hold fixed
"""
