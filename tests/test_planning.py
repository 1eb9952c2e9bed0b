"""The planner's formulas against torch's own counts and tensors, on small models."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from planned_against_measured import idle_steps
from rlhfscale.bed import ladder
from rlhfscale.bed import workloads as bed_workloads
from rlhfscale.bed.demonstrations import demonstrations
from rlhfscale.bed.workloads import chain_lengths
from rlhfscale.bench.peers.protocol import counter
from rlhfscale.chat import specs as chat_specs
from rlhfscale.chat import workloads as chat_workloads
from rlhfscale.evals import specs as evals_specs
from rlhfscale.models import lm
from rlhfscale.models.documents import Documents
from rlhfscale.models.shapes import Shape
from rlhfscale.planning import workloads
from rlhfscale.planning.memory import Layout, peak
from rlhfscale.planning.network import Network, muon_flops
from rlhfscale.planning.passes import Decode, Pass, Rows
from rlhfscale.planning.workloads import workload
from rlhfscale.rl import networks
from rlhfscale.rl.logprobs import token_logprobs
from rlhfscale.samplers import hf, request_seeds
from rlhfscale.study import recipes

SHAPE = Shape(layers=3, width=64, feed_forward=160, heads=4, kv_heads=2, head_width=16, vocab=101, tied=True)
RANK = 4
BATCH, PROMPT, RESPONSE = 12, 20, 6


def tiny(dtype=torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=SHAPE.vocab,
        hidden_size=SHAPE.width,
        intermediate_size=SHAPE.feed_forward,
        num_hidden_layers=SHAPE.layers,
        num_attention_heads=SHAPE.heads,
        num_key_value_heads=SHAPE.kv_heads,
        tie_word_embeddings=True,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config).to(dtype)


def adapted(stored: str, kernels: str):
    """Networks on a tiny base, computed by fused layers or by transformers', and what the planner calls them."""
    dtype = torch.float32 if stored == "fp32" else torch.bfloat16
    found = networks.build(tiny(dtype), critic="none", rank=RANK)
    if kernels == "plain":
        found._fused = None
    return found, Network(SHAPE, stored, stored, rank=RANK, trained=1)


def given(group: int):
    """Ids of sequences of one length, ``group`` to each prompt, and where the response's tokens are predicted."""
    ids = torch.randint(3, SHAPE.vocab, (BATCH, PROMPT + RESPONSE), generator=torch.Generator().manual_seed(1))
    ids[:, :PROMPT] = ids[::group, :PROMPT].repeat_interleave(group, 0)
    where = torch.zeros(ids.shape, dtype=torch.bool)
    where[:, PROMPT - 1 : -1] = True
    return ids, where, torch.full((BATCH,), PROMPT), torch.full((BATCH,), PROMPT + RESPONSE)


def learn(found, ids, where, prompts, lengths):
    states = found.hidden_at(ids, where, "policy", prompts, lengths)
    return token_logprobs(states, found.output_head("policy"), ids[where], 1.0)[0].sum()


@pytest.mark.parametrize("kernels", ["fused", "plain"])
@pytest.mark.parametrize("stored", ["fp32", "bf16"])
@pytest.mark.parametrize("group", [1, 6])
def test_operations_of_adapters_are_those_that_torch_counts(stored, kernels, group):
    found, network = adapted(stored, kernels)
    batch = given(group)
    learn(found, *batch)  # sums of weights and adapters are formed once, and are not part of a pass
    part = Pass(network, Rows(BATCH, PROMPT, RESPONSE, group), True, "vocabulary", gradients=True)
    with counter() as forward:
        loss = learn(found, *batch)
    with counter() as backward:
        loss.backward()
    slope = 2.0 * SHAPE.num_head * BATCH * RESPONSE  # of the log-probabilities, formed on the way
    assert forward.get_total_flops() == pytest.approx(part.forward(kernels) + slope, rel=0.02)
    assert backward.get_total_flops() == pytest.approx(part.backward(kernels) - slope, rel=0.03)


@pytest.mark.parametrize("kernels", ["fused", "plain"])
@pytest.mark.parametrize("stored", ["fp32", "bf16"])
def test_what_autograd_keeps_is_what_the_formula_says(stored, kernels):
    found, network = adapted(stored, kernels)
    batch = given(1)
    learn(found, *batch)
    own = {weights.untyped_storage().data_ptr() for weights in found.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.dtype != torch.int64:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = learn(found, *batch)
    assert loss.requires_grad
    part = Pass(network, Rows(BATCH, PROMPT, RESPONSE), True, "vocabulary", gradients=True)
    predicted = part.kept_bytes(kernels, BATCH * (PROMPT + RESPONSE), checkpointing=False)
    assert sum(kept.values()) == pytest.approx(predicted, rel=0.12)


def test_operations_of_training_all_weights():
    model = tiny().requires_grad_(True)
    network = Network(SHAPE, "fp32", "fp32", whole=True)
    ids = given(1)[0]
    documents = Documents(
        ids.numpy(), torch.full((BATCH,), PROMPT + RESPONSE).numpy(), torch.full((BATCH,), PROMPT).numpy()
    )
    part = Pass(network, Rows(BATCH, PROMPT - 1, RESPONSE, read="all"), head="vocabulary", gradients=True)
    with counter() as count:
        lm.response_loss(model, documents, torch.arange(BATCH).numpy(), skip_prompt=False).backward()
    assert count.get_total_flops() == pytest.approx(part.flops("fused"), rel=0.02)
    muon, _ = lm.optimizers(model, 1e-3, 1e-3)
    with counter() as count:
        muon.step()
    assert count.get_total_flops() == pytest.approx(muon_flops(SHAPE), rel=1e-6)


@pytest.mark.parametrize("stored", ["fp32", "bf16"])
def test_operations_of_decoding(stored):
    found, network = adapted(stored, "fused")
    prompts = [row[:PROMPT].tolist() for row in given(4)[0]]
    with found.decoder() as policy:
        hf.sample(policy, prompts, seeds=request_seeds((0,), BATCH), max_new_tokens=2, ignore_eos=True)
        with counter() as count:
            hf.sample(policy, prompts, seeds=request_seeds((0,), BATCH), max_new_tokens=RESPONSE, ignore_eos=True)
    decode = Decode(network, Rows(BATCH, PROMPT, RESPONSE, 4), BATCH)
    assert count.get_total_flops() == pytest.approx(decode.flops("fused"), rel=0.04)


def test_weights_adapters_and_optimiser_take_the_bytes_of_their_tensors():
    found, network = adapted("bf16", "fused")
    base = sum(w.nbytes for name, w in found.model.named_parameters() if "lora_" not in name)
    adapters = [w for name, w in found.model.named_parameters() if "lora_" in name]
    assert network.base_bytes == base
    assert network.adapter_bytes == sum(w.nbytes for w in adapters)
    learn(found, *given(1)).backward()
    optimizer = torch.optim.AdamW(adapters)
    optimizer.step()
    moments = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.ndim)
    assert network.learner_bytes == sum(w.grad.nbytes for w in adapters) + moments


