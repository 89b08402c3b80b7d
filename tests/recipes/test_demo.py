"""The demo from end to end, on a tiny model and a small text."""

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import qnkernels as qnk
from qnkernels.recipes import demo, laboratory
from qnkernels.recipes.methods import (
    BLOCK_SIZE,
    CALIBRATION_WINDOWS,
    CENTROIDS,
    METHODS,
    NAMES,
    PRODUCTS,
    STAGES,
    TRAININGS,
    Variant,
    calibrate_on,
    chosen,
    stages,
)
from qnkernels.recipes.results import Row
from qnkernels.recipes.text import TextError
from qnkernels.recipes.transformer import LanguageModel, Shape

SHAPE = Shape(vocabulary=300, width=16, layers=1, heads=2, context=48)
VARIANTS = [variant for _, variants in TRAININGS for variant in variants]
LABELS = [
    label
    for trained, variants in TRAININGS
    for label in (trained.label, *(f"tuning {v.label}" for v in variants if v.precision in PRODUCTS))
]
ACTIVATIONS = {"int8": "float", "int8-dynamic": "dynamic", "int8-static": "static", "int4": "float"}
BITS = {"fp32": 32, **dict.fromkeys(ACTIVATIONS, 8), "int4": 4}


class Silent:
    """A listener that remembers, and stops the demo at the step asked for."""

    def __init__(self, stop_at: tuple[int, int] | None = None, trainings: int = len(LABELS)) -> None:
        self.stop_at, self.trainings = stop_at, trainings
        self.labels: list[str] = []
        self.losses: list[list[float]] = []
        self.rows: list[Row] = []

    def said(self, message: str) -> None: ...

    def started(self, label: str, number: int, trainings: int, steps: int) -> None:
        # a step of finetuning after each of the three stages, or three of training
        assert (number, trainings, steps) == (len(self.labels) + 1, self.trainings, 3)
        self.labels.append(label)
        self.losses.append([])

    def stepped(self, step: int, loss: float) -> None:
        self.losses[-1].append(loss)
        if (len(self.labels), step) == self.stop_at:
            raise KeyboardInterrupt

    def found(self, row: Row) -> None:
        self.rows.append(row)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    preset = laboratory.Preset(SHAPE, batch=2, steps=3, rate=1e-2, validation=200)
    monkeypatch.setitem(laboratory.PRESETS, "tiny", preset)
    monkeypatch.setattr(demo, "TIMING_SECONDS", 0.0)
    monkeypatch.setattr(demo, "GENERATING_SECONDS", 0.0)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    words = ["alpha", "beta", "gamma", "delta", "=", "(", ")", "\n    ", "é"]
    path.write_text(" ".join(random.Random(1).choices(words, k=4000)))
    return path


@pytest.fixture
def settings(tmp_path: Path, text: Path) -> demo.Settings:
    return demo.Settings(out=tmp_path / "out", preset="tiny", seed=3, data=(text,))


def test_end_to_end(settings: demo.Settings) -> None:
    listener = Silent()
    results = demo.run(settings, listener)
    assert listener.labels == LABELS and len(LABELS) == 13
    assert all(len(losses) == 3 for losses in listener.losses)
    assert results.note == ""
    assert [(row.precision, row.method) for row in results.rows] == [
        ("fp32", "full precision"),
        *(("int8", method) for method in METHODS[1:]),
        *((precision, "after training") for precision in ("int8-dynamic", "int8-static")),
        *((precision, method) for precision in ("int4", "iPQ", "iPQ+int8") for method in METHODS[1:]),
    ]
    assert json.loads((settings.out / demo.RESULTS).read_text()) == json.loads(json.dumps(results.to_json()))
    assert (settings.out / demo.PICTURE).read_bytes().startswith(b"\x89PNG")
    parameters = sum(p.numel() for p in LanguageModel(SHAPE).parameters())
    for row in results.rows:
        assert (settings.out / row.file).stat().st_size == row.bytes
        assert 1 < row.perplexity < 300
        assert min(row.training_ratio, row.tokens_per_second, row.generation_ratio) > 0
        assert row.bytes < parameters * BITS.get(row.precision, 4) / 8 + 25_000
        assert (row.finetuning is not None) == (row.precision in PRODUCTS)
    everything = {path.name for path in settings.out.rglob("*") if path.is_file()}
    files = {variant.file_name for variant in VARIANTS}
    assert everything == files | {demo.RESULTS, demo.PICTURE, laboratory.TOKENIZER}


