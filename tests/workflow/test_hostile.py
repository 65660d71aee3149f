"""What a user, or whoever wrote the files that a user was given, can do wrong: one sentence, exit code 1, no trace."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file
from tiny import last_sentence, sentence, spoilt, tree, write_recipe

STEP = ("--method", "random-experts", "--keep", "0.5")
SINGLE = "model.safetensors"


@pytest.fixture
def place(tmp_path):
    """Where the output would go; nothing else lies there."""
    folder = tmp_path / "place"
    folder.mkdir()
    return folder


@pytest.fixture
def refused(warm, text_file, place):
    """Run, and return the one sentence, having seen that nothing changed in the place or the model's folder."""

    def call(model, *words, code=1, told=sentence, method=STEP, data=text_file, out="smaller", plant=None):
        folder = Path(model) if not isinstance(model, str) else None
        before = tree(folder) if folder is not None and folder.is_dir() else {}
        data = ("--data", data) if data is not None else ()
        ended = warm.run("run", model, *method, *data, "--out", place / out, "--gate", "none", *words, plant=plant)
        said = told(ended, code)
        assert list(place.iterdir()) == []
        if before:
            assert tree(folder) == before
        return said

    return call


@pytest.fixture
def broken(moe_folder, tmp_path):
    """Return a copy of the model after something was done to it."""
    return lambda spoil: spoilt(moe_folder, tmp_path / "broken", spoil)


# --- models that are not there ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "~nobody/model", "a" * 300, "a/b/c", "nul\0byte", ""])
def test_missing_folder(warm, place, name):
    if "\0" in name:
        pytest.skip("no shell can pass it") if os.name == "nt" else None
    said = sentence(warm.run("run", name, *STEP, "--out", place / "smaller"))
    assert list(place.iterdir()) == []
    assert "folder" in said or "model" in said


@pytest.mark.parametrize("name", ["testbed:../x", "testbed:..", "testbed:nope", "testbed:", "testbed:moe/../moe"])
def test_testbeds_have_names_not_paths(refused, name):
    assert "there is no testbed" in refused(name)


@pytest.mark.parametrize("name", ["../x", "org/../x", "..", "org/..", "a--b/..c", "../../etc/passwd"])
def test_names_with_dots_are_no_hub_ids(refused, name):
    said = refused(name)
    assert "there is no folder" in said or "config.json" in said or "is a file" in said


def test_hub_id_that_cannot_be_reached(refused):
    assert "the hub did not give a model of that name" in refused("some-org/some-model")


def test_a_file_is_no_model(refused, moe_folder):
    assert "is a file, not a checkpoint folder" in refused(moe_folder / SINGLE)


# --- weights ---------------------------------------------------------------------------------------------------------


def header(change):
    """Return what rewrites a safetensors header and leaves the data alone."""

    def spoil(folder):
        raw = (folder / SINGLE).read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        entries = json.loads(raw[8 : 8 + length])
        changed = change(entries)
        text = changed if isinstance(changed, bytes) else json.dumps(entries).encode()
        (folder / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])

    return spoil


def weights(change):
    """Return what rewrites tensors."""

    def spoil(folder):
        tensors = load_file(folder / SINGLE)
        tensors = change(tensors) or tensors
        save_file(tensors, folder / SINGLE, metadata={"format": "pt"})

    return spoil


def sharded(change):
    """Return what cuts the weights in two shards with an index, and then changes the index."""

    def spoil(folder):
        tensors = load_file(folder / SINGLE)
        (folder / SINGLE).unlink()
        index = {}
        for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), start=1):
            file = f"model-{number:05d}-of-00002.safetensors"
            save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
            index |= dict.fromkeys(names, file)
        change(folder, index)
        (folder / f"{SINGLE}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))

    return spoil


@pytest.mark.parametrize("cut", [1, 1000, -9, -4, 8])
def test_truncated(refused, broken, cut):
    # Positive: so many bytes are missing at the end; negative: so many are left.
    model = broken(lambda folder: (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[: -cut or None]))
    assert "copy or download it again" in refused(model)


def test_empty_weight_file(refused, broken):
    assert "is cut short or not a safetensors file" in refused(broken(lambda f: (f / SINGLE).write_bytes(b"")))


class _Bomb:
    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "model.ckpt"])
