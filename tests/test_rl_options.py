"""The options of the losses: against TRL, against loops over their equations, and what refuses to be combined."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

import tiny
import tiny_rl
from rlhfscale.rl import GRPO, PPO, RLOO, GRPOConfig, PPOConfig, RLOOConfig, dynamic, losses
from rlhfscale.rl.advantages import group_relative
from rlhfscale.rl.config import ConfigError
from rlhfscale.rl.learner import rate_factor
from rlhfscale.rl.logprobs import token_logprobs, with_entropy_gradient

ALGORITHMS = {PPO: PPOConfig, GRPO: GRPOConfig, RLOO: RLOOConfig}


def drawn(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("clip", "high", "most"), [(0.2, None, None), (0.2, 0.5, None), (0.2, 0.3, 1.8), (0.1, None, 3)]
)
def test_the_surrogate_is_its_equation(clip, high, most):
    ratio, advantages = torch.exp(drawn(6, 7)), drawn(6, 7, seed=1)
    loss, _ = losses.clipped_surrogate(ratio, advantages, clip, high, most)
    for r, a, found in zip(
        ratio.flatten().tolist(), advantages.flatten().tolist(), loss.flatten().tolist(), strict=True
    ):
        within = min(max(r, 1 - clip), 1 + (high or clip))
        expected = -min((min(r, most) if most else r) * a, within * a)
        assert found == pytest.approx(expected, rel=1e-6)


def test_a_bounded_ratio_bounds_the_loss_of_bad_tokens_and_their_gradient():
    ratio = torch.tensor([0.5, 1.5, 9.0], requires_grad=True)
    loss, _ = losses.clipped_surrogate(ratio, torch.tensor([-1.0, -1.0, -1.0]), 0.2, None, 3.0)
    assert loss.tolist() == pytest.approx([0.8, 1.5, 3.0])
    loss.sum().backward()
    assert ratio.grad.tolist() == [0.0, 1.0, 0.0]


def test_cispo_keeps_the_gradient_of_every_token_with_a_bounded_weight():
    logprobs = drawn(4, 5, seed=2).requires_grad_()
    old, advantages = drawn(4, 5, seed=3), drawn(4, 5, seed=4)
    ratio = torch.exp(logprobs - old)
    loss, bounded = losses.clipped_weight(ratio, logprobs, advantages, 0.4)
    loss.sum().backward()
    weight = torch.exp(logprobs.detach() - old).clamp(max=1.4)
    torch.testing.assert_close(logprobs.grad, -weight * advantages)
    assert torch.equal(bounded, ratio > 1.4) and 0 < bounded.sum() < bounded.numel()


def test_the_ratio_of_a_sequence_is_the_geometric_mean_of_its_tokens():
    log_ratio, mask = drawn(3, 4), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    found = losses.sequence_ratio(log_ratio, mask)
    for row, keep, values in zip(log_ratio.tolist(), mask.tolist(), found.tolist(), strict=True):
        product = math.prod(math.exp(x) for x, k in zip(row, keep, strict=True) if k)
        assert values == pytest.approx([product ** (1 / sum(keep))] * 4, rel=1e-5)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_weights_against_another_sampler_are_bounded_ratios(level):
    gaps, mask = drawn(5, 6, scale=0.7), torch.arange(6) < torch.tensor([6, 3, 1, 4, 5])[:, None]
    truncated, masked = (
        losses.sampler_weights(gaps, mask, level=level, kind=kind, max_ratio=1.5) for kind in ("truncate", "mask")
    )
    for row in range(5):
        length = int(mask[row].sum())
        for t in range(length):
            gap = gaps[row, t] if level == "token" else gaps[row, :length].sum()
            ratio = math.exp(gap)
            assert truncated[row, t].item() == pytest.approx(min(ratio, 1.5), rel=1e-5)
            assert masked[row, t].item() == pytest.approx(ratio if ratio <= 1.5 else 0.0, rel=1e-5)
    assert (masked[mask] == 0).any() and (truncated[mask] == 1.5).any()


def test_importance_weights_make_the_expectation_that_of_the_trainers_policy():
    """Five tokens, exact sums: E_sampler[w A] = E_trainer[A] where no weight is bounded, and nearer than without."""
    sampler, trainer = (torch.softmax(drawn(5, seed=seed), 0) for seed in (5, 6))
    advantages, wanted = drawn(5, seed=7), None
    gaps = (trainer.log() - sampler.log())[:, None]
    wanted = (trainer * advantages).sum()
    weights = losses.sampler_weights(gaps, torch.ones(5, 1).bool(), level="token", kind="truncate", max_ratio=1e9)[:, 0]
    assert (sampler * weights * advantages).sum().item() == pytest.approx(wanted.item(), rel=1e-5)
    assert abs((sampler * advantages).sum() - wanted) > 0.05


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_corrected_advantage_weights_the_loss(algorithm):
    level = "sequence" if algorithm is RLOO else "token"
    run = tiny_rl.trainer(
        algorithm, sampler_correction="truncate", sampler_correction_level=level, sampler_max_ratio=1.3
    )
    seen = []
    run.step = lambda rollouts, *_: seen.append(rollouts) or {"policy_loss": 0.0}
    sample = run.sampler

    def other(*given, **options):
        """A sampler whose log-probabilities are not the trainer's."""
        found = sample(*given, **options)
        found.logprobs[:, ::2] -= 0.5
        return found

    run.sampler = other
    run.update(tiny_rl.prompts(run))
    (*_, rollouts) = seen
    plain = run.estimate_advantages(rollouts).advantages
    ratio = torch.exp((rollouts.logprobs - rollouts.sampler_logprobs) * rollouts.mask)
    weights = ratio.prod(1, keepdim=True) if level == "sequence" else ratio
    torch.testing.assert_close(
        rollouts.advantages, plain * weights.clamp(max=1.3) * rollouts.mask, rtol=1e-4, atol=1e-6
    )
    assert not torch.allclose(rollouts.advantages, plain)


