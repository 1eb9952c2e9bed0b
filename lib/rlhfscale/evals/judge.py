"""Judges: one protocol for language models behind an endpoint or in process, reward models and verifiers.

    replies = collect(judge, requests, Cache("runs/judgments"))

A judge turns requests into replies, in any order. `collect` asks only for what the cache does not hold and stores every
reply as it arrives, so a run that was cut short goes on where it stopped. What cannot be had is a reply with an
``error``: a missing value that is counted, never a guess. Verdicts are parsed elsewhere, from the judge's own output.
Nothing here imports torch or openai before a judge needs it.
"""

import asyncio
import hashlib
import json
import math
import queue
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rlhfscale.models.files import replace_file

Message = dict[str, str]
"""``role`` and ``content``, as in OpenAI's chat API."""
NEW_TOKENS_FIELD = "max_completion_tokens"
CHARS_PER_TOKEN = 3.5
"""Rough, on the dear side for English, for cost estimates only."""
GONE_AFTER = 8
"""Requests given up in a row because nothing came back, after which an endpoint is taken to be gone."""


class JudgeError(RuntimeError):
    """The judge cannot be used at all: no access, another model than asked for, no such model."""


class TooManyMissing(RuntimeError):
    """More verdicts are missing than the run allows. Replies that came are in the cache."""


@dataclass(frozen=True)
class Request:
    """One question to a judge.

    Attributes:
        id: names it within a run, such as ``81/turn1/game2``.
        messages: the judge's prompt.
        conversation: what the candidates were asked, for judges that score answers; not sent to a language model.
        answers: the candidates' answers, in the order shown.
        reference: a gold answer, for verifiers.
        choices: if not empty, the judge's first token is to be one of these, and their log-probabilities are wanted.
        prefill: begins the judge's output; its choice follows. Judges in process only.
        max_tokens: of the judge's output.
        temperature: 0 is greedy.
    """

    id: str
    messages: tuple[Message, ...] = ()
    conversation: tuple[Message, ...] = ()
    answers: tuple[str, ...] = ()
    reference: str = ""
    choices: tuple[str, ...] = ()
    prefill: str = ""
    max_tokens: int = 2048
    temperature: float = 0.0

    @property
    def prompt_hash(self) -> str:
        """64 hexadecimal digits over all that the reply depends on; not over the id."""
        about = {name: value for name, value in asdict(self).items() if name != "id"}
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Reply:
    """What a judge answered.

    Attributes:
        text: its output.
        logprobs: log-probability of first tokens by their text, where ``choices`` were asked for.
        scores: one number for each answer, of a judge that scores.
        error: why there is no reply; empty for a reply.
        finish_reason: ``stop``, or ``length`` for an output that was cut.
        input_tokens, output_tokens: as the endpoint counts them; 0 where unknown.
        model: the model's name as the endpoint gives it, with its fingerprint.
        num_attempts: how often it was asked.
    """

    text: str = ""
    logprobs: dict[str, float] | None = None
    scores: tuple[float, ...] = ()
    error: str = ""
    finish_reason: str = ""
    input_tokens: int = 0
    output_tokens: int = 0
    model: str = ""
    num_attempts: int = 1


