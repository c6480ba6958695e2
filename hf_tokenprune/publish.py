"""Upload a saved token-pruned model to the Hub, in one commit."""

import json
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, RemoteEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects, validate_repo_id

from .errors import ConfigError
from .model_card import (
    DATA,
    FILE,
    PLOT,
    SECTION,
    code_of,
    draw,
    fingerprint,
    make_card,
    name_of,
    read_folder,
    sentence_class_of,
)
from .modeling.saving import NUMBER
from .readme import BY_TRANSFORMERS, is_changed, is_edited, known_results, lines_of, of_weights, update
from .results import joined, read_results
from .weights import number_of_model
from .writing import write_file

# What a checkpoint needs to be resumed, pickles, caches and whatever is hidden stay at home.
LEFT_OUT = [
    "_*", ".*", "*/.*", "*/_*", "checkpoint-*", "runs/*", "optimizer*", "scheduler.pt", "scaler.pt", "rng_state*.pth", "*.bin",
    "trainer_state.json", "global_step*", "latest", "zero_to_fp32.py",
]  # fmt: skip
PUSHED = "_pushed.json"  # in the folder: by repository and branch, the fingerprint of the README.md pushed last
WEIGHTS = re.compile(rf"(model|pytorch_model){NUMBER}\.(safetensors|bin)(\.index\.json)?")  # what transformers opens


@dataclass(frozen=True)
class Publication:
    """What is, or would be, published.

    Args:
        repo_id: where, as `user/name`.
        files: sizes in bytes, by path.
        card: the text of README.md.
        card_is_theirs: a person wrote README.md, so it is published as it is.
        deleted: weights that lie there and go, since they would be opened instead; None if a dry run could not see what lies there.
        url: of the commit; None if nothing was sent.
    """

    repo_id: str
    files: dict[str, int]
    card: str
    card_is_theirs: bool
    deleted: list[str] | None
    url: str | None = None


def push(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    results: Sequence[str | os.PathLike] = (),
    license: str | None = None,
    token: str | None = None,
    dry_run: bool = False,
) -> Publication:
    """Publish a saved token-pruned model with its model card. The folder keeps the card, so that it knows next time
    what was measured.

    Args:
        folder: where the model was saved.
        repo_id: where to publish it, as `user/name`; the repository is made if there is none.
        private: make it a private repository; one that exists already and is public is refused.
        revision: the branch to commit to, made if there is none; by default the main one.
        results: JSON files of what was measured, see `results.read_results`, for the card.
        license: of the weights, as the Hub names it; by default what the present card says.
        token: to log in with; by default the one that `hf auth login` has stored.
        dry_run: send nothing; only ask which files are there.

    Raises:
        ConfigError: the folder, the name, a result file or a token is missing or does not fit.
        PermissionError: the Hub does not let this token write there.
        ConnectionError: the Hub cannot be reached, or the upload broke off. Nothing was published then.

    Example:
        >>> push("pruned", "user/name", results=["bench.json"])  # doctest: +SKIP
    """
    folder = Path(folder)
    config = read_folder(folder)
    files = _files(folder, config)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(f"{repo_id!r} is no name of a repository: {error}") from None
    if repo_id.count("/") != 1:
        raise ConfigError(f"{repo_id!r} is no name of a repository. Say whose it is: user/name.")
    sentence_class = sentence_class_of(folder)
    weights = number_of_model(folder) if results else None
    evaluation = read_results(results, config["token_pruning"].get("method"), weights)
    local = _text(folder / FILE)
    before = _data(local).get(DATA)  # of the card on the Hub it may be about other weights
    if not isinstance(before, dict) or ("weights" in before and not known_results(local, folder)):
        before = {}
    evaluation = joined(before, evaluation)
    token = token or get_token()
    api = HfApi(token=token)
    online = _Online(api, repo_id, revision, private)
    if not dry_run:
        if token is None:
            raise ConfigError("There is no token to log in to the Hub with. Run `hf auth login`, or set HF_TOKEN.")
        online.prepare()
    there = None if dry_run else online.card()
    pushed, place = _pushed(folder), f"{repo_id}@{revision or 'main'}"
    theirs = there is not None and _is_kept(there, local, repo_id, pushed.get(place))
    current = there if theirs else local
    if evaluation:
        evaluation = of_weights(evaluation, folder)
    picture = draw(evaluation)
    known = {**_data(local), **_data(there)} if theirs else {**_data(there), **_data(local)}
    card = make_card(
        config, code_of(folder), evaluation, name=name_of(repo_id), repo_id=repo_id, base_model=known.get("base_model"),
        license=license or known.get("license"), plot=PLOT if picture else None, sentence_class=sentence_class,
    )  # fmt: skip
    text = update(card, current, edited=theirs and not SECTION.search(there))
    contents = dict(files)
    if text is not None:
        contents[FILE] = text.encode()
    elif theirs:
        contents.pop(FILE, None)  # the one on the Hub stays
    if picture and text:
        contents[PLOT] = picture
    sizes = {name: len(it) if isinstance(it, bytes) else it.stat().st_size for name, it in sorted(contents.items())}
    url = None
    try:
        deleted = online.weights(besides=contents)
    except OSError:
        if not dry_run:
            raise
        deleted = None
    if not dry_run:
        lost = theirs and local is not None and not lines_of(local) <= lines_of(there) and not _is_ours(local)
        if text and not lost and os.access(folder, os.W_OK):
            for name in (FILE, PLOT) if picture else (FILE,):
                write_file(folder / name, contents[name])
        url = online.commit(contents, deleted)
        if os.access(folder, os.W_OK):
            now, here = text or current, _text(folder / FILE)
            write_file(folder / PUSHED, json.dumps({**pushed, place: fingerprint(now) if here == now else None}) + "\n")
    return Publication(repo_id, sizes, text or current, text is None, deleted, url)


