"""The evaluations that are finished, in a JSON file that is replaced after each one."""

import hashlib
import json
import math
import os
from pathlib import Path

import torch
from torch import nn

from ..files import write_text

FORMAT = "qnkernels evaluations"

Key = tuple[str | None, frozenset[str]]  # a choice (None: full precision), and the groups stored as that


class Journal:
    """Quality by choice and groups; kept in a file where `path` is given.

    settings: JSON values that all evaluations depend on. Raises ValueError for a file of other settings, or
    no such file at all, and OSError where it cannot be written, before anything is evaluated.
    """

    def __init__(self, path: str | os.PathLike | None, settings: dict) -> None:
        self.path, self.settings = None if path is None else Path(path), settings
        self.known: dict[Key, float] = {}
        if self.path is not None:
            if self.path.exists():
                self.known = _read(self.path, settings)
            self._write()

    def record(self, key: Key, quality: float) -> None:
        """Quality that is not finite counts as NaN."""
        self.known[key] = quality if math.isfinite(quality) else math.nan
        if self.path is not None:
            self._write()

    def _write(self) -> None:
        evaluations = [
            {"choice": choice, "groups": sorted(groups), "quality": number_or_none(quality)}
            for (choice, groups), quality in self.known.items()
        ]
        content = {"format": FORMAT, "settings": self.settings, "evaluations": evaluations}
        write_text(self.path, json.dumps(content, indent=1) + "\n")


def _read(path: Path, settings: dict) -> dict[Key, float]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known, evaluations = content["settings"], content["evaluations"]
        if content["format"] != FORMAT or not isinstance(known, dict):
            raise ValueError(f"format {content['format']!r}")
        qualities = {
            (each["choice"], frozenset(each["groups"])): none_or_number(each["quality"])
            for each in evaluations
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"resume: expected a file of evaluations, {path} is none ({error!r})") from error
    if (difference := _difference((), settings, known)) is not None:
        raise ValueError(f"resume: {path} holds evaluations of other settings; {difference}")
    return qualities


def _difference(place: tuple[str, ...], expected: object, received: object) -> str | None:
    """The first one, found as deep as it lies."""
    if expected == received:
        return None
    if isinstance(expected, dict) and isinstance(received, dict):
        both = {key: (expected.get(key), received.get(key)) for key in (*expected, *received)}
        found = (_difference((*place, key), *values) for key, values in both.items())
        return next((each for each in found if each is not None), None)
    return f"{', '.join(place)}: expected {json.dumps(expected)}, got {json.dumps(received)}"


def number_or_none(quality: float) -> float | None:
    """As JSON, which has no NaN."""
    return quality if math.isfinite(quality) else None


def none_or_number(value: float | None) -> float:
    """Raises TypeError for what `number_or_none` did not give."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise TypeError(f"expected a number or null, got {value!r}")
    return math.nan if value is None else float(value)


def fingerprint(model: nn.Module) -> str:
    """Tells models apart: SHA-256 of all saved tensors, first 16 digits."""
    sha = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()[:16]
