"""The demo from end to end, on a tiny model and a small text."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import qnkernels as qnk
from qnkernels.recipes import demo
from qnkernels.recipes.methods import TRAININGS, Variant
from qnkernels.recipes.results import Row
from qnkernels.recipes.text import TextError
from qnkernels.recipes.transformer import LanguageModel, Shape

SHAPE = Shape(vocabulary=300, width=16, layers=1, heads=2, context=48)
VARIANTS = [variant for _, variants in TRAININGS for variant in variants]


class Silent:
    """A listener that remembers, and stops the demo at the step asked for."""

    def __init__(self, stop_at: tuple[int, int] | None = None) -> None:
        self.stop_at = stop_at
        self.labels: list[str] = []
        self.losses: list[list[float]] = []
        self.rows: list[Row] = []

    def said(self, message: str) -> None: ...

    def started(self, label: str, number: int, trainings: int, steps: int) -> None:
        assert (number, trainings, steps) == (len(self.labels) + 1, 5, 3)
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
    preset = demo.Preset(SHAPE, batch=2, steps=3, rate=1e-2, validation=200)
    monkeypatch.setitem(demo.PRESETS, "tiny", preset)
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
    assert listener.labels == [trained.label for trained, _ in TRAININGS]
    assert all(len(losses) == 3 for losses in listener.losses)
    assert results.note == ""
    assert [(row.bits, row.method) for row in results.rows] == [
        (32, "full precision"),
        *((bits, method) for bits in (8, 4) for method in ("after training", "QAT", "Quant-Noise")),
    ]
    assert json.loads((settings.out / demo.RESULTS).read_text()) == json.loads(json.dumps(results.to_json()))
    assert (settings.out / demo.PICTURE).read_bytes().startswith(b"\x89PNG")
    parameters = sum(p.numel() for p in LanguageModel(SHAPE).parameters())
    for row in results.rows:
        assert (settings.out / row.file).stat().st_size == row.bytes
        assert 1 < row.perplexity < 300
        assert min(row.training_ratio, row.tokens_per_second, row.generation_ratio) > 0
        assert row.bytes < parameters * row.bits / 8 + 25_000
    everything = {path.name for path in settings.out.rglob("*") if path.is_file()}
    files = {variant.file_name for variant in VARIANTS}
    assert everything == files | {demo.RESULTS, demo.PICTURE, demo.TOKENIZER}


def test_checkpoints_reload_to_what_the_table_says(settings: demo.Settings) -> None:
    results = demo.run(settings, Silent())
    tokens = torch.arange(48)[None] + 97
    logits = {}
    for row in results.rows:
        model = qnk.load_compressed(LanguageModel(SHAPE), settings.out / row.file).eval()
        assert all(layer.bits == row.bits for layer in model.modules() if hasattr(layer, "weight_packed"))
        logits[row.bits, row.method] = model(tokens).detach()
    full = logits[32, "full precision"]
    errors = {bits: (logits[bits, "after training"] - full).norm() / full.norm() for bits in (8, 4)}
    assert 0 < errors[8] < 0.02 < errors[4] < 0.5
    assert not torch.equal(logits[4, "QAT"], logits[4, "Quant-Noise"])


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


@pytest.mark.parametrize(("stop_at", "finished"), [((2, 2), 3), ((5, 1), 6)])
def test_ctrl_c_keeps_what_is_finished(
    settings: demo.Settings, stop_at: tuple[int, int], finished: int
) -> None:
    results = demo.run(settings, Silent(stop_at))
    label = TRAININGS[stop_at[0] - 1][0].label
    assert results.note == f"stopped during the training {label!r}: {finished} of 7 models are finished"
    written = json.loads((settings.out / demo.RESULTS).read_text())
    assert written["note"] == results.note and len(written["rows"]) == finished
    assert (settings.out / demo.PICTURE).exists()
    assert len(list((settings.out / demo.CHECKPOINTS).iterdir())) == finished


def test_ctrl_c_before_anything_is_finished_writes_no_results(settings: demo.Settings) -> None:
    results = demo.run(settings, Silent((1, 1)))
    assert results.note == "stopped during the training 'full precision': 0 of 7 models are finished"
    assert not (settings.out / demo.RESULTS).exists() and not (settings.out / demo.PICTURE).exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preset": "huge"}, "preset: expected one of tiny, small, base, got 'huge'"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
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
    noise, export = variant.noise(), variant.export()
    assert (export is None) == (variant.bits == 32)
    if noise is not None:
        assert noise.bits == variant.bits == export.BITS
        assert noise.p == {"QAT": 1.0, "Quant-Noise": 0.5}[variant.method]
        assert noise.per == export.per