def test_pickled_weights_are_refused_and_never_opened(refused, broken, tmp_path, name):
    def spoil(folder):
        (folder / SINGLE).unlink()
        (folder / name).write_bytes(pickle.dumps(_Bomb(tmp_path / "exploded")))

    said = refused(broken(spoil))
    assert f"holds only pickled weights ({name})" in said
    assert "convert them to safetensors" in said
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers(refused, broken, value):
    name = "model.layers.2.self_attn.q_proj.weight"

    def change(tensors):
        tensors[name][3, 4] = value

    said = refused(broken(weights(change)), told=last_sentence)
    assert f"{name} in " in said
    assert "1 values that are not finite numbers" in said


def first_norm(entries):
    return entries[next(name for name in entries if name.endswith("layernorm.weight"))]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda e: first_norm(e).update(shape=[33]), "a shape at odds with its size"),
        (lambda e: first_norm(e).update(shape=[32.0]), "is damaged"),
        (lambda e: first_norm(e).update(shape=[float("inf")]), "is damaged"),
        (lambda e: first_norm(e).update(shape=[-32]), "is damaged"),
        (lambda e: first_norm(e).update(shape=[10**30]), "a shape at odds with its size"),
        (lambda e: first_norm(e).update(shape="32"), "is damaged"),
        (lambda e: first_norm(e).update(dtype="F7"), "a shape at odds with its size"),
        (lambda e: first_norm(e).update(data_offsets=[0, 10**15]), "a shape at odds with its size"),
        (lambda e: first_norm(e).update(data_offsets=[-128, 0]), "is damaged"),
        (lambda e: first_norm(e).update(data_offsets=[0, 128]), "over other tensors"),
        (lambda e: e.update(extra={"dtype": "F32", "shape": [32], "data_offsets": [0, 128]}), "over other tensors"),
        (lambda e: e.pop(next(n for n in e if n.endswith("layernorm.weight"))) and None, "behind a gap"),
        (lambda e: e.update(__metadata__=3), "is damaged"),
        (lambda e: (json.dumps(e)[:-1] + ', "lm_head.weight": {}}').encode(), "is damaged"),
        (lambda e: b"[]", "is damaged"),
        (lambda e: b"{", "is damaged"),
        (lambda e: b"[" * 100_000, "is damaged"),
        (lambda e: b"\xff\xfe", "is damaged"),
        (lambda e: b"{}", "is cut short or has bytes left over"),
    ],
)
def test_headers_that_lie(refused, broken, change, said):
    assert said in refused(broken(header(change)))


def test_header_longer_than_the_file(refused, broken):
    model = broken(lambda f: (f / SINGLE).write_bytes(struct.pack("<Q", 1 << 62) + b"{}"))
    assert "is cut short or not a safetensors file" in refused(model)


def test_index_that_points_outside(refused, broken, moe_folder):
    def outside(folder, index):
        shutil.copy(moe_folder / SINGLE, folder.parent / "other.safetensors")
        index["lm_head.weight"] = "../other.safetensors"

    assert "outside the checkpoint; do not trust it" in refused(broken(sharded(outside)))


@pytest.mark.parametrize("name", ["/etc/passwd", "..", "sub/x.safetensors", "x.bin", ""])
def test_index_that_points_to_what_is_no_shard(refused, broken, name):
    said = refused(broken(sharded(lambda folder, index: index.update({"lm_head.weight": name}))))
    assert "outside the checkpoint" in said


def test_index_of_a_shard_that_is_missing(refused, broken):
    said = refused(broken(sharded(lambda f, i: (f / "model-00002-of-00002.safetensors").unlink())))
    assert "the shard model-00002-of-00002.safetensors" in said


def test_index_that_promises_what_no_shard_holds(refused, broken):
    said = refused(broken(sharded(lambda f, i: i.update({"model.more.weight": "model-00001-of-00002.safetensors"}))))
    assert "says that 'model.more.weight' is in" in said


def test_tensors_that_stand_in_two_shards(refused, broken):
    def double(folder, index):
        extra = load_file(folder / "model-00001-of-00002.safetensors")
        other = load_file(folder / "model-00002-of-00002.safetensors")
        name = sorted(extra)[0]
        save_file({**other, name: extra[name]}, folder / "model-00002-of-00002.safetensors", metadata={"format": "pt"})

    assert "twice" in refused(broken(sharded(double)))


