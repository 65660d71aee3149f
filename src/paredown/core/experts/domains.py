"""Which texts belong together: rows of tokens divided into domains, by where they came from or by what is in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from paredown.core import calibration
from paredown.core.calibration import Batch
from paredown.errors import DataError

if TYPE_CHECKING:
    from paredown.core.checkpoint import Model

_ROUNDS = 50


def named(model: Model, sources: Sequence[str], *, length: int, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return rows of each source, ``[N, T]``, and each row's domain ``[N]``.

    Parameters
    ----------
    sources : a file, folder or data set for each domain, as calibration data are named
    length, rows : tokens of a row, and rows of each domain at most

    Raises
    ------
    DataError
        If a source cannot be read or is too short.
    """
    batches = []
    for source in sources:
        texts = calibration.read(source, model_ref=model.source, split="calibration")
        batches.append(calibration.for_model(model, texts, length=length, sequences=rows, seed=seed, what="domain"))
    width = min(batch.input_ids.shape[1] for batch in batches)
    ids = torch.cat([batch.input_ids[:, :width] for batch in batches])
    return ids, torch.repeat_interleave(torch.arange(len(batches)), torch.tensor([len(batch) for batch in batches]))


def found(model: Model, data: Batch, count: int) -> Tensor:
    """Divide the rows of ``data`` into ``count`` domains by their mean token embedding; return each row's, ``[N]``.

    Raises
    ------
    DataError
        If there are fewer different rows than domains.
    """
    embedding: Any = model.hf.get_input_embeddings()
    table = embedding.weight.detach().float().cpu()
    real = torch.ones(data.input_ids.shape) if data.attention_mask is None else data.attention_mask.float()
    rows = zip(data.input_ids, real, strict=True)
    told = torch.stack([(table[ids] * mask[:, None]).sum(0) / mask.sum().clamp_min(1) for ids, mask in rows])
    told = told - told.mean(0)
    return clusters(told / told.norm(dim=1, keepdim=True).clamp_min(1e-12), count)


def clusters(points: Tensor, count: int) -> Tensor:
    """Return k-means' cluster of each of ``points`` ``[N, d]``; nothing is drawn, so the same points give the same.

    Centres start far apart: at the point farthest from the mean, then always at the one farthest from all centres.
    A centre that loses all its points moves to the point that is farthest from its own.

    Raises
    ------
    DataError
        If there are fewer different points than clusters.
    """
    points = points.double()
    different = len(torch.unique(points, dim=0))
    if different < count:
        raise DataError(
            f"{different} different rows of data cannot form {count} domains; give more rows, or set experts to "
            f"{max(2, different)} or less."
        )
    away = (points - points.mean(0)).norm(dim=1)
    centres = [points[int(away.argmax())]]
    while len(centres) < count:
        centres.append(points[int(torch.cdist(points, torch.stack(centres)).amin(1).argmax())])
    middle = torch.stack(centres)
    belongs = torch.cdist(points, middle).argmin(1)
    for _ in range(_ROUNDS):
        for number in range(count):
            own = belongs == number
            if bool(own.any()):
                middle[number] = points[own].mean(0)
            else:
                far = (points - middle[belongs]).norm(dim=1)
                far[torch.bincount(belongs, minlength=count)[belongs] < 2] = -1
                middle[number] = points[int(far.argmax())]
        nearest = torch.cdist(points, middle).argmin(1)
        if torch.equal(nearest, belongs) and len(torch.unique(nearest)) == count:
            break
        belongs = nearest
    return belongs
