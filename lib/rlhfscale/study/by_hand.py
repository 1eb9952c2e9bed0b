"""PPO by hand: what ``00_walkthrough`` shows of four fixed roll-outs, as tables and as small pictures of the formulas.

The pictures take plain numbers and return a `style.Picture`, which a notebook shows by itself.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import torch
from IPython.display import Code
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from rlhfscale.bed.demonstrations import encode
from rlhfscale.bed.ladder import BOS_ID, EOS_ID
from rlhfscale.rl.kl import kl_terms
from rlhfscale.rl.losses import clipped_surrogate
from rlhfscale.rl.rollout import Rollouts
from rlhfscale.study import style

BLUE, ORANGE, GREEN, RED, GREY = (style.CATEGORIES[index] for index in (0, 1, 2, 3, 7))
Rows = Sequence[Sequence[float]]
"""One list of numbers for each response, one number for each of its tokens."""


# Numbers by hand against numbers by the library.


def same(by_hand: Any, by_library: Any) -> bool:
    """Whether numbers agree to the last digit of float32, the precision that the trainers compute in.

    Args:
        by_hand: a number, a list of them, or `Rows`.
        by_library: a number or tensor of as many dimensions; past the end of a shorter row it is padding, not compared.
    """
    if isinstance(by_hand, int | float):
        return bool(np.float32(by_hand) == np.float32(float(by_library)))
    if len(by_hand) > len(by_library):
        return False
    return all(same(hand, library) for hand, library in zip(by_hand, by_library, strict=False))


def pad(rows: Rows) -> torch.Tensor:
    """float64 [response, token], shorter rows filled up with 0."""
    filled = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.float64)
    for row, values in zip(filled, rows, strict=True):
        row[: len(values)] = torch.tensor(values, dtype=torch.float64)
    return filled


def rollouts(
    prompts: Sequence[str], responses: Sequence[str], logprobs: Rows, ref_logprobs: Rows, values: Rows
) -> Rollouts:
    """Texts and numbers as the trainers hold them, in float64; scores and what follows from them are still 0.

    Args:
        prompts: of the tasks, one for each response.
        responses: with ``<eos>`` where they end; a response without it was cut.
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
    """Quantities at each token, response by response, below the tokens themselves."""
    tokens = [response.split() for response in responses]
    columns = range(1, max(map(len, tokens)) + 1)
    rows = {}
    for index, row in enumerate(tokens):
        rows[f"y{index + 1}", "token"] = row
        for name, values in quantities.items():
            rows[f"y{index + 1}", name] = [f"{float(value) + 0.0:.5g}" for value in values[index][: len(row)]]
    filled = {key: [*row, *[""] * (len(columns) - len(row))] for key, row in rows.items()}
    return pd.DataFrame.from_dict(filled, orient="index", columns=columns).set_index(
        pd.MultiIndex.from_tuples(filled, names=["response", ""])
    )


def source(function: Callable) -> Code:
    """The code of a function of the library, to be shown."""
    return Code(inspect.getsource(function), language="python")


# Sketches.


def _sketch(draw: Callable[..., style.Picture]) -> Callable[..., style.Picture]:
    @wraps(draw)
    def styled(*arguments: Any) -> style.Picture:
        with matplotlib.rc_context(style.STYLE):
            return draw(*arguments)

    return styled


def _panels(columns: int, height: float, rows: int = 1, **options: Any) -> tuple[style.Picture, np.ndarray]:
    picture = style.Picture(figsize=(style.WIDTH_IN, height), layout="constrained")
    axes = picture.subplots(rows, columns, squeeze=False, **options)
    return picture, axes.ravel()


