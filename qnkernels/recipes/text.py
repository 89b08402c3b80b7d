"""Real text for the demo, split into training and validation by file."""

import hashlib
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Not what a person wrote (tables of character codes), or not part of the library proper.
LEFT_OUT = {"__pycache__", "dist-packages", "encodings", "idle_test", "site-packages", "test", "tests"}
VALIDATION_EVERY = 20  # one file in 20 is for validation
VALIDATION_SHARE = 0.1  # of a single file: its last tenth


class TextError(ValueError):
    """The text cannot be used; the message names the file and the reason."""


@dataclass(frozen=True)
class Text:
    """Training and validation text, with the files each came from."""

    train: str
    validation: str
    train_files: tuple[str, ...]
    validation_files: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Tells two texts apart in results: SHA-256 of training and validation text, first 16 digits."""
        return hashlib.sha256(f"{self.train}\0{self.validation}".encode()).hexdigest()[:16]


def standard_library() -> list[Path]:
    """Source files of the running Python's standard library, sorted, without tests and character tables."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for path in root.rglob("*.py") if not LEFT_OUT.intersection(path.relative_to(root).parts)]
    if not files:
        raise TextError(f"{root}: no Python source of the standard library here; pass --data FILE")
    return sorted(files)


def read(path: Path) -> str:
    """The text of a UTF-8 file."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TextError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TextError(
            f"{path}: not UTF-8 text (byte {error.start} is {content[error.start]:#04x})"
        ) from error


def load(files: Sequence[Path]) -> Text:
    """Read and split `files`; raises TextError.

    Of several files, every 20th, or the last of fewer, is for validation: no file is on both sides. Of
    one file, the last tenth is.
    """
    files = list(dict.fromkeys(Path(file) for file in files))
    contents = [read(file) for file in files]
    names = [str(file) for file in files]
    if len(files) == 1:
        cut = int(len(contents[0]) * (1 - VALIDATION_SHARE))
        return Text(contents[0][:cut], contents[0][cut:], (names[0],), (names[0],))
    step = min(VALIDATION_EVERY, len(files))
    train = [i for i in range(len(files)) if i % step != step - 1]
    validation = [i for i in range(len(files)) if i % step == step - 1]
    return Text(
        "\n".join(contents[i] for i in train),
        "\n".join(contents[i] for i in validation),
        tuple(names[i] for i in train),
        tuple(names[i] for i in validation),
    )