@pytest.mark.parametrize("index", ["[]", "{", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": {}}'])
def test_index_that_is_none(refused, broken, index):
    def spoil(folder):
        (folder / SINGLE).unlink()
        (folder / f"{SINGLE}.index.json").write_text(index)

    assert "broken" in refused(broken(spoil))


def test_weights_that_may_not_be_read(refused, broken):
    # Root may read everything, so the operating system is played.
    assert "see to its permissions" in refused(broken(lambda f: None), plant="plants:weights_unreadable")


def test_no_weights(refused, broken):
    assert f"holds no {SINGLE}" in refused(broken(lambda f: (f / SINGLE).unlink()))


# --- config ----------------------------------------------------------------------------------------------------------


def config(**changes):
    """Return what changes keys of config.json."""

    def spoil(folder):
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, **changes}))

    return spoil


@pytest.mark.parametrize(
    "lie",
    [
        {"hidden_size": 64},
        {"num_attention_heads": 8},
        {"num_key_value_heads": 4},
        {"vocab_size": 1000},
        {"vocab_size": 0},
        {"moe_intermediate_size": 17},
        {"num_hidden_layers": 5},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": 10**9},
        {"num_attention_heads": 0},
        {"head_dim": 7},
        {"hidden_size": -32},
        {"hidden_size": "32"},
        {"hidden_size": 10**15},
        {"num_experts_per_tok": 0},
        {"mlp_only_layers": []},
        {"tie_word_embeddings": True},
        {"hidden_act": "no-such"},
        {"rope_parameters": {"rope_type": "no-such"}},
        {"dtype": "float3"},
        {"model_type": "llama"},
        {"model_type": "bert"},
        {"model_type": "no-such"},
        {"model_type": 3},
        {"model_type": None},
        {"per_layer_config": [1]},
        {"per_layer_config": {"0": {"num_experts": 99}}},
        {"per_layer_config": {"77": {"skip": ["attention"]}}},
        {"quantization_config": {"quant_method": "gptq"}},
    ],
    ids=str,
)
def test_config_that_lies(refused, broken, lie):
    def spoil(folder):
        config(**lie)(folder)
        if "num_experts" in json.dumps(lie):
            config(num_local_experts=8)(folder)

    refused(broken(spoil))


@pytest.mark.parametrize("text", ["[]", "3", "null", "", "{", "not json", "\xff", "[" * 100_000, "{}"])
def test_config_that_is_none(refused, broken, text):
    assert "config.json" in refused(broken(lambda f: (f / "config.json").write_text(text, encoding="latin-1")))


def test_config_missing(refused, broken):
    assert "has no config.json" in refused(broken(lambda f: (f / "config.json").unlink()))


def test_config_that_is_a_folder(refused, broken):
    def spoil(folder):
        (folder / "config.json").unlink()
        (folder / "config.json").mkdir()

    assert "config.json cannot be read" in refused(broken(spoil))


@pytest.mark.parametrize("model_type", ["exotic", "qwen3_moe"])
def test_remote_code_never_runs(warm, broken, text_file, place, tmp_path, model_type):
    mark = tmp_path / "it-ran"

    def spoil(folder):
        for module in ("configuration_exotic", "modeling_exotic", "tokenization_exotic", "processing_exotic"):
            (folder / f"{module}.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Exotic: pass\n")
        names = {"AutoConfig": "configuration_exotic.Exotic", "AutoModelForCausalLM": "modeling_exotic.Exotic"}
        config(model_type=model_type, auto_map=names)(folder)
        for file, key in (("tokenizer_config.json", "AutoTokenizer"), ("processor_config.json", "AutoProcessor")):
            known = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
            known["auto_map"] = {key: "tokenization_exotic.Exotic"}
            if key == "AutoTokenizer":
                known["auto_map"] = {key: ["tokenization_exotic.Exotic", None]}
            (folder / file).write_text(json.dumps(known))

    model = broken(spoil)
    ended = warm.run("run", model, *STEP, "--data", text_file, "--out", place / "smaller", "--gate", "none")
    assert not mark.exists()
    assert not (model / "__pycache__").exists()
    if model_type == "exotic":
        assert "remote code is not run" in sentence(ended)
        assert list(place.iterdir()) == []
    else:
        # transformers has the architecture: its own code is used, the other is neither run nor passed on.
        assert ended.code in (0, 1)
        assert not list(place.rglob("*.py"))


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_generation_config_broken(refused, broken, text):
    assert "generation_config.json" in refused(broken(lambda f: (f / "generation_config.json").write_text(text)))


