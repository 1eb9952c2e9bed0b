"""The fused Llama layers against transformers and PEFT: hidden states, log-probabilities, gradients and decoding."""

import copy
from contextlib import nullcontext

import pytest
import torch
from peft import get_peft_model

import tiny
import tiny_rl
from rlhfscale.models import llama, loading, lora
from rlhfscale.models.loading import CRITIC, POLICY
from rlhfscale.rl import networks
from rlhfscale.rl.logprobs import token_logprobs
from rlhfscale.rl.networks import REFERENCE
from tiny_rl import language_model, ragged, relative

FACTOR = 2.0
"""In bfloat16, how many times PEFT's error of one batch may be exceeded; on average it is 1.0 to 1.3 times."""

KINDS = {
    "llama": ("Llama", {}),
    "two heads to a key": ("Llama", {"num_key_value_heads": 2}),
    "all heads to a key": ("Llama", {"num_key_value_heads": 1}),
    "biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "wide heads": ("Llama", {"head_dim": 16, "num_key_value_heads": 2}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2}),
    "mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": None, "head_dim": 8}),
    "llama 3 rope": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
            }
        },
    ),
}  # fmt: skip
TARGETS = [("q_proj", "v_proj"), ("k_proj", "up_proj", "o_proj"), ("down_proj",)]


def pair(base, rank=4, targets="all-linear", compute_dtype=None):
    """Our networks, and plain PEFT with the same weights and adapters in float64 and in the model's precision."""
    targets = targets if isinstance(targets, str) else list(targets)
    plain = get_peft_model(copy.deepcopy(base), loading.lora_config(rank, 2.0 * rank, targets), adapter_name=POLICY)
    plain.add_adapter(CRITIC, loading.lora_config(rank, 2.0 * rank, targets))
    ours = networks.build(
        base, critic="separate", rank=rank, alpha=2.0 * rank, targets=targets, compute_dtype=compute_dtype
    )
    tiny_rl.randomise(ours)
    missing = plain.load_state_dict(ours.model.state_dict(), strict=False)
    assert not missing.missing_keys and not missing.unexpected_keys
    return ours, copy.deepcopy(plain).double(), plain


def of_peft(plain, ids, role, slope, autocast=False):
    """Last hidden states of the padded ids, and LoRA gradients of their product with ``slope``."""
    if role != REFERENCE:
        plain.set_adapter(role)
    plain.zero_grad()
    precision = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    with precision, plain.disable_adapter() if role == REFERENCE else nullcontext():
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
    """Ragged ids, their mask, and a random slope on real positions: what padding holds must not matter."""
    ids, mask = ragged(rows, longest)
    slope = torch.randn(rows, longest, width, generator=torch.Generator().manual_seed(4)) * mask[..., None]
    return ids, mask, slope


CASES = [(kind, "all-linear") for kind in KINDS]
CASES += [(kind, targets) for kind in ("two heads to a key", "qwen2") for targets in TARGETS]


@pytest.mark.parametrize(("kind", "targets"), CASES, ids=str)
def test_float32_equals_peft(kind, targets):
    """Hidden states, log-probabilities and every LoRA gradient, under both adapters and the base alone."""
    base = language_model(KINDS[kind][0], **KINDS[kind][1])
    ours, exact, _ = pair(base, targets=targets)
    assert ours._fused is not None
    ids, mask, slope = batch()
    seen = []
    for role in (POLICY, CRITIC, REFERENCE):
        found, grads = of_ours(ours, ids, role, slope)
        expected, wanted = of_peft(exact, ids, role, slope)
        assert relative(found[mask], expected[mask]) < 3e-6
        logits = torch.log_softmax(exact.base_model.model.lm_head(expected[mask]), -1)
        logprobs, _ = token_logprobs(found[mask], ours.output_head(role), ids[mask], 1.0)
        torch.testing.assert_close(logprobs, logits.gather(1, ids[mask][:, None])[:, 0].float(), rtol=1e-5, atol=3e-5)
        assert grads.keys() == wanted.keys() and all(f".{role}." in name for name in grads)
        for name in grads:
            assert relative(grads[name], wanted[name]) < 2e-5, name
        seen.append(found[mask])
    assert relative(seen[0], seen[2]) > 0.1 and relative(seen[1], seen[2]) > 0.1 and relative(seen[0], seen[1]) > 0.1