def _is_ours(text):
    """Has no person a part in a text of README.md, for certain?"""
    return SECTION.search(text) is not None and not is_edited(text)


def _pushed(folder):
    try:
        found = json.loads((folder / PUSHED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_kept(there, local, repo_id, pushed=None):
    """Does the README.md on the Hub stay, rather than the local one? What a person has written is not to be lost, at either place.

    Args:
        pushed: fingerprint of what lay at both when this folder was pushed there last, None if that is not known.

    Raises:
        ConfigError: each of them says what the other does not.
    """
    if local is None or fingerprint(local) == pushed:
        return True
    if BY_TRANSFORMERS in there or _is_ours(there):
        return False
    # Was it edited there since the last push? Where nobody can tell, it may have been.
    since = is_changed(there) if pushed is None else fingerprint(there) != pushed
    if is_changed(local) and not since:
        return False  # also where lines were taken out here
    if not is_edited(local) or lines_of(local) <= lines_of(there):
        return True
    if since and not lines_of(there) <= lines_of(local):
        raise ConfigError(
            f"README.md has been edited both here and in {repo_id}, as far as can be told, and each has lines, or metadata, "
            "that the other lacks. Put them together here, so that nothing of the one on the Hub is missing, or copy that one here; "
            "then push again."
        )
    return False


class _Online:
    """A repository on the Hub; whatever it answers is one sentence."""

    def __init__(self, api, repo_id, revision, private):
        self.api, self.repo_id, self.revision, self.private = api, repo_id, revision, private

    def prepare(self):
        """Make the repository and the branch, if they are not there."""
        self._ask(self.api.create_repo, private=self.private, exist_ok=True)
        if self.private and not self._ask(self.api.model_info).private:
            raise ConfigError(
                f"{self.repo_id} exists already and is public. Make it private in its settings on the Hub, or push without "
                "--private. Nothing was published."
            )
        if self.revision is not None:
            self._ask(self.api.create_branch, branch=self.revision, exist_ok=True)

    def card(self):
        """The text of README.md there, None if there is none."""
        with tempfile.TemporaryDirectory() as home:
            try:
                return _text(Path(self._ask(self.api.hf_hub_download, filename=FILE, revision=self.revision, cache_dir=home)))
            except FileNotFoundError:
                return None

    def weights(self, besides):
        """The files of weights there that would be opened, but for those of the names in `besides`."""
        there = self._ask(self.api.model_info, revision=self.revision).siblings or ()
        return [file.rfilename for file in there if WEIGHTS.fullmatch(file.rfilename) and file.rfilename not in besides]

    def commit(self, contents, deleted):
        """Upload everything, then commit it at once."""
        stale = [CommitOperationDelete(name) for name in deleted]
        files = [CommitOperationAdd(name, it if isinstance(it, bytes) else str(it)) for name, it in sorted(contents.items())]
        message = "Upload a token-pruned model"
        return self._ask(
            self.api.create_commit, operations=[*files, *stale], commit_message=message, revision=self.revision
        ).commit_url

    def _ask(self, function, **kwargs):
        try:
            return function(repo_id=self.repo_id, **kwargs)
        except RemoteEntryNotFoundError:
            raise FileNotFoundError(kwargs["filename"]) from None
        except (HTTPError, RuntimeError, OSError) as error:
            raise self._explained(error) from error

    def _explained(self, error):
        cause = error
        while not isinstance(cause, HfHubHTTPError) and cause.__cause__ is not None:
            cause = cause.__cause__
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
        said = getattr(cause, "server_message", None)
        said = f" ({said})" if said else ""
        if status == 401:
            return PermissionError(f"The Hub does not know this token{said}. Run `hf auth login`. Nothing was published.")
        if status == 403:
            return PermissionError(f"This token may not write to {self.repo_id}{said}. Nothing was published.")
        if status is not None:
            return ConnectionError(f"The Hub refused the upload to {self.repo_id}: HTTP {status}{said}. Nothing was published.")
        why = f"{type(cause).__name__}: {cause}"
        return ConnectionError(f"The upload to {self.repo_id} broke off: {why}. Nothing was published; try again.")


def _files(folder, config):
    """What is to be published, by path.

    Raises:
        ConfigError: the folder is not complete.
    """
    found = {str(file.relative_to(folder).as_posix()): file for file in folder.rglob("*") if file.is_file()}
    found = {name: found[name] for name in filter_repo_objects(sorted(found), ignore_patterns=LEFT_OUT)}
    auto_map = config.get("auto_map")
    needed = {f"{str(path).split('.')[0]}.py" for path in auto_map.values()} if isinstance(auto_map, dict) else set()
    index = found.get("model.safetensors.index.json")
    if index is None:
        needed |= {"model.safetensors"}
    else:
        try:
            needed |= set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{index} is damaged: {type(error).__name__}: {error}.") from None
    if not auto_map:
        raise ConfigError(f"{folder}/config.json has no auto_map, so the Hub would not find the code. Save the model again.")
    if missing := sorted(needed - set(found)):
        raise ConfigError(f"{folder} is not complete: {', '.join(missing)} missing. Save the model again.")
    return found


def _data(text):
    """The metadata of a card."""
    try:
        return ModelCard(text, ignore_metadata_errors=True).data.to_dict() if text else {}
    except Exception as error:  # whatever the YAML of a README.md may hold
        raise ConfigError(f"The metadata at the top of README.md cannot be read: {error}") from None


def _text(file):
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None
