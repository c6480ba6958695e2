"""The README.md of a folder that is to be published: ours is written, a person's stays.

Of a README.md that this package, transformers or a Trainer (also of sentence-transformers) wrote, the section on token pruning
is kept up to date. Where a person has written a README.md without that section, or has edited the section (its fingerprint no
longer fits), the file is left as it is. What else stands in a README.md stays; a second fingerprint tells whether a person has edited
that.
"""

import functools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from transformers.utils import logging

from .model_card import (
    DATA,
    FILE,
    PLOT,
    SECTION,
    SENTENCE_CLASSES,
    TAGS,
    as_list,
    base_of,
    code_of,
    draw,
    fingerprint,
    has_our_index,
    make_card,
    name_of,
    read_folder,
    sentence_class_of,
)
from .modeling.modeling_token_pruned import TokenPruningMixin
from .weights import number_of_model
from .writing import write_file

logger = logging.get_logger(__name__)

EDITED = "edited"  # beside the fingerprints: a person has a part in the text

# What nobody but these writes into a README.md: to be completed by our section, or (transformers' own says nothing) replaced.
BY_SENTENCE_TRANSFORMERS = "*Clearly define terms in order to be accessible across audiences.*"
BY_TRAINER = "generated automatically according to the information the Trainer had access to"
BY_TRANSFORMERS = "This is the model card of a 🤗 transformers model that has been pushed on the Hub."

# The code of sentence-transformers' own cards, which would open a dense model.
THEIR_CODE = re.compile(rf'^(model = (?:{"|".join(SENTENCE_CLASSES)})\("[^"\n]*")\)$', re.M)

METADATA = re.compile(r"\A\s*---\r?\n.*?\n---[ \t]*\r?\n", re.S)


def update(card: ModelCard, existing: str | None, append: bool = False, edited: bool = False) -> str | None:
    """What README.md becomes: a new card, or an existing text with this card's section and metadata in it.

    Args:
        card: made by `make_card`.
        existing: the present text, None if there is none.
        append: add the section to any text that has none.
        edited: a person may have a part in the text.

    Returns:
        The text; None if a person wrote the present one, which stays.
    """
    if existing is None or BY_TRANSFORMERS in existing:
        return _sealed(str(card))
    found, ours = SECTION.search(existing), SECTION.search(card.text)
    if found is None and not append and not _is_completed(existing):
        return None
    if found is not None and found["print"] != fingerprint(found["text"]):
        return None
    theirs = ModelCard(existing, ignore_metadata_errors=True)
    if found is None:
        text = f"{theirs.text.rstrip()}\n\n{ours[0]}\n"
    else:
        text = card.text if _is_bare(theirs.text) else SECTION.sub(lambda _: ours[0], theirs.text, count=1)
    if BY_SENTENCE_TRANSFORMERS in text:
        text = THEIR_CODE.sub(r"\1, trust_remote_code=True)", text)
    old, new = theirs.data.to_dict(), card.data.to_dict()
    if has_our_index(old):
        old.pop("model-index", None)
    old.pop(DATA, None)
    tags = list(dict.fromkeys([*as_list(old.pop("tags", None)), *new.pop("tags", ())]))
    return _sealed(str(_with(theirs, {**new, **old, "tags": tags}, text)), edited or is_edited(existing))


def is_persons(file: Path) -> bool:
    """Has a person written (or edited) this README.md, as far as can be told?"""
    return file.exists() and is_edited(file.read_text(encoding="utf-8", errors="replace"))


def is_edited(text: str) -> bool:
    """Has a person written (or edited, at any time) a text of README.md, as far as can be told?"""
    section = SECTION.search(text)
    return is_changed(text) or (section is not None and section["edited"] == EDITED)


def is_changed(text: str) -> bool:
    """Has anybody but this package changed a text of README.md since this package or a Trainer wrote it, as far as can be told?"""
    section = SECTION.search(text)
    if BY_TRANSFORMERS in text or (section is None and _is_pefts(text)):
        return False
    if section is None:
        return not _is_completed(text)
    if section["print"] != fingerprint(section["text"]):
        return True
    if section["rest"]:
        return section["rest"] != _rest(text)
    return not _is_completed(text) and not _is_bare(ModelCard(text, ignore_metadata_errors=True).text)


def lines_of(text: str) -> set[str]:
    """What a text of README.md says outside of our section and of what is ours among its metadata, line by line."""
    card = ModelCard(text, ignore_metadata_errors=True)
    data = card.data.to_dict()
    ours = {DATA, *(["model-index"] if has_our_index(data) else [])}
    entries = {f"{name}: {value}" for name in data.keys() - ours for value in as_list(data[name])}
    lines = {line.strip() for line in SECTION.sub("", card.text).splitlines()} - {""}
    return lines | entries - {f"tags: {tag}" for tag in TAGS}