@pytest.mark.parametrize("rank", [1, 4, 32])
@pytest.mark.parametrize("width", [32, 96])
def test_both_branches_of_the_gradient_equal_peft(rank, width, monkeypatch):
    """Through the weight's gradient (narrow layers, high ranks), or by low-rank products (wide layers, low ranks)."""
    taken, cheaper = set(), lora.Projection._dense_is_cheaper
    monkeypatch.setattr(lora.Projection, "_dense_is_cheaper", lambda *a: [r := cheaper(*a), taken.add(r)][0])
    ours, exact, _ = pair(language_model(hidden_size=width, intermediate_size=2 * width), rank)
    ids, mask, slope = batch(width=width)
    (found, grads), (expected, wanted) = of_ours(ours, ids, POLICY, slope), of_peft(exact, ids, POLICY, slope)
    assert relative(found[mask], expected[mask]) < 3e-6
    assert all(relative(grads[name], wanted[name]) < 2e-5 for name in wanted)
    if (rank, width) in ((1, 96), (32, 32)):
        assert taken == {rank == 32}


@pytest.mark.parametrize("stored", ["bf16", "computed in bf16"])
@pytest.mark.parametrize(("kind", "rank"), [("llama", 32), ("two heads to a key", 4), ("qwen2", 32), ("biases", 4)])
def test_bfloat16_is_no_less_exact_than_peft(stored, kind, rank):
    """The error against float64 is at most that of PEFT in bfloat16 (or under autocast) by a small factor."""
    base = language_model(KINDS[kind][0], scale=2.0, **KINDS[kind][1])
    base = base.to(torch.bfloat16) if stored == "bf16" else base
    ours, exact, plain = pair(base, rank, compute_dtype=None if stored == "bf16" else torch.bfloat16)
    assert ours._fused.dtype == torch.bfloat16
    ids, mask, slope = batch(rows=12, longest=24)
    for role in (POLICY, CRITIC, REFERENCE):
        found, grads = of_ours(ours, ids, role, slope)
        theirs, their_grads = of_peft(plain, ids, role, slope, autocast=stored != "bf16")
        expected, wanted = of_peft(exact, ids, role, slope)
        assert relative(found[mask], expected[mask]) < FACTOR * relative(theirs[mask], expected[mask]) < 0.1
        if role != REFERENCE:
            assert relative(grads, wanted) < FACTOR * relative(their_grads, wanted) < 0.3
            assert all(gradient.dtype == torch.float32 for gradient in grads.values())


def test_computing_in_bfloat16_leaves_weights_adapters_and_head_in_float32():
    run = tiny_rl.trainer(compute_dtype="bf16")
    batch, _ = tiny_rl.gather(run)
    assert batch.logprobs.dtype == batch.values.dtype == torch.float32
    tiny_rl.updates(run, 2)
    assert all(parameter.dtype == torch.float32 for parameter in run.networks.parameters())
    exact = tiny_rl.trainer()
    exact.networks.load_state_dict(run.networks.state_dict())
    (ours, _), (theirs, _) = tiny_rl.gather(run), tiny_rl.gather(exact)
    assert (ours.ref_logprobs - theirs.ref_logprobs).abs().mean() > 1e-6  # it does compute in bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_sequences_compute_their_attention_again(dtype, monkeypatch):
    """Probabilities are kept up to a length and formed again in the backward pass beyond: same numbers."""
    formed, form = [], llama.Layer.attend
    monkeypatch.setattr(llama.Layer, "attend", lambda *a: (formed.append(1), form(*a))[1])
    for longest, again in ((12, False), (200, True)):
        ours, exact, plain = pair(language_model(num_key_value_heads=2, scale=2.0).to(dtype))
        ids, mask, slope = batch(rows=3, longest=longest)
        formed.clear()
        found, grads = of_ours(ours, ids, POLICY, slope)
        assert len(formed) == (4 if again else 2)  # two layers
        expected, wanted = of_peft(exact, ids, POLICY, slope)
        if dtype == torch.float32:
            assert relative(found[mask], expected[mask]) < 5e-6 and relative(grads, wanted) < 2e-5
        else:
            theirs, their_grads = of_peft(plain, ids, POLICY, slope)
            assert relative(found[mask], expected[mask]) < FACTOR * relative(theirs[mask], expected[mask])
            assert relative(grads, wanted) < FACTOR * relative(their_grads, wanted)