def test_group_advantages_by_the_batch_divide_by_one_number():
    rewards = drawn(12, seed=8)
    groups = rewards.view(3, 4)
    expected = (groups - groups.mean(1, keepdim=True)).flatten() / (rewards.std() + 1e-4)
    torch.testing.assert_close(group_relative(rewards, 4, scale="batch"), expected)


@pytest.mark.parametrize(("scheme", "expected"), [("token", 1 / 5), ("sequence", None), ("constant", 1 / 14)])
def test_truncated_responses_are_in_neither_numerator_nor_normaliser(scheme, expected):
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0]]).bool()
    weights = losses.token_weights(mask, scheme, 7)
    kept = losses.token_weights(mask[[0, 2]], scheme, 7)
    torch.testing.assert_close(weights[[0, 2]], kept)
    assert (weights[1] == 0).all()
    assert scheme == "constant" or weights.sum() == pytest.approx(1.0)
    assert expected is None or weights[0, 0] == pytest.approx(expected)
    assert losses.token_weights(torch.zeros(2, 3).bool(), scheme, 7).sum() == 0  # nothing is left: no gradient, no NaN


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_was_cut_is_not_learnt_from(algorithm):
    """The gradient of a step is that of the finished responses alone."""
    options = {
        "minibatch_size": None,
        "epochs": 1,
        "max_new_tokens": 4,
        "prompts_per_update": 8,
        "entropy_coefficient": 0.1,
    }
    run = tiny_rl.trainer(algorithm, mask_truncated=True, **options)
    rollouts, _ = run.collect(tiny_rl.prompts(run))
    rollouts, _ = run.evaluate(rollouts)
    rollouts = run.estimate_advantages(rollouts)
    assert 0 < rollouts.finished.sum() < len(rollouts)
    _, everything = tiny_rl.step_gradients(run, rollouts)
    _, finished = tiny_rl.step_gradients(run, rollouts[rollouts.finished.nonzero()[:, 0]])
    assert tiny_rl.relative(everything, finished) < 1e-5
    if algorithm is PPO:
        assert (rollouts.advantages[~rollouts.finished] == 0).all()


