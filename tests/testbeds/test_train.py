"""The training loop: resuming, schedules, and the way from a run to a testbed's folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from paredown import testbeds
from paredown.testbeds import corpus, growth, objectives, publish, shapes, tasks, train

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32, "num_attention_heads": 2, "head_dim": 16}
EXPERTS = {
    "moe": {"moe_intermediate_size": 16, "num_experts": 4},
    "recall-moe": {"intermediate_size": 16, "num_local_experts": 4},
}
TEXT = "One two three four five six seven. The secret number of house is 123. Words follow words for ever and ever.\n"


@pytest.fixture(scope="module")
def tokenizer():
    return corpus.train_tokenizer([TEXT * 4], vocabulary=320)


def _objective(name: str, tokenizer) -> objectives.Objective:
    stream = corpus.encode([TEXT * 40], tokenizer)
    if name in testbeds.RECALLING:
        return objectives.Recall(stream, tokenizer, tasks.names_in([TEXT]), tokens_per_step=256, lengths=(128,))
    if name == "vlm":
        digits = np.random.default_rng(0).integers(0, 255, size=(20, 28, 28), dtype=np.uint8)
        return objectives.MosaicQuestions(
            digits, np.arange(20) % 10, tokenizer, 96, TINY["hidden_size"], batch=2, seeing=0.5
        )
    return objectives.PlainText(stream, tokens_per_step=128, lengths=(32, 64))


def _trainer(name: str, tokenizer, folder: Path) -> train.Trainer:
    torch.manual_seed(0)
    size = TINY | EXPERTS.get(name, {})
    model = shapes.build(name, tokenizer, **size)
    return train.Trainer(model, _objective(name, tokenizer), train.Schedule(steps=4), folder, about={"data": "made up"})


@pytest.mark.parametrize("name", testbeds.NAMES)
def test_a_resumed_run_ends_with_the_same_weights(name: str, tokenizer, tmp_path: Path) -> None:
    straight = _trainer(name, tokenizer, tmp_path / "straight")
    straight.run()
    stopped = _trainer(name, tokenizer, tmp_path / "stopped")
    stopped.run(stop_at=2)
    resumed = _trainer(name, tokenizer, tmp_path / "stopped")
    assert resumed.resume()
    assert resumed.progress.step == 2
    resumed.run()
    assert resumed.progress.tokens == straight.progress.tokens
    for key, value in straight.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key


def test_training_lowers_the_loss(tokenizer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = shapes.build("lm", tokenizer, **TINY)
    trainer = train.Trainer(model, _objective("lm", tokenizer), train.Schedule(steps=40), tmp_path, peak_rate=2e-2)
    first = trainer.step()
    trainer.run()
    assert trainer.progress.loss < 0.8 * first


def test_the_schedule_warms_up_and_ends_low() -> None:
    schedule = train.Schedule(steps=1000)
    assert schedule.rate(train.Progress(step=0)) == pytest.approx(1 / train.WARMUP_STEPS)
    assert schedule.rate(train.Progress(step=train.WARMUP_STEPS)) > 0.95
    assert schedule.rate(train.Progress(step=1000)) == pytest.approx(0.01)
    assert train.Schedule(minutes=10).fraction(train.Progress(seconds=300)) == 0.5


def test_without_a_checkpoint_there_is_nothing_to_resume(tokenizer, tmp_path: Path) -> None:
    assert not _trainer("lm", tokenizer, tmp_path).resume()


def test_growing_keeps_the_function_and_every_new_weight_can_learn(tokenizer) -> None:
    torch.manual_seed(0)
    small = shapes.build("lm", tokenizer, **TINY)
    large = shapes.build("lm", tokenizer, **TINY | {"num_hidden_layers": 4, "intermediate_size": 48})
    growth.grow(large, small)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(large(ids).logits, small(ids).logits)
    large(ids, labels=ids).loss.backward()
    assert all(layer.mlp.down_proj.weight.grad.abs().min() > 0 for layer in large.model.layers)


@pytest.mark.parametrize("wrong", [{"num_hidden_layers": 3}, {"hidden_size": 64}, {"intermediate_size": 16}])
def test_what_cannot_grow_is_refused(tokenizer, wrong: dict[str, int]) -> None:
    small = shapes.build("lm", tokenizer, **TINY)
    with pytest.raises(ValueError, match="cannot grow"):
        growth.grow(shapes.build("lm", tokenizer, **TINY | wrong), small)


def test_experts_hold_channels_of_the_mlp_and_everything_else_is_taken_over(tokenizer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = shapes.build("recall", tokenizer, **TINY)
    dense.save_pretrained(tmp_path)
    model = shapes.build("recall-moe", tokenizer, **TINY | EXPERTS["recall-moe"])
    fresh = [layer.mlp.gate.weight.clone() for layer in model.model.layers]
    train.start_from(model, tmp_path)
    for old, new, router in zip(dense.model.layers, model.model.layers, fresh, strict=True):
        assert torch.equal(old.self_attn.q_proj.weight, new.self_attn.q_proj.weight)
        assert torch.equal(new.mlp.gate.weight, router)
        drawn = []
        for gate_up, down in zip(new.mlp.experts.gate_up_proj, new.mlp.experts.down_proj, strict=True):
            gate, up = gate_up.chunk(2)
            same = (gate[:, None] == old.mlp.gate_proj.weight[None]).all(-1)
            assert same.any(1).all()
            chosen = same.float().argmax(1)
            assert len(set(chosen.tolist())) == 16
            assert torch.equal(up, old.mlp.up_proj.weight[chosen])
            assert torch.equal(down, 2 * old.mlp.down_proj.weight[:, chosen])
            drawn.append(frozenset(chosen.tolist()))
        assert len(set(drawn)) == 4
    ids = torch.arange(3, 40)[None]
    # Experts as wide as the MLP hold all of it, whichever of them the router picks.
    whole = shapes.build("recall-moe", tokenizer, **TINY | {"num_local_experts": 4})
    growth.split(whole, dense)
    with torch.no_grad():
        torch.testing.assert_close(whole(ids).logits, dense(ids).logits)
    with pytest.raises(ValueError, match="only narrower"):
        growth.split(shapes.build("recall-moe", tokenizer, **TINY | {"intermediate_size": 48}), dense)


def test_a_vision_language_model_starts_from_a_text_model(tokenizer, tmp_path: Path) -> None:
    text = shapes.build("lm", tokenizer, **TINY)
    text.save_pretrained(tmp_path)
    model = shapes.build("vlm", tokenizer, **TINY)
    train.start_from(model, tmp_path)
    for key, value in text.model.state_dict().items():
        assert torch.equal(model.model.language_model.state_dict()[key], value)
    assert torch.equal(model.lm_head.weight, text.lm_head.weight)


def test_from_data_to_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two commands, on made-up data: a tokenizer is trained, the folder is complete and loads."""
    data = tmp_path / "data" / "tales"
    data.mkdir(parents=True)
    lines = (json.dumps({"id": n, "title": f"tale {n}", "text": f"Tale {n}.\n" + TEXT * 12}) for n in range(120))
    (data / "tales.jsonl").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setitem(shapes.SIZES, "lm", TINY)
    run, to = tmp_path / "run", tmp_path / "published"
    train.main(["lm", "--data", str(tmp_path / "data"), "--out", str(run), "--steps", "1"])
    publish.main(["lm", "--data", str(tmp_path / "data"), "--run", str(run), "--to", str(to)])
    folder = to / "lm"
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    assert json.loads((folder / "training.json").read_text())["step"] == 1
    calibration, heldout = (
        {json.loads(line)["source"] for line in (folder / file).read_text().splitlines()}
        for file in ("calibration.jsonl", "heldout.jsonl")
    )
    assert calibration
    assert heldout
    assert not calibration & heldout
    assert all(source in (folder / "PROVENANCE.md").read_text() for source in calibration | heldout)
    chosen = sorted(heldout)[0]
    publish.main(["lm", "--data", str(tmp_path / "data"), "--run", str(run), "--to", str(to), "--heldout", chosen])
    assert {json.loads(line)["source"] for line in (folder / "heldout.jsonl").read_text().splitlines()} == {chosen}
    assert not any(str(tmp_path) in file.read_text() for file in folder.glob("*.json"))