def write_card(
    folder: str | os.PathLike,
    evaluation: Mapping | None = None,
    *,
    base_model: str | Sequence[str] | None = None,
    append: bool = False,
    plot: bool = False,
    repo_id: str | None = None,
    license: str | None = None,
    weights: str | os.PathLike | None = None,
) -> bool:
    """Write the card of a saved token-pruned model to its README.md, or bring up to date the section that is there.

    Args:
        folder: where the model was saved.
        evaluation: what was measured, see `results.py`; by default what the present card says of the same weights.
        base_model: the id of the model it was fine-tuned from, or the ids of several.
        append: also add the section to a README.md that has none.
        plot: draw `tokens_per_layer.png`, if matplotlib is installed.
        repo_id: where it is to be found on the Hub.
        license: of the weights, as the Hub names it.
        weights: where the weights and their config are, if they are still to be put into the folder.

    Returns:
        False if a person wrote README.md: it stays as it is.

    Raises:
        ConfigError: there is no token-pruned model in the folder.
    """
    folder = Path(folder)
    config, file = read_folder(folder), folder / FILE
    existing = file.read_text(encoding="utf-8") if file.exists() else None
    picture, has_plot = (draw(evaluation) if plot and evaluation else None), False
    if evaluation:
        evaluation = of_weights(evaluation, weights or folder)
    elif evaluation := known_results(existing, weights or folder):
        has_plot = f"({PLOT})" in existing
    card = make_card(
        config, code_of(folder), evaluation, name=name_of(repo_id or folder), repo_id=repo_id,
        base_model=base_model, license=license, plot=PLOT if picture or has_plot else None,
        sentence_class=sentence_class_of(folder),
    )  # fmt: skip
    text = update(card, existing, append)
    if text is None:
        return False
    if picture:
        write_file(folder / PLOT, picture)
    write_file(file, text)
    return True


def of_weights(evaluation: Mapping, folder: str | os.PathLike) -> dict:
    """An evaluation that says of which weights and selection it is: those in a folder, if there are any."""
    number = number_of_model(folder)
    return {**evaluation, **({} if number is None else {"weights": number})}


def known_results(text: str | None, folder: str | os.PathLike) -> dict | None:
    """The evaluation that a text of README.md holds, if it says that it is of the weights and selection in a folder."""
    found = ModelCard(text, ignore_metadata_errors=True).data.to_dict().get(DATA) if text and DATA in text else None
    if not isinstance(found, dict) or found.get("weights") is None or found["weights"] != number_of_model(folder):
        return None
    return found


def describe(model, folder, repo_id=None, append=False, plot=False, weights=None):
    """Write the card of a model that was just saved to a folder. That the model is saved matters more: a card that cannot be
    written is a warning. A model of sentence-transformers writes its card last, unless there is one where it will be uploaded to."""
    if (Path(folder) / "config_sentence_transformers.json").exists() and not (Path(folder) / FILE).exists():
        return False
    try:
        evaluation = model.token_pruner.evaluation
        base = base_of(getattr(model.config, "name_or_path", None))
        return write_card(folder, evaluation, base_model=base, append=append, plot=plot, repo_id=repo_id, weights=weights)
    except Exception as error:  # whatever a README.md may hold
        logger.warning(f"The model is saved in {folder}, but no model card was written: {type(error).__name__}: {error}")
        return False


TokenPruningMixin._write_card = describe  # the code on the Hub writes none


def _sealed(text, edited=False):
    """A text with the fingerprint, in the mark of our section, of what stands outside of it."""
    more = f"{_rest(text)} {EDITED}" if edited else _rest(text)
    return re.sub(r"(hf_tokenprune: begin \w+)[\w ]*(?= -->)", lambda mark: f"{mark[1]} {more}", text, count=1)


def _rest(text):
    return fingerprint(SECTION.sub("", text, count=1))


def _is_completed(text):
    """Was it written by a Trainer, so that our section is to be added?"""
    return BY_TRAINER in text or BY_SENTENCE_TRANSFORMERS in text


def _is_pefts(text):
    """Is it the Hub's template as PEFT writes it beside an adapter, of which nobody has filled in anything?"""
    text = METADATA.sub("", text)  # not read: of a person's it may be no YAML
    body, *versions = text.split("### Framework versions")
    return len(versions) == 1 and body.strip() == _template()


@functools.cache
def _template():
    return ModelCard.from_template(ModelCardData()).text.strip()


def _is_bare(text):
    """Is there nothing but a title outside of the section?"""
    return re.fullmatch(r"# .*", SECTION.sub("", text).strip()) is not None


def _with(card, data, text):
    """A card with other metadata and another text."""
    index = data.pop("model-index", None)
    card.data = ModelCardData(**data)
    if index is not None:
        card.data.__dict__["model-index"] = index  # to the letter, also what ModelCardData would not read
    card.text = text
    return card
