"""Judges: one protocol for language models behind an endpoint or in process, reward models and verifiers.

    replies = collect(judge, requests, Cache("runs/judgments"))

A judge turns requests into replies, in any order. `collect` asks only for what the cache does not hold and stores every
reply as it arrives, so a run that was cut short goes on where it stopped. What cannot be had is a reply with an
``error``: a missing value that is counted, never a guess. Verdicts are parsed elsewhere, from the judge's own output.
Nothing here imports torch or openai before a judge needs it.
"""

import hashlib
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from rlhfscale.models.files import replace_file

Message = dict[str, str]
"""``role`` and ``content``, as in OpenAI's chat API."""
CHARS_PER_TOKEN = 3.5
"""Rough, on the dear side for English, for cost estimates only."""


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


# A language model in process.


# Judges that score.
