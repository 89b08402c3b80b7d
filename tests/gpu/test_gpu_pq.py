"""Product-quantized layers on a GPU, against float64 and the reference on the CPU."""

import pytest
import torch

import qnkernels as qnk
from qnkernels import functional as F
from qnkernels.backends.cuda import use_wgmma

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPSILON = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# rows, blocks, d, K
WEIGHTS = ((1, 1, 1, 1), (33, 20, 8, 256), (67, 9, 4, 300), (17, 5, 9, 2), (40, 3, 33, 7))
LARGE = (
    *((768, 96, 8, 256), (1000, 129, 4, 1024), (513, 40, 16, 16), (130, 7, 64, 4000), (257, 33, 5, 200)),
    *((8192, 1024, 8, 256), (8456, 64, 4, 256)),  # enough outputs for every multiprocessor
)


def quantized(rows, n_blocks, d, n_centroids, dtype, transposed=False, device="cpu"):
    """(codes, codebook) and, on the device, the decoded weight in float64; transposed: codes are stored block
    by block."""
    generator = torch.Generator().manual_seed(rows + n_blocks * d)
    codes = torch.randint(0, n_centroids, (rows, n_blocks), generator=generator)
    codebook = torch.randn(n_centroids, d, generator=generator).to(dtype)
    weight = codebook.to(device).double()[codes.to(device)].flatten(1)
    codes = codes.to(torch.uint8 if n_centroids <= 256 else torch.uint16)
    return (codes.t().contiguous().t() if transposed else codes), codebook, weight


def moved(codes, device):
    """On the device, with the same strides."""
    return codes.t().to(device).t() if codes.stride(0) == 1 else codes.to(device)


def assert_within_bound(actual, exact, magnitude, terms):
    """|error| <= fp32 roundings of `terms` products and sums, and one rounding to the dtype."""
    bound = (terms + 8) * 2.0**-24 * magnitude + 2 * EPSILON[actual.dtype] * exact.abs() + 2.0**-25
    error = (actual.detach().double() - exact).abs()
    assert actual.shape == exact.shape
    assert (error <= bound).all(), f"error {(error / bound).max():.2f} times the bound"


def check_linear(device, backend, shape, m, dtype):
    """y and the gradients of x, codebook and bias."""
    codes, codebook, weight = quantized(*shape, dtype, m % 2 == 0, device)
    generator = torch.Generator().manual_seed(m)
    x, grad = (torch.randn(m, n, generator=generator).to(dtype) for n in (weight.shape[1], shape[0]))
    bias = torch.randn(shape[0], generator=generator).to(dtype)
    inputs = [one.to(device).requires_grad_() for one in (x, codebook, bias)]
    with qnk.backend(backend):
        y = F.pq_linear(inputs[0], moved(codes, device), *inputs[1:], codebook_grad="sum")
        grads = torch.autograd.grad(y, inputs, grad.to(device))
    x, grad, bias, weight = (one.to(device).double() for one in (x, grad, bias, weight))
    assert_within_bound(y, x @ weight.t() + bias, x.abs() @ weight.abs().t() + bias.abs(), x.shape[1])
    assert_within_bound(grads[0], grad @ weight, grad.abs() @ weight.abs(), shape[0])
    index = codes.to(device).long().flatten()
    dense = (grad.t() @ x, grad.abs().t() @ x.abs())
    sums = [
        one.new_zeros(shape[3], shape[2]).index_add_(0, index, one.reshape(len(index), -1)) for one in dense
    ]
    assert_within_bound(grads[1], *sums, m)
    assert_within_bound(grads[2], grad.sum(0), grad.abs().sum(0), m)


@pytest.mark.of("pq_linear")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 4, 5, 17, 70])
@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
def test_pq_linear(device, backend, shape, m, dtype):
    check_linear(device, backend, shape, m, dtype)


@pytest.mark.of("pq_linear")
@pytest.mark.needs_cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 2, 3, 16, 64, 300])
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_pq_linear_of_large_weights(device, backend, shape, m, dtype):
    check_linear(device, backend, shape, m, dtype)


