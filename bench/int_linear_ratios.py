"""How int_linear stands to its peers, from its CSV: `python bench/int_linear_ratios.py [CSV ...]`.

For each class (what is quantized, and the dtype of activations): the geometric mean over shapes and batches
of the time of the fastest peer over ours, and the point where that is lowest. Then 4 bits against 8 at batch
1. A peer is what computes the same layer; the copy of the codes is none.
"""

import argparse
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from environment import ROOT
from report import Row, by_case, duration, read_csv

SHORT = {"float32": "fp32", "bfloat16": "bf16"}
MEAN, LOWEST = 1.3, 0.9  # what each class should reach: in the mean, and at every point
INT4_OVER_INT8, LARGE = 1.5, 4096 * 4096  # at batch 1, on layers of so many weights


@dataclass(frozen=True)
class Point:
    """One case: our fastest backend and the fastest peer of the class. ratio: above 1 where we are faster."""

    kind: str
    shape: str
    ours: float  # seconds
    peer: str
    theirs: float

    @property
    def ratio(self) -> float:
        return self.theirs / self.ours

    @property
    def weights(self) -> int:
        return math.prod(int(size) for size in self.shape.split()[0].split("x"))


def points(rows: Iterable[Row]) -> list[Point]:
    """One per case that has both a row of ours and one of a peer, in the order of the file."""
    found = []
    for case, contenders in by_case(rows).items():
        ours = [seconds(row) for row in contenders if row["role"] == "ours"]
        peers = [row for row in contenders if is_peer(row)]
        if ours and peers:
            best = min(peers, key=seconds)
            kind, shape = case.split(", ")
            found.append(Point(kind, shape, min(ours), best["contender"], seconds(best)))
    return found


def seconds(row: Row) -> float:
    return float(row["median_s"])


def is_peer(row: Row) -> bool:
    """The ceiling is one, too, where it is F.linear in the dtype of the activations."""
    plain = f"F.linear {SHORT[row['dtype']]}"
    return row["role"] == "peer" or (row["role"] == "ceiling" and row["contender"] == plain)


def geometric_mean(ratios: Iterable[float]) -> float:
    logs = [math.log(ratio) for ratio in ratios]
    return math.exp(sum(logs) / len(logs))


def summary(found: list[Point]) -> str:
    """A line per class, one for all, and one per large layer for 4 bits against 8."""
    lines = [f"fastest peer / ours: geometric mean (at least {MEAN}), lowest (at least {LOWEST})"]
    classes: dict[str, list[Point]] = {}
    for point in found:
        classes.setdefault(point.kind, []).append(point)
    for kind, some in classes.items():
        worst = min(some, key=lambda point: point.ratio)
        below = sum(point.ratio < LOWEST for point in some)
        lines.append(
            f"{kind:22} {len(some):3} points  mean {geometric_mean(p.ratio for p in some):5.2f}x  "
            f"lowest {worst.ratio:5.2f}x at {worst.shape} ({worst.peer} {duration(worst.theirs)}, "
            f"ours {duration(worst.ours)}); {below} below {LOWEST}x"
        )
    if len(classes) > 1:
        lines.append(f"{'all':22} {len(found):3} points  mean {geometric_mean(p.ratio for p in found):5.2f}x")
    return "\n".join([*lines, *_four_bits(found)])


def _four_bits(found: list[Point]) -> list[str]:
    """Ours in 4 bits against ours in 8 on the large layers at batch 1, from the two cases of one run."""
    times = {(point.kind, point.shape): point.ours for point in found}
    lines = []
    for (kind, shape), four in times.items():
        eight = times.get((kind.replace("int4", "int8"), shape))
        point = next(p for p in found if (p.kind, p.shape) == (kind, shape))
        if "int4" in kind and shape.endswith("batch 1") and point.weights >= LARGE and eight:
            lines.append(
                f"{kind}, {shape}: {eight / four:.2f}x our int8 (at least {INT4_OVER_INT8}x): "
                f"{duration(four)}, int8 {duration(eight)}"
            )
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", nargs="*", type=Path, help="default: bench/results/*/int_linear.csv")
    paths = parser.parse_args(arguments).csv or sorted(ROOT.glob("bench/results/*/int_linear.csv"))
    if not paths:
        print("no int_linear.csv under bench/results: run `python bench/run.py int_linear`", file=sys.stderr)
        return 1
    for path in paths:
        rows = read_csv(path)
        found = points(rows)
        print(f"{rows[0]['device'] if rows else path}: {len(by_case(rows))} cases, {len(found)} of ours")
        if found:
            print(summary(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
