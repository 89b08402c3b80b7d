"""Training with quantization noise and extreme compression for PyTorch."""

from . import functional, nn
from .allocation import BitAllocation, allocate_bits
from .backends import BackendUnavailable, backend
from .calibrate import calibrate
from .checkpoint import compressed_size, load_compressed, save_compressed
from .cpt import BitOperations, CyclicPrecision
from .ipq import IPQ, Stage
from .kmeans import KMeansResult, kmeans
from .mixed import MixedPrecisionConfig
from .pq import PQConfig
from .precision import CyclicPrecisionConfig
from .product import ProductNoiseConfig
from .ptq import (
    Int4WeightOnlyConfig,
    Int8DynamicConfig,
    Int8StaticConfig,
    Int8WeightOnlyConfig,
    IntWeightOnlyConfig,
)
from .quantize import quantize_, remove_noise_
from .range_test import RangeTest, precision_range_test
from .scalar import ScalarNoiseConfig
from .sensitivity import Sensitivity, sensitivity

__version__ = "0.1.0"

__all__ = [
    "IPQ",
    "BackendUnavailable",
    "BitAllocation",
    "BitOperations",
    "CyclicPrecision",
    "CyclicPrecisionConfig",
    "Int4WeightOnlyConfig",
    "Int8DynamicConfig",
    "Int8StaticConfig",
    "Int8WeightOnlyConfig",
    "IntWeightOnlyConfig",
    "KMeansResult",
    "MixedPrecisionConfig",
    "PQConfig",
    "ProductNoiseConfig",
    "RangeTest",
    "ScalarNoiseConfig",
    "Sensitivity",
    "Stage",
    "allocate_bits",
    "backend",
    "calibrate",
    "compressed_size",
    "functional",
    "kmeans",
    "load_compressed",
    "nn",
    "precision_range_test",
    "quantize_",
    "remove_noise_",
    "save_compressed",
    "sensitivity",
]
