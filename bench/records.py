"""A pytest plugin (bench/conftest.py, --records=FOLDER): FOLDER/<suite>.json as soon as a suite has ended."""

import json
from pathlib import Path

import pytest

from report import replace_file


class Records:
    def __init__(self, folder: Path, measured_on: dict[str, str]) -> None:
        self.folder, self.measured_on = folder, measured_on
        self._begin()

    def _begin(self) -> None:
        self.benchmarks: list[dict] = []
        self.problems: list[str] = []
        self.left_out: list[str] = []

    def add(self, benchmark) -> None:
        """The samples that the fixture has taken, as pytest-benchmark's own JSON has them."""
        stats = benchmark.stats
        one = {"fullname": stats.fullname, "extra_info": stats.extra_info, "stats": stats.stats.as_dict()}
        self.benchmarks.append(one)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.problems.append(f"{report.nodeid}\n{report.longreprtext}")
        elif report.skipped:
            self.left_out.append(report.longrepr[2].removeprefix("Skipped: "))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None):
        result = yield
        if nextitem is None or nextitem.path != item.path:
            self._write(item.path.stem.removeprefix("bench_"), not_installed(item))
            self._begin()
        return result

    def _write(self, suite: str, missing: list[str]) -> None:
        """In one step, since another process waits for the file."""
        record = {
            "machine_info": {"measured_on": self.measured_on},
            "benchmarks": self.benchmarks,
            "problem": "\n\n".join(self.problems),
            "left_out": [*dict.fromkeys(self.left_out), *missing],
        }
        replace_file(self.folder / f"{suite}.json", json.dumps(record))


def not_installed(item: pytest.Item) -> list[str]:
    """A line for each peer that the file of this test lists as missing."""
    names = sorted(getattr(item.module, "LEFT_OUT", ()))
    return [f"left out of {item.path.stem}, not installed: {name}" for name in names]