def test_long_responses_lose_up_to_the_penalty():
    options = {"max_new_tokens": 6, "missing_eos_penalty": 0.0, "prompts_per_update": 16}
    plain, _ = tiny_rl.trainer(PPO, **options).collect(tiny_rl.prompts(tiny_rl.trainer(PPO, **options)))
    run = tiny_rl.trainer(PPO, overlong_tokens=4, overlong_penalty=3.0, **options)
    found, _ = run.collect(tiny_rl.prompts(run))
    lengths = found.mask.sum(1)
    assert len(set(lengths.tolist())) > 2
    expected = [3.0 * max(0, length - 2) / 4 for length in lengths.tolist()]  # DAPO's equation 13 with L_max = 6
    torch.testing.assert_close(plain.scores - found.scores, torch.tensor(expected))


@pytest.mark.parametrize(
    ("schedule", "reference"),
    [("linear", get_linear_schedule_with_warmup), ("cosine", get_cosine_schedule_with_warmup)],
)
def test_schedules_are_those_of_transformers(schedule, reference):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    factor = reference(optimizer, 5, 40).lr_lambdas[0]
    for update in range(5):
        assert rate_factor(update, 5, schedule, 40) == pytest.approx(factor(update + 1))  # ours begins above 0
    for update in range(5, 41):
        assert rate_factor(update, 5, schedule, 40) == pytest.approx(factor(update), abs=1e-9)
    assert rate_factor(0, 0) == rate_factor(99, 5) == 1.0


@pytest.mark.parametrize("read", [token_logprobs, with_entropy_gradient])
@pytest.mark.parametrize("trained", [True, False])
def test_a_head_in_float32_is_exact_for_a_model_in_bfloat16(read, trained):
    head = nn.Linear(12, 50, bias=True).to(torch.bfloat16).requires_grad_(trained)
    hidden = drawn(30, 12).to(torch.bfloat16).requires_grad_()
    tokens = torch.randint(50, (30,), generator=torch.Generator().manual_seed(0))
    found, entropy = read(hidden, head, tokens, 0.7, fp32=True)
    logits = hidden.double() @ head.weight.double().T + head.bias.double()
    expected = torch.log_softmax(logits / 0.7, -1)
    torch.testing.assert_close(found.double(), expected.gather(1, tokens[:, None])[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy.double(), -(expected.exp() * expected).sum(1), rtol=0, atol=1e-5)
    (plain, _), bound = read(hidden, head, tokens, 0.7), 1e-3
    assert (plain.double() - expected.gather(1, tokens[:, None])[:, 0]).abs().max() > bound
    found.sum().backward()
    wanted = torch.autograd.grad(expected.gather(1, tokens[:, None]).sum(), hidden)[0]
    torch.testing.assert_close(hidden.grad, wanted, rtol=0.02, atol=0.02)


def test_a_run_in_bfloat16_takes_the_head_in_float32():
    def gap(**options):
        run = tiny_rl.trainer(PPO, base=tiny.model().to(torch.bfloat16), **options)
        rollouts, _ = run.collect(tiny_rl.prompts(run))
        return run.evaluate(rollouts)[0].logprobs

    assert not torch.equal(gap(), gap(head_dtype="fp32"))


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        (PPOConfig, {"clip_high": 0.1}, "clip_high: 0.1 is below clip=0.2"),
        (PPOConfig, {"max_ratio": 1.1}, "max_ratio: 1.1 must be above the clipping range, which ends at 1.2"),
        (PPOConfig, {"clip_high": 0.5, "max_ratio": 1.4}, "max_ratio: 1.4 .* ends at 1.5"),
        (PPOConfig, {"sampler_max_ratio": 0.9}, "sampler_max_ratio: 0.9 does not fit"),
        (PPOConfig, {"sampler_correction": "clip"}, "sampler_correction: 'clip' does not fit"),
        (RLOOConfig, {"sampler_correction_level": "token"}, "sampler_correction_level: 'token' does not fit"),
        (PPOConfig, {"overlong_tokens": 65}, "overlong_tokens: 65 is above max_new_tokens=64"),
        (PPOConfig, {"lr_schedule": "cosine"}, "decay_updates: None does not go with lr_schedule='cosine'"),
        (PPOConfig, {"decay_updates": 30}, "decay_updates: 30 does not go with lr_schedule='constant'"),
        (PPOConfig, {"lr_schedule": "linear", "decay_updates": 5}, "decay_updates: 5 must be above warmup_updates=5"),
        (GRPOConfig, {"surrogate": "cispo", "max_ratio": 3.0}, "max_ratio: without use in surrogate='cispo'"),
        (GRPOConfig, {"ratio": "word"}, "ratio: 'word' does not fit"),
        (GRPOConfig, {"scale_advantages": "all"}, "scale_advantages"),
        (PPOConfig, {"head_dtype": "fp16"}, "head_dtype: 'fp16' does not fit"),
    ],
)
def test_options_that_do_not_fit_are_named(config, options, words):
    with pytest.raises(ConfigError, match=words) as caught:
        config(**options)
    assert "\n" not in str(caught.value)


