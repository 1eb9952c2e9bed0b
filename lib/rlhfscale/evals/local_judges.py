"""Judges in process: a language model, a reward model that scores, and a verifier."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from rlhfscale.evals.judge import JudgeError, Reply, Request


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