def test_a_batch_that_is_cut_into_parts_gives_the_same(monkeypatch):
    ours, _, _ = pair(language_model())
    ids, mask, slope = batch(rows=7)
    whole, grads = of_ours(ours, ids, POLICY, slope)
    for tokens in (40, 1):
        monkeypatch.setattr(llama, "CACHED_TOKENS", tokens)
        parts, their_grads = of_ours(ours, ids, POLICY, slope)
        assert relative(parts[mask], whole[mask]) < 1e-6 and relative(their_grads, grads) < 1e-5


def test_what_padding_holds_does_not_matter():
    ours, _, _ = pair(language_model())
    ids, mask, slope = batch()
    other = torch.where(mask, ids, 7)
    (found, grads), (again, their_grads) = (of_ours(ours, x, POLICY, slope) for x in (ids, other))
    assert torch.equal(found[mask], again[mask]) and relative(their_grads, grads) < 1e-6


def test_gradients_reach_the_embeddings_where_they_are_asked_for():
    """As gradient checkpointing asks for them."""
    ours, exact, _ = pair(language_model())
    ids, _, slope = batch()
    grads = []
    for model in (ours.base, exact.base_model.model):
        model.get_input_embeddings().weight.requires_grad_(True)
    for hidden in (ours.hidden(ids, POLICY), loading.trunk(exact.base_model.model)(input_ids=ids).last_hidden_state):
        (hidden * slope).sum().backward()
    for model in (ours.base, exact.base_model.model):
        grads.append(model.get_input_embeddings().weight.grad)
    assert relative(*grads) < 2e-5


# --- merged weights follow the adapters ---


@pytest.mark.parametrize("dtype", ["fp32", "computed in bf16", "bf16"])
def test_merged_weights_follow_an_optimiser_step_and_a_load(dtype, tmp_path):
    """Merged and rounded weights are kept between steps: after each change they must be those of the adapters now."""
    base = tiny.model().to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    compute_dtype = "bf16" if dtype == "computed in bf16" else "model"
    run = tiny_rl.trainer(base=base, critic="separate", compute_dtype=compute_dtype, policy_lr=2e-2)
    ids, mask = ragged(vocabulary=25)
    tolerance, unfused_tolerance = 5e-6 if dtype == "fp32" else 0.05, 0.05 if dtype == "bf16" else 5e-6

    def check():
        """Both paths of ours and their decoding, against PEFT; returns the hidden states."""
        found = {}
        with torch.no_grad():
            for role in (POLICY, CRITIC):
                with run.networks.as_peft(role) as peft_model:
                    trunk = loading.trunk(peft_model.base_model.model)
                    expected = trunk(input_ids=ids, use_cache=False).last_hidden_state[mask]
                found[role] = run.networks.hidden(ids, role)[mask]
                assert relative(found[role], expected) < tolerance
                with lora.adapter(run.networks.switch, role):
                    unfused = trunk(input_ids=ids, use_cache=False).last_hidden_state[mask]
                assert relative(unfused, expected) < unfused_tolerance
            with run.networks.decoder() as decodable, run.networks.as_peft(POLICY) as peft_model:
                position = torch.arange(ids.shape[1]).expand(*ids.shape)
                logits = decodable.decoder(ids.shape[1]).step(ids[:1], None, position[:1])
                assert relative(logits, peft_model(input_ids=ids[:1]).logits[:, -1]) < tolerance
        return found

    check()
    tiny_rl.updates(run, 1)
    first = check()
    run.save(tmp_path / "checkpoint")
    tiny_rl.updates(run, 1)
    second = check()
    assert all(relative(second[role], first[role]) > 0.01 for role in first)
    run.load(tmp_path / "checkpoint")
    third = check()
    assert all(torch.equal(third[role], first[role]) for role in first)


def test_without_the_learners_note_they_would_be_stale(monkeypatch):
    """The fused AdamW changes parameters without counting it: what `Learner.step` makes up for."""
    run, (ids, mask) = tiny_rl.trainer(policy_lr=2e-2), ragged(vocabulary=25)
    parameter = run.networks.parameters_of(POLICY)[0]
    run.networks.hidden(ids, POLICY)
    before = parameter._version
    monkeypatch.setattr(torch.autograd.graph, "increment_version", lambda _: None)
    tiny_rl.updates(run, 1)
    if parameter._version != before:
        pytest.skip("this torch counts the fused optimiser's changes by itself")
    with torch.no_grad(), run.networks.as_peft(POLICY) as peft_model:
        expected = loading.trunk(peft_model.base_model.model)(input_ids=ids).last_hidden_state[mask]
    assert relative(run.networks.hidden(ids, POLICY)[mask], expected) > 0.01


