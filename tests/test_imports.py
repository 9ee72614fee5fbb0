"""The direction of the arrows: apps -> modules -> lab. Without it nobody can use the science without the framework."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "lab": {"lightning", "pytorch_lightning", "gradio", "modules", "apps"},
    "modules": {"pytorch_lightning", "gradio", "apps"},
    "apps": {"pytorch_lightning"},  # beside `lightning` it is a second copy of every class
}
EXEMPT = {("lab/__main__.py", "apps")}  # `python -m lab` starts the command line


def imported(source: str) -> set[str]:
    """Top-level packages that a file imports anywhere, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", FORBIDDEN)
def test_package_imports_nothing_above_it(package):
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for name in sorted(imported(path.read_text()) & FORBIDDEN[package])
        if (str(path.relative_to(ROOT)), name) not in EXEMPT
    ]
    assert not wrong


def test_an_import_inside_a_function_is_seen():
    """An arrow hidden in a function body is an arrow too."""
    assert imported("def f():\n    from apps.cli import main\n    import gradio.themes as t") == {"apps", "gradio"}


def test_command_line_helps_without_loading_torch():
    """`core-seg --help` would take seconds instead of a blink."""
    code = (
        "import sys; sys.argv = ['core-seg', '--help']\n"
        "from apps.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print('LOADED', sorted({'torch', 'lightning', 'gradio', 'transformers'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.stdout.strip().endswith("LOADED []"), run.stdout + run.stderr
