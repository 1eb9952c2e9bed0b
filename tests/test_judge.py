"""Judges: every way an endpoint fails, against a real HTTP server; the cache; local, reward and verifier judges."""

import functools
import json
import subprocess
import sys
import time

import numpy as np
import pytest

import tiny_chat
from judge_server import MODEL, JudgeServer
from rlhfscale.evals import judge, local_judges, revisions
from rlhfscale.evals.endpoint import GONE_AFTER, Endpoint
from rlhfscale.evals.judge import Cache, JudgeError, Reply, Request, TooManyMissing, collect


def requests(*words, **options):
    return [Request(id=w, messages=({"role": "user", "content": f"{w} please"},), **options) for w in words]


def endpoint(server, **options):
    pytest.importorskip("openai")
    defaults = {"timeout_s": 30, "num_attempts": 3, "backoff_s": 0.02, "concurrency": 4}
    return Endpoint(MODEL, server.url, **defaults | options)


def test_replies_come_in_the_requests_order_with_what_they_cost(tmp_path):
    with JudgeServer() as server:
        replies = collect(endpoint(server), requests("a", "b", "c"), Cache(tmp_path))
    assert [reply.text for reply in replies] == ["Rating: [[7]]"] * 3
    assert replies[0].input_tokens == 11 and replies[0].output_tokens == 5 and replies[0].model == MODEL
    assert server.bodies[0]["temperature"] == 0 and server.bodies[0]["max_tokens"] == 2048


@pytest.mark.parametrize("failure", ["sleep", "drip", "cut", "reset", "truncated", "html", "no-choices", "empty"])
def test_a_failure_is_tried_again_and_a_lasting_one_reported(tmp_path, failure):
    # long enough for a busy machine to answer in, except where it must run out
    options = {"timeout_s": 2.5 if failure in ("sleep", "drip") else 30}
    with JudgeServer({"once": [failure], "always": [failure] * 9}) as server:
        one = endpoint(server, **options)
        once, always, fine = collect(one, requests("once", "always", "fine"), Cache(tmp_path))
        assert once.text == "Rating: [[7]]" and once.num_attempts == 2 and not once.error
        assert fine.text and fine.num_attempts == 1
        assert always.text == "" and always.num_attempts == 3
        words = {
            "sleep": "timeout",
            "drip": "timeout",
            "cut": "connection",
            "reset": "connection",
            "empty": "empty text",
        }
        assert words.get(failure, "broken reply") in always.error
        assert server.asked == {"once": 2, "always": 3, "fine": 1}
        # a resumed run asks only for what is missing
        server.script["always"] = []
        replies = collect(one, requests("once", "always", "fine"), Cache(tmp_path))
        assert all(reply.text == "Rating: [[7]]" for reply in replies)
        assert server.asked == {"once": 2, "always": 4, "fine": 1}


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_statuses_that_pass_are_tried_again(tmp_path, status):
    with JudgeServer({"a": [status, status]}) as server:
        (reply,) = collect(endpoint(server), requests("a"), Cache(tmp_path))
    assert reply.text and reply.num_attempts == 3
    if status == 429:  # Retry-After: 0.3
        assert min(np.diff(server.times["a"])) >= 0.3


def test_a_request_that_is_refused_is_reported_and_the_others_go_on(tmp_path):
    with JudgeServer({"a": [400] * 9}) as server:
        refused, fine = collect(endpoint(server), requests("a", "b"), Cache(tmp_path))
    assert refused.error.startswith("HTTP 400: ") and "scripted 400" in refused.error
    assert server.asked["a"] == 1 and fine.text


def test_an_endpoint_that_wants_the_new_name_of_the_length_gets_it(tmp_path):
    with JudgeServer({"a": ["new-field"] * 9, "b": ["new-field"] * 9}) as server:
        replies = collect(endpoint(server, concurrency=1), requests("a", "b", max_tokens=7), Cache(tmp_path))
    assert all(reply.text for reply in replies) and server.asked == {"a": 2, "b": 1}
    assert server.bodies[-1]["max_completion_tokens"] == 7 and "max_tokens" not in server.bodies[-1]


