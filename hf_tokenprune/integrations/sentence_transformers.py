"""sentence-transformers: its models are pruned like any other, and trained by its own Trainers with the same callback.

What a dropped token contributes to the pooling after the transformers model: it is still there, with the hidden state with which it
left. Mean pooling is the mean over all real tokens of a text, of which the survivors have their last hidden state and each
dropped one that of an earlier layer; max pooling and SPLADE's max see both alike; CLS pooling reads a token that is never
dropped. Nothing about it differs between training, evaluation and the saved folder.

A loss of sentence-transformers is computed from embeddings of several forwards (anchor, positive, negative). The auxiliary loss
rides on the output of each, and they count by their mean. The teacher teaches the embedding: what its own output becomes in
the modules that follow, up to the first with weights of its own.

The cards that such a model writes wherever it is saved or pushed are completed by what this package knows of it.
"""

import copy
import functools
import itertools
from pathlib import Path

from safetensors import safe_open

from ..errors import ConfigError
from ..loading import HUB, open_as
from ..modeling.architectures import transformers_model
from ..modeling.modeling_token_pruned import is_token_pruned
from ..readme import describe

TRAINING_STATE = "token_pruner.training_state."


def from_pretrained(folder_or_id, model_class=None, **kwargs):
    """Load a model of sentence-transformers that was saved token-pruned, executing nothing from the folder.

    Where this package is not installed, `SentenceTransformer(folder, trust_remote_code=True)` does it by the code in the folder. That
    is also the way to open what a plain Trainer has saved (no `modules.json`) with weights cut as no plain config can say.

    Args:
        folder_or_id: a local folder, or the id of a repository on the Hub.
        model_class: `CrossEncoder`, `SparseEncoder`; by default `SentenceTransformer`.
        kwargs: as for that class (`device`, `revision`, ...).

    Returns:
        The model, in evaluation mode.

    Raises:
        ConfigError: the folder was not saved by sentence-transformers, and another class of transformers is in it.

    Example:
        >>> model = from_pretrained("pruned-minilm")  # doctest: +SKIP
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sparse_encoder.modules import MLMTransformer
    from sentence_transformers.util import fullname

    openers = {fullname(kind): token_pruned_transformer(kind) for kind in (Transformer, MLMTransformer)}
    model = (model_class or SentenceTransformer)._load_with_module_classes(folder_or_id, openers, **kwargs)
    for module in list(model.modules()):
        if isinstance(module, tuple(openers.values())):
            module.__class__ = type(module)._dense_class
        elif isinstance(module, Transformer):
            _open_again(module, folder_or_id, kwargs)
    model.__dict__.pop("_module_classes", None)  # so that it can be pickled
    _complete_cards(model)
    return model.eval()


def _open_again(holder, folder_or_id, kwargs):
    """A folder without modules.json, as a plain Trainer leaves it, is opened by transformers, and dense."""
    dense = holder.model
    if getattr(dense.config, "token_pruning", None) is None or is_token_pruned(dense):
        return
    written = next(iter(dense.config.architectures or ()), None)
    if written != type(dense).__name__:
        raise ConfigError(
            f"{folder_or_id} holds a {written}, which was saved without sentence-transformers, and this class would make a "
            f"{type(dense).__name__} of it. Name the class that it is for (CrossEncoder for a sequence classifier): model_class=..."
        )
    hub = {"cache_dir": kwargs.get("cache_folder"), **{name: kwargs[name] for name in HUB if name in kwargs}}
    holder.model = open_as(dense.config, folder_or_id, dtype=dense.dtype, **hub).to(dense.device)


def _complete_cards(model):
    """Let a model's own cards have our section, also when it is copied."""
    model._create_model_card = functools.partial(_create_card, model)


