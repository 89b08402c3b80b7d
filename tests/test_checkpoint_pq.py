"""Checkpoints of product-quantized models: identical logits, sizes, and every way a file can be wrong."""

import math
import os
import subprocess
import sys

import helpers_reload
import pytest
import torch
from helpers_checkpoint import assert_refused, rewrite
from helpers_reload import TOKENS, Model
from safetensors import safe_open
from torch import nn

import qnkernels as qnk
from qnkernels import container
from qnkernels.bitstream import unpack_bits
from qnkernels.nn import PQConv2d, PQEmbedding, PQLinear

CONFIGS = {
    "8 bits": qnk.PQConfig(3, 256, 2),
    "3 bits": qnk.PQConfig(3, 5, 2, codebook_grad="sum"),
    "1 bit": qnk.PQConfig(1, 2, 2),
    "9 bits, fp16": qnk.PQConfig(1, 300, 2, codebook_dtype=torch.float16),
    "bf16": qnk.PQConfig(3, 16, 2, codebook_dtype=torch.bfloat16),
    "int8": qnk.PQConfig(3, 16, 2, codebook_dtype=torch.int8, activations=True),
}


def plain(dtype: torch.dtype = torch.float32, seed: int = 99) -> Model:
    torch.manual_seed(seed)
    return Model().to(dtype).eval()


def build(config: str = "3 bits", dtype: torch.dtype = torch.float32) -> Model:
    """A quantized model, finetuned by a step."""
    model = qnk.quantize_(plain(dtype, seed=0), CONFIGS[config]).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(TOKENS).float().flatten(0, 1), TOKENS.flatten()).backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", CONFIGS)
def test_round_trip_gives_identical_logits(config, dtype, meta, tmp_path):
    model = build(config, dtype)
    expected = model(TOKENS)
    qnk.save_compressed(model, tmp_path / "m")
    if meta:
        with torch.device("meta"):
            fresh = Model().to(dtype).eval()
    else:
        fresh = plain(dtype)
    loaded = qnk.load_compressed(fresh, tmp_path / "m")
    assert loaded is fresh and torch.equal(loaded(TOKENS), expected)
    assert [type(module) for module in loaded.modules()] == [type(module) for module in model.modules()]
    assert [repr(module) for module in loaded.modules()] == [repr(module) for module in model.modules()]
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and ours[name].shape == tensor.shape
        if "codebook" not in name:
            assert torch.equal(ours[name], tensor)
    for layer in loaded.modules():
        if isinstance(layer, (PQLinear, PQEmbedding, PQConv2d)):
            assert layer.codes.t().is_contiguous() and layer.codebook.requires_grad
    assert loaded.head.codes is loaded.embedding.codes and loaded.head.codebook is loaded.embedding.codebook
    assert len(list(loaded.parameters())) == len(list(model.parameters()))
    qnk.save_compressed(loaded, tmp_path / "again")
    (spec, tensors), (first_spec, first) = (container.read(tmp_path / name) for name in ("again", "m"))
    assert spec == first_spec and tensors.keys() == first.keys()
    assert all(torch.equal(tensor, first[name]) for name, tensor in tensors.items())


