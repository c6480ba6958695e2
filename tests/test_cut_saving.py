"""Models whose weights were cut, saved and opened: with this package, without it, and as plain models of transformers."""

import json

import pytest
import torch
import transformers as hf
from families import FAMILIES, build, make_inputs, outputs_of
from other_process import run_without_package
from test_saving import outputs_as_given
from test_shapes import CUTS, HEAD, IMAGES, TOKENS, assert_close, cut_model, half, samplers
from training_helpers import at_home
from transformers.utils import logging

import hf_tokenprune as tp
from hf_tokenprune.modeling.sizes import sizes_of

SAVED = {
    f"{name} {head} {what}{'' if sites is dict else ' ' + sites.__name__}": (name, head, what, sites)
    for name, head, what, sites in (
        ("bert", HEAD, "mixed", dict),
        ("bert", HEAD, "mixed", half),
        ("bert", TOKENS, "mixed", samplers),
        ("bert", HEAD, "a layer", half),
        ("bert", "ForMaskedLM", "mixed", dict),
        ("electra", "Model", "mixed", dict),
        ("esm", TOKENS, "a layer", dict),
        ("distilbert", "ForQuestionAnswering", "mixed", half),
        ("distilbert", HEAD, "heads and hidden", dict),
        ("modernbert", "ForMaskedLM", "mixed", dict),
        ("modernbert", HEAD, "the first layer", dict),
        ("modernbert", HEAD, "a layer", dict),
        ("nomic_bert", TOKENS, "mixed", half),
        ("eurobert", HEAD, "heads of groups", half),
        ("vit", IMAGES, "mixed", half),
        ("vit", IMAGES, "heads", dict),
        ("dinov2", "Model", "mixed", dict),
        ("dinov2", IMAGES, "a layer", dict),
        ("siglip", IMAGES, "heads and units", dict),
        ("siglip", IMAGES, "units", half),
    )
}
OPEN = """
for name, files in json.load(open(f"{root}/table.json")).items():
    @report(name)
    def _():
        inputs, expected = (torch.load(f"{root}/{files}.{part}") for part in ("inputs", "expected"))
        model = load(f"{root}/{files}")
        return {"class": type(model).__qualname__, "same": same(logits(model, inputs), expected)}

reports["imports"] = [name for name in sys.modules if name.split(".")[0] == "hf_tokenprune"]
json.dump(reports, open(f"{root}/reports.json", "w"))
"""


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """Every model of the table, saved here, opened in a process that cannot import this package: what it reports."""
    root = tmp_path_factory.mktemp("outside")
    table = {name: f"row{number}" for number, name in enumerate(SAVED)}
    for name, files in table.items():
        family, head, what, sites = SAVED[name]
        model, inputs = cut_model(family, head, what, sites()), make_inputs(family, head)
        model.save_pretrained(root / files)
        torch.save(inputs, root / f"{files}.inputs")
        torch.save(outputs_as_given(at_home(model), inputs), root / f"{files}.expected")
    (root / "table.json").write_text(json.dumps(table))
    return run_without_package(root, OPEN)


@pytest.mark.parametrize("name", SAVED)
def test_a_saved_cut_model_opens_without_this_package_to_the_same_logits(outside, name):
    family, head, *_ = SAVED[name]
    assert outside[name] == {"class": f"TokenPruned{FAMILIES[family].stem}{head}", "same": True}
    assert outside["imports"] == ["hf_tokenprune"], "the None that keeps it out"


@pytest.mark.parametrize("name", SAVED)
def test_a_saved_cut_model_opens_with_this_package(tmp_path, name):
    family, head, what, sites = SAVED[name]
    model, inputs = cut_model(family, head, what, sites()), make_inputs(family, head)
    model.save_pretrained(tmp_path / "once")
    opened = tp.from_pretrained(tmp_path / "once")
    opened.save_pretrained(tmp_path / "twice")
    expected = outputs_of(at_home(model), inputs)
    for again in (opened, tp.from_pretrained(tmp_path / "twice")):
        assert type(again) is type(model)
        assert sizes_of(again) == sizes_of(model)
        assert again.config.token_pruning == model.config.token_pruning
        assert_close(outputs_of(at_home(again), inputs), expected, atol=0)


