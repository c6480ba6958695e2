"""`config.token_pruning`: made, and checked when it is read."""

import torch

from .errors import ConfigError
from .selection import SELECTORS
from .shapes import MOST_LAYERS, check_shapes

FORMAT_VERSION = 1


def make_config(sites=(), protected_token_ids=(), method=None, shapes=None):
    """A `config.token_pruning`: plain JSON values only.

    Args:
        sites: pairs `(layer, selector)`.
        protected_token_ids: ids of tokens that are never dropped.
        method: how the selectors were trained, for people to read.
        shapes: what is left of a model whose weights were cut, see `shapes.py`.
    """
    config = {
        "version": FORMAT_VERSION,
        "sites": [{"layer": layer, "selector": {"kind": s.kind, **s.settings()}} for layer, s in sites],
        "protected_token_ids": list(protected_token_ids),
    }
    more = {"method": method, "shapes": shapes}
    return {**config, **{name: value for name, value in more.items() if value is not None}}


def read_config(config):
    """Check a `config.token_pruning` and return it.

    Raises:
        ConfigError: it is damaged, or from a newer version of this package.
    """

    def damaged(why):
        return ConfigError(f"config.token_pruning is damaged: {why}. Restore the config.json that was saved with the model.")

    if not isinstance(config, dict):
        raise damaged(f"it is {_short(config)}, not a dictionary")
    version = config.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise damaged(f"version is {_short(version)}")
    if version > FORMAT_VERSION:
        raise ConfigError(
            f"This model was saved in format {version} of hf_tokenprune; this code reads up to {FORMAT_VERSION}. Upgrade with "
            "`pip install -U hf_tokenprune`, or load with trust_remote_code=True, which uses the code in the folder."
        )
    unknown = set(config) - {"version", "sites", "protected_token_ids", "method", "shapes"}
    if unknown:
        raise damaged(f"unknown entries {_short(sorted(map(str, unknown)))}")
    sites, ids = config.get("sites"), config.get("protected_token_ids")
    if not isinstance(ids, list) or len(ids) > 10_000 or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
        raise damaged(f"protected_token_ids is {_short(ids)}, not a list of at most 10000 token ids")
    if not isinstance(sites, list) or len(sites) > MOST_LAYERS:
        raise damaged(f"sites is {_short(sites)}, not a list of at most {MOST_LAYERS} sites")
    seen = set()
    for site in sites:
        if not isinstance(site, dict) or set(site) != {"layer", "selector"} or not isinstance(site["selector"], dict):
            raise damaged(f"{_short(site)} is not a site")
        layer, selector = site["layer"], dict(site["selector"])
        if type(layer) is not int or layer < 0 or layer in seen:
            raise damaged(f"{_short(layer)} is not the number of a layer, or is listed twice")
        seen.add(layer)
        kind = selector.pop("kind", None)
        if not isinstance(kind, str) or kind not in SELECTORS:
            raise ConfigError(
                f"config.token_pruning has a selector of kind {_short(kind)} at layer {layer}; known: {', '.join(sorted(SELECTORS))}."
            )
        try:
            with torch.device("meta"):  # to check its settings takes no memory
                SELECTORS[kind](**selector)
        except TypeError as error:
            raise damaged(f"the selector at layer {layer} has the settings {_short(selector)} ({_short(error)})") from None
    if not isinstance(config.get("method", {}), dict):
        raise damaged(f"method is {_short(config['method'])}, not a dictionary")
    if "shapes" in config:
        check_shapes(config["shapes"])
    return config


def _short(value):
    """What a damaged file says, but no book."""
    text = str(value) if isinstance(value, Exception) else repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