@pytest.mark.parametrize(("action", "words"), [(401, "401"), (404, MODEL), ("wrong-model", "another-judge")])
def test_a_judge_that_is_not_the_one_asked_for_ends_the_run_and_nothing_is_lost(tmp_path, action, words):
    with JudgeServer({"c": [action]}) as server:
        asked = requests("a", "b", "c", "d", "e")
        with pytest.raises(JudgeError, match=words):
            collect(endpoint(server, concurrency=1), asked, Cache(tmp_path))
        assert server.asked == {"a": 1, "b": 1, "c": 1}
        replies = collect(endpoint(server), asked, Cache(tmp_path))
        assert all(reply.text for reply in replies)
        assert server.asked == {"a": 1, "b": 1, "c": 2, "d": 1, "e": 1}


def test_no_server_at_all_is_reported(tmp_path):
    with JudgeServer() as server:
        gone = endpoint(server, num_attempts=2)
    (reply,) = collect(gone, requests("a"), Cache(tmp_path))
    assert reply.error == f"{gone.base_url}: connection failed (ConnectError)"


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://host/v1", "localhost:8000/v1", "", "http://", "http:///v1", "//host/v1"]
)
def test_an_endpoint_is_reached_by_http(url):
    with pytest.raises(JudgeError, match="is no address of an endpoint, such as http://localhost:8000/v1"):
        Endpoint(MODEL, url)


@pytest.mark.parametrize(
    "url",
    ["http://user:secret@host/v1", "https://secret@host:80/v1", "http://host/v1?key=secret", "file://secret@h/v1"],
)
def test_secrets_of_an_address_are_refused_and_not_repeated(url):
    with pytest.raises(JudgeError, match="judge: ") as refused:
        Endpoint(MODEL, url)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("failure", ["down", "reset", "sleep"])
def test_an_endpoint_that_is_gone_half_way_is_named_and_a_second_run_asks_for_the_rest(tmp_path, failure):
    """Down, dropping every connection, or silent: it is not asked for each of the other requests in turn."""
    words = [f"q{number}" for number in range(60)]
    with JudgeServer() as server:
        undisturbed = collect(endpoint(server), requests(*words), Cache(tmp_path / "undisturbed"))
    cache = Cache(tmp_path / "cut")
    with JudgeServer(fails_after=20, failure=failure) as server:
        cut = endpoint(server, num_attempts=2, timeout_s=1.0)
        with pytest.raises(JudgeError, match=f"{server.url}: .*; 8 requests in a row .* is up .* run again"):
            collect(cut, requests(*words), cache)
        assert len(server.bodies) <= 20 + 2 * (GONE_AFTER + cut.concurrency)
    assert sum(1 for _ in cache.folder.rglob("*.json")) == 20
    with JudgeServer() as server:
        replies = collect(endpoint(server), requests(*words), cache)
        assert len(server.bodies) == 40
    assert [reply.text for reply in replies] == [reply.text for reply in undisturbed]


def test_requests_given_up_with_replies_between_them_do_not_end_the_run(tmp_path):
    script = {f"bad{number}": ["reset"] for number in range(GONE_AFTER + 1)}
    words = [word for pair in zip(script, "abcdefghi", strict=True) for word in pair]
    with JudgeServer(script) as server:
        replies = collect(endpoint(server, num_attempts=1, concurrency=1), requests(*words), Cache(tmp_path))
    assert sum(bool(reply.error) for reply in replies) == GONE_AFTER + 1


def test_concurrency_is_limited_and_used(tmp_path):
    with JudgeServer(delay_s=0.3) as server:
        collect(endpoint(server, concurrency=5), requests(*"abcdefghij"), Cache(tmp_path))
        assert server.most_at_once == 5


def test_an_interrupted_run_keeps_what_came(tmp_path):
    with JudgeServer(delay_s=0.05) as server:
        seen = []

        def interrupt(had, _):
            seen.append(had)
            if had == 3:
                raise KeyboardInterrupt

        asked = requests(*"abcdefgh")
        with pytest.raises(KeyboardInterrupt):
            collect(endpoint(server, concurrency=1), asked, Cache(tmp_path), on_reply=interrupt)
        kept = sum(1 for _ in tmp_path.rglob("*.json"))
        assert kept == 3
        time.sleep(0.3)
        before = sum(server.asked.values())
        assert before <= 5  # what was in flight, no more
        replies = collect(endpoint(server), asked, Cache(tmp_path))
        assert all(reply.text for reply in replies) and sum(server.asked.values()) == before + 5


