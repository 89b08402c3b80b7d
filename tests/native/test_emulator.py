"""The emulator of CUDA threads: correct kernels give what a GPU gives, and each kind of mistake is found."""

import ctypes
import re
from functools import cache

import pytest
import torch
from helpers_emulator import CUDA, EMULATOR, EmulatedKernels, library

CASE = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]


class Cases(EmulatedKernels):
    def case(self, name: str, x: torch.Tensor, n: int) -> torch.Tensor:
        y = torch.empty(n)
        self._launch(name, x.device, x.data_ptr(), y.data_ptr(), n)
        return y

    def in_parts(self, x: torch.Tensor) -> torch.Tensor:
        """x + 1 by two launches, of which the second reads what the first has written."""
        n, parts, y = len(x), torch.empty(2, len(x)), torch.empty(len(x))
        self._launch("writes_parts", x.device, x.data_ptr(), parts.data_ptr(), n)
        self._launch("adds_parts", x.device, parts.data_ptr(), y.data_ptr(), n)
        return y

    def added(self, x: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(1, dtype=torch.int32)
        self._launch("adds_itself", x.device, x.data_ptr(), total.data_ptr(), len(x))
        return total

    def warpgroup(self, name: str, operands: torch.Tensor, threads: int = 128) -> torch.Tensor:
        y = torch.empty(64, 64)
        self._launch(name, y.device, operands.data_ptr(), y.data_ptr(), threads)
        return y

    def product(self, name: str, operands: torch.Tensor) -> torch.Tensor:
        y = torch.empty(16, 8)
        self._launch(name, y.device, operands.data_ptr(), y.data_ptr(), 32)
        return y


@cache
def cases() -> Cases:
    source = EMULATOR / "cases.cu"
    names = re.findall(r"^QNK_(?:SIMPLE|CASE|WRONG)\((\w+)", source.read_text(), re.MULTILINE)
    return Cases(library(source, CUDA / "status.cu"), dict.fromkeys(names, CASE))


def run(name: str, x: torch.Tensor, n: int | None = None) -> torch.Tensor:
    return cases().run("case", name, x, len(x) if n is None else n)


X = torch.randn(96, generator=torch.Generator().manual_seed(0)).round(decimals=2)


def test_sum_over_warps():
    x = (100 * X).round()  # integers, whose sum is exact
    assert (run("sum", x) == x.sum()).all()


def test_shuffles_votes_and_reductions():
    x = X[:64].clone()
    x[32:] = x[32:].abs() + 1
    segments = x.view(-1, 8)
    up = torch.cat((segments[:, :1], segments[:, :-1]), 1)
    positive = (x.view(2, 32) > 0).sum(1, keepdim=True)
    votes = 100 * positive + 10_000 * (positive == 32) - 7
    expected = up + 2 * segments[:, 5:6] + votes.repeat_interleave(4, 0)
    assert torch.equal(run("shuffles", x), expected.flatten())


def test_halves_of_a_warp_in_different_branches():
    lanes = torch.arange(32)
    source = torch.where(lanes < 16, lanes ^ 1, lanes ^ 7)
    assert torch.equal(run("halves", X[:32]), X[:32][source])


@pytest.mark.parametrize("n", [4, 33, 96])
def test_asynchronous_copies(n):
    assert torch.equal(run("copied", X[:n]), X[:n])
    assert not torch.equal(run("copied_without_wait", X[:n]), X[:n])
    assert run("copied_without_wait", X[:n]).isnan().all()


def test_reversed():
    assert torch.equal(run("reversed", X), X.flip(0))


def test_turns_by_named_barriers():
    value = torch.zeros(32)
    for turn in (1, 2) * 2:
        value = 2 * value + turn * X[:32]
    y = run("taken_in_turns", X)
    torch.testing.assert_close(y[:32], value)
    assert torch.equal(y[32:64], y[:32]) and y[64:].isnan().all()


@pytest.mark.parametrize("name", ["bf16", "f16", "bf16_trans"])
def test_products_of_16_bits(name):
    dtype = torch.float16 if name == "f16" else torch.bfloat16
    generator = torch.Generator().manual_seed(1)
    a = torch.randint(-8, 9, (16, 16), generator=generator)
    b = torch.randint(-8, 9, (8, 16), generator=generator)
    stored = b.t() if name.endswith("trans") else b
    operands = torch.cat((a.flatten(), stored.flatten())).to(dtype)
    y = cases().run("product", f"product_{name}", operands)
    assert torch.equal(y, (a @ b.t()).float())


@pytest.mark.parametrize(("name", "low", "high"), [("s8", -128, 128), ("u8", 0, 256)])
def test_products_of_8_bits(name, low, high):
    generator = torch.Generator().manual_seed(2)
    a = torch.randint(low, high, (16, 32), generator=generator)
    b = torch.randint(-128, 128, (8, 32), generator=generator)
    y = cases().run("product", f"product_{name}", torch.cat((a, b)).to(torch.uint8))
    assert torch.equal(y, (a @ b.t()).float())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("write_past_the_end", r"past the end of an array of 384 bytes|beside a tensor"),
        ("read_before_the_start", r"thread \(0, 0, 0\): -?4 bytes before .* at .*cases\.cu:\d+"),
        ("misaligned", r"misaligned access .*cases\.cu:\d+"),
        (
            "written_twice",
            r"thread \(95, 0, 0\): writes element 3 of a torch\.float32 \[96\], "
            r"which block \(0, 0, 0\), thread \(3, 0, 0\) has written",
        ),
        ("written_on_both_sides_of_a_barrier", r"thread \(3, 0, 0\): writes element 3 of .* \(3, 0, 0\) has"),
        ("writes_its_input", "writes an argument"),
        ("shared_past_the_end", r"past the end of an array of 384 bytes|beside its dynamic shared"),
        ("missing_barrier", "depends on the order of the threads"),
        ("missing_second_barrier", "depends on the order of the threads"),
        ("float_atomics", "depends on the order of the threads"),
        (
            "barrier_for_some",
            r"deadlock: threads 0 to 15 wait at .*cases\.cu:\d+; threads 16 to 95 have",
        ),
        ("barrier_after_exit", r"deadlock: .*threads 3 to 3 have exited"),
        ("turn_never_given", r"deadlock: threads 0 to 31 have exited; threads 32 to 63 wait at barrier 2, "),
        ("turns_too_few", "ends with 32 arrivals left over at barrier 1"),
        ("turns_too_many", "ends with 32 arrivals left over at barrier 3"),
        ("turns_twice", "comes to barrier 1 twice before it is complete"),
        ("turns_half_a_warp", "deadlock|some lanes of warp|twice before"),
        ("turns_other_count", "barrier 1 of (64|96) threads, to which others came as one of"),
        ("two_barriers", r"waits at the barrier .*, but thread \d+ at"),
        ("shuffle_from_absent", "__shfl_sync from lane 20, which takes no part"),
        ("lanes_disagree", r"lane \d+ is in __\w+ with 0xffffffff"),
    ],
)
def test_mistakes_are_found(name, words):
    with pytest.raises((RuntimeError, AssertionError), match=words):
        run(name, X)
    assert torch.equal(run("reversed", X), X.flip(0)), "the emulator works on after a failure"


