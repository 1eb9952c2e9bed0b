"""PPO, GRPO and RLOO: what their roll-outs hold, what a step must and must not touch, and what their options change."""

import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import tiny
import tiny_rl
from rlhfscale.bed import rungs
from rlhfscale.bed.demonstrations import token_ids
from rlhfscale.bed.ladder import CONTEXT, EOS_ID
from rlhfscale.models import lm, loading
from rlhfscale.rl import GRPO, PPO, RLOO, GRPOConfig, PPOConfig, RLOOConfig, losses, metrics, rollout
from rlhfscale.rl.config import ConfigError
from rlhfscale.rl.networks import REFERENCE
from rlhfscale.samplers import Completions, hf
from tiny_rl import gather, trainer, updates

ALGORITHMS = [PPO, GRPO, RLOO]
KINDS = [(PPO, {}), (PPO, {"critic": "separate"}), (GRPO, {}), (RLOO, {})]
KINDS += [(algorithm, options | {"adapter": "none", "policy_lr": 1e-3}) for algorithm, options in KINDS]
NAMES = [f"{a.algorithm}-{'-'.join(map(str, o.values())) or 'trunk'}" for a, o in KINDS]


@pytest.fixture(scope="module", params=["trunk", "separate"])
def trained(request):
    """A run after three updates at another temperature, and the weights of its base before the first."""
    base = tiny.model()
    before = tiny.weights(base)
    run = trainer(base=base, temperature=0.8, critic=request.param, prompts_per_update=24)
    updates(run, 3)
    return run, before


def response_logprobs(network, prompt, response, temperature):
    """Of each response token, from a plain forward pass over this one sequence; and the distributions."""
    logprobs = tiny.full_logprobs(network, [*prompt, *response], temperature)[len(prompt) - 1 :]
    return logprobs.gather(1, torch.tensor(response)[:, None])[:, 0], logprobs


# --- roll-outs ---


def test_rollouts_hold_the_logprobs_of_policy_and_reference(trained):
    """Against one plain forward pass for each sequence: the folded policy, and an untouched copy of the base."""
    run, _ = trained
    batch, completions = gather(run)
    merged, reference = run.networks.merged_policy(), tiny.model()
    assert len(set(completions.lengths)) > 3 and len(set(batch.prompt_lengths.tolist())) > 3
    entropy = rollout.evaluate(run.networks, batch, loading.POLICY, 0.8).entropy
    differ = 0.0
    for i, prompt in enumerate(p for p in tiny_rl.prompts(run) for _ in range(2)):
        response, length = completions[i].token_ids, len(completions[i].token_ids)
        assert batch.mask[i].sum() == length == completions.lengths[i]
        expected, distribution = response_logprobs(merged, prompt, response, 0.8)
        torch.testing.assert_close(batch.logprobs[i, :length], expected, rtol=0, atol=2e-5)
        torch.testing.assert_close(
            entropy[i, :length], torch.distributions.Categorical(logits=distribution).entropy(), rtol=0, atol=2e-5
        )
        ref_expected, _ = response_logprobs(reference, prompt, response, 0.8)
        torch.testing.assert_close(batch.ref_logprobs[i, :length], ref_expected, rtol=0, atol=2e-5)
        differ = max(differ, (expected - ref_expected).abs().max().item())
        assert (batch.logprobs[i, length:] == 0).all() and (batch.values[i, length:] == 0).all()
    assert differ > 0.05  # the policy has moved away from the reference
    assert batch.sampler_gap < 1e-4


def test_values_are_read_before_each_token_under_the_critic(trained):
    run, _ = trained
    batch, completions = gather(run)
    with torch.no_grad(), run.networks.as_peft(run.networks.critic_role) as model:
        for i, prompt in enumerate(p for p in tiny_rl.prompts(run)[:4] for _ in range(2)):
            response = completions[i].token_ids
            ids = torch.tensor([[*prompt, *response]])
            hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
            expected = run.networks.value_head(hidden)[len(prompt) - 1 : -1]
            torch.testing.assert_close(batch.values[i, : len(response)], expected, rtol=0, atol=2e-5)
    assert batch.values.std() > 0.01


def test_the_penalty_falls_on_unfinished_responses():
    run = trainer(reward=lambda prompts, responses: [0.25] * len(prompts), missing_eos_penalty=0.5)
    batch, completions = gather(run)
    assert 0 < batch.finished.sum() < 32
    assert batch.scores.tolist() == [0.25 if finished else -0.25 for finished in completions.finished]
    rewards = rollout.token_rewards(batch, batch.scores, torch.zeros(batch.mask.shape), 0.0)
    for i in range(32):
        last = completions.lengths[i] - 1
        token = batch.ids[i, batch.prompt_lengths[i] + last].item()
        assert rewards[i].nonzero().flatten().tolist() == [last]
        assert (token == EOS_ID) == bool(completions.finished[i])


