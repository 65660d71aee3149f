"""Experts of unequal width against a plain sum over their channels."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from paredown.core.ragged import RaggedExperts, expert_weights
from paredown.errors import BudgetError

WIDTHS = (5, 0, 16, 1, 9)


def _experts(dtype: torch.dtype = torch.float32) -> RaggedExperts:
    experts = RaggedExperts(WIDTHS, 16, nn.SiLU(), dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return experts


def _routing() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    chosen = torch.rand(11, len(WIDTHS), generator=generator).topk(2, -1)[1]
    return torch.randn(11, 16, generator=generator), chosen, torch.rand(11, 2, generator=generator)


def _channel_by_channel(experts: RaggedExperts) -> torch.Tensor:
    hidden, chosen, weights = _routing()
    out = torch.zeros_like(hidden)
    offsets = [sum(WIDTHS[:e]) for e in range(len(WIDTHS))]
    for token in range(len(hidden)):
        for e, weight in zip(chosen[token].tolist(), weights[token], strict=True):
            for channel in range(WIDTHS[e]):
                gate = experts.gate_up_proj[2 * offsets[e] + channel] @ hidden[token]
                up = experts.gate_up_proj[2 * offsets[e] + WIDTHS[e] + channel] @ hidden[token]
                out[token] += weight * functional.silu(gate) * up * experts.down_proj[offsets[e] + channel]
    return out


def test_shapes() -> None:
    experts = _experts()
    assert experts.gate_up_proj.shape == (2 * sum(WIDTHS), 16)
    assert experts.down_proj.shape == (sum(WIDTHS), 16)
    assert [name for name, _ in experts.named_parameters()] == ["gate_up_flat", "down_flat"]
    assert [tuple(view.shape) for view in expert_weights(experts, 2)] == [(16, 16)] * 3


def test_forward_is_the_sum_over_channels() -> None:
    experts = _experts()
    with torch.no_grad():
        assert torch.allclose(experts(*_routing()), _channel_by_channel(experts), atol=1e-4)


@pytest.mark.parametrize("chunk", [4, 8, 16, 32])
def test_micro_experts_equal_ragged(chunk: int) -> None:
    experts = _experts()
    micro = experts.micro(chunk)
    assert micro.gate_up_proj.shape == (sum(-(-width // chunk) for width in WIDTHS), 2 * chunk, 16)
    with torch.no_grad():
        expected = experts(*_routing())
        assert torch.allclose(micro(*_routing()), expected, atol=1e-5 * expected.abs().max().item())


def test_micro_experts_need_whole_rows() -> None:
    with pytest.raises(BudgetError, match="multiple of 4"):
        _experts().micro(6)
    with pytest.raises(BudgetError, match="multiple of 8"):
        _experts(torch.bfloat16).micro(4)


def test_cutting_a_ragged_module_again() -> None:
    experts = _experts()
    keep = ((4, 0), (), tuple(range(16)), (), (8,))
    cut = RaggedExperts.cut(experts, keep)
    assert cut.widths == (2, 0, 16, 0, 1)
    for e, kept in enumerate(keep):
        for new, old in zip(cut.expert(e), experts.expert(e), strict=True):
            assert torch.equal(new, old[list(kept)])


def test_gradients_reach_every_chosen_expert() -> None:
    experts = _experts()
    experts(*_routing()).sum().backward()
    chosen = set(_routing()[1].flatten().tolist())
    for e, width in enumerate(WIDTHS):
        if width and e in chosen:
            start = sum(WIDTHS[:e])
            assert experts.down_flat.grad is not None
            assert experts.down_flat.grad[start : start + width].abs().sum() > 0


def test_unaligned_weights_give_the_same_bits() -> None:
    experts, shifted = _experts(), _experts()
    for name, parameter in experts.named_parameters():
        memory = torch.empty(parameter.numel() + 1)
        view = memory[1:].view(parameter.shape)
        view.copy_(parameter.detach())
        setattr(shifted, name, nn.Parameter(view))
        assert getattr(shifted, name).data_ptr() % 64 != 0
    with torch.no_grad():
        assert torch.equal(experts(*_routing()), shifted(*_routing()))
