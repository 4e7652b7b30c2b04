"""What two well-kept tools say of the code: ruff (mistakes and style) and mypy (types). Their rules stand in pyproject.toml."""
import importlib.util
import subprocess
import sys

import pytest
from _repository import ROOT


def run(tool, *arguments):
    if importlib.util.find_spec(tool) is None:
        pytest.skip(f"{tool} is not installed: pip install {tool}")
    done = subprocess.run([sys.executable, "-m", tool, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout + done.stderr


def test_ruff_finds_nothing():
    failed, said = run("ruff", "check", "--output-format", "concise", "fer_nbdev", "tests", "bench", ".ci", "space", "setup.py")
    assert not failed, said


def test_mypy_finds_nothing():
    failed, said = run("mypy", "-p", "fer_nbdev")
    assert not failed, said


@pytest.mark.parametrize("tool, code, name", [("ruff", "import os\n", "F401"), ("mypy", "def f(n: int) -> str:\n    return n\n", "return-value")])
def test_the_tools_do_find_something(tmp_path, tool, code, name):
    (tmp_path / "wrong.py").write_text(code)
    check = ["check", "--no-cache", "--config", str(ROOT / "pyproject.toml")] if tool == "ruff" else ["--config-file", str(ROOT / "pyproject.toml")]
    failed, said = run(tool, *check, str(tmp_path / "wrong.py"))
    assert failed and name in said
