"""Plain integers and floats as the 0-d tensors that the ops take."""

import torch

MIN_BITS, MAX_BITS = 2, 16


def integer_tensor(
    argument: str, value: int | torch.Tensor, low: int, high: int, device: torch.device
) -> torch.Tensor:
    """A 0-d int64 tensor on `device`; a plain integer must lie in [low, high]."""
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{argument}: expected an integer or a 0-d int64 tensor, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{argument}: expected an integer in [{low}, {high}], got {value}")
    return torch.full((), value, dtype=torch.int64, device=device)


def bits_tensor(bits: int | torch.Tensor, device: torch.device) -> torch.Tensor:
    return integer_tensor("bits", bits, MIN_BITS, MAX_BITS, device)


def seed_tensor(seed: int | torch.Tensor, device: torch.device) -> torch.Tensor:
    return integer_tensor("seed", seed, 0, 2**63 - 1, device)


def fp32_tensor(value: float | torch.Tensor, device: torch.device) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value if value.dtype is torch.float32 else value.float()
    return torch.full((), value, dtype=torch.float32, device=device)
