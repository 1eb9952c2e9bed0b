"""Tiny scorers and another tokenizer than the study's, for the tests of the reward models."""

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers import models as tokenizer_models
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

import tiny
from rlhfscale.bed import ladder
from rlhfscale.bed.ladder import PAD_ID
from rlhfscale.models.sequences import Sequences

SMALL = {"vocab_size": ladder.vocab_size(), "num_labels": 1, "pad_token_id": PAD_ID}
LLAMA_LIKE = SMALL | {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def random_head(model, seed=0):
    """The model with a random head, so that scores differ."""
    with torch.no_grad():
        model.score.weight.normal_(generator=torch.Generator().manual_seed(seed))
    return model


def byte_tokenizer(pad_is_eos=False):
    """Another vocabulary than the study's: one token for each byte."""
    special = ["<s>", "</s>"] if pad_is_eos else ["<s>", "</s>", "<p>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(tokenizer_models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>" if pad_is_eos else "<p>"
    )


def byte_scorer(tokenizer, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LLAMA_LIKE | {"vocab_size": len(tokenizer), "max_position_embeddings": 256, "pad_token_id": 0}
        model = LlamaForSequenceClassification(LlamaConfig(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6.0 if parameter.ndim == 2 else 1.0)
    return random_head(model)


def padded(data, width, pad_id=PAD_ID):
    """The same sequences, padded to a width with any id."""
    ids = np.full((len(data), width), pad_id, np.int64)
    for row, length in enumerate(data.lengths):
        ids[row, :length] = data.ids[row, :length]
    return Sequences(ids, data.prompt_lengths, data.lengths, data.finished, data.tokenizer)


def used_weights(model):
    """All weights but the head that the trained one replaces."""
    return {name: weight for name, weight in tiny.weights(model).items() if "original_module" not in name}
