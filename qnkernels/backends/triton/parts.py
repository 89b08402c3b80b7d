"""Results that several programs have parts of, which are added up by a kernel of their own."""

import torch

from . import launch
from .launch import cdiv
from .pq_linear import SUM_BLOCK, pq_linear_sum_kernel


def parts_of(y, parts):
    """Where `parts` programs write what they have of y: y itself for one, else fp32 [parts, *y.shape]."""
    return y if parts == 1 else torch.empty(parts, *y.shape, dtype=torch.float32, device=y.device)


def add_up(parts, bias, y) -> None:
    """y = sum of parts + bias, unless y is the only part."""
    if parts is not y:
        launch.run(
            pq_linear_sum_kernel,
            (cdiv(y.numel(), SUM_BLOCK),),
            *(parts, bias, y, y.numel(), y.shape[1], len(parts)),
            **dict(BLOCK=SUM_BLOCK, num_warps=4),
        )