def test_nf4_weights_take_half_a_byte_and_their_scales():
    functional = pytest.importorskip("bitsandbytes.functional")
    weights = torch.randn(1024, 4096)
    packed, state = functional.quantize_4bit(weights, quant_type="nf4", compress_statistics=True)
    scales = state.absmax.nbytes + state.state2.absmax.nbytes
    shape = Shape(layers=1, width=1, feed_forward=1, heads=1, kv_heads=1, head_width=1, vocab=1, tied=True)
    per_weight = Network(shape, "nf4", "bf16").base_bytes - 2.0 * (shape.num_params - shape.num_linear)
    assert (packed.nbytes + scales) / weights.numel() == pytest.approx(per_weight / shape.num_linear, rel=1e-3)


def test_idle_steps_are_those_of_the_sampler():
    prompts = np.ones(4)
    assert idle_steps(prompts, np.array([3.0, 3.0, 3.0, 3.0]), 4) == 1.0
    # after one step three of four have ended: the batch becomes one; after the first token two of four are kept
    assert idle_steps(prompts, np.array([5.0, 1.0, 1.0, 1.0]), 4) == 1.0
    assert idle_steps(prompts, np.array([5.0, 5.0, 1.0, 1.0]), 4) == 2.0


def test_a_plans_constants_are_the_stages_own():
    from rlhfscale.bed.stages import LOSS_POINTS
    from rlhfscale.chat import stages as chat_stages
    from rlhfscale.models import llama, packing
    from rlhfscale.planning import passes
    from rlhfscale.rewards import scorer
    from rlhfscale.rl import PPOConfig, logprobs

    assert (chat_workloads.ANSWER_BATCH, chat_workloads.GPU_BATCH) == (chat_stages.BATCH, chat_stages.GPU_BATCH)
    assert workloads.TOKENS_PER_PASS == scorer.TOKENS_PER_MICRO_BATCH == PPOConfig().max_tokens_per_pass
    assert 1 / chat_workloads.CALIBRATED_SHARE == chat_stages.CALIBRATED
    assert bed_workloads.LOSS_POINTS == LOSS_POINTS
    assert (
        passes.CACHED_TOKENS == llama.CACHED_TOKENS
        and passes.LEAST_KEYS == llama.LANES
        and passes.A_PART == llama.A_PART
    )
    assert passes.WIDEST_PACK == packing.WIDEST and passes.LOGITS == logprobs.CHUNK


def test_every_kind_of_spec_can_be_planned():
    from rlhfscale.bed import specs
    from rlhfscale.runs.spec import Spec

    kinds = {
        kind
        for module in (specs, chat_specs, evals_specs)
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, Spec) and "runner" in vars(kind)
    }
    for kind in kinds - {evals_specs.Coverage}:  # that one has no model
        assert callable(workloads._formula(kind)), kind


def test_more_data_means_more_work_and_a_larger_batch_more_memory():
    recipe = recipes.load("laptop")
    spec = recipe.policy("150k", "150k", 1).changed(critic="separate")
    layout = Layout("fused", 1, 1, 16384, 0.0)
    twice = spec.changed(num_updates=2 * spec.num_updates)
    assert sum(workload(twice).flops("fused").values()) == pytest.approx(
        2 * sum(workload(spec).flops("fused").values())
    )
    assert peak(workload(twice), layout).parts["activations"] == peak(workload(spec), layout).parts["activations"]
    larger = spec.changed(minibatch_size=2 * spec.minibatch_size)
    parts = [peak(workload(each), layout).parts for each in (spec, larger)]
    assert parts[1]["activations"] > 1.4 * parts[0]["activations"]
    assert parts[1]["weights"] == parts[0]["weights"]


@pytest.mark.parametrize("rung", ladder.RUNGS.values(), ids=ladder.RUNGS)
def test_a_rungs_shape_has_its_parameters(rung):
    assert rung.shape.num_params == rung.num_params_with_embeddings


def test_lengths_are_those_of_the_demonstrations():
    drawn = demonstrations((7,), "train", ("lists", "registers"), 2000, 0.0)
    lengths = chain_lengths(("lists", "registers"))
    assert lengths.prompt == pytest.approx(drawn.prompt_lengths.mean(), rel=0.03)
    assert lengths.prompt + lengths.response == pytest.approx(drawn.lengths.mean(), rel=0.03)