class Judge(Protocol):
    """What `collect` asks of a judge.

    Attributes:
        name: of the model or function.
        revision: of its weights or code; part of the cache's key, so a changed judge is asked anew.
        scores: whether replies hold scores instead of text.
    """

    name: str
    revision: str
    scores: bool

    def ask(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        """(index of the request, reply) as they come. Raises JudgeError where asking on makes no sense."""
        ...


# Asking, with a cache.


class Cache:
    """Replies on disk: a JSON file for each judge, revision and prompt, written whole or not at all.

    Args:
        folder: created when the first reply is stored.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def path(self, judge: Judge, request: Request) -> Path:
        slug = re.sub(r"[^A-Za-z0-9.-]+", "-", judge.name)[-60:].strip("-.") or "judge"
        digest = hashlib.sha256(json.dumps([judge.name, judge.revision]).encode()).hexdigest()[:12]
        return self.folder / f"{slug}-{digest}" / f"{request.prompt_hash}.json"

    def get(self, judge: Judge, request: Request) -> Reply | None:
        """The stored reply; None where there is none or the file is broken (it is named in a warning)."""
        path = self.path(judge, request)
        try:
            about = json.loads(path.read_text())
            return Reply(**about["reply"] | {"scores": tuple(about["reply"]["scores"])})
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            warnings.warn(f"{path}: not a readable reply; asking again", stacklevel=2)
            return None

    def put(self, judge: Judge, request: Request, reply: Reply) -> None:
        path = self.path(judge, request)
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"judge": judge.name, "revision": judge.revision, "request": asdict(request), "reply": asdict(reply)}
        replace_file(path, (json.dumps(about, indent=1) + "\n").encode())


def collect(
    judge: Judge,
    requests: Sequence[Request],
    cache: Cache,
    *,
    on_reply: Callable[[int, int], None] | None = None,
) -> list[Reply]:
    """A reply for each request, from the cache or the judge; replies with an error are not stored.

    Args:
        on_reply: called with (replies had, all requests) as they come.

    Raises:
        JudgeError: the judge cannot be used; what came before is in the cache.
    """
    replies: dict[str, Reply] = {}
    missing: dict[str, Request] = {}
    for request in requests:
        key = request.prompt_hash
        if key in replies or key in missing:
            continue
        stored = cache.get(judge, request)
        if stored is None:
            missing[key] = request
        else:
            replies[key] = stored
    todo = list(missing.values())
    for index, reply in judge.ask(todo) if todo else ():
        replies[todo[index].prompt_hash] = reply
        if not reply.error:
            cache.put(judge, todo[index], reply)
        if on_reply:
            on_reply(len(replies), len(replies) + len(missing.keys() - replies.keys()))
    unanswered = Reply(error="the judge gave no reply")
    return [replies.get(request.prompt_hash, unanswered) for request in requests]


def check_missing(num_missing: int, num_judged: int, max_missing: float, reasons: Sequence[str] = ()) -> None:
    """Raise TooManyMissing, with the reasons, where more than a share ``max_missing`` of the verdicts is missing."""
    if num_judged and num_missing > max_missing * num_judged:
        counts = {reason: list(reasons).count(reason) for reason in dict.fromkeys(reasons)}
        why = "; ".join(f"{count} x {reason}" for reason, count in counts.items())
        raise TooManyMissing(
            f"{num_missing} of {num_judged} verdicts are missing, more than the allowed share of {max_missing:g}"
            + (f": {why}" if why else "")
        )


@dataclass(frozen=True)
class Estimate:
    """What a run would ask for, before it does.

    Attributes:
        num_requests: all of them; num_cached: those that cost nothing.
        input_tokens: of the rest, roughly; max_output_tokens: of the rest at the most.
        max_usd: at the given prices; 0 where none are given.
    """

    num_requests: int
    num_cached: int
    input_tokens: int
    max_output_tokens: int
    max_usd: float

    def __str__(self) -> str:
        cost = f", at most {self.max_usd:.2f} USD" if self.max_usd else ""
        return (
            f"{self.num_requests - self.num_cached} requests to the judge ({self.num_cached} more are cached): about "
            f"{self.input_tokens:,} tokens in, at most {self.max_output_tokens:,} out{cost}"
        )


def estimate(
    judge: Judge, requests: Sequence[Request], cache: Cache, usd_per_million: tuple[float, float] = (0.0, 0.0)
) -> Estimate:
    """Tokens and cost of what the cache does not hold.

    Args:
        usd_per_million: price of a million tokens in and out.
    """
    distinct = {request.prompt_hash: request for request in requests}
    todo = [request for request in distinct.values() if cache.get(judge, request) is None]
    chars = sum(len(message["content"]) for request in todo for message in request.messages)
    tokens_in, tokens_out = math.ceil(chars / CHARS_PER_TOKEN), sum(request.max_tokens for request in todo)
    usd = (tokens_in * usd_per_million[0] + tokens_out * usd_per_million[1]) / 1e6
    return Estimate(len(requests), len(requests) - len(todo), tokens_in, tokens_out, usd)


# A language model behind an OpenAI-compatible endpoint.


class _Retry(Exception):
    """This attempt failed and another may do better; ``after_s`` is what the server asked to wait, and ``silent`` says
    that nothing came from it."""

    def __init__(self, reason: str, after_s: float = 0.0, silent: bool = False):
        super().__init__(reason)
        self.after_s, self.silent = after_s, silent


class _Refused(Exception):
    """This request will never work; others may."""


@dataclass
class Endpoint:
    """A model behind an OpenAI-compatible endpoint: OpenAI's own, vLLM's server, and others.

    Attributes:
        name: the model asked for; a reply from a model of another name ends the run.
        base_url: such as ``http://localhost:8000/v1``.
        api_key: sent as a bearer token; never stored.
        revision: of the model, where the name does not say (an endpoint may change what it serves).
        timeout_s: for one attempt, from its start to the last byte.
        num_attempts: before a request is given up.
        backoff_s: wait before the second attempt; it doubles, up to ``max_backoff_s``, unless the server asks for more.
        concurrency: requests in flight at once.
    """

    name: str
    base_url: str
    api_key: str = field(default="none", repr=False)
    revision: str = ""
    timeout_s: float = 120.0
    num_attempts: int = 6
    backoff_s: float = 1.0
    max_backoff_s: float = 60.0
    concurrency: int = 8
    scores: bool = field(default=False, init=False)
    tokens_field: str = field(default="max_tokens", init=False)
    """What the endpoint calls the largest length; newer models of OpenAI refuse the old name and say the new one."""
    _silences: int = field(default=0, init=False, repr=False)
    """Requests given up since the last one that something came back for."""

    def ask(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        """As `Judge.ask`. Timeouts, broken connections, 408, 409, 429, 5xx, broken JSON and empty text are tried again;
        what is left is a reply with an error. 401, 403, 404, another model's name, and silence (`GONE_AFTER`) raise
        JudgeError, after the replies that came."""
        done: queue.Queue[tuple[int, Reply] | BaseException | None] = queue.Queue()
        stop: list[Callable[[], None]] = []

        def work() -> None:
            try:
                asyncio.run(self._ask_all(requests, done.put, stop))
                done.put(None)
            except asyncio.CancelledError:
                done.put(None)
            except BaseException as error:  # handed to the caller's thread
                done.put(error)

        # a thread with a loop of its own: notebooks have one running already
        thread = threading.Thread(target=work, name="judge", daemon=True)
        thread.start()
        try:
            while (item := done.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            for cancel in stop:
                cancel()
            thread.join(timeout=5)

    async def _ask_all(
        self,
        requests: Sequence[Request],
        put: Callable[[tuple[int, Reply]], None],
        stop: list[Callable[[], None]],
    ) -> None:
        if any(request.prefill for request in requests):
            raise JudgeError("an endpoint cannot begin its output for it: constrained verdicts need a judge in process")
        try:
            from openai import AsyncOpenAI
        except ImportError as error:
            message = "an endpoint as judge needs the package openai; install it with: make setup EXTRAS=judge"
            raise JudgeError(message) from error

        loop, main = asyncio.get_running_loop(), asyncio.current_task()

        def cancel() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(main.cancel)

        stop.append(cancel)
        todo, fatal, self._silences = list(range(len(requests)))[::-1], [], 0
        async with AsyncOpenAI(base_url=self.base_url, api_key=self.api_key, max_retries=0) as client:

            async def worker() -> None:
                while todo and not fatal:
                    index = todo.pop()
                    try:
                        put((index, await self._persist(client, requests[index])))
                    except JudgeError as error:
                        fatal.append(error)  # what is in flight may still come

            workers = [asyncio.create_task(worker()) for _ in range(min(self.concurrency, len(requests)))]
            try:
                await asyncio.gather(*workers)
            finally:
                for task in workers:
                    task.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
        if fatal:
            raise fatal[0]

    async def _persist(self, client: Any, request: Request) -> Reply:
        """Ask until there is a reply or the attempts are used up."""
        reason = ""
        for attempt in range(1, self.num_attempts + 1):
            try:
                reply = await self._attempt(client, request)
                self._silences = 0
                return replace(reply, num_attempts=attempt)
            except _Refused as error:
                self._silences = 0
                return Reply(error=str(error), num_attempts=attempt)
            except _Retry as error:
                reason, silent, wait = str(error), error.silent, self._wait_s(request, attempt, error.after_s)
            if attempt < self.num_attempts:
                await asyncio.sleep(wait)
        self._silences = self._silences + 1 if silent else 0
        if self._silences == GONE_AFTER:
            raise JudgeError(
                f"{reason}; {GONE_AFTER} requests in a row were given up: see that the endpoint is up and can be"
                " reached, then run again, which asks only for what is missing"
            )
        return Reply(error=reason, num_attempts=self.num_attempts)

    def _wait_s(self, request: Request, attempt: int, after_s: float) -> float:
        """Doubling, with up to half taken off by request and attempt, so that requests do not all come back at once."""
        wait = min(self.backoff_s * 2 ** (attempt - 1), self.max_backoff_s)
        jitter = np.random.default_rng((int(request.prompt_hash[:15], 16), attempt)).random()
        return max(wait * (1 - 0.5 * jitter), min(after_s, self.max_backoff_s))

    async def _attempt(self, client: Any, request: Request) -> Reply:
        import openai

        options: dict[str, Any] = {}
        if request.choices:
            options = {"logprobs": True, "top_logprobs": 5}
        options[self.tokens_field] = request.max_tokens
        call = client.chat.completions.create(
            model=self.name,
            messages=list(request.messages),
            temperature=request.temperature,
            timeout=self.timeout_s,
            **options,
        )
        try:
            # the client's own timeout is for each read; this one is for the whole
            found = await asyncio.wait_for(call, self.timeout_s)
        except (TimeoutError, openai.APITimeoutError):
            raise _Retry(f"{self.base_url}: timeout after {self.timeout_s:g} s", silent=True) from None
        except openai.APIStatusError as error:
            raise self._status(error) from None
        except openai.APIConnectionError as error:
            cause = type(error.__cause__ or error).__name__
            raise _Retry(f"{self.base_url}: connection failed ({cause})", silent=True) from None
        except (openai.APIError, ValueError) as error:  # JSON that is cut short is a ValueError
            raise _Retry(f"broken reply: {type(error).__name__}") from None
        return self._read(found, request)

    def _status(self, error: Any) -> Exception:
        code, about = error.status_code, " ".join(str(error.message).split())[:200]
        body = error.body if isinstance(error.body, dict) else {}
        if code in (401, 403, 404) or body.get("code") == "insufficient_quota":
            return JudgeError(f"{self.base_url}: {code} for model {self.name!r}: {about}")
        if code in (408, 409, 429) or code >= 500:
            return _Retry(f"HTTP {code}", _seconds(error.response.headers.get("retry-after")))
        if code == 400 and self.tokens_field != NEW_TOKENS_FIELD and NEW_TOKENS_FIELD in about:
            self.tokens_field = NEW_TOKENS_FIELD
            return _Retry(f"HTTP {code}: {about}")
        return _Refused(f"HTTP {code}: {about}")

    def _read(self, found: Any, request: Request) -> Reply:
        """The reply in what the client returned, which may be anything a server sends."""
        choices = getattr(found, "choices", None)
        if not isinstance(choices, list) or not choices or getattr(choices[0], "message", None) is None:
            raise _Retry("broken reply: no choices")
        served = str(getattr(found, "model", "") or "")
        if served != self.name and not served.startswith(f"{self.name}-"):
            raise JudgeError(f"{self.base_url}: asked for model {self.name!r}, was answered by {served!r}")
        choice, usage = choices[0], getattr(found, "usage", None)
        reply = Reply(
            text=choice.message.content if isinstance(choice.message.content, str) else "",
            logprobs=_first_logprobs(choice) if request.choices else None,
            finish_reason=str(getattr(choice, "finish_reason", "") or ""),
            input_tokens=int(getattr(usage, "prompt_tokens", 0) or 0),
            output_tokens=int(getattr(usage, "completion_tokens", 0) or 0),
            model=f"{served} {getattr(found, 'system_fingerprint', '') or ''}".strip(),
        )
        if request.choices and reply.logprobs is None:
            raise _Retry("no log-probabilities in the reply")
        if not request.choices and not reply.text.strip():
            raise _Retry("empty text")
        return reply


def _seconds(header: str | None) -> float:
    try:
        wait = float(header or 0)
    except ValueError:
        return 0.0
    return wait if math.isfinite(wait) else 0.0


def _first_logprobs(choice: Any) -> dict[str, float] | None:
    content = getattr(getattr(choice, "logprobs", None), "content", None)
    if not content:
        return None
    top = getattr(content[0], "top_logprobs", None) or [content[0]]
    return {str(entry.token): float(entry.logprob) for entry in top}


# A language model in process.


class Local:
    """A language model in this process as judge.

    Args:
        sample: a sampler: ``functools.partial(samplers.hf.sample, model)``, or the method of any sampler with its
            arguments and result, such as vLLM's.
        tokenizer: with a chat template; the judge's messages go through it.
        name, revision: of the model, such as its folder and `revisions.folder_revision`.
        model: the transformers model, where log-probabilities of choices are asked for.
        context: tokens of prompt and output that fit; a longer prompt is a reply with an error.
        batch_size: requests sampled together; their replies are stored before the next ones are asked.
    """

    scores = False

    def __init__(
        self,
        sample: Callable[..., Any],
        tokenizer: Any,
        *,
        name: str,
        revision: str,
        model: Any = None,
        context: int | None = None,
        batch_size: int = 16,
    ):
        self.sample, self.tokenizer, self.name, self.revision = sample, tokenizer, name, revision
        self.model, self.context, self.batch_size = model, context, batch_size

    def ask(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        prompts = [self._ids(request) for request in requests]
        fitting = []
        for index, (request, prompt) in enumerate(zip(requests, prompts, strict=True)):
            if self.context is not None and len(prompt) + request.max_tokens > self.context:
                yield index, Reply(error=f"prompt of {len(prompt)} tokens does not fit into {self.context}")
            else:
                fitting.append(index)
        # requests that are sampled in the same way, of similar length
        fitting.sort(
            key=lambda i: (requests[i].choices, requests[i].max_tokens, requests[i].temperature, len(prompts[i]))
        )
        for batch in _batches(fitting, self.batch_size, lambda i: _way(requests[i])):
            chosen = [requests[index] for index in batch]
            answer = self._choose if chosen[0].choices else self._write
            yield from zip(batch, answer(chosen, [prompts[index] for index in batch]), strict=True)

    def _ids(self, request: Request) -> list[int]:
        encoded = self.tokenizer.apply_chat_template(
            list(request.messages), add_generation_prompt=True, return_dict=True
        )
        prefill = self.tokenizer.encode(request.prefill, add_special_tokens=False) if request.prefill else []
        return [*encoded["input_ids"], *prefill]

    def _write(self, requests: list[Request], prompts: list[list[int]]) -> list[Reply]:
        found = self.sample(
            prompts,
            seeds=np.array([int(request.prompt_hash[:16], 16) for request in requests], np.uint64),
            max_new_tokens=requests[0].max_tokens,
            temperature=requests[0].temperature,
            tokenizer=self.tokenizer,
        )
        replies = []
        for prompt, completion in zip(prompts, found, strict=True):
            text = self.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
            about = {"finish_reason": completion.finish_reason, "model": f"{self.name} {self.revision}"}
            about |= {"input_tokens": len(prompt), "output_tokens": len(completion.token_ids)}
            replies.append(Reply(text=text, error="" if text.strip() else "empty text", **about))
        return replies

    def _choose(self, requests: list[Request], prompts: list[list[int]]) -> list[Reply]:
        if self.model is None:
            raise JudgeError(f"judge {self.name}: its sampler gives no log-probabilities of choices; judge with hf:")
        import torch

        replies = []
        for request, prompt in zip(requests, prompts, strict=True):
            with torch.no_grad():
                ids = torch.tensor([prompt], device=self.model.device)
                logprobs = self.model(input_ids=ids, logits_to_keep=1).logits[0, -1].float().log_softmax(0)
            tokens = {text: self.tokenizer.encode(text, add_special_tokens=False)[0] for text in request.choices}
            found = {text: float(logprobs[token]) for text, token in tokens.items()}
            about = {"input_tokens": len(prompt), "output_tokens": 1, "model": f"{self.name} {self.revision}"}
            replies.append(Reply(text=max(found, key=found.get), logprobs=found, **about))
        return replies


def _way(request: Request) -> tuple[Any, ...]:
    return request.choices, request.max_tokens, request.temperature


def _batches(order: list[int], size: int, way: Callable[[int], Any]) -> Iterator[list[int]]:
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) == size or way(index) != way(batch[0])):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


# Judges that score.


class Scorer:
    """A function of conversations and answers as judge: a reward model, or a task's verifier.

    Args:
        function: called with a request; one finite number for each of its answers, or None for a missing value.
        name, revision: of the model or the rule.
    """

    scores = True

    def __init__(self, function: Callable[[Request], Sequence[float] | None], *, name: str, revision: str):
        self.function, self.name, self.revision = function, name, revision

    def ask(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        for index, request in enumerate(requests):
            found = self.function(request)
            if found is None or not np.isfinite(found).all():
                yield index, Reply(error="no finite score")
            elif len(found) != len(request.answers):
                raise JudgeError(f"judge {self.name} gave {len(found)} scores for {len(request.answers)} answers")
            else:
                yield index, Reply(scores=tuple(float(score) for score in found), model=self.name)


def reward_judge(reward: Any, tokenizer: Any, *, name: str, revision: str) -> Scorer:
    """A reward as judge: anything with ``score(sequences)``, or a function of prompts' and responses' texts.

    Args:
        tokenizer: its chat template, if it has one, turns the conversation into the prompt.
    """
    from rlhfscale.models.sequences import Sequences
    from rlhfscale.rewards import as_reward, checked

    reward = as_reward(reward)

    def score(request: Request) -> np.ndarray:
        if getattr(tokenizer, "chat_template", None):
            about = tokenizer.apply_chat_template(
                list(request.conversation), add_generation_prompt=True, return_dict=True
            )
            prompt = list(about["input_ids"])
        else:
            prompt = list(tokenizer(request.conversation[-1]["content"])["input_ids"])
        ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        responses = [[*tokenizer.encode(text, add_special_tokens=False), *ends] for text in request.answers]
        sequences = Sequences.join(
            [prompt] * len(responses), responses, np.ones(len(responses), bool), tokenizer, tokenizer.pad_token_id or 0
        )
        return checked(reward.score(sequences), len(responses))

    return Scorer(score, name=name, revision=revision)


def verifier_judge(correct: Callable[[str, str], bool], *, name: str, revision: str) -> Scorer:
    """A task's verifier as judge: an answer's score is 1 if ``correct(answer, reference)``, else 0."""
    return Scorer(
        lambda request: [float(correct(answer, request.reference)) for answer in request.answers],
        name=name,
        revision=revision,
    )
