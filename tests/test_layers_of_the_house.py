"""The layering: the import contract of pyproject.toml holds, and torch.library is touched by ops alone."""

import ast
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_no_import_goes_upward():
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code, "--no-cache"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 kept, 0 broken" in result.stdout


def test_only_ops_touch_torch_library():
    offenders = []
    for path in sorted((ROOT / "qnkernels").rglob("*.py")):
        if path.parent == ROOT / "qnkernels" / "ops":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = {
                ast.Attribute: lambda node: [f"{getattr(node.value, 'id', '')}.{node.attr}"],
                ast.ImportFrom: lambda node: [f"{node.module}.{alias.name}" for alias in node.names],
                ast.Import: lambda node: [alias.name for alias in node.names],
            }.get(type(node), lambda node: [])(node)
            if any(name.startswith("torch.library") for name in names):
                offenders.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not offenders
