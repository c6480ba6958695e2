"""A transformers encoder that reads fewer tokens layer by layer.

`attach` gives a model a class made for it, `TokenPruned<ItsClass>`, and a `token_pruner`. The same class is what the Hub's
loader finds in this file by the name in `config.auto_map`: its constructor reads `config.token_pruning` and does the same.
So each checkpoint a Trainer writes can be opened with `AutoModelFor....from_pretrained(folder, trust_remote_code=True)`.
"""

import contextlib
import functools
from pathlib import Path

import torch
import transformers
from transformers.models.auto import modeling_auto

try:
    from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY
except ImportError as error:
    raise ImportError("Token-pruned models need transformers 5.23 or newer: pip install -U transformers") from error

from .architectures import is_sharded, transformers_model
from .configs import restored, settle_config
from .cutting import context_left, cut
from .errors import ConfigError, TrainingError, UnsupportedModelError
from .pruner import TokenPruner, check_unshared
from .pruning_config import make_config, read_config
from .saving import all_or_nothing
from .selection import Selector
from .shapes import replay, shape_map
from .sizes import sizes_of

ANEW = "Resume from it with a model as it was when the run began: make the model and the Trainer anew."


class TokenPruningMixin:
    """What every `TokenPruned...` class adds to its transformers class."""

    _keys_to_ignore_on_load_unexpected = (r"token_pruner\.training_state\.",)

    def __init__(self, config, *args, **kwargs):
        if getattr(config, "token_pruning", None) is None:
            config.token_pruning = make_config()
        settings = read_config(config.token_pruning)
        shapes = settings.get("shapes")
        with restored(config, shapes):
            super().__init__(config, *args, **kwargs)
        if shapes is not None:
            replay(self, shapes)
        # Whatever type the weights are loaded in: selectors were trained in float32, and rounding moves who stays.
        self.token_pruner = TokenPruner(self, settings).float()
        self.token_pruner.install(self)
        self.post_init()

    def initialize_weights(self):
        """As `PreTrainedModel.initialize_weights`, by the config as it was: the loader makes rotary buffers anew from its sizes."""
        with restored(self.config, self.config.token_pruning.get("shapes")):
            super().initialize_weights()

    def _init_weights(self, module):
        pruner = getattr(self, "token_pruner", None)
        for site in () if pruner is None else pruner.sites.values():
            if any(part is module for part in site.modules()):  # a checkpoint lacks this, or part of it
                site.reset()
        if not isinstance(module, Selector):
            super()._init_weights(module)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """As `nn.Module._load_from_state_dict`; a model in training is first cut down to the sizes that a later checkpoint has."""
        state = getattr(self.token_pruner, "training_state", None)
        gates, sizes = (state_dict.get(f"{prefix}token_pruner.training_state.{name}") for name in ("log_odds", "sizes"))
        own, mine = getattr(state, "log_odds", None), getattr(state, "sizes", None)
        if gates is not None and own is not None and gates.shape != own.shape:
            raise ConfigError(
                f"The checkpoint's run began with {len(gates)} gates, this model has {len(own)}: it is not as it was then (opened "
                f"from the checkpoint, perhaps, after weights were cut). {ANEW}"
            )
        if (
            sizes is not None
            and mine is not None
            and sizes.shape == mine.shape
            and not torch.equal(sizes, mine.to(sizes.device))
        ):
            self._resize_to(sizes.tolist())
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _resize_to(self, sizes):
        hidden, counts = sizes[0], sizes[1:]
        heads, units = counts[: len(counts) // 2], counts[len(counts) // 2 :]
        have, have_heads, have_units = sizes_of(self)
        if len(have_heads) != len(heads) or any(
            a > b for a, b in zip((hidden, *counts), (have, *have_heads, *have_units), strict=True)
        ):
            raise ConfigError(f"The checkpoint is of a larger model than this one, which has been cut since. {ANEW}")
        if (hidden, heads, units) != (have, have_heads, have_units):
            shorter = range(hidden) if hidden < have else None
            resize(self, heads=[range(n) for n in heads], units=[range(n) for n in units], hidden=shorter)

    def save_pretrained(self, save_directory, is_main_process=True, state_dict=None, push_to_hub=False, *args, **kwargs):
        """As `PreTrainedModel.save_pretrained`, with the code that opens the folder beside the weights, and all or nothing."""
        check_can_be_saved(self)
        if state_dict is None and is_sharded(self):
            raise TrainingError("FSDP2 has this model in shards. Save it by trainer.save_model(folder), in all processes.")
        rest = is_main_process, state_dict, push_to_hub, *args
        if not is_main_process or push_to_hub or Path(save_directory).is_file() or kwargs.get("distributed_checkpoint"):
            with as_published(self):
                return super().save_pretrained(save_directory, *rest, **kwargs)
        with all_or_nothing(save_directory) as folder, as_published(self):
            super().save_pretrained(folder, *rest, **kwargs)
        self._write_card(save_directory)
        return None

    def _upload_modified_files(self, working_dir, repo_id, *args, **kwargs):
        self._write_card(working_dir, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    def _write_card(self, folder, repo_id=None):
        """Write a model card. The package that prunes models puts a function here; code from the Hub writes none."""


@contextlib.contextmanager
def as_published(model):
    """What is saved names the class that opens it, and no other code.

    FSDP2 gives a model a class made for it on the spot; who opens the folder needs the one that it had. And a model from the Hub may
    have an `auto_map` of its own, to files that would not lie in the folder.
    """
    now, config = type(model), model.config
    own = config.__dict__.pop("auto_map", None)
    model.__class__ = next(kind for kind in now.__mro__ if "_dense_class" in vars(kind))
    try:
        yield
    finally:
        model.__class__ = now
        config.__dict__.pop("auto_map", None)
        if own is not None:
            config.auto_map = own


@functools.cache
def token_pruned_class(dense_class):
    """The class `TokenPruned<dense_class>`. It is shown under its own name but answers to the dense class's `__name__`, which
    is how pipelines, PEFT and exporters recognise a model."""

    @functools.partial(torch.compiler.disable, recursive=False)
    def plain_forward(self, *args, **kwargs):
        with self.token_pruner.head(self):
            return self.token_pruner.run(self, dense_class.forward, args, kwargs)

    @functools.partial(torch.compiler.disable, recursive=False)
    @functools.wraps(dense_class.forward)
    def forward(self, *args, **kwargs):
        objective = self.token_pruner.objective
        if objective is None or not self.training:
            return plain_forward(self, *args, **kwargs)
        return objective(self, functools.partial(plain_forward, self), args, kwargs)

    ignored = tuple(dense_class._keys_to_ignore_on_load_unexpected or ())
    members = {
        "__module__": __name__,
        "__qualname__": f"TokenPruned{dense_class.__name__}",
        "__doc__": f"`{dense_class.__name__}` that packs its input and drops tokens at the sites of its `token_pruner`.",
        "_dense_class": dense_class,
        "_auto_class": _auto_class_of(dense_class),
        "_keys_to_ignore_on_load_unexpected": [*ignored, *TokenPruningMixin._keys_to_ignore_on_load_unexpected],
        "forward": forward,
    }
    return type(dense_class.__name__, (TokenPruningMixin, dense_class), members)


def __getattr__(name):
    dense_class = getattr(transformers, name.removeprefix("TokenPruned"), None)
    if isinstance(dense_class, type) and issubclass(dense_class, transformers.PreTrainedModel):
        return token_pruned_class(dense_class)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _auto_classes():
    """Name of the AutoModel class that opens a class, by that class's name."""
    found = {}
    for name, auto_class in sorted(vars(modeling_auto).items(), key=lambda item: item[0] != "AutoModel"):
        if name.startswith("AutoModel"):
            for entry in getattr(auto_class._model_mapping, "_model_mapping", {}).values():
                for class_name in entry if isinstance(entry, (tuple, list)) else (entry,):
                    found.setdefault(class_name, name)
    return found


def _auto_class_of(dense_class):
    known = getattr(transformers, dense_class.__name__, None) is dense_class
    return _auto_classes().get(dense_class.__name__) if known else None


def check_can_be_saved(model):
    """Raise `UnsupportedModelError` if a saved model of this class could not be opened again."""
    dense_class = getattr(type(model), "_dense_class", type(model))
    if _auto_class_of(dense_class) is None:
        raise UnsupportedModelError(
            f"{dense_class.__name__} is not a class that transformers' AutoModel classes know, so a saved folder could not be "
            "opened. Use a class of transformers, or detach(model) before saving."
        )


def is_token_pruned(model):
    """Has this model been through `attach` (or been loaded as such)? Also true for a model loaded with remote code."""
    return hasattr(type(model), "_dense_class") and hasattr(model, "token_pruner")


def attach(model, sites=(), protected_token_ids=(), method=None):
    """Pack a model in place and put selectors at its sites. Works again on a model that has been through it.

    Args:
        model: a transformers encoder, with any head, or something that has one in it: a SentenceTransformer, CrossEncoder or
            SparseEncoder, a PeftModel.
        sites: a dictionary `{layer: selector}` (or pairs of them).
        protected_token_ids: ids of tokens that are never dropped, besides the summary token.
        method: how the selectors were trained, kept in the config for people to read: a dictionary of plain values.

    Returns:
        The same model; the transformers model is now of class `TokenPruned<its class>`.

    Raises:
        UnsupportedModelError: the model cannot be packed, or its encoder is that of another model which is packed.
        ConfigError: a site is not a layer where tokens can be dropped.
    """
    given, model = model, transformers_model(model)
    try:
        sites = dict(sites)
    except (TypeError, ValueError):
        raise ConfigError(f"attach(sites={sites!r}): sites are {{number of a layer, from 0: selector}}.") from None
    for layer, selector in sites.items():
        if type(layer) is not int or layer < 0 or not isinstance(selector, Selector):
            raise ConfigError(f"attach(sites={{{layer!r}: {selector!r}}}): sites are {{number of a layer, from 0: selector}}.")
    if not isinstance(method, dict | None):
        raise ConfigError(f"attach(method={method!r}): give a dictionary, such as {{'name': {str(method)!r}}}.")
    if len({id(selector) for selector in sites.values()}) < len(sites):
        raise ConfigError("attach(sites=...) has the same selector at two layers. Make one for each.")
    if not isinstance(protected_token_ids, (list, tuple)) or not all(
        type(i) is int and 0 <= i < 2**31 for i in protected_token_ids
    ):
        raise ConfigError(f"attach(protected_token_ids={protected_token_ids!r}): give a list of token ids (int, from 0).")
    ordered = sorted(sites.items())
    config = read_config(make_config(ordered, protected_token_ids, method, shape_map(model)))
    pruner = TokenPruner(model, config)
    for layer, selector in ordered:
        pruner.sites[str(layer)] = selector
    mount(model, pruner, config)
    _look_again(given)
    return given


def _look_again(wrapper):
    """sentence-transformers has seen by the attention function whether it may put texts one after another into one row, which only
    FlashAttention can read: let it look at the present one."""
    for module in wrapper.modules():
        if hasattr(type(module), "unpad_inputs"):
            module.unpad_inputs = module.unpad_inputs


def mount(model, pruner, config):
    """Put a pruner that was made for a transformers model in the place of whatever packs it now, with its `config.token_pruning`.

    Raises:
        UnsupportedModelError: the encoder is packed through another model.
    """
    check_unshared(model)
    detach(model)
    pruner.to(model.device).train(model.training)
    pruner.install(model)
    model.__class__ = token_pruned_class(type(model))
    model.token_pruner = pruner
    model.config.token_pruning = config
    _CAN_RECORD_REGISTRY[model] = model._can_record_outputs


def resize(model, *, heads, units, hidden=None, on_cut=None):
    """Cut a packed or token-pruned model in place down to some of its weights, as `cutting.cut` does, and write the shape map.

    Sites of layers that are removed go with them. Hooks and config are those of the smaller model afterwards.

    Raises:
        ConfigError, UnsupportedModelError: as `cutting.cut`; the model is as it was.
    """
    pruner, settings = model.token_pruner, model.config.token_pruning
    pruner.uninstall(model)
    try:
        contexts = [context_left(model, layer, chosen) for layer, chosen in enumerate(heads)]
        cut(model, heads=heads, units=units, hidden=hidden, on_cut=on_cut)
        if hidden is not None:
            index = torch.as_tensor(list(hidden), device=model.device)
            for part in (*pruner.sites.values(), getattr(pruner, "training_state", None)):
                if hasattr(part, "cut_hidden"):
                    part.cut_hidden(index, on_cut)
        for layer, selector in pruner.sites.items():
            selector.cut_context(torch.as_tensor(contexts[int(layer)], device=model.device, dtype=torch.long), on_cut)
        settle_config(model)
        pruner.keep_layers(model, [i for i, (a, f) in enumerate(zip(heads, units, strict=True)) if len(a) + len(f)])
    finally:
        pruner.install(model)
    sites = [(int(layer), selector) for layer, selector in pruner.sites.items()]
    model.config.token_pruning = make_config(sites, pruner.protected_ids, settings.get("method"), shape_map(model))
    return model


def pack(model):
    """Let a model compute on real tokens only, in place: same outputs, no training, no work on padding.

    Where the head reads nothing but the pooled token, the last layer computes only that one. What is said of padding is another
    matter: its hidden states are 0, and a head for question answering gives it logits of -10,000, so that no answer begins there and
    none is lost to it in the loss.

    Args:
        model: a transformers encoder of a supported family, with any head, or something that has one in it. A model that is packed
            already is left as it is.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: the model cannot be packed; the message names what is supported.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        >>> model = pack(BertForSequenceClassification(config))
        >>> detach(model).config._attn_implementation
        'sdpa'
    """
    return model if is_token_pruned(transformers_model(model)) else attach(model)


def detach(model):
    """Undo `pack` or `attach`: the model's own class, hooks, config and attention function are back.

    Weights stay as they are. What was cut stays cut, and a detached model of sizes that no plain config can say computes, but cannot
    be saved and opened again.

    Returns:
        The same model, no longer packed.
    """
    given, model = model, transformers_model(model)
    if not is_token_pruned(model):
        return given
    pruner = model.token_pruner
    pruner.uninstall(model)
    if pruner.structure is not None:
        pruner.structure.remove()
    del model.token_pruner
    for module in given.modules():  # a wrapper may have got a class that knows of packed models, too
        if hasattr(type(module), "_dense_class"):
            module.__class__ = type(module)._dense_class
    if hasattr(model.config, "token_pruning"):  # it may be gone with another model that has the same config object
        del model.config.token_pruning
    # A model that was opened from a saved folder has our class there; what else a user had in it stays.
    others = {k: v for k, v in (getattr(model.config, "auto_map", None) or {}).items() if "modeling_token_pruned." not in v}
    if others:
        model.config.auto_map = others
    elif hasattr(model.config, "auto_map"):
        del model.config.auto_map
    _look_again(given)
    return given
