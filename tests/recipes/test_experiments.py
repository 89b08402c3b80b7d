"""Experiments: every job runs, what is finished is kept and not done again, and the summary says what was."""

import csv
import json
import math

import pytest
import torch

from qnkernels.recipes import demo, laboratory
from qnkernels.recipes.experiments import EXPERIMENTS, Settings, run
from qnkernels.recipes.experiments.summary import Summary
from qnkernels.recipes.transformer import LanguageModel, Shape

SHAPE = Shape(vocabulary=300, width=16, layers=2, heads=2, context=48)


class Silent:
    """A watcher that counts, and stops when it has seen enough."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at, self.labels = stop_at, []

    def said(self, message: str) -> None: ...

    def started(self, label: str, number: int, total: int, steps: int) -> None:
        self.labels.append(label)
        if len(self.labels) == self.stop_at:
            raise KeyboardInterrupt

    def stepped(self, step: int, loss: float) -> None: ...


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    preset = laboratory.Preset(SHAPE, batch=2, steps=4, rate=1e-2, validation=200)
    monkeypatch.setitem(laboratory.PRESETS, "tiny", preset)
    monkeypatch.setattr(demo, "TIMING_SECONDS", 0.0)
    monkeypatch.setattr(demo, "GENERATING_SECONDS", 0.0)


@pytest.fixture
def settings(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"def f{i}(x, y):\n    return x * {i} + y[{i % 7}]\n" for i in range(800)))

    def make(seeds=(0, 1), out="out") -> Settings:
        return Settings(tmp_path / out, seeds, "tiny", None, "cpu", (text,))

    return make


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_runs(name, settings):
    chosen = settings(seeds=(3,))
    experiment = EXPERIMENTS[name]
    study = run(experiment, chosen, Silent())
    summary = study.summary
    assert set(study.done) == set(experiment.jobs) and not study.note
    assert all(set(study.seconds[job]) == {"3"} for job in experiment.jobs)
    first = next(iter(experiment.metrics))
    for values in summary.rows.values():
        assert math.isfinite(values[first].mean) and values[first].mean > 1
    files = {path.suffix for path in chosen.out.glob(f"{name}.*")}
    assert files == {".json", ".csv", ".md", ".png"}
    assert (chosen.out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    with (chosen.out / f"{name}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["row"] for row in rows} == set(summary.rows)
    assert (chosen.out / f"{name}.md").read_text().count("\n| ") == len(summary.rows) + 1


def test_the_same_seed_gives_the_same_numbers(settings):
    first, second = (
        run(EXPERIMENTS["cpt"], settings(seeds=(5,), out=out), Silent()).done for out in ("one", "two")
    )
    assert first == second


def test_it_goes_on_where_it_stopped(settings):
    experiment = EXPERIMENTS["noise"]
    stopped = run(experiment, settings(), Silent(stop_at=4))
    finished = [job for job, seeds in stopped.done.items() if seeds]
    assert 0 < len(finished) < len(experiment.jobs)
    assert "run the same command again" in stopped.note
    watch = Silent()
    study = run(experiment, settings(), watch)
    assert not study.note
    assert not any(label.startswith(f"{finished[0]}, seed 0") for label in watch.labels)
    whole = run(experiment, settings(out="other"), Silent())
    assert study.done == whole.done
    watch = Silent()
    again = run(experiment, settings(), watch)
    assert watch.labels == [] and again.seconds == study.seconds


def test_more_seeds_may_follow_but_other_settings_may_not(settings):
    experiment = EXPERIMENTS["layerdrop"]
    run(experiment, settings(seeds=(0,)), Silent())
    study = run(experiment, settings(seeds=(0, 1)), Silent())
    assert all(set(seeds) == {"0", "1"} for seeds in study.done.values())
    path = settings().out / "layerdrop.json"
    saved = json.loads(path.read_text())
    saved["settings"]["steps"] = 99
    path.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="expected results of these settings"):
        run(experiment, settings(), Silent())
    path.write_text("{}")
    with pytest.raises(ValueError, match="expected an experiment's results"):
        run(experiment, settings(), Silent())


def test_summary_is_mean_and_sample_deviation():
    by_seed = {"0": {"a": {"x": 1.0}, "b": {"x": 200.0}}, "1": {"a": {"x": 4.0, "y": 2.0}}}
    summary = Summary.of("title", {"x": "the x", "y": "the y"}, by_seed, "notes")
    assert str(summary.rows["a"]["x"]) == "2.50 ± 2.12"
    assert str(summary.rows["a"]["y"]) == "2.00"
    assert str(summary.rows["b"]["x"]) == "200.0"
    assert "| a | 2.50 ± 2.12 | 2.00 |" in summary.markdown()
    assert "b,x,200.0,0.0,1" in summary.csv()


def test_layer_drop_leaves_blocks_out_in_training_only():
    torch.manual_seed(0)
    model = LanguageModel(SHAPE)
    tokens = torch.randint(0, 300, (1, 8))
    calls = []
    for block in model.blocks:
        block.register_forward_hook(lambda *_: calls.append(1))
    model.layer_drop = 1.0 - 1e-9
    model.train()(tokens)
    assert not calls
    model.eval()(tokens)
    assert len(calls) == 2
    calls.clear()
    model.layer_drop = 0.5
    model.train()
    for _ in range(100):
        model(tokens)
    assert 70 < len(calls) < 130


def test_bad_settings_are_named(tmp_path):
    for options, message in (
        (dict(seeds=()), "seeds: expected different integers"),
        (dict(seeds=(1, 1)), "seeds: expected different integers"),
        (dict(preset="huge"), "preset: expected one of"),
        (dict(preset="tiny", device="cuda:99"), "device: expected cpu or a GPU"),
    ):
        with pytest.raises(ValueError, match=message):
            Settings(tmp_path, **options)
