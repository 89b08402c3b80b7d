"""Layers: state, shapes and forwards, no maths."""

from .int_conv2d import IntConv2d
from .int_embedding import IntEmbedding
from .int_linear import Int4Linear, Int8Linear, IntLinear
from .noise import ActivationNoise, BlockNoise, ScalarNoise
from .noisy import NoisyConv2d, NoisyEmbedding, NoisyLinear
from .pq import PQConv2d, PQEmbedding, PQLinear

__all__ = [
    "ActivationNoise",
    "BlockNoise",
    "Int4Linear",
    "Int8Linear",
    "IntConv2d",
    "IntEmbedding",
    "IntLinear",
    "NoisyConv2d",
    "NoisyEmbedding",
    "NoisyLinear",
    "PQConv2d",
    "PQEmbedding",
    "PQLinear",
    "ScalarNoise",
]