def letters(run):
    """A reward that is the same for most groups: whether a response begins with the letter a."""
    return [1.0 if response.split()[:1] == ["a"] else 0.0 for response in run]


def dynamic_run(**options):
    settings = {"prompts_per_update": 6, "responses_per_prompt": 2, "max_new_tokens": 4, "minibatch_size": None}
    return tiny_rl.trainer(GRPO, reward=lambda _, responses: letters(responses), **settings | options)


PROMPTS = [f"lists {name} : a b {letter} =" for name in ("sort", "rotate", "reverse") for letter in "abcdefghij"]


def test_groups_without_a_difference_are_replaced(monkeypatch):
    seen = []
    run, plain = dynamic_run(dynamic_sampling=200), dynamic_run()
    for each in (run, plain):
        evaluate = each.evaluate
        each.evaluate = lambda rollouts, evaluate=evaluate: seen.append(rollouts) or evaluate(rollouts)
    metrics = run.train(PROMPTS, 2, progress=False)
    plain.train(PROMPTS, 1, progress=False)
    replaced, again, kept = seen
    for rollouts in (replaced, again):
        groups = rollouts.scores.view(6, 2)
        assert (groups[:, 0] != groups[:, 1]).all() and len(rollouts) == 12
        assert torch.isfinite(rollouts.sampler_logprobs).all()
    uniform = int((kept.scores.view(6, 2)[:, 0] == kept.scores.view(6, 2)[:, 1]).sum())
    assert metrics["replaced_groups"].tolist()[0] == uniform > 0
    assert run.num_replacements > 0 == plain.num_replacements


def test_what_is_missing_after_the_last_round_is_filled_up():
    run = dynamic_run(dynamic_sampling=1)
    seen = []
    evaluate = run.evaluate
    run.evaluate = lambda rollouts: seen.append(rollouts) or evaluate(rollouts)
    metrics, completions = run.update(PROMPTS[:6], more=lambda count: PROMPTS[6 : 6 + count])
    (rollouts,) = seen
    groups = rollouts.scores.view(6, 2)
    teaching = int((groups[:, 0] != groups[:, 1]).sum())
    assert 0 < teaching < 6 and (groups[:teaching, 0] != groups[:teaching, 1]).all()
    asked = [run.tokenizer(prompt).input_ids for prompt in PROMPTS]
    for row in range(12):  # roll-outs and completions are still those of one response, and of a prompt that was asked
        start, end = int(rollouts.prompt_lengths[row]), int(rollouts.lengths[row])
        assert rollouts.ids[row, start:end].tolist() == list(completions[row].token_ids)
        prompt = rollouts.ids[row, :start].tolist()
        assert prompt in (asked[:6] if row >= 2 * teaching else asked)
    assert metrics["replaced_groups"] == count_of_others(rollouts, asked)


