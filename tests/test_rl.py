"""PPO: its mathematics against exact or independent values, and what a trainer must and must not touch."""

import itertools
import math

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import tiny
from rlhfscale import lm, models
from rlhfscale.data.demonstrations import token_ids
from rlhfscale.ladder import EOS_ID
from rlhfscale.rl import PPO, PPOConfig, advantages, kl, losses, rollout
from rlhfscale.rl import ppo as ppo_module
from rlhfscale.samplers import request_seeds

# --- KL ---

POLICY = torch.tensor([0.50, 0.20, 0.15, 0.10, 0.05], dtype=torch.float64)
REFERENCE = torch.tensor([0.05, 0.30, 0.25, 0.05, 0.35], dtype=torch.float64)


def exact_kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True))


def test_the_two_directions_of_the_example_differ():
    assert abs(exact_kl(POLICY, REFERENCE) - exact_kl(REFERENCE, POLICY)) > 0.1


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_unbiased_estimators_have_the_exact_kl_as_their_mean(estimator):
    """The mean over tokens drawn from the policy is KL(policy || reference), in that direction."""
    terms = kl.kl_terms(POLICY.log(), REFERENCE.log(), estimator)
    assert (POLICY * terms).sum().item() == pytest.approx(exact_kl(POLICY, REFERENCE), rel=1e-12)


def test_k2_approaches_the_exact_kl_of_close_distributions():
    near = POLICY * torch.tensor([1.02, 0.99, 0.97, 1.01, 0.97])
    near = near / near.sum()
    terms = kl.kl_terms(POLICY.log(), near.log(), "k2")
    assert (POLICY * terms).sum().item() == pytest.approx(exact_kl(POLICY, near), rel=0.02)
    assert (kl.kl_terms(POLICY.log(), REFERENCE.log(), "k2") >= 0).all()


def test_k3_is_never_negative_and_k1_is_signed():
    logprobs, ref_logprobs = torch.randn(2, 1000, dtype=torch.float64)
    assert (kl.kl_terms(logprobs, ref_logprobs, "k3") >= 0).all()
    assert kl.kl_terms(torch.tensor([-1.0]), torch.tensor([-3.0]), "k1").item() == 2.0
    assert torch.equal(kl.kl_terms(logprobs, logprobs, "k3"), torch.zeros(1000, dtype=torch.float64))
    with pytest.raises(ValueError, match="k4.*k1, k2, k3"):
        kl.kl_terms(logprobs, logprobs, "k4")


def test_sequence_kl_sums_over_the_response_alone():
    """All responses of at most three tokens of a two-token Markov chain in which token 1 ends the response."""
    p, q = np.array([[0.7, 0.3], [0.4, 0.6]]), np.array([[0.2, 0.8], [0.5, 0.5]])  # rows: first token, later tokens
    responses = [(1,), (0, 1), (0, 0, 1), (0, 0, 0)]
    probability, logprobs, ref_logprobs = [], torch.full((4, 3), 7.0), torch.full((4, 3), -7.0)  # junk past the end
    mask = torch.zeros(4, 3, dtype=torch.bool)
    for row, response in enumerate(responses):
        for t, token in enumerate(response):
            logprobs[row, t], ref_logprobs[row, t] = math.log(p[min(t, 1), token]), math.log(q[min(t, 1), token])
            mask[row, t] = True
        probability.append(np.exp(logprobs[row, : len(response)].sum().item()))
    reference = [np.prod([q[min(t, 1), token] for t, token in enumerate(r)]) for r in responses]
    assert sum(probability) == pytest.approx(1) and sum(reference) == pytest.approx(1)
    found = (kl.sequence_kl(logprobs, ref_logprobs, mask).numpy() * probability).sum()
    assert found == pytest.approx(exact_kl(np.array(probability), np.array(reference)), rel=1e-5)


# --- advantages and losses ---

