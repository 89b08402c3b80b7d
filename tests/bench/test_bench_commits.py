"""What a summary says of the commits that ran on a GPU, and how far the kernels have moved on since."""

import subprocess

import pytest
from helpers_bench import ON_GPU, rows

import commits
import report
import summary

SINCE = {
    "abc1234": ["csrc/cuda/kmeans.cu", "csrc/cuda/decode.cu", "qnkernels/backends/cuda.py"],
    "def5678": [],
}
PASSED = {"backend": "triton", "passed": 3, "failed": 0, "device": "NVIDIA Something", "date": ""}


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Results of a GPU from three commits, one of which is not in the history."""
    monkeypatch.setattr(commits, "kernels_changed_since", lambda commit: SINCE.get(commit))
    ran = {"minmax": "abc1234", "kmeans_step": "0dd0000"}
    found = tmp_path / "nvidia-something"
    summary.update_tested(found, [{**PASSED, "op": op, "commit": commit} for op, commit in ran.items()])
    report.write_csv(found / "fake_quantize.csv", rows({**ON_GPU, "commit": "def5678"}))
    return found


def test_the_commits_of_a_gpu_are_told_with_what_changed_since(folder):
    lines = summary.device_summary(folder, folder.parent).splitlines()
    for line in (
        "- abc1234 ran the tests of `minmax`.",
        "- 0dd0000 ran the tests of `kmeans_step`.",
        "- def5678 ran the benchmarks `fake_quantize`.",
        "- No passed memory check of all CUDA kernels is recorded here.",
        "- 0dd0000 is not in the history here: what of the kernels has changed since is not known.",
        "- Since def5678 no source of the GPU kernels has changed.",
        "  - csrc/cuda: `kmeans.cu`, `decode.cu`",
        "  - qnkernels/backends: `cuda.py`",
    ):
        assert line in lines
    (missing,) = (line for line in lines if line.startswith("- No table here has"))
    assert "`kmeans`" in missing and "`fake_quantize`" not in missing
    assert any(line.startswith("- Since abc1234 these sources") for line in lines)


def test_a_step_that_passed_is_told_with_its_commit(folder):
    (folder / summary.PASSED).write_text('{"memory check": {"commit": "def5678", "date": "", "tests": 42}}')
    text = summary.device_summary(folder, folder.parent)
    step = "the whole step `memory check`, 42 tests passed"
    assert f"- def5678 ran {step}; the benchmarks `fake_quantize`." in text
    assert "No passed memory check" not in text


def test_tests_of_one_commit_are_not_listed_again(folder):
    summary.update_tested(folder, [{**PASSED, "op": "kmeans_step", "commit": "abc1234"}])
    text = summary.device_summary(folder, folder.parent)
    assert "- abc1234 ran the tests of all ops under Tests." in text


def test_a_processor_has_no_such_part(folder):
    processor = folder.parent / "a-processor-x2"
    report.write_csv(processor / "fake_quantize.csv", rows())
    assert "## Commits" not in summary.device_summary(processor, folder.parent)


def test_kernels_that_changed_are_asked_of_git(monkeypatch, tmp_path):
    monkeypatch.setattr(commits, "ROOT", tmp_path)
    assert commits.kernels_changed_since("HEAD") is None  # no repository
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    files = ("csrc/cuda/a.cu", "csrc/cpu/b.cpp", "qnkernels/backends/cuda_pq.py", "tests/gpu/c.py")
    write(tmp_path, files, "1")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run(["git", *identity, *command], cwd=tmp_path, check=True)
    assert commits.kernels_changed_since("HEAD") == [] and not commits.differs("tests/gpu")
    write(tmp_path, files, "2")
    changed = ["csrc/cuda/a.cu", "qnkernels/backends/cuda_pq.py"]
    assert commits.kernels_changed_since("HEAD") == commits.kernels_changed_since("HEAD+") == changed
    assert commits.differs("tests/gpu") and commits.kernels_changed_since("0123456789") is None


def write(folder, names, text):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("commit", "exact"), [("abc1234", True), ("abc1234+", False), ("unknown", False), ("", False)]
)
def test_a_commit_is_exact_when_it_names_one_state(commit, exact):
    assert commits.is_exact(commit) == exact
