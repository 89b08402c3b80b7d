"""The noise of a layer as small modules: a weight (or an activation) in, its noised copy out.

Their state lives in non-persistent buffers, so a noisy layer has the state_dict of the plain one.
"""

import torch
from torch import nn

from .. import functional
from ..ops.block_noise import KINDS
from ..ops.checks import FLOATS, check_rate, fail
from ..ops.direct import watched
from ..ops.kmeans import MAX_CLUSTERS, MAX_DIMENSION
from ..ops.range import OBSERVERS
from .fixed import FixedBuffers
from .noise_codebook import NoiseCodebook

GRANULARITIES = ("tensor", "channel", "group")


def check_integer(argument: str, value: object, low: int, high: int | None = None) -> None:
    expected = f"an integer of at least {low}" if high is None else f"an integer in [{low}, {high}]"
    if type(value) is not int or value < low or (high is not None and value > high):
        fail(argument, expected, repr(value))


def check_number(argument: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{argument}: expected a number, got {value!r}")


def check_scalar_options(
    bits: int, p: float, observer: str, per: str, group_size: int | None, update_every: int, momentum: float
) -> None:
    """What `ScalarNoise` accepts, apart from the weight; raises ValueError naming the argument."""
    check_integer("bits", bits, functional.MIN_BITS, functional.MAX_BITS)
    check_number("p", p)
    check_rate(p)
    if observer not in OBSERVERS:
        fail("observer", f"one of {OBSERVERS}", repr(observer))
    if per not in GRANULARITIES:
        fail("per", f"one of {GRANULARITIES}", repr(per))
    if per == "group":
        check_integer("group_size", group_size, 1)
    elif group_size is not None:
        fail("group_size", f"None with per={per!r}", group_size)
    check_integer("update_every", update_every, 0)
    check_number("momentum", momentum)
    if not 0.0 < momentum <= 1.0:
        fail("momentum", "a rate in (0, 1]", momentum)


def check_block_options(
    block_size: int, p: float, kind: str, n_centroids: int, update_every: int, n_iter: int
) -> None:
    """What `BlockNoise` accepts, apart from the weight; raises ValueError naming the argument."""
    check_integer("block_size", block_size, 1, MAX_DIMENSION if kind == "centroid" else None)
    check_integer("n_centroids", n_centroids, 2, MAX_CLUSTERS)
    check_integer("update_every", update_every, 0)
    check_integer("n_iter", n_iter, 1)
    check_number("p", p)
    check_rate(p)
    if kind not in KINDS:
        fail("kind", f"one of {KINDS}", repr(kind))


def draw_seed(device: torch.device) -> torch.Tensor:
    """A fresh seed from torch's generator, 0-d int64 on `device`; nothing waits for the device."""
    return torch.randint(0, 2**62, (), device=device)


def in_recomputation() -> bool:
    """Whether a backward pass is running: activation checkpointing then repeats a forward.

    The repeated forward must see the range that the first one left, and must not be counted again. Under
    torch.compile there is no second forward to tell: torch repeats the compiled operations from the state
    as it is by then. The noise is the same there too; the range is, unless an observation is due in the
    next forward or is averaged ("ema_minmax"): then the gradient is that of the range after it.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class ObservedRange(FixedBuffers):
    """The range of a quantizer, observed once in every `update_every` training forwards.

    Buffers: low, high fp32 of `shape`; step, the training forwards so far, and bits, both 0-d int64. Bits
    may be changed at any time, in place, without recompilation. None is saved, unless `persistent` says that
    all but bits are.
    """

    FIXED = ("low", "high", "step", "bits")
    _kept: tuple | None = None  # see _scale_and_bits

    def __init__(
        self,
        shape: tuple[int, ...],
        bits: int,
        observer: str,
        update_every: int,
        momentum: float,
        device: torch.device,
        axis: int | None = None,
        group_size: int | None = None,
        persistent: bool = False,
    ) -> None:
        super().__init__()
        self.observer, self.update_every, self.momentum = observer, update_every, momentum
        self.axis, self.group_size = axis, group_size
        self.register_buffer("low", torch.zeros(shape, device=device), persistent)
        self.register_buffer("high", torch.zeros(shape, device=device), persistent)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=device), persistent)
        bits = torch.full((), bits, dtype=torch.int64, device=device)
        self.register_buffer("bits", bits, persistent=False)

    def _observe_(self, x, low, high, step, every) -> None:
        functional.update_range_(
            x, low, high, step, self.bits, self.observer, every, self.momentum, self.axis, self.group_size
        )

    def training_range(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Count a training forward on x, refresh the range where it is due, and return it."""
        if not in_recomputation() and not self._counted_(x):
            self._observe_(x, self.low, self.high, self.step, self.update_every)
        return self.low, self.high

    def _counted_(self, x: torch.Tensor) -> bool:
        """Count a training forward that refreshes nothing, on the CPU while nobody looks at ops, and return
        True: the op would take longer."""
        step, every = self._buffers["step"], self.update_every
        if watched(step, x) or not (step.is_cpu and x.is_cpu) or x.dtype not in FLOATS:
            return False
        now = int(step)
        if now == 0 or (every > 0 and now % every == 0):
            return False
        step += 1
        return True

    def _scale_and_bits(
        self, low: torch.Tensor, high: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scale, zero point and a copy of bits, so that the precision may change between a forward and its
        backward. Those of the last call are kept, for one range on the CPU that is the same now.
        """
        bits = self._buffers["bits"]
        keep = not (watched(low, high, bits) or torch.is_inference_mode_enabled())
        keep = keep and low.dim() == 0 and low.is_cpu
        values = (float(low), float(high), int(bits)) if keep else None
        if keep and self._kept is not None and self._kept[0] == values:
            return self._kept[1]
        bits = bits.clone()
        scale, zero_point = functional.quantization_parameters(low, high, bits)
        found = scale, zero_point, bits
        if keep:
            self._kept = values, found
        return found

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}

    def stored_range(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The range as training left it, or that of x before any training forward; changes no state."""
        low, high = self.low.clone(), self.high.clone()
        self._observe_(x, low, high, self.step.clone(), every=0)
        return low, high


class ScalarNoise(ObservedRange):
    """Scalar quantization noise on a weight [out, ...] (Quant-Noise, arXiv 2004.07320, section 4.2).

    In training each weight is quantized at rate p; the range is refreshed every `update_every` forwards.
    In eval every weight is quantized over the range as it is now ("ema_minmax": over the averaged one),
    which is what exporting the layer gives, and no random number is drawn.

    weight: gives shape and device only. bits: 2 to 16. per: "tensor", "channel" (output channel,
    embedding row) or "group" of `group_size` consecutive weights of a row of weight.flatten(1).
    update_every: 0 observes the first forward only. momentum: of the observer "ema_minmax".
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bits: int = 8,
        p: float = 0.5,
        observer: str = "minmax",
        per: str = "tensor",
        group_size: int | None = None,
        update_every: int = 100,
        momentum: float = 0.1,
    ) -> None:
        check_scalar_options(bits, p, observer, per, group_size, update_every, momentum)
        rows, columns = weight.flatten(1).shape
        if per == "group" and columns % group_size:
            fail("group_size", f"a divisor of the {columns} weights of a row", group_size)
        shape = {"tensor": (), "channel": (rows,), "group": (rows, columns // (group_size or columns))}[per]
        axis = 0 if per == "channel" else None
        super().__init__(shape, bits, observer, update_every, momentum, weight.device, axis, group_size)
        self.p, self.per = p, per

    def forward(self, weight: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """weight [out, ...] -> its noised copy, in `dtype` (that of weight by default)."""
        rows = weight.flatten(1)
        quantizer = self.quantizer(rows)
        if quantizer is None:
            return weight
        return functional.fake_quantize(rows, **quantizer, dtype=dtype).view(weight.shape)

    def quantizer(self, rows: torch.Tensor) -> dict | None:
        """Observe weight [out, columns]; the arguments of functional.fake_quantize for it, or None."""
        p, seed = 1.0, 0
        if self.training:
            low, high = self.training_range(rows.detach())
            if self.p == 0.0:
                return None
            p, seed = self.p, draw_seed(rows.device)
        else:
            low, high = self._range_now(rows.detach())
        scale, zero_point, bits = self._scale_and_bits(low, high)
        layout = dict(axis=self.axis, group_size=self.group_size)
        return dict(scale=scale, zero_point=zero_point, bits=bits, p=p, seed=seed, **layout)

    def _range_now(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.observer == "minmax":
            return functional.minmax(rows, self.axis, self.group_size)
        if self.observer == "histogram":
            return functional.histogram_range(rows, self.bits, self.axis, self.group_size)
        return self.stored_range(rows)

    def extra_repr(self) -> str:
        groups = "" if self.group_size is None else f", group_size={self.group_size}"
        return (
            f"bits={self.bits.tolist()}, p={self.p}, observer={self.observer!r}, per={self.per!r}{groups}, "
            f"update_every={self.update_every}"
        )


class BlockNoise(nn.Module):
    """Product-quantization noise on a weight [out, ...], or a proxy of it (Quant-Noise, section 4.2).

    In training, blocks of `block_size` consecutive weights of a row of weight.flatten(1) become 0, their
    mean or (kind "centroid") the nearest of `n_centroids` codewords at rate p. In eval a proxy returns the
    weight as it is, and kind "centroid" the weight with every block at its nearest codeword, as product
    quantization would. update_every, n_iter: of the codewords, see NoiseCodebook.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        block_size: int = 8,
        p: float = 0.1,
        kind: str = "zero",
        rescale: bool = True,
        n_centroids: int = 256,
        update_every: int = 100,
        n_iter: int = 3,
    ) -> None:
        check_block_options(block_size, p, kind, n_centroids, update_every, n_iter)
        columns = weight.flatten(1).shape[1]
        if columns % block_size:
            fail("block_size", f"a divisor of the {columns} weights of a row", block_size)
        super().__init__()
        self.block_size, self.p, self.kind, self.rescale = block_size, p, kind, rescale
        if kind == "centroid":
            self.codewords = NoiseCodebook(weight, block_size, n_centroids, update_every, n_iter)

    def forward(self, weight: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """weight [out, ...] -> its noised copy, in `dtype` (that of weight by default)."""
        rows = weight.flatten(1)
        codebook, p, seed = None, self.p, 0
        if self.kind == "centroid":
            if self.training:
                codebook = self.codewords.training_codebook(rows.detach(), not in_recomputation())
            else:
                codebook, p = self.codewords.stored_codebook(rows.detach()), 1.0
        elif not self.training:
            return weight
        if p == 0.0:
            return weight
        if self.training:
            seed = draw_seed(weight.device)
        options = (self.block_size, p, seed, self.kind, self.rescale, dtype, codebook)
        noised = functional.block_noise(rows, *options)
        return noised if weight.dim() == 2 else noised.view(weight.shape)

    def extra_repr(self) -> str:
        return f"block_size={self.block_size}, p={self.p}, kind={self.kind!r}, rescale={self.rescale}"


class ActivationNoise(ObservedRange):
    """Fake quantization of a layer's output, one scale per tensor.

    In training the range is observed and the output is quantized at rate p (0: observed only). In eval
    the whole output is quantized over the range that training observed; before any training forward,
    over its own. An empty output passes unchanged and is not observed. persistent: the range is saved with
    the model.
    """

    def __init__(
        self,
        bits: int = 8,
        p: float = 0.0,
        observer: str = "minmax",
        update_every: int = 100,
        momentum: float = 0.1,
        device: torch.device | None = None,
        persistent: bool = False,
    ) -> None:
        check_scalar_options(bits, p, observer, "tensor", None, update_every, momentum)
        super().__init__((), bits, observer, update_every, momentum, device, persistent=persistent)
        self.p = p

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        """y of any shape -> the same shape and dtype."""
        if y.numel() == 0:
            return y
        p, seed = 1.0, 0
        if self.training:
            low, high = self.training_range(y.detach())
            if self.p == 0.0:
                return y
            p, seed = self.p, draw_seed(y.device)
        else:
            low, high = self.stored_range(y.detach())
        scale, zero_point, bits = self._scale_and_bits(low, high)
        return functional.fake_quantize(y, scale, zero_point, bits, p=p, seed=seed)

    def extra_repr(self) -> str:
        return (
            f"bits={self.bits.tolist()}, p={self.p}, observer={self.observer!r}, "
            f"update_every={self.update_every}"
        )