GENERATOR = torch.Generator().manual_seed(0)
LENGTHS = torch.tensor([6, 1, 4, 3])
MASK = torch.arange(6) < LENGTHS[:, None]
A, B, C, D = (torch.randn(4, 6, generator=GENERATOR) for _ in range(4))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.97, 0.0)])
def test_gae_equals_its_closed_form(gamma, lam):
    """A_t = sum over k of (gamma lam)^k delta_{t+k}, with V = 0 past the last token of each response."""
    rewards, values = A, B  # not masked: what lies outside must not matter
    found, returns = advantages.gae(rewards, values, MASK, gamma=gamma, lam=lam)
    for i, length in enumerate(LENGTHS.tolist()):
        r, v = rewards[i, :length].tolist(), [*values[i, :length].tolist(), 0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(6):
            expected = sum((gamma * lam) ** k * delta[t + k] for k in range(length - t))
            assert found[i, t].item() == pytest.approx(expected, abs=1e-5)
            assert returns[i, t].item() == pytest.approx(expected + v[t] if t < length else 0.0, abs=1e-5)
    if (gamma, lam) == (1.0, 1.0):  # the return to go
        assert returns[0, 2].item() == pytest.approx(rewards[0, 2:].sum().item(), abs=1e-5)


def test_whiten():
    found = advantages.whiten(A * 3 + 2, MASK)
    marked = found[MASK].numpy()
    assert abs(marked.mean()) < 1e-6 and marked.std() == pytest.approx(1, rel=1e-5)
    assert (found[~MASK] == 0).all()
    values = (A * 3 + 2)[MASK].numpy()
    np.testing.assert_allclose(marked, (values - values.mean()) / values.std(), atol=1e-5)
    assert torch.isfinite(advantages.whiten(torch.ones(4, 6), MASK)).all()
    assert advantages.masked_mean(A, MASK).item() == pytest.approx(A[MASK].mean().item(), abs=1e-6)


def test_clipped_surrogate_equals_the_equation():
    clip, terms, clipped = 0.2, [], []
    logprobs, old, advantage = A * 0.3, B * 0.3, C
    for i, t in zip(*np.nonzero(MASK.numpy()), strict=True):
        ratio, a = math.exp(logprobs[i, t] - old[i, t]), advantage[i, t].item()
        bounded = min(max(ratio, 1 - clip), 1 + clip) * a
        terms.append(min(ratio * a, bounded))
        clipped.append(bounded < ratio * a)
    loss, fraction = losses.clipped_surrogate(logprobs, old, advantage, MASK, clip)
    assert loss.item() == pytest.approx(-np.mean(terms), abs=1e-6)
    assert 0 < np.mean(clipped) < 1 and fraction.item() == pytest.approx(np.mean(clipped))


@pytest.mark.parametrize(("advantage", "ratio", "moves"), [(1, 1.5, 0), (1, 0.5, 1), (-1, 0.5, 0), (-1, 1.5, 1)])
def test_the_gradient_stops_beyond_the_clip_and_only_there(advantage, ratio, moves):
    logprobs = torch.tensor([[math.log(ratio)]], requires_grad=True)
    one = torch.ones(1, 1)
    losses.clipped_surrogate(logprobs, 0 * one, advantage * one, one.bool(), 0.2)[0].backward()
    assert logprobs.grad.item() == pytest.approx(-advantage * ratio * moves)


def test_clipped_value_equals_the_equation():
    clip, terms, used = 0.3, [], set()
    values, old, returns = A, A + B * 0.5, D
    for i, t in zip(*np.nonzero(MASK.numpy()), strict=True):
        v, v_old, target = values[i, t].item(), old[i, t].item(), returns[i, t].item()
        bounded = min(max(v, v_old - clip), v_old + clip)
        terms.append(max((v - target) ** 2, (bounded - target) ** 2))
        used.add((bounded - target) ** 2 > (v - target) ** 2)
    assert used == {True, False}
    found = losses.clipped_value(values, old, returns, MASK, clip)
    assert found.item() == pytest.approx(np.mean(terms) / 2, rel=1e-5)


def rollouts(scores, finished):
    """Four roll-outs of different lengths with random log-probabilities; junk outside the mask."""
    return rollout.Rollouts(
        ids=torch.ones(4, 9, dtype=torch.long), attention_mask=torch.ones(4, 9, dtype=torch.long),
        prompt_lengths=torch.full((4,), 3), mask=MASK, finished=finished, logprobs=A, ref_logprobs=B, values=C,
        scores=scores, sampler_gap=0.0,
    )  # fmt: skip


def test_the_score_lands_on_the_last_token_of_each_response():
    scores = torch.tensor([1.0, -2.0, 3.0, 0.5])
    batch = rollouts(scores, torch.tensor([True, True, False, True]))
    assert torch.equal(rollout.token_rewards(batch, 0.0).nonzero()[:, 1], LENGTHS - 1)
    found = rollout.token_rewards(batch, 0.1)
    for i, length in enumerate(LENGTHS.tolist()):
        for t in range(6):
            expected = -0.1 * (A[i, t] - B[i, t]).item() if t < length else 0.0
            expected += scores[i].item() if t == length - 1 else 0.0
            assert found[i, t].item() == pytest.approx(expected, abs=1e-6)


# --- the trainer ---

LETTER = token_ids()["a"]


def count_letter(ids, prompt_lengths, lengths):
    """A learnable reward: the share of one letter in the whole sequence."""
    return (ids == LETTER).sum(1) / lengths


def ppo(seed=0, reward=count_letter, base=None, **changes):
    settings = {
        "num_updates": 4, "prompts_per_update": 16, "responses_per_prompt": 2, "epochs": 2, "minibatch_size": 16,
        "policy_lr": 5e-3, "critic_lr": 5e-3, "kl_coefficient": 0.02, "clip": 0.2, "value_clip": 0.2, "gamma": 1.0,
        "lam": 0.95, "temperature": 1.0, "max_grad_norm": 1.0, "missing_eos_penalty": 1.0, "lora_rank": 4,
        "lora_alpha": 8.0, "max_new_tokens": 12,
    }  # fmt: skip
    return PPO(base or tiny.model(), reward, PPOConfig(**(settings | changes)), seed)


def update(run, step=0):
    return run.update(tiny.prompts(run.config.prompts_per_update, seed=step))


def gather(run, num_prompts=24, seed=0):
    config = run.config
    return rollout.collect(
        run.shared, run.reward, tiny.prompts(num_prompts), request_seeds((seed,), num_prompts),
        temperature=config.temperature, max_new_tokens=config.max_new_tokens,
        missing_eos_penalty=config.missing_eos_penalty,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained():
    """A run after three updates, and the weights of its base before the first."""
    base = tiny.model()
    before = tiny.weights(base)
    run = ppo(base=base, temperature=0.8)
    for step in range(3):
        update(run, step)
    return run, before


def response_logprobs(network, prompt, response, temperature):
    """Of each response token, from a plain forward pass over this one sequence."""
    logprobs = tiny.full_logprobs(network, [*prompt, *response], temperature)[len(prompt) - 1 :]
    return logprobs.gather(1, torch.tensor(response)[:, None])[:, 0], logprobs


def test_rollouts_hold_the_logprobs_of_policy_and_reference(trained):
    """Against one plain forward pass for each sequence: the folded policy, and an untouched copy of the base."""
    run, _ = trained
    batch, completions = gather(run)
    merged, reference = run.shared.merged_policy(), tiny.model()
    assert len(set(completions.lengths)) > 3 and len(set(batch.prompt_lengths.tolist())) > 3
    run.shared.use(models.POLICY)
    _, entropy = rollout.token_logprobs(run.shared, batch, 0.8)
    differ = 0.0
    for i, prompt in enumerate(tiny.prompts(24)):
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
    batch, completions = gather(run, 8)
    run.shared.use(models.CRITIC)
    with torch.no_grad():
        for i, prompt in enumerate(tiny.prompts(8)):
            response = completions[i].token_ids
            ids = torch.tensor([[*prompt, *response]])
            hidden = run.shared.model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
            expected = run.shared.value_head(hidden)[len(prompt) - 1 : -1]
            torch.testing.assert_close(batch.values[i, : len(response)], expected, rtol=0, atol=2e-5)
    assert batch.values.std() > 0.01


def test_the_penalty_falls_on_unfinished_responses():
    run = ppo(reward=lambda ids, *_: np.full(len(ids), 0.25), missing_eos_penalty=0.5)
    batch, completions = gather(run)
    assert 0 < batch.finished.sum() < 24
    assert batch.scores.tolist() == [0.25 if finished else -0.25 for finished in completions.finished]
    rewards = rollout.token_rewards(batch, 0.0)
    for i in range(24):
        last = completions.lengths[i] - 1
        token = batch.ids[i, batch.prompt_lengths[i] + last].item()
        assert rewards[i].nonzero().flatten().tolist() == [last]
        assert (token == EOS_ID) == bool(completions.finished[i])


def test_the_reward_function_sees_prompt_and_response_joined():
    seen = {}

    def reward(ids, prompt_lengths, lengths):
        seen.update(ids=ids.copy(), prompt_lengths=prompt_lengths.copy(), lengths=lengths.copy())
        return np.zeros(len(ids))

    _, completions = gather(ppo(reward=reward), 8)
    for i, prompt in enumerate(tiny.prompts(8)):
        sequence = [*prompt, *completions[i].token_ids]
        assert seen["ids"][i, : len(sequence)].tolist() == sequence and seen["lengths"][i] == len(sequence)
        assert seen["prompt_lengths"][i] == len(prompt)
        assert not seen["ids"][i, len(sequence) :].any()


def test_the_first_update_starts_at_ratio_one_and_kl_zero():
    """One optimiser step on all roll-outs: its metrics are those before anything has moved."""
    run = ppo(epochs=1, minibatch_size=32)
    record, _ = update(run)
    assert abs(record["kl_nats"]) < 1e-5
    assert abs(record["ratio_kl_nats"]) < 1e-6
    assert record["clip_fraction"] == 0
    assert abs(record["policy_loss"]) < 1e-5  # ratio 1, advantages of mean 0
    assert record["entropy_nats"] > 0.5 and record["policy_grad_norm"] > 0
    assert record["explained_variance"] == pytest.approx(0, abs=1e-6)  # the value head starts as zero
    second, _ = update(run, 1)
    assert second["kl_nats"] != 0


def test_only_adapters_and_value_head_move(trained):
    run, before = trained
    frozen, adapters = {}, {models.POLICY: {}, models.CRITIC: {}}
    for name, parameter in run.shared.model.named_parameters():
        owner = next((a for a in adapters if f".{a}." in name), None)
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        (adapters[owner] if owner else frozen)[plain] = parameter.detach()
    assert tiny.equal(frozen, before)
    fresh = dict(ppo(base=tiny.model()).shared.model.named_parameters())
    for owned in adapters.values():
        assert len(owned) == 2 * 7 * 2  # A and B, seven matrices, two layers
        for name, parameter in owned.items():
            assert not torch.equal(parameter, fresh["base_model.model." + name]), name
    assert run.shared.value_head.linear.weight.abs().max() > 0 and run.shared.value_head.linear.bias.abs().max() > 0


def test_adapters_start_as_zero_and_differ_by_seed():
    a, b, c = (dict(ppo(seed=seed).shared.model.named_parameters()) for seed in (0, 0, 1))
    assert all((w == 0).all() for name, w in a.items() if "lora_B" in name)
    drawn = [name for name in a if "lora_A" in name]
    assert all(torch.equal(a[name], b[name]) and not torch.equal(a[name], c[name]) for name in drawn)


def test_merged_policy_equals_the_adapter(trained):
    run, before = trained
    documents = tiny.documents(16)
    ids = torch.from_numpy(documents.ids)
    merged = run.shared.merged_policy()
    run.shared.use(models.POLICY)
    with torch.no_grad():
        mask = (ids != 0).long()
        expected = run.shared.model(input_ids=ids, attention_mask=mask).logits
        torch.testing.assert_close(merged(input_ids=ids, attention_mask=mask).logits, expected, rtol=0, atol=1e-5)
        with run.shared.reference():
            reference = run.shared.model(input_ids=ids, attention_mask=mask).logits
        plain = tiny.model()(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(reference, plain, rtol=0, atol=1e-5)
    assert (expected - reference).abs().max() > 0.05
    again = tiny.weights(run.shared.merged_policy())
    assert tiny.equal(again, tiny.weights(run.shared.merged_policy()))  # folded from the base each time
    assert again.keys() == before.keys()


def test_leaving_the_reference_gives_the_gradients_back(trained):
    run, _ = trained
    run.shared.use(models.CRITIC)
    with run.shared.reference():
        assert not torch.is_grad_enabled()
    assert all(parameter.requires_grad for parameter in run.critic_parameters)
    assert not any(parameter.requires_grad for parameter in run.policy_parameters)
    assert torch.is_grad_enabled()


def one_step(run, scale=1.0):
    """One optimiser step with made-up advantages and returns; its record."""
    batch, _ = gather(run)
    generator = torch.Generator().manual_seed(3)
    advantage, returns = (torch.randn(batch.mask.shape, generator=generator) * batch.mask for _ in range(2))
    return run._step(batch, scale * advantage, returns, torch.arange(len(batch)))


def test_zero_advantage_gives_no_policy_gradient():
    run = ppo()
    before = [parameter.detach().clone() for parameter in run.policy_parameters]
    record = one_step(run, scale=0.0)
    assert record["policy_grad_norm"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, run.policy_parameters, strict=True))
    assert run.shared.value_head.linear.weight.abs().max() > 0  # the critic does move


def norm(parameters):
    return torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None]).norm().item()


