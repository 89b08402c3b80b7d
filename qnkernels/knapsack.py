"""The multiple-choice knapsack, solved exactly: one option of each group, least cost within a budget.

States are sums of size and cost over the first groups. Of two states the one that is no smaller and no
cheaper is dropped, and so is one that, with the least that the other groups can add (their linear
relaxation), costs more than a solution that is known. Source: Kellerer, Pferschy and Pisinger, "Knapsack
Problems" (2004), chapter 11.
"""

from collections.abc import Sequence

import numpy as np

Option = tuple[int, float]  # size, cost
ROUNDING = 1e-9  # of the sum of all costs: bounds within it of a solution are not trusted to be worse


def solve(groups: Sequence[Sequence[Option]], budget: int) -> list[int] | None:
    """Index of the option of each group: of the selections whose sizes add up to at most `budget`, one whose
    costs add up to the least, and of several such the smallest; None where no selection is so small.

    Sizes are integers of at least 0, costs finite. Time and memory grow with the number of states that can
    neither be dropped: a few thousand for hundreds of groups of real costs, but in the worst case no fewer
    than the budget.
    """
    sizes, costs = (
        [np.array([option[i] for option in group], dtype) for group in groups]
        for i, dtype in enumerate((np.int64, np.float64))
    )
    relaxations = _relaxations(sizes, costs)
    if sum(int(size.min()) for size in sizes) > budget:
        return None
    slack = ROUNDING * sum(float(np.abs(cost).max()) for cost in costs)
    state_size, state_cost = np.zeros(1, np.int64), np.zeros(1)
    best = np.inf
    came_from: list[tuple[np.ndarray, np.ndarray]] = []  # of each state: the state before, and the option
    for size, cost, (steps, sums) in zip(sizes, costs, relaxations[1:], strict=True):
        total, price = state_size[:, None] + size, state_cost[:, None] + cost
        total, price = total.ravel(), price.ravel()
        left = budget - total
        kept = left >= steps[0]
        # what a whole number of steps of the relaxation reaches is a solution; a part of one more, a bound
        reached = np.searchsorted(steps, left[kept], side="right") - 1
        best = min(best, float((price[kept] + sums[reached]).min()))
        kept[kept] = price[kept] + np.interp(left[kept], steps, sums) <= best + slack
        (kept,) = kept.nonzero()
        order = kept[np.lexsort((price[kept], total[kept]))]
        cheaper = np.minimum.accumulate(price[order])
        order = order[np.concatenate(([True], cheaper[1:] < cheaper[:-1]))]
        state_size, state_cost = total[order], price[order]
        came_from.append(np.divmod(order, len(size)))
    state = len(state_cost) - 1  # costs fall as sizes grow
    choice = []
    for before, option in reversed(came_from):
        choice.append(int(option[state]))
        state = before[state]
    return choice[::-1]


def _relaxations(sizes: list[np.ndarray], costs: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """For the groups from each one on, to none: the sizes at which the least cost of their linear relaxation
    bends, rising, and that cost.
    """
    hulls = [_hull(size, cost) for size, cost in zip(sizes, costs, strict=True)]
    relaxations = []
    for first in range(len(hulls) + 1):
        rest = hulls[first:]
        smaller = np.concatenate([np.diff(size) for size, _ in rest] or [np.zeros(0, np.int64)])
        cheaper = np.concatenate([np.diff(cost) for _, cost in rest] or [np.zeros(0)])
        steepest = np.argsort(cheaper / smaller, kind="stable")
        start = sum(int(size[0]) for size, _ in rest), sum(float(cost[0]) for _, cost in rest)
        steps = np.concatenate(([start[0]], start[0] + np.cumsum(smaller[steepest])))
        sums = np.concatenate(([start[1]], start[1] + np.cumsum(cheaper[steepest])))
        relaxations.append((steps, sums))
    return relaxations


def _hull(size: np.ndarray, cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The options on the lower convex hull, from the smallest to the cheapest; size and cost of each."""
    hull: list[Option] = []
    for option in sorted(zip(size.tolist(), cost.tolist(), strict=True)):
        if hull and option[1] >= hull[-1][1]:
            continue
        while len(hull) > 1 and _slope(hull[-2], option) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return np.array([size for size, _ in hull]), np.array([cost for _, cost in hull])


def _slope(one: Option, other: Option) -> float:
    return (other[1] - one[1]) / (other[0] - one[0])