def _create_card(model, path, model_name=None, *args, **kwargs):
    type(model)._create_model_card(model, path, model_name, *args, **kwargs)
    inner = transformers_model(model)
    pushed = model_name is not None and model_name.count("/") == 1 and not Path(model_name).exists()
    if is_token_pruned(inner):
        describe(inner, path, model_name if pushed else None)


def is_its(model):
    """Is this a model of sentence-transformers?"""
    return any(cls.__module__.startswith("sentence_transformers.") for cls in type(model).__mro__)


def prepare(model, objective):
    """Make a model of sentence-transformers ready for its Trainer; another is left as it is.

    Its checkpoints are opened by the class of the module that holds the transformers model, so that module gets one that knows how
    to open a token-pruned folder. `detach` gives it its own back.

    Args:
        model: what the Trainer trains.
        objective: the method's `Objective` for the transformers model in it.
    """
    if not is_its(model):
        return
    _complete_cards(model)
    inner = transformers_model(model)
    holder = next(module for module in model.modules() if getattr(module, "model", None) is inner and module is not model)
    if not hasattr(type(holder), "_dense_class"):
        holder.__class__ = token_pruned_transformer(type(holder), resumes=True)
    children = list(model.children())
    after = children[children.index(holder) + 1 :] if holder in children else []
    after = list(itertools.takewhile(lambda module: not any(True for _ in module.parameters()), after))
    if after:
        objective.readout = Embedding(holder, after)


class Embedding:
    """Makes an embedding of a transformers model's output, as the rest of its sentence-transformers model would."""

    def __init__(self, holder, after):
        self.holder, self.after = holder, after

    def __call__(self, outputs):
        names = self.holder.modality_config["text"]["method_output_name"]
        states = outputs
        for name in (names,) if isinstance(names, str) else names:
            states = states[name]
        features = {**self.holder.seen, self.holder.module_output_name: states}
        for module in self.after:
            features = module(features)
        return features.get("sentence_embedding", states)


@functools.cache
def token_pruned_transformer(dense_class, resumes=False):
    """The module class of sentence-transformers that opens token-pruned folders without executing code in them.

    It answers to the name of its dense class, by which a saved `modules.json` calls it.

    Args:
        dense_class: `Transformer`, or a class derived from it.
        resumes: what it opens has the state of the training, too, as the model that is being trained has.
    """

    def _load_model(self, folder_or_id, task, config, backend, is_peft_model, **kwargs):
        if backend != "torch" or is_peft_model or getattr(config, "token_pruning", None) is None:
            return dense_class._load_model(self, folder_or_id, task, config, backend, is_peft_model, **kwargs)
        kwargs.pop("trust_remote_code", None)
        model = open_as(config, folder_or_id, **kwargs)
        if resumes:
            state = _training_state(folder_or_id)
            model.token_pruner.register_state_dict_post_hook(lambda _, found, prefix, __: _add(found, prefix, state))
        return model

    def forward(self, features, **kwargs):
        self.seen = features
        return dense_class.forward(self, features, **kwargs)

    def __reduce_ex__(self, protocol):
        """A copy or pickle is of the dense class."""
        twin = copy.copy(self.__dict__)
        twin.pop("seen", None)
        return dense_class.__new__, (dense_class,), twin

    members = {
        "__module__": dense_class.__module__,
        "__qualname__": f"TokenPruned{dense_class.__name__}",
        "_dense_class": dense_class,
        "_load_model": _load_model,
        "forward": forward,
        "__reduce_ex__": __reduce_ex__,
    }
    return type(dense_class.__name__, (dense_class,), members)


def _training_state(folder):
    """What the safetensors files of a local checkpoint hold of the training state."""
    found = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            mine = [name for name in tensors.keys() if name.startswith(TRAINING_STATE)]  # noqa: SIM118
            found.update({name: tensors.get_tensor(name) for name in mine})
    return {name.removeprefix("token_pruner."): tensor for name, tensor in found.items()}


def _add(found, prefix, state):
    found.update({prefix + name: tensor for name, tensor in state.items()})
