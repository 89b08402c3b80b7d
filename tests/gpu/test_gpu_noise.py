"""fake_quantize and block_noise on a GPU: bit for bit what the reference computes on the CPU."""

import pytest
import torch

import qnkernels as qnk
from qnkernels import functional as F
from qnkernels.reference.fake_quantize import fake_quantize as reference_fake_quantize
from qnkernels.reference.philox import noise_mask, philox

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1,), (7,), (3, 1009), (33, 4, 8), (257, 72), (3, 4096))
# (axis, group_size) that fit a shape
LAYOUTS = {
    (1,): [(None, None)],
    (7,): [(None, None), (0, None)],
    (3, 1009): [(None, None), (0, None), (1, None)],
}
LAYOUTS |= {(33, 4, 8): [(1, None), (2, None), (None, 4)], (257, 72): [(0, None), (None, 8), (None, 3)]}
LAYOUTS |= {(3, 4096): [(None, None), (0, None)]}


def assert_same_values(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal in dtype, shape and every value (zeros of both signs and NaNs of all kinds are alike); the
    message names the first difference."""
    actual = actual.cpu()
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    different = (actual != expected) & ~(actual.isnan() & expected.isnan())
    if different.any():
        where = tuple(different.nonzero()[0].tolist())
        count = int(different.sum())
        raise AssertionError(
            f"{count} differ, first at {where}: {actual[where]!r}, expected {expected[where]!r}"
        )


def parameters(x, bits, axis, group_size, shrink=0.8):
    """Scale and zero point of a range that leaves some values out."""
    with qnk.backend("reference"):
        low, high = F.minmax(x, axis, group_size)
    return F.quantization_parameters(shrink * low, shrink * high, bits)


@pytest.mark.of("fake_quantize")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_fake_quantize(device, backend, dtype, shape, p):
    generator = torch.Generator().manual_seed(hash((shape, p)) % 2**31)
    x = torch.randn(shape, generator=generator).to(dtype)
    for axis, group_size in LAYOUTS[shape]:
        for bits, seed in ((2, 0), (4, 2**62 - 1), (8, 12345), (16, 2**40 + 7)):
            s, z = parameters(x, bits, axis, group_size)
            with qnk.backend("reference"):
                expected = F.fake_quantize(x, s, z, bits, axis, group_size, p, seed)
            with qnk.backend(backend):
                actual = F.fake_quantize(
                    x.to(device), s.to(device), z.to(device), bits, axis, group_size, p, seed
                )
            assert_same_values(actual, expected)


@pytest.mark.of("fake_quantize")
def test_values_and_scales_of_every_size(device, backend):
    """Any 32 bits for a value; scales for which a backend may divide by way of the reciprocal, and others."""
    generator = torch.Generator().manual_seed(9)
    x = torch.randint(-(2**31), 2**31, (5000,), generator=generator, dtype=torch.int32).view(torch.float32)
    for exponent in (-140, -100, -61, -60, -20, 0, 39, 40, 41, 126):
        s = (1 + torch.rand((), generator=generator)) * 2.0**exponent
        near = torch.cat((x, (torch.arange(300) * 0.25 - 9) * s))
        for z in (0.0, 5.0, 15.0):
            with qnk.backend("reference"):
                expected = F.fake_quantize(near, s, torch.tensor(z), 4, p=1.0)
            with qnk.backend(backend):
                actual = F.fake_quantize(near.to(device), s.to(device), torch.tensor(z).to(device), 4, p=1.0)
            assert_same_values(actual, expected)


@pytest.mark.of("fake_quantize")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out", DTYPES)
def test_fake_quantize_writes_the_dtype_asked_for(device, backend, dtype, out):
    x = torch.randn(45, 31, generator=torch.Generator().manual_seed(1)).to(dtype)
    s, z = parameters(x, 8, None, None)
    with qnk.backend("reference"):
        expected = F.fake_quantize(x, s, z, 8, p=0.5, seed=9, dtype=out)
    with qnk.backend(backend):
        actual = F.fake_quantize(x.to(device), s.to(device), z.to(device), 8, p=0.5, seed=9, dtype=out)
    assert_same_values(actual, expected)


@pytest.mark.of("fake_quantize")
def test_fake_quantize_rounds_ties_to_even_and_keeps_odd_values(device, backend):
    x = torch.cat(
        [torch.arange(-40, 40) / 2, torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])]
    )
    s, z = torch.tensor(1.0), torch.tensor(8.0)
    with qnk.backend("reference"):
        expected = F.fake_quantize(x, s, z, 4)
    with qnk.backend(backend):
        actual = F.fake_quantize(x.to(device), s.to(device), z.to(device), 4)
    assert_same_values(actual, expected)


@pytest.mark.of("fake_quantize")
def test_fake_quantize_takes_views(device, backend):
    x = torch.randn(66, 40, generator=torch.Generator().manual_seed(2))
    s, z = parameters(x[::2].t(), 8, None, None)
    with qnk.backend("reference"):
        expected = F.fake_quantize(x[::2].t(), s, z, 8, p=0.5, seed=3)
    with qnk.backend(backend):
        actual = F.fake_quantize(x.to(device)[::2].t(), s.to(device), z.to(device), 8, p=0.5, seed=3)
    assert_same_values(actual, expected)


@pytest.mark.of("fake_quantize")
@pytest.mark.needs_cuda
@pytest.mark.large
def test_fake_quantize_of_more_than_2_31_elements(device, backend):
    """The noise and the values at both ends, against the formula on those elements alone."""
    n = 2**31 + 8 * 1000 + 3
    if backend == "reference" or torch.cuda.mem_get_info()[0] < 5 * n:
        pytest.skip("needs 10 GiB of free GPU memory, and a kernel")
    x = torch.empty(n, dtype=torch.bfloat16, device=device).normal_()
    s, z = torch.tensor(0.1, device=device), torch.tensor(128.0, device=device)
    seed = torch.tensor(77, device=device)
    for p, bits in ((0.25, 16), (0.5, 1)):
        with qnk.backend(backend):
            y = F.fake_quantize(x, s, z, 8, p=p, seed=seed)
        for start in (0, 2**31 - 512, n - 899):
            piece = slice(start - start % 128, min(start - start % 128 + 896, n))
            some = x[piece].cpu()
            calls = torch.arange(piece.start * bits // 128, -(-piece.stop * bits // 128))
            shifts = torch.arange(0, 32, bits)
            draws = (philox(calls, seed.cpu())[..., None] >> shifts & (1 << bits) - 1).flatten()[: len(some)]
            quantized = reference_fake_quantize(some, s.cpu(), z.cpu(), torch.tensor(8), 1.0, seed.cpu())
            assert_same_values(y[piece], torch.where(draws < p * 2**bits, quantized, some))


@pytest.mark.of("fake_quantize_backward")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_fake_quantize_backward(device, backend, dtype, shape, p):
    generator = torch.Generator().manual_seed(hash((shape, p)) % 2**31)
    x = torch.randn(shape, generator=generator).to(dtype)
    grad = torch.randn(shape, generator=generator).to(dtype)
    for axis, group_size in LAYOUTS[shape]:
        s, z = parameters(x, 4, axis, group_size, shrink=0.4)
        with qnk.backend("reference"):
            expected = gradient(x, s, z, axis, group_size, p, grad)
        with qnk.backend(backend):
            actual = gradient(*(t.to(device) for t in (x, s, z)), axis, group_size, p, grad.to(device))
        assert_same_values(actual, expected)


def gradient(x, s, z, axis, group_size, p, grad):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(F.fake_quantize(x, s, z, 4, axis, group_size, p, 5), x, grad)[0]


@pytest.mark.of("fake_quantize")
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_with_values_outside_are_marked(device, backend, dtype):
    x = (torch.rand(7, 1999, generator=torch.Generator().manual_seed(3)) - 0.5).to(dtype)
    x.view(-1)[[0, 2049, 8191, -1]] = torch.tensor([-2.0, float("nan"), float("inf"), 2.0]).to(dtype)
    quantizer = (torch.tensor(0.1), torch.tensor(8.0), torch.tensor(4), 0.5, torch.tensor(9))
    moved = [one.to(device) if isinstance(one, torch.Tensor) else one for one in quantizer]
    with qnk.backend(backend):
        y, outside = torch.ops.qnkernels.fake_quantize(x.to(device), *moved, None, None, None, True)
    assert outside.tolist() == [1, 0, 0, 1, 0, 0, 1]
    assert_same_values(y, reference_fake_quantize(x, *quantizer))


@pytest.mark.of("fake_quantize_backward")
@pytest.mark.parametrize("dtype", DTYPES)
def test_fake_quantize_backward_in_place(device, backend, dtype):
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(67, 45, generator=generator).to(dtype)
    grad = torch.randn(67, 45, generator=generator).to(dtype)
    s, z = parameters(x, 4, 0, None, shrink=0.4)
    rest = (s, z, torch.tensor(4), 0.5, torch.tensor(21), 0)
    expected, actual = grad.clone(), grad.clone().to(device)
    with qnk.backend("reference"):
        torch.ops.qnkernels.fake_quantize_backward_(expected, x, *rest)
    with qnk.backend(backend):
        moved = [one.to(device) if isinstance(one, torch.Tensor) else one for one in rest]
        torch.ops.qnkernels.fake_quantize_backward_(actual, x.to(device), *moved)
    assert_same_values(actual, expected)
    assert not torch.equal(expected, grad)


@pytest.mark.of("block_noise")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["zero", "mean"])
@pytest.mark.parametrize(
    ("shape", "block_size"), [((1, 1), 1), ((5, 21), 3), ((129, 72), 8), ((7, 2048), 1024)]
)
def test_block_noise(device, backend, dtype, kind, shape, block_size):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(block_size)).to(dtype)
    for p, seed in ((0.0, 1), (0.1, 2**50), (0.5, 3), (1.0, 4)):
        with qnk.backend("reference"):
            expected = F.block_noise(weight, block_size, p, seed, kind)
        with qnk.backend(backend):
            actual = F.block_noise(weight.to(device), block_size, p, seed, kind)
        if backend == "reference" and kind == "mean":  # torch adds in another order on a GPU
            torch.testing.assert_close(actual.cpu(), expected)
        else:
            assert_same_values(actual, expected)


@pytest.mark.of("block_noise")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "block_size", "n_codewords"),
    [((1, 1), 1, 1), ((5, 21), 3, 9), ((129, 72), 8, 16), ((30, 640), 64, 5)],
)
def test_block_noise_by_codeword(device, backend, dtype, shape, block_size, n_codewords):
    """The mask of the reference; each noised block becomes a codeword as near as the nearest, up to 1e-5."""
    generator = torch.Generator().manual_seed(block_size)
    weight = torch.randn(shape, generator=generator).to(dtype)
    codebook = torch.randn(n_codewords, block_size, generator=generator)
    blocks = weight.reshape(-1, block_size)
    distance = ((blocks.double()[:, None] - codebook.double()) ** 2).sum(2)
    near = distance <= distance.min(1, keepdim=True).values * (1 + 1e-5)
    for p, seed in ((0.0, 1), (0.1, 2**50), (0.5, 3), (1.0, 4)):
        with qnk.backend(backend):
            found = F.block_noise(
                weight.to(device), block_size, p, seed, "centroid", codebook=codebook.to(device)
            )
        found = found.cpu().reshape(-1, block_size)
        mask = noise_mask(len(blocks), p, torch.tensor(seed))
        assert (near & (found[:, None] == codebook.to(dtype)).all(2)).any(1)[mask].all()
        assert_same_values(found[~mask], blocks[~mask])


@pytest.mark.of("block_noise")
def test_block_noise_without_rescaling_into_another_dtype(device, backend):
    weight = torch.randn(40, 24, generator=torch.Generator().manual_seed(6))
    with qnk.backend("reference"):
        expected = F.block_noise(weight, 8, 0.3, 11, rescale=False, dtype=torch.bfloat16)
    with qnk.backend(backend):
        actual = F.block_noise(weight.to(device), 8, 0.3, 11, rescale=False, dtype=torch.bfloat16)
    assert_same_values(actual, expected)


@pytest.mark.of("fake_quantize")
@pytest.mark.needs_cuda
@pytest.mark.parametrize("p", [0.3, 0.5])
@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**62 + 12345])
def test_the_mask_is_that_of_the_cpu(device, backend, seed, p):
    """On ones, with a scale that moves them, the output shows the mask itself."""
    n = 5_000_011
    x, s, z = torch.ones(n, device=device), torch.tensor(0.7, device=device), torch.tensor(0.0, device=device)
    with qnk.backend(backend):
        noised = F.fake_quantize(x, s, z, 8, p=p, seed=seed) != 1
    assert torch.equal(noised.cpu(), noise_mask(n, p, torch.tensor(seed)))
