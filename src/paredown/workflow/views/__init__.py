"""The views of a scan, in the order in which they are shown; each looks at one block at a time."""

from __future__ import annotations

from paredown.workflow.views.base import Measure
from paredown.workflow.views.depth import Contribution, LensView, LinearTerm, SkipEffect
from paredown.workflow.views.energy import HeadImportance, NeuronSpread
from paredown.workflow.views.experts import ExpertSimilarity, ExpertUse
from paredown.workflow.views.linkage import ExpertCoactivation, ExpertLinkage
from paredown.workflow.views.spectrum import Spectrum
from paredown.workflow.views.stream import StreamSimilarity

__all__ = ["Measure", "measures"]


def measures() -> list[Measure]:
    """Return a fresh set of all views."""
    return [
        ExpertUse(),
        ExpertSimilarity(),
        ExpertCoactivation(),
        ExpertLinkage(),
        StreamSimilarity(),
        Contribution(),
        SkipEffect(),
        LinearTerm(),
        LensView(),
        NeuronSpread(),
        HeadImportance(),
        Spectrum(),
    ]