def test_a_reward_sees_prompts_and_responses_joined():
    reward = tiny_rl.ByIds()
    run = trainer(reward=reward)
    _, completions = gather(run)
    (seen,) = reward.asked
    assert seen.tokenizer is run.tokenizer and np.array_equal(seen.finished, completions.finished)
    for i, prompt in enumerate(p for p in tiny_rl.prompts(run) for _ in range(2)):
        sequence = [*prompt, *completions[i].token_ids]
        assert seen.ids[i, : len(sequence)].tolist() == sequence and seen.lengths[i] == len(sequence)
        assert seen.prompt_lengths[i] == len(prompt) and not seen.ids[i, len(sequence) :].any()


def test_a_function_of_texts_sees_texts_without_special_tokens():
    seen = []
    run = trainer(reward=lambda prompts, responses: seen.extend(zip(prompts, responses, strict=True)) or [0.0] * 32)
    _, completions = gather(run)
    tokenizer = run.tokenizer
    repeated = (p for p in tiny_rl.prompts(run) for _ in range(2))
    for (prompt, response), ids, completion in zip(seen, repeated, completions, strict=True):
        assert prompt == tokenizer.decode(ids[1:]) and "<" not in prompt + response
        assert response == tokenizer.decode(completion.token_ids, skip_special_tokens=True)


def test_text_and_conversations_are_encoded_as_the_tokenizer_does():
    tokenizer = rungs.build_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}a{% endif %}"
    )
    ids = tiny.prompts(1)[0]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert rollout.encode(tokenizer, [text, ids]) == [ids, ids]
    (conversation,) = rollout.encode(tokenizer, [[{"role": "user", "content": text}]])
    assert [t for t in conversation if t != tokenizer.bos_token_id] == [*ids[1:], tiny_rl.LETTER]


# --- a step ---


@pytest.mark.parametrize(("algorithm", "options"), KINDS, ids=NAMES)
def test_the_first_update_starts_at_ratio_one_and_kl_zero(algorithm, options):
    """One optimiser step on all roll-outs: its metrics are those before anything has moved."""
    options = {"loss_weights": "sequence"} | options if algorithm is GRPO else options
    run = trainer(algorithm, epochs=1, minibatch_size=None, **options)
    record, second = updates(run, 2)
    assert abs(record["kl_nats"]) < 1e-5 and second["kl_nats"] != 0
    assert abs(record["ratio_kl_nats"]) < 1e-6 and record["clip_fraction"] == 0
    assert abs(record["policy_loss"]) < 1e-5  # ratio 1, advantages of mean 0
    assert record["entropy_nats"] > 0.5 and record["policy_grad_norm"] > 0 and record["steps"] == 1
    if algorithm is PPO:
        assert record["explained_variance"] == pytest.approx(0, abs=1e-6)  # the value head starts as zero


@pytest.mark.parametrize(("algorithm", "options"), KINDS, ids=NAMES)
def test_one_pass_for_sampling_and_first_step_changes_nothing(algorithm, options):
    """Where the first step takes all roll-outs, their evaluation is used again; else the same is computed twice."""
    weights = []
    for most in (16384, 150):
        run = trainer(algorithm, epochs=1, minibatch_size=None, max_tokens_per_pass=most, **options)
        _, evaluated = run.evaluate(run.collect(tiny_rl.prompts(run))[0])
        assert (evaluated is not None) == (most == 16384)
        with tiny_rl.unmoved(run):
            updates(run, 1)
        weights.append(tiny_rl.gradients(run.networks))
    assert tiny_rl.relative(weights[1], weights[0]) < 1e-4


MICRO = [(PPO, {}), (PPO, {"critic": "separate"}), (PPO, {"entropy_coefficient": 0.1}), (RLOO, {})]
MICRO += [(GRPO, {"loss_weights": scheme}) for scheme in ("token", "sequence", "constant")]


@pytest.mark.parametrize(("algorithm", "options"), MICRO)
@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_a_step_does_not_depend_on_its_passes(algorithm, options, adapter):
    """The same record and gradients, whether a minibatch is one pass or one pass for each roll-out."""
    run = trainer(algorithm, adapter=adapter, policy_lr=2e-2 if adapter == "lora" else 1e-3, **options)
    updates(run, 2)  # ratios away from 1, a KL, and values
    batch, _ = gather(run)
    generator = torch.Generator().manual_seed(3)
    names = ("advantages", "returns")
    drawn = {name: torch.randn(batch.mask.shape, generator=generator) * batch.mask for name in names}
    batch = replace(batch, logprobs=batch.logprobs + 0.2 * drawn["returns"], **drawn)
    records, grads, passes = [], [], []
    for most in (10**6, 200, 1):
        run.config = run.config.model_copy(update={"max_tokens_per_pass": most})
        passes.append(len(list(batch.passes(most))))
        record, gradient = tiny_rl.step_gradients(run, batch)
        records.append(record), grads.append(gradient)
    assert passes[0] == 1 < passes[1] < passes[2] == 32
    assert records[0]["clip_fraction"] > 0
    for record, gradient in zip(records[1:], grads[1:], strict=True):
        assert record == pytest.approx(records[0], rel=1e-4, abs=1e-6)
        assert tiny_rl.relative(gradient, grads[0]) < 1e-4


