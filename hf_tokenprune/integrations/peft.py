"""PEFT: adapters that make a model read fewer tokens, alone or together with LoRA and other tuners.

Three ways, all trained by the same callback:

* `TokenPruneCallback` on a `PeftModel`: the adapter learns the task, and which tokens can go. Its folder carries both.
* `get_peft_model(model, TokenPruneConfig(target_macs=0.4))`: a pruning adapter. The model stays as it is, only selectors learn; what
  is published are some 100 KB that make an existing fine-tuned model faster.
* `get_peft_model` on a model that was attached before: the base drops tokens, the adapter is an ordinary one.

An adapter folder of the first two kinds is of a PEFT type of its own ("TOKEN_PRUNE", "TOKEN_PRUNE_LORA", ...), which this package
enters in PEFT's mappings as soon as it and PEFT are imported; then `PeftModel.from_pretrained(base, folder)` opens it. Each adapter
has its own selection of tokens, which follows `set_adapter`; where adapters are disabled the base is as it came.
`merge_and_unload` gives an ordinary token-pruned model, to be saved and opened without PEFT and without this package.

PEFT loads adapters side by side that are of one type. A plain one, such as LoRA, is loaded beside one that prunes from a copy of its
folder with `"peft_type": "TOKEN_PRUNE_LORA"` in `adapter_config.json`; it drops nothing all the same.

Weights cannot be cut under adapters: the adapter folder does not hold the base's weights, and the base would be opened whole.
"""

import copy
import functools
from dataclasses import dataclass, field

from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from ..adapter_card import describe_adapter
from ..errors import ConfigError, TrainingError
from ..methods.infor_coef import InforCoef
from ..methods.top import ToP
from ..modeling.architectures import transformers_model
from ..modeling.modeling_token_pruned import detach, is_token_pruned, mount
from ..modeling.pruner import TokenPruner
from ..modeling.pruning_config import read_config
from ..modeling.shapes import shape_map
from ..schedule import Schedule

TYPE = "TOKEN_PRUNE"
METHODS = {kind.name: kind for kind in (ToP, InforCoef)}
PREFIX = "pruners."


class PruningAdapters(nn.Module, BaseTunerLayer):
    """The pruners of a model, one per adapter that has any, and what packs the base. PEFT sees in it one more layer with adapters.

    Args:
        model: the transformers model.
        base: the pruner with which the model came and its config, or None.
    """

    adapter_layer_names = ("pruners",)
    other_param_names = ()

    def __init__(self, model, base=None):
        super().__init__()
        self.pruners = nn.ModuleDict()
        self.settings = {}
        self.model_and_base = (model, base)  # in a tuple, for they are no submodules of this
        self._disable_adapters = False
        self.merged_adapters = []

    def put(self, adapter, pruner, settings):
        """Give an adapter its pruner."""
        self.pruners[adapter], self.settings[adapter] = pruner, settings

    def mount(self):
        """Let the pruner of the active adapter, or the base's own, pack the model.

        Raises:
            ConfigError: two adapters with pruners are active.
        """
        model, base = self.model_and_base
        active = [] if self.disable_adapters else self.merged_adapters or self.active_adapters
        names = [name for name in active if name in self.pruners]
        if len(names) > 1:
            raise ConfigError(f"The adapters {', '.join(names)} both say which tokens are dropped. Activate one of them.")
        pruner, settings = (self.pruners[names[0]], self.settings[names[0]]) if names else base or (None, None)
        if pruner is None:
            detach(model)
        elif getattr(model, "token_pruner", None) is not pruner:
            mount(model, pruner, settings)

    def merge(self, safe_merge=False, adapter_names=None):
        names = adapter_names or self.active_adapters
        self.merged_adapters = [*self.merged_adapters, *(name for name in names if name not in self.merged_adapters)]

    def unmerge(self):
        self.merged_adapters = []


