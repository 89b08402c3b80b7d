"""Which layers suffer from quantization, measured: one group of layers at a time, and all but one."""

from .measure import sensitivity
from .result import Row, Sensitivity

__all__ = ["Row", "Sensitivity", "sensitivity"]