def test_both_gradients_are_clipped():
    free = ppo(max_grad_norm=1e9)
    record = one_step(free)
    assert norm(free.policy_parameters) == pytest.approx(record["policy_grad_norm"], rel=1e-5)
    limit = min(norm(free.policy_parameters), norm(free.critic_parameters)) / 10
    run = ppo(max_grad_norm=limit)
    assert one_step(run)["policy_grad_norm"] == pytest.approx(record["policy_grad_norm"], rel=1e-4)  # before clipping
    assert norm(run.policy_parameters) == pytest.approx(limit, rel=1e-3)
    assert norm(run.critic_parameters) == pytest.approx(limit, rel=1e-3)
    for ours, theirs in zip(run.policy_parameters, free.policy_parameters, strict=True):
        if ours.grad is not None:
            torch.testing.assert_close(
                ours.grad * record["policy_grad_norm"] / limit, theirs.grad, rtol=1e-2, atol=1e-5
            )


def test_the_loss_of_the_critic_does_not_reach_the_policy():
    """And the other way round: each adapter's gradient comes from its own loss."""
    run = ppo()
    batch, _ = gather(run)
    run.shared.use(models.CRITIC)
    rollout.token_values(run.shared, batch).sum().backward()
    assert all(parameter.grad is None for parameter in run.policy_parameters)
    run.optimizer.zero_grad(set_to_none=True)
    run.shared.use(models.POLICY)
    rollout.token_logprobs(run.shared, batch, 1.0)[0].sum().backward()
    assert all(parameter.grad is None for parameter in run.critic_parameters)