def test_what_may_be_written_again():
    """What another launch has written, and zeros, to which kernels add."""
    assert torch.equal(cases().run("in_parts", X), X + 1)
    assert cases().run("added", torch.arange(96.0)) == 95 * 48


def warpgroup_operands(dtype):
    """(a [64, 32], b [64, 32]) in one tensor, and the product a @ b.t(), which is exact."""
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randint(-8, 9, (64, 32), generator=generator) for _ in range(2))
    return torch.cat((a, b)).to(dtype), (a @ b.t()).float()


@pytest.mark.parametrize("name", ["bf16", "f16", "plain", "across"])
def test_products_of_a_warpgroup(name):
    operands, expected = warpgroup_operands(torch.float16 if name == "f16" else torch.bfloat16)
    assert torch.equal(cases().run("warpgroup", f"wgmma_{name}", operands), expected)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_proxy_fence", "written after the last barrier with fence_async_shared"),
        ("no_barrier", "written after the last barrier with fence_async_shared"),
        ("no_fence", "registers of A that were written after the last wgmma_fence"),
        ("no_fence_of_sums", "sums that were written without a wgmma_fence"),
        ("fence_before_fragments", "registers of A that were written after the last wgmma_fence"),
        ("no_wait", "exits while a wgmma is in flight"),
        ("tile_overwritten", "the tile of a wgmma was written before the wait"),
        ("across_overwritten", "the tile of a wgmma was written before the wait"),
        ("fragments_overwritten", "the registers of A of a wgmma were written before the wait"),
        ("sums_overwritten", "the sums of a wgmma were written before the wait"),
        ("misplaced", "not in the first row of the pattern"),
        ("too_far", "reads its tile at address [0-9]+, outside dynamic shared memory"),
        ("half_a_group", "a warp of a warpgroup took no part"),
        ("lanes_differ", "lanes of a warp differ"),
    ],
)
def test_mistakes_with_warpgroups_are_found(name, words):
    operands, _ = warpgroup_operands(torch.bfloat16)
    with pytest.raises(RuntimeError, match=words):
        cases().run("warpgroup", f"wgmma_{name}", operands)


