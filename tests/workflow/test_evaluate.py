"""Numbers against hand computations; pairs that cannot be compared; size, memory and speed of real folders."""

from __future__ import annotations

import math
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from paredown.errors import CheckpointError, DataError, UsageError
from paredown.workflow import evaluate as evaluation
from paredown.workflow import measure, tasks
from paredown.workflow.evaluate import evaluate
from paredown.workflow.measured import EvalRecord


@pytest.fixture
def two(checkpoint_folder):
    load = evaluation.load_any
    return load(checkpoint_folder(seed=0)).hf, load(checkpoint_folder(seed=1)).hf


@pytest.fixture
def ids():
    return torch.randint(0, 64, (5, 12), generator=torch.Generator().manual_seed(3))


def by_hand(hf, row):
    """Probabilities of the next token after each prefix, one forward pass a prefix."""
    with torch.no_grad():
        return [torch.softmax(hf(row[None, : t + 1]).logits[0, -1].double(), -1) for t in range(len(row) - 1)]


def test_nll_is_what_a_hand_computes(two, ids):
    found = evaluation.nll(two[0], ids)
    assert found.shape == (5, 11)
    assert found.dtype == torch.float32
    for row, values in zip(ids, found, strict=True):
        expected = [-math.log(p[row[t + 1]]) for t, p in enumerate(by_hand(two[0], row))]
        assert values.tolist() == pytest.approx(expected, rel=1e-4)


def test_kl_is_what_a_hand_computes(two, ids):
    found = evaluation.kl(two[1], two[0], ids)
    assert found.shape == (5,)
    for row, value in zip(ids, found, strict=True):
        pairs = zip(by_hand(two[1], row), by_hand(two[0], row), strict=True)
        expected = np.mean([float((p * (p / q).log()).sum()) for p, q in pairs])
        assert value.item() == pytest.approx(expected, rel=1e-4)
    assert (found > 0.01).all()


def test_kl_to_itself_is_exactly_zero(two, ids):
    assert evaluation.kl(two[0], two[0], ids).tolist() == [0.0] * 5


def test_kl_is_not_symmetric_and_the_reference_comes_first(two, ids):
    assert not torch.allclose(evaluation.kl(two[0], two[1], ids), evaluation.kl(two[1], two[0], ids), rtol=1e-3)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64, None])
def test_batches_change_nothing(two, ids, batch_size):
    told = []
    found = evaluation.together(*two, ids, batch_size, progress=lambda *step: told.append(step))
    expected = evaluation.nll(two[0], ids), evaluation.nll(two[1], ids), evaluation.kl(*two, ids)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert told[-1][:2] == (5, 5)


def test_a_model_in_training_is_measured_without_dropout_and_left_in_training(two, ids):
    expected = evaluation.nll(two[0], ids)
    two[0].config.attention_dropout = 0.5
    for layer in two[0].model.layers:
        layer.self_attn.attention_dropout = 0.5
    two[0].train()
    torch.testing.assert_close(evaluation.nll(two[0], ids), expected)
    assert two[0].training


def test_a_token_that_the_reference_rules_out_adds_nothing():
    log_p = torch.tensor([[-math.inf, math.log(0.5), math.log(0.5)]])
    log_q = torch.log_softmax(torch.zeros(1, 3), -1)
    assert evaluation._divergence(log_p, log_q).item() == pytest.approx(math.log(1.5))
    assert evaluation._divergence(log_p, log_p).item() == 0.0


# --- whole evaluations ------------------------------------------------------------------------------------------------


def run(*refs, data, **options):
    against = refs[1] if len(refs) > 1 else None
    return evaluate(refs[0], against, data, **{"length": 16, "sequences": 12, "cost": False, "device": "cpu"} | options)


def test_one_model(checkpoint_folder, text_file):
    folder = checkpoint_folder(seed=0)
    record = run(folder, data=text_file)
    [score] = record.scores
    hf = evaluation.load_any(folder).hf
    assert score.name == "perplexity"
    assert score.before is None
    assert score.after.n == 12
    assert score.after.low < score.after.mean < score.after.high
    assert record.against is record.prefill_ratio is None
    assert record.model.loads_in == "transformers"
    assert record.model.size.parameters == sum(p.numel() for p in hf.parameters())
    assert record.model.size.bytes_weights == 4 * record.model.size.parameters
    assert record.model.size.bytes_disk == (folder / "model.safetensors").stat().st_size
    assert record.data["length"] == 16
    assert record.dtype == "float32"
    assert EvalRecord.model_validate_json(record.model_dump_json()) == record
    assert run(folder, data=text_file).scores == record.scores


