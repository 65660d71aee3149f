"""From logits before and after to what gate and proof need: losses, their divergence, and a few whole logits."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

PROOF_SEQUENCES = 2
LOGITS_AT_ONCE = 1 << 24


def rows_at_once(length: int, vocabulary: int) -> int:
    """Return how many sequences' logits are held together."""
    return max(1, min(PROOF_SEQUENCES, LOGITS_AT_ONCE // (length * vocabulary)))


def compare(ids: Tensor, pairs: Iterable[tuple[Tensor, Tensor]], rows: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return losses before and after ``[N, T-1]``, their divergence ``[N]``, and the first few logits after.

    Parameters
    ----------
    ids : tokens ``[N, T]``
    pairs : logits before and after ``[rows, T, V]``, for ``rows`` sequences at a time
    rows : see :func:`rows_at_once`
    """
    found: dict[str, list[Tensor]] = {"before": [], "after": [], "kl": []}
    wanted, known = min(PROOF_SEQUENCES, len(ids)), 0
    kept: Tensor | None = None
    remaining = iter(pairs)
    for chosen in torch.split(ids, rows):
        before, after = next(remaining)
        parts: dict[str, list[Tensor]] = {name: [] for name in found}
        # A stretch of positions at a time: in full, each of half a dozen copies would be as large as the head.
        stretch = max(1, LOGITS_AT_ONCE // 32 // (before.shape[0] * before.shape[-1]))
        for start in range(0, before.shape[1], stretch):
            here = slice(start, start + stretch)
            old, new = before[:, here].float().log_softmax(-1), after[:, here].float().log_softmax(-1)
            target = chosen[:, 1:][:, here].to(old.device).unsqueeze(-1)
            parts["before"].append(-old[:, : target.shape[1]].gather(-1, target).squeeze(-1).cpu())
            parts["after"].append(-new[:, : target.shape[1]].gather(-1, target).squeeze(-1).cpu())
            parts["kl"].append((old.exp() * (old - new)).sum(-1).cpu())
        found["before"].append(torch.cat(parts["before"], 1))
        found["after"].append(torch.cat(parts["after"], 1))
        found["kl"].append(torch.cat(parts["kl"], 1).mean(-1))
        if known < wanted:
            if kept is None:
                kept = torch.empty(wanted, *after.shape[1:], dtype=after.dtype)
            kept[known : known + len(after)] = after[: wanted - known].cpu()
            known += len(after)
        # Not to be held while the next ones are computed.
        del before, after
    assert kept is not None
    return {k: torch.cat(v) for k, v in found.items()}, kept
