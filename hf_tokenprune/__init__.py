"""hf_tokenprune: encoders that read fewer tokens layer by layer, by one Trainer callback."""

import importlib
import sys

from . import cost, errors
from .depth import TokenDepths, token_depths
from .integrations import sentence_transformers
from .loading import from_pretrained
from .methods.compose import Compose
from .methods.infor_coef import InforCoef
from .methods.structured import StructuredPruning
from .methods.top import ToP
from .modeling.modeling_token_pruned import attach, detach, pack
from .modeling.selection import RankBins, Skim, TopK
from .reporting import Report, report
from .schedule import Schedule
from .training import TokenPruneCallback

__version__ = "0.1.0"
__all__ = [
    "Compose",
    "InforCoef",
    "RankBins",
    "Report",
    "Schedule",
    "Skim",
    "StructuredPruning",
    "ToP",
    "TokenDepths",
    "TokenPruneCallback",
    "TopK",
    "attach",
    "cost",
    "detach",
    "errors",
    "from_pretrained",
    "pack",
    "report",
    "sentence_transformers",
    "token_depths",
]


def __getattr__(name):
    if name == "peft":
        return importlib.import_module(".integrations.peft", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# transformers imports it where it is installed. From now on PeftModel.from_pretrained knows our adapters.
if sys.modules.get("peft"):
    __getattr__("peft")