def test_every_rollout_is_in_one_minibatch_of_each_epoch():
    run = ppo(epochs=3, minibatch_size=8)
    order = torch.stack(list(run._minibatches(32)))
    assert order.shape == (12, 8)
    assert all(sorted(epoch.flatten().tolist()) == list(range(32)) for epoch in order.view(3, 4, 8))
    assert not torch.equal(order[:4], order[4:8])


def test_a_minibatch_keeps_its_rows(trained):
    run, _ = trained
    batch, _ = gather(run)
    index = torch.tensor([5, 2, 17])
    part = batch[index]
    run.shared.use(models.POLICY)
    with torch.no_grad():
        found, _ = rollout.token_logprobs(run.shared, part, run.config.temperature)
    torch.testing.assert_close(found, part.logprobs, rtol=0, atol=2e-5)
    assert part.mask.shape[1] == batch.mask[index].sum(1).max()
    torch.testing.assert_close(part.scores, batch.scores[index])


def test_a_run_is_decided_by_its_seed():
    runs = []
    for seed in (0, 0, 1):
        run = ppo(seed=seed)
        records = [update(run, step)[0] for step in range(2)]
        runs.append((records, tiny.weights(run.shared)))
    assert runs[0][0] == runs[1][0] and tiny.equal(runs[0][1], runs[1][1])
    assert runs[0][0] != runs[2][0] and not tiny.equal(runs[0][1], runs[2][1])


