"""The occupancy of every GPU kernel, from what its compilers report, and the table that is committed.

One row for each kernel and architecture: of its instantiations, the one with the lowest occupancy and, among
those, the most registers. Occupancy is the warps that a multiprocessor can hold over those it may hold.
"""

import csv
import dataclasses
from collections.abc import Iterable
from pathlib import Path

# Of a multiprocessor, shared memory by architecture (CUDA C++ programming guide, "Technical Specifications
# per Compute Capability"). A warp gets its registers in units, of the quarter of them that its scheduler has.
WARPS, THREADS, BLOCKS, REGISTERS, UNIT, QUARTERS = 64, 2048, 32, 65536, 256, 4
SHARED = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_90a": 228 << 10}
RESERVED = 1 << 10  # bytes of shared memory that the system takes in each block
SHARED_UNIT = 128  # a block has a multiple of it


@dataclasses.dataclass
class Compiled:
    """One kernel variant. Shared memory in bytes per block, spills in bytes of local memory per thread.

    dynamic: the part of it that a launch asks for, or None if that is unknown: no launch was seen.
    """

    kernel: str
    variant: str
    arch: str
    registers: int = 0
    shared: int = 0  # that the compiler knows
    spills: int = 0
    error: str = ""
    backend: str = "cuda"
    threads: int = 0
    dynamic: int | None = None
    symbol: str = ""  # tells variants apart


@dataclasses.dataclass
class Occupancy:
    blocks: int  # of a multiprocessor
    warps: int
    limit: str  # what allows no further block

    @property
    def share(self) -> float:
        return self.warps / WARPS


def occupancy(arch: str, registers: int, threads: int, shared: int) -> Occupancy:
    """Of blocks of so many threads, registers a thread and bytes of shared memory."""
    warps = -(-threads // 32)
    of_warp = -(-max(registers, 1) * 32 // UNIT) * UNIT
    limits = {
        "threads": min(WARPS // warps, THREADS // threads),
        "registers": REGISTERS // QUARTERS // of_warp * QUARTERS // warps,
        "shared memory": SHARED[arch] // (-(-(shared + RESERVED) // SHARED_UNIT) * SHARED_UNIT),
        "blocks": BLOCKS,
    }
    limit = min(limits, key=limits.get)
    return Occupancy(limits[limit], limits[limit] * warps, limit)


def occupancy_of(one: Compiled) -> Occupancy | None:
    """None if nothing launches it."""
    if not one.threads or one.dynamic is None:
        return None
    return occupancy(one.arch, one.registers, one.threads, one.shared + one.dynamic)


FIELDS = (
    *("backend", "kernel", "arch", "compiler", "variants", "launched", "variant", "registers", "threads"),
    *("static_shared", "dynamic_shared", "spills", "blocks", "warps", "occupancy", "limit"),
    *("most_registers", "highest_occupancy"),
)


def rows(compiled: Iterable[Compiled], compilers: dict[str, str]) -> list[dict[str, str]]:
    """The table; a variant may be there several times, once for each way in which it is launched."""
    groups: dict[tuple[str, str, str], list[Compiled]] = {}
    for one in compiled:
        groups.setdefault((one.backend, one.kernel, one.arch), []).append(one)
    return [
        {"backend": key[0], "kernel": key[1], "arch": key[2], "compiler": compilers[key[0]], **_row(ones)}
        for key, ones in sorted(groups.items())
    ]


def _row(ones: list[Compiled]) -> dict[str, str]:
    found = [(occupancy_of(one), one) for one in ones]
    launched = [(at, one) for at, one in found if at]
    if launched:
        at, worst = min(launched, key=lambda pair: (pair[0].warps, -pair[1].registers))
    else:
        at, worst = max(found, key=lambda pair: pair[1].registers)
    row = {
        "variants": len({one.symbol for one in ones}),
        "launched": len({one.symbol for _, one in launched}),
        "variant": worst.variant,
        "registers": worst.registers,
        "threads": worst.threads or "",
        "static_shared": worst.shared,
        "dynamic_shared": "" if worst.dynamic is None else worst.dynamic,
        "spills": max(one.spills for one in ones),
        "blocks": at.blocks if at else "",
        "warps": at.warps if at else "",
        "occupancy": f"{at.share:.3f}" if at else "",
        "limit": at.limit if at else "not launched",
        "most_registers": max(one.registers for one in ones),
        "highest_occupancy": f"{max(at.share for at, _ in launched):.3f}" if launched else "",
    }
    return {name: str(value) for name, value in row.items()}


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def update(path: Path, table: list[dict[str, str]]) -> None:
    """Puts the rows into the file, in place of those of the same backends and architectures."""
    new = {(row["backend"], row["arch"]) for row in table}
    kept = [row for row in read(path) if (row["backend"], row["arch"]) not in new] if path.exists() else []
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted((*kept, *table), key=lambda row: [row[name] for name in FIELDS[:3]]))


def text(cells: Iterable[Iterable[str]]) -> str:
    """Columns of a table for the terminal."""
    lines = [tuple(line) for line in cells]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
