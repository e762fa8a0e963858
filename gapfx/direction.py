"""Which way a metric gets better, by its name alone: a task gives numbers, not what they are for."""

from __future__ import annotations

import re

_WITHIN = ("loss", "error", "perplexity", "bits", "divergence")
_WHOLE = frozenset(("ppl", "nll", "mae", "mse", "rmse", "wer", "cer", "ter", "eer", "fid", "bpc", "bpb"))


def is_lower_better(metric: str) -> bool:
    """Whether less of it is better: `val_loss`, `top1_error`, `ppl`; not `accuracy`, nor `answer_f1` for its "wer"."""
    words = re.split(r"[^a-z]+", metric.lower())
    return any(part in word for word in words for part in _WITHIN) or not _WHOLE.isdisjoint(words)
