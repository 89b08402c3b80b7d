"""The demo: Quant-Noise against its alternatives on a small language model of real text."""

import copy
import json
import platform
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch

from .. import __version__
from ..backends import serving
from ..checkpoint import load_compressed, save_compressed
from ..quantize import quantize_, remove_noise_
from .files import make_folder, write_text
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
from .text import Text, TextError, load, standard_library
from .tokens import Tokenizer
from .training import Trainer, interleaved_seconds, keep_freed_memory, perplexity, precision, windows
from .transformer import LanguageModel, Shape, generate

TIMING_SECONDS = 8.0  # for the training steps of all methods together, where a step is short
FINETUNING_SEED = 1 << 40  # finetuning sees other windows of the text than training
PROMPT, GENERATED, GENERATING_SECONDS = 16, 32, 1.5  # tokens, tokens, for each compressed model
CHECKPOINTS, PICTURE, RESULTS, TOKENIZER = "checkpoints", "perplexity.png", "results.json", "tokenizer.json"


@dataclass(frozen=True)
class Preset:
    """A model and its training. batch: windows per step; rate: peak learning rate; validation: tokens.

    finetuning: steps after each stage of product quantization, as a part of `steps`; its peak learning rate
    is `finetuning_rate`.
    """

    shape: Shape
    batch: int
    steps: int
    rate: float
    validation: int
    finetuning: float = 0.1
    finetuning_rate: float = 1e-2


PRESETS = {
    "tiny": Preset(Shape(vocabulary=512, width=64, layers=2, heads=2, context=64), 16, 300, 4e-3, 16_384),
    "small": Preset(Shape(vocabulary=768, width=64, layers=2, heads=2, context=64), 16, 3000, 4e-3, 131_072),
    "base": Preset(
        Shape(vocabulary=4096, width=512, layers=8, heads=8, context=256), 32, 5000, 1e-3, 262_144
    ),
}


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
        if self.preset not in PRESETS:
            raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {self.preset!r}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps: expected at least 1, got {self.steps}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: expected an integer in [0, 2^63), got {self.seed}")
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"device: expected cpu or a GPU that is there, got {self.device!r} ({reason})"
            ) from error


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


class _Demo:
    """What all trainings share: settings, device, text and the list of results."""

    def __init__(self, settings: Settings, listener: Listener) -> None:
        keep_freed_memory()
        self.settings, self.listener = settings, listener
        self.preset, self.plan = PRESETS[settings.preset], chosen(settings.methods)
        self.steps = settings.steps or self.preset.steps
        self.finetuning_steps = max(1, round(self.preset.finetuning * self.steps))
        self.device = torch.device(settings.device)
        self.stage, self.started = "before the first training", 0
        listener.said("reading and tokenizing the text")
        text = load(settings.data or standard_library())
        self.tokenizer = Tokenizer.learn(text.train, self.preset.shape.vocabulary)
        write_text(settings.out / TOKENIZER, json.dumps({"merges": self.tokenizer.merges}))
        self.train_tokens = self._encode("training", text.train, text.train_files)
        self.validation_tokens = self._encode("validation", text.validation, text.validation_files)
        self.results = Results(self._settings(), self._environment(), self._text(text))

    def _encode(self, role: str, text: str, files: tuple[str, ...]) -> torch.Tensor:
        tokens = self.tokenizer.encode(text)
        least = self.preset.shape.context + 2
        if len(tokens) < least:
            source = files[0] if len(files) == 1 else f"{len(files)} files from {files[0]} on"
            raise TextError(f"{source}: {len(tokens)} tokens of {role} text, at least {least} are needed")
        return tokens.to(self.device)

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
            jobs[variant.precision] = self._finetuner(model, last.number).train_step
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
            perplexity=self._perplexity(loaded),
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
        loop = stages(model, variant.precision, self.settings.seed)
        steps, report = self.finetuning_steps, self.listener.stepped
        self._start("finetuning", variant.label, steps * len(loop))
        done = []
        for stage in loop:
            before = steps * (stage.number - 1)
            trainer = self._finetuner(model, stage.number)
            trainer.run(lambda step, loss, before=before: report(before + step, loss))
            errors = {layer.name: layer.error for layer in stage.layers}
            done.append({"pattern": stage.pattern, "bytes": stage.size, "relative_errors": errors})
        model.eval()
        second = seconds[variant.precision]
        return Finetuning(done, steps, second, second / seconds[FULL.label], self._perplexity(untuned))

    def _products(self) -> list[Variant]:
        return [v for _, variants in self.plan for v in variants if v.precision in PRODUCTS]

    def _start(self, kind: str, label: str, steps: int) -> None:
        """Tell that a training or finetuning begins."""
        self.started += 1
        self.stage = f"during the {kind} {label!r}"
        name = label if kind == "training" else f"tuning {label}"
        self.listener.started(name, self.started, len(self.plan) + len(self._products()), steps)

    def _perplexity(self, model: LanguageModel) -> float:
        return perplexity(model, self.validation_tokens, self.preset.validation, self.preset.batch)

    def _trainer(self, variant: Variant) -> Trainer:
        """A new model with the initial weights of the seed, in a trainer with the windows of the seed."""
        torch.manual_seed(self.settings.seed)
        model = LanguageModel(self.preset.shape).to(self.device)
        for pattern, noise in variant.noise().items():
            quantize_(model, noise, lambda _, name, pattern=pattern: re.search(pattern, name) is not None)
        preset, seed = self.preset, self.settings.seed
        return Trainer(model, self.train_tokens, preset.batch, self.steps, preset.rate, seed)

    def _finetuner(self, model: LanguageModel, stage: int) -> Trainer:
        """A trainer of a model that is partly quantized, with the windows of the seed and stage."""
        preset, seed = self.preset, self.settings.seed ^ FINETUNING_SEED * stage
        options = (preset.batch, self.finetuning_steps, preset.finetuning_rate, seed)
        return Trainer(model, self.train_tokens, *options, weight_decay=0.0)

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

    def _text(self, text: Text) -> dict:
        return {
            "source": "--data" if self.settings.data else "source of the Python standard library",
            "sha256": text.digest,
            "train_files": len(text.train_files),
            "train_tokens": len(self.train_tokens),
            "validation_files": list(text.validation_files),
            "validation_tokens": len(self.validation_tokens),
            "bytes_per_token": len(text.validation.encode()) / len(self.validation_tokens),
        }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
