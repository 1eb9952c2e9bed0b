"""Estimators of KL(policy || reference) from log-probabilities of sampled tokens (Schulman 2020, "Approximating KL").

With ``logr = ref_logprobs - logprobs`` and ``r = exp(logr) = ref / policy``:

    k1 = -logr            unbiased, can be negative
    k2 = logr**2 / 2      biased, low variance
    k3 = (r - 1) - logr   unbiased, never negative
"""

import torch


def kl_terms(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, estimator: str = "k1") -> torch.Tensor:
    """Per-token estimates in nats of KL(policy || reference), tokens having been drawn from the policy.

    Args:
        logprobs: float32 [batch, response], log-probabilities of the sampled tokens under the policy.
        ref_logprobs: float32 [batch, response], the same under the reference.
        estimator: "k1", "k2" or "k3".

    Returns:
        float32 [batch, response]; the caller masks it.

    Raises:
        ValueError: an unknown estimator.
    """
    logr = ref_logprobs - logprobs
    if estimator == "k1":
        return -logr
    if estimator == "k2":
        return logr.square() / 2
    if estimator == "k3":
        return torch.expm1(logr) - logr
    raise ValueError(f"estimator: {estimator!r} is not one of k1, k2, k3")


def sequence_kl(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """KL(policy || reference) of each response in nats, float32 [batch]: k1, summed over the tokens in ``mask``."""
    return (kl_terms(logprobs, ref_logprobs, "k1") * mask).sum(1)


def adapted(coefficient: float, kl_nats: float, target: float | None, num_rollouts: int, horizon: int) -> float:
    """The next KL coefficient: a proportional controller in log space (Ziegler et al. 2019, section 2.2).

    ``beta' = beta (1 + clip(KL / target - 1, -0.2, 0.2) num_rollouts / horizon)``; unchanged without a target.

    Args:
        coefficient: beta now.
        kl_nats: KL(policy || reference) of a response, a mean over the update.
        num_rollouts: number of responses in the update.
        horizon: number of responses over which beta moves.
    """
    if target is None:
        return coefficient
    error = min(max(kl_nats / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * num_rollouts / horizon)