class PruningTuner:
    """What a tuner class of PEFT needs to know of pruners; comes before it among the bases."""

    def __init__(self, model, peft_config, *args, **kwargs):
        if isinstance(peft_config, PeftConfig):  # from transformers, which knows its own types of adapters only
            raise ConfigError(
                "An adapter that drops tokens goes into a PeftModel, not into a model of transformers itself. Make it by "
                "get_peft_model(model, config); open a saved one by PeftModel.from_pretrained(model, folder), or by "
                "AutoPeftModelFor....from_pretrained(folder)."
            )
        super().__init__(model, peft_config, *args, **kwargs)

    @property
    def adapters(self):
        """The model's `PruningAdapters`, or None."""
        return getattr(self.model, "pruning_adapters", None)

    def inject_adapter(self, model, adapter_name, *args, **kwargs):
        adapters = self.adapters
        if adapters is None:
            adapters = PruningAdapters(model, base_of(model))
        else:
            del model.pruning_adapters
        detach(model)  # whatever packs the model is none of its modules that might be adapted
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            _fill(adapters, adapter_name, self.peft_config[adapter_name])
        finally:
            model.pruning_adapters = adapters
            adapters.set_adapter(self.active_adapters, inference_mode=self.peft_config[adapter_name].inference_mode)
            adapters.mount()

    def _mount(self):
        adapters = self.adapters
        if adapters is None:
            return
        others = (part for part in self.model.modules() if isinstance(part, BaseTunerLayer) and part is not adapters)
        merged = next((part.merged_adapters for part in others if hasattr(part, "merged_adapters")), None)
        if merged is not None:  # a forward without adapters unmerges them, and says so to nobody
            adapters.merged_adapters = list(merged)
        adapters.mount()

    def set_adapter(self, *args, **kwargs):
        super().set_adapter(*args, **kwargs)
        self._mount()

    def add_weighted_adapter(self, adapters, weights, adapter_name, *args, **kwargs):
        """A sum of adapters drops the tokens that the first of them drops."""
        super().add_weighted_adapter(adapters, weights, adapter_name, *args, **kwargs)
        pruners = self.adapters.pruners
        if adapter_name in pruners:
            pruners[adapter_name].load_state_dict(pruners[adapters[0]].state_dict(), strict=False)  # no state of a training

    def merge_adapter(self, *args, **kwargs):
        super().merge_adapter(*args, **kwargs)
        self._mount()

    def unmerge_adapter(self):
        super().unmerge_adapter()
        self._mount()

    def enable_adapter_layers(self):
        super().enable_adapter_layers()
        self._mount()

    def disable_adapter_layers(self):
        super().disable_adapter_layers()
        self._mount()

    def delete_adapter(self, adapter_name):
        super().delete_adapter(adapter_name)
        self.adapters.set_adapter(self.active_adapters)
        self._mount()

    @classmethod
    def _remove_adapter_name_from_key(cls, key, adapter_name):
        before, mine, after = key.partition(f".{PREFIX}{adapter_name}.")
        return f"{before}.{PREFIX}{after}" if mine else super()._remove_adapter_name_from_key(key, adapter_name)

    def _unload_and_optionally_merge(self, merge=True, progressbar=False, safe_merge=False, adapter_names=None):
        adapters = self.adapters
        if merge:
            adapters.merge(safe_merge, adapter_names)
            adapters.mount()
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        if not merge:
            adapters.enable_adapters(False)
            adapters.mount()
        del model.pruning_adapters
        return model


