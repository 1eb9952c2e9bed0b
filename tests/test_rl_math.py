"""The trainers' mathematics: KL, advantages and losses against exact values, loops without torch, and TRL's
PPOTrainer."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rlhfscale.rl import PPO, PPOConfig, advantages, kl, losses, rollout

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


@pytest.mark.parametrize(("kl_nats", "error"), [(6.6, 0.1), (5.7, -0.05), (100.0, 0.2), (0.0, -0.2), (6.0, 0.0)])
def test_the_adaptive_coefficient_follows_the_equation(kl_nats, error):
    """Ziegler et al. 2019, section 2.2: e = clip(KL / target - 1, -0.2, 0.2), beta (1 + K e)."""
    assert kl.adapted(0.3, kl_nats, 6.0, 64, 1000) == pytest.approx(0.3 * (1 + error * 0.064))
    assert kl.adapted(0.3, kl_nats, None, 64, 1000) == 0.3


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


REWARDS = [1.0, 2.0, 4.0, -1.0, 0.5, 0.5]


@pytest.mark.parametrize("scale", [True, False])
def test_group_relative_equals_the_equation(scale):
    found = advantages.group_relative(torch.tensor(REWARDS), 3, scale=scale).tolist()
    for group in (0, 3):
        members = REWARDS[group : group + 3]
        for i, reward in enumerate(members):
            expected = reward - np.mean(members)
            expected /= np.std(members, ddof=1) + 1e-4 if scale else 1
            assert found[group + i] == pytest.approx(expected, rel=1e-5)


def test_leave_one_out_compares_with_the_others_alone():
    found = advantages.leave_one_out(torch.tensor(REWARDS), 3).tolist()
    for i, reward in enumerate(REWARDS):
        others = [REWARDS[j] for j in range(6) if j // 3 == i // 3 and j != i]
        assert found[i] == pytest.approx(reward - np.mean(others), rel=1e-6)


@pytest.mark.parametrize("estimate", [advantages.group_relative, advantages.leave_one_out])
def test_groups_that_cannot_be_compared_are_refused(estimate):
    with pytest.raises(ValueError, match="group_size: 1 leaves a response nothing to be compared with"):
        estimate(torch.ones(4), 1)
    with pytest.raises(ValueError, match="5 are not whole groups of 2"):
        estimate(torch.ones(5), 2)
    assert torch.equal(estimate(torch.full((6,), 0.3), 3), torch.zeros(6))  # all alike: nothing to learn


def test_clipped_surrogate_equals_the_equation():
    clip, ratio, advantage = 0.2, torch.exp(0.3 * (A - B)), C
    loss, clipped = losses.clipped_surrogate(ratio, advantage, clip)
    for i, t in np.ndindex(4, 6):
        r, a = ratio[i, t].item(), advantage[i, t].item()
        bounded = min(max(r, 1 - clip), 1 + clip) * a
        assert loss[i, t].item() == pytest.approx(-min(r * a, bounded), abs=1e-6)
        assert clipped[i, t].item() == (bounded < r * a - 1e-7)
    assert 0 < clipped.float().mean() < 1


@pytest.mark.parametrize(("advantage", "ratio", "moves"), [(1, 1.5, 0), (1, 0.5, 1), (-1, 0.5, 0), (-1, 1.5, 1)])
def test_the_gradient_stops_beyond_the_clip_and_only_there(advantage, ratio, moves):
    ratio = torch.tensor([float(ratio)], requires_grad=True)
    losses.clipped_surrogate(ratio, torch.tensor([float(advantage)]), 0.2)[0].sum().backward()
    assert ratio.grad.item() == pytest.approx(-advantage * moves)


def test_clipped_value_equals_the_equation():
    clip, used = 0.3, set()
    values, old, returns = A, A + B * 0.5, D
    found = losses.clipped_value(values, old, returns, clip)
    for i, t in np.ndindex(4, 6):
        v, v_old, target = values[i, t].item(), old[i, t].item(), returns[i, t].item()
        bounded = min(max(v, v_old - clip), v_old + clip)
        used.add((bounded - target) ** 2 > (v - target) ** 2)
        assert found[i, t].item() == pytest.approx(max((v - target) ** 2, (bounded - target) ** 2) / 2, rel=1e-4)
    assert used == {True, False}


@pytest.mark.parametrize("scheme", ["token", "sequence", "constant"])
def test_token_weights_equal_their_definition(scheme):
    found = losses.token_weights(MASK, scheme, 8)
    assert (found[~MASK] == 0).all()
    for i, t in np.argwhere(MASK.numpy()):
        expected = {"token": 1 / 14, "sequence": 1 / (4 * LENGTHS[i]), "constant": 1 / (4 * 8)}[scheme]
        assert found[i, t].item() == pytest.approx(float(expected))
    if scheme != "constant":
        assert found.sum().item() == pytest.approx(1)


def test_an_unknown_weighting_is_named():
    with pytest.raises(ValueError, match="'batch' is not one of token, sequence, constant"):
        losses.token_weights(MASK, "batch")


# --- roll-outs ---


def rollouts(mask, **given):
    """Roll-outs of made-up numbers, with junk outside the mask."""
    size, generator = mask.shape, torch.Generator().manual_seed(int(mask.sum()))
    lengths = mask.sum(1) + 3
    names = ("sampler_logprobs", "logprobs", "ref_logprobs", "values", "advantages", "returns", "weights")
    drawn = {name: torch.randn(size, generator=generator) for name in names}
    return rollout.Rollouts(**{
        "ids": torch.ones(len(mask), int(lengths.max()), dtype=torch.long), "prompt_lengths": lengths - mask.sum(1),
        "lengths": lengths, "mask": mask, "finished": torch.ones(len(mask), dtype=torch.bool),
        "scores": torch.randn(len(mask), generator=generator),
    } | drawn | given)  # fmt: skip


def test_the_score_lands_on_the_last_token_of_each_response():
    batch = rollouts(MASK, logprobs=A, ref_logprobs=B)
    scores = torch.tensor([1.0, -2.0, 3.0, 0.5])
    terms = A - B
    assert torch.equal(rollout.token_rewards(batch, scores, terms, 0.0).nonzero()[:, 1], LENGTHS - 1)
    found = rollout.token_rewards(batch, scores, terms, 0.1)
    for i, length in enumerate(LENGTHS.tolist()):
        for t in range(6):
            expected = -0.1 * (A[i, t] - B[i, t]).item() if t < length else 0.0
            expected += scores[i].item() if t == length - 1 else 0.0
            assert found[i, t].item() == pytest.approx(expected, abs=1e-6)


def test_a_selection_of_rollouts_keeps_its_rows_and_drops_empty_columns():
    batch, index = rollouts(MASK), torch.tensor([3, 1])
    part = batch[index]
    assert part.ids.shape == (2, 6) and part.mask.shape == (2, 3)
    assert part.mask.sum(1).tolist() == [3, 1]
    for name, tensor in vars(part).items():
        whole = getattr(batch, name)[index]
        assert torch.equal(tensor, whole if tensor.ndim == 1 else whole[:, : tensor.shape[1]]), name


@pytest.mark.parametrize("most", [1, 20, 47, 10_000])
def test_passes_hold_every_rollout_once_and_at_most_so_many_tokens(most):
    lengths = torch.from_numpy(np.random.default_rng(0).integers(1, 30, 50))
    parts = list(rollout.split(lengths, most))
    assert sorted(torch.cat(parts).tolist()) == list(range(50))
    assert all(len(part) == 1 or len(part) * lengths[part].max() <= most for part in parts)


# --- one update of PPO without torch, from the equations ---


def loops(batch, config, beta, new_logprobs, new_values):
    """Rewards, advantages, returns and the loss in float64, token by token."""
    rows = [
        {name: getattr(batch, name)[i, :length].double().tolist() for name in ("logprobs", "ref_logprobs", "values")}
        for i, length in enumerate(batch.mask.sum(1).tolist())
    ]
    scores = batch.scores.double().tolist()
    if config.whiten_rewards:
        mean = sum(scores) / len(scores)
        spread = math.sqrt(sum((score - mean) ** 2 for score in scores) / (len(scores) - 1))
        scores = [score / spread for score in scores]
    for row, score in zip(rows, scores, strict=True):
        row["rewards"] = []
        for logprob, ref_logprob in zip(row["logprobs"], row["ref_logprobs"], strict=True):
            x = logprob - ref_logprob
            row["rewards"].append(-beta * {"k1": x, "k2": x * x / 2, "k3": math.exp(-x) - 1 + x}[config.kl_estimator])
        row["rewards"][-1] += score
        row["advantages"] = [0.0] * len(row["rewards"])
        following, next_value = 0.0, 0.0
        for t in range(len(row["rewards"]) - 1, -1, -1):
            delta = row["rewards"][t] + config.gamma * next_value - row["values"][t]
            following = row["advantages"][t] = delta + config.gamma * config.lam * following
            next_value = row["values"][t]
        row["returns"] = [a + v for a, v in zip(row["advantages"], row["values"], strict=True)]
    flat = [a for row in rows for a in row["advantages"]]
    mean = sum(flat) / len(flat)
    spread = math.sqrt(sum((a - mean) ** 2 for a in flat) / len(flat))
    policy_loss = value_loss = 0.0
    for i, row in enumerate(rows):
        row["advantages"] = [(a - mean) / spread for a in row["advantages"]]
        for t, a in enumerate(row["advantages"]):
            ratio = math.exp(new_logprobs[i][t] - row["logprobs"][t])
            policy_loss -= min(ratio * a, min(max(ratio, 1 - config.clip), 1 + config.clip) * a)
            v, old, target = new_values[i][t], row["values"][t], row["returns"][t]
            bounded = min(max(v, old - config.value_clip), old + config.value_clip)
            value_loss += max((v - target) ** 2, (bounded - target) ** 2) / 2
    coefficient = config.value_coefficient if config.critic == "trunk" else 1.0
    return rows, policy_loss / len(flat), value_loss / len(flat), (policy_loss + coefficient * value_loss) / len(flat)


OPTIONS = [
    {"kl_estimator": "k1", "gamma": 1.0, "lam": 0.95},
    {"kl_estimator": "k3", "gamma": 0.9, "lam": 0.8, "critic": "separate"},
    {"kl_estimator": "k2", "gamma": 0.97, "lam": 1.0, "whiten_rewards": True, "value_coefficient": 0.7},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ppo_equals_loops_over_its_equations(options, seed):
    """On random ragged batches, with junk outside the mask; the gradient against central differences of the loops."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(7) < torch.randint(1, 8, (6, 1), generator=generator)
    batch, config = rollouts(mask), PPOConfig(**options, clip=0.2, value_clip=0.3)
    new = [0.3 * torch.randn(mask.shape, generator=generator) for _ in range(2)]
    logprobs, values = (batch.logprobs + new[0]).requires_grad_(), (batch.values + new[1]).requires_grad_()
    trainer = SimpleNamespace(config=config, kl_coefficient=0.15)

    found = PPO.estimate_advantages(trainer, batch)
    found = replace(found, weights=losses.token_weights(mask))
    loss, terms = PPO.loss(trainer, found, rollout.Evaluation(logprobs, torch.zeros(mask.shape), values))
    loss.backward()
    arguments = batch, config, 0.15
    rows, policy_loss, value_loss, total = loops(*arguments, logprobs.tolist(), values.tolist())
    for i, row in enumerate(rows):
        length = len(row["rewards"])
        np.testing.assert_allclose(found.advantages[i, :length], row["advantages"], atol=2e-5)
        np.testing.assert_allclose(found.returns[i, :length], row["returns"], atol=2e-5)
    assert (found.advantages[~mask] == 0).all() and (found.returns[~mask] == 0).all()
    assert terms["policy_loss"].item() == pytest.approx(policy_loss, abs=1e-5)
    assert terms["value_loss"].item() == pytest.approx(value_loss, rel=1e-5)
    assert loss.item() == pytest.approx(total, abs=1e-5)

    points = [logprobs.double().tolist(), values.double().tolist()]
    for which, gradient in enumerate((logprobs.grad, values.grad)):
        for i, t in np.argwhere(mask.numpy()):
            ends = []
            for step in (1e-5, -1e-5):
                points[which][i][t] += step
                ends.append(loops(*arguments, *points)[-1])
                points[which][i][t] -= step
            assert gradient[i, t].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, abs=2e-5)
        assert (gradient[~mask] == 0).all()


