"""CAMERA as a ranking: where the energy of an expert layer lies, without changing anything.

Source: "CAMERA: Multi-Matrix Joint Compression for MoE Models via Micro-Expert Redundancy Analysis", 2025,
arXiv 2508.02322; official code xuyuzhuang11/CAMERA. The energy is that of `camera-p`, which removes by it; here it is
summed up expert by expert. Layers are looked at as they are, each behind the dense ones before it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from paredown.core import budget
from paredown.core.method import Probe, View, register

if TYPE_CHECKING:
    from torch import Tensor

    from paredown.core.calibration import Batch
    from paredown.core.checkpoint import Model

SHARES = (50, 90, 99)


@register
class Camera(Probe):
    """Shows which experts and how many of their neurons carry a layer's energy; changes nothing."""

    name = "camera"
    title = "CAMERA: Multi-Matrix Joint Compression for MoE Models via Micro-Expert Redundancy Analysis"
    year = 2025
    arxiv = "2508.02322"
    axis = "experts"
    unit = "expert neurons"
    needs = ("calibration-data",)

    peak_share: float = Field(0.9, ge=0, le=1, description="a: weight of the largest token against the sum of all.")

    def measure(self, model: Model, data: Batch | None, *, seed: int = 0) -> list[dict[str, Any]]:
        """Return rows with ``layer``, ``expert``, ``tokens``, ``energy_share``, ``neurons``, ``neurons_50/90/99``.

        Of each layer with experts come a row for all its neurons (``expert`` is ``"all"``), one for the shared expert
        (``"shared"``) and one for each routed expert, by number. ``neurons_90`` says how many of the row's strongest
        neurons carry 90 % of the row's energy; ``unseen`` is true for experts that no token reached. Energies are
        comparable within a layer only.
        """
        from paredown.core.compression import observed
        from paredown.core.statistics import ExpertTraffic

        rows: list[dict[str, Any]] = []
        blocks = [block.index for block in model.anatomy.language.blocks if budget.even(block)]
        for view, seen in observed(self, model, data, blocks, lambda _: [ExpertTraffic(energy=True)]):
            rows += self._layer(view, seen)
        return rows

    def _layer(self, view: View, seen: dict[str, Tensor]) -> list[dict[str, Any]]:
        import torch

        from paredown.core import energy

        scores = energy.of_experts(view, seen, self.peak_share)
        parts: dict[Any, Tensor] = {"shared": scores["shared"]} if "shared" in scores else {}
        parts |= dict(enumerate(scores["score"]))
        whole = torch.cat([part.double() for part in parts.values()])
        listed: dict[Any, Tensor] = {"all": whole}
        tokens: dict[Any, int] = {"all": int(seen["total"]), "shared": int(seen["total"])}
        tokens |= {expert: int(n) for expert, n in enumerate(seen["tokens"])}
        return [
            {
                "layer": view.part.index,
                "expert": expert,
                "tokens": tokens[expert],
                "energy_share": float(values.double().sum() / whole.sum().clamp(min=1e-300)),
                "neurons": values.numel(),
                **{f"neurons_{share}": energy.carriers(values, share / 100) for share in SHARES},
                "unseen": tokens[expert] == 0,
            }
            for expert, values in (listed | parts).items()
        ]
