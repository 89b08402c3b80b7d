"""Calls past the dispatcher: when they are, that nothing differs, and that whoever looks at ops sees them."""

from inspect import unwrap

import pytest
import torch
from numeric import assert_identical, integer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import qnkernels as qnk
from qnkernels import functional as F
from qnkernels.backends import watchers
from qnkernels.ops import direct as module
from qnkernels.ops import int_linear as family
from qnkernels.reference.int_linear import pack

OPS = torch.ops.qnkernels


@pytest.fixture(params=[False, True], ids=["checked", "whole"])
def call(request):
    """int_linear(x, weight, scale, zero_point, bias, bits), which counts its calls of the dispatcher."""

    def dispatched(*arguments):
        dispatched.count += 1
        return OPS.int_linear(*arguments)

    dispatched.count, dispatched.default = 0, OPS.int_linear.default
    counted = module.direct(dispatched, unwrap(family.int_linear))
    counted.differentiate(family._backward, family._setup_context)
    return module.whole_first("int_linear", counted) if request.param else counted


def inputs(seed: int = 0, rows=(3,)) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    weight = pack(torch.randint(0, 256, (5, 8), generator=generator), 8)
    scale = torch.rand(5, 2, generator=generator) + 0.1
    zero_point = torch.randint(0, 256, (5, 2), generator=generator).to(torch.uint8)
    bias = torch.randn(5, generator=generator)
    return torch.randn(*rows, 8, generator=generator), weight, scale, zero_point, bias, 8


def check(call, arguments, count: int) -> torch.Tensor:
    y = call(*arguments)
    assert call.dispatched.count == count
    expected = OPS.int_linear(*arguments)
    assert_identical(y.detach(), expected.detach())
    assert (y.requires_grad, y.is_leaf, y.is_inference(), y._is_view()) == (
        *(expected.requires_grad, expected.is_leaf, expected.is_inference(), expected._is_view()),
    )
    return y


@pytest.mark.parametrize("rows", [(), (3,), (2, 3), (0,), (2, 0, 1)], ids=str)
def test_plain_tensors(call, rows):
    arguments = inputs(rows=rows)
    assert not check(call, arguments, 0).requires_grad
    with torch.inference_mode():
        assert check(call, arguments, 0).is_inference()
    without = (*arguments[:3], None, None, 8)
    check(call, without, 0)
    with torch.autocast("cpu", torch.bfloat16), qnk.backend("reference"):
        check(call, arguments, 0)


def test_inference_tensors_outside_inference_mode(call):
    with torch.inference_mode():
        arguments = inputs()
    assert not check(call, arguments, 0).is_inference()


def test_parameters_without_a_gradient(call):
    x, weight, scale, zero_point, bias, bits = inputs()
    frozen = torch.nn.Parameter(bias, requires_grad=False)
    check(call, (x, weight, scale, zero_point, frozen, bits), 0)
    with torch.no_grad():
        check(call, (x, weight, scale, zero_point, torch.nn.Parameter(bias), bits), 0)


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("rows", [(3,), (2, 3)], ids=str)
def test_gradients(call, wanted, rows):
    x, weight, scale, zero_point, bias, bits = inputs(rows=rows)
    for dtype in (torch.float32, torch.bfloat16):
        x, bias = x.to(dtype), bias.to(dtype)
        grads = []
        for function in (call, OPS.int_linear):
            leaves = [t.clone().requires_grad_(flag) for t, flag in zip((x, bias), wanted, strict=True)]
            y = function(leaves[0], weight, scale, zero_point, leaves[1], bits)
            assert y.requires_grad and not y.is_leaf
            y.relu_().square().sum().backward()  # an activation in place, as after nn.Linear
            grads.append([leaf.grad for leaf in leaves])
        for actual, expected, flag in zip(*grads, wanted, strict=True):
            assert (actual is not None) == (expected is not None) == flag
            if flag:
                assert_identical(actual, expected)
    assert call.dispatched.count == 0


def test_second_derivative():
    """Of a formula whose own gradient is an op with a formula."""
    x, scale, zero_point = torch.linspace(-3, 3, 24), torch.tensor(0.1), torch.tensor(16.0)
    results = []
    arguments = (scale, zero_point, integer(5), 0.5, integer(3), None, None, None, True)
    for function in (qnk.ops.fake_quantize.fake_quantize, OPS.fake_quantize):
        leaf = x.clone().requires_grad_()
        y, _ = function(leaf, *arguments)
        (grad,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), leaf)[0])
    assert results[0].abs().sum() > 0
    assert_identical(*results)


