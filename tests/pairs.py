"""A small set of cases in which every two values of different parameters meet."""

import itertools
import random
from collections.abc import Callable, Iterable, Iterator


def covering(
    parameters: dict[str, Iterable], allowed: Callable[..., bool] = lambda **case: True
) -> Iterator[dict]:
    """Cases, one value per parameter, until each pair of values that `allowed` permits at all has occurred.

    The same cases at every call. Each one is the first pair not met yet, completed by the best of a few
    random draws; a pair that no draw completes is one that `allowed` forbids.
    """
    values = {name: list(choices) for name, choices in parameters.items()}
    random_ = random.Random(0)

    def pairs_of(case: dict) -> set:
        return set(itertools.combinations(case.items(), 2))

    missing = dict.fromkeys(
        ((a, x), (b, y)) for a, b in itertools.combinations(values, 2) for x in values[a] for y in values[b]
    )
    while missing:
        first = next(iter(missing))
        draws = [
            {name: random_.choice(choices) for name, choices in values.items()} | dict(first)
            for _ in range(60)
        ]
        draws = [case for case in draws if allowed(**case)]
        del missing[first]
        if draws:
            best = max(draws, key=lambda case: len(pairs_of(case) & missing.keys()))
            missing = {pair: None for pair in missing if pair not in pairs_of(best)}
            yield best


def name(case: dict) -> str:
    return "-".join(f"{key}={value}" for key, value in case.items())
