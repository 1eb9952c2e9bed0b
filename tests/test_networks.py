"""Policy, reference and critic of one base: what is refused, shared and saved, and gradient checkpointing."""

import copy
import itertools
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import tiny
import tiny_rl
from rlhfscale.models import loading
from rlhfscale.models.loading import CRITIC, POLICY
from rlhfscale.rl import GRPO, PPO, networks
from rlhfscale.rl.networks import REFERENCE
from tiny_rl import language_model, ragged, relative

# --- what is refused ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"critic": "both"}, "critic: 'both' is not one of trunk, separate, none"),
        ({"adapter": "dora"}, "adapter: 'dora' is not one of lora, none"),
        ({"targets": ["q_project"]}, "q_project"),
    ],
)
def test_what_cannot_work_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        networks.build(tiny.model(), **options)


def test_a_target_that_matches_no_module_is_named_by_the_trainer():
    with pytest.raises(ValueError, match="q_project"):
        tiny_rl.trainer(lora_targets=("q_project",))


def test_a_model_with_adapters_is_refused():
    peft_model = get_peft_model(tiny.model(), loading.lora_config(4, 8.0))
    with pytest.raises(ValueError, match="model: it already carries an adapter"):
        tiny_rl.trainer(base=peft_model)


@pytest.mark.parametrize(
    "inject", [lambda base: tiny_rl.trainer(base=base), lambda base: get_peft_model(base, loading.lora_config(4, 8.0))]
)
def test_the_base_of_another_run_is_refused(inject):
    """Its adapters would be shared, or be part of the reference."""
    base = tiny.model()
    inject(base)
    with pytest.raises(ValueError, match="model: it already carries"):
        tiny_rl.trainer(base=base)


def test_a_model_that_changes_its_logits_in_its_own_way_is_refused():
    base = language_model(vocab_size=56)
    base.lm_head.register_forward_hook(lambda head, inputs, logits: logits)  # harmless
    networks.check_output_head(base)
    base.register_forward_hook(lambda model, inputs, output: output.__setitem__("logits", 2 * output.logits))
    with pytest.raises(ValueError, match="model: LlamaForCausalLM changes its logits after the output head"):
        tiny_rl.trainer(base=base)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Phi", {}),
        ("Gemma", {"head_dim": 8}),
        ("Llama", {}),
        ("Cohere", {}),  # logits times logit_scale
        ("Granite", {"logits_scaling": 3.0}),
        ("Gemma2", {"head_dim": 8, "final_logit_softcapping": 5.0}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_does_not_is_accepted(kind, changes, dtype):
    networks.check_output_head(language_model(kind, **changes).to(dtype))


# --- giving the base back ---


@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
@pytest.mark.parametrize("changes", [{}, {"critic": "separate"}, {"gradient_checkpointing": True}])
def test_a_released_model_is_as_it_was_and_can_be_trained_again(kind, changes):
    base = language_model(kind, vocab_size=56)
    names, before = [name for name, _ in base.named_modules()], tiny.weights(base)
    ids, _ = ragged()
    logits = base(input_ids=ids).logits
    first = tiny_rl.trainer(base=base, **changes)
    metrics = tiny_rl.updates(first, 1)
    assert first.release() is base
    assert [name for name, _ in base.named_modules()] == names and tiny.equal(tiny.weights(base), before)
    assert torch.equal(base(input_ids=ids).logits, logits) and not hasattr(base, "peft_config")
    assert not any("forward" in vars(module) and "partial" in repr(module.forward) for module in base.modules())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = tiny_rl.trainer(base=base, **changes)
    assert tiny_rl.updates(again, 1) == metrics


def test_a_model_that_is_trained_whole_comes_back_trained():
    base = tiny.model()
    before = tiny.weights(base)
    run = tiny_rl.trainer(base=base, adapter="none", gradient_checkpointing=True)
    tiny_rl.updates(run, 1)
    assert run.release() is base and not tiny.equal(tiny.weights(base), before)
    tiny_rl.updates(tiny_rl.trainer(base=base), 1)


def test_a_model_that_a_trainer_has_is_refused_with_the_way_out():
    base = tiny.model()
    run = tiny_rl.trainer(base=base)
    with pytest.raises(ValueError, match=r"already carries an adapter; pass trainer\.release\(\)"):
        tiny_rl.trainer(base=base)
    tiny_rl.trainer(base=run.release())


def refuse(reward, networks):
    raise ValueError("no reward of this base")


@pytest.mark.parametrize("changes", [{"lora_targets": ("q_proj", "lm_head")}, {"lora_targets": ("q_project",)}, {}])
def test_a_trainer_that_cannot_be_made_leaves_the_model_as_it_was(changes, monkeypatch):
    base = language_model(vocab_size=56)
    before = tiny.weights(base)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="lora_targets|q_project|no reward"):
        patch.setattr("rlhfscale.rl.loop.attach", refuse)
        tiny_rl.trainer(base=base, **changes)
    assert tiny.equal(tiny.weights(base), before)
    tiny_rl.updates(tiny_rl.trainer(base=base), 1)


