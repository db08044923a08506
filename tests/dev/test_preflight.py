"""What set-up says, in one message each, where a machine lacks what it cannot install: preflight.py and setup.py."""

import ast
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import preflight
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def good_machine(monkeypatch, tmp_path):
    """A machine with everything, whatever the one that runs the tests has."""
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(preflight, "include_paths", lambda: {str(tmp_path)})
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setitem(sys.modules, "ensurepip", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "venv", SimpleNamespace())
    monkeypatch.delenv("CXX", raising=False)
    return preflight


def test_nothing_is_said_of_a_good_machine(good_machine, monkeypatch):
    assert good_machine.main() is None
    monkeypatch.setenv("CXX", "")
    assert good_machine.main() is None, "an empty CXX is none"


def test_old_python(good_machine, monkeypatch):
    monkeypatch.setattr(
        good_machine, "sys", SimpleNamespace(version_info=(3, 8, 18, "final", 0), executable="/usr/bin/python3")
    )
    assert good_machine.main() == (
        "gs_d2 needs Python 3.10 or newer, and /usr/bin/python3 is 3.8. Name another: make PYTHON=python3.11 ..."
    )


def test_the_message_for_old_python_is_written_in_old_python():
    """No syntax newer than Python 2.7's: else such a Python dies of a SyntaxError and says nothing."""
    tree = ast.parse((ROOT / "dev" / "preflight.py").read_text())
    newer = (ast.JoinedStr, ast.AnnAssign, ast.NamedExpr, ast.Nonlocal, ast.AsyncFunctionDef, ast.Starred)
    assert [type(node).__name__ for node in ast.walk(tree) if isinstance(node, newer)] == []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.returns is None and not node.args.kwonlyargs
            assert all(argument.annotation is None for argument in node.args.args)
        if isinstance(node, ast.Raise):
            assert node.cause is None
    assert (ROOT / "dev" / "preflight.py").read_bytes().isascii()


@pytest.mark.parametrize("name", ["python2.7", "python3.6", "python3.8", "python3.9"])
def test_an_old_python_of_this_machine(name):
    python = shutil.which(name)
    if python is None or subprocess.run([python, "-c", ""], capture_output=True).returncode != 0:
        pytest.skip(f"there is no {name} here")
    result = subprocess.run([python, str(ROOT / "dev" / "preflight.py")], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("gs_d2 needs Python 3.10 or newer, and ")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("module", ["ensurepip", "venv"])
def test_no_venv(good_machine, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    assert good_machine.main() == (
        "This Python cannot make virtual environments. Debian and Ubuntu: apt-get install python3-venv"
    )


@pytest.mark.parametrize(("cxx", "named"), [(None, "c++"), ("clang++-99 -stdlib=libc++", "clang++-99")])
def test_no_compiler(good_machine, monkeypatch, cxx, named):
    if cxx:
        monkeypatch.setenv("CXX", cxx)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    message = good_machine.main()
    assert f"needs a C++17 compiler, and '{named}' is not there" in message
    assert "apt-get install g++" in message


def test_no_headers(good_machine, monkeypatch, tmp_path):
    monkeypatch.setattr(good_machine, "include_paths", lambda: {str(tmp_path / "none")})
    assert good_machine.main() == "Python's C headers are missing. Debian and Ubuntu: apt-get install python3-dev"


def run_setup(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["setup.py", "--name"])
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py", run_name="__main__")


def test_setup_on_an_old_python(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "version_info", (3, 9, 1, "final", 0))
        with pytest.raises(SystemExit, match=r"^gs_d2 needs Python 3\.10 or newer, this is 3\.9$"):
            run_setup(patch)


def test_setup_without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit, match=r"build needs torch: pip install torch torchvision.*\n.*--no-build-isolation"):
        run_setup(monkeypatch)


def test_setup_without_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(SystemExit, match=r"needs a C\+\+17 compiler, and 'no-such-compiler -O2' is not there"):
        run_setup(monkeypatch)
