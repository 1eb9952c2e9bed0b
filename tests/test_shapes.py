"""Shapes against published parameter counts and against models that transformers builds."""

import pytest
import torch
import transformers

from rlhfscale.models.checkpoints import CHECKPOINTS
from rlhfscale.models.shapes import Shape

# The counts that the hub shows for each checkpoint's safetensors (tied embeddings once).
PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "smollm2-135m-hub": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
}


def test_every_checkpoint_has_its_published_number_of_parameters():
    assert {name: item.num_params for name, item in CHECKPOINTS.items()} == PUBLISHED


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_checkpoint_is_the_model_that_transformers_builds_from_its_shape(name):
    shape = CHECKPOINTS[name].shape
    family = (transformers.Qwen2Config, transformers.Qwen2ForCausalLM)
    if not shape.attention_bias:
        family = (transformers.LlamaConfig, transformers.LlamaForCausalLM)
    config = family[0](
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied,
    )
    with torch.device("meta"):
        model = family[1](config)
    if shape.tied:
        model.tie_weights()
    assert model.model.layers[0].self_attn.head_dim == shape.head_width
    assert sum(weights.numel() for weights in model.parameters()) == shape.num_params


def test_adapters_have_a_row_and_a_column_for_each_rank_of_every_linear_layer():
    shape = Shape(layers=2, width=8, feed_forward=16, heads=4, kv_heads=2, head_width=2, vocab=10, tied=True)
    attention = (8 + 8) + 2 * (8 + 4) + (8 + 8)
    assert shape.adapter_params(3) == 2 * 3 * (attention + 3 * (8 + 16))