# --- what is shared ---


def of_plain(model, ids):
    with torch.no_grad():
        return loading.trunk(model)(input_ids=ids, use_cache=False).last_hidden_state


@pytest.mark.parametrize("critic", ["trunk", "separate", "none"])
@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_before_training_all_roles_are_the_base(critic, adapter):
    ours, (ids, mask) = networks.build(tiny.model(), adapter=adapter, critic=critic), ragged()
    expected = of_plain(tiny.model(), ids)
    for role in (POLICY, REFERENCE, *([CRITIC] if critic == "separate" else [])):
        torch.testing.assert_close(ours.hidden(ids, role)[mask], expected[mask], rtol=1e-4, atol=1e-5)
    if critic != "none":
        assert (ours.value_head(ours.hidden(ids, ours.critic_role)) == 0).all()
    else:
        assert ours.value_head is None
    assert ours.critic_role == (CRITIC if critic == "separate" else POLICY)


@pytest.mark.parametrize("critic", ["trunk", "separate", "none"])
@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_roles_own_what_they_train(critic, adapter):
    """Every trainable parameter belongs to one role; with adapters nothing of the base does."""
    ours = networks.build(tiny.model(), adapter=adapter, critic=critic, rank=4)
    roles = [POLICY] if critic == "none" else [POLICY, CRITIC]
    owned = [id(parameter) for role in roles for parameter in ours.parameters_of(role)]
    trainable = [id(parameter) for parameter in ours.parameters() if parameter.requires_grad]
    assert len(owned) == len(set(owned)) and set(owned) == set(trainable)
    count = sum(parameter.numel() for parameter in ours.parameters_of(POLICY))
    if adapter == "lora":
        linear = [m for m in tiny.model().model.modules() if isinstance(m, torch.nn.Linear)]
        assert count == sum(4 * (m.in_features + m.out_features) for m in linear)
    else:
        assert count == sum(parameter.numel() for parameter in tiny.model().parameters())


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_building_leaves_the_global_random_state_alone(adapter):
    before = torch.get_rng_state()
    networks.build(tiny.model(), adapter=adapter, critic="separate")
    assert torch.equal(torch.get_rng_state(), before)


def test_the_policy_and_the_critic_start_apart():
    found = dict(networks.build(tiny.model(), critic="separate").model.named_parameters())
    pairs = [(name, name.replace(".policy.", ".critic.")) for name in found if "lora_A.policy" in name]
    assert len(pairs) == 14 and all(not torch.equal(found[a], found[b]) for a, b in pairs)


def test_as_peft_puts_back_what_it_changes():
    """Gradients of both adapters, and what the networks compute."""
    ours, (ids, mask) = tiny_rl.randomise(networks.build(tiny.model(), critic="separate", rank=4)), ragged()
    before = {role: ours.hidden(ids, role)[mask] for role in (POLICY, CRITIC, REFERENCE)}
    for role in (CRITIC, POLICY):
        with ours.as_peft(role) as model:
            assert model.active_adapter == role
            assert relative(of_plain(model.base_model.model, ids)[mask], before[role]) < 1e-5
        assert all(p.requires_grad == (".lora_" in name) for name, p in ours.model.named_parameters())
    assert all(torch.equal(ours.hidden(ids, role)[mask], before[role]) for role in before)


def test_merged_policy_equals_the_adapter():
    ours, (ids, mask) = networks.build(tiny.model(), critic="separate", rank=4), ragged()
    tiny_rl.randomise(ours, std=0.1)
    before = tiny.weights(tiny.model())
    merged = ours.merged_policy()
    assert type(merged) is type(tiny.model()) and not hasattr(merged, "peft_config")
    with torch.no_grad(), ours.as_peft(POLICY) as model:
        expected = model(input_ids=ids).logits[mask]
        torch.testing.assert_close(merged(input_ids=ids).logits[mask], expected, rtol=0, atol=2e-5)
        reference = tiny.model()(input_ids=ids).logits[mask]
    ours_alone = ours.output_head(REFERENCE)(ours.hidden(ids, REFERENCE))[mask]
    torch.testing.assert_close(ours_alone, reference, rtol=0, atol=2e-5)
    assert (expected - reference).abs().max() > 0.05
    again = tiny.weights(ours.merged_policy())
    assert tiny.equal(again, tiny.weights(merged)) and again.keys() == before.keys()  # folded from the base each time


