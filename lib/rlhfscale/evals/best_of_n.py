"""Best-of-N, pass@N and votes from M >= N samples of each prompt.

All take samples [..., sample] (one prompt, or [prompt, sample]) and ``sizes`` (the values of N) and return float64
[..., size]: the expectation over a uniformly drawn subset of N of the M samples, without replacement. Best-of-N and
pass@N are exact: the sample with k samples ranked below it is the best of N with probability C(k, N-1) / C(M, N)
(Nakano et al. 2021, arXiv 2112.09332, appendix I; pass@k: Chen et al. 2021, arXiv 2107.03374), computed from
log-gamma. So one set of 512 samples serves every N.
"""

from collections.abc import Sequence

import numpy as np
from scipy.special import gammaln


def best_of_n(gold, proxy, sizes: Sequence[int]) -> np.ndarray:
    """Expected gold of the response with the highest proxy among N; among tied proxies one is chosen uniformly.

    Args:
        gold: float [..., sample], the gold reward or correctness of each response.
        proxy: float [..., sample], the reward model's score of each response.
        sizes: values of N, each from 1 to the number of samples.

    Returns:
        float64 [..., size].

    Raises:
        ValueError: a size out of range, shapes that differ, a NaN (named with its index).
    """
    gold, proxy = _finite("gold", gold), _finite("proxy", proxy)
    if gold.shape != proxy.shape:
        raise ValueError(f"gold has shape {gold.shape}, proxy {proxy.shape}")
    num_samples = gold.shape[-1]
    below = _share_below(num_samples, _checked_sizes(sizes, num_samples))

    order = np.argsort(proxy, axis=-1)
    proxy, gold = np.take_along_axis(proxy, order, -1), np.take_along_axis(gold, order, -1)
    # Each group of tied proxies is the sorted positions first .. last - 1.
    position = np.broadcast_to(np.arange(num_samples), proxy.shape)
    steps = proxy[..., 1:] != proxy[..., :-1]
    edge = np.ones_like(steps, shape=(*steps.shape[:-1], 1))
    first = np.maximum.accumulate(np.where(np.concatenate([edge, steps], -1), position, 0), axis=-1)
    ends = np.where(np.concatenate([steps, edge], -1), position + 1, num_samples)
    last = np.minimum.accumulate(ends[..., ::-1], axis=-1)[..., ::-1]
    return np.stack([np.sum(gold * (f[last] - f[first]) / (last - first), axis=-1) for f in below], axis=-1)


def expected_proxy(proxy, sizes: Sequence[int]) -> np.ndarray:
    """Expected highest proxy among N. Arguments, result and errors as :func:`best_of_n`."""
    return best_of_n(proxy, proxy, sizes)


def pass_at_n(correct, sizes: Sequence[int]) -> np.ndarray:
    """Probability that at least one of N responses is correct: 1 - C(M - c, N) / C(M, N) with c of M correct.

    Args:
        correct: bool or 0/1 [..., sample].
        sizes: values of N, each from 1 to the number of samples.

    Returns:
        float64 [..., size].

    Raises:
        ValueError: a size out of range, a NaN, or values other than 0 and 1.
    """
    correct = _finite("correct", correct)
    if not np.isin(correct, (0.0, 1.0)).all():
        raise ValueError("correct must hold 0 and 1 only")
    num_samples = correct.shape[-1]
    num_wrong = (num_samples - correct.sum(-1)).astype(int)
    return 1.0 - np.moveaxis(_share_below(num_samples, _checked_sizes(sizes, num_samples))[:, num_wrong], 0, -1)


def majority_vote(
    answers, gold, sizes: Sequence[int], *, rng: np.random.Generator, num_draws: int = 200, weights=None
) -> np.ndarray:
    """Expected gold of the most frequent answer among N; ties are broken uniformly, in expectation.

    Exact for N = 1 and N = M, and for N = 2 without weights; else the mean over ``num_draws`` subsets, which are
    nested across sizes.

    Args:
        answers: int or str [..., sample], the final answer of each response.
        gold: float [..., sample]; the same for equal answers (their mean is used).
        sizes: values of N, each from 1 to the number of samples.
        rng: source of the subsets.
        num_draws: subsets per prompt.
        weights: float [..., sample], not negative: each response votes with its weight (None: all equal).

    Returns:
        float64 [..., size].

    Raises:
        ValueError: a size out of range, shapes that differ, a NaN, a negative weight.
    """
    answers, gold = np.asarray(answers), _finite("gold", gold)
    weights = np.ones_like(gold) if weights is None else _finite("weights", weights)
    if not answers.shape == gold.shape == weights.shape:
        raise ValueError(f"answers, gold and weights have shapes {answers.shape}, {gold.shape}, {weights.shape}")
    if (weights < 0).any():
        raise ValueError("weights must not be negative: pass for example the sigmoid of a reward model's score")
    num_samples = gold.shape[-1]
    sizes = _checked_sizes(sizes, num_samples)
    rows = zip(*(a.reshape(-1, num_samples) for a in (answers, gold, weights)), strict=True)
    result = np.array([_vote(*row, sizes, rng, num_draws) for row in rows])
    return result.reshape(*gold.shape[:-1], len(sizes))


