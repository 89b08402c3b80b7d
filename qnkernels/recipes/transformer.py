"""The demo's model: a decoder-only transformer language model."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

ROTARY_BASE = 10000.0
# Groups of layers, by a regular expression found in their names; the embedding is the output layer, too.
GROUPS = {"attention": "attention", "ffn": r"fc[12]", "embedding": "embedding|head"}


@dataclass(frozen=True)
class Shape:
    """Sizes of a model: `width` splits into `heads`; `context` is the most tokens it attends to."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    context: int


@dataclass
class Cache:
    """Keys and values of the tokens seen so far: per layer [batch, heads, context, head width]."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    length: int = 0

    @classmethod
    def empty(cls, shape: Shape, batch: int, device: torch.device, dtype: torch.dtype) -> "Cache":
        size = (batch, shape.heads, shape.context, shape.width // shape.heads)
        make = lambda: [torch.zeros(size, device=device, dtype=dtype) for _ in range(shape.layers)]  # noqa: E731
        return cls(make(), make())


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of x [batch, heads, tokens, width] by angles [tokens, width / 2]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention of q [batch, heads, tokens, width] to the keys up to its own position; same shape out.

    On a CPU two matrix products take a quarter of the time of scaled_dot_product_attention, forward and
    backward in bf16 at 128 tokens: its backward does not reach the AMX units.
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if q.shape[2] > 1:
        future = torch.full(scores.shape[-2:], float("-inf"), dtype=scores.dtype, device=q.device)
        scores = scores + future.triu(1 + k.shape[2] - q.shape[2])
    return scores.softmax(dim=-1) @ v


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x, angles, cache: Cache | None, layer: int) -> torch.Tensor:
        """x [batch, tokens, width] -> same; with a cache, appends to it and attends to all of it."""
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        cos, sin = (angle.to(q.dtype) for angle in angles)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            end = cache.length + tokens
            cache.keys[layer][:, :, cache.length : end] = k
            cache.values[layer][:, :, cache.length : end] = v
            k, v = cache.keys[layer][:, :, :end], cache.values[layer][:, :, :end]
        return self.out(causal_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(shape.width)
        self.attention = Attention(shape)
        self.norm2 = nn.LayerNorm(shape.width)
        self.fc1 = nn.Linear(shape.width, 4 * shape.width, bias=False)
        self.fc2 = nn.Linear(4 * shape.width, shape.width, bias=False)

    def forward(self, x, angles, cache: Cache | None, layer: int) -> torch.Tensor:
        x = x + self.attention(self.norm1(x), angles, cache, layer)
        return x + self.fc2(F.relu(self.fc1(self.norm2(x))))


class LanguageModel(nn.Module):
    """Pre-norm transformer with rotary positions; the embedding is also the output layer.

    layer_drop: the rate at which training leaves out a block (LayerDrop, arXiv 1909.11556).
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape, self.layer_drop = shape, 0.0
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        frequency = ROTARY_BASE ** -torch.linspace(0, 1, shape.width // shape.heads // 2 + 1)[:-1]
        angles = torch.arange(shape.context)[:, None] * frequency
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """GPT-2's: normal(0.02), and layers that write to the residual stream scaled by its depth."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                writes = name.endswith(("out.weight", "fc2.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * self.shape.layers) ** 0.5 if writes else 0.02)

    def forward(self, tokens: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """tokens int64 [batch, n] -> logits [batch, n, vocabulary]; n and the cached up to `context`."""
        start = 0 if cache is None else cache.length
        end = start + tokens.shape[1]
        if end > self.shape.context:
            raise ValueError(f"tokens: expected at most {self.shape.context} with the cached ones, got {end}")
        angles = self.cos[start:end], self.sin[start:end]
        x = self.embedding(tokens)
        for layer, block in enumerate(self.blocks):
            if self.training and self.layer_drop and torch.rand(()).item() < self.layer_drop:
                continue
            x = block(x, angles, cache, layer)
        if cache is not None:
            cache.length = end
        return self.head(self.norm(x))


@torch.no_grad()
def generate(model: LanguageModel, prompt: torch.Tensor, n: int) -> torch.Tensor:
    """The n most likely next tokens, one by one, after prompt [batch, t], with a cache: [batch, n]."""
    dtype = model.norm.weight.dtype
    cache = Cache.empty(model.shape, len(prompt), prompt.device, dtype)
    tokens = []
    for _ in range(n):
        prompt = model(prompt, cache)[:, -1:].argmax(dim=-1)
        tokens.append(prompt)
    return torch.cat(tokens, dim=1)
