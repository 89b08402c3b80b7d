"""The demo: Quant-Noise against its alternatives on a small language model of real text."""

import copy
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch

from .. import __version__
from ..backends import serving
from ..checkpoint import load_compressed, save_compressed
from ..quantize import quantize_, remove_noise_
from .files import make_folder
from .laboratory import Laboratory, check_choice, device_name, noised_
from .methods import (
    BLOCK_SIZE,
    CALIBRATION_WINDOWS,
    CENTROIDS,
    FULL,
    INT8_STATIC,
    NAMES,
    OBSERVER,
    PRODUCTS,
    STAGES,
    Variant,
    calibrate_on,
    chosen,
    stages,
)
from .plot import draw
from .results import Finetuning, Results, Row
from .training import Trainer, interleaved_seconds, precision, windows
from .transformer import LanguageModel, generate

TIMING_SECONDS = 8.0  # for the training steps of all methods together, where a step is short
PROMPT, GENERATED, GENERATING_SECONDS = 16, 32, 1.5  # tokens, tokens, for each compressed model
CHECKPOINTS, PICTURE, RESULTS = "checkpoints", "perplexity.png", "results.json"


@dataclass(frozen=True)
class Settings:
    """What a user chooses. data: empty for the standard library; steps: None for those of the preset;
    methods: of NAMES.

    Raises ValueError naming the field.
    """

    out: Path
    preset: str = "small"
    steps: int | None = None
    seed: int = 0
    device: str = "cpu"
    data: tuple[Path, ...] = ()
    methods: tuple[str, ...] = NAMES

    def __post_init__(self) -> None:
        chosen(self.methods)
        check_choice(self.preset, self.steps, self.device)
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: expected an integer in [0, 2^63), got {self.seed}")


class Listener(Protocol):
    """Who watches the demo: told of each stage, step and row as it comes."""

    def said(self, message: str) -> None: ...

    def started(self, label: str, number: int, trainings: int, steps: int) -> None: ...

    def stepped(self, step: int, loss: float) -> None: ...

    def found(self, row: Row) -> None: ...


def run(settings: Settings, listener: Listener) -> Results:
    """Train, compress, reload and compare all variants; files go to `settings.out`.

    After each training results.json is written anew. A KeyboardInterrupt ends the demo early: what is
    finished is in the results, and their note says what is not.
    Raises TextError for the text, OSError for the folder, FloatingPointError if a training diverges.
    """
    make_folder(settings.out / CHECKPOINTS)
    demo = _Demo(settings, listener)
    results = demo.results
    try:
        listener.said("timing training steps")
        seconds = demo.seconds_per_step()
        for trained, variants in demo.plan:
            model = demo.train(trained)
            for variant in variants:
                row = demo.compress(model, variant, seconds[trained.label], seconds)
                results.rows.append(row)
                listener.found(row)
            results.write(settings.out / RESULTS)
    except KeyboardInterrupt:
        total = sum(len(variants) for _, variants in demo.plan)
        results.note = f"stopped {demo.stage}: {len(results.rows)} of {total} models are finished"
    if results.rows:
        results.rows = results.sorted_rows()
        results.write(settings.out / RESULTS)
        draw(results.rows, settings.out / PICTURE, results.title)
    return results


