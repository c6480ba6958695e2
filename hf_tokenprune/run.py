"""Run somebody's training script as it is, with the callback added to the Trainer that it makes."""

import contextlib
import functools
import inspect
import os
import re
import runpy
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from transformers import Trainer
from transformers.utils import logging

from . import methods
from .errors import ConfigError, TokenPruneError, TrainingError
from .methods.compose import PARTS, Compose, own_settings
from .methods.gated import GatedMethod
from .schedule import PHASES, Moment, Schedule
from .training import TokenPruneCallback

logger = logging.get_logger(__name__)

METHODS = {kind.option: kind for kind in methods.METHODS}


# Options of the command line, made from the fields of the methods.


def settings() -> dict[str, str]:
    """Every setting of any method by name, with the sentence that its method's docstring begins to explain it with."""
    found: dict[str, str] = {}
    for kind in METHODS.values():
        listed = re.search(r"^ *Args:\n(.*?)\n\n", inspect.cleandoc(kind.__doc__ or "") + "\n\n", re.DOTALL | re.MULTILINE)
        texts = dict(re.findall(r"^    (\w+): ((?:.|\n {8})*)", listed[1] if listed else "", re.MULTILINE))
        for name in _kinds(kind):
            owners = [method for method, other in METHODS.items() if name in _kinds(other)]
            only = "" if len(owners) == len(METHODS) else f" ({', '.join(owners)})"
            found.setdefault(name, re.split(r"(?<=\w)\. |\.$", " ".join(texts.get(name, "").split()))[0] + only)
    return found


def make_method(name: str, given: Mapping[str, str]) -> GatedMethod:
    """A method from its name and settings as text, as a command line has them.

    Args:
        name: one of `METHODS`.
        given: by field name: a number, "none", words or numbers with commas between, or shares of phases.

    Raises:
        ConfigError: no such method, a setting that it does not have or cannot read, or no budget.

    Example:
        >>> make_method("top", {"target_macs": "0.4", "sites": "1,2", "schedule": "dense=0,anneal=1"}).sites
        (1, 2)
    """
    if name not in METHODS:
        raise ConfigError(f"--method must be one of {', '.join(METHODS)}, not {name!r}.")
    kinds = _kinds(METHODS[name])
    for setting in given:
        if setting not in kinds:
            owners = [method for method, kind in METHODS.items() if setting in _kinds(kind)]
            raise ConfigError(f"{_option(setting)} is no option of --method {name}, but of {' and '.join(owners)}.")
    values = {setting: _read(setting, text, kinds[setting]) for setting, text in given.items()}
    budgets = [budget for budget in ("target_macs", "target_params") if budget in kinds]
    if METHODS[name].needs_budget and all(values.get(budget) is None for budget in budgets):
        raise ConfigError(f"--method {name} needs a budget: {' or '.join(_option(b) + ' 0.4' for b in budgets)}, for instance.")
    if METHODS[name] is not Compose:
        return METHODS[name](**values)
    inner = {}
    for part, kind in PARTS.items():
        inner[part] = kind(**{setting: values.pop(setting) for setting in own_settings(kind) if setting in values})
    return Compose(**inner, **values)


def _kinds(method):
    """The settings of a method by name, and their types."""
    hints = get_type_hints(method)
    if method is not Compose:
        return {name: hints[name] for name in method.__dataclass_fields__}
    kinds = {name: hints[name] for name in method.__dataclass_fields__ if name not in PARTS}
    for kind in PARTS.values():
        kinds.update({name: get_type_hints(kind)[name] for name in own_settings(kind)})
    return kinds


def _option(name):
    return "--" + name.replace("_", "-")


def _read(name, text, kind):
    if isinstance(kind, UnionType):
        (kind,) = set(get_args(kind)) - {NoneType}
        if text.lower() == "none":
            return None
    if get_origin(kind) is tuple:
        return tuple(_read(name, item.strip(), get_args(kind)[0]) for item in text.split(","))
    reader, wanted = READERS[kind]
    try:
        return reader(text)
    except ConfigError:
        raise
    except ValueError:
        raise ConfigError(f"{_option(name)} takes {wanted}, not {text!r}.") from None


def _teacher(text):
    return None if text.lower() == "none" else text


def _truth(text):
    if text.lower() not in ("true", "false"):
        raise ValueError
    return text.lower() == "true"


def _schedule(text):
    shares = {}
    for item in text.split(","):
        phase, _, share = (word.strip() for word in item.partition("="))
        if phase not in PHASES or phase in shares:
            raise ValueError
        shares[phase] = float(share)
    return Schedule(**shares)


READERS = {
    float: (float, "a number"),
    int: (int, "whole numbers"),
    bool: (_truth, "true or false"),
    str: (str, "words"),
    object: (_teacher, "a folder, a Hub id, self or none"),
    Schedule: (_schedule, f"shares of phases ({', '.join(PHASES)}) as in dense=1,anneal=1,settle=1"),
}


# Running the script.


