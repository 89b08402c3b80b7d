"""A pytest plugin for tests/gpu (`-p gpu_pytest`), used by bench/gpu_checks.py.

--outcome-log=FILE: a line of JSON for each outcome, as it comes, so that a run that is stopped keeps what it
found. --ops=OP,...: only the tests of these ops, by their mark `of` or by name.
"""

import json
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcome-log", type=Path, help="file that each test's outcome is appended to")
    parser.addoption("--ops", default="", help="ops, separated by commas, whose tests are run")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--outcome-log")
    if path and not hasattr(config, "workerinput"):  # the process that starts workers hears of all tests
        config.pluginmanager.register(OutcomeLog(path))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ops = [op for op in config.getoption("--ops").split(",") if op]
    others = [item for item in items if ops and not covers(item, ops)]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]


def covers(item: pytest.Item, ops: list[str]) -> bool:
    marker = item.get_closest_marker("of")
    return (marker is not None and marker.args[0] in ops) or any(op in item.name for op in ops)


class OutcomeLog:
    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed or (report.when == "call" and report.passed):
            line = {"test": report.nodeid, "failed": report.failed, **dict(report.user_properties)}
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")


def read(path: Path) -> dict[str, dict]:
    """By test, its properties and whether any part of it failed. A last line cut short is left out."""
    tests: dict[str, dict] = {}
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    for line in lines:
        if line.endswith("\n"):
            one = json.loads(line)
            failed = one["failed"] or tests.get(one["test"], {}).get("failed", False)
            tests[one["test"]] = {**one, "failed": failed}
    return tests


def by_op(tests: dict[str, dict]) -> list[dict]:
    """Passed and failed tests per (op, backend)."""
    counts: dict[tuple[str, str], list[int]] = {}
    for test in tests.values():
        if "op" in test:
            counts.setdefault((test["op"], test["backend"]), [0, 0])[test["failed"]] += 1
    return [
        {"op": op, "backend": backend, "passed": passed, "failed": failed}
        for (op, backend), (passed, failed) in sorted(counts.items())
    ]