# what the kernels with wgmma serve, rows and columns in eights: pieces of codewords of 4 and of 8, one and
# several of a block; few copies of the table; tails of tiles and steps; parts of the sums
WARPGROUPS = (
    *((8, 1, 8, 1), (264, 9, 8, 256), (1000, 130, 4, 256), (520, 50, 16, 300), (256, 7, 64, 256)),
    *((768, 96, 8, 2000), (520, 1024, 8, 256), (4096, 512, 8, 256)),
)


@pytest.mark.of("pq_linear")
@pytest.mark.needs_cuda
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("m", [17, 65, 128, 333])
@pytest.mark.parametrize("shape", WARPGROUPS, ids=str)
def test_pq_linear_of_many_tokens(device, backend, shape, m, dtype):
    if backend != "cuda":
        return check_linear(device, backend, shape, m, dtype)
    for where in ("never", "best", "possible"):
        with use_wgmma(where):
            check_linear(device, backend, shape, m, dtype)


# multiplied by cuBLAS, where the backend does so: one slice and several; d that makes no whole pieces; codes
# of two bytes in shared memory and through the cache
DENSE = (
    *((1, 1, 1, 1), (67, 9, 4, 300), (520, 33, 9, 2), (1000, 129, 4, 1024), (513, 40, 16, 16)),
    *((768, 96, 8, 256), (300, 20, 32, 5000)),
)


@pytest.mark.of("pq_linear")
@pytest.mark.needs_cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1100, 1101])
@pytest.mark.parametrize("shape", DENSE, ids=str)
def test_pq_linear_by_slices(device, backend, small_slices, shape, m, dtype):
    check_linear(device, backend, shape, m, dtype)


@pytest.mark.of("pq_linear")
@pytest.mark.needs_cuda
def test_pq_linear_by_slices_in_a_graph(device, backend, small_slices):
    """Slices are captured with the products, and see new values of x."""
    codes, codebook, weight = quantized(520, 96, 8, 256, torch.bfloat16)
    x = torch.zeros(1100, weight.shape[1], device=device, dtype=torch.bfloat16)
    codes, codebook, stream, graph = (
        codes.to(device),
        codebook.to(device),
        torch.cuda.Stream(),
        torch.cuda.CUDAGraph(),
    )
    with qnk.backend(backend), torch.cuda.stream(stream):
        F.pq_linear(x, codes, codebook)
        with torch.cuda.graph(graph, stream=stream):
            y = F.pq_linear(x, codes, codebook)
        x.normal_(generator=torch.Generator(device).manual_seed(0))
        graph.replay()
        expected = F.pq_linear(x, codes, codebook)
    torch.cuda.synchronize()
    assert torch.equal(y, expected) and y.any()


@pytest.mark.of("pq_linear")
@pytest.mark.needs_cuda
def test_wgmma_repeats_itself(device, backend):
    """Races would show as differences between launches of one grid."""
    if backend != "cuda":
        pytest.skip("of the CUDA kernels")
    codes, codebook, weight = quantized(2048, 256, 8, 256, torch.bfloat16)
    x, grad = (torch.randn(500, n, device=device).bfloat16() for n in (weight.shape[1], 2048))
    codes, codebook = codes.to(device), codebook.to(device)
    with qnk.backend(backend), use_wgmma("possible"):
        forward = [torch.ops.qnkernels.pq_linear(x, codes, codebook, None) for _ in range(20)]
        arguments = (grad, x, codes, codebook, True, True, False)
        backward = [torch.ops.qnkernels.pq_linear_backward(*arguments)[0] for _ in range(20)]
    assert all(torch.equal(forward[0], other) for other in forward)
    assert all(torch.equal(backward[0], other) for other in backward)