def run_script(script: str, arguments: Sequence[str], method: Any) -> None:
    """Run a Python script as `python script *arguments` would, with the callback given to each Trainer that it makes.

    Everything that is changed for the script (`sys.argv`, `sys.path[0]`, `Trainer.__init__`) is as it was afterwards.

    Args:
        script: a file.
        arguments: the script's own.
        method: a method's config.

    Raises:
        ConfigError: there is no such file.
        TokenPruneError: the method does not fit the script's model or Trainer; or the script ended without making a Trainer, or
            without training it.
        SystemExit: the script's own, or with status 1 after the traceback of the script's error went to stderr.
    """
    if not Path(script).is_file():
        raise ConfigError(f"There is no script {script!r} to run.")
    Path(script).open("rb").close()  # an OSError says why it cannot be read
    path = os.path.abspath(script)
    with _as_script(path, arguments), trainers_prune(method) as (made, trained):
        try:
            runpy.run_path(path, run_name="__main__")
        except TokenPruneError:
            raise
        except SystemExit as end:
            if end.code not in (None, 0) or {"-h", "--help"} & set(arguments):
                raise  # else the script may have ended well without making or training a Trainer, which is told below
        except Exception as error:
            error = error.with_traceback(_of_script(error.__traceback__, path))
            sys.excepthook(type(error), error, error.__traceback__)
            raise SystemExit(1) from None  # Python's own status after a traceback
    if not made:
        raise TrainingError(
            f"{script} ended without making a transformers.Trainer, so nothing was pruned. A training loop of its own needs the "
            "functions of this package instead."
        )
    if not trained:
        raise TrainingError(
            f"{script} ended without training by the Trainer that it made, so nothing was pruned: a model that it saved is as it "
            "was, whatever method its config names. Let it train, for instance with --do_train."
        )


@contextlib.contextmanager
def trainers_prune(method: Any) -> Iterator[tuple[list[weakref.ref[TokenPruneCallback]], list]]:
    """While this lasts, each `transformers.Trainer` that is made, of any subclass, gets a callback for a method.

    A model that several Trainers are made for, one after the other, is pruned once, by the first that trains it.

    Args:
        method: a method's config.

    Yields:
        The callbacks given so far, of which those live whose models do; and a list that has an entry for each training begun.

    Raises:
        TrainingError: from the constructor of a Trainer that has a `TokenPruneCallback` already.
    """
    original, made, trained = Trainer.__init__, [], []
    signature = inspect.signature(original)

    @functools.wraps(original)
    def prepared(self, *args, **kwargs):
        try:
            bound = signature.bind(self, *args, **kwargs)
        except TypeError:
            original(self, *args, **kwargs)  # says what is wrong
            raise
        own = bound.arguments.get("callbacks") or []
        if any(isinstance(callback, TokenPruneCallback) or callback is TokenPruneCallback for callback in own):
            raise TrainingError(
                "The script's Trainer has a TokenPruneCallback already. Start the script without `hf-tokenprune run`, or take the "
                "callback out of it."
            )
        callback = _callback_for(bound.arguments.get("model"), method, made, trained)
        if callback is not None:
            bound.arguments["callbacks"] = [*own, callback]
            if bound.arguments.get("model_init") is not None:
                bound.arguments["model_init"] = _attaching(bound.arguments["model_init"], callback)
        original(*bound.args, **bound.kwargs)
        if callback is not None:
            made.append(weakref.ref(callback))

    Trainer.__init__ = prepared
    try:
        yield made, trained
    finally:
        Trainer.__init__ = original


class _Noting(TokenPruneCallback):
    """Also notes in a list that it is trained with: when a script has ended, its Trainers and callbacks are gone."""

    def __init__(self, method, trained):
        super().__init__(method)
        self.trained = trained

    def on_train_begin(self, *args, **kwargs):
        super().on_train_begin(*args, **kwargs)
        self.trained.append(True)


def _callback_for(model, method, made, trained):
    """A callback for a model's next Trainer, or None if the model has been trained by one."""
    alive = [callback for callback in (reference() for reference in made) if callback is not None]
    known = next((callback for callback in alive if callback.model is model), None)
    if known is None:
        if made:
            logger.warning(
                f"The script makes another Trainer with another model, which {type(method).__name__} prunes as well."
            )
        return _Noting(method, trained)
    if not known.total:
        return known
    known.objective.moment = Moment("settle", 1.0)  # what the first run has chosen stays
    logger.warning("The script makes another Trainer for the model that was pruned. There the model stays as it has become.")
    return None


def _attaching(model_init, callback):
    @functools.wraps(model_init)
    def init(*args):
        model = model_init(*args)
        return model if model is None else callback.attach(model)

    return init


@contextlib.contextmanager
def _as_script(path, arguments):
    before = sys.argv, list(sys.path)
    sys.argv = [path, *arguments]
    sys.path[:1] = [str(Path(path).resolve().parent)]
    try:
        yield
    finally:
        sys.argv, sys.path[:] = before


def _of_script(traceback, path):
    """A traceback from the script's own frame on; None if none of its lines has run."""
    while traceback is not None and traceback.tb_frame.f_code.co_filename != path:
        traceback = traceback.tb_next
    return traceback
