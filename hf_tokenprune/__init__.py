"""hf_tokenprune: encoders that read fewer tokens layer by layer, by one Trainer callback."""

from . import errors
from .modeling.modeling_token_pruned import attach, detach, pack
from .modeling.selectors import RankBins, TopK

__version__ = "0.1.0"
__all__ = ["RankBins", "TopK", "attach", "detach", "errors", "pack"]
