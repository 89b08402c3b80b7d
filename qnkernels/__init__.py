"""Training with quantization noise and extreme compression for PyTorch."""

from . import functional
from .backends import BackendUnavailable, backend

__version__ = "0.1.0"

__all__ = ["BackendUnavailable", "backend", "functional"]
