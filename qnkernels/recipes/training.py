"""Training and evaluation of the demo's language model."""

import ctypes
import functools
import math
import platform
import statistics
import time
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from .transformer import LanguageModel

BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
WARMUP = 0.1  # of the steps
FINAL_RATE = 0.02  # of the peak learning rate
CLIP = 1.0
ROUNDS = 5

Job = TypeVar("Job", bound=Hashable)


def precision(device: torch.device) -> str:
    """What matrix products are trained in: "bf16" where that is fast (GPUs that have it, CPUs with AMX)."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16", False)
    return "bf16" if fast else "fp32"


def keep_freed_memory() -> None:
    """Have glibc keep what activations free for the next step, instead of unmapping and faulting it in again.

    A training step on a CPU is a third faster for it. Of no effect with other C libraries.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mmap_threshold, trim_threshold = -3, -1
    libc = ctypes.CDLL(None)
    libc.mallopt(mmap_threshold, 1 << 25)  # the most that older versions take
    libc.mallopt(trim_threshold, (1 << 31) - 1)


def windows(tokens: torch.Tensor, starts: torch.Tensor, length: int) -> torch.Tensor:
    """`length` tokens from each of `starts` [n] -> int64 [n, length]."""
    return tokens[starts[:, None] + torch.arange(length, device=starts.device)].long()


def cross_entropy(model: nn.Module, batch: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Of predicting batch[:, 1:] from what stands before; batch int64 [n, tokens + 1]; in nats."""
    logits = model(batch[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten(), reduction=reduction)


class Trainer:
    """AdamW with warm-up and a cosine schedule on random windows of the text.

    Windows and schedule follow from `seed` and `steps` alone, so that all methods see the same data in
    the same order. `each_step` is called after each step.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokens: torch.Tensor,
        batch: int,
        steps: int,
        rate: float,
        seed: int,
        weight_decay: float = WEIGHT_DECAY,
        each_step: Callable[[], None] = lambda: None,
    ) -> None:
        self.each_step = each_step
        self.model, self.tokens, self.steps, self.rate = model, tokens, steps, rate
        self.step = 0
        self.window = model.shape.context + 1
        generator = torch.Generator().manual_seed(seed)
        self.starts = torch.randint(0, len(tokens) - self.window + 1, (steps, batch), generator=generator)
        parameters = list(model.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        bf16 = precision(tokens.device) == "bf16"
        self.autocast = functools.partial(torch.autocast, tokens.device.type, torch.bfloat16, bf16)
        self.optimizer = torch.optim.AdamW(groups, lr=rate, betas=BETAS, fused=True)

    def scheduled_rate(self) -> float:
        warmup = max(1, int(WARMUP * self.steps))
        if self.step < warmup:
            return self.rate * (self.step + 1) / warmup
        progress = (self.step - warmup) / max(1, self.steps - warmup)
        return self.rate * (FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * progress)))

    def train_step(self) -> torch.Tensor:
        """One step; returns the loss, 0-d on the device."""
        starts = self.starts[self.step % self.steps].to(self.tokens.device)
        for group in self.optimizer.param_groups:
            group["lr"] = self.scheduled_rate()
        with self.autocast():
            loss = cross_entropy(self.model, windows(self.tokens, starts, self.window))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.each_step()
        return loss.detach()

    def run(self, report: Callable[[int, float], None]) -> None:
        """All steps; `report(step, loss)` after each one on a CPU, after every tenth on a GPU."""
        every = 1 if self.tokens.device.type == "cpu" else 10
        self.model.train()
        while self.step < self.steps:
            loss = self.train_step()
            if self.step % every == 0 or self.step == self.steps:
                value = loss.item()
                if not math.isfinite(value):
                    raise FloatingPointError(
                        f"loss: expected a finite number at step {self.step}, got {value}"
                    )
                report(self.step, value)


@torch.no_grad()
def perplexity(model: LanguageModel, tokens: torch.Tensor, limit: int, batch: int) -> float:
    """exp of the mean loss over up to `limit` tokens, in windows spread evenly, in eval mode and fp32."""
    model.eval()
    context = model.shape.context
    count = max(1, min(limit, len(tokens) - 1) // context)
    starts = torch.linspace(0, len(tokens) - context - 1, count, device=tokens.device).long()
    total = 0.0
    for some in starts.split(batch):
        total += cross_entropy(model, windows(tokens, some, context + 1), reduction="sum").item()
    return math.exp(total / (count * context))


def interleaved_seconds(
    jobs: dict[Job, Callable[[], object]], budget: float, device: torch.device
) -> dict[Job, float]:
    """Median seconds of each job, run in turns so that a slow moment of the machine hits all alike.

    After a round to warm up, as many rounds as fit into `budget` seconds, but at least ROUNDS.
    """
    samples: dict[Job, list[float]] = {name: [] for name in jobs}
    turn, end = 0, math.inf
    while turn <= ROUNDS or time.perf_counter() < end:
        for name, job in jobs.items():
            _wait(device)
            begin = time.perf_counter()
            job()
            _wait(device)
            if turn:
                samples[name].append(time.perf_counter() - begin)
        if turn == 0:
            end = time.perf_counter() + budget
        turn += 1
    return {name: statistics.median(times) for name, times in samples.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