def test_a_killed_process_resumes(tmp_path):
    pytest.importorskip("openai")
    script = f"""
import sys
from rlhfscale.evals.judge import Cache, Request, collect
from rlhfscale.evals.endpoint import GONE_AFTER, Endpoint
asked = [Request(id=w, messages=({{"role": "user", "content": w + " please"}},)) for w in "abcdefgh"]
collect(Endpoint({MODEL!r}, sys.argv[1], concurrency=1), asked, Cache({str(tmp_path)!r}))
"""
    with JudgeServer(delay_s=0.2) as server:
        process = subprocess.Popen([sys.executable, "-c", script, server.url], env=_environment())
        deadline = time.monotonic() + 60
        while sum(server.asked.values()) < 4 and time.monotonic() < deadline:
            time.sleep(0.02)
        process.kill()
        process.wait()
        kept = sum(1 for _ in tmp_path.rglob("*.json"))
        assert 3 <= kept < 8
        before = sum(server.asked.values())
        replies = collect(endpoint(server), requests(*"abcdefgh"), Cache(tmp_path))
        assert all(reply.text for reply in replies)
        assert sum(server.asked.values()) == before + 8 - kept


def _environment():
    import os

    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def test_it_works_where_an_event_loop_is_running(tmp_path):
    import asyncio

    async def notebook(server):
        return collect(endpoint(server), requests("a"), Cache(tmp_path))

    with JudgeServer() as server:
        assert asyncio.run(notebook(server))[0].text


def test_logprobs_of_choices(tmp_path):
    with JudgeServer() as server:
        (reply,) = collect(endpoint(server), requests("a", choices=("m", "M"), max_tokens=1), Cache(tmp_path))
    assert reply.logprobs == {"m": -0.2, "M": -1.7, "The": -4.0}
    assert server.bodies[0]["top_logprobs"] == 5 and server.bodies[0]["max_tokens"] == 1


def test_the_cache_knows_judge_revision_and_prompt(tmp_path):
    with JudgeServer() as server:
        for change in ({}, {}, {"revision": "2"}):
            collect(endpoint(server, **change), requests("a"), Cache(tmp_path))
        assert server.asked["a"] == 2
        collect(endpoint(server), requests("a", temperature=1.0), Cache(tmp_path))
        assert server.asked["a"] == 3
        # equal prompts are asked once
        twice = [*requests("b"), Request(id="other", messages=requests("b")[0].messages)]
        first, second = collect(endpoint(server), twice, Cache(tmp_path))
        assert first == second and server.asked["b"] == 1


def test_a_broken_file_in_the_cache_is_named_and_asked_again(tmp_path):
    cache, (request,) = Cache(tmp_path), requests("a")
    with JudgeServer() as server:
        collect(endpoint(server), [request], cache)
        path = cache.path(endpoint(server), request)
        stored = json.loads(path.read_text())
        assert stored["judge"] == MODEL and stored["request"]["messages"][0]["content"] == "a please"
        path.write_text(path.read_text()[:40])
        with pytest.warns(UserWarning, match="not a readable reply"):
            (reply,) = collect(endpoint(server), [request], cache)
        assert reply.text and server.asked["a"] == 2


def test_the_key_is_never_stored(tmp_path):
    with JudgeServer() as server:
        secret = endpoint(server, api_key="sk-very-secret")
        collect(secret, requests("a"), Cache(tmp_path))
    assert "secret" not in repr(secret)
    assert all("secret" not in path.read_text() for path in tmp_path.rglob("*.json"))


def test_the_estimate_counts_what_is_not_cached(tmp_path):
    asked = requests("a", "b", max_tokens=100)
    with JudgeServer() as server:
        one = endpoint(server)
        before = judge.estimate(one, asked, Cache(tmp_path), usd_per_million=(10.0, 30.0))
        assert (before.num_requests, before.num_cached, before.max_output_tokens) == (2, 0, 200)
        assert before.input_tokens == 5  # 16 characters
        assert before.max_usd == pytest.approx((5 * 10 + 200 * 30) / 1e6)
        assert "2 requests" in str(before) and "USD" in str(before)
        collect(one, asked[:1], Cache(tmp_path))
        assert judge.estimate(one, asked, Cache(tmp_path)).num_cached == 1


