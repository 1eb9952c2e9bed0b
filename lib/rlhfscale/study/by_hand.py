"""PPO by hand: tables of the four fixed roll-outs in ``00_walkthrough``, and small pictures of PPO's formulas.

The pictures take plain numbers and return a `style.Picture`, which a notebook shows without further commands.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import torch
from IPython.display import Code
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from torch.nn.utils.rnn import pad_sequence

from rlhfscale.bed.demonstrations import encode
from rlhfscale.bed.ladder import BOS_ID, EOS_ID
from rlhfscale.rl.kl import kl_terms
from rlhfscale.rl.losses import clipped_surrogate
from rlhfscale.rl.rollout import Rollouts
from rlhfscale.study import style

BLUE, ORANGE, GREEN, RED, GREY = (style.CATEGORIES[index] for index in (0, 1, 2, 3, 7))
Rows = Sequence[Sequence[float]]
"""One list of numbers for each response, one number for each of its tokens."""


def same(by_hand: Any, by_library: Any) -> bool:
    """Return whether numbers agree to the last digit of float32, the precision of the trainers.

    Args:
        by_hand: a number, a list of them, or `Rows`.
        by_library: a number or a tensor of as many dimensions. Its padding behind the end of a row is not compared.
    """
    if isinstance(by_hand, int | float):
        return bool(np.float32(by_hand) == np.float32(float(by_library)))
    if len(by_hand) > len(by_library):
        return False
    return all(same(hand, library) for hand, library in zip(by_hand, by_library, strict=False))


def pad(rows: Rows) -> torch.Tensor:
    """Return float64 [response, token], in which shorter rows are filled up with 0."""
    return pad_sequence([torch.tensor(row, dtype=torch.float64) for row in rows], batch_first=True)


def rollouts(
    prompts: Sequence[str], responses: Sequence[str], logprobs: Rows, ref_logprobs: Rows, values: Rows
) -> Rollouts:
    """Return texts and numbers as the trainers hold them, in float64. Scores, advantages and returns are still 0.

    Args:
        prompts: one prompt of the tasks for each response.
        responses: tokens with spaces between; ``<eos>`` ends a response, and one without it was cut.
        logprobs, ref_logprobs, values: see `rl.rollout.Rollouts`.
    """
    questions = [[BOS_ID, *encode(prompt)] for prompt in prompts]
    answers = [encode(response) for response in responses]
    lengths = torch.tensor([len(answer) for answer in answers])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    empty = torch.zeros(mask.shape, dtype=torch.float64)
    joined = [question + answer for question, answer in zip(questions, answers, strict=True)]
    return Rollouts(
        ids=pad(joined).long(),
        prompt_lengths=torch.tensor([len(question) for question in questions]),
        lengths=torch.tensor([len(ids) for ids in joined]),
        mask=mask,
        finished=torch.tensor([answer[-1] == EOS_ID for answer in answers]),
        scores=empty[:, 0],
        sampler_logprobs=pad(logprobs),
        logprobs=pad(logprobs),
        ref_logprobs=pad(ref_logprobs),
        values=pad(values),
        advantages=empty,
        returns=empty,
        weights=empty,
    )


def token_table(responses: Sequence[str], **quantities: Rows | torch.Tensor) -> pd.DataFrame:
    """Return a table of quantities at each token, response by response, below the tokens themselves."""
    rows = {}
    for index, response in enumerate(responses):
        tokens = response.split()
        rows[f"y{index + 1}", "token"] = tokens
        for name, values in quantities.items():
            rows[f"y{index + 1}", name] = [f"{float(value) + 0.0:.5g}" for value in values[index][: len(tokens)]]
    table = pd.DataFrame([pd.Series(row, dtype=object) for row in rows.values()]).fillna("")
    table.columns += 1
    return table.set_index(pd.MultiIndex.from_tuples(rows, names=["response", ""]))


def source(function: Callable) -> Code:
    """Return the code of a function, to be shown in a notebook."""
    return Code(inspect.getsource(function), language="python")


def _panels(columns: int, height: float, rows: int = 1, **options: Any) -> tuple[style.Picture, np.ndarray]:
    picture = style.Picture(figsize=(style.WIDTH_IN, height), layout="constrained")
    return picture, picture.subplots(rows, columns, squeeze=False, **options).ravel()


@style.styled
def pipeline() -> style.Picture:
    """Draw one update of PPO, from the prompt to the policy's next step."""
    picture = style.Picture(figsize=(style.WIDTH_IN, 2.5))
    axis = picture.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, 11), ylim=(0, 5))
    axis.axis("off")
    boxes = {
        "prompt": (0.15, 2.2, 1.2, 0.9, "prompt\n$x$", "0.5"),
        "policy": (1.95, 2.2, 1.5, 0.9, "policy\n$\\pi_\\theta$", BLUE),
        "response": (4.05, 2.2, 1.4, 0.9, "response\n$y$", "0.5"),
        "reward": (6.15, 3.75, 2.0, 0.9, "reward model\nscore $s$", GREEN),
        "reference": (6.15, 2.2, 2.0, 0.9, "reference $\\pi_\\mathrm{ref}$\nKL $k_t$", GREY),
        "critic": (6.15, 0.65, 2.0, 0.9, "critic\nvalues $V_t$", ORANGE),
        "loss": (8.95, 2.0, 1.9, 1.3, "advantages $A_t$\nclipped loss\ngradient", BLUE),
    }
    look = {"boxstyle": "round,pad=0,rounding_size=0.12", "linewidth": 1.1}
    for x, y, width, height, text, color in boxes.values():
        face = matplotlib.colors.to_rgba(color, 0.1)
        axis.add_patch(FancyBboxPatch((x, y), width, height, edgecolor=color, facecolor=face, **look))
        axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8, linespacing=1.3)
    judges = ("reward", "reference", "critic")
    arrows = [("prompt", "policy"), ("policy", "response")]
    for start, end in [*arrows, *(("response", name) for name in judges), *((name, "loss") for name in judges)]:
        (x, y, width, height, *_), (to_x, to_y, _, to_height, *_) = boxes[start], boxes[end]
        end_y = to_y + to_height / 2
        if end == "loss":
            end_y += 0.35 * np.sign(y - to_y) * (start != "reference")
        _arrow(axis, (x + width, y + height / 2), (to_x, end_y))
    axis.plot([9.9, 9.9, 2.7], [2.0, 0.25, 0.25], color=BLUE, linewidth=1.1, solid_joinstyle="round")
    _arrow(axis, (2.7, 0.25), (2.7, 2.2), color=BLUE)
    axis.text(4.4, 0.33, "update of $\\theta$", color=BLUE, fontsize=8, ha="center", va="bottom")
    return picture


