"""save_compressed and load_compressed: round trips, sizes, and models that do not fit."""

import os
import stat

import pytest
import torch
from helpers_checkpoint import CONFIGS, Model, assert_refused, build, fresh
from safetensors import safe_open
from torch import nn

import qnkernels as qnk
from qnkernels import container
from qnkernels.nn import Int8Linear, IntEmbedding, NoisyLinear


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
