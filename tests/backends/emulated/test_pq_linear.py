"""The CUDA kernels of pq_linear and its gradients in the emulator, against float64."""

import itertools

import pytest
import torch
from helpers_emulator import ALIGNED, TYPES, alignment, emulated, launches, processors
from helpers_pq_linear import SOURCES, assert_near, by_codeword, weight
from numeric import DTYPES, assert_identical

# rows of the weight, blocks, d, centroids: one of each; odd; one past a tile; codes of two bytes in shared
# memory and through the cache; wide blocks; runs of whole vectors
WEIGHTS = (
    (1, 1, 1, 1),
    (5, 7, 2, 4),
    (33, 20, 8, 256),
    (67, 9, 4, 300),
    (129, 17, 4, 255),
    (17, 5, 9, 2),
    (40, 3, 33, 7),
    (19, 2, 64, 16),
    (64, 9, 16, 257),
    (96, 5, 8, 1024),
    (24, 6, 8, 7000),
    (35, 11, 3, 13_000),
)
ROWS = (1, 3, 8, 9, 16, 17, 65, 130)


def ours() -> dict:
    return emulated(*SOURCES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
def test_linear_against_float64(shape, dtype):
    generator = torch.Generator().manual_seed(sum(shape))
    for m, transposed in zip(ROWS, itertools.cycle((False, True))):
        # every other time the codebook comes in another dtype, with values that both have
        codes, codebook, decoded = weight(*shape, torch.bfloat16, transposed, generator)
        codebook = codebook.to(dtype if m % 2 else torch.float32)
        decoded = decoded if dtype != torch.float16 else codebook.half().double()[codes.long()].flatten(1)
        x = torch.randn(m, decoded.shape[1], generator=generator).to(dtype)
        bias = torch.randn(shape[0], generator=generator).to(dtype) if m % 3 else None
        y = ours()["pq_linear"](x, codes, codebook, bias)
        shift = torch.zeros(shape[0]).double() if bias is None else bias.double()
        exact, magnitude = x.double() @ decoded.T + shift, x.double().abs() @ decoded.abs().T + shift.abs()
        assert_near(y, exact, magnitude, x.shape[1], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
def test_linear_backward_against_float64(shape, dtype):
    generator = torch.Generator().manual_seed(sum(shape) + 1)
    n_centroids = shape[3]
    for m, transposed in ((1, False), (33, True), (130, False)):
        codes, codebook, decoded = weight(*shape, dtype, transposed, generator)
        x = torch.randn(m, decoded.shape[1], generator=generator).to(dtype)
        grad = torch.randn(m, shape[0], generator=generator).to(dtype)
        mean = not transposed
        arguments = (grad, x, codes, codebook, mean)
        grad_x, grad_codebook = ours()["pq_linear_backward"](*arguments, True, True)
        assert_near(grad_x, grad.double() @ decoded, grad.double().abs() @ decoded.abs(), shape[0], dtype)
        dense, magnitude = grad.double().T @ x.double(), grad.double().abs().T @ x.double().abs()
        blocks = [one.reshape(codes.numel(), -1) for one in (dense, magnitude)]
        sums = [by_codeword(one, codes, n_centroids, mean) for one in blocks]
        assert_near(grad_codebook, *sums, m, torch.float32)
        if m > 1:
            continue
        only_x, nothing = ours()["pq_linear_backward"](*arguments, True, False)
        assert_identical(only_x, grad_x)
        assert nothing.shape == (0,) and nothing.dtype == torch.float32
        nothing, only_codebook = ours()["pq_linear_backward"](*arguments, False, True)
        assert_identical(only_codebook, grad_codebook)
        assert nothing.shape == (0,) and nothing.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [4, 16])
def test_depth_divided_among_many_processors(d, dtype):
    """Parts of the sums go through memory."""
    generator = torch.Generator().manual_seed(d)
    codes, codebook, decoded = weight(35, 2080 // d + 1, d, 256, dtype, True, generator)
    bias = torch.randn(35, generator=generator)
    with processors(132, *SOURCES):
        for m in (1, 7, 16):
            x = torch.randn(m, decoded.shape[1], generator=generator).to(dtype)
            y = ours()["pq_linear"](x, codes, codebook, bias)
            magnitude = x.double().abs() @ decoded.abs().T + bias.double().abs()
            assert_near(y, x.double() @ decoded.T + bias.double(), magnitude, x.shape[1], dtype)


# rounds of all warps, as many as are under way and more, with a rest of whole and partial steps and without;
# wide and narrow runs, some past the last output; pieces that a thread's octets have in common and others
DEEP = (
    *((64, 1100, 8, 200), (72, 170, 16, 256), (64, 698, 4, 300), (64, 200, 16, 300), (36, 322, 8, 1024)),
    *((32, 257, 8, 7000), (64, 110, 24, 256), (20, 221, 12, 16), (12, 260, 4, 20_000), (32, 64, 32, 256)),
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", DEEP, ids=str)
def test_many_steps_of_few_tokens(shape, dtype):
    generator = torch.Generator().manual_seed(sum(shape))
    codes, codebook, decoded = weight(*shape, dtype, True, generator)
    with processors(1, *SOURCES):
        for m in (1, 4, 5, 16):
            x = torch.randn(m, decoded.shape[1], generator=generator).to(dtype)
            y = ours()["pq_linear"](x, codes, codebook, None)
            assert_near(y, x.double() @ decoded.T, x.double().abs() @ decoded.abs().T, x.shape[1], dtype)


def check_form(shape, m: int, dtype, count: int) -> tuple[str, str, int]:
    """A product on `count` multiprocessors: (kernel, what it is compiled for beside the types, parts)."""
    generator = torch.Generator().manual_seed(sum(shape) + m)
    codes, codebook, decoded = weight(*shape, dtype, True, generator)
    x = torch.randn(m, decoded.shape[1], generator=generator).to(dtype)
    with processors(count, *SOURCES):
        y = ours()["pq_linear"](x, codes, codebook, None)
    assert_near(y, x.double() @ decoded.T, x.double().abs() @ decoded.abs().T, x.shape[1], dtype)
    first, *sum_of_parts = launches(*SOURCES)
    parts = first.grid[1]
    assert [one.kernel for one in sum_of_parts] == [f"pq_linear_sum_kernel<{TYPES[dtype]}>"][: parts - 1]
    kernel, _, arguments = first.kernel.removesuffix(">").partition("<")
    types = [TYPES[codes.dtype]] if dtype == torch.float32 else [TYPES[dtype], TYPES[codes.dtype]]
    assert arguments.startswith(", ".join(types) + ", ")
    return kernel, arguments.removeprefix(", ".join(types) + ", "), parts


# of pq_linear_few: width of pieces, whether the table is in shared memory, outputs of a thread, most tokens,
# whether nothing has to be checked; parts. Rounds as many as are under way and more, with a rest and without.
FEW = (
    ((64, 660, 4, 256), 3, 1, "4, true, 8, 4, true", 1),
    ((72, 660, 4, 200), 7, 1, "4, true, 8, 8, true", 1),
    ((64, 256, 4, 256), 16, 1, "4, true, 8, 16, true", 1),
    ((36, 1060, 4, 256), 4, 1, "4, true, 4, 4, true", 1),
    ((36, 660, 4, 100), 9, 1, "4, true, 4, 16, true", 1),
    ((36, 660, 4, 300), 1, 1, "4, true, 4, 4, true", 1),
    ((36, 660, 4, 300), 6, 1, "4, true, 4, 8, true", 1),
    ((20, 386, 12, 300), 8, 1, "4, true, 4, 16, false", 1),
    ((36, 514, 8, 256), 2, 1, "8, true, 4, 4, true", 1),
    ((36, 514, 8, 256), 5, 1, "8, true, 4, 8, true", 1),
    ((36, 514, 8, 256), 10, 1, "8, true, 4, 16, true", 1),
    ((40, 265, 8, 256), 3, 4, "8, true, 4, 4, true", 2),
    ((32, 776, 4, 256), 8, 3, "4, true, 4, 8, true", 3),
    ((28, 1040, 4, 300), 12, 2, "4, true, 4, 16, true", 2),
)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(("shape", "m", "count", "form", "parts"), FEW, ids=str)
def test_forms_for_few_tokens(shape, m, count, form, parts, dtype):
    assert check_form(shape, m, dtype, count) == ("pq_linear_few_kernel", form, parts)


@pytest.mark.parametrize(
    ("shape", "in_shared"),
    [((67, 9, 8, 256), "true"), ((67, 9, 4, 300), "true"), ((24, 6, 8, 7000), "false")],
)
def test_forms_for_few_tokens_of_fp32(shape, in_shared):
    for m, tokens in ((1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (8, 8)):
        form = f"{in_shared}, {tokens}"
        assert check_form(shape, m, torch.float32, 3) == ("pq_linear_few_float_kernel", form, 1)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(
    ("shape", "form"),
    [
        ((24, 68, 8, 256), "8, true"),
        ((130, 137, 4, 300), "4, true"),
        ((24, 66, 8, 7000), "8, false"),
    ],
    ids=str,
)
def test_depth_of_tiles_divided(shape, form, dtype):
    """One part has a step more than the other."""
    for m, tiles in ((17, "Shape<2, 4, 4, 1>"), (70, "Shape<4, 8, 2, 2>")):
        expected = ("pq_linear_tiles_kernel", f"{form}, {tiles}, false", 2)
        assert check_form(shape, m, dtype, 4) == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unaligned_tensors(dtype):
    """The bindings copy what kernels read by vectors."""
    for shape, transposed in (((64, 9, 16, 257), True), ((40, 34, 4, 256), False), ((24, 6, 8, 7000), True)):
        generator = torch.Generator().manual_seed(sum(shape))
        codes, codebook, decoded = weight(*shape, dtype, transposed, generator)
        with alignment(1, *SOURCES, of_new=ALIGNED):
            for m in (1, 6, 20, 70):
                x = torch.randn(m, decoded.shape[1], generator=generator).to(dtype)
                bias = torch.randn(shape[0], generator=generator).to(dtype)
                y = ours()["pq_linear"](x, codes, codebook, bias)
                magnitude = x.double().abs() @ decoded.abs().T + bias.double().abs()
                assert_near(y, x.double() @ decoded.T + bias.double(), magnitude, x.shape[1], dtype)
            grad = torch.randn(m, shape[0], generator=generator).to(dtype)
            found = ours()["pq_linear_backward"](grad, x, codes, codebook, True, True, True)
        whole = ours()["pq_linear_backward"](grad, x, codes, codebook, True, True, True)
        for one, other in zip(found, whole, strict=True):
            assert_identical(one, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_of_a_byte_of_code_in_global_memory(dtype):
    """Codebooks of which the sums do not fit beside the tiles."""
    shape = (20, 3, 24 if dtype != torch.float32 else 40, 256)
    generator = torch.Generator().manual_seed(11)
    codes, codebook, decoded = weight(*shape, dtype, True, generator)
    grad, x = (torch.randn(9, size, generator=generator).to(dtype) for size in (20, len(decoded.T)))
    _, grad_codebook = ours()["pq_linear_backward"](grad, x, codes, codebook, True, False, True)
    (launch,) = launches(*SOURCES)
    assert launch.kernel.endswith("unsigned char>") and launch.shared_bytes == (
        0 if dtype == torch.float32 else 48 << 10
    )
    blocks = [g.double().T @ o.double() for g, o in ((grad, x), (grad.abs(), x.abs()))]
    sums = [by_codeword(one.reshape(codes.numel(), -1), codes, 256, True) for one in blocks]
    assert_near(grad_codebook, *sums, 9, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_of_codewords_over_several_tiles(dtype):
    generator = torch.Generator().manual_seed(7)
    codes, codebook, decoded = weight(130, 33, 8, 256, dtype, True, generator)
    grad = torch.randn(9, 130, generator=generator).to(dtype)
    x = torch.randn(9, decoded.shape[1], generator=generator).to(dtype)
    with processors(1, *SOURCES):
        _, grad_codebook = ours()["pq_linear_backward"](grad, x, codes, codebook, True, False, True)
    blocks = [g.double().T @ o.double() for g, o in ((grad, x), (grad.abs(), x.abs()))]
    sums = [by_codeword(one.reshape(codes.numel(), 8), codes, 256, True) for one in blocks]
    assert_near(grad_codebook, *sums, 9, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_reach_the_gradients(value, dtype):
    generator = torch.Generator().manual_seed(0)
    codes, codebook, _ = weight(6, 4, 8, 5, dtype, False, generator)
    grad, x = torch.randn(3, 6).to(dtype), torch.randn(3, 32).to(dtype)
    grad[1, 2] = value
    found = ours()["pq_linear_backward"](grad, x, codes, codebook, True, True, True)
    assert not found[0][1].isfinite().any() and found[0][0].isfinite().all() and found[0][2].isfinite().all()
    assert not found[1].isfinite().any()
    x[1, 5] = value
    for rows in (x, x.repeat(6, 1), x.repeat(25, 1)):
        y = ours()["pq_linear"](rows, codes, codebook, None)
        assert not y[1].isfinite().any() and y[0].isfinite().all() and y[2].isfinite().all()


def test_gradients_of_zeros_and_of_extreme_sizes():
    codes, codebook, _ = weight(6, 4, 8, 5, torch.float32, False, torch.Generator().manual_seed(1))
    backward = ours()["pq_linear_backward"]
    grad, x = torch.randn(3, 6), torch.randn(3, 32)
    zeros = backward(grad * 0, x, codes, codebook, True, True, True)
    assert_identical(zeros[0], torch.zeros(3, 32))
    assert_identical(zeros[1], torch.zeros(5, 8))
    exact = by_codeword((grad.double().T @ x.double()).reshape(24, 8), codes, 5, True)
    for scale in (1e-30, 1e30):
        _, found = backward(grad * scale, x, codes, codebook, True, False, True)
        torch.testing.assert_close(found.double(), exact * scale, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_centroids", [4, 300, 13_000])
def test_a_codeword_that_is_not_finite_stays_where_it_is_used(n_centroids, dtype):
    """Codeword 0 fills idle lanes and rows, which must not spread its infinity."""
    generator = torch.Generator().manual_seed(2)
    codes, codebook, _ = weight(9, 3, 5, n_centroids, dtype, False, generator)
    codes = codes.int().clamp(min=1).to(codes.dtype)
    codes[4, 1] = 0
    codebook = codebook.abs() + 0.5
    codebook[0] = float("inf")
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    for m in (1, 5, 17, 70):
        y = ours()["pq_linear"]((torch.rand(m, 15) + 0.5).to(dtype), codes, codebook, None)
        assert y[:, 4].isinf().all() and y[:, others].isfinite().all()
    grad_x, _ = ours()["pq_linear_backward"](
        (torch.rand(2, 9) + 0.5).to(dtype), torch.ones(2, 15, dtype=dtype), codes, codebook, True, True, False
    )
    assert grad_x[:, 5:10].isinf().all()
    assert grad_x[:, [0, 1, 2, 3, 4, 10, 11, 12, 13, 14]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_past_the_codebook_read_its_end_and_get_no_gradient(dtype):
    for n_centroids, wrong in ((5, 255), (300, 65_535), (7000, 65_535)):
        codes, codebook, _ = weight(9, 3, 8, n_centroids, dtype, False, torch.Generator().manual_seed(5))
        codes[4, 1] = wrong
        last = codes.clone()
        last[4, 1] = n_centroids - 1
        for m in (1, 17, 70):
            x = torch.randn(m, 24).to(dtype)
            assert_identical(*(ours()["pq_linear"](x, one, codebook, None) for one in (codes, last)))
        grad = torch.randn(70, 9).to(dtype)
        found, whole = (
            ours()["pq_linear_backward"](grad, x, one, codebook, False, True, True) for one in (codes, last)
        )
        assert_identical(found[0], whole[0])
        block = (grad.double().T @ x.double())[4, 8:16].float()
        torch.testing.assert_close(whole[1][-1] - found[1][-1], block, rtol=1e-4, atol=1e-4)
        assert_identical(found[1][:-1], whole[1][:-1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty(dtype):
    codes, codebook, _ = weight(6, 3, 8, 5, dtype, False, torch.Generator().manual_seed(4))
    none = torch.empty(0, 24, dtype=dtype)
    assert ours()["pq_linear"](none, codes, codebook, None).shape == (0, 6)
    backward = ours()["pq_linear_backward"]
    grad_x, grad_codebook = backward(none[:, :6], none, codes, codebook, True, True, True)
    assert grad_x.shape == (0, 24)
    assert_identical(grad_codebook, torch.zeros(5, 8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weight_without_columns(dtype):
    codes, codebook = torch.empty(3, 0, dtype=torch.uint8), torch.randn(4, 8).to(dtype)
    bias = torch.randn(3).to(dtype)
    for m in (1, 17, 70):
        y = ours()["pq_linear"](torch.empty(m, 0, dtype=dtype), codes, codebook, bias)
        assert_identical(y, bias.expand(m, 3).contiguous())
    arguments = (torch.ones(2, 3, dtype=dtype), torch.empty(2, 0, dtype=dtype), codes, codebook)
    grad_x, grad_codebook = ours()["pq_linear_backward"](*arguments, True, True, True)
    assert grad_x.shape == (2, 0)
    assert_identical(grad_codebook, torch.zeros(4, 8))
