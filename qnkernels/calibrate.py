"""calibrate: the range of each layer's input, recorded while a model runs."""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import nn

from .layers import naming
from .nn.encoder import choose_encoder_path_
from .nn.input_range import InputRange, record_
from .nn.noise import check_number
from .nn.noisy import NoisyConv2d, NoisyLinear, to_autocast
from .observers import EmaMinMax, Histogram, MinMax, Observer, Percentile
from .ops.checks import fail

CALIBRATES = (nn.Linear, nn.Conv2d, NoisyLinear, NoisyConv2d)
OBSERVERS = ("minmax", "ema_minmax", "percentile", "histogram")


class InputHook:
    """A forward pre-hook that shows a layer's input to an observer."""

    def __init__(self, name: str, observer: Observer) -> None:
        self.name, self.observer = name, observer
        self.saw_data = False

    @torch.no_grad()
    def __call__(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else kwargs["input"]
        if x.numel():
            with naming(self.name):
                self.observer.observe(to_autocast(x.detach()))
            self.saw_data = True


@contextlib.contextmanager
def calibrate(
    model: nn.Module,
    observer: str = "ema_minmax",
    momentum: float = 0.1,
    percentile: float = 99.99,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> Iterator[None]:
    """While the block runs, record the range of the input of each nn.Linear and nn.Conv2d, noisy or not.

        with qnk.calibrate(model):
            for batch in data: model(batch)
        qnk.quantize_(model, qnk.Int8StaticConfig())

    observer: "minmax", the extremes of everything seen; "ema_minmax", the extremes of one call of the layer,
    each call moving the range by `momentum` (as in the post-training quantization of RoBERTa); "percentile",
    [-c, c] within the extremes, c the percentile of |x|; "histogram", the range in which an 8-bit quantizer
    has the least squared error. The last two keep a histogram of 4096 bins a side, and no data.

    Layers are those for which `filter_fn(module, name)` is true, and not other subclasses of nn.Linear and
    nn.Conv2d. The range stays with its layer (and its copies) until the layer is quantized; it is no part of
    the state_dict. A calibration starts anew: it forgets earlier ranges, and records none if the block
    raises. Two at once are possible for different layers. The model computes what it always does; put it in
    eval mode first. A layer compiled by torch.compile before does not call what observes it.
    Raises ValueError for options, and naming the layer, for input that is not finite; warns if there is no
    layer.
    """
    make = _observer(observer, momentum, percentile)
    hooks = {
        module: InputHook(name, make())
        for name, module in model.named_modules()
        if type(module) in CALIBRATES and (filter_fn is None or filter_fn(module, name))
    }
    for layer, hook in hooks.items():
        if _is_observed(layer):
            with naming(hook.name):
                fail("model", "layers that no other calibration observes", "one that is observed")
    if not hooks:
        warnings.warn(f"calibrate found no layer to observe in {type(model).__name__}", stacklevel=3)
    for layer in hooks:
        record_(layer, None)
    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer, hook in hooks.items()]
    try:
        choose_encoder_path_(model, _is_observed)
        yield
    finally:
        for handle in handles:
            handle.remove()
        choose_encoder_path_(model, _is_observed)
    for layer, hook in hooks.items():
        if hook.saw_data:
            record_(layer, InputRange(*hook.observer.range()))


def _observer(observer: str, momentum: float, percentile: float) -> Callable[[], Observer]:
    if observer not in OBSERVERS:
        fail("observer", f"one of {OBSERVERS}", repr(observer))
    check_number("momentum", momentum)
    if not 0.0 < momentum <= 1.0:
        fail("momentum", "a rate in (0, 1]", momentum)
    check_number("percentile", percentile)
    if not 0.0 < percentile <= 100.0:
        fail("percentile", "a number in (0, 100]", percentile)
    return {
        "minmax": MinMax,
        "ema_minmax": functools.partial(EmaMinMax, momentum),
        "percentile": functools.partial(Percentile, percentile),
        "histogram": Histogram,
    }[observer]


def _is_observed(layer: nn.Module) -> bool:
    return any(isinstance(hook, InputHook) for hook in layer._forward_pre_hooks.values())