# --- decoding ---


def left_padded(rows, longest, vocabulary=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, longest + 1, (rows,), generator=generator)
    lengths[0] = longest
    mask = (torch.arange(longest) >= longest - lengths[:, None]).long()
    return torch.randint(3, vocabulary, mask.shape, generator=generator) * mask, mask


DECODED = [(kind, "fp32") for kind in ("llama", "two heads to a key", "qwen2", "biases", "tied", "llama 3 rope")]
DECODED += [(kind, dtype) for kind in ("two heads to a key", "biases") for dtype in ("bf16", "computed in bf16")]


@pytest.mark.parametrize(("kind", "dtype"), DECODED)
@pytest.mark.parametrize("padded", [True, False])
def test_decoding_equals_a_full_forward_pass(kind, padded, dtype):
    """The prompt at once, then one token at a time, with left padding and with requests that leave in between."""
    base = language_model(KINDS[kind][0], scale=3.0 if dtype == "fp32" else 2.0, **KINDS[kind][1])
    base = base.to(torch.bfloat16) if dtype == "bf16" else base
    ours, exact, plain = pair(base, compute_dtype=torch.bfloat16 if dtype == "computed in bf16" else None)
    exact.set_adapter(POLICY), plain.set_adapter(POLICY)
    ids, mask = left_padded(6, 9) if padded else (ragged(6, 9)[0].clamp(min=3), torch.ones(6, 9, dtype=torch.long))
    following = torch.randint(3, 40, (6, 5), generator=torch.Generator().manual_seed(9))
    errors = {"ours": [], "theirs": []}
    with torch.no_grad(), ours.decoder() as decodable:
        decoder = decodable.decoder(14)
        new, position = ids, mask.cumsum(1).sub(1).clamp(min=0)
        for step in range(6):
            found = decoder.step(new, mask if padded else None, position[:, -new.shape[1] :])
            arguments = {"input_ids": ids, "attention_mask": mask, "position_ids": position}
            expected = exact(**arguments).logits[:, -1]
            precision = torch.autocast("cpu", torch.bfloat16) if dtype == "computed in bf16" else nullcontext()
            with precision:
                theirs = plain(**arguments).logits[:, -1]
            errors["ours"].append(relative(found, expected)), errors["theirs"].append(relative(theirs, expected))
            if step == 2:
                rows = torch.tensor([0, 3, 4])
                decoder.keep(rows)
                ids, mask, position, following = ids[rows], mask[rows], position[rows], following[rows]
            if step < 5:
                new = following[:, step : step + 1]
                ids, mask = torch.cat([ids, new], 1), torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
                position = torch.cat([position, position[:, -1:] + 1], 1)
    if dtype == "fp32":
        assert max(errors["ours"]) < 5e-6
    else:
        assert sum(errors["ours"]) < FACTOR * sum(errors["theirs"]) < 6 * 0.1


@pytest.mark.parametrize("compute_dtype", ["model", "bf16"])
def test_sampled_logprobs_are_those_of_the_trainer(compute_dtype):
    """The sampler's and the trainer's own, of prompts of different lengths."""
    run = tiny_rl.trainer(compute_dtype=compute_dtype, prompts_per_update=24)
    tiny_rl.randomise(run.networks, std=0.1)
    batch, _ = tiny_rl.gather(run)
    assert len(set(batch.prompt_lengths.tolist())) > 3
    assert batch.sampler_gap < (1e-4 if compute_dtype == "model" else 1.0)
    assert (batch.sampler_logprobs - batch.logprobs).abs().mean() < (1e-5 if compute_dtype == "model" else 0.05)


# --- what is fused ---


def test_the_models_own_weights_stay_transformers_own():
    """Projections of one input share a block of memory, of which each weight is a part: same names and values."""
    before = tiny.weights(tiny.model())
    ours = networks.build(tiny.model(), critic="none", rank=4)
    assert tiny.equal(tiny.weights(ours.merged_policy()), before)