class _Demo(Laboratory):
    """The trainings of one seed, one after the other, and the list of results."""

    def __init__(self, settings: Settings, listener: Listener) -> None:
        listener.said("reading and tokenizing the text")
        super().__init__(settings.out, settings.preset, settings.steps, settings.device, settings.data)
        self.settings, self.listener = settings, listener
        self.plan = chosen(settings.methods)
        self.stage, self.started = "before the first training", 0
        self.results = Results(self._settings(), self._environment(), self._text())

    def seconds_per_step(self) -> dict[str, float]:
        """Median seconds of a step of each training, by label, and of each finetuning, by precision, all in
        turns.
        """
        jobs: dict[str, Callable[[], object]] = {}
        for trained, _ in self.plan:
            jobs[trained.label] = self._trainer(trained).train_step
        for variant in {variant.precision: variant for variant in self._products()}.values():
            model = LanguageModel(self.preset.shape).to(self.device)
            *_, last = stages(model, variant.precision, self.settings.seed)
            jobs[variant.precision] = self.finetuner(model, self.settings.seed, last.number).train_step
        return interleaved_seconds(jobs, TIMING_SECONDS, self.device)

    def train(self, variant: Variant) -> LanguageModel:
        """A trained model, plain again: without noise, in eval mode."""
        self._start("training", variant.label, self.steps)
        trainer = self._trainer(variant)
        trainer.run(self.listener.stepped)
        return remove_noise_(trainer.model).eval()

    def compress(self, model: LanguageModel, variant: Variant, step: float, steps: dict[str, float]) -> Row:
        """Export, save, reload into a fresh model, check that it is the same, and measure that one.

        step: seconds of a training step; steps: those of `seconds_per_step`.
        """
        exported, finetuning = copy.deepcopy(model), None
        if variant.precision in PRODUCTS:
            finetuning = self._product_quantize(exported, variant, steps)
        elif (config := variant.export()) is not None:
            if variant.precision == INT8_STATIC:
                calibrate_on(exported, self.train_tokens, self.preset.batch)
            quantize_(exported, config)
        path = self.settings.out / CHECKPOINTS / variant.file_name
        save_compressed(exported, path)
        loaded = load_compressed(LanguageModel(self.preset.shape).to(self.device), path).eval()
        self._check_same(exported, loaded, path)
        prompt = windows(
            self.validation_tokens, torch.zeros(1, dtype=torch.int64, device=self.device), PROMPT
        )
        seconds = interleaved_seconds(
            {
                "full": lambda: generate(model, prompt, GENERATED),
                "this": lambda: generate(loaded, prompt, GENERATED),
            },
            GENERATING_SECONDS,
            self.device,
        )
        return Row(
            method=variant.method,
            precision=variant.precision,
            p=variant.p,
            perplexity=self.perplexity(loaded),
            bytes=path.stat().st_size,
            training_seconds=step,
            training_ratio=step / steps[FULL.label],
            tokens_per_second=GENERATED / seconds["this"],
            generation_ratio=seconds["full"] / seconds["this"],
            file=str(path.relative_to(self.settings.out)),
            finetuning=finetuning,
        )

    def _product_quantize(
        self, model: LanguageModel, variant: Variant, seconds: dict[str, float]
    ) -> Finetuning:
        """Quantize a trained model stage by stage, in place, and finetune all that is left after each one:
        codebooks, norms, and the weights of later stages.
        """
        untuned = copy.deepcopy(model)
        for _ in stages(untuned, variant.precision, self.settings.seed):
            pass
        steps = self.finetuning_steps
        self._start("finetuning", variant.label, steps * len(STAGES))
        done = self.product_quantize(model, variant.precision, self.settings.seed, self.listener.stepped)
        second = seconds[variant.precision]
        return Finetuning(done, steps, second, second / seconds[FULL.label], self.perplexity(untuned))

    def _products(self) -> list[Variant]:
        return [v for _, variants in self.plan for v in variants if v.precision in PRODUCTS]

    def _start(self, kind: str, label: str, steps: int) -> None:
        """Tell that a training or finetuning begins."""
        self.started += 1
        self.stage = f"during the {kind} {label!r}"
        name = label if kind == "training" else f"tuning {label}"
        self.listener.started(name, self.started, len(self.plan) + len(self._products()), steps)

    def _trainer(self, variant: Variant) -> Trainer:
        """A new model with the initial weights of the seed, in a trainer with the windows of the seed."""
        seed = self.settings.seed
        return self.trainer(noised_(self.new_model(seed), variant), seed)

    @torch.no_grad()
    def _check_same(self, exported: LanguageModel, loaded: LanguageModel, path: Path) -> None:
        starts = torch.zeros(1, dtype=torch.int64, device=self.device)
        tokens = windows(self.validation_tokens, starts, self.preset.shape.context)
        if not torch.equal(exported(tokens), loaded(tokens)):
            raise RuntimeError(f"{path}: the reloaded model gives other logits than the one saved")

    def _settings(self) -> dict:
        preset = asdict(self.preset) | {"steps": self.steps, "finetuning_steps": self.finetuning_steps}
        product = {"stages": STAGES, "block_size": BLOCK_SIZE, "centroids": CENTROIDS}
        calibration = {"observer": OBSERVER, "windows": CALIBRATION_WINDOWS}
        choice = {name: getattr(self.settings, name) for name in ("preset", "seed", "methods")}
        return {**choice, **preset, "product_quantization": product, "calibration": calibration}

    def _environment(self) -> dict:
        return {
            "qnkernels": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": device_name(self.device),
            "threads": torch.get_num_threads(),
            "precision": precision(self.device),
            "noise_backend": serving("fake_quantize", self.device.type),
        }

    def _text(self) -> dict:
        text = self.text
        return {
            "source": "--data" if self.settings.data else "source of the Python standard library",
            "sha256": text.digest,
            "train_files": len(text.train_files),
            "train_tokens": len(self.train_tokens),
            "validation_files": list(text.validation_files),
            "validation_tokens": len(self.validation_tokens),
            "bytes_per_token": len(text.validation.encode()) / len(self.validation_tokens),
        }