def test_checkpoints_reload_to_what_the_table_says(settings: demo.Settings) -> None:
    results = demo.run(settings, Silent())
    tokens = torch.arange(48)[None] + 97
    logits = {}
    for row in results.rows:
        model = qnk.load_compressed(LanguageModel(SHAPE), settings.out / row.file).eval()
        packed = [layer for layer in model.modules() if hasattr(layer, "weight_packed")]
        products = [layer for layer in model.modules() if hasattr(layer, "codebook")]
        assert all(layer.bits == BITS[row.precision] for layer in packed)
        activations = {layer.activations for layer in packed if layer is not model.embedding}
        assert activations == ({ACTIVATIONS[row.precision]} if packed else set())
        counts = {"fp32": (0, 0), "iPQ": (0, 6), "iPQ+int8": (0, 6)}
        assert (len(packed), len(products)) == counts.get(row.precision, (6, 0))
        assert all(layer.block_size == BLOCK_SIZE for layer in products)
        assert all(layer.activations == (row.precision == "iPQ+int8") for layer in products)
        logits[row.precision, row.method] = model(tokens).detach()
    full = logits["fp32", "full precision"]
    after = {name: logits[name, "after training"] for name in ACTIVATIONS}
    errors = {name: (theirs - full).norm() / full.norm() for name, theirs in after.items()}
    assert 0 < errors["int8"] < 0.02 < errors["int4"] < 0.5
    # most of these tokens are none of the text, whose ranges clamp them
    assert 0 < errors["int8-dynamic"] < 0.03 and 0 < errors["int8-static"] < 0.3
    assert len({theirs.norm().item() for theirs in after.values()}) == 4
    for name in ("int4", "iPQ"):
        assert not torch.equal(logits[name, "QAT"], logits[name, "Quant-Noise"])


def test_product_quantization_is_told_in_full(settings: demo.Settings) -> None:
    results = demo.run(replace(settings, methods=("ipq",)), Silent(trainings=6))
    full, *rows = results.rows
    assert full.finetuning is None and [row.method for row in rows] == list(METHODS[1:])
    for row in rows:
        finetuning = row.finetuning
        assert [stage["pattern"] for stage in finetuning.stages] == list(STAGES)
        sizes = [full.bytes, *(stage["bytes"] for stage in finetuning.stages)]
        assert sizes == sorted(sizes, reverse=True) and 0 < row.bytes - sizes[-1] < 10_000
        layers = [name for stage in finetuning.stages for name in stage["relative_errors"]]
        assert layers == ["blocks.0.fc1", "blocks.0.fc2", "embedding", "head", *layers[4:]]
        assert layers[4:] == ["blocks.0.attention.qkv", "blocks.0.attention.out"]
        assert finetuning.steps == 1 and min(finetuning.seconds, finetuning.ratio) > 0
        assert 1 < finetuning.perplexity_without < 300 and finetuning.perplexity_without != row.perplexity
    assert results.settings["product_quantization"]["centroids"] == CENTROIDS