def test_the_fingerprint_is_of_the_base():
    base = tiny.model()
    before = loading.fingerprint(base)
    ours = tiny_rl.randomise(networks.build(base, critic="separate"))
    assert ours.fingerprint == before == loading.fingerprint(ours.base) == loading.fingerprint(tiny.model())
    assert len({before, loading.fingerprint(tiny.model(seed=1)), loading.fingerprint(language_model())}) == 3


def test_an_adapted_output_head_is_refused():
    """It is read outside of the roles, so the reference would have it too."""
    with pytest.raises(ValueError, match="lora_targets: the output head is shared with the reference"):
        tiny_rl.trainer(base=language_model(vocab_size=56), lora_targets=("q_proj", "lm_head"))


# --- saving ---


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Loads the same base in each precision."""
    folder = tmp_path_factory.mktemp("base")
    language_model(hidden_size=64, intermediate_size=128, num_key_value_heads=2, scale=2.0).save_pretrained(folder)
    return lambda dtype: loading.load_base(folder, dtype)


@pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path`")
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "nf4"])
@pytest.mark.parametrize("critic", ["trunk", "separate", "none"])
def test_saved_adapters_load_with_plain_peft_to_the_bit(bases, dtype, critic, tmp_path):
    """On the same base, plain PEFT's logits are those of `as_peft`, and values those of the saved head."""
    if dtype == "nf4":
        pytest.importorskip("bitsandbytes")
    ours, (ids, _) = tiny_rl.randomise(networks.build(bases(dtype), critic=critic, rank=4)), ragged()
    ours.hidden(ids, POLICY)  # merged weights are there
    ours.save(tmp_path)
    assert (tmp_path / networks.VALUE_HEAD).exists() == (critic != "none")
    assert (tmp_path / CRITIC).exists() == (critic == "separate")
    for role in (POLICY, CRITIC) if critic == "separate" else (POLICY,):
        loaded = PeftModel.from_pretrained(bases(dtype), tmp_path / role).eval()
        with torch.no_grad(), ours.as_peft(role) as model:
            found, expected = (m(input_ids=ids, output_hidden_states=True) for m in (loaded, model))
        assert torch.equal(found.logits, expected.logits)
        if role == ours.critic_role and critic != "none":
            head = networks.ValueHead(64)
            head.load_state_dict(load_file(tmp_path / networks.VALUE_HEAD))
            values = ours.value_head(expected.hidden_states[-1])
            assert torch.equal(head(found.hidden_states[-1]), values) and values.abs().max() > 0.1


def test_saved_adapters_hold_their_matrices_alone(tmp_path):
    networks.build(tiny.model(), critic="separate", rank=4).save(tmp_path)
    for role in (POLICY, CRITIC):
        assert load_file(tmp_path / role / "adapter_model.safetensors").keys() == {
            f"base_model.model.model.layers.{layer}.{module}.lora_{side}.weight"
            for layer, module, side in itertools.product(
                range(2),
                [f"self_attn.{m}_proj" for m in "qkvo"] + [f"mlp.{m}_proj" for m in ("gate", "up", "down")],
                "AB",
            )
        }


@pytest.mark.parametrize("critic", ["trunk", "separate", "none"])
@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_loading_gives_back_what_was_saved(adapter, critic, tmp_path):
    ours = networks.build(tiny.model(), adapter=adapter, critic=critic, rank=4)
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    ours.save(tmp_path)
    other = networks.build(tiny.model(), adapter=adapter, critic=critic, rank=4, seed=1)
    assert not tiny.equal(tiny.weights(ours), tiny.weights(other))
    other.load(tmp_path)
    assert tiny.equal(tiny.weights(ours), tiny.weights(other))


def test_a_policy_of_all_weights_is_a_plain_transformers_folder(tmp_path):
    run = tiny_rl.trainer(GRPO, adapter="none", policy_lr=1e-3)
    tiny_rl.updates(run, 1)
    run.networks.save(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / POLICY)
    assert tiny.equal(tiny.weights(loaded), tiny.weights(run.networks.base))
    assert run.networks.merged_policy() is run.networks.base