@pytest.mark.parametrize("critic", ["trunk", "separate"])
def test_only_adapters_and_value_head_move(critic):
    base = tiny.model()
    before = tiny.weights(base)
    run = trainer(base=base, critic=critic)
    updates(run, 2)
    roles = (loading.POLICY, loading.CRITIC) if critic == "separate" else (loading.POLICY,)
    frozen, adapters = {}, {role: {} for role in roles}
    for name, parameter in run.networks.model.named_parameters():
        owner = next((role for role in roles if f".{role}." in name), None)
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        (adapters[owner] if owner else frozen)[plain] = parameter.detach()
    assert tiny.equal(frozen, before)
    fresh = dict(trainer(critic=critic).networks.model.named_parameters())
    for owned in adapters.values():
        assert len(owned) == 2 * 7 * 2  # A and B, seven matrices, two layers
        for name, parameter in owned.items():
            assert not torch.equal(parameter, fresh["base_model.model." + name]), name
    head = run.networks.value_head.linear
    assert head.weight.abs().max() > 0 and head.bias.abs().max() > 0


def test_all_weights_move_and_the_reference_does_not():
    before = tiny.weights(tiny.model())
    run = trainer(adapter="none", critic="separate", policy_lr=1e-3)
    updates(run, 1)
    for name, parameter in run.networks.base.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    assert tiny.equal(tiny.weights(run.networks.reference), before)
    trunk = tiny.weights(run.networks.critic_trunk)
    assert all(not torch.equal(weight, before["model." + name]) for name, weight in trunk.items())
    assert all(not torch.equal(weight, run.networks.base.model.get_parameter(name)) for name, weight in trunk.items())


def test_adapters_start_as_zero_and_differ_by_seed():
    a, b, c = (dict(trainer(seed=seed).networks.model.named_parameters()) for seed in (0, 0, 1))
    assert all((w == 0).all() for name, w in a.items() if "lora_B" in name)
    drawn = [name for name in a if "lora_A" in name]
    assert all(torch.equal(a[name], b[name]) and not torch.equal(a[name], c[name]) for name in drawn)


def made_up(run, scale=1.0):
    """Roll-outs with random advantages and returns."""
    batch, _ = gather(run)
    generator = torch.Generator().manual_seed(3)
    advantage, returns = (torch.randn(batch.mask.shape, generator=generator) * batch.mask for _ in range(2))
    return replace(batch, advantages=scale * advantage, returns=returns)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_zero_advantage_gives_no_policy_gradient(algorithm):
    """At ratio 1 and at the reference. The critic, with an adapter of its own, does move."""
    run = trainer(algorithm, **({"critic": "separate"} if algorithm is PPO else {}))
    before = [parameter.detach().clone() for parameter in run.networks.parameters_of(loading.POLICY)]
    record = run.step(made_up(run, scale=0.0), torch.arange(32))
    assert record["policy_grad_norm"] < 1e-6
    if algorithm is not GRPO:  # GRPO's KL term is 0 only up to rounding, which AdamW would make a step of
        assert record["policy_grad_norm"] == 0
        after = run.networks.parameters_of(loading.POLICY)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    if algorithm is PPO:
        assert run.networks.value_head.linear.weight.abs().max() > 0


def norm(parameters):
    return torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None]).norm().item()


