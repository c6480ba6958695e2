"""A file for each paper's method, and what they share."""

from .compose import Compose
from .infor_coef import InforCoef
from .structured import StructuredPruning
from .top import ToP

METHODS = (ToP, StructuredPruning, InforCoef, Compose)