PLAIN = {  # which cuts a plain config can tell, by family
    "bert": ("a layer", "the first layer", "units", "heads and hidden"),
    "roberta": ("a layer", "the first layer", "units", "heads and hidden"),
    "distilbert": ("a layer", "the first layer", "units", "heads and hidden"),
    "vit": ("a layer", "the first layer", "units", "heads and hidden", "heads", "hidden"),
    "modernbert": ("a layer", "units", "heads and hidden"),
    "nomic_bert": ("a layer", "the first layer", "units", "heads and hidden", "heads", "hidden"),
    "dinov2": ("heads",),
    "siglip": ("a layer", "the first layer"),
}
TRIED = [(name, what) for name in PLAIN for what in CUTS if name != "siglip" or not CUTS[what]["hidden"]]


@pytest.mark.parametrize(("name", "what"), TRIED)
def test_a_plain_auto_model_opens_what_a_plain_config_can_tell_and_refuses_the_rest(tmp_path, caplog, name, what):
    head = IMAGES if FAMILIES[name].images else HEAD
    model, inputs = cut_model(name, head, what), make_inputs(name, head)
    model.save_pretrained(tmp_path)
    expected = outputs_of(model, inputs)
    logger = logging.get_logger("transformers")
    logger.addHandler(caplog.handler)
    try:
        plain = getattr(hf, "AutoModel" + head).from_pretrained(tmp_path).eval()
    except RuntimeError as error:
        plain = str(error)
    finally:
        logger.removeHandler(caplog.handler)
    if what in PLAIN[name]:
        assert type(plain) is getattr(hf, FAMILIES[name].stem + head)
        assert_close(outputs_of(plain, inputs), expected)
        assert "LOAD REPORT" not in caplog.text
        assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in model.parameters())
    else:
        assert isinstance(plain, str), "a plain class opened what it cannot hold"
        assert "ismatch" in plain


@pytest.mark.parametrize(("name", "what"), [("bert", "heads and hidden"), ("vit", "a layer"), ("siglip", "the first layer")])
def test_what_a_plain_class_has_opened_still_knows_what_it_was_cut_from(tmp_path, name, what):
    head = IMAGES if FAMILIES[name].images else HEAD
    model = cut_model(name, head, what)
    model.save_pretrained(tmp_path)
    settings, macs = model.config.token_pruning, tp.cost.dense_macs(build(name, head), [7, 12])
    plain = getattr(hf, "AutoModel" + head).from_pretrained(tmp_path).eval()
    assert tp.cost.dense_macs(plain, [7, 12]) == macs
    plain = getattr(hf, "AutoModel" + head).from_pretrained(tmp_path).eval()
    assert tp.pack(plain).config.token_pruning == settings
    assert tp.cost.dense_macs(plain, [7, 12]) == macs
    plain.save_pretrained(tmp_path / "again")
    again = tp.from_pretrained(tmp_path / "again")
    assert again.config.token_pruning == settings
    assert tp.cost.dense_macs(again, [7, 12]) == macs
    assert_close(outputs_of(again, make_inputs(name, head)), outputs_of(model, make_inputs(name, head)), atol=0)


def test_a_model_made_from_the_config_of_one_that_was_cut_is_whole():
    """As where several methods are tried in turn."""
    config = cut_model("bert", HEAD, "heads and hidden").config
    other = build("bert", HEAD)
    other.config.token_pruning = config.token_pruning
    assert tp.cost.dense_layer_costs(other) == tp.cost.dense_layer_costs(build("bert", HEAD))
    assert "shapes" not in tp.pack(other).config.token_pruning