@pytest.mark.parametrize("critic", ["trunk", "separate"])
def test_both_gradients_are_clipped(critic):
    free = trainer(max_grad_norm=1e9, critic=critic)
    policy, value = (free.networks.parameters_of(role) for role in (loading.POLICY, loading.CRITIC))
    record = free.step(made_up(free), torch.arange(32))
    assert norm(policy) == pytest.approx(record["policy_grad_norm"], rel=1e-5)
    assert norm(value) == pytest.approx(record["critic_grad_norm"], rel=1e-5)
    limit = min(norm(policy), norm(value)) / 10
    run = trainer(max_grad_norm=limit, critic=critic)
    again = run.step(made_up(run), torch.arange(32))
    assert again["policy_grad_norm"] == pytest.approx(record["policy_grad_norm"], rel=1e-4)  # before clipping
    assert norm(run.networks.parameters_of(loading.POLICY)) == pytest.approx(limit, rel=1e-3)
    assert norm(run.networks.parameters_of(loading.CRITIC)) == pytest.approx(limit, rel=1e-3)
    for ours, theirs in zip(run.networks.parameters_of(loading.POLICY), policy, strict=True):
        if ours.grad is not None:
            torch.testing.assert_close(
                ours.grad * record["policy_grad_norm"] / limit, theirs.grad, rtol=1e-2, atol=1e-5
            )


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_the_losses_of_a_separate_critic_and_of_the_policy_do_not_mix(adapter):
    run = trainer(critic="separate", adapter=adapter)
    tiny_rl.randomise(run.networks)
    batch, _ = gather(run)
    policy, critic = (run.networks.parameters_of(role) for role in (loading.POLICY, loading.CRITIC))
    rollout.evaluate_values(run.networks, batch).sum().backward()
    assert all(p.grad is None for p in policy) and all(p.grad is not None for p in critic)
    run.learner.optimizer.zero_grad(set_to_none=True)
    rollout.evaluate(run.networks, batch, loading.POLICY, 1.0).logprobs.sum().backward()
    assert all(p.grad is None for p in critic) and all(p.grad is not None for p in policy)


def test_a_shared_trunk_learns_from_the_value_loss_by_its_coefficient():
    """The policy's gradient is that of its own loss plus the coefficient times that of the value loss."""
    grads = []
    for coefficient, scale in ((0.5, 1.0), (1e-9, 1.0), (0.5, 0.0)):
        run = trainer(value_coefficient=coefficient)
        tiny_rl.randomise(run.networks)
        _, found = tiny_rl.step_gradients(run, made_up(run, scale))
        grads.append({name: g for name, g in found.items() if ".policy." in name})
    both = {name: grads[1][name] + grads[2][name] for name in grads[0]}
    assert tiny_rl.relative(grads[0], both) < 1e-4 and tiny_rl.relative(grads[1], both) > 0.05


def test_every_rollout_is_in_one_minibatch_of_each_epoch():
    run = trainer(epochs=3, minibatch_size=8)
    order = torch.stack(list(run.minibatches(32)))
    assert order.shape == (12, 8)
    assert all(sorted(epoch.flatten().tolist()) == list(range(32)) for epoch in order.view(3, 4, 8))
    assert not torch.equal(order[:4], order[4:8])


def test_a_minibatch_keeps_its_rows(trained):
    run, _ = trained
    batch, _ = gather(run)
    index = torch.tensor([5, 2, 17])
    part = batch[index]
    with torch.no_grad():
        found = rollout.evaluate(run.networks, part, loading.POLICY, run.config.temperature).logprobs
        ref = rollout.evaluate(run.networks, part, REFERENCE, run.config.temperature).logprobs
    torch.testing.assert_close(found, part.logprobs, rtol=0, atol=2e-5)
    torch.testing.assert_close(ref, part.ref_logprobs, rtol=0, atol=2e-5)
    assert part.mask.shape[1] == batch.mask[index].sum(1).max()
    torch.testing.assert_close(part.scores, batch.scores[index])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_is_decided_by_its_seed(algorithm):
    runs = []
    for seed in (0, 0, 1):
        run = trainer(algorithm, seed=seed)
        runs.append((updates(run, 2), tiny.weights(run.networks)))
    assert runs[0][0] == runs[1][0] and tiny.equal(runs[0][1], runs[1][1])
    assert runs[0][0] != runs[2][0] and not tiny.equal(runs[0][1], runs[2][1])


def test_updates_draw_fresh_samples():
    run = trainer(policy_lr=1e-12)
    (_, first), (_, second) = (run.update(tiny_rl.prompts(run)) for _ in range(2))
    assert not np.array_equal(first.ids, second.ids)


def test_the_responses_to_one_prompt_stand_in_a_row():
    """And they differ: each has a seed of its own."""
    run = trainer(GRPO, responses_per_prompt=4, prompts_per_update=8)
    batch, completions = gather(run)
    assert len(completions) == 32
    for i, prompt in enumerate(tiny_rl.prompts(run)):
        for row in range(4 * i, 4 * i + 4):
            assert batch.ids[row, : len(prompt)].tolist() == list(prompt)
    assert len({completion.token_ids for completion in completions}) > 24


# --- what is logged ---


@pytest.mark.parametrize(("algorithm", "options"), KINDS, ids=NAMES)
def test_the_glossary_lists_exactly_what_is_logged(algorithm, options):
    rows = re.findall(r"^\| (\w+) \| (.+) \| .+ \|$", metrics.__doc__, re.MULTILINE)
    listed = {name: meaning for name, meaning in rows if name not in ("metric", "replaced_groups")}
    of_ppo = {name for name, meaning in listed.items() if "(PPO)" in meaning}
    found = updates(trainer(algorithm, **options), 1)[0]
    assert set(found) == set(listed) - (set() if algorithm is PPO else of_ppo)
    assert all(isinstance(value, (int, float)) and np.isfinite(value) for value in found.values())


