"""LoRA products on PEFT's own layers: other architectures than Llama, adapters in turn, and 4-bit weights."""

import copy
import itertools

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import tiny_rl
from rlhfscale.models import loading, lora
from rlhfscale.models.loading import CRITIC, POLICY
from rlhfscale.rl import PPO, networks
from rlhfscale.rl.networks import REFERENCE
from tiny_rl import language_model, ragged, relative

OTHERS = {
    "Gemma": {"head_dim": 8},
    "Phi": {},
    "Qwen3": {"head_dim": 8},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "GPTNeoX": {},
    "GPT2": {"n_positions": 64},
}
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:The PEFT config's `base_model_name_or_path`")


def pair(base, rank=4, targets="all-linear"):
    """Our networks with random adapters, and plain PEFT with the same in another copy of the model."""
    plain = get_peft_model(copy.deepcopy(base), loading.lora_config(rank, 2.0 * rank, targets), adapter_name=POLICY)
    plain.add_adapter(CRITIC, loading.lora_config(rank, 2.0 * rank, targets))
    ours = networks.build(base, critic="separate", rank=rank, alpha=2.0 * rank, targets=targets)
    tiny_rl.randomise(ours)
    plain.load_state_dict(ours.model.state_dict(), strict=True)
    return ours, plain


def of_peft(plain, ids, role, slope):
    """Last hidden states and LoRA gradients by PEFT alone."""
    plain.zero_grad()
    with plain.disable_adapter() if role == REFERENCE else torch.enable_grad():
        if role != REFERENCE:
            plain.set_adapter(role)
        hidden = loading.trunk(plain.base_model.model)(input_ids=ids, use_cache=False).last_hidden_state
    if role != REFERENCE:
        (hidden * slope.to(hidden.dtype)).sum().backward()
    return hidden.detach(), tiny_rl.gradients(plain)


def of_ours(ours, ids, role, slope):
    ours.zero_grad()
    hidden = ours.hidden(ids, role)
    if role != REFERENCE:
        (hidden * slope.to(hidden.dtype)).sum().backward()
    return hidden.detach(), tiny_rl.gradients(ours.model)


def batch(rows=5, longest=17, width=32):
    ids, mask = ragged(rows, longest)
    slope = torch.randn(rows, longest, width, generator=torch.Generator().manual_seed(4)) * mask[..., None]
    return ids, mask, slope


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures_equal_peft(kind, dtype):
    """Policy, critic and reference, each asked after another."""
    ours, plain = pair(language_model(kind, scale=2.0, **OTHERS[kind]).to(dtype))
    assert ours._fused is None
    exact = copy.deepcopy(plain).double()
    ids, mask, slope = batch()
    for role in (REFERENCE, POLICY, CRITIC, REFERENCE, POLICY):
        (found, grads), (expected, wanted) = of_ours(ours, ids, role, slope), of_peft(exact, ids, role, slope)
        assert grads.keys() == wanted.keys() and all(f".{role}." in name for name in grads)
        if dtype == torch.float32:
            assert relative(found[mask], expected[mask]) < 5e-6
            assert all(relative(grads[name], wanted[name]) < 3e-5 for name in wanted)
        else:
            theirs, their_grads = of_peft(plain, ids, role, slope)
            assert relative(found[mask], expected[mask]) < 2 * relative(theirs[mask], expected[mask])
            assert role == REFERENCE or relative(grads, wanted) < 2 * relative(their_grads, wanted)


@pytest.mark.parametrize("kind", ["Gemma", "GPT2"])
@pytest.mark.parametrize("critic", ["trunk", "separate"])
def test_other_architectures_learn(kind, critic):
    """A whole update: the sampler agrees with the trainer, and the policy leaves the reference."""
    base = language_model(kind, **OTHERS[kind] | {"vocab_size": 60, "max_position_embeddings": 64})
    run = tiny_rl.trainer(base=base, critic=critic, policy_lr=1e-2)
    records = tiny_rl.updates(run, 3)
    assert all(record["sampler_gap_nats"] < 1e-3 for record in records)
    assert abs(records[0]["kl_nats"]) < 1e-4 and abs(records[2]["kl_nats"]) > 0.01


