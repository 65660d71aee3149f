"""The catalogue: true, quick, and helpful where a name or a field is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from paredown import registry
from paredown.core.method import Compressor, Policy, Probe, TrainingMethod
from paredown.errors import RecipeError, UsageError

PLUGIN = '''
from paredown.core.method import Compressor, Policy, register


@register
class Shave(Compressor):
    """Shaves a little off. Really.

    A second paragraph that is no summary.
    """

    name = {name!r}
    title = "Shaving"
    axis = "width"
    unit = "hairs"
    depth: int = 3
'''


KINDS = {"compressor": Compressor, "policy": Policy, "probe": Probe, "training": TrainingMethod}


def test_the_catalogue_is_what_the_classes_say():
    file = Path(registry.__file__).parent / "methods" / "catalogue.json"
    assert file.read_text(encoding="utf-8") == registry.write(), "run `python -m paredown.registry`"


def test_every_entry_leads_to_its_class():
    for entry in registry.entries():
        cls = registry.get(entry.name)
        assert (cls.name, cls.axis, cls.kind, cls.unit) == (entry.name, entry.axis, entry.kind, entry.unit)
        assert {f.name for f in entry.fields} == set(cls.model_fields)
        assert all(f.description.endswith(".") for f in entry.fields), f"{entry.name}: describe each field"
        assert entry.summary.endswith(".")
        # Healing is the house's own step and has no paper.
        assert entry.arxiv is not None or entry.control or getattr(cls, "trains_always", False)
        assert issubclass(cls, KINDS[entry.kind])


def test_every_unit_has_a_random_control():
    for entry in registry.entries():
        if entry.kind in ("compressor", "policy") and not getattr(registry.get(entry.name), "trains_always", False):
            control = registry.entry(registry.control_for(entry.name))
            assert control.control
            assert control.unit == entry.unit


def test_entries_need_no_torch():
    code = (
        "import sys, paredown.registry as r; e = r.entries(); r.entry('dern'); "
        "bad = {'torch', 'transformers', 'numpy'} & set(sys.modules); sys.exit(f'{bad}' if bad or not e else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_a_wrong_name_is_answered_with_near_ones():
    with pytest.raises(UsageError, match=r"^there is no method called 'dren'; did you mean dern.*\.$"):
        registry.entry("dren")
    with pytest.raises(UsageError, match="`paredown methods` lists them"):
        registry.entry("qqqqqqq")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep": 1.5}, "dern: keep=1.5 will not do: input should be less than or equal to 1."),
        ({"keep": 0}, "dern: keep=0 will not do: input should be greater than 0."),
        ({"keep": float("nan")}, "dern: keep=nan will not do"),
        ({"keep": "much"}, "dern: keep='much' will not do"),
        ({"kep": 0.5}, "dern has no field 'kep'; its fields are: alpha, iterations, keep, lower_top_k, tolerance."),
        ({"alpha": -2}, "dern: alpha=-2 will not do"),
        ({"iterations": 1.5}, "dern: iterations=1.5 will not do"),
    ],
)
def test_a_wrong_field_is_one_sentence(fields, message):
    with pytest.raises(RecipeError) as caught:
        registry.create("dern", **fields)
    text = str(caught.value)
    assert message in text
    assert text.endswith(".")
    assert "\n" not in text
    assert "pydantic" not in text


def test_methods_cannot_be_changed():
    made = registry.create("dern", keep=0.5)
    with pytest.raises(ValueError, match="frozen"):
        made.keep = 0.6


@pytest.fixture
def plugin(tmp_path):
    """Install a distribution on a path of its own and look at the registry in a fresh process."""

    def look(source: str, code: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "paredown_shave.py").write_text(source, encoding="utf-8")
        info = tmp_path / "paredown_shave-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: paredown-shave\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[paredown.methods]\nshave = paredown_shave\n")
        start = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nfrom paredown import registry, errors\n"
        return subprocess.run(
            [sys.executable, "-c", start + code], capture_output=True, text=True, timeout=120, check=False
        )

    return look


def test_a_plugin_adds_methods(plugin):
    done = plugin(
        PLUGIN.format(name="shave"),
        "import json; e = registry.entry('shave'); made = registry.create('shave', keep=0.5, depth=2)\n"
        "print(json.dumps([e.summary, e.module, made.depth, len(registry.entries())]))",
    )
    assert done.returncode == 0, done.stderr
    summary, module, depth, count = json.loads(done.stdout)
    assert summary == "Shaves a little off. Really."
    assert (module, depth, count) == ("paredown_shave", 2, len(registry.entries()) + 1)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import nothing_of_this_name", "the plugin paredown_shave cannot be used (No module named"),
        (PLUGIN.format(name="dern"), "the plugin paredown_shave calls a method 'dern', which Paredown has itself"),
    ],
    ids=["broken", "clash"],
)
def test_a_plugin_that_cannot_be_used_is_named(plugin, source, message):
    done = plugin(source, "try:\n    registry.entries()\nexcept errors.UsageError as error:\n    print(error)")
    assert message in done.stdout, done.stderr
    assert done.stdout.count("\n") == 1
