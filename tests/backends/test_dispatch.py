"""The choice between the GPU backends by size, without a GPU: the file of rules, and who is called."""

import json
import os
import stat
import warnings
from pathlib import Path

import pytest
import torch

import qnkernels
from qnkernels import backends, functional
from qnkernels.backends import dispatch
from qnkernels.reference.int_linear import pack

GPU = "NVIDIA Something"
RULES = {"int_linear": (("cuda", 16), ("triton", 64), ("cuda", None)), "kmeans_step": (("cuda", None),)}


@pytest.fixture
def file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where the rules are read from, on a machine with one GPU."""
    monkeypatch.setenv("QNKERNELS_DISPATCH", str(tmp_path / "deep" / "dispatch.json"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: GPU)
    monkeypatch.setattr(dispatch, "rules", dispatch.rules.__wrapped__)
    return tmp_path / "deep" / "dispatch.json"


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Both GPU backends, as the reference that notes its name; the choice starts anew."""
    names: list[str] = []

    def pretend(name: str) -> dict:
        def noting(op):
            def kernel(*arguments):
                names.append(name)
                return backends.importlib.import_module("qnkernels.backends.reference").load()[op](*arguments)

            return kernel

        ops = ("fake_quantize", "int_linear", "kmeans_step", *["minmax"] * (name == "triton"))
        return {op: noting(op) for op in ops}

    load = backends._load
    loaded = {name: pretend(name) for name in dispatch.CHOICES}
    monkeypatch.setattr(backends, "_load", lambda name: loaded[name] if name in loaded else load(name))
    for cached in ("_select", "_select_whole"):
        monkeypatch.setattr(backends, cached, getattr(backends, cached).__wrapped__)
    return names


def layer(rows: int) -> tuple:
    weight = pack(torch.randint(0, 256, (6, 32)), 8)
    return torch.randn(rows, 32), weight, torch.rand(6, 1), None, None, 8


def test_sizes_are_those_of_ops_that_both_have() -> None:
    from qnkernels.backends.native import CUDA_ARGTYPES
    from qnkernels.ops import OPS

    assert set(dispatch.SIZES) <= set(CUDA_ARGTYPES) and set(dispatch.SIZES) <= set(OPS)


def test_each_size_is_read_from_the_arguments_of_its_kernel() -> None:
    x, points, centroids = torch.zeros(5, 7), torch.zeros(9, 2), torch.zeros(4, 2)
    found = {op: size.of(x, points) for op, size in dispatch.SIZES.items() if op != "kmeans_step"}
    assert found == {"fake_quantize": 35, "int_linear": 5, "pq_linear": 5, "pq_linear_backward": 5}
    assert dispatch.SIZES["kmeans_step"].of(points, centroids, 1, 2, 3, None) == 4


def test_without_a_file_the_defaults_hold(file: Path, called: list[str]) -> None:
    assert dispatch.rules().steps == dispatch.DEFAULT and "nothing was measured" in dispatch.rules().why
    assert backends.serving("fake_quantize", "cuda") == "triton"
    assert backends.serving("int_linear", "cuda") == "cuda"
    backends.select("int_linear", "cuda")(*layer(3))
    assert called == ["cuda"]


def test_rules_decide_by_size(file: Path, called: list[str]) -> None:
    dispatch.write(file, GPU, "2026-01-31, commit abc", RULES)
    kernel = backends.select("int_linear", "cuda")
    for rows in (1, 16, 17, 64, 65, 0):
        arguments = layer(rows)
        with qnkernels.backend("reference"):
            expected = torch.ops.qnkernels.int_linear(*arguments)
        assert torch.equal(kernel(*arguments), expected)
    assert called == ["cuda", "cuda", "triton", "triton", "cuda", "cuda"]
    assert (
        backends.serving("int_linear", "cuda")
        == "cuda up to 16 rows of x, then triton up to 64 rows of x, then cuda"
    )
    assert (
        backends.serving("kmeans_step", "cuda") == "cuda" and backends.serving("minmax", "cuda") == "triton"
    )
    assert str(file) in dispatch.rules().why and "2026-01-31, commit abc" in dispatch.rules().why


