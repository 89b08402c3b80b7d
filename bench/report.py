"""From the record of a run (bench/records.py) to CSV rows, and rows to a table of text."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from environment import FIELDS

COLUMNS = (
    *("op", "case", "shape", "size", "dtype", "contender", "role"),
    *("median_s", "q1_s", "q3_s", "min_s", "rounds", "calls", "timer"),
    *("moved_bytes", "operations", "gb_per_s", "gflop_per_s", "ceiling", "ratio_to_ceiling"),
    *("target", "peer_target", "target_peer"),  # as harness.Case has them
    "other_load",
    *FIELDS,
)

NOTICEABLE = 0.05

Row = dict[str, str]


def rows_from_json(recorded: dict) -> list[Row]:
    """One row per contender and case. All values are text as the CSV holds it; empty: not known."""
    measured_on = recorded["machine_info"]["measured_on"]
    return [_row(one["extra_info"], one["stats"], measured_on) for one in recorded["benchmarks"]]


def _row(facts: dict, stats: dict, measured_on: dict) -> Row:
    seconds = stats["median"]
    values = {
        **{name: facts[name] for name in COLUMNS if name in facts},
        **{"median_s": seconds, "q1_s": stats["q1"], "q3_s": stats["q3"], "min_s": stats["min"]},
        "rounds": stats["rounds"],
        "gb_per_s": facts["moved_bytes"] / seconds / 1e9,
        "gflop_per_s": facts["operations"] / seconds / 1e9 or None,
        **measured_on,
    }
    return {name: as_text(values[name]) for name in COLUMNS}


def as_text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def write_csv(path: Path, rows: Iterable[Row], columns: Sequence[str] = COLUMNS) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    replace_file(path, text.getvalue())


def replace_file(path: Path, text: str) -> None:
    """In one step, so that an interrupted run leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


def read_csv(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def by_case(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by case, in the order of the file."""
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(row["case"], []).append(row)
    return cases


def duration(seconds: float) -> str:
    """Three figures: 413 us, 1.32 ms, 2.05 s."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def verdict(row: Row, contenders: Iterable[Row]) -> str:
    """How a row stands to its targets among the contenders of its case; empty where it has none."""
    return ", ".join(filter(None, (_to_the_ceiling(row), _to_the_peer(row, contenders))))


def _to_the_ceiling(row: Row) -> str:
    if not row["target"] or not row["ratio_to_ceiling"]:
        return ""
    return f"{_met(float(row['ratio_to_ceiling']) <= float(row['target']))} {row['target']}x"


def _to_the_peer(row: Row, contenders: Iterable[Row]) -> str:
    least, name = row.get("peer_target"), row.get("target_peer")
    if not least:
        return ""
    peers = [one for one in contenders if one["contender"] == name or (not name and one["role"] == "peer")]
    peer = min(peers, key=lambda one: float(one["median_s"]), default=None)
    if peer is None:
        return f"{least}x not judged, without {name or 'a peer'}"
    ratio = float(peer["median_s"]) / float(row["median_s"])
    return f"{_met(ratio >= float(least))} {least}x {peer['contender']} ({ratio:.2f}x)"


def _met(met: bool) -> str:
    return "meets" if met else "misses"


def has_target(row: Row) -> bool:
    return bool(row["target"] or row.get("peer_target"))


def disturbance(row: Row) -> str:
    """A remark where other programs took a noticeable share of the processor while the case was timed."""
    share = float(row["other_load"])
    return f"   disturbed: other programs took {share:.0%} of the processor" if share > NOTICEABLE else ""


def table(rows: list[Row]) -> str:
    """A block of lines per case: median, spread, rate, ratio to the ceiling, target."""
    lines = []
    for case, contenders in by_case(rows).items():
        lines.append(f"\n{case}   (ratio to {contenders[0]['ceiling']}){disturbance(contenders[0])}")
        for row in contenders:
            ratio = f"{float(row['ratio_to_ceiling']):.2f}x" if row["ratio_to_ceiling"] else ""
            spread = f"{duration(float(row['q1_s']))} .. {duration(float(row['q3_s']))}"
            rate = f"{float(row['gb_per_s']):.1f} GB/s"
            if row["gflop_per_s"]:
                rate = f"{float(row['gflop_per_s']):.0f} GFLOP/s"
            lines.append(
                f"  {row['contender']:20} {row['role']:10} {duration(float(row['median_s'])):>9}"
                f"  {spread:22} {rate:>14} {ratio:>9}  {verdict(row, contenders)}".rstrip()
            )
    return "\n".join(lines)
