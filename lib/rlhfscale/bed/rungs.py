"""The rungs as models: their tokenizer, freshly initialised weights, and the folder that both are saved in.

A folder written here is a plain transformers folder (safetensors and JSON).
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from rlhfscale.bed import tasks
from rlhfscale.bed.ladder import BOS_ID, SPECIAL_TOKENS, Rung


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The from-scratch rungs' tokenizer: one token for each whitespace-separated symbol of the task universe.

    Encoding adds the begin-of-sequence token; text with an unknown symbol must not be given to it: there
    is no unknown token to stand for it, and it would become padding (`data.demonstrations.encode` raises instead).
    """
    pad, bos, eos = SPECIAL_TOKENS
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *tasks.vocabulary()))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=pad))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, BOS_ID)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos)


def build_rung(rung: Rung, seed: int) -> LlamaForCausalLM:
    """A freshly initialised float32 model of a rung; the global torch RNG is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**rung.llama()))


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Write model and tokenizer as one transformers folder."""
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