def test_metrics_equal_their_definitions(trained):
    run, _ = trained
    batch, completions = gather(run)
    generator = torch.Generator().manual_seed(5)
    batch = replace(batch, returns=torch.randn(batch.mask.shape, generator=generator) * batch.mask)
    steps = [{"entropy_nats": 1.0}, {"entropy_nats": 2.0}]
    found = metrics.rollout_metrics(batch, steps, 0.3)
    assert found["proxy"] == pytest.approx(batch.scores.mean().item())
    assert found["proxy_std"] == pytest.approx(batch.scores.numpy().std(), rel=1e-5)
    assert found["response_tokens"] == pytest.approx(completions.lengths.mean())
    assert found["finished"] == pytest.approx(completions.finished.mean())
    per_sequence = [(batch.logprobs - batch.ref_logprobs)[i][batch.mask[i]].sum().item() for i in range(48)]
    assert found["kl_nats"] == pytest.approx(np.mean(per_sequence), abs=1e-5)
    assert found["entropy_nats"] == 1.5 and found["steps"] == 2 and found["kl_coefficient"] == 0.3
    r, v = batch.returns[batch.mask].numpy(), batch.values[batch.mask].numpy()
    assert metrics.explained_variance(batch) == pytest.approx(1 - np.var(r - v) / np.var(r), rel=1e-4)


WEIGHTED = [(PPO, {}), *((GRPO, {"loss_weights": scheme}) for scheme in ("token", "sequence", "constant"))]


@pytest.mark.parametrize(("algorithm", "options"), WEIGHTED)
def test_means_over_tokens_do_not_depend_on_the_loss(algorithm, options):
    """entropy_nats, clip_fraction and ratio_kl_nats are means over response tokens, however the loss is weighted."""
    run = trainer(algorithm, **options)
    batch = made_up(run)
    batch = replace(batch, logprobs=batch.logprobs + 0.3 * batch.returns)  # ratios away from 1
    record, _ = tiny_rl.step_gradients(run, batch)
    with torch.no_grad():
        now = rollout.evaluate(run.networks, batch, loading.POLICY, 1.0)
    ratio = torch.exp(now.logprobs - batch.logprobs)
    clipped = losses.clipped_surrogate(ratio, batch.advantages, run.config.clip)[1]
    terms = {"entropy_nats": now.entropy, "ratio_kl_nats": batch.logprobs - now.logprobs, "clip_fraction": clipped}
    for name, values in terms.items():
        assert record[name] == pytest.approx(values[batch.mask].float().mean().item(), rel=1e-4), name


# --- what they learn ---


@pytest.mark.parametrize(
    ("algorithm", "options"), [KINDS[i] for i in (1, 4, 6, 7)], ids=[NAMES[i] for i in (1, 4, 6, 7)]
)
def test_a_learnable_reward_rises(algorithm, options):
    """See test_rl_runs.py for the others."""
    changes = {"policy_lr": 1e-2, "prompts_per_update": 32, "minibatch_size": 32, "kl_coefficient": 0.01}
    changes |= {"policy_lr": 3e-3} if "adapter" in options else {}
    run = trainer(algorithm, **options | changes)
    records = updates(run, 12)
    first, last = (np.mean([record["proxy"] for record in part]) for part in (records[:2], records[-2:]))
    assert last > first + 0.15
    assert records[-1]["kl_nats"] > 0.5


@pytest.mark.parametrize("critic", ["trunk", "separate"])
def test_the_critic_of_a_policy_that_stands_still_explains_returns(critic):
    """The reward is told by the prompt's first token after begin-of-sequence."""
    reward = tiny_rl.ByIds(lambda ids, *_: ids[:, 1] == token_ids()["lists"])
    run = trainer(reward=reward, policy_lr=1e-12, critic_lr=2e-2, missing_eos_penalty=0.0, critic=critic, epochs=4)
    explained = [record["explained_variance"] for record in updates(run, 12)]
    assert explained[0] == pytest.approx(0, abs=1e-6)
    assert explained[-1] > (0.5 if critic == "separate" else 0.3)  # a head alone reads what the trunk happens to hold


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_larger_kl_coefficient_stays_closer(algorithm):
    kls = []
    for coefficient in (0.0, 1.0):
        run = trainer(algorithm, policy_lr=1e-2, kl_coefficient=coefficient, missing_eos_penalty=0.0)
        kls.append(updates(run, 8)[-1]["kl_nats"])
    assert kls[1] < 0.5 * kls[0]