# --- tokenizer -------------------------------------------------------------------------------------------------------


def test_tokenizer_missing(refused, broken):
    def spoil(folder):
        for file in folder.glob("tokenizer*"):
            file.unlink()

    assert "has no tokenizer" in refused(broken(spoil))


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["{", "[]", "", '{"model": 3}'])
def test_tokenizer_broken(refused, broken, file, text):
    model = broken(lambda f: (f / file).write_text(text))
    if file == "tokenizer_config.json" and text.endswith("}"):
        pytest.skip("that is a legal one, without any field that is known")
    assert "tokenizer" in refused(model)


def test_tokenizer_of_another_model(refused, broken, moe_folder):
    def spoil(folder):
        content = json.loads((folder / "tokenizer.json").read_text())
        content["model"]["vocab"] = {word: i + 500 for word, i in content["model"]["vocab"].items()}
        (folder / "tokenizer.json").write_text(json.dumps(content))

    assert "tokenizer" in refused(broken(spoil))


# --- data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "\n\n \n"])
def test_empty_data(refused, moe_folder, tmp_path, text):
    (tmp_path / "empty.txt").write_text(text)
    assert "holds no text" in refused(moe_folder, data=tmp_path / "empty.txt")


def test_tiny_data(refused, moe_folder, tmp_path):
    (tmp_path / "tiny.txt").write_text("w1 w2 w3 w4 w5 w6\n")
    assert "give more text or shorter rows" in refused(moe_folder, data=tmp_path / "tiny.txt")


@pytest.mark.parametrize("line", ["{", "[]", '{"no": "text"}', '{"text": 3}', "[" * 100_000])
def test_broken_lines(refused, moe_folder, tmp_path, line):
    (tmp_path / "lines.jsonl").write_text('{"text": "w1 w2"}\n' + line + "\n")
    assert "line 2 of" in refused(moe_folder, data=tmp_path / "lines.jsonl")


def test_missing_data(refused, moe_folder):
    assert "no file or folder" in refused(moe_folder, data="/nowhere/texts.jsonl")
    assert "pass --data" in refused(moe_folder, data=None, method=("--method", "dern", "--keep", "0.5"))


# --- recipes ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(warm, place, moe_folder, text_file, tmp_path):
    """Write a recipe, run it, and return the one sentence."""

    def call(content, code=1):
        file = tmp_path / "recipe.yaml"
        if isinstance(content, str):
            file.write_text(content)
        else:
            whole = {"model": str(moe_folder), "steps": [{"method": "dern"}], "data": {"calibration": str(text_file)}}
            file.write_text(yaml.safe_dump({**whole, **content}))
        said = sentence(warm.run("run", file, "--out", place / "smaller"), code)
        assert list(place.iterdir()) == []
        return said

    return call


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"stepz": []}, "unknown key 'stepz'; the keys here are model, steps"),
        ({"data": {"calibratoin": "x"}}, "unknown key 'data.calibratoin'; the keys here are calibration"),
        ({"steps": [{"method": "dern", "alpa": 1}]}, "dern has no field 'alpa'; its fields are: alpha"),
        ({"steps": [{"method": "dern", "name": "x"}]}, "dern has no field 'name'"),
        ({"steps": [{"method": "dern", "fields": 3}]}, "dern has no field 'fields'"),
        ({"steps": [{"method": "dern", 3: 4}]}, "3"),
        ({3: 4}, "3"),
        ({"model": 3}, "model=3 will not do"),
        ({"model": ""}, "model='' will not do"),
        ({"model": ["a"]}, "will not do"),
        ({"steps": []}, "steps=[] will not do"),
        ({"steps": "dern"}, "steps='dern' will not do"),
        ({"steps": ["dern"]}, "will not do"),
        ({"steps": [{"method": ["dern"]}]}, "will not do"),
        ({"steps": [{"keep": 0.5}]}, "steps.0.method"),
        ({"steps": [{"method": "dern", "seed": i} for i in range(65)]}, "steps"),
        ({"steps": None}, "steps=None will not do"),
        ({"data": 3}, "data=3 will not do"),
        ({"data": {"sequences": 0}}, "data.sequences=0 will not do"),
        ({"data": {"sequences": "many"}}, "data.sequences='many' will not do"),
        ({"data": {"length": 1.5}}, "data.length=1.5 will not do"),
        ({"seed": -1}, "seed=-1 will not do"),
        ({"seed": "2026-01-01"}, "will not do"),
        ({"seed": 10**30}, "will not do"),
        ({"steps": [{"method": "dern", "keep": 0}]}, "dern: keep=0 will not do"),
        ({"steps": [{"method": "dern", "keep": 1.5}]}, "dern: keep=1.5 will not do"),
        ({"steps": [{"method": "dern", "keep": float("nan")}]}, "dern: keep=nan will not do"),
        ({"steps": [{"method": "dern", "keep": float("inf")}]}, "dern: keep=inf will not do"),
        ({"steps": [{"method": "dern", "keep": "half"}]}, "dern: keep='half' will not do"),
        ({"steps": [{"method": "dern", "keep": None}]}, "dern: keep=None will not do"),
        ({"steps": [{"method": "dern", "alpha": [1]}]}, "dern: alpha=[1] will not do"),
        ({"steps": [{"method": "llm-drop", "part": "head"}]}, "llm-drop: part='head' will not do"),
    ],
    ids=str,
)
def test_recipes_that_hold_what_they_must_not(recipe, content, said):
    assert said in recipe(content)


