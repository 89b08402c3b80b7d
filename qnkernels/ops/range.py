"""minmax, histogram_range and update_range_: what range of values a quantizer covers."""

import torch

from ..backends import select
from . import checks
from .library import op

OBSERVERS = ("minmax", "ema_minmax", "histogram")


def _check(x, axis, group_size) -> tuple[int, ...]:
    checks.check_float("x", x)
    shape = checks.parameter_shape(x.shape, axis, group_size)
    checks.check_not_empty("x", x)
    return shape


def _fake_range(x, axis=None, group_size=None):
    shape = _check(x, axis, group_size)
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.float32)


@op("minmax(Tensor x, int? axis=None, int? group_size=None) -> (Tensor, Tensor)", _fake_range)
def minmax(x, axis=None, group_size=None):
    _check(x, axis, group_size)
    return select("minmax", checks.device_type(x))(x.contiguous(), axis, group_size)


def _fake_histogram_range(x, bits, axis=None, group_size=None):
    checks.check_counter("bits", bits, x.device)
    return _fake_range(x, axis, group_size)


@op(
    "histogram_range(Tensor x, Tensor bits, int? axis=None, int? group_size=None) -> (Tensor, Tensor)",
    _fake_histogram_range,
)
def histogram_range(x, bits, axis=None, group_size=None):
    _check(x, axis, group_size)
    checks.check_counter("bits", bits, x.device)
    return select("histogram_range", checks.device_type(x))(x.contiguous(), bits, axis, group_size)


def _fake_quantization_parameters(low, high, bits, symmetric=False):
    checks.check_dtype("low", low, torch.float32)
    checks.check_dtype("high", high, torch.float32)
    checks.check_same_device("high", high, low.device)
    checks.check_counter("bits", bits, low.device)
    if low.shape != high.shape:
        checks.fail("high", f"the shape of low, {tuple(low.shape)}", tuple(high.shape))
    return low.new_empty(low.shape), low.new_empty(low.shape)


@op(
    "quantization_parameters(Tensor low, Tensor high, Tensor bits, bool symmetric=False) -> (Tensor, Tensor)",
    _fake_quantization_parameters,
)
def quantization_parameters(low, high, bits, symmetric=False):
    _fake_quantization_parameters(low, high, bits, symmetric)
    kernel = select("quantization_parameters", checks.device_type(low))
    return kernel(low.contiguous(), high.contiguous(), bits, symmetric)


def _check_update(x, low, high, step, bits, observer, every, momentum, axis=None, group_size=None):
    _check(x, axis, group_size)
    checks.check_parameter("low", low, x, axis, group_size)
    checks.check_parameter("high", high, x, axis, group_size)
    checks.check_counter("step", step, x.device)
    checks.check_counter("bits", bits, x.device)
    if observer not in OBSERVERS:
        checks.fail("observer", f"one of {OBSERVERS}", repr(observer))
    if every < 0:
        checks.fail("every", "0 (first forward only) or a number of forwards", every)
    if not 0.0 < momentum <= 1.0:
        checks.fail("momentum", "a rate in (0, 1]", momentum)


@op(
    "update_range_(Tensor x, Tensor(a!) low, Tensor(b!) high, Tensor(c!) step, Tensor bits, str observer, "
    "int every, float momentum, int? axis=None, int? group_size=None) -> ()",
    _check_update,
)
def update_range_(x, low, high, step, bits, observer, every, momentum, axis=None, group_size=None):
    _check_update(x, low, high, step, bits, observer, every, momentum, axis, group_size)
    kernel = select("update_range_", checks.device_type(x))
    kernel(x.contiguous(), low, high, step, bits, observer, every, momentum, axis, group_size)