@_sketch
def pipeline() -> style.Picture:
    """One update of PPO, from the prompt to the policy's next step."""
    picture = style.Picture(figsize=(style.WIDTH_IN, 2.5))
    axis = picture.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, 11), ylim=(0, 5))
    axis.axis("off")
    box = {"boxstyle": "round,pad=0,rounding_size=0.12", "linewidth": 1.1}
    boxes = {
        "prompt": (0.15, 2.2, 1.2, 0.9, "prompt\n$x$", "0.5"),
        "policy": (1.95, 2.2, 1.5, 0.9, "policy\n$\\pi_\\theta$", BLUE),
        "response": (4.05, 2.2, 1.4, 0.9, "response\n$y$", "0.5"),
        "reward": (6.15, 3.75, 2.0, 0.9, "reward model\nscore $s$", GREEN),
        "reference": (6.15, 2.2, 2.0, 0.9, "reference $\\pi_\\mathrm{ref}$\nKL $k_t$", GREY),
        "critic": (6.15, 0.65, 2.0, 0.9, "critic\nvalues $V_t$", ORANGE),
        "loss": (8.95, 2.0, 1.9, 1.3, "advantages $A_t$\nclipped loss\ngradient", BLUE),
    }
    for x, y, width, height, text, color in boxes.values():
        axis.add_patch(FancyBboxPatch((x, y), width, height, edgecolor=color, facecolor=(*_rgb(color), 0.1), **box))
        axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8, linespacing=1.3)
    straight = [("prompt", "policy"), ("policy", "response")]
    straight += [("response", name) for name in ("reward", "reference", "critic")]
    straight += [(name, "loss") for name in ("reward", "reference", "critic")]
    for start, end in straight:
        (x, y, width, height, *_), (to_x, to_y, _, to_height, *_) = boxes[start], boxes[end]
        end_y = to_y + to_height / 2
        if end == "loss":
            end_y += 0.35 * np.sign(y - to_y) * (start != "reference")
        _arrow(axis, (x + width, y + height / 2), (to_x, end_y))
    axis.plot([9.9, 9.9, 2.7], [2.0, 0.25, 0.25], color=BLUE, linewidth=1.1, solid_joinstyle="round")
    _arrow(axis, (2.7, 0.25), (2.7, 2.2), color=BLUE)
    axis.text(4.4, 0.33, "update of $\\theta$", color=BLUE, fontsize=8, ha="center", va="bottom")
    return picture


def _rgb(color: Any) -> tuple[float, float, float]:
    return matplotlib.colors.to_rgb(color)


def _arrow(axis, start: tuple[float, float], end: tuple[float, float], color: Any = "0.35") -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": 9, "linewidth": 1.1, "shrinkA": 1, "shrinkB": 1}
    axis.add_patch(FancyArrowPatch(start, end, color=color, **style))


@_sketch
def kl_estimators() -> style.Picture:
    """k1, k2 and k3 of one token against its log-ratio, and their part of the divergence of two fixed policies."""
    picture, (left, right) = _panels(2, 2.1)
    log_ratio = torch.linspace(-1.5, 1.5, 201, dtype=torch.float64)
    styles = {"k1": (BLUE, "-"), "k2": (ORANGE, "--"), "k3": (GREEN, "-")}
    for name, (color, linestyle) in styles.items():
        terms = kl_terms(log_ratio, torch.zeros_like(log_ratio), name)
        left.plot(log_ratio, terms, color=color, linestyle=linestyle, label=f"$k_{name[1]}$")
    left.axhline(0, color="0.4", linewidth=0.8)
    left.axvline(0, color="0.4", linewidth=0.8)
    left.set(xlabel="$\\log\\pi - \\log\\pi_\\mathrm{ref}$ of the token", ylabel="nats", title="one token")
    left.legend(loc="lower right")
    policy, reference = torch.tensor([0.6, 0.3, 0.1]).double(), torch.tensor([0.3, 0.3, 0.4]).double()
    exact = (policy * (policy / reference).log()).sum().item()
    for place, (name, (color, _)) in enumerate(styles.items()):
        mean = (policy * kl_terms(policy.log(), reference.log(), name)).sum()
        right.bar(place, mean.item(), color=color, width=0.6)
    right.axhline(exact, color="0.2", linestyle=":", linewidth=1.2)
    right.text(2.45, exact * 1.02, "exact KL", ha="right", va="bottom", fontsize=7)
    right.set_xticks(range(3), [f"$k_{name[1]}$" for name in styles])
    right.set(title="mean over the policy's tokens", ylabel="nats", ylim=(0, 1.25 * exact))
    return picture


@_sketch
def token_bars(responses: Sequence[str], bars: dict[str, Rows | torch.Tensor]) -> style.Picture:
    """Numbers at each token as bars, side by side where there are several kinds; one panel for each response."""
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


@_sketch
def gae_weights(gamma: float, lambdas: Sequence[float] = (0.0, 0.5, 0.95, 1.0)) -> style.Picture:
    """How much a surprise counts in the advantage of the token that many steps before it."""
    picture, (axis,) = _panels(1, 2.1)
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(lambdas)))
    steps = np.arange(11)
    for lam, color in zip(lambdas, colors, strict=True):
        axis.plot(steps, (gamma * lam) ** steps, color=color, marker="o", label=f"$\\lambda$ = {lam:g}")
    axis.set(xlabel="$l$, tokens from $t$ to the surprise $\\delta_{t+l}$", ylabel="weight $(\\gamma\\lambda)^l$")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return picture