def test_only_what_was_asked_for_is_adapted():
    """Layers of one input of which some have an adapter, in both forms of the product."""
    for targets, kind in itertools.product((["q_proj"], ["v_proj", "up_proj"], ["k_proj", "o_proj"]), ("Llama", "Phi")):
        targets = ["fc1" if kind == "Phi" and t == "up_proj" else t for t in targets]
        targets = ["dense" if kind == "Phi" and t == "o_proj" else t for t in targets]
        ours, plain = pair(language_model(kind), targets=targets)
        ids, mask, slope = batch()
        (found, grads), (expected, wanted) = of_ours(ours, ids, POLICY, slope), of_peft(plain, ids, POLICY, slope)
        assert {name.split(".")[-4] for name in grads} == set(targets)
        assert relative(found[mask], expected[mask]) < 5e-6 and relative(grads, wanted) < 3e-5


def test_outside_of_the_switch_layers_are_pefts_to_the_bit():
    ours, plain = pair(language_model(num_key_value_heads=2))
    ids, _, slope = batch()
    ours.hidden(ids, POLICY)
    for role in (POLICY, CRITIC):
        with ours.as_peft(role) as model:
            found = loading.trunk(model.base_model.model)(input_ids=ids, use_cache=False).last_hidden_state
        assert torch.equal(found, of_peft(plain, ids, role, slope)[0])


def test_the_switch_is_put_back():
    ours, _ = pair(language_model())
    before = ours.switch.fused, ours.switch.adapter
    with lora.adapter(ours.switch, POLICY):
        with lora.adapter(ours.switch, None):
            assert (ours.switch.fused, ours.switch.adapter) == (True, None)
        assert ours.switch.adapter == POLICY
        with pytest.raises(RuntimeError), lora.adapter(ours.switch, CRITIC):
            raise RuntimeError
        assert ours.switch.adapter == POLICY
    assert (ours.switch.fused, ours.switch.adapter) == before == (False, None)


@pytest.mark.parametrize(("width", "rank"), [(96, 2), (16, 16)])
def test_gradients_equal_finite_differences(width, rank):
    """Of both branches, in float64, with two layers of one input of which one has an adapter, and biases."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        block = nn.ModuleDict({"a": nn.Linear(width, 6), "b": nn.Linear(width, 4)})
        config = loading.lora_config(rank, 3.0, ["a"])
        model = get_peft_model(block, config, adapter_name=POLICY)
        projection = lora.Projection([block["a"], block["b"]])
        for matrix in projection.parameters(POLICY):
            matrix.data.normal_()
        x = torch.randn(3, width, requires_grad=True)
    assert projection._dense_is_cheaper(width, projection.lora(POLICY)) == (width == 16)
    matrices = projection.parameters(POLICY)
    slope = torch.randn(3, 10, generator=torch.Generator().manual_seed(1))
    found = lora.Product.apply(x, projection, POLICY, *matrices)
    expected = torch.cat([block["a"](x), block["b"](x)], 1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad((found * slope).sum(), [x, *matrices])
    for a, b in zip(ours, torch.autograd.grad((expected * slope).sum(), [x, *matrices]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    base = lora.Product.apply(x, projection, None)
    with model.disable_adapter():
        torch.testing.assert_close(base, torch.cat([block["a"](x), block["b"](x)], 1), rtol=1e-5, atol=1e-5)


# --- 4-bit weights ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Llama whose matrices are whole blocks of 64, for the study's vocabulary."""
    pytest.importorskip("bitsandbytes", reason="NF4 needs bitsandbytes")
    path = tmp_path_factory.mktemp("base")
    language_model(vocab_size=60, hidden_size=64, intermediate_size=128, scale=3.0).save_pretrained(path)
    return path


def dequantised(model, dtype=torch.float32):
    """A dense copy of a 4-bit model, with the weights that its 4 bits stand for."""
    dense = AutoModelForCausalLM.from_config(model.config).to(dtype).eval()
    weights = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    with torch.no_grad():
        for name, module in dense.named_modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(lora.dense_weight(weights[name], dtype))
        for name, parameter in dense.named_parameters():
            other = model.get_parameter(name)
            if other.shape == parameter.shape:
                parameter.copy_(other)
    return dense


def cosine(a, b):
    a, b = (torch.cat([d[name].double().flatten() for name in b]) for d in (a, b))
    return (a @ b / a.norm() / b.norm()).item()