def test_updates_draw_fresh_samples():
    run = ppo(policy_lr=1e-12)
    (_, first), (_, second) = update(run), update(run)
    assert not np.array_equal(first.ids, second.ids)


def test_a_learnable_reward_rises():
    run = ppo(policy_lr=1e-2, prompts_per_update=32, minibatch_size=32)
    records = [update(run, step)[0] for step in range(12)]
    first, last = (np.mean([record["proxy"] for record in part]) for part in (records[:2], records[-2:]))
    assert last > first + 0.15
    assert records[-1]["kl_nats"] > 0.5


def test_the_critic_of_a_policy_that_stands_still_explains_returns():
    """The reward is told by the prompt's first token after begin-of-sequence."""
    run = ppo(reward=lambda ids, *_: ids[:, 1] == token_ids()["lists"], policy_lr=1e-12, missing_eos_penalty=0.0)
    explained = [update(run, step)[0]["explained_variance"] for step in range(12)]
    assert explained[0] == pytest.approx(0, abs=1e-6) and explained[-1] > 0.5


def test_a_larger_kl_coefficient_stays_closer():
    kls = []
    for coefficient in (0.0, 1.0):
        run = ppo(policy_lr=1e-2, kl_coefficient=coefficient, missing_eos_penalty=0.0)
        kls.append([update(run, step)[0]["kl_nats"] for step in range(8)][-1])
    assert kls[1] < 0.5 * kls[0]


