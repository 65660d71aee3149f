"""Results that are too large for the memory at hand are proven block by block."""

from __future__ import annotations

import pytest

from paredown.errors import ProofError
from paredown.workflow import estimate, proof, recipe, run


def asked(folder, text_file, **step):
    """Return a checked recipe of one step."""
    data = {"calibration": str(text_file), "sequences": 4, "heldout_sequences": 3, "length": 32}
    return recipe.check({"model": str(folder), "gate": "none", "data": data, "steps": [step]})


@pytest.fixture(autouse=True)
def scarce(monkeypatch):
    """Leave so little memory that nothing may be opened whole."""
    monkeypatch.setattr(proof, "available_memory", lambda: 0)
    monkeypatch.setattr(estimate, "rehearse", lambda *_: estimate.Forecast(0, 0.0, []))


def test_it_is_said_and_the_logits_are_the_same(checkpoint_folder, text_file, tmp_path):
    wanted = asked(checkpoint_folder(), text_file, method="random-sublayers", keep=0.5)
    record = run.run(wanted, tmp_path / "out", speed=False)
    assert record.proof.passed
    assert record.proof.max_abs_logit_difference == 0
    assert "block by block" in record.proof.checks[0]
    assert not record.proof.generated
    assert "it generates" not in record.proof.checks


def test_another_model_is_still_caught(checkpoint_folder, text_file, tmp_path, monkeypatch):
    real = proof._in_fresh_process

    def spoilt(folder, reference, loader, rows, device):
        assert loader == "block by block"
        for file in folder.glob("*.safetensors"):
            content = bytearray(file.read_bytes())
            content[-4096:-2048] = content[-2048:]
            file.write_bytes(content)
        return real(folder, reference, loader, rows, device)

    monkeypatch.setattr(proof, "_in_fresh_process", spoilt)
    wanted = asked(checkpoint_folder(), text_file, method="random-blocks", keep=0.5)
    with pytest.raises(ProofError, match="logits differ"):
        run.run(wanted, tmp_path / "out", speed=False)
    assert not (tmp_path / "out").exists()
