"""What the demo and the experiments share: a preset, its text, and the training of models on it."""

import json
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..quantize import quantize_
from .files import write_text
from .methods import Variant, stages
from .text import TextError, load, standard_library
from .tokens import Tokenizer
from .training import Trainer, keep_freed_memory, perplexity
from .transformer import LanguageModel, Shape

FINETUNING_SEED = 1 << 40  # finetuning sees other windows of the text than training
TOKENIZER = "tokenizer.json"


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
    "deep": Preset(Shape(vocabulary=768, width=64, layers=8, heads=2, context=64), 16, 1500, 3e-3, 131_072),
    "base": Preset(
        Shape(vocabulary=4096, width=512, layers=8, heads=8, context=256), 32, 5000, 1e-3, 262_144
    ),
}


def check_choice(preset: str, steps: int | None, device: str) -> None:
    """Raises ValueError naming the setting."""
    if preset not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
    if steps is not None and steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: expected cpu or a GPU that is there, got {device!r} ({reason})") from error


class Laboratory:
    """A preset on a device, and its text in tokens. data: files, none for the standard library.

    The tokenizer is written to `out`. Raises TextError for the text, OSError for the folder.
    """

    def __init__(
        self, out: Path, preset: str, steps: int | None, device: str, data: tuple[Path, ...]
    ) -> None:
        keep_freed_memory()
        self.preset = PRESETS[preset]
        self.steps = steps or self.preset.steps
        self.finetuning_steps = max(1, round(self.preset.finetuning * self.steps))
        self.device = torch.device(device)
        self.text = load(data or standard_library())
        self.tokenizer = Tokenizer.learn(self.text.train, self.preset.shape.vocabulary)
        write_text(out / TOKENIZER, json.dumps({"merges": self.tokenizer.merges}))
        self.train_tokens = self._encode("training", self.text.train, self.text.train_files)
        self.validation_tokens = self._encode("validation", self.text.validation, self.text.validation_files)

    def _encode(self, role: str, text: str, files: tuple[str, ...]) -> torch.Tensor:
        tokens = self.tokenizer.encode(text)
        least = self.preset.shape.context + 2
        if len(tokens) < least:
            source = files[0] if len(files) == 1 else f"{len(files)} files from {files[0]} on"
            raise TextError(f"{source}: {len(tokens)} tokens of {role} text, at least {least} are needed")
        return tokens.to(self.device)

    def new_model(self, seed: int, shape: Shape | None = None) -> LanguageModel:
        """With the initial weights of the seed."""
        torch.manual_seed(seed)
        return LanguageModel(shape or self.preset.shape).to(self.device)

    def trainer(
        self, model: LanguageModel, seed: int, each_step: Callable[[], None] = lambda: None
    ) -> Trainer:
        """Of the whole training, with the windows of the seed."""
        options = (self.preset.batch, self.steps, self.preset.rate, seed)
        return Trainer(model, self.train_tokens, *options, each_step=each_step)

    def finetuner(
        self,
        model: LanguageModel,
        seed: int,
        stage: int = 1,
        steps: int | None = None,
        rate: float | None = None,
    ) -> Trainer:
        """Of what follows the training, a stage of product quantization by default, with other windows."""
        steps, rate = steps or self.finetuning_steps, rate or self.preset.finetuning_rate
        options = (self.preset.batch, steps, rate, seed ^ FINETUNING_SEED * stage)
        return Trainer(model, self.train_tokens, *options, weight_decay=0.0)

    def product_quantize(
        self, model: LanguageModel, precision: str, seed: int, report: Callable[[int, float], None]
    ) -> list[dict]:
        """Quantize a trained model stage by stage, in place, and finetune all that is left after each one:
        codebooks, norms, and the weights of later stages. Returns what each stage was.
        """
        done = []
        for stage in stages(model, precision, seed):
            before = self.finetuning_steps * (stage.number - 1)
            trainer = self.finetuner(model, seed, stage.number)
            trainer.run(lambda step, loss, before=before: report(before + step, loss))
            errors = {layer.name: layer.error for layer in stage.layers}
            done.append({"pattern": stage.pattern, "bytes": stage.size, "relative_errors": errors})
        model.eval()
        return done

    def perplexity(self, model: LanguageModel) -> float:
        return perplexity(model, self.validation_tokens, self.preset.validation, self.preset.batch)


def noised_(model: LanguageModel, variant: Variant) -> LanguageModel:
    """The model with the noise that the variant is trained with, in place."""
    for pattern, noise in variant.noise().items():
        quantize_(model, noise, lambda _, name, pattern=pattern: re.search(pattern, name) is not None)
    return model


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