class SeenOps(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


def test_dispatch_mode_sees_the_op(call):
    arguments = inputs()
    with SeenOps() as mode:
        y = call(*arguments)
    assert OPS.int_linear.default in mode.seen and call.dispatched.count == 1
    assert_identical(y, OPS.int_linear(*arguments))
    check(call, arguments, 1)


class SeenFunctions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen = function
        return function(*args, **(kwargs or {}))


def test_function_mode_sees_the_op(call):
    with SeenFunctions() as mode:
        call(*inputs())
        assert mode.seen is OPS.int_linear


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_default_device(call, device):
    arguments = inputs()
    with torch.device(device):
        y = call(*arguments)
        w = F.fake_quantize(arguments[0], torch.tensor(0.1, device="cpu"), torch.tensor(3.0, device="cpu"))
    assert call.dispatched.count == 1 and w.device.type == "cpu"
    assert_identical(y, OPS.int_linear(*arguments))


class Subclass(torch.Tensor):
    pass


def test_subclass(call):
    x, *rest = inputs()
    y = call(x.as_subclass(Subclass), *rest)
    assert call.dispatched.count == 1 and type(y) is Subclass
    assert_identical(y.as_subclass(torch.Tensor), OPS.int_linear(x, *rest))
    call(x, *rest[:3], rest[3].as_subclass(Subclass), 8)
    assert call.dispatched.count == 2


def test_fake_tensors_in_and_out_of_their_mode(call):
    with FakeTensorMode() as mode:
        fake = tuple(mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in inputs())
        inside = call(*fake)
    outside = call(*fake)
    assert call.dispatched.count == 2
    assert type(inside) is type(outside) is type(fake[0]) and inside.shape == outside.shape == (3, 5)


def test_meta_tensors(call):
    meta = tuple(t.to("meta") if isinstance(t, torch.Tensor) else t for t in inputs())
    assert call(*meta).shape == (3, 5) and call(*meta).is_meta
    assert call.dispatched.count == 2


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_make_fx(call, tracing_mode):
    x, *rest = inputs()
    graph = make_fx(lambda x: call(x, *rest), tracing_mode=tracing_mode, _allow_non_fake_inputs=True)(x)
    assert call.dispatched.count == 1
    assert OPS.int_linear.default in [node.target for node in graph.graph.nodes]
    assert_identical(graph(2 * x), OPS.int_linear(2 * x, *rest))


def test_jit_trace(call):
    x, *rest = inputs()
    traced = torch.jit.trace(lambda x: call(x, *rest), (x,), check_trace=False)
    assert call.dispatched.count == 1 and "qnkernels::int_linear" in str(traced.graph)
    assert_identical(traced(2 * x), OPS.int_linear(2 * x, *rest))


def test_fx_symbolic_trace(call):
    x, *rest = inputs()
    graph = torch.fx.symbolic_trace(lambda x: call(x, *rest))
    assert OPS.int_linear in [node.target for node in graph.graph.nodes]
    assert_identical(graph(x), OPS.int_linear(x, *rest))


@pytest.mark.parametrize("grad", [False, True])
def test_compile_and_export(call, grad):
    x, *rest = inputs()
    x.requires_grad_(grad)

    class Layer(torch.nn.Module):
        def forward(self, x):
            return qnk.ops.int_linear.int_linear(x, *rest)

    expected = OPS.int_linear(x, *rest)
    compiled = torch.compile(Layer(), fullgraph=True, backend="aot_eager")(x)
    assert_identical(compiled.detach(), expected.detach())
    if grad:
        gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (compiled, expected)]
        assert_identical(*gradients)
    exported = torch.export.export(Layer(), (x,))
    assert OPS.int_linear.default in [node.target for node in exported.graph.nodes]


@pytest.mark.filterwarnings("ignore:.*batching rule:UserWarning")
def test_function_transforms(call):
    x, *rest = inputs()
    transforms = (
        lambda f: torch.func.vmap(f)(x),
        lambda f: torch.func.grad(lambda x: f(x).square().sum())(x),
        lambda f: torch.func.functionalize(f)(x),
    )
    for count, transform in enumerate(transforms, start=1):
        results = []
        for function in (call, OPS.int_linear):
            try:
                results.append(transform(lambda x, function=function: function(x, *rest)))
            except RuntimeError as error:  # a transform that the op does not support
                results.append(str(error))
        assert call.dispatched.count >= count
        if isinstance(results[1], str):
            assert results[0] == results[1]
        else:
            assert_identical(*results)


def test_forward_derivatives(call):
    x, *rest = inputs()
    with torch.autograd.forward_ad.dual_level():
        y = call(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)), *rest)
        zero = call(torch._efficientzerotensor((3, 8)), *rest)
    assert call.dispatched.count == 2
    assert_identical(y, OPS.int_linear(x, *rest))
    assert_identical(zero, OPS.int_linear(torch.zeros(3, 8), *rest))