# --- gradient checkpointing ---

BASES = {
    "fused": lambda: language_model(num_key_value_heads=2),
    "other": lambda: language_model("Gemma", head_dim=8),
    "conv1d": lambda: language_model("GPT2"),
    "dense": lambda: language_model(),
}


@pytest.mark.parametrize("critic", ["trunk", "separate"])
@pytest.mark.parametrize("base", ["fused", "other", "conv1d", "dense"])
def test_checkpointing_changes_no_gradient(base, critic):
    """Of policy and critic, whose losses are differentiated in one backward pass."""
    ids, mask = ragged()
    slope = torch.randn(*ids.shape, 32, generator=torch.Generator().manual_seed(4)) * mask[..., None]
    grads = []
    for checkpointing in (False, True):
        ours = networks.build(
            BASES[base](), critic=critic, gradient_checkpointing=checkpointing, rank=4,
            adapter="none" if base == "dense" else "lora",
        )  # fmt: skip
        tiny_rl.randomise(ours)
        roles = {POLICY, ours.critic_role}
        sum((ours.hidden(ids, role) * slope).sum() for role in sorted(roles)).backward()
        grads.append({name: g for name, g in tiny_rl.gradients(ours).items() if "value_head" not in name})
    assert relative(grads[1], grads[0]) < 1e-5


@pytest.mark.parametrize("base", BASES)
def test_checkpointing_keeps_less_for_the_backward_pass(base):
    """What autograd keeps besides parameters of policy and critic, in bytes."""
    ids, _ = ragged(8, 32)
    kept = []
    for checkpointing in (False, True):
        options = {"adapter": "none" if base == "dense" else "lora", "gradient_checkpointing": checkpointing}
        ours = networks.build(BASES[base](), critic="separate", rank=4, **options)
        own, sizes = {p.untyped_storage().data_ptr() for p in ours.parameters()}, {}

        def pack(tensor, own=own, sizes=sizes):
            if tensor.untyped_storage().data_ptr() not in own:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            hidden = ours.hidden(ids, POLICY) + ours.hidden(ids, CRITIC)
        hidden.sum().backward()
        kept.append(sum(sizes.values()))
    assert kept[1] < 0.5 * kept[0]


SAMPLED = {"vocab_size": 56, "max_position_embeddings": 64}
CHECKPOINTED = {
    "fused": (PPO, {}),
    "separate critic": (PPO, {"critic": "separate"}),
    "grpo": (GRPO, {}),
    "all weights": (PPO, {"adapter": "none", "critic": "separate", "policy_lr": 1e-4}),
    "other": (PPO, {"base": lambda: language_model("Gemma", head_dim=8, **SAMPLED)}),
    "dropout": (
        PPO,
        {"base": lambda: language_model("OPT", ffn_dim=48, word_embed_proj_dim=32, dropout=0.5, **SAMPLED)},
    ),
}


@pytest.mark.parametrize("kind", CHECKPOINTED)
def test_a_checkpointed_run_is_the_same_run(kind):
    """It samples the same, with its key-value cache, and without dropout."""
    (algorithm, options), records = CHECKPOINTED[kind], []
    for on in (False, True):
        made = {name: value() if callable(value) else value for name, value in options.items()}
        run = tiny_rl.trainer(algorithm, gradient_checkpointing=on, **{"policy_lr": 1e-3} | made)
        records.append(tiny_rl.updates(run, 2))
        assert all(record["sampler_gap_nats"] < 1e-3 for record in records[-1])
    for ours, theirs in zip(*records, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)


def test_a_frozen_copy_of_the_base_is_not_trained_by_another_run():
    """`FullWeights` trains the model it is given; its reference is a copy."""
    base = tiny.model()
    run = tiny_rl.trainer(base=copy.deepcopy(base), adapter="none", policy_lr=1e-3)
    tiny_rl.updates(run, 1)
    assert tiny.equal(tiny.weights(run.networks.reference), tiny.weights(base))
    assert not any(parameter.requires_grad for parameter in run.networks.reference.parameters())


def test_a_precision_that_cannot_be_followed_is_said():
    with pytest.warns(UserWarning, match="compute_dtype: GPT2LMHeadModel on cpu computes in its own torch.float32"):
        tiny_rl.trainer(PPO, base=language_model("GPT2", vocab_size=56), compute_dtype="bf16")