def _arrow(axis, start: tuple[float, float], end: tuple[float, float], color: Any = "0.35") -> None:
    look = {"arrowstyle": "-|>", "mutation_scale": 9, "linewidth": 1.1, "shrinkA": 1, "shrinkB": 1}
    axis.add_patch(FancyArrowPatch(start, end, color=color, **look))


@style.styled
def kl_estimators() -> style.Picture:
    """Draw k1, k2 and k3 of one token against its log-ratio, and their means for two fixed policies."""
    picture, (left, right) = _panels(2, 2.1)
    log_ratio = torch.linspace(-1.5, 1.5, 201, dtype=torch.float64)
    policy, reference = torch.tensor([0.6, 0.3, 0.1]).double(), torch.tensor([0.3, 0.3, 0.4]).double()
    for place, (name, color, linestyle) in enumerate((("k1", BLUE, "-"), ("k2", ORANGE, "--"), ("k3", GREEN, "-"))):
        terms = kl_terms(log_ratio, torch.zeros_like(log_ratio), name)
        left.plot(log_ratio, terms, color=color, linestyle=linestyle, label=f"$k_{name[1]}$")
        mean = (policy * kl_terms(policy.log(), reference.log(), name)).sum()
        right.bar(place, mean.item(), color=color, width=0.6)
    left.axhline(0, color="0.4", linewidth=0.8)
    left.axvline(0, color="0.4", linewidth=0.8)
    left.set(xlabel="$\\log\\pi - \\log\\pi_\\mathrm{ref}$ of the token", ylabel="nats", title="one token")
    left.legend(loc="lower right")
    exact = (policy * (policy / reference).log()).sum().item()
    right.axhline(exact, color="0.2", linestyle=":", linewidth=1.2)
    right.text(2.45, exact * 1.02, "exact KL", ha="right", va="bottom", fontsize=7)
    right.set_xticks(range(3), ["$k_1$", "$k_2$", "$k_3$"])
    right.set(title="mean over the policy's tokens", ylabel="nats", ylim=(0, 1.25 * exact))
    return picture


@style.styled
def token_bars(responses: Sequence[str], bars: dict[str, Rows | torch.Tensor]) -> style.Picture:
    """Draw numbers at each token as bars, one panel for each response; several kinds stand side by side."""
    picture, axes = _panels(2, 2.9, rows=2, sharey=True)
    width, colors = 0.8 / len(bars), (GREY, BLUE, GREEN, ORANGE)
    for index, (axis, response) in enumerate(zip(axes, responses, strict=True)):
        tokens = response.split()
        for kind, (name, rows) in enumerate(bars.items()):
            place = np.arange(len(tokens)) + (kind - (len(bars) - 1) / 2) * width
            heights = [float(value) for value in rows[index][: len(tokens)]]
            drawn = axis.bar(place, heights, width, color=colors[kind], label=name)
            if len(bars) == 1:  # side by side there is no room for numbers
                axis.bar_label(drawn, [f"{height:.3g}" if height else "" for height in heights], fontsize=6, padding=1)
        axis.axhline(0, color="0.4", linewidth=0.8)
        axis.set_xticks(range(len(tokens)), tokens)
        axis.set_xlim(-0.6, 4.6)
        axis.set_title(f"$y_{index + 1}$", loc="left")
        axis.margins(y=0.2)
    picture.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(bars))
    return picture


