"""qnkernels compress."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_model
from torch import nn
from typer.testing import CliRunner

import qnkernels as qnk
from qnkernels.cli import app

runner = CliRunner()
FACTORY = "compress_me:build"


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(33, 48)
        self.inner = nn.Linear(48, 48)
        self.head = nn.Linear(48, 33, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.inner(self.embedding(tokens))))


@pytest.fixture(autouse=True)
def factory(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import SimpleNamespace

    module = SimpleNamespace(build=Model, number=lambda: 7)
    monkeypatch.setitem(sys.modules, "compress_me", module)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(11)
    return Model()


@pytest.fixture
def checkpoint(model: Model, tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    save_model(model, path)
    return path


def compress(*arguments: object) -> dict:
    result = runner.invoke(app, ["compress", *map(str, arguments), f"--model={FACTORY}", "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize(
    "options", [[], ["--group-size=16"], ["--per=tensor"], ["--observer=histogram"], ["--symmetric"]]
)
def test_the_file_is_the_model_quantized(
    model: Model, checkpoint: Path, bits: int, options: list[str]
) -> None:
    summary = compress(checkpoint, f"--bits={bits}", *options)
    path = checkpoint.with_name(f"weights-int{bits}.safetensors")
    assert summary["file"] == str(path) and summary["bytes"] == path.stat().st_size
    assert summary["bytes_before"] == checkpoint.stat().st_size
    config = qnk.IntWeightOnlyConfig(
        bits,
        group_size=16 if "--group-size=16" in options else None,
        per="tensor" if "--per=tensor" in options else "channel",
        observer="histogram" if "--observer=histogram" in options else "minmax",
        symmetric="--symmetric" in options,
    )
    tokens = torch.randint(0, 33, (3, 7))
    loaded = qnk.load_compressed(Model(), path).eval()
    assert torch.equal(loaded(tokens), qnk.quantize_(model, config).eval()(tokens))


def test_activations(model: Model, checkpoint: Path) -> None:
    summary = compress(checkpoint, "--activations=dynamic")
    path = checkpoint.with_name("weights-int8-dynamic.safetensors")
    assert summary["file"] == str(path)
    tokens = torch.randint(0, 33, (3, 7))
    loaded = qnk.load_compressed(Model(), path).eval()
    assert loaded.inner.activations == "dynamic"
    assert torch.equal(loaded(tokens), qnk.quantize_(model, qnk.Int8DynamicConfig()).eval()(tokens))


def test_convolutions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(12)

    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 2), nn.ReLU(), nn.Conv2d(8, 4, 1))

    monkeypatch.setattr("compress_me.build", make)
    model = make()
    save_model(model, tmp_path / "conv.safetensors")
    layers = compress(tmp_path / "conv.safetensors", "--bits=4")["layers"]
    assert [layer["shape"] for layer in layers] == [[8, 3, 2, 2], [4, 8, 1, 1]]
    for layer, conv in zip(layers, (model[0], model[2]), strict=True):
        weight = conv.weight.detach()
        decoded = qnk.nn.IntConv2d.from_conv2d(conv, bits=4).weight
        assert layer["error"] == pytest.approx(((decoded - weight).norm() / weight.norm()).item(), rel=1e-4)
        assert layer["before"] == weight.numel() * 4
        assert layer["after"] == weight.numel() // 2 + len(weight) * 5


def test_report_of_layers(model: Model, checkpoint: Path) -> None:
    layers = {layer["name"]: layer for layer in compress(checkpoint, "--bits=4")["layers"]}
    assert list(layers) == ["embedding", "inner"]  # the head shares the weight of the embedding
    inner = layers["inner"]
    assert (inner["shape"], inner["bits"], inner["before"]) == ([48, 48], 4, 48 * 48 * 4)
    assert inner["after"] == 48 * 48 // 2 + 48 * 4 + 48
    decoded = qnk.nn.IntLinear.from_linear(model.inner, bits=4).weight
    expected = ((decoded - model.inner.weight).norm() / model.inner.weight.norm()).item()
    assert inner["error"] == pytest.approx(expected, rel=1e-4)


def test_skip_leaves_layers(model: Model, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "part.safetensors"
    summary = compress(checkpoint, "--skip=^inn", f"--out={out}")
    assert [layer["name"] for layer in summary["layers"]] == ["embedding"]
    loaded = qnk.load_compressed(Model(), out)
    assert type(loaded.inner) is nn.Linear and torch.equal(loaded.inner.weight, model.inner.weight)


def test_a_checkpoint_of_the_library_is_read(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "full.safetensors"
    qnk.save_compressed(model, path)
    assert len(compress(path)["layers"]) == 2


def test_table(checkpoint: Path) -> None:
    result = runner.invoke(app, ["compress", str(checkpoint), f"--model={FACTORY}"])
    assert result.exit_code == 0, result.output
    for word in ("embedding", "inner", "48 x 48", "whole file"):
        assert word in result.stdout


def fails(message: str, *arguments: object) -> None:
    result = runner.invoke(app, ["compress", *map(str, arguments)])
    assert result.exit_code == 1
    assert message in " ".join(result.stderr.split()), result.stderr
    assert "Traceback" not in result.output


def test_bad_input(checkpoint: Path, tmp_path: Path) -> None:
    model = f"--model={FACTORY}"
    fails("bits: expected an integer in [2, 8], got 9", checkpoint, model, "--bits=9")
    dynamic, known = (
        "--activations=dynamic",
        "activations: expected one of ['float'] with 4 bits, got 'dynamic'",
    )
    fails(known, checkpoint, model, "--bits=4", dynamic)
    fails("['float', 'dynamic'] with 8 bits, got 'static'", checkpoint, model, "--activations=static")
    fails("checkpoint: no such file", tmp_path / "none.safetensors", model)
    fails("model: expected module:function, got 'nothing'", checkpoint, "--model=nothing")
    fails("model: no_such_module:build: No module named", checkpoint, "--model=no_such_module:build")
    fails("to return a torch.nn.Module, got int", checkpoint, "--model=compress_me:number")
    fails("does not fit the model", checkpoint, "--model=torch.nn:Identity")
    fails("skip: expected a regular expression, got '('", checkpoint, model, "--skip=(")
    fails("out: expected another file than the checkpoint", checkpoint, model, f"--out={checkpoint}")
    fails("group_size", checkpoint, model, "--group-size=7")
    fails("sensitivity: expected one, since", checkpoint, model, "--budget=9")
    measured = f"--sensitivity={tmp_path / 'none.json'}"
    fails("budget: expected one, since", checkpoint, model, measured)
    fails("none.json: No such file", checkpoint, model, measured, "--budget=9")
    both = (checkpoint, model, f"--sensitivity={checkpoint}", "--budget=9")
    fails("expected a saved Sensitivity", *both)
    fails("bits: expected none with a budget", *both, "--bits=8")
    fails("skip: expected none with a budget", *both, "--skip=inner")
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.name]


@pytest.fixture
def measured(model: Model, tmp_path: Path) -> qnk.Sensitivity:
    """Quality is what the layers of a group weigh, less where it has fewer bits."""
    groups = {"table": "embedding|head", "inner": "inner"}
    tokens = torch.randint(0, 33, (8, 9), generator=torch.Generator().manual_seed(2))
    expected = model(tokens).detach()
    evaluate = lambda model: (model(tokens) - expected).square().mean().item()  # noqa: E731
    pq = [qnk.PQConfig(4, 16, codebook_dtype=torch.float16)]
    return qnk.sensitivity(model, evaluate, (2, 5), groups, pq=pq, lower_is_better=True)


@pytest.mark.parametrize("printed", [False, True])
def test_a_budget_is_shared_out(
    model: Model, checkpoint: Path, measured: qnk.Sensitivity, tmp_path: Path, printed: bool
) -> None:
    smallest = measured.other_bytes + sum(
        min(row.bytes for row in measured.rows if row.group == group) for group in measured.groups
    )
    budget = smallest + 600
    path = tmp_path / "measured.json"
    allocation = qnk.allocate_bits(measured, budget)
    assert len(set(allocation.groups.values())) == 2  # different choices
    if printed:
        path.write_text(json.dumps(measured.to_json() | {"allocation": allocation.to_json()}))
    else:
        measured.save(path)
    summary = compress(checkpoint, f"--sensitivity={path}", f"--budget={budget}")
    assert summary["file"] == str(checkpoint.with_name("weights-mixed.safetensors"))
    stored = {layer["name"]: layer["stored"] for layer in summary["layers"]}
    assert stored == {"embedding": allocation.groups["table"], "inner": allocation.groups["inner"]}
    for layer in summary["layers"]:
        assert layer["after"] == allocation.sizes["table" if layer["name"] == "embedding" else "inner"]
    tokens = torch.randint(0, 33, (3, 7))
    loaded = qnk.load_compressed(Model(), summary["file"]).eval()
    assert torch.equal(loaded(tokens), qnk.quantize_(model, allocation).eval()(tokens))
    assert compress(checkpoint, f"--sensitivity={path}", f"--budget={budget / 1e6}MB") == summary
    arguments = (checkpoint, f"--model={FACTORY}", f"--sensitivity={path}")
    for bad in ("1.5", "x", "MB", "1 GB"):
        fails("budget: expected bytes", *arguments, f"--budget={bad}")
    fails(f"at least {smallest}, the smallest possible size", *arguments, "--budget=10")


def test_a_compressed_file_is_not_compressed_again(checkpoint: Path) -> None:
    compress(checkpoint)
    path = checkpoint.with_name("weights-int8.safetensors")
    fails("is compressed already", path, f"--model={FACTORY}")


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    path = tmp_path / "weights.pt"
    path.write_bytes(pickle.dumps(Bomb()))
    fails("is not a whole .safetensors file", path, f"--model={FACTORY}")
    assert not (tmp_path / "exploded").exists()