@pytest.mark.parametrize("critic", ["trunk", "separate"])
def test_gradients_of_ppo_on_4_bits_stay_right_after_sampling(folder, critic):
    """Against the same run on a dense copy of the same weights in float32, before and after updates."""
    quantised = loading.load_base(folder, "nf4")
    assert loading.is_quantised(quantised)
    dense = tiny_rl.trainer(PPO, base=dequantised(quantised), critic=critic)
    run = tiny_rl.trainer(PPO, base=quantised, critic=critic)
    assert run.networks._fused is not None
    for updates in (0, 1, 1):
        tiny_rl.updates(run, updates)
        tiny_rl.randomise(run.networks, seed=updates)
        dense.networks.load_state_dict(
            {name: p for name, p in run.networks.named_parameters() if p.requires_grad}, strict=False
        )
        rollouts, _ = tiny_rl.gather(run)
        generator = torch.Generator().manual_seed(3)
        rollouts.advantages[:] = torch.randn(rollouts.mask.shape, generator=generator)
        rollouts.returns[:] = torch.randn(rollouts.mask.shape, generator=generator)
        grads, expected = (tiny_rl.step_gradients(r, rollouts)[1] for r in (run, dense))
        assert grads.keys() == expected.keys() and cosine(grads, expected) > 0.999
        theirs = dense.evaluate(rollouts)[0]
        assert relative(rollouts.logprobs[rollouts.mask], theirs.logprobs[rollouts.mask]) < 0.03
        assert rollouts.sampler_gap < 0.5


def peft_gradients(base, sampled):
    """LoRA gradients of plain PEFT on a base, after a forward pass as sampling makes it if ``sampled``."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = tiny_rl.randomise(get_peft_model(base, loading.lora_config(4, 8.0))).eval()
    ids, mask, slope = batch(12, 24, 64)
    if sampled:
        with torch.no_grad():
            model(input_ids=ids)
    hidden = model.base_model.model.model(input_ids=ids, use_cache=False).last_hidden_state
    (hidden * slope.to(hidden.dtype)).sum().backward()
    return tiny_rl.gradients(model), hidden.detach()[mask]


@pytest.mark.parametrize("sampled", [False, True])
def test_gradients_of_plain_peft_on_4_bits_are_right_behind_load_base(folder, sampled):
    quantised = loading.load_base(folder, "nf4")
    expected, hidden = peft_gradients(dequantised(quantised), False)
    found, other = peft_gradients(quantised, sampled)
    assert cosine(found, expected) > 0.999 and relative(other, hidden) < 0.03


@pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit")
def test_without_load_base_they_would_be_wrong(folder):
    """The trap: after a forward pass without gradients hidden states stay right and gradients do not."""
    from bitsandbytes.nn.modules import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("this processor has no AVX512-BF16, for which bitsandbytes repacks 4-bit weights")
    options = {"dtype": torch.bfloat16, "quantization_config": loading._nf4()}
    quantised = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    expected, hidden = peft_gradients(dequantised(quantised), False)
    found, other = peft_gradients(quantised, True)
    assert relative(other, hidden) < 0.03  # nothing is to be seen
    assert cosine(found, expected) < 0.9


@pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit")
def test_a_4_bit_model_that_has_sampled_before_is_trained_rightly_or_refused(folder):
    """Loaded without `load_base` and used, its weights may lie repacked in memory when the trainer gets them."""
    options = {"dtype": torch.bfloat16, "quantization_config": loading._nf4()}
    quantised = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    dense = dequantised(quantised)
    with torch.no_grad():
        quantised(input_ids=batch()[0])
    try:
        run = tiny_rl.trainer(base=quantised)
    except ValueError:
        return
    rollouts, _ = tiny_rl.gather(run)
    theirs = tiny_rl.trainer(base=dense).evaluate(rollouts)[0]
    assert relative(rollouts.ref_logprobs[rollouts.mask], theirs.ref_logprobs[rollouts.mask]) < 0.03


def test_layers_over_4_bits_that_are_not_fused_as_llama(folder):
    """The product alone, as on other architectures and on a GPU."""
    quantised = loading.load_base(folder, "nf4")
    dense = tiny_rl.randomise(networks.build(dequantised(quantised), critic="none", rank=4), std=0.1)
    ours = tiny_rl.randomise(networks.build(quantised, critic="none", rank=4), std=0.1)
    assert any(isinstance(module, lora.FusedLinear4bit) for module in ours.model.modules())
    ids, mask, slope = batch(12, 24, 64)
    expected, wanted = of_ours(dense, ids, POLICY, slope)
    for fused in (ours._fused, None):
        ours._fused = fused
        found, grads = of_ours(ours, ids, POLICY, slope)
        assert relative(found[mask], expected[mask]) < 0.03 and cosine(grads, wanted) > 0.999


def test_all_weights_of_a_4_bit_base_cannot_be_trained(folder):
    with pytest.raises(ValueError, match="adapter: none trains all weights, which a 4-bit base cannot"):
        tiny_rl.trainer(base=loading.load_base(folder, "nf4"), adapter="none")