def weighted_vote(answers, gold, weights, sizes: Sequence[int], *, rng: np.random.Generator, num_draws: int = 200):
    """:func:`majority_vote` in which each response votes with its weight, such as the sigmoid of its proxy."""
    return majority_vote(answers, gold, sizes, rng=rng, num_draws=num_draws, weights=weights)


def kl_bound_nats(sizes: Sequence[int]) -> np.ndarray:
    """Upper bound log N - (N-1)/N on KL(best-of-N || policy) in nats, float64 [size].

    An upper bound, not the KL (Beirami et al. 2024, arXiv 2401.01879): they agree only where no two responses tie.
    """
    sizes = np.asarray(sizes, dtype=float)
    if (sizes < 1).any():
        raise ValueError(f"sizes must be at least 1, got {sizes[sizes < 1].tolist()}")
    return np.log(sizes) - (sizes - 1) / sizes


def _vote(answers, gold, weights, sizes, rng, num_draws) -> list[float]:
    """Votes of one prompt; arrays [sample]."""
    num_samples = len(gold)
    classes, code, count = np.unique(answers, return_inverse=True, return_counts=True)
    class_gold = np.bincount(code, gold) / count
    equal = (weights == weights[0]).all()
    order = np.argsort(rng.random((num_draws, num_samples)), axis=1)
    offsets = len(classes) * np.arange(num_draws)[:, None]
    result = []
    for size in sizes:
        if size == 1 or (size == 2 and equal):
            result.append(gold.mean())
            continue
        drawn = np.arange(num_samples)[None] if size == num_samples else order[:, :size]
        votes = np.bincount(
            (code[drawn] + offsets[: len(drawn)]).ravel(), weights[drawn].ravel(), len(drawn) * len(classes)
        ).reshape(len(drawn), len(classes))
        # Sums of equal weights in another order differ in the last bits; such votes are tied.
        winners = votes >= votes.max(1, keepdims=True) * (1 - 1e-12)
        winners &= _present(code[drawn], len(classes))
        result.append(np.mean(winners @ class_gold / winners.sum(1)))
    return result


def _present(codes: np.ndarray, num_classes: int) -> np.ndarray:
    """Which classes were drawn, bool [draw, class]; an answer of weight 0 can win only if it was."""
    present = np.zeros((len(codes), num_classes), dtype=bool)
    present[np.arange(len(codes))[:, None], codes] = True
    return present


def _share_below(num_samples: int, sizes: Sequence[int]) -> np.ndarray:
    """C(k, N) / C(M, N) for k = 0..M, the share of subsets within the k lowest samples; float64 [size, k]."""
    k = np.arange(num_samples + 1.0)
    table = np.zeros((len(sizes), num_samples + 1))
    for row, size in zip(table, sizes, strict=True):
        inside = k >= size
        log_share = gammaln(k[inside] + 1) - gammaln(k[inside] - size + 1)
        row[inside] = np.exp(log_share - log_share[-1])
    return table


def _checked_sizes(sizes: Sequence[int], num_samples: int) -> list[int]:
    sizes = list(sizes)
    if not all(isinstance(size, int | np.integer) for size in sizes):
        raise ValueError(f"sizes {sizes}: N must be whole numbers")
    bad = [size for size in sizes if not 1 <= size <= num_samples]
    if bad:
        raise ValueError(f"sizes {bad} out of range: N must be from 1 to the {num_samples} samples of a prompt")
    return sizes


def _finite(name: str, values) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    if values.ndim == 0 or values.shape[-1] == 0:
        raise ValueError(f"{name} needs an axis of samples, got shape {values.shape}")
    if not np.isfinite(values).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
        raise ValueError(f"{name} is NaN or infinite at index {where}")
    return values
