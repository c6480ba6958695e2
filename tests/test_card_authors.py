"""Who wrote a model card: a person's words are kept, wherever they were written; what a Trainer or we wrote may be written anew."""

import pytest
from families import build
from huggingface_hub import ModelCard
from test_push import HEAD

import hf_tokenprune as tp
from hf_tokenprune.model_card import fingerprint
from hf_tokenprune.publish import _is_kept
from hf_tokenprune.readme import BY_TRAINER, is_changed, is_edited, is_persons, update, write_card


def card_of(words, *, section=True, seal=True):
    """A Trainer's card, with or without our section, edited before or after that was written."""
    made = f"---\nlicense: mit\n---\n<!-- This model card has been {BY_TRAINER}. -->\n\n# out\n"
    if not section:
        return made + words
    card = ModelCard("---\ntags: [a]\n---\n# out\n\n<!-- hf_tokenprune: begin X -->\nsaid\n<!-- hf_tokenprune: end -->")
    card.text = card.text.replace("begin X", f"begin {fingerprint('said')}")
    text = update(card, made, append=True) + ("" if seal is None else words)
    return update(card, text) if seal else text


def test_what_a_person_has_written_is_kept_at_either_place():
    """(on the Hub, here): which of them stays, or None = refused."""
    plain, unknown = card_of("", seal=None), card_of("Maybe theirs.\n", section=False)
    one, other = card_of("One.\n", seal=False), card_of("Other.\n", seal=False)
    both, sealed = card_of("One.\nOther.\n", seal=False), card_of("One.\n")
    # Metadata, as the Hub's own editor writes it.
    of_paris, tagged = plain.replace("license: mit", "license: mit\nlanguage: fr"), plain.replace("- a\n", "- a\n- paris\n")
    assert plain not in (of_paris, tagged)
    assert not is_changed(plain)
    assert is_changed(one)
    assert not is_changed(sealed)
    assert is_edited(sealed)
    there, here = True, False
    table = {
        (plain, None): there, (plain, plain): here, (plain, one): here, (plain, unknown): here, (one, plain): there,
        (one, unknown): there, (unknown, plain): there, (unknown, one): here, (one, one): there, (both, one): there,
        (one, both): here, (both, sealed): there, (one, other): None, (other, sealed): None, (sealed, other): here,
        ("# Mine\n", plain): there, ("# Mine\n", one): None, (plain, "# Mine\n"): here,
        ("# Mine\nMore.\n", "# Mine\n"): there, ("# Mine\nMore.\n", "# Mine\nLess.\n"): None,
        (of_paris, plain): there, (of_paris, one): None, (of_paris, of_paris + "One.\n"): here,
        (tagged, one): None, (tagged, plain): there,
        (sealed, sealed.replace("One.\n", "")): here, (sealed, one): here,
    }  # fmt: skip
    for (hub, local), expected in table.items():
        if expected is None:
            with pytest.raises(tp.errors.ConfigError, match="edited both here and in user/name"):
                _is_kept(hub, local, "user/name")
        else:
            assert _is_kept(hub, local, "user/name") is expected, (hub, local)
    # What lay at both when it was pushed last: then it is known who has changed it.
    mine, longer, shorter = "# Mine\n\nA.\n", "# Mine\n\nA.\n\nB.\n", "# Mine\n"
    known = {
        (mine, mine): there, (mine, longer): here, (mine, shorter): here, (longer, mine): there, (shorter, mine): there,
        (longer, "# Mine\n\nA.\n\nC.\n"): None,
    }  # fmt: skip
    for (hub, local), expected in known.items():
        if expected is None:
            with pytest.raises(tp.errors.ConfigError, match="edited both here and in user/name"):
                _is_kept(hub, local, "user/name", fingerprint(mine))
        else:
            assert _is_kept(hub, local, "user/name", fingerprint(mine)) is expected, (hub, local)


def test_a_trainers_card_becomes_a_persons_only_by_an_edit(tmp_path):
    """A card of an earlier Trainer that knew nothing of us may be written anew; one with a person's words may not."""
    model = tp.attach(build("bert", HEAD), {1: tp.TopK(0.5)})
    card = tmp_path / "README.md"
    card.write_text(f"---\nlicense: mit\n---\n<!-- This model card has been {BY_TRAINER}. -->\n\n# out\n\nLoss: 0.3\n")
    model.save_pretrained(tmp_path)
    assert "hf_tokenprune: begin" in card.read_text()
    assert not is_persons(card)
    write_card(tmp_path)
    assert not is_persons(card)
    for change in (("Loss: 0.3", "Loss: 0.3, which is good"), ("license: mit", "license: apache-2.0")):
        before = card.read_text()
        card.write_text(before.replace(*change))
        assert is_persons(card)
        write_card(tmp_path)
        assert is_persons(card), "although it was written by us since"
        assert change[1] in card.read_text()
        assert not is_changed(card.read_text())
        card.write_text(before)


def test_a_persons_metadata_may_be_no_yaml(tmp_path):
    (tmp_path / "README.md").write_text("---\ntitle: My model: v2\n---\n# Mine\n")
    assert is_persons(tmp_path / "README.md")