@_sketch
def clipped_objective(clip: float, ratios: Rows, advantages: Rows) -> style.Picture:
    """The objective of a token, for advantages of +1 and -1, with the roll-outs' tokens on it."""
    picture, axes = _panels(2, 2.6)
    grid = torch.linspace(0.3, 1.9, 400, dtype=torch.float64)
    tokens = [(r, a) for row, other in zip(ratios, advantages, strict=True) for r, a in zip(row, other, strict=True)]
    for axis, sign in zip(axes, (1.0, -1.0), strict=True):
        loss, _ = clipped_surrogate(grid, torch.full_like(grid, sign), clip)
        axis.axvspan(1 - clip, 1 + clip, color="0.93", linewidth=0)
        axis.plot(grid, sign * grid, color="0.5", linestyle="--", linewidth=1.0, label="$\\rho A$")
        axis.plot(grid, -loss, color=BLUE, linewidth=1.8, label="minimum: what counts")
        own = torch.tensor([ratio for ratio, advantage in tokens if advantage * sign > 0], dtype=torch.float64)
        placed, flat = clipped_surrogate(own, torch.full_like(own, sign), clip)
        for chosen, name, face in ((~flat, "token with a gradient", BLUE), (flat, "token without", "white")):
            axis.scatter(own[chosen], -placed[chosen], s=26, color=[face], edgecolors=[BLUE], zorder=4, label=name)
        axis.set(xlabel="probability ratio $\\rho$", title=f"advantage {'positive' if sign > 0 else 'negative'}")
    axes[0].set_ylabel("objective for $|A| = 1$")
    picture.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, columnspacing=1.2)
    return picture


@_sketch
def repeated_steps(
    logits: Sequence[float],
    tokens: Sequence[str],
    taken: Sequence[int],
    advantages: Sequence[float],
    lr: float,
    clip: float,
) -> style.Picture:
    """Gradient steps on the same roll-outs: probabilities after one, and ratios after many, with clipping and without.

    Args:
        logits: of the policy in one state; tokens: their names.
        taken: index of the token that each roll-out took in this state.
        advantages: of these tokens.
    """
    picture, (left, right) = _panels(2, 2.4)
    num_steps = 20
    paths = {name: list(_ratios(logits, taken, advantages, lr, limit, num_steps)) for name, limit in _limits(clip)}
    before = torch.softmax(torch.tensor(logits, dtype=torch.float64), 0)
    after = before * paths["clipped"][1]
    place = np.arange(len(tokens))
    left.bar(place - 0.2, before.tolist(), 0.4, color="0.7", label="before")
    left.bar(place + 0.2, after.tolist(), 0.4, color=BLUE, label="after one step")
    left.set_xticks(place, tokens)
    left.set(title="probabilities", ylabel="$\\pi_\\theta$", ylim=(0, 0.8))
    left.legend()
    right.axhspan(1 - clip, 1 + clip, color="0.93", linewidth=0)
    for (name, path), linestyle in zip(paths.items(), ("-", ":"), strict=True):
        for index, color in zip(taken, (GREEN, RED), strict=True):
            values = [ratios[index] for ratios in path]
            right.plot(values, color=color, linestyle=linestyle)
            if name != "clipped":
                right.text(num_steps, values[-1], f" {tokens[index]}", color=color, va="center")
    styles = {"clipped": "-", "not clipped": ":"}
    right.legend(handles=[Line2D([], [], color="0.3", linestyle=style, label=name) for name, style in styles.items()])
    right.set(title="probability ratios", xlabel="gradient steps on the same roll-outs", ylabel="$\\rho$")
    right.set_xticks(range(0, num_steps + 1, 5))
    right.set_xlim(0, num_steps * 1.2)
    return picture


def _limits(clip: float) -> tuple[tuple[str, float], tuple[str, float]]:
    return ("clipped", clip), ("not clipped", 1e9)


def _ratios(
    logits: Sequence[float],
    taken: Sequence[int],
    advantages: Sequence[float],
    lr: float,
    clip: float,
    num_steps: int,
) -> Iterator[torch.Tensor]:
    """Ratios of all tokens' probabilities to those at the start, before each step and after the last."""
    theta = torch.tensor(logits, dtype=torch.float64)
    start = torch.log_softmax(theta, 0)
    for _ in range(num_steps + 1):
        theta = theta.detach().requires_grad_()
        ratio = torch.exp(torch.log_softmax(theta, 0) - start)
        yield ratio.detach()
        loss, _ = clipped_surrogate(ratio[list(taken)], torch.tensor(advantages, dtype=torch.float64), clip)
        loss.mean().backward()
        theta = theta - lr * theta.grad


# The live run.
