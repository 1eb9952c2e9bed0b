"""Training sets made from the task universe: documents to imitate and labelled responses to compare."""

from rlhfscale.data.demonstrations import demonstrations, encode_prompts, problem_list
from rlhfscale.data.responses import Responses, label

__all__ = ["Responses", "demonstrations", "encode_prompts", "label", "problem_list"]
