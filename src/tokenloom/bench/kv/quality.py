"""How good predictions are. Only torch is imported: peers in environments of their own use this file too."""

from __future__ import annotations

from statistics import fmean

import torch
from torch import Tensor


def quality(
    logits: list[Tensor], dense: list[Tensor], tokens: list[int], answers: tuple[range, ...]
) -> dict[str, float]:
    """How good predictions are, and how like dense attention's; means over the tokens that count.

    Args:
        logits, dense: `[V]` for each token.
        answers: which of the tokens count.

    Returns:
        `nll` of the tokens (nats); `kl`: of dense attention's distribution from this one's (nats);
        `agreement`: how often both find the same token most likely; `accuracy`: how often that is the right
        one; `exact`: the share of answers in which it always is.
    """
    nll, kl, same, right, exact = [], [], [], [], []
    for answer in answers:
        ours, theirs = (torch.stack([x[i] for i in answer]).log_softmax(-1) for x in (logits, dense))
        wanted = torch.tensor([tokens[i] for i in answer], device=ours.device)
        best = ours.argmax(-1)
        nll += (-ours.gather(1, wanted[:, None])[:, 0]).tolist()
        kl += (theirs.exp() * (theirs - ours)).sum(-1).tolist()
        same += (best == theirs.argmax(-1)).tolist()
        right += (best == wanted).tolist()
        exact.append(bool((best == wanted).all()))
    return {
        "nll": fmean(nll),
        "kl": fmean(kl),
        "agreement": fmean(same),
        "accuracy": fmean(right),
        "exact": fmean(exact),
    }


def overlap(one: list[int], other: list[int]) -> float:
    """ROUGE-L's F1 over tokens: the longest common subsequence, of the mean of both lengths."""
    before = [0] * (len(other) + 1)
    for a in one:
        now = [0]
        for j, b in enumerate(other):
            now.append(before[j] + 1 if a == b else max(before[j + 1], now[j]))
        before = now
    return 2 * before[-1] / max(1, len(one) + len(other))
