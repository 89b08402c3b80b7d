"""The command line: qnkernels demo, sensitivity, compress, bench, doctor."""

import typer

from .bench import bench
from .compress import compress
from .demo import demo
from .doctor import doctor
from .sensitivity import sensitivity

app = typer.Typer(
    name="qnkernels",
    help="Train with quantization noise, compress, and serve the compressed layers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (demo, sensitivity, compress, bench, doctor):
    app.command()(command)


def main() -> None:
    app()