# --- options ---


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_larger_ratio_kl_than_allowed_ends_the_update(algorithm):
    free, held = (trainer(algorithm, epochs=4, policy_lr=5e-2, max_ratio_kl=limit) for limit in (None, 1e-3))
    assert updates(free, 1)[0]["steps"] == 8
    assert 1 < updates(held, 1)[0]["steps"] < 8
    assert updates(trainer(algorithm, max_ratio_kl=1e3), 1)[0]["steps"] == 4


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_adaptive_coefficient_moves_towards_its_target(algorithm):
    for target, direction in ((1e3, -1), (1e-4, 1)):
        run = trainer(algorithm, kl_target=target, kl_horizon=320, kl_coefficient=0.5, policy_lr=1e-2)
        found = [record["kl_coefficient"] for record in updates(run, 4)]
        assert found[0] == 0.5 and found[1] == pytest.approx(0.5 * (1 - 0.2 * 0.1))  # KL is 0 in the first update
        assert np.sign(found[3] - found[2]) == direction
        assert run.kl_coefficient == pytest.approx(found[3] * (1 + 0.2 * 0.1 * direction))
    assert {record["kl_coefficient"] for record in updates(trainer(algorithm, policy_lr=1e-2), 3)} == {0.02}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_entropy_bonus_raises_entropy(algorithm):
    found = []
    for coefficient in (0.0, 1.0):
        reward = tiny_rl.ByIds(lambda ids, *_: np.zeros(len(ids)))
        run = trainer(
            algorithm, reward=reward, entropy_coefficient=coefficient, kl_coefficient=0.0, missing_eos_penalty=0.0
        )
        found.append(updates(run, 5)[-1]["entropy_nats"])
    assert found[1] > found[0] + 0.1


def test_the_gradient_of_the_bonus_is_that_of_the_mean_entropy():
    grads = []
    for coefficient in (0.0, 0.3):
        run = trainer(entropy_coefficient=coefficient)
        tiny_rl.randomise(run.networks)
        batch = made_up(run)
        grads.append(tiny_rl.step_gradients(run, batch)[1])
    run.networks.zero_grad()
    now = rollout.evaluate(run.networks, batch, loading.POLICY, 1.0, entropy_gradient=True)
    now.entropy[batch.mask].mean().backward()
    bonus = {name: -0.3 * gradient for name, gradient in tiny_rl.gradients(run.networks).items()}
    assert tiny_rl.relative({name: grads[1][name] - grads[0][name] for name in bonus}, bonus) < 1e-3


def test_learning_rates_rise_over_the_warm_up():
    run, rates = trainer(warmup_updates=4, policy_lr=1e-3, critic_lr=4e-3), []
    for _ in range(6):
        updates(run, 1)
        rates.append([group["lr"] for group in run.learner.optimizer.param_groups])
    expected = [[factor * 1e-3, factor * 4e-3] for factor in (0.25, 0.5, 0.75, 1, 1, 1)]
    np.testing.assert_allclose(rates, expected)


def test_whitened_rewards_do_not_depend_on_the_scores_scale():
    found = []
    for factor, whiten in ((1, True), (100, True), (1, False), (100, False)):
        reward = tiny_rl.ByIds(lambda *sequences, factor=factor: factor * tiny_rl.count_letter(*sequences))
        run = trainer(reward=reward, whiten_rewards=whiten, missing_eos_penalty=0.0)
        batch = run.estimate_advantages(gather(run)[0])
        found.append((batch.returns, updates(run, 1)[0]["proxy"]))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-4) and not torch.allclose(found[2][0], found[3][0])
    assert found[1][1] == pytest.approx(100 * found[0][1], rel=1e-5)  # what is logged stays the raw score


@pytest.mark.filterwarnings("ignore:std")
def test_one_rollout_has_no_spread_to_be_scaled_by():
    run = trainer(whiten_rewards=True, prompts_per_update=1, responses_per_prompt=1, minibatch_size=1)
    assert np.isfinite(updates(run, 1)[0]["policy_loss"])


def test_weight_decay_shrinks_weights_without_gradient():
    sizes = []
    for decay in (0.0, 0.5):
        run = trainer(weight_decay=decay, policy_lr=1e-1)
        batch = made_up(run, scale=0.0)
        run.step(replace(batch, returns=batch.values), torch.arange(32))
        first = run.networks.parameters_of(loading.POLICY)[0]  # an A, to which B = 0 lets no gradient pass
        sizes.append(first.norm().item())
    assert sizes[1] == pytest.approx(0.95 * sizes[0], rel=1e-5)