def test_no_more_than_one_copy_of_the_base_is_alive():
    """Every block that a fused layer or projection holds on to is memory of the model's own weights."""
    ours = networks.build(language_model(), critic="none", rank=4)
    own = {parameter.untyped_storage().data_ptr() for parameter in ours.model.parameters()}
    held = [m.projection for m in ours.model.modules() if hasattr(m, "projection")]
    held += [p for layer in ours._fused.layers for p in (layer.qkv, layer.out, layer.gate_up, layer.down)]
    strangers = [p for p in held if p.block is not None and p.block.untyped_storage().data_ptr() not in own]
    assert not strangers


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("Llama", {"hidden_act": "gelu"}), ("Mistral", {"sliding_window": 8}), ("Qwen3", {"head_dim": 8})],
)
def test_other_layers_are_not_fused_and_still_right(kind, changes):
    base = language_model(kind, **changes)
    assert llama.fused(loading.trunk(copy.deepcopy(base).requires_grad_(False))) is None
    ours, exact, _ = pair(base)
    assert ours._fused is None
    ids, mask, slope = batch()
    for role in (POLICY, CRITIC, REFERENCE):
        (found, grads), (expected, wanted) = of_ours(ours, ids, role, slope), of_peft(exact, ids, role, slope)
        assert relative(found[mask], expected[mask]) < 5e-6
        assert all(relative(grads[name], wanted[name]) < 3e-5 for name in wanted)


def test_what_is_trained_in_part_and_half_precision_are_not_fused():
    trunk = loading.trunk(tiny.model())
    assert llama.fused(trunk) is not None
    trunk.norm.requires_grad_(False)
    assert llama.fused(trunk) is None
    assert llama.fused(trunk.requires_grad_(False)) is not None
    assert llama.fused(trunk.half()) is None
    assert llama.fused(loading.trunk(language_model(attention_bias=True).requires_grad_(True))) is None
    assert llama.fused(loading.trunk(language_model(attention_dropout=0.1).requires_grad_(False))) is None


# --- all weights trained ---


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("biases", "qwen2")])
def test_gradients_of_all_weights_equal_transformers(kind):
    model = language_model(KINDS[kind][0], **KINDS[kind][1]).requires_grad_(True)
    exact = copy.deepcopy(model).double()
    ids, mask, slope = batch()
    where = mask & (torch.rand(mask.shape, generator=torch.Generator().manual_seed(2)) < 0.4)
    form = llama.form_of(model)
    states = form.hidden_at(ids, where, None, mask.sum(1))
    expected = loading.trunk(exact)(input_ids=ids, use_cache=False).last_hidden_state[where]
    assert relative(states, expected) < 3e-6
    (states * slope[where]).sum().backward()
    (expected * slope[where]).sum().backward()
    wanted = {name: parameter.grad for name, parameter in loading.trunk(exact).named_parameters()}
    for name, parameter in loading.trunk(model).named_parameters():
        assert relative(parameter.grad, wanted[name]) < 2e-5, name


def test_a_form_follows_its_weights(tmp_path):
    """Trained in place it computes with the new ones; replaced, frozen or copied it is made anew; saved they are
    whole."""
    model = tiny.model().requires_grad_(True)
    ids, mask, _ = batch(width=32)
    ids = ids % 30
    read = (ids, mask, None, mask.sum(1))

    def own():
        return loading.trunk(model)(input_ids=ids, use_cache=False).last_hidden_state[mask]

    first = llama.form_of(model)
    assert llama.form_of(model) is first
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.ones_like(parameter))
    assert llama.form_of(model) is first and relative(first.hidden_at(*read), own()) < 3e-6
    with torch.no_grad():
        weight = loading.trunk(model).layers[0].mlp.up_proj.weight
        weight.data = weight.data * 2
    assert llama.form_of(model) is not first and relative(llama.form_of(model).hidden_at(*read), own()) < 3e-6
    model.requires_grad_(False)
    assert not llama.form_of(model).hidden_at(*read).requires_grad
    other = copy.deepcopy(model)
    assert llama.form_of(other) is not llama.form_of(model)
    model.save_pretrained(tmp_path)
    assert tiny.equal(tiny.weights(type(model).from_pretrained(tmp_path)), tiny.weights(model))