@pytest.mark.parametrize("config", ["9 bits, fp16", "int8"])
def test_a_new_process_computes_the_same_logits_bit_for_bit(config, tmp_path):
    torch.manual_seed(1)
    model = qnk.quantize_(Model(), CONFIGS[config]).train()
    model(TOKENS)
    qnk.save_compressed(model.eval(), tmp_path / "model")
    command = [sys.executable, helpers_reload.__file__, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(command, check=True, env=environment, timeout=120)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits"), model(TOKENS))


@pytest.mark.parametrize(
    ("clusters", "bits", "codebook_dtype", "width", "scale"),
    [
        (256, 8, None, 4, 0),
        (16, 4, torch.float16, 2, 0),
        (1000, 10, torch.bfloat16, 2, 0),
        (2, 1, torch.int8, 1, 4),
    ],
)
def test_file_is_as_large_as_the_formula(clusters, bits, codebook_dtype, width, scale, tmp_path):
    """log2(K) / d bits per weight, the codebooks, and everything else; the file adds less than 1 %."""
    torch.manual_seed(0)
    model = nn.ModuleList(
        [nn.Embedding(501, 128), nn.Linear(128, 300), nn.Conv2d(64, 64, 3), nn.LayerNorm(128)]
    )
    qnk.quantize_(model, qnk.PQConfig(4, clusters, 1, codebook_dtype=codebook_dtype))
    codes = [501 * 32, 300 * 32, 64 * 144]
    codebooks = 3 * (clusters * 4 * width + scale)
    claimed = sum(math.ceil(count * bits / 8) for count in codes) + codebooks + 4 * (300 + 64 + 256)
    assert qnk.compressed_size(model) == claimed
    qnk.save_compressed(model, tmp_path / "m")
    with safe_open(tmp_path / "m", "pt") as file:
        names = list(file.keys())
        stored = sum(file.get_tensor(name).nbytes for name in names)
    assert stored == claimed < os.path.getsize(tmp_path / "m") < claimed + 4000


def test_codes_in_the_file_are_row_by_row(tmp_path):
    torch.manual_seed(2)
    layer = PQLinear.from_linear(nn.Linear(12, 7), 4, 6, 2)
    qnk.save_compressed(layer, tmp_path / "m")
    specification, tensors = container.read(tmp_path / "m")
    codes = unpack_bits(tensors["codes"], 21, 3, torch.uint8).reshape(7, 3)
    assert torch.equal(codes, layer.codes) and torch.equal(tensors["codebook"], layer.codebook)
    assert specification["layers"][""]["codebooks"] == 1


def test_shared_codes_are_stored_once_and_partly_quantized_models_too(tmp_path):
    torch.manual_seed(3)
    model = Model()
    qnk.quantize_(model, qnk.ScalarNoiseConfig())
    qnk.quantize_(model, qnk.PQConfig(4, 8, 2), lambda module, name: name in ("embedding", "head"))
    qnk.save_compressed(model, tmp_path / "m")
    with safe_open(tmp_path / "m", "pt") as file:
        names = set(file.keys())
    assert {"embedding.codes", "embedding.codebook", "body.0.weight"} <= names
    assert not any(name.startswith("head") for name in names)
    loaded = qnk.load_compressed(Model(), tmp_path / "m")
    assert type(loaded.body[0]) is nn.Linear and type(loaded.embedding) is PQEmbedding
    assert torch.equal(loaded.eval()(TOKENS), qnk.remove_noise_(model).eval()(TOKENS))


def test_frozen_weights_stay_frozen(tmp_path):
    qnk.save_compressed(build(), tmp_path / "m")
    model = plain()
    model.requires_grad_(False)
    qnk.load_compressed(model, tmp_path / "m")
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_only_the_dtypes_of_files():
    with pytest.raises(
        ValueError, match=r"layer 'embedding': codebook: expected one of .* to save, got torch.float64"
    ):
        qnk.compressed_size(build().double())


FIELDS = {
    "type": ["PQConv3d", None, ["PQLinear"], "PQEmbedding", "IntLinear"],
    "codebooks": [2, 0, True, "1", None],
    "shape": [[144], [144, 0], [144, 47], [144, 48, 1], "144x48", [144.0, 48], None],
    "block_size": [5, 0, 65, "3", None, 6],
    "n_centroids": [0, 4, 9, 70000, 5.0, None],
    "codebook_grad": ["max", None, ["mean"]],
    "codebook_dtype": ["float32", "int4", 8, "float16"],
    "dtype": ["bfloat16", "float64", None],
    "bias": [False, None, 0],
    "padding_idx": ["0"],
    "zero_padding": [True, None, 0],
    "activations": [True, None, 8],
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in FIELDS.items() for value in values]
)
def test_edited_fields_of_a_layer(field, value, tmp_path):
    """Even with a digest that matches."""
    qnk.save_compressed(build(), tmp_path / "m")

    def edit(specification, tensors):
        specification["layers"]["body.0"][field] = value

    rewrite(tmp_path / "m", edit)
    assert_refused(plain(), tmp_path / "m", r"m: ")