def test_finetuning_at_rate_zero_changes_nothing(
    settings: demo.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The untuned perplexity is that of the same codes, with the centroids as k-means left them."""
    preset = replace(laboratory.PRESETS["tiny"], finetuning_rate=0.0)
    monkeypatch.setitem(laboratory.PRESETS, "tiny", preset)
    results = demo.run(replace(settings, methods=("ipq",)), Silent(trainings=6))
    for row in results.rows[1:]:
        assert row.perplexity == row.finetuning.perplexity_without


def test_a_changed_reload_is_noticed(settings: demo.Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(model, path):
        loaded = qnk.load_compressed(model, path)
        loaded.norm.bias.data += 1e-3
        return loaded

    monkeypatch.setattr(demo, "load_compressed", load)
    with pytest.raises(RuntimeError, match="the reloaded model gives other logits than the one saved"):
        demo.run(settings, Silent())


def test_a_seed_gives_the_same_numbers(settings: demo.Settings) -> None:
    first, again, other = Silent(), Silent(), Silent()
    demo.run(settings, first)
    demo.run(settings, again)
    demo.run(replace(settings, seed=4), other)
    assert first.losses == again.losses
    assert [row.perplexity for row in first.rows] == [row.perplexity for row in again.rows]
    assert all(a != b for a, b in zip(first.losses, other.losses, strict=True))


@pytest.mark.parametrize(
    ("stop_at", "finished"),
    [((2, 1), 5), ((2, 3), 5), ((4, 2), 7), ((7, 1), 9), ((8, 2), 10)],
)
def test_ctrl_c_keeps_what_is_finished(
    settings: demo.Settings, stop_at: tuple[int, int], finished: int
) -> None:
    results = demo.run(settings, Silent(stop_at))
    label = LABELS[stop_at[0] - 1]
    kind = "finetuning" if label.startswith("tuning") else "training"
    name = label.removeprefix("tuning ")
    assert results.note == f"stopped during the {kind} {name!r}: {finished} of 15 models are finished"
    written = json.loads((settings.out / demo.RESULTS).read_text())
    assert written["note"] == results.note and len(written["rows"]) == finished
    assert (settings.out / demo.PICTURE).exists()
    assert len(list((settings.out / demo.CHECKPOINTS).iterdir())) == finished


def test_ctrl_c_before_anything_is_finished_writes_no_results(settings: demo.Settings) -> None:
    results = demo.run(settings, Silent((1, 1)))
    assert results.note == "stopped during the training 'full precision': 0 of 15 models are finished"
    assert not (settings.out / demo.RESULTS).exists() and not (settings.out / demo.PICTURE).exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preset": "huge"}, "preset: expected one of tiny, small, deep, base, got 'huge'"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        (
            {"methods": ("int8", "pq")},
            r"methods: expected some of fp32, int8, .*, int4, ipq, ipq\+int8, got 'pq'",
        ),
        (
            {"methods": ()},
            r"methods: expected some of fp32, int8, int8-dynamic, int8-static, int4, .*, got none",
        ),
        ({"seed": -1}, r"seed: expected an integer in \[0, 2\^63\), got -1"),
        ({"device": "tpu9"}, "device: expected cpu or a GPU that is there, got 'tpu9'"),
        ({"device": "cuda:77"}, "device: expected cpu or a GPU that is there, got 'cuda:77'"),
    ],
)
def test_bad_settings(settings: demo.Settings, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(settings, **change)


def test_too_small_a_text(settings: demo.Settings, tmp_path: Path) -> None:
    small = tmp_path / "small.txt"
    small.write_text("too short " * 9)
    with pytest.raises(TextError, match=r"small\.txt: \d+ tokens of training text, at least 50 are needed"):
        demo.run(replace(settings, data=(small,)), Silent())


def test_out_that_cannot_be_written(settings: demo.Settings, text: Path) -> None:
    with pytest.raises(OSError, match=r"text\.txt"):
        demo.run(replace(settings, out=text / "out"), Silent())
    assert text.is_file()


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.label)
def test_variants_say_how_they_are_trained_and_stored(variant: Variant) -> None:
    noises, export = list(variant.noise().values()), variant.export()
    assert (export is None) == (variant.precision in ("fp32", *PRODUCTS))
    assert (noises == []) == (variant.method in ("full precision", "after training"))
    for noise in noises:
        if variant.precision in PRODUCTS:
            assert noise.p == 1.0 if variant.method == "QAT" else 0.05 <= noise.p <= 0.2
            assert noise.block_size == BLOCK_SIZE
            assert noise.kind == {"QAT": "centroid", "Quant-Noise": "zero"}[variant.method]
        else:
            assert noise.bits == BITS[variant.precision] == export.bits
            assert noise.p == {"QAT": 1.0, "Quant-Noise": 0.5}[variant.method]
            assert noise.per == export.per


def test_qat_trains_with_as_many_codewords_as_product_quantization_has() -> None:
    (qat,) = (variant for variant in VARIANTS if variant.label == "iPQ QAT")
    model = LanguageModel(Shape(vocabulary=768, width=64, layers=1, heads=2, context=8))
    layers = {name for name, module in model.named_modules() if hasattr(module, "weight")}
    trained = {}
    for pattern, noise in qat.noise().items():
        for name in layers:
            if re.search(pattern, name):
                assert name not in trained
                trained[name] = noise.n_centroids
    stored = {layer.name: layer.n_centroids for stage in stages(model, "iPQ", 0) for layer in stage.layers}
    assert stored == {name: trained[name] for name in stored} and len(stored) == 6


@pytest.mark.parametrize(
    ("names", "precisions", "trainings"),
    [
        (("fp32",), ["fp32"], 1),
        (("int8",), ["fp32", "int8", "int8", "int8"], 3),
        (("int8-static", "int8-dynamic"), ["fp32", "int8-dynamic", "int8-static"], 1),
        (("ipq", "fp32"), ["fp32", "iPQ", "iPQ", "iPQ"], 3),
        (("ipq+int8",), ["fp32", "iPQ+int8", "iPQ+int8", "iPQ+int8"], 3),
        (NAMES, [variant.precision for variant in VARIANTS], 7),
    ],
)
def test_methods_choose_rows(names: tuple[str, ...], precisions: list[str], trainings: int) -> None:
    plan = chosen(names)
    assert [variant.precision for _, variants in plan for variant in variants] == precisions
    assert len(plan) == trainings and plan[0][0].precision == "fp32"


@pytest.mark.parametrize(("length", "windows"), [(100_000, CALIBRATION_WINDOWS), (48 * 7 + 5, 7), (48, 1)])
def test_calibration_sees_windows_of_all_the_text(length: int, windows: int) -> None:
    model, seen = LanguageModel(SHAPE).eval(), []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    calibrate_on(model, torch.arange(length) % 300, batch=5)
    tokens = torch.cat(seen)
    assert tokens.shape == (windows, 48) and len(seen[0]) == min(5, windows)
    assert tokens[0, 0] == 0 and (windows == 1 or tokens[-1, -1] == (length - 1) % 300)
    qnk.quantize_(model, qnk.Int8StaticConfig())
    scales = [layer.x_scale.item() for layer in model.modules() if hasattr(layer, "x_scale")]
    assert len(scales) == 5 and min(scales) > 0 and len(set(scales)) > 3


def test_stages_take_every_weight_matrix() -> None:
    model = LanguageModel(Shape(vocabulary=768, width=64, layers=2, heads=2, context=8))
    layers = [layer for stage in stages(model, "iPQ", seed=0) for layer in stage.layers]
    assert len(layers) == 2 + 4 * 2
    assert all(parameter.dim() == 1 or "codebook" in name for name, parameter in model.named_parameters())
    for layer in layers:
        blocks = layer.shape[0] * layer.shape[1] // BLOCK_SIZE
        assert layer.n_centroids <= blocks / 8
    assert model.head.codes is model.embedding.codes and model.head.codebook is model.embedding.codebook
