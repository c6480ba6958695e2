"""Open a folder or Hub id with this package's code; nothing that lies in the folder is executed."""

import os

import transformers
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import find_adapter_config_file

from .errors import ConfigError, UnsupportedInputError, UnsupportedModelError
from .modeling.modeling_token_pruned import token_pruned_class
from .modeling.pruning_config import read_config
from .modeling.shapes import MOST_LAYERS

# What configs make lists of, or models modules, before any weight is looked at; under all names that families have for it.
MOST = {
    **dict.fromkeys(
        ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "num_hidden_groups", "inner_group_num"), MOST_LAYERS
    ),
    "num_labels": 100_000,
}


HUB = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "force_download", "proxies")


def from_pretrained(folder_or_id, **kwargs):
    """Load a model that was saved token-pruned (or a plain one, which stays dense).

    Args:
        folder_or_id: a local folder, or the id of a repository on the Hub.
        kwargs: as for `AutoModel.from_pretrained` (`revision`, `dtype`, `device_map`, a setting of the config, ...).
            `trust_remote_code` is refused: this function is for not trusting it.

    Returns:
        The model with the head it was saved with, in evaluation mode.

    Raises:
        ConfigError: there is no such folder or repository, or `config.token_pruning` is damaged or from a newer version.
        UnsupportedInputError: `trust_remote_code=True` was given.
        UnsupportedModelError: the config does not name a class of transformers that it fits.

    Example:
        >>> model = from_pretrained("pruned")  # doctest: +SKIP
    """
    if kwargs.pop("trust_remote_code", False):
        raise UnsupportedInputError(
            "hf_tokenprune.from_pretrained never executes code from the folder. To do that, call "
            "AutoModelFor....from_pretrained(..., trust_remote_code=True) of transformers."
        )
    hub = {name: kwargs[name] for name in HUB if name in kwargs}
    try:
        written, _ = PreTrainedConfig.get_config_dict(folder_or_id, **hub)
    except OSError as error:
        refuse_adapter(folder_or_id, **hub)
        if os.path.isdir(folder_or_id):
            raise ConfigError(f"{folder_or_id} holds no model that can be read: {error}") from error
        raise ConfigError(f"{folder_or_id} is no folder here, and could not be got from the Hub: {error}") from error
    if not written:
        refuse_adapter(folder_or_id, **hub)
        raise ConfigError(f"{folder_or_id} holds no model: its config.json is missing or empty.")
    _check_counts(written, folder_or_id)
    config = kwargs.pop("config", None) or folder_or_id
    if isinstance(config, (str, os.PathLike)):
        # The weights' type is not for the config, which would take it for its own.
        dtype = {name: kwargs.pop(name) for name in ("dtype", "torch_dtype") if name in kwargs}
        config, kwargs = AutoConfig.from_pretrained(config, trust_remote_code=False, return_unused_kwargs=True, **kwargs)
        kwargs = {**hub, **kwargs, **dtype}
    return open_as(config, folder_or_id, **kwargs)


def refuse_adapter(folder_or_id, **hub):
    """Raise `ConfigError` if an adapter lies there, which is no model of its own; `hub`: of `from_pretrained`, those in `HUB`."""
    try:
        found = find_adapter_config_file(folder_or_id, **hub)
    except (OSError, ValueError):  # neither a folder nor a repository
        return
    if found:
        raise ConfigError(
            f"{folder_or_id} holds an adapter, not a model. Merge it first: model = PeftModel.from_pretrained(base, "
            f"{str(folder_or_id)!r}), which needs an import of hf_tokenprune if the adapter drops tokens, and "
            "model.merge_and_unload().save_pretrained(folder), with its tokenizer; then name that folder."
        )


def open_as(config, folder_or_id, **kwargs):
    """Load the model that a config describes, token-pruned if it says so; see `from_pretrained`."""
    names = config.architectures or []
    dense_class = getattr(transformers, str(names[0]), None) if isinstance(names, list) and names else None
    if not (
        isinstance(dense_class, type) and issubclass(dense_class, transformers.PreTrainedModel) and dense_class.config_class
    ):
        raise UnsupportedModelError(
            f"The config of {folder_or_id} names the architectures {names}; the first should be a model class of transformers."
        )
    if not isinstance(config, dense_class.config_class):
        raise UnsupportedModelError(
            f"The config of {folder_or_id} is a {type(config).__name__}, but names the architecture {dense_class.__name__}, whose "
            f"config is a {dense_class.config_class.__name__}. Restore the config.json that was saved with the model."
        )
    settings = getattr(config, "token_pruning", None)
    if settings is None:
        return dense_class.from_pretrained(folder_or_id, config=config, **kwargs)
    read_config(settings)
    kwargs.setdefault("use_safetensors", True)  # never saved otherwise, so anything else is not ours
    return token_pruned_class(dense_class).from_pretrained(folder_or_id, config=config, **kwargs)


def _check_counts(config, folder_or_id):
    """Raise `ConfigError` if the config, as it is written, or a part of it asks for more than any model has."""
    parts = [config]
    while parts:
        for name, value in parts.pop().items():
            if isinstance(value, dict):
                parts.append(value)
            elif name in MOST and isinstance(value, (int, float)) and value > MOST[name]:
                raise ConfigError(f"The config of {folder_or_id} has {name}={value}; no encoder has more than {MOST[name]}.")
