"""One .safetensors file that is either whole or not there: tensors, a JSON specification, a digest."""

import contextlib
import hashlib
import json
import os
import secrets
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

FORMAT = "qnkernels"
VERSION = "1"


def write(path: str | os.PathLike, tensors: dict[str, torch.Tensor], specification: dict) -> None:
    """Write the file under a temporary name beside `path`, flush it to disk, and rename it.

    tensors: contiguous, on the CPU, no two sharing memory. Whatever stood at `path` stays until the
    rename. Raises OSError (IsADirectoryError, FileNotFoundError, ...) where the path cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"path: expected a file to write, got the directory {path}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: expected an existing folder, got {path.parent}")
    text = json.dumps(specification)
    metadata = {"format": FORMAT, "version": VERSION, "specification": text, "sha256": digest(text, tensors)}
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb") as file:
            mode = os.fstat(file.fileno()).st_mode
        save_file(tensors, temporary, metadata)
        os.chmod(temporary, mode)  # save_file leaves a file that only its owner can read
        _flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise
    _flush(path.parent)


def read(path: str | os.PathLike) -> tuple[dict, dict[str, torch.Tensor]]:
    """The specification and the tensors (CPU) of a file, after its format and digest were checked.

    Raises ValueError saying what is wrong with the file, and OSError where it cannot be opened.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"path: expected a file, got the directory {path}")
    if not path.exists():
        raise FileNotFoundError(f"path: no such file, {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_metadata(path, metadata)
            # copies, since the tensors of safe_open are the file itself, mapped, whatever becomes of it
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: truncated, or not a safetensors file ({error})") from error
    text = metadata["specification"]
    if digest(text, tensors) != metadata["sha256"]:
        raise ValueError(f"{path}: its contents do not match its sha256; it was damaged or edited")
    try:
        specification = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: specification: expected JSON ({error})") from error
    return specification, tensors


def _check_metadata(path: Path, metadata: dict[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: format: expected {FORMAT!r}, got {metadata.get('format')!r}")
    if metadata.get("version") != VERSION:
        raise ValueError(f"{path}: version: expected {VERSION!r}, got {metadata.get('version')!r}")
    for key in ("specification", "sha256"):
        if key not in metadata:
            raise ValueError(f"{path}: {key}: expected in the metadata, got none")


def digest(specification: str, tensors: dict[str, torch.Tensor]) -> str:
    """sha256 over the specification and, by name, each tensor's name, dtype, shape and bytes."""
    sha = hashlib.sha256(specification.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def _flush(path: Path) -> None:
    """fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
