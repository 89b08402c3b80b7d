"""save_compressed and load_compressed: round trips, sizes, and every way a file can be wrong."""

import copy
import json
import os
import pickle
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import qnkernels as qnk
from qnkernels import container
from qnkernels.nn import Int8Linear, IntEmbedding, NoisyLinear

CONFIGS = {
    "plain": None,
    "noisy": qnk.ScalarNoiseConfig(activations=True),
    "int8": qnk.Int8WeightOnlyConfig(),
    "int8 groups, symmetric": qnk.Int8WeightOnlyConfig(group_size=16, symmetric=True),
    "int4": qnk.Int4WeightOnlyConfig(group_size=32),
    "int4 per tensor": qnk.Int4WeightOnlyConfig(group_size=None, per="tensor"),
}


class Model(nn.Module):
    """A tied language model with a convolution, a shared module, and buffers of both sorts."""

    def __init__(self, dim: int = 32, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, dim, padding_idx=0)
        self.conv = nn.Conv1d(dim, dim, 3, padding=1)
        self.body = nn.Sequential(nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim, bias=False))
        self.twice = self.body[0]
        self.norm = nn.BatchNorm1d(dim)
        self.head = nn.Linear(dim, 50, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.register_buffer("transient", torch.ones(2), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.embedding(tokens).transpose(1, 2))
        return self.head(self.body(self.norm(x).transpose(1, 2)))


def build(config: str = "int8", dim: int = 32, seed: int = 0, dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(seed)
    model = Model(dim).to(dtype)
    model(torch.randint(0, 50, (3, 7)))  # moves the running statistics
    if CONFIGS[config] is not None:
        qnk.quantize_(model, CONFIGS[config])
    return model.eval()


def fresh(dim: int = 32, dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(99)
    return Model(dim).to(dtype).eval()


def snapshot(model: nn.Module) -> tuple[list[type], dict[str, torch.Tensor]]:
    return [type(module) for module in model.modules()], copy.deepcopy(model.state_dict())


def assert_refused(model: nn.Module, path, message: str, error: type[Exception] = ValueError) -> None:
    """Loading raises, and the model is as it was."""
    types, state = snapshot(model)
    with pytest.raises(error, match=message):
        qnk.load_compressed(model, path)
    assert [type(module) for module in model.modules()] == types
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])


def rewrite(path, edit) -> None:
    """Let `edit(specification, tensors)` change a file, and give it a digest that matches."""
    specification, tensors = container.read(path)
    edit(specification, tensors)
    container.write(path, tensors, specification)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(config, dtype, tmp_path):
    model = build(config, dtype=dtype)
    qnk.save_compressed(model, tmp_path / "model.safetensors")
    loaded = fresh(dtype=dtype)
    parameters = {name: id(parameter) for name, parameter in loaded.named_parameters()}
    assert qnk.load_compressed(loaded, tmp_path / "model.safetensors") is loaded
    plain = qnk.remove_noise_(model)
    assert [type(module) for module in loaded.modules()] == [type(module) for module in plain.modules()]
    assert list(loaded.state_dict()) == list(plain.state_dict())
    for name, tensor in plain.state_dict().items():
        other = loaded.state_dict()[name]
        assert other.dtype == tensor.dtype and torch.equal(other, tensor), name
    tokens = torch.randint(0, 50, (2, 5))
    assert torch.equal(loaded(tokens), plain(tokens))
    # what the caller holds of the fresh model (an optimizer, say) is still in it
    assert all(id(parameter) == parameters[name] for name, parameter in loaded.named_parameters())
    assert loaded.twice is loaded.body[0]
    if config.startswith("int"):
        assert loaded.head.weight_packed is loaded.embedding.weight_packed
        assert loaded.head.scale is loaded.embedding.scale
    else:
        assert loaded.head.weight is loaded.embedding.weight


@pytest.mark.parametrize("config", ["plain", "int4"])
def test_loads_into_a_model_on_the_meta_device(config, tmp_path):
    model = build(config)
    qnk.save_compressed(model, tmp_path / "m")
    with torch.device("meta"):
        loaded = Model()
    with pytest.raises(
        ValueError, match=r"transient: expected a buffer with data, .* got one on the meta device"
    ):
        qnk.load_compressed(loaded, tmp_path / "m")
    loaded.transient = torch.ones(2)
    qnk.load_compressed(loaded, tmp_path / "m").eval()
    tokens = torch.randint(0, 50, (2, 5))
    assert torch.equal(loaded(tokens), model(tokens))
    tied = "weight_packed" if config == "int4" else "weight"
    assert getattr(loaded.head, tied) is getattr(loaded.embedding, tied)
    assert loaded.conv.weight.requires_grad


def test_a_loaded_model_does_not_depend_on_its_file(tmp_path):
    model, loaded = build("int4"), fresh()
    qnk.save_compressed(model, tmp_path / "m")
    qnk.load_compressed(loaded, tmp_path / "m")
    (tmp_path / "m").write_bytes(b"")
    tokens = torch.randint(0, 50, (2, 5))
    assert torch.equal(loaded(tokens), model(tokens))


def test_loads_over_a_noisy_model(tmp_path):
    model = build("int8")
    qnk.save_compressed(model, tmp_path / "m")
    loaded = qnk.quantize_(fresh(), qnk.ScalarNoiseConfig())
    qnk.load_compressed(loaded, tmp_path / "m")
    assert type(loaded.head) is Int8Linear
    assert not any(isinstance(module, NoisyLinear) for module in loaded.modules())


def test_root_module_round_trip(tmp_path):
    layer = qnk.quantize_(nn.Linear(8, 3), qnk.Int8WeightOnlyConfig())
    qnk.save_compressed(layer, tmp_path / "m")
    loaded = qnk.load_compressed(nn.Linear(8, 3), tmp_path / "m")
    assert type(loaded) is Int8Linear and torch.equal(loaded.weight, layer.weight)


@pytest.mark.parametrize(("config", "bits"), [("int8", 8), ("int4", 4)])
def test_file_is_as_large_as_claimed(config, bits, tmp_path):
    """Codes, scales and zero points counted by hand; the file adds less than 1 %."""
    torch.manual_seed(0)
    vocabulary, dim, layers = 1000, 256, 4
    group = CONFIGS[config].group_size or dim
    model = nn.ModuleList([nn.Embedding(vocabulary, dim)])
    for _ in range(layers):
        model.append(nn.Linear(dim, 4 * dim))
        model.append(nn.LayerNorm(dim))
    qnk.quantize_(model, CONFIGS[config])
    weights = vocabulary * dim + layers * 4 * dim * dim
    scales = weights // group
    claimed = weights * bits // 8 + scales * (4 + 1) + layers * (4 * dim + 2 * dim) * 4
    assert qnk.compressed_size(model) == claimed
    qnk.save_compressed(model, tmp_path / "m")
    size = os.path.getsize(tmp_path / "m")
    assert claimed < size < claimed * 1.01


def test_shared_tensors_count_and_are_stored_once(tmp_path):
    assert qnk.compressed_size(Model(tied=False)) - qnk.compressed_size(Model()) == 50 * 32 * 4
    model = build("int8")
    qnk.save_compressed(model, tmp_path / "m")
    with safe_open(tmp_path / "m", "pt") as file:
        names = set(file.keys())
    assert "embedding.weight_packed" in names and "head.weight_packed" not in names
    assert not any(name.startswith("twice") or name == "transient" for name in names)


def test_views_of_one_storage_are_saved_apart(tmp_path):
    model = nn.Module()
    whole = torch.randn(4, 6)
    model.register_buffer("left", whole[:, :3])
    model.register_buffer("top", whole[:2])
    model.register_buffer("whole", whole)
    model.register_buffer("empty", whole[:0])
    model.register_buffer("scalar", torch.tensor(7))
    model.register_buffer("flags", torch.tensor([True, False]))
    qnk.save_compressed(model, tmp_path / "m")
    loaded = nn.Module()
    for name, tensor in model.named_buffers():
        loaded.register_buffer(name, torch.zeros_like(tensor))
    qnk.load_compressed(loaded, tmp_path / "m")
    for name, tensor in model.named_buffers():
        assert torch.equal(getattr(loaded, name), tensor)


def test_file_is_readable_by_whom_the_umask_lets_and_nothing_else_is_left(tmp_path):
    previous = os.umask(0o022)
    try:
        qnk.save_compressed(build(), tmp_path / "m")
    finally:
        os.umask(previous)
    assert stat.S_IMODE(os.stat(tmp_path / "m").st_mode) == 0o644
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize("point", ["save_file", "_flush"])
def test_a_failed_save_leaves_the_file_that_was_there(point, tmp_path, monkeypatch):
    path = tmp_path / "m"
    path.write_bytes(b"what was there")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(container, point, fail)
    with pytest.raises(OSError, match="disk full"):
        qnk.save_compressed(build(), path)
    assert path.read_bytes() == b"what was there" and os.listdir(tmp_path) == ["m"]


def test_paths_that_cannot_be(tmp_path):
    model = build()
    with pytest.raises(IsADirectoryError, match="path: expected a file to write, got the directory"):
        qnk.save_compressed(model, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"path: expected an existing folder, got .*nowhere"):
        qnk.save_compressed(model, tmp_path / "nowhere" / "m")
    assert_refused(fresh(), tmp_path, "path: expected a file, got the directory", IsADirectoryError)
    assert_refused(fresh(), tmp_path / "nothing", "path: no such file", FileNotFoundError)
    assert os.listdir(tmp_path) == []


def test_truncated_file(tmp_path):
    qnk.save_compressed(build(), tmp_path / "m")
    whole = (tmp_path / "m").read_bytes()
    for size in (0, 1, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "m").write_bytes(whole[:size])
        assert_refused(fresh(), tmp_path / "m", "truncated, or not a safetensors file")


def test_every_flipped_bit_is_noticed(tmp_path):
    qnk.save_compressed(build(), tmp_path / "m")
    whole = (tmp_path / "m").read_bytes()
    generator = torch.Generator().manual_seed(4)
    places = [
        0,
        3,
        7,
        8,
        9,
        *torch.randint(8, len(whole), (60,), generator=generator).tolist(),
        len(whole) - 1,
    ]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(torch.randint(0, 8, (), generator=generator))
        (tmp_path / "m").write_bytes(damaged)
        assert_refused(fresh(), tmp_path / "m", r"m: ")


def test_other_files(tmp_path):
    (tmp_path / "text").write_text("not a checkpoint " * 50)
    assert_refused(fresh(), tmp_path / "text", "truncated, or not a safetensors file")
    with open(tmp_path / "pickle", "wb") as file:
        pickle.dump({"weight": [1.0]}, file)
    assert_refused(fresh(), tmp_path / "pickle", "truncated, or not a safetensors file")
    save_file({"weight": torch.ones(2, 2)}, tmp_path / "foreign")
    assert_refused(fresh(), tmp_path / "foreign", "format: expected 'qnkernels', got None")
    metadata = {"format": "qnkernels", "version": "7", "specification": "{}", "sha256": ""}
    save_file({"a": torch.ones(1)}, tmp_path / "newer", metadata)
    assert_refused(fresh(), tmp_path / "newer", "version: expected '1', got '7'")
    save_file({"a": torch.ones(1)}, tmp_path / "bare", {"format": "qnkernels", "version": "1"})
    assert_refused(fresh(), tmp_path / "bare", "specification: expected in the metadata, got none")
    for text in ("{not json", "[" * 100_000):
        metadata = {"format": "qnkernels", "version": "1", "specification": text}
        save_file({}, tmp_path / "json", {**metadata, "sha256": container.digest(text, {})})
        assert_refused(fresh(), tmp_path / "json", "specification: expected JSON")


def test_an_edited_specification_does_not_match_its_digest(tmp_path):
    qnk.save_compressed(build(), tmp_path / "m")
    with safe_open(tmp_path / "m", "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    specification = json.loads(metadata["specification"])
    specification["layers"]["head"]["symmetric"] = True
    metadata["specification"] = json.dumps(specification)
    save_file(tensors, tmp_path / "m", metadata)
    assert_refused(fresh(), tmp_path / "m", "contents do not match its sha256; it was damaged or edited")


FIELDS = {
    "type": ["Linear", None, ["IntLinear"]],
    "bits": [3, 4, "8", True, None],
    "shape": [[50], [50, 0], [50, 31], "50x32", [50.0, 32.0], None],
    "group_size": [7, 0, -1, "8", 8],
    "symmetric": [True, 0, None],
    "dtype": ["bfloat16", "float64", None],
    "bias": [True, None, 0],
    "padding_idx": ["0"],
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in FIELDS.items() for value in values]
)
def test_edited_fields_of_a_layer(field, value, tmp_path):
    """Even with a digest that matches."""
    qnk.save_compressed(build(), tmp_path / "m")

    def edit(specification, tensors):
        specification["layers"]["head"][field] = value

    rewrite(tmp_path / "m", edit)
    assert_refused(fresh(), tmp_path / "m", r"m: ")


EDITS = {
    "a missing field": (
        lambda spec, tensors: spec["layers"]["head"].pop("bits"),
        "layer 'head': specification: expected an object with the fields",
    ),
    "an unknown field": (
        lambda spec, tensors: spec["layers"]["head"].update(code="exit()"),
        "layer 'head': specification: expected an object with the fields",
    ),
    "no layers": (lambda spec, tensors: spec.pop("layers"), "specification: expected layers and aliases"),
    "layers of another type": (
        lambda spec, tensors: spec.update(layers=[]),
        "layers: expected an object, got",
    ),
    "a layer that is not there": (
        lambda spec, tensors: spec["layers"].update(tail=spec["layers"].pop("head")),
        "layer 'tail': model: expected an unquantized Linear, got no layer of that name",
    ),
    "a layer of another kind": (
        lambda spec, tensors: spec["layers"].update(norm=spec["layers"].pop("head")),
        "layer 'norm': model: expected an unquantized Linear, got BatchNorm1d",
    ),
    "an alias of nothing": (
        lambda spec, tensors: spec["aliases"].update({"head.scale": "nothing"}),
        "aliases: expected 'head.scale' to name a stored tensor, got 'nothing'",
    ),
    "a missing tensor": (lambda spec, tensors: tensors.pop("norm.bias"), "missing norm.bias"),
    "a missing part of a layer": (lambda spec, tensors: tensors.pop("body.0.scale"), "body.0.scale"),
    "one tensor too many": (lambda spec, tensors: tensors.update(x=torch.ones(1)), "got also x"),
    "another shape": (
        lambda spec, tensors: tensors.update({"norm.bias": torch.ones(31)}),
        r"norm.bias: expected torch.float32 of shape \(32,\), got torch.float32 of shape \(31,\)",
    ),
    "another dtype": (
        lambda spec, tensors: tensors.update({"norm.bias": torch.ones(32).half()}),
        r"norm.bias: expected torch.float32 of shape \(32,\), got torch.float16",
    ),
    "codes of another dtype": (
        lambda spec, tensors: tensors.update({"body.2.weight_packed": torch.ones(32, 64)}),
        r"body.2.weight_packed: expected torch.uint8 of shape \(32, 64\)",
    ),
    "a scale of zero": (
        lambda spec, tensors: tensors["body.2.scale"].zero_(),
        "layer 'body.2': scale: expected finite positive values, got 0.0",
    ),
    "a scale of NaN": (
        lambda spec, tensors: tensors["body.2.scale"][3].fill_(float("nan")),
        "layer 'body.2': scale: expected finite positive values, got nan",
    ),
    "an infinite scale": (
        lambda spec, tensors: tensors["body.2.scale"][0].fill_(float("inf")),
        "layer 'body.2': scale: expected finite positive values, got inf",
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edited_files(edit, tmp_path):
    """Even with a digest that matches."""
    change, message = EDITS[edit]
    qnk.save_compressed(build(), tmp_path / "m")
    rewrite(tmp_path / "m", change)
    assert_refused(fresh(), tmp_path / "m", message)


def test_zero_point_out_of_range(tmp_path):
    qnk.save_compressed(build("int4"), tmp_path / "m")
    rewrite(tmp_path / "m", lambda spec, tensors: tensors["body.2.zero_point"].fill_(16))
    assert_refused(fresh(), tmp_path / "m", "layer 'body.2': zero_point: expected values below 16, got 16")


def test_models_that_do_not_fit(tmp_path):
    qnk.save_compressed(build(), tmp_path / "m")
    path = tmp_path / "m"
    assert_refused(
        fresh(dim=64), path, r"layer 'embedding': weight: expected the shape in the file, \[50, 32\]"
    )
    assert_refused(fresh(dtype=torch.bfloat16), path, "weight: expected the dtype in the file, float32")
    assert_refused(
        build(), path, "layer 'embedding': model: expected an unquantized Embedding, got IntEmbedding"
    )
    model = fresh()
    model.body[2] = nn.Linear(64, 32)
    assert_refused(model, path, "layer 'body.2': bias: expected that in the file, False, got True")
    model = fresh()
    model.embedding.padding_idx = None
    assert_refused(model, path, "layer 'embedding': padding_idx: expected that in the file, 0, got None")
    model = fresh()
    model.extra = nn.Parameter(torch.ones(1))
    assert_refused(model, path, "missing extra")
    model = fresh()
    model.body[2] = nn.Identity()
    assert_refused(model, path, "layer 'body.2': model: expected an unquantized Linear, got Identity")


def test_model_that_ties_what_the_file_does_not(tmp_path):
    torch.manual_seed(0)
    qnk.save_compressed(Model(tied=False), tmp_path / "m")
    assert_refused(fresh(), tmp_path / "m", "head.weight: expected the same tensor as embedding.weight")


def test_untied_model_takes_a_tied_file(tmp_path):
    model = build("plain")
    qnk.save_compressed(model, tmp_path / "m")
    loaded = qnk.load_compressed(Model(tied=False), tmp_path / "m")
    assert torch.equal(loaded.head.weight, model.head.weight)
    assert loaded.head.weight is not loaded.embedding.weight


def test_state_that_is_no_tensor(tmp_path):
    class Odd(nn.Module):
        def get_extra_state(self):
            return {"an": "object"}

    with pytest.raises(
        ValueError, match="_extra_state: expected a tensor in the state of the model, got dict"
    ):
        qnk.save_compressed(Odd(), tmp_path / "m")
    with torch.device("meta"):
        model = Model()
    with pytest.raises(
        ValueError, match=r"embedding.weight: expected a tensor with data, got one on the meta"
    ):
        qnk.save_compressed(model, tmp_path / "m")
    assert os.listdir(tmp_path) == []


def test_embedding_options_survive(tmp_path):
    model = nn.Sequential(nn.Embedding(10, 8, padding_idx=3))
    qnk.quantize_(model, qnk.Int4WeightOnlyConfig(group_size=4))
    qnk.save_compressed(model, tmp_path / "m")
    loaded = qnk.load_compressed(nn.Sequential(nn.Embedding(10, 8, padding_idx=3)), tmp_path / "m")
    assert type(loaded[0]) is IntEmbedding and loaded[0].padding_idx == 3 and loaded[0].group_size == 4
    assert torch.equal(loaded(torch.arange(10)), model(torch.arange(10)))
