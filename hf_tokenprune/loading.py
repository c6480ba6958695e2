"""Open a folder or Hub id with this package's code; nothing that lies in the folder is executed."""

import transformers
from transformers import AutoConfig

from .errors import ConfigError, UnsupportedInputError, UnsupportedModelError
from .modeling.modeling_token_pruned import read_config, token_pruned_class
from .modeling.shapes import MOST_LAYERS, encoder_config


def from_pretrained(folder_or_id, **kwargs):
    """Load a model that was saved token-pruned (or a plain one, which stays dense).

    Args:
        folder_or_id: a local folder, or the id of a repository on the Hub.
        kwargs: as for `AutoModel.from_pretrained` (`revision`, `dtype`, `device_map`, ...). `trust_remote_code` is refused: this
            function is for not trusting it.

    Returns:
        The model with the head it was saved with, in evaluation mode.

    Raises:
        ConfigError: `config.token_pruning` is damaged or from a newer version.
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
    hub = {name: kwargs[name] for name in ("revision", "token", "cache_dir", "local_files_only", "subfolder") if name in kwargs}
    config = AutoConfig.from_pretrained(folder_or_id, trust_remote_code=False, **hub)
    layers = getattr(encoder_config(config), "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise ConfigError(
            f"The config of {folder_or_id} has num_hidden_layers={layers}; no encoder has more than {MOST_LAYERS}."
        )
    return open_as(config, folder_or_id, **kwargs)


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
