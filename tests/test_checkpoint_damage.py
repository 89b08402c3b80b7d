"""load_compressed of files that are damaged, edited, or not ours: refused, the model left as it was."""

import json
import pickle

import pytest
import torch
from helpers_checkpoint import assert_refused, build, fresh, rewrite
from safetensors import safe_open
from safetensors.torch import save_file

import qnkernels as qnk
from qnkernels import container


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