@dataclass
class TokenPruneConfig(PeftConfig):
    """A pruning adapter: which tokens an existing fine-tuned model drops, and nothing else.

    The model and its head stay as they are; the callback trains gates, and what importance is learned by, against the model's own
    outputs and the task. That is 136 KB for BERT-base, or less than one with `settings={"importance": "attention"}`. A head
    is trained, and saved, with it if a `task_type` is given, as PEFT does for every adapter.

    Args:
        target_macs: MACs to spend on the real tokens, as a share of the dense model's.
        method: "top" or "infor_coef".
        settings: other settings of the method, as plain values; `schedule` as a dictionary, by default annealing alone.
        token_pruning: what was learned, as in a config of transformers; filled in by us.
        modules_to_save: other modules to train and save with it, as for every adapter.

    Raises:
        ConfigError: a setting is out of range.

    Example:
        >>> from peft import get_peft_model
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64)
        >>> pruning = TokenPruneConfig(target_macs=0.5, settings={"rank_bins": 10})
        >>> model = get_peft_model(BertForSequenceClassification(config), pruning)
        >>> callbacks = [TokenPruneCallback(pruning.training_method())]  # doctest: +SKIP
    """

    target_macs: float = field(default=0.5, metadata={"help": "MACs to spend on real tokens, as a share of the dense model's."})
    method: str = field(default="top", metadata={"help": f"How the tokens are chosen: {', '.join(METHODS)}."})
    settings: dict | None = field(default=None, metadata={"help": "Other settings of the method."})
    token_pruning: dict | None = field(default=None, metadata={"help": "Which tokens are dropped where."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Other modules to train and save."})

    target_modules = DUMMY_TARGET_MODULES

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = TYPE
        self.training_method()

    def training_method(self):
        """The method's config, for `TokenPruneCallback`."""
        if self.method not in METHODS:
            raise ConfigError(f"TokenPruneConfig(method={self.method!r}): {' or '.join(METHODS)}.")
        settings = dict(self.settings or {})
        if self.method == "infor_coef":
            settings = {"static_macs": None, **settings}
        try:
            schedule = Schedule(**settings.pop("schedule", {"dense": 0, "anneal": 1, "settle": 0}))
            method = METHODS[self.method](target_macs=self.target_macs, schedule=schedule, **settings)
        except TypeError as error:
            raise ConfigError(f"TokenPruneConfig(settings={self.settings!r}): {error}.") from None
        if method.cuts_weights:
            raise ConfigError(f"TokenPruneConfig(settings={self.settings!r}): an adapter cannot cut weights, only drop tokens.")
        return method

    def save_pretrained(self, save_directory, **kwargs):
        """As `PeftConfig.save_pretrained`."""
        super().save_pretrained(save_directory, **_plain_mapping(kwargs))
        describe_adapter(save_directory)


class TokenPruneModel(PruningTuner, BaseTuner):
    """The tuner of a pruning adapter: freezes the model and gives it a pruner."""

    prefix = PREFIX
    tuner_layer_cls = PruningAdapters

    def _prepare_adapter_config(self, peft_config, model_config):
        return peft_config

    def _create_and_replace(self, *args, **kwargs):
        raise NotImplementedError("A pruning adapter replaces no modules.")


@functools.cache
def pruning_config(dense_class):
    """The class of a tuner's configs with `token_pruning` in them. Without any they are saved as plain ones."""

    def __post_init__(self):
        dense_class.__post_init__(self)
        self.peft_type = f"{TYPE}_{self.peft_type.value}"

    def save_pretrained(self, save_directory, **kwargs):
        config = self
        if self.token_pruning is None:
            config = copy.copy(self)
            config.__class__, config.peft_type = dense_class, self.peft_type.removeprefix(f"{TYPE}_")
        dense_class.save_pretrained(config, save_directory, **_plain_mapping(kwargs))
        describe_adapter(save_directory)

    members = {
        "__module__": __name__,
        "__doc__": f"`{dense_class.__name__}` of an adapter that also drops tokens.",
        "__annotations__": {"token_pruning": dict | None},
        "token_pruning": field(default=None, metadata={"help": "Which tokens are dropped where."}),
        "__post_init__": __post_init__,
        "save_pretrained": save_pretrained,
    }
    return dataclass(type(f"TokenPrune{dense_class.__name__}", (dense_class,), members))


@functools.cache
def pruning_tuner(dense_class):
    """The class of a tuner that also keeps pruners."""
    members = {
        "__module__": __name__,
        "__doc__": f"`{dense_class.__name__}` of adapters that also drop tokens.",
        "tuner_layer_cls": (dense_class.tuner_layer_cls, PruningAdapters),
    }
    return type(f"TokenPrune{dense_class.__name__}", (PruningTuner, dense_class), members)


def register():
    """Enter the types of this file in PEFT's mappings. They are internal, but `register_peft_method` takes PEFT's own types only."""
    for peft_type, tuner in list(PEFT_TYPE_TO_TUNER_MAPPING.items()):
        if _can_prune(tuner) and not str(peft_type).startswith(TYPE):
            name = f"{TYPE}_{peft_type.value}"
            PEFT_TYPE_TO_CONFIG_MAPPING[name] = pruning_config(PEFT_TYPE_TO_CONFIG_MAPPING[peft_type])
            PEFT_TYPE_TO_TUNER_MAPPING[name] = pruning_tuner(tuner)
            PEFT_TYPE_TO_PREFIX_MAPPING[name] = PEFT_TYPE_TO_PREFIX_MAPPING[peft_type]
    PEFT_TYPE_TO_CONFIG_MAPPING[TYPE] = TokenPruneConfig
    PEFT_TYPE_TO_TUNER_MAPPING[TYPE] = TokenPruneModel
    PEFT_TYPE_TO_PREFIX_MAPPING[TYPE] = PREFIX


def _can_prune(tuner):
    return isinstance(tuner, type) and issubclass(tuner, BaseTuner) and hasattr(tuner, "tuner_layer_cls")


# For the callback.


def check(model, method):
    """Raise `TrainingError` if this model with adapters cannot be trained by this method."""
    if not isinstance(model, PeftModel):
        raise TrainingError(
            f"The adapters of this {type(model).__name__} (by add_adapter, or in a wrapper) are saved without a pruner. Give the "
            "Trainer the PeftModel that get_peft_model returns, or merge the adapters first."
        )
    if not _can_prune(type(model.base_model)):
        raise TrainingError(
            f"Adapters of type {model.peft_type} put tokens of their own into the input or are no layers of the model, so they "
            "cannot be combined with dropping tokens. Use LoRA, or another adapter that changes weights."
        )
    if len(model.active_adapters) != 1:
        raise TrainingError(f"The adapters {model.active_adapters} are active. Activate the one that is to be trained.")
    if getattr(method, "cuts_weights", False):
        raise TrainingError(
            f"{type(method).__name__} cuts weights, which an adapter cannot: its folder does not hold the base's weights, and the "
            "base would be opened whole. Merge first, model = model.merge_and_unload(), and cut that; or only drop tokens."
        )


def base_of(model):
    """`(pruner, config)` with which a transformers model came, or None."""
    if not is_token_pruned(model):
        return None
    pruner = copy.deepcopy(model.token_pruner)  # a method may go on with the same selectors
    pruner.handles = []
    return pruner, copy.deepcopy(model.config.token_pruning)


def adopt(model, base):
    """The pruner that a method has just put into a `PeftModel` is the active adapter's.

    Args:
        model: the `PeftModel`.
        base: `base_of` its transformers model before.
    """
    inner, tuner = transformers_model(model), model.base_model
    if not isinstance(tuner, PruningTuner):
        for config in model.peft_config.values():
            name = f"{TYPE}_{config.peft_type.value}"
            config.__class__, config.token_pruning, config.peft_type = pruning_config(type(config)), None, name
        tuner.__class__, model.peft_type = pruning_tuner(type(tuner)), name
        inner.pruning_adapters = PruningAdapters(inner, base)
    (adapter,) = model.active_adapters
    inner.pruning_adapters.put(adapter, inner.token_pruner, inner.config.token_pruning)
    inner.pruning_adapters.set_adapter(tuner.active_adapters)
    model.peft_config[adapter].token_pruning = inner.config.token_pruning


def merged(model):
    """The dense transformers model that a `PeftModel` is, adapters merged, as a copy; another model's transformers model itself."""
    if not isinstance(model, PeftModel):
        return transformers_model(model)
    return detach(copy.deepcopy(model).merge_and_unload())


def _fill(adapters, adapter, config):
    """Make the pruner that an adapter's config tells of."""
    model, _ = adapters.model_and_base
    if config.token_pruning is None and isinstance(config, TokenPruneConfig):
        config.training_method().attach(model)
        config.token_pruning, pruner = model.config.token_pruning, model.token_pruner
        detach(model)
        pruner.objective = None
        del pruner.training_state
    elif config.token_pruning is not None:
        settings = read_config(config.token_pruning)
        if settings.get("shapes") != shape_map(model):
            raise ConfigError("The adapter was trained on a base whose weights were cut in another way. Give it that base.")
        pruner = TokenPruner(model, settings)
    else:
        return
    adapters.put(adapter, pruner.to(model.device), config.token_pruning)


def _plain_mapping(kwargs):
    """`AutoPeftModel` finds the base's class by name in a library: the dense class, in transformers."""
    mapping = kwargs.get("auto_mapping_dict")
    if mapping and "modeling_token_pruned" in mapping["parent_library"]:
        kwargs = {**kwargs, "auto_mapping_dict": {**mapping, "parent_library": "transformers"}}
    return kwargs


register()