def test_too_many_missing_fails_with_the_reasons():
    judge.check_missing(1, 20, 0.05)
    judge.check_missing(0, 0, 0.0)
    with pytest.raises(TooManyMissing, match=r"2 of 20 .* 0.05: 1 x timeout; 1 x no verdict"):
        judge.check_missing(2, 20, 0.05, ["timeout", "no verdict"])


# Judges in process.


def local(tiny_model, **options):
    from rlhfscale.samplers import hf

    model, tokenizer = tiny_model
    about = {"name": "toy", "revision": "1", "model": model} | options
    return local_judges.Local(functools.partial(hf.sample, model), tokenizer, **about)


@pytest.fixture(scope="module")
def tiny_model():
    return tiny_chat.model_and_tokenizer()


def test_a_local_model_as_judge_does_not_depend_on_the_batch(tiny_model, tmp_path):
    asked = requests("a", "bb", "ccc", "d", max_tokens=6, temperature=1.0)
    one, many = (collect(local(tiny_model, batch_size=size), asked, Cache(tmp_path / str(size))) for size in (1, 4))
    assert [reply.text for reply in one] == [reply.text for reply in many]
    assert one[0].input_tokens == len("user: a please\n") and 1 <= one[0].output_tokens <= 6


def test_a_prompt_that_does_not_fit_is_reported(tiny_model, tmp_path):
    asked = [*requests("a", max_tokens=4), *requests("x" * 100, max_tokens=4)]
    short, long = collect(local(tiny_model, context=50), asked, Cache(tmp_path))
    assert not short.error and "does not fit into 50" in long.error


def test_choices_are_read_from_the_models_own_distribution(tiny_model, tmp_path):
    import torch

    model, tokenizer = tiny_model
    (reply,) = collect(local(tiny_model), requests("a", choices=("m", "M")), Cache(tmp_path))
    ids = tokenizer("user: a please\n", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        truth = model(ids).logits[0, -1].log_softmax(0)
    for text, value in reply.logprobs.items():
        assert value == pytest.approx(float(truth[tokenizer.encode(text)[0]]), abs=1e-5)
    assert set(reply.logprobs) == {"m", "M"}
    with pytest.raises(JudgeError, match="no log-probabilities"):
        collect(local(tiny_model, model=None), requests("b", choices=("m", "M")), Cache(tmp_path))


def test_a_reward_as_judge(tiny_model, tmp_path):
    def longer(prompts, responses):
        assert all("question" in prompt for prompt in prompts)
        return [len(response) for response in responses]

    one = local_judges.reward_judge(longer, tiny_model[1], name="length", revision="1")
    asked = Request(id="1", conversation=({"role": "user", "content": "question"},), answers=("short", "a longer one"))
    (reply,) = collect(one, [asked], Cache(tmp_path))
    assert reply.scores == (5.0, 12.0)
    assert collect(one, [asked], Cache(tmp_path))[0] == Reply(scores=(5.0, 12.0), model="length")


def test_a_verifier_as_judge_and_scores_that_are_none(tmp_path):
    from rlhfscale.evals.verifiers import gsm8k_correct

    one = local_judges.verifier_judge(gsm8k_correct, name="gsm8k", revision="1")
    (reply,) = collect(one, [Request(id="1", answers=("A: 7", "A: 8"), reference="#### 7")], Cache(tmp_path))
    assert reply.scores == (1.0, 0.0)
    for found, words in ((None, "no finite score"), ([float("nan")], "no finite score")):
        odd = local_judges.Scorer(lambda _, found=found: found, name="odd", revision="1")
        assert collect(odd, [Request(id="1", answers=("x",))], Cache(tmp_path))[0].error == words
    wrong = local_judges.Scorer(lambda _: [1.0, 2.0], name="wrong", revision="1")
    with pytest.raises(JudgeError, match="2 scores for 1 answers"):
        collect(wrong, [Request(id="1", answers=("x",))], Cache(tmp_path))


def test_a_folders_revision_follows_its_content(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model folder"):
        revisions.folder_revision(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"x" * 3_000_000)
    first = revisions.folder_revision(tmp_path)
    assert first == revisions.folder_revision(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 2_999_999 + b"y")
    assert revisions.folder_revision(tmp_path) != first


def test_importing_judges_imports_neither_torch_nor_openai():
    code = "import sys, rlhfscale.evals.judge as j; print([n for n in ('torch', 'openai') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_environment())
    assert done.stdout.strip() == "[]"