def test_advantages_are_scaled_or_not():
    found = []
    for scale in (True, False):
        run, seen = trainer(GRPO, scale_advantages=scale, epochs=1, minibatch_size=None), []
        step = run.step
        run.step = lambda rollouts, *rest, step=step, seen=seen: seen.append(rollouts) or step(rollouts, *rest)
        updates(run, 1)
        found.append(seen[0])
    spread = found[0].scores.view(-1, 2).std(1).repeat_interleave(2)[:, None] + 1e-4
    torch.testing.assert_close(found[0].advantages * spread, found[1].advantages, rtol=1e-4, atol=1e-6)
    assert (found[1].advantages.sum(1) != 0).any()


# --- bad input ---


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda scores: scores[:-1], r"shape \[31\] for 32 samples"),
        (lambda scores: scores[:, None], r"shape \[32, 1\] for 32"),
        (lambda scores: np.where(np.arange(32) == 7, np.nan, scores), "sample 7 the score nan"),
        (lambda scores: np.where(np.arange(32) >= 30, -np.inf, scores), "sample 30 the score -inf"),
    ],
)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_bad_rewards_are_named(algorithm, bad, message):
    run = trainer(algorithm, reward=tiny_rl.ByIds(lambda *sequences: bad(tiny_rl.count_letter(*sequences))))
    with pytest.raises(ValueError, match=message):
        updates(run, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({3: []}, "prompt 3 is empty"),
        ({3: ""}, None),  # text: the begin-of-sequence token is left
        ({5: [1] * (CONTEXT - 11)}, rf"prompt 5 has {CONTEXT - 11} tokens.*max_new_tokens=12.*context of {CONTEXT}"),
        ({5: [1] * (CONTEXT - 12)}, None),
    ],
)
def test_bad_prompts_are_named(change, message):
    run = trainer()
    given = [change.get(i, prompt) for i, prompt in enumerate(tiny_rl.prompts(run))]
    if message is None:
        run.update(given)
        return
    with pytest.raises(ValueError, match=message):
        run.update(given)
    assert run.num_updates == 0


def test_a_wrong_number_of_prompts_is_named():
    with pytest.raises(ValueError, match="prompts: 15 given, prompts_per_update is 16"):
        trainer().update(tiny.prompts(15))
    with pytest.raises(ValueError, match="prompts: none given"):
        trainer().train([], 1, progress=False)


def test_an_empty_response_of_a_sampler_is_named():
    def sampler(*arguments, **options) -> Completions:
        found = hf.sample(*arguments, **options)
        found.lengths[4] = 0
        return found

    with pytest.raises(ValueError, match="response 4 is empty"):
        updates(trainer(sampler=sampler), 1)


def test_a_tokenizer_without_an_end_is_refused():
    tokenizer = rungs.build_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token, so no response could end"):
        trainer(tokenizer=tokenizer)


def test_padding_may_be_the_end_of_sequence_or_missing():
    """Padding is told by lengths: the same run, whatever the padding token."""
    found = []
    for pad in ("<pad>", "<eos>", None):
        tokenizer, base = rungs.build_tokenizer(), tiny.model()
        tokenizer.pad_token = pad
        base.config.pad_token_id = base.generation_config.pad_token_id = tokenizer.pad_token_id
        run = trainer(tokenizer=tokenizer, base=base)
        found.append((updates(run, 2), tiny.weights(run.networks)))
    assert 0 < found[0][0][0]["finished"] < 1
    assert found[0][0] == found[1][0] == found[2][0]
    assert tiny.equal(found[0][1], found[1][1]) and tiny.equal(found[0][1], found[2][1])


@pytest.mark.parametrize("config", [GRPOConfig, RLOOConfig])
def test_a_group_of_one_is_refused(config):
    with pytest.raises(ConfigError, match="responses_per_prompt: 1 gives a response nothing to be compared with"):
        config(responses_per_prompt=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 1e-4}, "learning_rate"),
        ({"minibatch_size": 3}, "minibatch_size: 3 does not divide the 64"),
        ({"temperature": 0.0}, "temperature"),
        ({"gamma": 1.5}, "gamma"),
        ({"critic": "none"}, "critic"),
        ({"adapter": "qlora"}, "adapter"),
        ({"kl_estimator": "k4"}, "kl_estimator"),
        ({"policy_lr": 0.0}, "policy_lr"),
        ({"epochs": 0}, "epochs"),
    ],
)
def test_bad_configs_name_the_field(options, message):
    with pytest.raises(ConfigError, match=message):
        PPOConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy_lr": -1.0}, "policy_lr: -1.0 does not fit; input should be greater than 0"),
        ({"critic": "both"}, "critic: 'both' does not fit; input should be 'trunk' or 'separate'"),
        ({"policy_rl": 1e-3}, "policy_rl: PPOConfig has no such field; did you mean policy_lr?"),
        ({"epochs": 0, "clip": 0}, "epochs: 0 does not fit; input should be greater than or equal to 1; clip: 0 does"),
        ({"learning": 1e-3}, "learning: PPOConfig has no such field"),
    ],
)
def test_a_bad_config_is_told_in_one_line(options, message):
    with pytest.raises(ConfigError) as error:
        PPOConfig(**options)
    text = str(error.value)
    assert text.startswith(message) and "\n" not in text and "http" not in text