def test_one_backend_for_all_sizes_is_called_without_a_detour(file: Path, called: list[str]) -> None:
    dispatch.write(file, GPU, "", RULES)
    assert backends.select("kmeans_step", "cuda") is backends._load("cuda")["kmeans_step"]
    assert backends.select("minmax", "cuda") is backends._load("triton")["minmax"]


def test_a_forced_backend_stays_forced(file: Path, called: list[str]) -> None:
    dispatch.write(file, GPU, "", RULES)
    with qnkernels.backend("triton"):
        backends.select("int_linear", "cuda")(*layer(1))
    assert called == ["triton"]


@pytest.mark.parametrize("missing", dispatch.CHOICES)
def test_a_rule_for_a_backend_that_is_missing_is_not_followed(file, called, missing, monkeypatch) -> None:
    dispatch.write(file, GPU, "", RULES)
    load = backends._load
    gone = backends.BackendUnavailable("not built")
    monkeypatch.setattr(backends, "_load", lambda name: gone if name == missing else load(name))
    (there,) = (name for name in dispatch.CHOICES if name != missing)
    assert backends.serving("int_linear", "cuda") == there
    backends.select("int_linear", "cuda")(*layer(40))
    assert called == [there]


def test_the_cpu_has_no_rules(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dispatch.write(file, GPU, "", RULES)
    monkeypatch.setattr(dispatch, "rules", lambda: pytest.fail("read for a CPU"))
    assert backends._rule("int_linear", "cpu") == ()


def test_rules_of_another_gpu_do_not_hold(file: Path) -> None:
    dispatch.write(file, "NVIDIA Other", "", RULES)
    assert dispatch.rules().steps == dispatch.DEFAULT and f"no rules for {GPU}" in dispatch.rules().why


def test_gpus_of_several_kinds_and_none(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dispatch.write(file, GPU, "", RULES)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"{GPU} {index}")
    assert dispatch.rules().steps == dispatch.DEFAULT and "several kinds" in dispatch.rules().why
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert dispatch.rules() == dispatch.Rules("no GPU here")


def test_rules_are_read_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "rules", backends.functools.cache(dispatch.rules))
    dispatch.write(file, GPU, "", RULES)
    first = dispatch.rules()
    file.unlink()
    assert dispatch.rules() is first and first.steps == dispatch.DEFAULT | RULES


def content(**changes) -> dict:
    device = {"measured": "today", "rules": {"int_linear": [["cuda", 16], ["triton", None]]}}
    return {"format": 1, "qnkernels": qnkernels.__version__, "devices": {GPU: device}} | changes


def of(rules: object) -> dict:
    return content(devices={GPU: {"measured": "", "rules": rules}})


MALFORMED = {
    "not JSON": "{",
    "not text": b"\xff\xfe\x00",
    "nested": "[" * 100_000,
    "a list": [],
    "another format": content(format=2),
    "no version": {"format": 1, "devices": {}},
    "another version": content(qnkernels="99.0"),
    "no devices": {"format": 1, "qnkernels": qnkernels.__version__},
    "a device in words": content(devices={GPU: "cuda"}),
    "rules in words": of("cuda"),
    "an unknown op": of({"exec": [["cuda", None]]}),
    "an op without a choice": of({"minmax": [["cuda", None]]}),
    "another backend": of({"int_linear": [["os.system", None]]}),
    "the reference": of({"int_linear": [["reference", None]]}),
    "no steps": of({"int_linear": []}),
    "steps in words": of({"int_linear": "cuda"}),
    "no rest": of({"int_linear": [["cuda", 16]]}),
    "a rest before the end": of({"int_linear": [["cuda", None], ["triton", None]]}),
    "sizes that shrink": of({"int_linear": [["cuda", 16], ["triton", 4], ["cuda", None]]}),
    "a size of 0": of({"int_linear": [["cuda", 0], ["triton", None]]}),
    "a size in words": of({"int_linear": [["cuda", "16"], ["triton", None]]}),
    "a truth for a size": of({"int_linear": [["cuda", True], ["triton", None]]}),
    "a fraction": of({"int_linear": [["cuda", 1.5], ["triton", None]]}),
    "a step of one": of({"int_linear": [["cuda"]]}),
    "a name that cannot be looked up": of({"int_linear": [[[], None]]}),
}


