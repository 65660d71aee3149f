"""What tests of images share: runtimes that look, drop and thin, and prompts with several images."""

from __future__ import annotations

from typing import Any

import families
import torch

from paredown.core.attach import attach_runtimes, wrap
from paredown.core.runtime import Runtime

VLMS = families.VLMS
FLAT = "qwen2_vl"


class Looks(Runtime):
    """Sees everything and changes nothing."""

    def __init__(self, model):
        super().__init__(None, model)
        self.calls, self.map, self.images = [], None, None

    def look(self, call):
        self.calls.append((call.layer, tuple(call.query.shape), None if call.rows is None else call.rows.tolist()))

    def after_vision(self, layer, stream):
        pass

    def features(self, features):
        self.map = features

    def begin(self, now):
        if now.images is not None:
            self.images = now.images


class Drops(Looks):
    """Drops every second feature."""

    contiguous = False

    def features(self, features):
        self.map = features
        features.keep(torch.arange(len(features.values)) % 2 == 0)
        features.contiguous = self.contiguous


class MovesUp(Drops):
    contiguous = True


class Thins(Looks):
    """Lets half of the patches go after the first block; ``uneven``: one more in the first tile."""

    uneven = False

    def after_vision(self, layer, stream):
        if layer == 0:
            stream.keep(self.stays(stream))

    def stays(self, stream):
        at = stream.positions()
        if stream.flat:
            return at // 4 % 2 == 0
        keep = (at == 0) | (at % 2 == 1)
        if self.uneven:
            keep[0, 1] = False
        return keep


class ThinsUnevenly(Thins):
    uneven = True


def build(family: str) -> Any:
    return families.FAMILIES[family]()


def attached(hf, kind):
    model = wrap(hf)
    runtime = kind(model)
    return runtime, attach_runtimes(model, [runtime])


def generate(hf, given, **more):
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **more}
    options["suppress_tokens"] = [families.IMAGE_TOKEN]  # a random model may write it, and then cannot read it again
    with torch.no_grad():
        return hf.generate(**given, **options, return_dict_in_generate=True, output_logits=True)


def one(family, given, index):
    """Return the row ``index`` of a batch with its image."""
    out = {k: v[index : index + 1] for k, v in given.items()}
    if family == FLAT:
        out["pixel_values"] = given["pixel_values"][index * 16 : index * 16 + 16]
    return out


def close(one_, other):
    torch.testing.assert_close(one_, other, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def embedded(hf, given):
    """Return what the language model is called with."""
    seen: dict[str, Any] = {}
    handle = hf.model.language_model.register_forward_pre_hook(lambda m, a, kw: seen.update(kw), with_kwargs=True)
    hf(**given)
    handle.remove()
    return seen["inputs_embeds"], seen.get("position_ids")


def several(family):
    """Return a batch of two prompts, with two images in the first and one in the second, left-padded."""
    more = families.inputs(family, batch=3)
    images = (more["input_ids"] == families.IMAGE_TOKEN).sum(1)[0]
    block = [102, *[families.IMAGE_TOKEN] * int(images), 103]
    rows = [[5, *block, 7, *block, 9, 11], [6, *block, 8]]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    given = {k: v for k, v in more.items() if k in ("pixel_values", "image_sizes", "image_grid_thw")}
    given |= {"input_ids": ids, "attention_mask": (ids != 0).long()}
    if family == FLAT:
        given["mm_token_type_ids"] = (ids == families.IMAGE_TOKEN).long()
    return given
