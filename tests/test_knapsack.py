"""The knapsack against brute force over every selection, in exact arithmetic."""

import itertools
import random

import pytest

from qnkernels import knapsack


def brute_force(groups: list[list[tuple[int, float]]], budget: int) -> tuple[float, int] | None:
    """Cost and size of the best selection, the smallest of equals."""
    sums = (
        (sum(cost for _, cost in chosen), sum(size for size, _ in chosen))
        for chosen in itertools.product(*groups)
    )
    return min((both for both in sums if both[1] <= budget), default=None)


def total(groups: list[list[tuple[int, float]]], choice: list[int]) -> tuple[float, int]:
    chosen = [group[i] for group, i in zip(groups, choice, strict=True)]
    return sum(cost for _, cost in chosen), sum(size for size, _ in chosen)


# costs are whole numbers, or halves of powers of two, so that sums in floating point are exact
COSTS = {
    "few values, many ties": lambda rng, size: float(rng.randint(0, 3)),
    "gains, too": lambda rng, size: float(rng.randint(-20, 20)),
    "falling in the size": lambda rng, size: float(rng.randint(0, 5) - size),
    "proportional to the size": lambda rng, size: float(-size),
    "of all magnitudes": lambda rng, size: rng.choice((1, -1)) * 2.0 ** rng.randint(-20, 20),
    "none": lambda rng, size: 0.0,
}


@pytest.mark.parametrize("costs", COSTS)
def test_as_good_as_brute_force(costs):
    rng = random.Random(costs)
    for _ in range(150):
        groups = []
        for _ in range(rng.randint(1, 5)):
            sizes = [rng.randint(0, 12) for _ in range(rng.randint(1, 5))]
            groups.append([(size, COSTS[costs](rng, size)) for size in sizes])
        smallest = sum(min(size for size, _ in group) for group in groups)
        largest = sum(max(size for size, _ in group) for group in groups)
        for budget in {smallest - 1, smallest, smallest + 1, rng.randint(smallest, largest), largest + 5}:
            choice, expected = knapsack.solve(groups, budget), brute_force(groups, budget)
            assert (None if choice is None else total(groups, choice)) == expected


def test_sizes_of_real_files():
    """Megabytes to the byte, costs as measured: two selections differ by one byte, and one does not fit."""
    rng = random.Random(7)
    for _ in range(30):
        groups = []
        for _ in range(6):
            weights = rng.randint(10_000, 3_000_000)
            groups.append([(weights * b // 8 + 40, rng.random() * 4.0**-b) for b in (2, 3, 4, 8, 32)])
        best = brute_force(groups, rng.randint(6_000_000, 12_000_000))
        if best is not None:
            cost, size = best
            assert total(groups, knapsack.solve(groups, size)) == (pytest.approx(cost, rel=1e-12), size)
            less = total(groups, knapsack.solve(groups, size - 1))
            assert less[1] < size and less[0] >= cost


def test_hundreds_of_layers():
    """Where brute force would take 9^200 sums: within the budget, and a larger one costs no more."""
    rng = random.Random(3)
    groups = []
    for _ in range(200):
        weights, sensitivity = rng.choice((262_144, 1_048_576)), rng.lognormvariate(0, 2)
        widths = (2, 3, 4, 5, 6, 7, 8, 16, 32)
        groups.append(
            [(weights * b // 8 + 4096, sensitivity * 4.0**-b * rng.uniform(0.5, 2)) for b in widths]
        )
    smallest, largest = (sum(pick(size for size, _ in group) for group in groups) for pick in (min, max))
    previous = float("inf")
    for share in (0.0, 0.05, 0.1, 0.2, 0.5, 1.0):
        budget = smallest + int(share * (largest - smallest))
        cost, size = total(groups, knapsack.solve(groups, budget))
        assert size <= budget and cost <= previous
        previous = cost
    assert previous == pytest.approx(sum(min(cost for _, cost in group) for group in groups), rel=1e-12)


def test_no_groups_and_no_room():
    assert knapsack.solve([], 0) == []
    assert knapsack.solve([], -1) is None
    assert knapsack.solve([[(5, 1.0)]], 4) is None