def test_a_pair_is_measured_on_the_same_tokens(checkpoint_folder, text_file):
    ours, theirs = checkpoint_folder(seed=0), checkpoint_folder(seed=1)
    told = []
    record = run(ours, theirs, data=text_file, progress=lambda done, total, stage: told.append((done, total, stage)))
    ppl, kl = record.scores
    assert ppl.before == run(theirs, data=text_file).scores[0].after
    assert ppl.after == run(ours, data=text_file).scores[0].after
    assert ppl.difference.mean == pytest.approx(math.log(ppl.after.mean / ppl.before.mean), rel=1e-6)
    assert kl.after.mean > 0
    assert record.against.model == str(theirs)
    assert told[-1] == (12, 12, "perplexity and KL")


def test_a_model_against_itself_differs_in_nothing(checkpoint_folder, text_file):
    folder = checkpoint_folder(seed=0)
    ppl, kl = run(folder, folder, data=text_file).scores
    assert (ppl.difference.low, ppl.difference.mean, ppl.difference.high) == (0, 0, 0)
    assert (kl.after.low, kl.after.mean, kl.after.high) == (0, 0, 0)


def test_vocabularies_must_be_one(checkpoint_folder, text_file):
    with pytest.raises(UsageError, match="vocabularies of 64 and 80 tokens"):
        run(checkpoint_folder(seed=0), checkpoint_folder(seed=0, vocabulary=80), data=text_file)


def test_tokenizers_must_be_one(checkpoint_folder, text_file):
    other = checkpoint_folder(seed=0, words=[f"w{i}" for i in reversed(range(60))])
    with pytest.raises(UsageError, match="different tokens"):
        run(checkpoint_folder(seed=0), other, data=text_file)


def test_the_other_model_needs_no_tokenizer_of_its_own(checkpoint_folder, text_file):
    bare = checkpoint_folder(seed=1, tokenizer=False)
    assert len(run(checkpoint_folder(seed=0), bare, data=text_file).scores) == 2
    with pytest.raises(DataError, match="no tokenizer"):
        run(bare, data=text_file)


def test_rows_fit_the_model_with_fewer_positions(checkpoint_folder, text_file):
    short = checkpoint_folder(seed=1, positions=20)
    record = run(checkpoint_folder(seed=0), short, data=text_file, length=48)
    assert record.data["length"] == 20
    assert any("shortened from 48 to the 20 positions" in note for note in record.notes)


def test_a_model_that_predicts_no_next_token_is_refused(tmp_path, text_file):
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="BertForMaskedLM, which predicts no next token"):
        run(tmp_path, data=text_file)


def test_data_are_asked_for(checkpoint_folder):
    with pytest.raises(DataError, match="--data"):
        run(checkpoint_folder(seed=0), data=None)


def test_a_model_that_overflows_is_told_and_not_averaged(checkpoint_folder, text_file, monkeypatch):
    monkeypatch.setattr(evaluation, "nll", lambda *_, **__: torch.tensor([[1.0, math.nan]]))
    with pytest.raises(CheckpointError, match="not finite"):
        run(checkpoint_folder(seed=0), data=text_file)


# --- tasks ------------------------------------------------------------------------------------------------------------


def test_testbeds_bring_their_tasks():
    assert tasks.own("testbed:recall", "some/model") == ["recall"]
    assert tasks.own("some/model", "testbed:vlm") == ["mosaic"]
    assert tasks.own("testbed:lm", None) == []


def test_built_in_tasks_are_paired(checkpoint_folder, text_file, monkeypatch):
    answers = {"0": np.array([1.0, 1, 1, 0] * 10), "1": np.array([1.0, 0, 0, 0] * 10)}
    seeds = {str(checkpoint_folder(seed=0)): "0", str(checkpoint_folder(seed=1)): "1"}
    monkeypatch.setattr(tasks, "ask", lambda task, model, questions: answers[seeds[model.source]])
    record = run(checkpoint_folder(seed=0), checkpoint_folder(seed=1), data=text_file, tasks=["recall"])
    score = record.scores[2]
    assert score.name == "recall"
    assert (score.before.mean, score.after.mean) == (0.25, 0.75)
    assert 0 < score.difference.low < 0.5 < score.difference.high


def test_recall_needs_room_for_a_question(checkpoint_folder, monkeypatch):
    from paredown import testbeds

    monkeypatch.setattr(testbeds, "heldout_texts", lambda name: ["w1 w2"])
    with pytest.raises(UsageError, match="recall cannot be put to"):
        tasks.ask("recall", evaluation.load_any(checkpoint_folder(seed=0)), questions=4)


def test_mosaic_needs_a_processor(checkpoint_folder):
    with pytest.raises(UsageError, match="image processor"):
        tasks.ask("mosaic", evaluation.load_any(checkpoint_folder(seed=0)), questions=4)


