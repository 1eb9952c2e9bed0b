"""A judge behind an OpenAI-compatible endpoint: requests at once, retries, and an endpoint that is gone."""

import asyncio
import math
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from rlhfscale.evals.judge import JudgeError, Reply, Request
from rlhfscale.runs.paths import without_secrets

NEW_TOKENS_FIELD = "max_completion_tokens"

GONE_AFTER = 8
"""Requests given up in a row because nothing came back, after which an endpoint is taken to be gone."""


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

    def __post_init__(self):
        address, shown = urlsplit(self.base_url), without_secrets(self.base_url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise JudgeError(f"judge: {shown} is no address of an endpoint, such as http://localhost:8000/v1")
        if shown != self.base_url:
            raise JudgeError(
                f"judge: the address of {shown} holds a name, a password or a query; leave it out, and give the key by"
                " --judge-key"
            )

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