def test_unknown_method_and_gate(recipe):
    assert "there is no method called 'dren'; did you mean dern" in recipe({"steps": [{"method": "dren"}]}, 2)
    assert "the gate 'best' is not one of" in recipe({"gate": "best"}, 2)


BILLION_LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("!!python/object/apply:os.system ['touch EXPLODED']", "could not determine a constructor for the tag"),
        ("model: !!python/name:os.system\nsteps: []\n", "could not determine a constructor for the tag"),
        ("model: !!python/object/new:os.system [x]\n", "could not determine a constructor for the tag"),
        ("model: !mine x\n", "could not determine a constructor for the tag"),
        (BILLION_LAUGHS, "anchors and aliases are not read"),
        ("model: &m x\nsteps: *m\n", "anchors and aliases are not read"),
        ("model: x\n<<: {seed: 3}\nsteps: &s [*s]\n", "anchors and aliases are not read"),
        ("[" * 100_000, "nested too deeply"),
        ("{a: " * 50_000, "nested too deeply"),
        ("model: [", "line"),
        ("model: x\n\tsteps: 3", "line"),
        ("", "must hold the keys model and steps"),
        ("- a\n- b\n", "not a list"),
        ("just words", "not a str"),
        ("model: a\nmodel: b\nsteps: [{method: dern}]\n", "model"),
        ("a: b\x00c", "cannot be read"),
        ("seed: " + "9" * 5000, "illegal value"),
    ],
    ids=lambda text: text[:40],
)
def test_yaml_that_is_not_data(recipe, text, said, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert said in recipe(text)
    assert not (tmp_path / "EXPLODED").exists()


def test_huge_recipe(recipe):
    assert "larger than a megabyte" in recipe("# " + "x" * (1 << 20) + "\n")


def test_recipes_that_are_no_text(warm, place, tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "folder.yaml").mkdir()
    for name in ("binary.yaml", "folder.yaml"):
        assert "cannot be read" in sentence(warm.run("run", tmp_path / name, "--out", place / "smaller"))
    assert "there is no recipe" in sentence(warm.run("run", tmp_path / "none.yaml", "--out", place / "smaller"))
    assert list(place.iterdir()) == []


# --- budgets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["0", "1.5", "nan", "-1", "inf"])
def test_keep(refused, moe_folder, keep):
    assert "keep" in refused(moe_folder, method=("--method", "dern", "--keep", keep))


def test_fewer_experts_than_top_k(refused, moe_folder):
    said = refused(moe_folder, method=("--method", "dern", "--keep", "0.1"))
    assert "leaves 1 of 8 experts, but the router chooses 2" in said


def test_a_keep_that_removes_nothing(refused, moe_folder):
    assert "removes nothing" in refused(moe_folder, method=("--method", "dern", "--keep", "0.99"))


def test_nothing_of_the_kind_to_remove(refused, checkpoint_folder):
    assert "removes experts" in refused(checkpoint_folder())


# --- outputs ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(warm, moe_folder, text_file, tmp_path):
    """Run with some ``--out``; nothing may change below the test's folder. Returns the one sentence."""

    def call(out, *words, plant=None, cwd=None):
        before = tree(tmp_path)
        ended = warm.run(
            "run", moe_folder, *STEP, "--data", text_file, "--gate", "none", "--out", out, *words, plant=plant
        )
        said = sentence(ended)
        assert tree(tmp_path) == before
        return said

    return call


def test_output_exists(run, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "precious.txt").write_text("mine")
    assert "exists already" in run(tmp_path / "there")


@pytest.mark.parametrize("words", [[], ["--force"]])
def test_output_is_a_file(run, tmp_path, words):
    (tmp_path / "file").write_text("mine")
    assert "is a file" in run(tmp_path / "file", *words)


def test_output_below_a_file(run, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "is not a folder" in run(tmp_path / "file" / "smaller")


def test_output_below_nothing(run, tmp_path):
    assert "make it first" in run(tmp_path / "nowhere" / "smaller")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc here")
def test_output_where_nobody_may_write(run):
    assert "cannot be written" in run("/proc/smaller")


def test_output_where_this_user_may_not_write(run, tmp_path):
    assert "cannot be written" in run(tmp_path / "smaller", plant="plants:unwritable")


@pytest.mark.parametrize("out", ["..", ".", "/", "", "sub/.."])
def test_output_without_a_name(run, out):
    assert "names no folder of its own" in run(out)


@pytest.mark.parametrize("out", ["a" * 300, "a" * 250, "~nobody/x"])
def test_output_with_an_impossible_name(run, tmp_path, out):
    said = run(out if out.startswith("~") else tmp_path / out)
    assert "choose another --out" in said or "make it first" in said


def test_force_does_not_replace_what_the_run_reads(warm, moe_folder, text_file, tmp_path):
    model = tmp_path / "all" / "model"
    shutil.copytree(moe_folder, model)
    before = tree(tmp_path)
    for out in (model, tmp_path / "all"):
        ended = warm.run("run", model, *STEP, "--data", text_file, "--gate", "none", "--out", out, "--force")
        assert "which the run needs" in sentence(ended)
    data = tmp_path / "all" / "texts.jsonl"
    shutil.copy(text_file, data)
    before = tree(tmp_path)
    ended = warm.run("run", moe_folder, *STEP, "--data", data, "--gate", "none", "--out", tmp_path / "all", "--force")
    assert "which the run needs" in sentence(ended)
    assert tree(tmp_path) == before


def test_a_folder_of_the_journals_name_that_is_none(run, tmp_path):
    (tmp_path / "smaller.partial").mkdir()
    (tmp_path / "smaller.partial" / "precious.txt").write_text("mine")
    assert "it holds something else" in run(tmp_path / "smaller")
    assert "it holds something else" in run(tmp_path / "smaller", "--resume")
    assert "it holds something else" in run(tmp_path / "smaller", "--force")


def test_a_model_that_is_called_like_the_journal(warm, moe_folder, text_file, tmp_path):
    model = tmp_path / "smaller.partial"
    shutil.copytree(moe_folder, model)
    before = tree(tmp_path)
    ended = warm.run("run", model, *STEP, "--data", text_file, "--gate", "none", "--out", tmp_path / "smaller")
    assert "it holds something else" in sentence(ended)
    assert tree(tmp_path) == before


# --- the same in a real process, as a shell would start it -----------------------------------------------------------


@pytest.mark.slow
def test_from_the_shell(moe_folder, text_file, tmp_path):
    nan = spoilt(
        moe_folder, tmp_path / "nan", weights(lambda t: t["lm_head.weight"].fill_(float("nan"))[:0].tolist() or None)
    )
    recipe = write_recipe(tmp_path / "recipe.yaml", nan, text_file, {"method": "dern", "keep": 0.5, "alpa": 3})
    (tmp_path / "out").mkdir()
    out = ["--out", str(tmp_path / "out" / "smaller")]
    calls = {
        "not finite numbers": [str(nan), *STEP, "--data", str(text_file), *out],
        "has no field 'alpa'": [str(recipe), *out],
    }
    for said, words in calls.items():
        done = subprocess.run(
            [sys.executable, "-m", "paredown", "run", *words], capture_output=True, text=True, check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 1
        assert done.stdout == ""
        assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == done.stderr.splitlines()[
            -1:
        ]
        assert said in done.stderr
        assert "Traceback" not in done.stderr
        assert "Warning" not in done.stderr
        assert list((tmp_path / "out").iterdir()) == []
