"""Where commands print: results to stdout, everything else to stderr."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

out = Console()
err = Console(stderr=True)


def print_json(value: object) -> None:
    """Plain JSON on stdout, whatever the terminal."""
    print(json.dumps(value, indent=2))


@contextmanager
def clear_errors(*expected: type[Exception]) -> Iterator[None]:
    """Turn the expected errors (of the user's input or machine) into one line and exit code 1."""
    try:
        yield
    except expected as error:
        err.print(f"[bold red]error:[/] {_plain(error)}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error


def _plain(error: Exception) -> str:
    text = (
        f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
    )
    return text.replace("[", r"\[")


def megabytes(size: int) -> str:
    return f"{size / 1e6:.2f}"