def test_sums_in_flight_are_nan():
    operands, _ = warpgroup_operands(torch.bfloat16)
    assert cases().run("warpgroup", "wgmma_read_in_flight", operands).isnan().all()


def test_a_warpgroup_has_128_threads():
    operands, _ = warpgroup_operands(torch.bfloat16)
    with pytest.raises(RuntimeError, match="less than a warpgroup"):
        cases().run("warpgroup", "wgmma_bf16", operands, 96)


def test_what_is_not_written_is_nan():
    y = run("half_written", X)
    assert torch.equal(y[:48], X[:48]) and y[48:].isnan().all()
    assert run("shared_never_written", X).isnan().all()


def test_impossible_launches_are_refused():
    for n in (0, 1025):
        with pytest.raises(RuntimeError, match="launch refused: a block of"):
            run("sum", torch.zeros(1), n)


@pytest.mark.parametrize(
    ("tens", "most"), [(80, 163), (86, 99), (87, 163), (89, 99), (90, 227), (100, 227), (120, 99)]
)
def test_shared_memory_of_a_capability(tens, most):
    """KiB of a block, of static and dynamic memory together."""
    library, one = cases().library, torch.ones(1)
    library.qnk_emulator_capability(tens)
    try:
        assert run("shared_beside_4", one, most - 4).all()
        with pytest.raises(
            RuntimeError, match=f"{1024 * (most + 1)} bytes of shared memory, of which the block"
        ):
            run("shared_beside_4", one, most - 3)
        with pytest.raises(RuntimeError, match=f"launch refused: {1024 * (most + 1)} bytes of shared memory"):
            run("shared_beside_4", one, most + 1)
    finally:
        library.qnk_emulator_capability(80)


def test_shared_memory_that_no_launch_asks_for():
    """Of 48 KiB in all, launches ask from 24 KiB of dynamic memory on."""
    one = torch.ones(1)
    assert run("shared_beside_28", one, 20).all() and run("shared_beside_28", one, 25).all()
    with pytest.raises(
        RuntimeError, match=f"{52 * 1024} bytes of shared memory, of which the block may have 49152"
    ):
        run("shared_beside_28", one, 24)