# --- TRL's PPOTrainer ---

VECTORS = json.loads((Path(__file__).parent / "data" / "trl_ppo_1_12.json").read_text())
"""See make_trl_vectors.py."""


@pytest.mark.parametrize("name", ["full", "ragged"])
def test_ppo_equals_trl(name):
    """One update of trl 1.12's PPOTrainer, two epochs of two minibatches: rewards, advantages, returns, losses,
    gradients.

    Where the two differ on purpose, and how the test accounts for it:

    - trl puts the score of a response that ended on the first padding token behind it, whose value it reads at the
      end-of-sequence token; in effect those responses are one token longer, for values but not for the policy. Given
      the longer mask, our functions give trl's numbers. Where no response ended ("full") nothing needs to be given.
    - trl whitens advantages by the unbiased variance, we by the mean square: a factor of sqrt((n - 1) / n).
    """
    case = {key: torch.tensor(value) if isinstance(value, list) and key != "steps" else value
            for key, value in VECTORS["cases"][name].items()}  # fmt: skip
    settings = VECTORS["settings"]
    mask, longer = ~case["padding_mask"], ~case["padding_mask_p1"]
    assert bool((mask == longer).all()) == (name == "full")
    config = PPOConfig(
        clip=settings["cliprange"], value_clip=settings["cliprange_value"], gamma=settings["gamma"],
        lam=settings["lam"], value_coefficient=settings["vf_coef"], kl_estimator=case["kl_estimator"],
    )  # fmt: skip
    batch = rollouts(longer, **{key: case[key] for key in ("logprobs", "ref_logprobs", "values", "scores")})
    trainer = SimpleNamespace(config=config, kl_coefficient=settings["kl_coef"])

    terms = kl.kl_terms(batch.logprobs, batch.ref_logprobs, config.kl_estimator)
    rewards = rollout.token_rewards(batch, batch.scores, terms, settings["kl_coef"])
    torch.testing.assert_close(rewards, case["rewards"], rtol=0, atol=1e-6)
    raw, returns = advantages.gae(rewards, batch.values, longer, gamma=config.gamma, lam=config.lam)
    torch.testing.assert_close(raw, case["advantages"] * longer, rtol=0, atol=2e-6)
    torch.testing.assert_close(returns, case["returns"] * longer, rtol=0, atol=2e-6)
    bessel = math.sqrt((mask.sum() - 1) / mask.sum())
    whitened = advantages.whiten(raw, mask) * bessel
    torch.testing.assert_close(whitened, case["whitened"] * mask, rtol=0, atol=1e-5)
    if name == "full":  # the whole function, which trl agrees with as it is
        estimated = PPO.estimate_advantages(trainer, batch)
        torch.testing.assert_close(estimated.advantages * bessel, case["whitened"], rtol=0, atol=1e-5)
        torch.testing.assert_close(estimated.returns, case["returns"], rtol=0, atol=2e-6)

    learnt = replace(batch, advantages=whitened, returns=returns)
    seen = set()
    for step in case["steps"]:
        index = torch.tensor(step["micro_batch_inds"])
        new = torch.tensor(step["new_logprobs"]).requires_grad_(), torch.tensor(step["vpred"]).requires_grad_()
        evaluation = rollout.Evaluation(new[0], torch.zeros(new[0].shape), new[1])
        rows = {key: tensor[index] for key, tensor in vars(learnt).items()}
        part = rollout.Rollouts(**rows | {"weights": losses.token_weights(mask[index])})
        _, policy = PPO.loss(trainer, part, evaluation)
        _, value = PPO.loss(trainer, replace(part, weights=losses.token_weights(longer[index])), evaluation)
        assert policy["policy_loss"].item() == pytest.approx(step["pg_loss"], abs=2e-6)
        assert value["value_loss"].item() == pytest.approx(step["vf_loss"], abs=2e-6)
        (policy["policy_loss"] + config.value_coefficient * value["value_loss"]).backward()
        torch.testing.assert_close(new[0].grad, torch.tensor(step["d_new_logprobs"]), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(new[1].grad, torch.tensor(step["d_vpred"]), rtol=1e-4, atol=1e-6)
        seen.add(policy["clip_fraction"].item() > 0)
    assert True in seen  # some ratios are clipped
