"""The demo's folder, and files that appear whole or not at all."""

from pathlib import Path

from ..files import replacing, write_text

__all__ = ["make_folder", "replacing", "write_text"]


def make_folder(path: Path) -> None:
    """Create the folder if needed and make sure that files can be written to it; raises OSError."""
    path.mkdir(parents=True, exist_ok=True)
    with replacing(path / "probe") as probe:
        probe.touch()
    (path / "probe").unlink()