def test_foreign_tasks_need_the_extra(checkpoint_folder, text_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match=r"paredown\[eval\]"):
        run(checkpoint_folder(seed=0), data=text_file, tasks=["arc_easy"])


def fake_lm_eval(monkeypatch, samples):
    """Put a stand-in for lm-eval in place that answers for each model from ``samples``, in the order of calls."""
    queue = list(samples)

    def simple_evaluate(**_):
        found = queue.pop(0)
        if isinstance(found, Exception):
            raise found
        return {"samples": found}

    package, inner, leaf = ModuleType("lm_eval"), ModuleType("lm_eval.models"), ModuleType("lm_eval.models.huggingface")
    package.simple_evaluate = simple_evaluate
    leaf.HFLM = lambda **_: SimpleNamespace()
    for module in (package, inner, leaf):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def sample(doc, acc):
    return {"doc_id": doc, "filter": "none", "metrics": ["acc", "bleu"], "acc": acc, "bleu": ["no", "number"]}


def test_foreign_tasks_are_paired_by_question(checkpoint_folder, text_file, monkeypatch):
    ours = {"arc": [sample(doc, 1.0) for doc in range(20)]}
    theirs = {"arc": [sample(doc, float(doc % 2)) for doc in reversed(range(1, 20))]}
    fake_lm_eval(monkeypatch, [ours, theirs])
    record = run(checkpoint_folder(seed=0), checkpoint_folder(seed=1), data=text_file, tasks=["arc"])
    score = record.scores[2]
    assert score.name == "arc acc"
    assert score.after.n == score.before.n == 19  # question 0 was put to one model only
    assert score.difference.mean == pytest.approx(9 / 19)
    assert len(record.scores) == 3


def test_a_task_that_fails_is_one_sentence(checkpoint_folder, text_file, monkeypatch):
    fake_lm_eval(monkeypatch, [ValueError("Tasks not found: foo.\nmore")])
    with pytest.raises(DataError, match=r"lm-eval could not run foo \(Tasks not found: foo\)"):
        run(checkpoint_folder(seed=0), data=text_file, tasks=["foo"])


# --- cost -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_cost_of_a_pair(checkpoint_folder, text_file):
    ours, theirs = checkpoint_folder(seed=0, layers=1), checkpoint_folder(seed=0, layers=8)
    record = run(ours, theirs, data=text_file, cost=True, repetitions=3)
    for side in (record.model, record.against):
        used = side.memory
        assert 50e6 < used.baseline_bytes < used.steady_bytes <= used.peak_bytes < 4e9
        assert (side.prefill.tokens, side.decode.tokens) == (32, 32)
        assert len(side.prefill.seconds) == len(side.decode.seconds) == 3
        assert side.decode.tokens_per_second == pytest.approx(32 / side.decode.median_seconds)
    assert record.decode_ratio.low <= record.decode_ratio.median <= record.decode_ratio.high
    assert record.decode_ratio.median < 0.7  # an eighth of the layers
    assert record.decode_ratio.n == 3


def test_models_are_timed_in_turns_after_one_run_that_does_not_count(two, ids, monkeypatch):
    order = []

    def once(hf, prompt, decode):
        order.append(two.index(hf))
        assert prompt.shape == (1, 20)
        assert decode == 4
        return (100.0, 100.0) if len(order) <= 2 else (1.0 + len(order), 2.0)

    monkeypatch.setattr(measure, "_once", once)
    (first, _), (second, decode) = measure.speed(two, ids, prefill=20, decode=4, repetitions=3)
    assert order == [0, 1] * 4
    assert first.seconds == [4.0, 6.0, 8.0]
    assert (second.median_seconds, second.tokens_per_second) == (7.0, pytest.approx(20 / 7))
    ratio = measure.ratio(second, first)
    assert (ratio.low, ratio.median, ratio.high) == pytest.approx((9 / 8, 7 / 6, 5 / 4))
    assert decode.tokens == 4


def test_decoding_goes_on_where_the_prompt_ended(two):
    seen = []
    two[0].register_forward_pre_hook(lambda _, __, given: seen.append(given["input_ids"].shape[1]), with_kwargs=True)
    measure._once(two[0], torch.arange(10)[None], 5)
    assert seen == [10, 1, 1, 1, 1, 1]


def test_memory_of_a_model_that_does_not_load_is_one_sentence(tmp_path, monkeypatch):
    def fail(command, **_):
        assert command[3] == str(tmp_path / "nothing")
        return SimpleNamespace(returncode=1, stdout="", stderr="Traceback\nModelNotFoundError: there is nothing.\n")

    monkeypatch.setattr(measure.subprocess, "run", fail)
    with pytest.raises(CheckpointError, match=r"\(ModelNotFoundError: there is nothing\)") as caught:
        measure.memory(tmp_path / "nothing")
    assert "\n" not in str(caught.value)
