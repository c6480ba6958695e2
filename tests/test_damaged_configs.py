"""A saved folder that is damaged, mostly in its config, is refused by the name of what is wrong."""

import json
import shutil

import pytest
from families import make_inputs
from test_saving import HEAD, bins, make, without_kept

import hf_tokenprune as tp
from hf_tokenprune.modeling.pruning_config import FORMAT_VERSION

SITE = {"layer": 1, "selector": {"kind": "rank_bins", "bins": 5}}


def site(**changes):
    return {"sites": [{**SITE, **changes}]}


def selector(**settings):
    return site(selector={**SITE["selector"], **settings})


WRONG = {
    "a newer version": ({"version": FORMAT_VERSION + 1}, "Upgrade"),
    "everything missing": ({"version": None, "sites": None, "protected_token_ids": None}, "version"),
    "no version": ({"version": None}, "version"),
    "a version in words": ({"version": "1"}, "version"),
    "version 0": ({"version": 0}, "version"),
    "version true": ({"version": True}, "version"),
    "an unknown entry": ({"surprise": 1}, "surprise"),
    "sites missing": ({"sites": None}, "sites"),
    "sites as a dictionary": ({"sites": {"1": SITE}}, "sites"),
    "a site as a number": ({"sites": [1]}, "not a site"),
    "a site without a selector": ({"sites": [{"layer": 1}]}, "not a site"),
    "a site with more": (site(more=1), "not a site"),
    "a selector as a word": (site(selector="rank_bins"), "not a site"),
    "a layer twice": ({"sites": [SITE, SITE]}, "twice"),
    "a layer below 0": (site(layer=-1), "layer"),
    "a layer in words": (site(layer="1"), "layer"),
    "a layer that is true": (site(layer=True), "True is not the number of a layer"),
    "the layer beyond": (site(layer=4), "layer 4"),
    "the pooled layer": (site(layer=3), "layer 3"),
    "an unknown kind": (selector(kind="nobody_knows"), "nobody_knows"),
    "no kind": (site(selector={"bins": 5}), "kind None"),
    "a kind that is a list": (selector(kind=["rank_bins"]), "kind"),
    "bins in words": (selector(bins="5"), "bins"),
    "no bins at all": (selector(bins=0), "bins"),
    "an unknown setting": (selector(keep=0.5), "keep"),
    "too much to keep": (site(selector={"kind": "top_k", "keep": 1.5}), "keep"),
    "nothing to keep": (site(selector={"kind": "top_k", "keep": 0}), "keep"),
    "a list to keep": (site(selector={"kind": "top_k", "keep": [0.5]}), "keep"),
    "ids missing": ({"protected_token_ids": None}, "protected_token_ids"),
    "ids below 0": ({"protected_token_ids": [-1]}, "protected_token_ids"),
    "ids as a number": ({"protected_token_ids": 5}, "protected_token_ids is 5"),
    "ids in words": ({"protected_token_ids": ["7"]}, "protected_token_ids"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    make("bert", HEAD, lambda: {1: bins(1, 1, 0, 1, 0)}).save_pretrained(folder)
    return folder


def copy_with(saved, tmp_path, **entries):
    """A copy of a saved folder with other entries in its config."""
    shutil.copytree(saved, tmp_path / "copy")
    config = {**json.loads((saved / "config.json").read_text()), **entries}
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))


def assert_refused_at_both_doors(saved, tmp_path, damaged, message):
    """With this entry a folder does not open, and a config does not make a model."""
    copy_with(saved, tmp_path, token_pruning=damaged)
    with pytest.raises(tp.errors.ConfigError, match=message):
        tp.from_pretrained(tmp_path / "copy")
    model = make("bert", HEAD, dict)
    config = type(model.config).from_dict({**model.config.to_dict(), "token_pruning": damaged})
    with pytest.raises(tp.errors.ConfigError, match=message):
        type(model)(config)


@pytest.mark.parametrize("what", WRONG)
def test_a_damaged_config_is_refused_by_name(saved, tmp_path, what):
    changes, message = WRONG[what]
    good = json.loads((saved / "config.json").read_text())["token_pruning"]
    assert good["sites"] == [SITE]
    assert_refused_at_both_doors(saved, tmp_path, {**good, **changes}, message)


@pytest.mark.parametrize("value", [[], "yes", 1, True])
def test_a_config_that_is_no_dictionary_is_refused(saved, tmp_path, value):
    assert_refused_at_both_doors(saved, tmp_path, value, "not a dictionary")


@pytest.mark.parametrize("architectures", [None, [], ["NobodyKnows"], ["Trainer"]])
def test_a_config_that_names_no_class_of_transformers_is_refused(saved, tmp_path, architectures):
    copy_with(saved, tmp_path, architectures=architectures)
    with pytest.raises(tp.errors.UnsupportedModelError, match="architectures"):
        tp.from_pretrained(tmp_path / "copy")


@pytest.mark.parametrize("missing", ["one", "all"])
def test_a_checkpoint_that_does_not_say_what_it_keeps_is_refused_at_latest_when_it_runs(tmp_path, missing):
    make("bert", HEAD, lambda: {1: bins(1, 0), 2: bins(1, 1, 0)}).save_pretrained(tmp_path)
    without_kept(tmp_path, lambda key: missing == "all" or ".1." in key)
    with pytest.raises(tp.errors.ConfigError, match="kept"):
        tp.from_pretrained(tmp_path)(**make_inputs("bert", HEAD))