@pytest.mark.of("pq_linear_backward")
@pytest.mark.needs_cuda
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_the_codebook_repeats_itself(device, backend, dtype):
    if backend == "reference":
        pytest.skip("the reference adds floats in any order")
    codes, codebook, weight = quantized(770, 96, 8, 256, dtype)
    x, grad = (torch.randn(500, n, device=device).to(dtype) for n in (weight.shape[1], 770))
    arguments = (grad, x, codes.to(device), codebook.to(device), True, False, True)
    with qnk.backend(backend):
        first, *others = (torch.ops.qnkernels.pq_linear_backward(*arguments)[1] for _ in range(4))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.of("pq_linear")
def test_pq_linear_on_no_rows(device, backend):
    codes, codebook, _ = quantized(9, 3, 4, 5, torch.float32)
    x, book = torch.empty(0, 12, device=device), codebook.to(device).requires_grad_()
    with qnk.backend(backend):
        y = F.pq_linear(x, codes.to(device), book)
        (grad,) = torch.autograd.grad(y.sum(), book)
    assert y.shape == (0, 9) and y.device.type == device.type and not grad.any()


@pytest.mark.of("pq_decode")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
def test_pq_decode(device, backend, shape, dtype):
    for transposed in (False, True):
        codes, codebook, weight = quantized(*shape, dtype, transposed)
        with qnk.backend(backend):
            decoded = F.pq_decode(moved(codes, device), codebook.to(device))
        assert torch.equal(decoded.cpu(), weight.to(dtype))


@pytest.mark.of("pq_decode_backward")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
def test_pq_decode_backward(device, backend, shape, dtype):
    for transposed in (False, True):
        codes, _, weight = quantized(*shape, dtype, transposed)
        grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        with qnk.backend(backend):
            arguments = (grad.to(device), moved(codes, device), shape[3], True)
            actual = torch.ops.qnkernels.pq_decode_backward(*arguments)
        index = codes.long().flatten()
        count = torch.bincount(index, minlength=shape[3]).clamp(min=1)[:, None]
        blocks = grad.double().reshape(len(index), -1)
        mean, magnitude = (
            one.new_zeros(shape[3], shape[2]).index_add_(0, index, one) / count
            for one in (blocks, blocks.abs())
        )
        assert_within_bound(actual.cpu(), mean, magnitude, shape[0] * shape[1])


INDICES = ((), (0,), (1,), (5, 7))


@pytest.mark.of("pq_embedding")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
def test_pq_embedding(device, backend, shape, dtype):
    codes, codebook, weight = quantized(*shape, dtype)
    for size in INDICES:
        indices = torch.randint(0, shape[0], size, generator=torch.Generator().manual_seed(2))
        with qnk.backend(backend):
            rows = F.pq_embedding(indices.to(device), codes.to(device), codebook.to(device))
        assert rows.dtype == dtype and torch.equal(rows.cpu(), weight.to(dtype)[indices])


@pytest.mark.of("pq_embedding_backward")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
def test_pq_embedding_backward(device, backend, shape, dtype):
    codes, _, weight = quantized(*shape, dtype)
    generator = torch.Generator().manual_seed(2)
    for size in INDICES:
        indices = torch.randint(0, shape[0], size, generator=generator)
        grad = torch.randn(*size, weight.shape[1], generator=generator).to(dtype)
        arguments = (grad, indices, codes, shape[3], True)
        expected = torch.ops.qnkernels.pq_embedding_backward(grad.double(), *arguments[1:])
        with qnk.backend(backend):
            moved_arguments = (one.to(device) if isinstance(one, torch.Tensor) else one for one in arguments)
            actual = torch.ops.qnkernels.pq_embedding_backward(*moved_arguments)
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.cpu().double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.of("pq_linear_backward")
def test_a_gradient_that_overflowed_is_seen(device, backend):
    """As loss scaling needs it."""
    codes, codebook, _ = quantized(9, 3, 4, 5, torch.float32)
    x, grad = torch.ones(6, 12, device=device), torch.ones(6, 9, device=device)
    grad[2, 3] = float("inf")
    arguments = (grad, x, codes.to(device), codebook.to(device), True, True, True)
    with qnk.backend(backend):
        grad_x, grad_codebook = torch.ops.qnkernels.pq_linear_backward(*arguments)
    assert not grad_x.isfinite().all() and not grad_codebook.isfinite().all()