EDITS = {
    "a missing field": (
        lambda spec, tensors: spec["layers"]["head"].pop("codebooks"),
        "layer 'head': specification: expected an object with the fields",
    ),
    "a code too large": (
        lambda spec, tensors: tensors["body.0.codes"].fill_(255),
        "layer 'body.0': codes: expected values below the 5 centroids, got 7",
    ),
    "codes too short": (
        lambda spec, tensors: tensors.update({"body.0.codes": tensors["body.0.codes"][:-1]}),
        r"body.0.codes: expected torch.uint8 of shape \(864,\), got torch.uint8 of shape \(863,\)",
    ),
    "a codebook of another shape": (
        lambda spec, tensors: tensors.update({"body.0.codebook": torch.zeros(6, 3)}),
        r"body.0.codebook: expected torch.float32 of shape \(5, 3\), got .* \(6, 3\)",
    ),
    "a codebook of another dtype": (
        lambda spec, tensors: tensors.update({"body.0.codebook": torch.zeros(5, 3).half()}),
        r"body.0.codebook: expected torch.float32 of shape \(5, 3\), got torch.float16",
    ),
    "a codeword of NaN": (
        lambda spec, tensors: tensors["conv.codebook"][1].fill_(float("nan")),
        "layer 'conv': codebook: expected finite values, got nan",
    ),
    "a missing codebook": (lambda spec, tensors: tensors.pop("conv.codebook"), "missing conv.codebook"),
    "no list": (
        lambda spec, tensors: spec["layers"].update(conv=[1]),
        "layer 'conv': specification: expected",
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edited_files(edit, tmp_path):
    """Even with a digest that matches."""
    change, message = EDITS[edit]
    qnk.save_compressed(build(), tmp_path / "m")
    rewrite(tmp_path / "m", change)
    assert_refused(plain(), tmp_path / "m", message)


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_scale_of_int8_codewords(value, tmp_path):
    qnk.save_compressed(build("int8"), tmp_path / "m")
    rewrite(tmp_path / "m", lambda spec, tensors: tensors["body.0.codebook_scale"].fill_(value))
    assert_refused(
        plain(), tmp_path / "m", "layer 'body.0': codebook_scale: expected a finite positive value"
    )


def test_version_and_damage(tmp_path):
    qnk.save_compressed(build(), tmp_path / "m")
    whole = (tmp_path / "m").read_bytes()
    (tmp_path / "m").write_bytes(whole.replace(b'"version":"1"', b'"version":"9"'))
    assert_refused(plain(), tmp_path / "m", "version: expected '1', got '9'")
    damaged = bytearray(whole)
    damaged[-3] ^= 4
    (tmp_path / "m").write_bytes(damaged)
    assert_refused(plain(), tmp_path / "m", "do not match its sha256")


def test_models_that_do_not_fit(tmp_path):
    qnk.save_compressed(build(), tmp_path / "m")
    assert_refused(Model(dim=24), tmp_path / "m", r"weight: expected the shape in the file, \[50, 48\]")
    assert_refused(build(), tmp_path / "m", "model: expected an unquantized Embedding, got PQEmbedding")
    model = plain()
    model.conv = nn.Conv2d(1, 4, 3, padding=1, bias=False)
    assert_refused(model, tmp_path / "m", "layer 'conv': bias: expected that in the file, True, got False")
    model = plain()
    model.embedding.max_norm = 1.0
    assert_refused(model, tmp_path / "m", "layer 'embedding': max_norm: expected None")
