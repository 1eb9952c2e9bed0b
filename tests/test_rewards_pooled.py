"""Rewards that take time: pools, time limits, async functions, and a run that goes on after a failure."""

import asyncio
import itertools
import threading
import time

import numpy as np
import pandas as pd
import pytest

import tiny
import tiny_rl
from rlhfscale.rewards import Pooled, RewardFailed, as_reward
from rlhfscale.rl import PPO

PROMPTS = [f"lists sort : {letter} b a =" for letter in "abcdefgh"]


def run(reward, **options):
    return tiny_rl.trainer(PPO, reward=reward, prompts_per_update=4, minibatch_size=None, max_new_tokens=5, **options)


def sequences():
    found = run(lambda prompts, responses: [0.0] * len(prompts))
    found.update(PROMPTS[:4])
    return found.rollouts.sequences(found.tokenizer)


def words(prompt, response):
    return float(len(response.split()))


async def words_later(prompt, response):
    await asyncio.sleep(0.01)
    return words(prompt, response)


async def all_words_later(prompts, responses):
    await asyncio.sleep(0.01)
    return [words(*pair) for pair in zip(prompts, responses, strict=True)]


def test_plain_and_async_functions_give_the_same_scores():
    asked = sequences()
    expected = [words("", response) for response in asked.responses]
    for reward in (Pooled(words), Pooled(words_later, workers=2), as_reward(all_words_later)):
        assert reward.score(asked).tolist() == expected


def test_a_function_that_returns_something_to_await_is_awaited():
    asked = sequences()
    expected = [words("", response) for response in asked.responses]
    assert Pooled(lambda prompt, response: words_later(prompt, response)).score(asked).tolist() == expected


def test_a_call_that_hangs_is_found_while_others_answer():
    def one_hangs(prompt, response):
        threading.Event().wait(30 if next(count) == 0 else 0.05)
        return 1.0

    count = itertools.count()
    with pytest.raises(RewardFailed, match="no answer within timeout_s=0.2"):
        Pooled(one_hangs, workers=2, timeout_s=0.2).score(sequences())


@pytest.mark.parametrize("kind", ["threads", "async"])
def test_so_many_calls_run_at_once_and_no_more(kind):
    asked, running, most, lock = sequences(), [0], [0], threading.Lock()

    def enter(change):
        with lock:
            running[0] += change
            most[0] = max(most[0], running[0])

    def plain(prompt, response):
        enter(1)
        time.sleep(0.05)
        enter(-1)
        return 1.0

    async def later(prompt, response):
        enter(1)
        await asyncio.sleep(0.05)
        enter(-1)
        return 1.0

    Pooled(plain if kind == "threads" else later, workers=2).score(asked)
    assert most[0] == 2


def test_a_loop_that_runs_already_is_no_obstacle():
    """As in a notebook's kernel."""
    asked = sequences()

    async def kernel():
        return as_reward(all_words_later).score(asked)

    assert asyncio.run(kernel()).shape == (len(asked),)


def hangs(prompt, response):
    threading.Event().wait(30)


async def hangs_later(prompt, response):
    await asyncio.sleep(30)


def breaks(prompt, response):
    raise OSError("service is away")


async def breaks_later(prompt, response):
    raise OSError("service is away")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (hangs, r"reward of response 0: no answer within timeout_s=0.2 seconds"),
        (hangs_later, r"reward of response 0: no answer within timeout_s=0.2 seconds"),
        (breaks, r"reward of response \d: OSError: service is away"),
        (breaks_later, r"reward of response 0: OSError: service is away"),
    ],
)
def test_a_call_that_fails_or_hangs_is_named(function, words):
    with pytest.raises(RewardFailed, match=words):
        Pooled(function, timeout_s=0.2).score(sequences())


@pytest.mark.parametrize(("options", "words"), [({"workers": 0}, "workers: 0"), ({"timeout_s": 0}, "timeout_s: 0")])
def test_senseless_pools_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Pooled(words, **options)


def test_a_run_that_failed_before_its_first_checkpoint_keeps_its_rows(tmp_path):
    expected = run(Pooled(words)).train(PROMPTS, 3, progress=False)
    broken = [True]

    def flaky(prompt, response):
        flaky.calls += 1
        if broken[0] and flaky.calls > 19:
            raise OSError("service is away")
        return words(prompt, response)

    flaky.calls = 0
    first = run(Pooled(flaky, workers=1))
    with pytest.raises(RewardFailed):
        first.train(PROMPTS, 3, folder=tmp_path, progress=False)
    broken[0] = False
    found = first.train(PROMPTS, 3, folder=tmp_path, progress=False)
    np.testing.assert_allclose(found.to_numpy(float), expected.to_numpy(float))
    assert len(pd.read_csv(tmp_path / "metrics.csv")) == 3


def test_after_a_failure_the_update_is_repeated_to_the_same_numbers(tmp_path):
    broken = [True]

    def flaky(prompt, response):
        if broken[0] and flaky.calls > 19:
            raise OSError("service is away")
        flaky.calls += 1
        return words(prompt, response)

    flaky.calls = 0
    unbroken = run(Pooled(words))
    expected = unbroken.train(PROMPTS, 4, progress=False)
    first = run(Pooled(flaky, workers=1))
    with pytest.raises(RewardFailed):
        first.train(PROMPTS, 4, folder=tmp_path, checkpoint_every=1, progress=False)
    assert first.num_updates == 2
    broken[0] = False
    found = first.train(PROMPTS, 4, folder=tmp_path, checkpoint_every=1, progress=False)
    again = run(Pooled(words)).train(PROMPTS, 4, folder=tmp_path, progress=False)
    np.testing.assert_allclose(found.to_numpy(float), expected.to_numpy(float))
    np.testing.assert_allclose(again.to_numpy(float), expected.to_numpy(float))
    assert tiny.equal(tiny.weights(first.networks), tiny.weights(unbroken.networks))