def test_metrics_equal_their_definitions(trained):
    run, _ = trained
    batch, completions = gather(run)
    returns = torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(5)) * batch.mask
    steps = [{"entropy_nats": 1.0}, {"entropy_nats": 2.0}]
    found = ppo_module.metrics(batch, returns, steps)
    assert found["proxy"] == pytest.approx(batch.scores.mean().item())
    assert found["response_tokens"] == pytest.approx(completions.lengths.mean())
    assert found["finished"] == pytest.approx(completions.finished.mean())
    per_sequence = [(batch.logprobs - batch.ref_logprobs)[i][batch.mask[i]].sum().item() for i in range(24)]
    assert found["kl_nats"] == pytest.approx(np.mean(per_sequence), abs=1e-5)
    r, v = returns[batch.mask].numpy(), batch.values[batch.mask].numpy()
    assert found["explained_variance"] == pytest.approx(1 - np.var(r - v) / np.var(r), rel=1e-4)
    assert found["entropy_nats"] == 1.5


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda scores: scores[:-1], r"shape \[31\] for 32 responses"),
        (lambda scores: scores[:, None], r"shape \[32, 1\] for 32"),
        (lambda scores: np.where(np.arange(32) == 7, np.nan, scores), "reward of response 7 is nan"),
        (lambda scores: np.where(np.arange(32) >= 30, -np.inf, scores), "reward of response 30 is -inf"),
    ],
)
def test_bad_rewards_are_named(bad, message):
    run = ppo(reward=lambda *sequences: bad(count_letter(*sequences)))
    with pytest.raises(ValueError, match=message):
        update(run)


def test_divergence_names_the_update():
    run = ppo()
    update(run)
    run.shared.value_head.linear.bias.data.fill_(float("nan"))
    with pytest.raises(lm.Diverged, match="update 1: policy loss .*, value loss nan"):
        update(run)


def test_a_gradient_that_is_not_finite_is_named_before_it_moves_anything():
    run = ppo()
    run.policy_parameters[0].register_hook(lambda gradient: gradient * float("inf"))
    before = tiny.weights(run.shared)
    with pytest.raises(lm.Diverged, match="update 0: .* gradient norms (nan|inf) and "):
        update(run)
    assert tiny.equal(before, tiny.weights(run.shared))


def test_saved_adapters_load_with_plain_peft(trained, tmp_path):
    run, _ = trained
    for adapter in (models.POLICY, models.CRITIC):
        run.shared.save_adapter(adapter, tmp_path)
    assert (tmp_path / "policy" / "adapter_model.safetensors").exists()
    assert load_file(tmp_path / "policy" / "adapter_model.safetensors").keys() == {
        f"base_model.model.model.layers.{layer}.{module}.lora_{side}.weight"
        for layer, module, side in itertools.product(
            range(2),
            [f"self_attn.{m}_proj" for m in "qkvo"] + [f"mlp.{m}_proj" for m in ("gate", "up", "down")],
            "AB",
        )
    }
    batch, completions = gather(run, 8)
    for adapter in (models.POLICY, models.CRITIC):
        run.shared.use(adapter)
        loaded = PeftModel.from_pretrained(tiny.model(), tmp_path / adapter).eval()
        with torch.no_grad():
            ours = run.shared.model(input_ids=batch.ids, attention_mask=batch.attention_mask).logits
            theirs = loaded(input_ids=batch.ids, attention_mask=batch.attention_mask).logits
        torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-5)
        if adapter == models.POLICY:
            for i, prompt in enumerate(tiny.prompts(8)):
                found, _ = response_logprobs(loaded, prompt, completions[i].token_ids, run.config.temperature)
                torch.testing.assert_close(batch.logprobs[i, : len(found)], found, rtol=0, atol=2e-5)
