"""How an experiment runs: job by job, seed by seed, each finished one kept in a file and not done again."""

import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from ... import __version__
from ...checkpoint import load_compressed, save_compressed
from ..files import make_folder, write_text
from ..laboratory import Laboratory, check_choice, device_name
from ..methods import FULL
from ..transformer import LanguageModel
from .summary import Summary

CHECKPOINTS = "checkpoints"
# row of the table -> metric -> value
Rows = dict[str, dict[str, float]]


class Watcher(Protocol):
    """Who is told of each job, step and row as it comes."""

    def said(self, message: str) -> None: ...

    def started(self, label: str, number: int, total: int, steps: int) -> None: ...

    def stepped(self, step: int, loss: float) -> None: ...


@dataclass(frozen=True)
class Settings:
    """What a user chooses. preset, steps: None for the experiment's own; data: none for the standard library.

    Raises ValueError naming the field.
    """

    out: Path
    seeds: tuple[int, ...] = (0, 1, 2)
    preset: str | None = None
    steps: int | None = None
    device: str = "cpu"
    data: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        if self.preset is not None:
            check_choice(self.preset, self.steps, self.device)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds: expected different integers of at least 0, got {list(self.seeds)}")


@dataclass(frozen=True)
class Experiment:
    """What is compared. metrics: label of each column by name; the first is the one that is drawn.

    jobs: by name, what one seed of it takes and finds, as rows of the table. A job trains, if it does, within
    the bench that it is given. notes: what a reader of the table must know. picture: draws the summary.
    """

    name: str
    title: str
    metrics: dict[str, str]
    jobs: dict[str, Callable[["Bench", int], Rows]]
    notes: str
    picture: Callable[[Summary, Path], None]
    preset: str = "small"


class Bench(Laboratory):
    """The laboratory with the folder of an experiment: what jobs train with, reporting to a watcher."""

    def __init__(self, settings: Settings, preset: str, watcher: Watcher) -> None:
        super().__init__(settings.out, preset, settings.steps, settings.device, settings.data)
        self.settings, self.watcher = settings, watcher
        self.preset_name = preset
        self.label, self.number, self.total = "", 0, 0

    def starts(self, label: str, steps: int) -> Callable[[int, float], None]:
        """Tell that something of so many steps begins; what its steps are to be reported to."""
        self.watcher.started(
            f"{self.label}: {label}" if label else self.label, self.number, self.total, steps
        )
        return self.watcher.stepped

    def full_precision(self, seed: int) -> LanguageModel:
        """The model trained plainly from the seed, in eval mode; trained once and kept in a file."""
        name = f"{self.preset_name}-{self.steps}-{self.text.digest}-seed{seed}.safetensors"
        path = self.settings.out / CHECKPOINTS / name
        model = self.new_model(seed)
        if path.exists():
            return load_compressed(model, path).eval()
        trainer = self.trainer(model, seed)
        trainer.run(self.starts(FULL.label, trainer.steps))
        save_compressed(model.eval(), path)
        return model


@dataclass
class Study:
    """The finished jobs of an experiment: rows and seconds by job and seed, in the order of the table."""

    experiment: Experiment
    settings: dict
    environment: dict
    done: dict[str, dict[str, Rows]] = field(default_factory=dict)
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    note: str = ""

    @property
    def summary(self) -> Summary:
        by_seed: dict[str, Rows] = {}
        for job in self.experiment.jobs:
            for seed, rows in self.done.get(job, {}).items():
                by_seed.setdefault(seed, {}).update(rows)
        title = f"{self.experiment.title}: {self.settings['description']}"
        return Summary.of(title, self.experiment.metrics, by_seed, self.experiment.notes)

    def to_json(self) -> dict:
        parts = {"experiment": self.experiment.name, "settings": self.settings}
        runs = {"runs": self.done, "seconds": self.seconds}
        return {**parts, "environment": self.environment, **runs, "note": self.note}

    def load(self, path: Path) -> None:
        """Go on from a file of an earlier run; raises ValueError where it is of other settings."""
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            same = saved["experiment"] == self.experiment.name and saved["settings"] == self.settings
            runs, seconds = dict(saved["runs"]), dict(saved.get("seconds", {}))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: expected an experiment's results ({error!r})") from error
        if not same:
            raise ValueError(f"{path}: expected results of these settings; choose another --out for others")
        self.done, self.seconds = runs, seconds


def run(experiment: Experiment, settings: Settings, watcher: Watcher) -> Study:
    """All jobs for all seeds, seed by seed; those that the folder already holds are not done again.

    After each job <name>.json, .csv, .md and .png are written anew. A KeyboardInterrupt ends it early.
    Raises TextError, OSError, ValueError for a folder of other settings, FloatingPointError.
    """
    make_folder(settings.out / CHECKPOINTS)
    preset = settings.preset or experiment.preset
    check_choice(preset, settings.steps, settings.device)
    watcher.said("reading and tokenizing the text")
    bench = Bench(settings, preset, watcher)
    study = Study(experiment, _settings(bench), _environment(bench))
    path = settings.out / f"{experiment.name}.json"
    if path.exists():
        study.load(path)
    plan = [(seed, job) for seed in settings.seeds for job in experiment.jobs]
    bench.total = len(plan)
    try:
        for bench.number, (seed, job) in enumerate(plan, 1):
            if str(seed) in study.done.get(job, {}):
                continue
            bench.label = f"{job}, seed {seed}"
            start = time.perf_counter()
            rows = experiment.jobs[job](bench, seed)
            study.done.setdefault(job, {})[str(seed)] = rows
            study.seconds.setdefault(job, {})[str(seed)] = round(time.perf_counter() - start, 1)
            write(study, settings.out)
            first = next(iter(experiment.metrics))
            watcher.said("    " + ", ".join(f"{row} {values[first]:.3f}" for row, values in rows.items()))
    except KeyboardInterrupt:
        study.note = f"stopped in {bench.label}; run the same command again to go on"
    if study.done:
        write(study, settings.out)
    return study


def write(study: Study, folder: Path) -> None:
    """<name>.json, from which a run goes on, and the summary as .csv, .md and .png."""
    stem = study.experiment.name
    write_text(folder / f"{stem}.json", json.dumps(study.to_json(), indent=1) + "\n")
    summary = study.summary
    write_text(folder / f"{stem}.csv", summary.csv())
    write_text(folder / f"{stem}.md", summary.markdown())
    study.experiment.picture(summary, folder / f"{stem}.png")


def _settings(bench: Bench) -> dict:
    """What results depend on, but for the seed."""
    shape = bench.preset.shape
    return {
        "preset": bench.preset_name,
        "steps": bench.steps,
        "text": bench.text.digest,
        "device": bench.device.type,
        "description": f"{shape.layers} layers of width {shape.width}, {bench.steps} steps",
    }


def _environment(bench: Bench) -> dict:
    return {
        "qnkernels": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device_name(bench.device),
        "threads": torch.get_num_threads(),
    }