@style.styled
def gae_weights(gamma: float) -> style.Picture:
    """Draw the weight of a token's surprise in the advantages of the tokens before it, by distance and lambda."""
    picture, (axis,) = _panels(1, 2.1)
    lambdas, steps = (0.0, 0.5, 0.95, 1.0), np.arange(11)
    for lam, color in zip(lambdas, matplotlib.colormaps["viridis"](np.linspace(0, 0.85, 4)), strict=True):
        axis.plot(steps, (gamma * lam) ** steps, color=color, marker="o", label=f"$\\lambda$ = {lam:g}")
    axis.set(xlabel="$l$, tokens from $t$ to the surprise $\\delta_{t+l}$", ylabel="weight $(\\gamma\\lambda)^l$")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return picture


@style.styled
def clipped_objective(clip: float, ratios: Rows, advantages: Rows) -> style.Picture:
    """Draw the objective of a token for advantages of +1 and -1, with the roll-outs' tokens on it."""
    picture, axes = _panels(2, 2.6)
    grid = torch.linspace(0.3, 1.9, 400, dtype=torch.float64)
    ratio, advantage = (torch.from_numpy(np.concatenate(rows)) for rows in (ratios, advantages))
    for axis, sign, word in zip(axes, (1.0, -1.0), ("positive", "negative"), strict=True):
        loss, _ = clipped_surrogate(grid, torch.full_like(grid, sign), clip)
        axis.axvspan(1 - clip, 1 + clip, color="0.93", linewidth=0)
        axis.plot(grid, sign * grid, color="0.5", linestyle="--", linewidth=1.0, label="$\\rho A$")
        axis.plot(grid, -loss, color=BLUE, linewidth=1.8, label="minimum: what counts")
        own = ratio[advantage * sign > 0]
        placed, flat = clipped_surrogate(own, torch.full_like(own, sign), clip)
        for chosen, name, face in ((~flat, "token with a gradient", BLUE), (flat, "token without", "white")):
            axis.scatter(own[chosen], -placed[chosen], s=26, color=[face], edgecolors=[BLUE], zorder=4, label=name)
        axis.set(xlabel="probability ratio $\\rho$", title=f"advantage {word}")
    axes[0].set_ylabel("objective for $|A| = 1$")
    picture.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, columnspacing=1.2)
    return picture


@style.styled
def repeated_steps(
    logits: Sequence[float],
    tokens: Sequence[str],
    taken: Sequence[int],
    advantages: Sequence[float],
    lr: float,
    clip: float,
) -> style.Picture:
    """Draw probabilities after one gradient step, and ratios after many on the same roll-outs, clipped and not.

    Args:
        logits: of the policy in one state; ``tokens`` are their names.
        taken: index of the token that each roll-out took in this state; ``advantages`` are theirs.
        lr: size of a gradient step.
        clip: half-width of the ratio's clipping range.
    """
    picture, (left, right) = _panels(2, 2.4)
    ratios = _ratios(logits, taken, advantages, lr, clip)
    before = torch.softmax(torch.tensor(logits, dtype=torch.float64), 0)
    place = np.arange(len(tokens))
    left.bar(place - 0.2, before.tolist(), 0.4, color="0.7", label="before")
    left.bar(place + 0.2, (before * ratios[1]).tolist(), 0.4, color=BLUE, label="after one step")
    left.set_xticks(place, tokens)
    left.set(title="probabilities", ylabel="$\\pi_\\theta$", ylim=(0, 0.8))
    left.legend()
    right.axhspan(1 - clip, 1 + clip, color="0.93", linewidth=0)
    paths = {"clipped": (ratios, "-"), "not clipped": (_ratios(logits, taken, advantages, lr, 1e9), ":")}
    for path, linestyle in paths.values():
        for index, color in zip(taken, (GREEN, RED), strict=True):
            right.plot(path[:, index], color=color, linestyle=linestyle)
            if linestyle == ":":
                right.text(STEPS, path[-1, index], f" {tokens[index]}", color=color, va="center")
    right.legend(handles=[Line2D([], [], color="0.3", linestyle=line, label=name) for name, (_, line) in paths.items()])
    right.set(title="probability ratios", xlabel="gradient steps on the same roll-outs", ylabel="$\\rho$")
    right.set_xticks(range(0, STEPS + 1, 5))
    right.set_xlim(0, STEPS * 1.2)
    return picture


STEPS = 20
"""Gradient steps of `repeated_steps`."""


def _ratios(
    logits: Sequence[float], taken: Sequence[int], advantages: Sequence[float], lr: float, clip: float
) -> torch.Tensor:
    """Ratios of all tokens' probabilities to those at the start, before the first step and after each [step, token]."""
    theta = torch.tensor(logits, dtype=torch.float64)
    start, found = torch.log_softmax(theta, 0), []
    for _ in range(STEPS + 1):
        theta = theta.detach().requires_grad_()
        ratio = torch.exp(torch.log_softmax(theta, 0) - start)
        found.append(ratio.detach())
        loss, _ = clipped_surrogate(ratio[list(taken)], torch.tensor(advantages, dtype=torch.float64), clip)
        loss.mean().backward()
        theta = theta - lr * theta.grad
    return torch.stack(found)