# --- prompts and rewards of other kinds ---


@pytest.mark.parametrize(
    "of",
    [
        iter,
        tuple,
        lambda prompts: (prompt for prompt in prompts),
        lambda prompts: pd.Series(prompts, index=range(100, 100 + len(prompts))),
        lambda prompts: [np.array(prompt) for prompt in prompts],
    ],
)
def test_any_collection_of_prompts_is_trained_on(of):
    run, whole = trainer(), trainer()
    found = run.train(of(tiny.prompts(20)), 2, progress=False)
    pd.testing.assert_frame_equal(found, whole.train(tiny.prompts(20), 2, progress=False))
    assert updates(run, 1) == updates(whole, 1)
    run.update(of(tiny.prompts(16)))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("a text", "prompts: one text; give a list of texts"),
        (["a b c", "a\ud800b"], "prompt 1 is no text: surrogates not allowed at character 1"),
        ([[{"role": "user", "content": "a\udfff"}]], "prompt 0 is no text: surrogates not allowed"),
        ([[4, 5], [4, 56]], "prompt 1 holds ids beyond the model's embedding of 56 tokens"),
        ([[4, -1]], "prompt 0 holds ids beyond"),
        ([[4, 5], []], "prompt 1 is empty"),
        ([[4] * 600], "prompt 0 has 600 tokens; with max_new_tokens=12 it exceeds the model's context"),
        ([], "prompts: none given"),
    ],
)
def test_prompts_that_cannot_be_used_are_named_before_anything_is_computed(prompts, message):
    run = trainer(sampler=lambda *args, **options: pytest.fail("sampled"))
    with pytest.raises(ValueError, match=message):
        run.train(prompts, 2, progress=False)


def test_a_model_with_fewer_embeddings_than_the_tokenizer_has_ids_is_refused():
    with pytest.raises(ValueError, match="tokenizer: its ids go up to 55, the model has embeddings for 40 tokens"):
        trainer(base=tiny_rl.language_model())


def test_a_special_token_without_an_embedding_is_no_reason_to_refuse():
    """As Gemma 3's for images; a prompt that holds it is refused."""
    tokenizer = rungs.build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    run = trainer(tokenizer=tokenizer)
    run.update(tiny_rl.prompts(run))
    with pytest.raises(ValueError, match="prompt 0 holds ids beyond"):
        run.train(["<image> a b"], 1, progress=False)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (
            lambda count: (1.0 for _ in range(count)),
            "a reward returned a generator; it must return one number for each",
        ),
        (lambda count: dict.fromkeys(range(count), 1.0), "a reward returned a dict; it must return one number"),
        (lambda count: [[1.0], [1.0, 2.0]] * (count // 2), "a reward returned a list; it must return one number"),
        (lambda count: ["good"] * count, "a reward returned a list; it must return one number"),
        (lambda count: 1.0, r"scores of shape \[\] for 32 samples; expected \[32\]"),
        (lambda count: [1.0] * (count - 1), r"scores of shape \[31\] for 32 samples"),
        (lambda count: [1.0] * (count - 1) + [None], "gave sample 31 the score nan"),
    ],
)
def test_what_a_reward_must_return_is_said(returned, message):
    run = trainer(reward=lambda prompts, responses: returned(len(responses)))
    with pytest.raises(ValueError, match=message):
        run.update(tiny_rl.prompts(run))


@pytest.mark.parametrize("reward", [None, 3, [1.0], tiny_rl.ByIds])
def test_what_can_score_nothing_is_refused(reward):
    with pytest.raises(TypeError, match="^reward: "):
        PPO(tiny.model(), rungs.build_tokenizer(), reward)


def test_divergence_names_the_update():
    run = trainer()
    updates(run, 1)
    run.networks.value_head.linear.bias.data.fill_(float("nan"))
    with pytest.raises(lm.Diverged, match="update 1: policy loss .*, value loss nan"):
        updates(run, 1)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_gradient_that_is_not_finite_is_named_before_it_moves_anything(algorithm):
    run = trainer(algorithm)
    run.learner.parameters[loading.POLICY][0].register_hook(lambda gradient: gradient * float("inf"))
    before = tiny.weights(run.networks)
    with pytest.raises(lm.Diverged, match="update 0: .* policy grad norm (nan|inf)"):
        updates(run, 1)
    assert tiny.equal(before, tiny.weights(run.networks))
