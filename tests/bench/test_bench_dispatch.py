"""bench/dispatch.py: from the tables of a GPU to the rules that qnkernels reads."""

import pytest

import dispatch
import report
import summary
from environment import FIELDS
from qnkernels.backends import dispatch as rules

GPU = "NVIDIA Something"


def row(op, case, size, contender, seconds, **changes) -> report.Row:
    known = {"op": op, "case": case, "size": str(size), "contender": contender, "role": "ours"}
    facts = {"device": GPU, "cuda": "13.0", "date": "2026-01-31", "commit": "abc", "median_s": str(seconds)}
    return dict.fromkeys((*report.COLUMNS, *FIELDS), "") | known | facts | changes


def both(op, size, triton, cuda, case="one") -> list[report.Row]:
    name = f"{case} {size}"
    return [row(op, name, size, "triton", triton), row(op, name, size, "cuda", cuda)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("QNKERNELS_DISPATCH", str(tmp_path / "dispatch.json"))
    folder = tmp_path / "results" / "nvidia-something"
    measured = [
        *both("int_linear", 256, 1.0, 2.0),
        *both("int_linear", 1, 3.0, 1.0),
        *both("int_linear", 16, 3.0, 1.0, "fp32"),
        *both("int_linear", 16, 1.0, 2.0, "bf16"),  # 1.22 with the other
        *both("int_linear", 64, 1.02, 1.0),  # a draw
    ]
    report.write_csv(folder / "int_linear.csv", [{k: r[k] for k in report.COLUMNS} for r in measured])
    others = [
        *both("kmeans_step", 256, 2.0, 1.0),
        row("pq_linear", "a", 4, "cuda", 1.0),  # no other to compare to
        *both("minmax", 4, 2.0, 1.0),  # no choice
        *(row("fake_quantize", "a", "", name, 1.0) for name in ("triton", "cuda")),  # of an older table
        row("kmeans_step", "one 256", 256, "torch", 0.1, role="peer"),
    ]
    report.write_csv(folder / "others.csv", [{k: r[k] for k in report.COLUMNS} for r in others])
    return folder


def test_the_faster_at_each_size_serves_it(folder):
    assert dispatch.derive(folder) == {
        "int_linear": (("cuda", 16), ("triton", None)),
        "kmeans_step": (("cuda", None),),
    }


def test_what_a_processor_measured_does_not_count(folder):
    rows = [one | {"cuda": ""} for one in report.read_csv(folder / "int_linear.csv")]
    assert dispatch.ratios(rows) == {}


@pytest.mark.parametrize(("failing", "left"), [("cuda", "triton"), ("triton", "cuda")])
def test_a_backend_that_failed_a_test_is_not_chosen(folder, failing, left):
    facts = {"passed": 9, "device": GPU, "commit": "abc", "date": "2026-01-31"}
    summary.update_tested(folder, [{"op": "int_linear", "backend": failing, "failed": 1, **facts}])
    assert dispatch.derive(folder)["int_linear"] == ((left, None),)
    summary.update_tested(folder, [{"op": "int_linear", "backend": left, "failed": 1, **facts}])
    assert "int_linear" not in dispatch.derive(folder)


def test_rules_go_where_they_are_read(folder, capsys):
    assert dispatch.main([str(folder)]) == 0
    when, found = rules.read(rules.path())[GPU]
    assert when == "2026-01-31, commit abc" and found == dispatch.derive(folder)
    printed = capsys.readouterr().out
    assert (
        f"wrote {rules.path()}" in printed and "int_linear: cuda up to 16 rows of x, then triton" in printed
    )


def test_nothing_to_choose_from_writes_nothing(folder, capsys):
    for path in folder.glob("*.csv"):
        path.unlink()
    assert dispatch.main([str(folder)]) == 0
    assert "no rules" in capsys.readouterr().out and not rules.path().exists()


def test_without_a_gpu_it_asks_for_a_folder(monkeypatch, capsys):
    monkeypatch.setattr(dispatch.torch.cuda, "is_available", lambda: False)
    assert dispatch.main([]) == 2
    assert "needs a folder of results" in capsys.readouterr().err