def test_tensors_that_only_the_dispatcher_resolves(call):
    x, *rest = inputs()
    flipped = torch.complex(x, x).conj().imag
    assert flipped.is_neg()
    assert_identical(call(flipped, *rest), OPS.int_linear(-x, *rest))
    leaked = []
    torch.func.grad(lambda x: (leaked.append(2 * x), x.sum())[1])(x)
    assert_identical(call(leaked[0], *rest), OPS.int_linear(2 * x, *rest))
    assert call.dispatched.count == 2


@pytest.mark.parametrize("position", [2, 4])  # scale, bias
def test_parameters_whose_sign_is_to_be_flipped(call, position):
    arguments = list(inputs())
    arguments[position] = torch._neg_view(-arguments[position])
    assert arguments[position].is_neg() and arguments[position].is_contiguous()
    assert_identical(check(call, arguments, 1), OPS.int_linear(*inputs()))


def test_profiler_shows_the_op(call):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call(*inputs())
    assert "qnkernels::int_linear" in [event.key for event in profile.key_averages()]
    check(call, inputs(), 1)


def test_arguments_of_other_types(call):
    x, *rest = inputs()
    for wrong in (8.0, "8", None, True):
        with pytest.raises((RuntimeError, ValueError)) as raised:
            call(x, *rest[:-1], wrong)
        with pytest.raises(type(raised.value)) as expected:
            OPS.int_linear(x, *rest[:-1], wrong)
        assert str(raised.value) == str(expected.value)
    with pytest.raises(RuntimeError, match="bits"):
        call(x, *rest[:-1])
    assert call.dispatched.count == 5


def test_without_the_tests_of_torch(call, monkeypatch):
    """A torch that lacks a name: every call goes through the dispatcher."""
    monkeypatch.delattr(torch._C, "_are_functorch_transforms_active")
    assert watchers.find() is None
    monkeypatch.setattr(module, "WATCHERS", watchers.find())
    always = module.direct(call.dispatched, unwrap(family.int_linear))
    always.differentiate(family._backward, family._setup_context)
    check(always, inputs(), 1)


def calls() -> dict:
    """A call of each op of the typed face."""
    x, weight, scale, zero_point, bias, bits = inputs()
    w, indices = torch.randn(6, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([[0, 2], [1, 1]])
    codes, codebook = torch.tensor([[0], [2], [1]]).to(torch.uint8), w[:3]
    packed = (weight, scale, zero_point)
    step = integer(0)

    def update_range():
        low, high = torch.zeros(6), torch.zeros(6)
        F.update_range_(w, low, high, step.clone(), axis=0)
        return low, high

    return {
        "minmax": lambda: F.minmax(w, 0),
        "histogram_range": lambda: F.histogram_range(w, 4),
        "quantization_parameters": lambda: F.quantization_parameters(w.min(), w.max(), 4),
        "update_range_": update_range,
        "fake_quantize": lambda: F.fake_quantize(w, 0.1, 8.0, 4, p=0.5, seed=3),
        "block_noise": lambda: F.block_noise(w, 4, 0.5, 3),
        "int_linear": lambda: F.int_linear(x, *packed, bias, bits),
        "int_linear_quantized": lambda: F.int_linear_quantized(x, *packed, bias, bits),
        "int_embedding": lambda: F.int_embedding(indices, *packed),
        "kmeans_assign": lambda: F.kmeans_assign(w, codebook),
        "kmeans_update": lambda: F.kmeans_update(w, integer(1).int().expand(6), 3, 4),
        "pq_decode": lambda: F.pq_decode(codes, codebook),
        "pq_linear": lambda: F.pq_linear(x, codes, codebook),
        "pq_embedding": lambda: F.pq_embedding(indices, codes, codebook),
        "round_to": lambda: F.round_to(w, torch.bfloat16),
    }


@pytest.mark.parametrize("name", list(calls()))
def test_every_op_is_seen_and_the_same(name):
    plain = calls()[name]()
    with SeenOps() as mode:
        seen = calls()[name]()
    assert getattr(OPS, name).default in mode.seen
    for a, b in zip(*((v,) if isinstance(v, torch.Tensor) else v for v in (plain, seen)), strict=True):
        assert_identical(a, b)


@pytest.mark.parametrize("name", list(calls()))
def test_every_op_goes_past_the_dispatcher(name, monkeypatch):
    def refuse(packet, *arguments):
        raise AssertionError(f"{packet} was called")

    monkeypatch.setattr(torch._ops.OpOverloadPacket, "__call__", refuse)
    calls()[name]()
    with torch.profiler.profile(), pytest.raises(AssertionError, match=name):
        calls()[name]()