@pytest.mark.parametrize("bad", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_file_is_ignored_with_one_warning(file: Path, called: list[str], bad) -> None:
    file.parent.mkdir()
    text = bad if isinstance(bad, str | bytes) else json.dumps(bad)
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.warns(RuntimeWarning, match=r"dispatch\.json is ignored: .*gpu_suite\.py") as caught:
        found = dispatch.rules()
    assert len(caught) == 1 and found.steps == dispatch.DEFAULT and "is ignored" in found.why


def test_a_well_formed_file_gives_no_warning(file: Path) -> None:
    file.parent.mkdir()
    file.write_text(json.dumps(content()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.rules().steps["int_linear"] == (("cuda", 16), ("triton", None))


def test_a_huge_file_and_a_folder_are_ignored(file: Path) -> None:
    file.parent.mkdir()
    file.write_text(" " * (dispatch.LARGEST_FILE + 1))
    with pytest.warns(RuntimeWarning, match="larger than any such file"):
        dispatch.rules()
    file.unlink()
    file.mkdir()
    with pytest.warns(RuntimeWarning, match="is ignored"):
        dispatch.rules()


def test_writing_keeps_other_ops_and_devices_and_repairs(file: Path) -> None:
    dispatch.write(file, "NVIDIA Other", "then", {"kmeans_step": (("cuda", None),)})
    dispatch.write(file, GPU, "then", RULES)
    dispatch.write(file, GPU, "now", {"int_linear": (("triton", None),)})
    found = dispatch.read(file)
    assert found["NVIDIA Other"] == ("then", {"kmeans_step": (("cuda", None),)})
    assert found[GPU] == ("now", RULES | {"int_linear": (("triton", None),)})
    assert [one.name for one in file.parent.iterdir()] == ["dispatch.json"]
    assert not stat.S_IMODE(os.stat(file).st_mode) & stat.S_IXUSR
    file.write_text("{")
    dispatch.write(file, GPU, "now", RULES)
    assert dispatch.read(file) == {GPU: ("now", RULES)}


def test_where_the_file_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("QNKERNELS_DISPATCH", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert dispatch.path() == tmp_path / "qnkernels" / "dispatch.json"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert dispatch.path() == tmp_path / ".config" / "qnkernels" / "dispatch.json"
    monkeypatch.setenv("QNKERNELS_DISPATCH", "")
    assert dispatch.path() is None


def test_it_works_inside_torch_compile(file: Path, called: list[str], monkeypatch) -> None:
    """One graph, whatever the size: who is called is decided where it runs. The CPU stands in for a GPU."""
    dispatch.write(file, GPU, "", RULES)
    monkeypatch.setattr(backends, "_rule", lambda op, device: dispatch.rules().steps.get(op, ()))
    monkeypatch.setitem(backends.PREFERENCE, "cpu", dispatch.CHOICES)
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def call(x, weight, scale):
        return functional.int_linear(x, weight, scale, bits=8) + 1

    compiled = torch.compile(call, backend=keep, fullgraph=True, dynamic=True)
    for rows in (4, 40, 100):
        x, weight, scale, *_ = layer(rows)
        with qnkernels.backend("reference"):
            expected = call(x, weight, scale)
        assert torch.equal(compiled(x, weight, scale), expected)
    assert called == ["cuda", "triton", "cuda"] and len(graphs) == 1


@pytest.mark.parametrize("capabilities", [[(8, 0), (8, 9)], [(9, 0)], []])
def test_devices_that_the_cuda_library_has_code_for(monkeypatch, capabilities) -> None:
    assert unserved_capability(monkeypatch, capabilities) is None


@pytest.mark.parametrize("capabilities", [[(7, 5)], [(9, 0), (10, 0)], [(12, 0)]])
def test_other_devices_are_left_to_triton(monkeypatch, capabilities) -> None:
    from qnkernels.backends import cuda

    major, minor = capabilities[-1]
    assert unserved_capability(monkeypatch, capabilities) == f"{major}.{minor}"
    monkeypatch.setattr(cuda, "open_library", lambda name: None)
    monkeypatch.setattr(cuda, "declare", lambda *arguments: {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(backends.BackendUnavailable, match=rf"one of {major}\.{minor}; the triton"):
        cuda.load()


def unserved_capability(monkeypatch, capabilities) -> str | None:
    from qnkernels.backends import cuda

    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    return cuda.unserved_capability()
