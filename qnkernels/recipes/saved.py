"""What the demo left in its folder: the models that it compared can be evaluated again."""

import json
from dataclasses import dataclass
from pathlib import Path

from .demo import RESULTS
from .laboratory import TOKENIZER
from .tokens import Tokenizer
from .transformer import Shape


@dataclass(frozen=True)
class Run:
    """A folder of `qnkernels demo`. batch: windows; validation: tokens; digest: that of the text."""

    shape: Shape
    batch: int
    validation: int
    digest: str
    tokenizer: Tokenizer

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """Raises ValueError for files that the demo did not write, OSError where there are none."""
        results, tokenizer = (_read(folder / name) for name in (RESULTS, TOKENIZER))
        try:
            settings = results["settings"]
            shape = Shape(**settings["shape"])
            numbers = settings["batch"], settings["validation"]
            digest = results["text"]["sha256"]
            merges = [(left, right) for left, right in tokenizer["merges"]]
            if not all(type(n) is int and n > 0 for n in (*vars(shape).values(), *numbers)):
                raise ValueError("sizes")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{folder}: expected {RESULTS} and {TOKENIZER} as qnkernels demo writes them ({error!r})"
            ) from error
        return cls(shape, *numbers, digest, Tokenizer(merges))


def _read(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected the folder of qnkernels demo")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON ({error})") from error