def count_of_others(rollouts, asked):
    """Groups of prompts that were drawn to replace others."""
    prompts = [rollouts.ids[row, : int(rollouts.prompt_lengths[row])].tolist() for row in range(0, 12, 2)]
    return sum(prompt not in asked[:6] for prompt in prompts)


def test_a_failed_update_draws_the_same_prompts_again():
    run = dynamic_run(dynamic_sampling=100)
    score, broken = run.reward.score, [True]

    def fails(sequences):
        if broken[0] and run.num_replacements:
            raise OSError("service is away")
        return score(sequences)

    run.reward.score = fails
    with pytest.raises(OSError, match="service is away"):
        run.train(PROMPTS, 1, progress=False)
    assert run.num_replacements == 0
    broken[0] = False
    whole = dynamic_run(dynamic_sampling=100).train(PROMPTS, 1, progress=False)
    np.testing.assert_array_equal(run.train(PROMPTS, 1, progress=False).to_numpy(float), whole.to_numpy(float))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_update_without_a_finished_response_teaches_nothing(algorithm):
    run = tiny_rl.trainer(algorithm, mask_truncated=True, max_new_tokens=1, minibatch_size=None)
    before = tiny.weights(run.networks)
    metrics, completions = run.update(tiny_rl.prompts(run))
    assert not completions.finished.all() and all(map(math.isfinite, metrics.values()))
    if not completions.finished.any() and algorithm is not GRPO:
        assert tiny.equal(before, tiny.weights(run.networks))


def test_no_signal_at_all_is_named():
    run = dynamic_run(dynamic_sampling=3)
    run.reward = tiny_rl.trainer(GRPO, reward=lambda _, responses: [0.0] * len(responses)).reward
    with pytest.raises(dynamic.NoSignal, match="dynamic_sampling: in 3 further rounds no prompt"):
        run.train(PROMPTS, 1, progress=False)


def test_dynamic_sampling_needs_prompts_to_draw_from():
    with pytest.raises(ValueError, match="dynamic_sampling: needs prompts as a collection"):
        dynamic_run(dynamic_sampling=1).train(lambda _: PROMPTS[:6], 1, progress=False)
    run = dynamic_run(dynamic_sampling=1)
    with pytest.raises(ValueError, match=r"dynamic_sampling: update\(prompts, more\)"):
        run.update(PROMPTS[:6])
    with pytest.raises(ConfigError, match="dynamic_sampling: PPOConfig has no such field"):
        PPOConfig(dynamic_sampling=1)


def test_dynamic_sampling_resumes_to_the_same_numbers(tmp_path):
    options = {"dynamic_sampling": 50, "lr_schedule": "cosine", "decay_updates": 8}
    whole = dynamic_run(**options)
    unbroken = whole.train(PROMPTS, 4, progress=False)
    dynamic_run(**options).train(PROMPTS, 2, folder=tmp_path, progress=False)
    resumed = dynamic_run(**options)
    found = resumed.train(PROMPTS, 4, folder=tmp_path, progress=False)
    np.testing.assert_allclose(found.to_numpy(float), unbroken.to_numpy(float), rtol=1e-6, atol=1e-9)
    assert tiny.equal(tiny.weights(resumed.networks), tiny.weights(whole.networks))
    assert resumed.num_replacements == whole.num_replacements > 0
