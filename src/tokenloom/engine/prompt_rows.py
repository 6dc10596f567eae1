"""What requests want of their prompts' rows: log-probabilities, and sums that embeddings are means of."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenloom.engine.request import Request
from tokenloom.engine.sampler import NotFiniteError, token_logprobs
from tokenloom.models.decoder import Decoder

# Log-probabilities need the logits of every prompt row; this many rows of them exist at a time.
_LOGITS_ROWS = 128


def read_prompt_rows(decoder: Decoder, request: Request, hidden: Tensor, position: int) -> None:
    """Collect it: hidden `[n, d]`, the first at `position`.

    Raises:
        NotFiniteError: a row holds something that is not a number.
    """
    if not hidden.isfinite().all():
        raise NotFiniteError("a hidden state of the prompt is not a finite number")
    if request.kind == "embed":
        total = hidden.to(torch.float64 if hidden.dtype == torch.float64 else torch.float32).sum(0)
        request.hidden_sum = total if request.hidden_sum is None else request.hidden_sum + total
        return
    entries = request.prompt_logprobs
    if entries is None or len(entries) > position + 1:  # known already: this is a recompute
        skip = 0 if entries is None else len(entries) - position - 1
        hidden, position = hidden[skip:], position + skip
    labels = request.prompt[position + 1 : position + 1 + len(hidden)]
    count = request.params.prompt_logprobs or 0
    for i in range(0, len(labels), _LOGITS_ROWS):
        window = labels[i : i + _LOGITS_ROWS]
        logits = decoder.logits(hidden[i : i + len(window)])
        assert entries is not None
        entries += token_logprobs(logits, window, [count] * len(window), decoder.kernels)
