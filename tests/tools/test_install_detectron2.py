"""install_detectron2.py: which route it takes, that nothing of an unchecked archive runs, and how 0.5 is repaired.

No test asks the network or installs anything here: pip and git are replaced, and the real pip sees one folder, or an
environment of its own.
"""

import hashlib
import importlib.util
import os
import subprocess
import tarfile
import venv
import zipfile
from pathlib import Path
from types import SimpleNamespace

import install_detectron2 as tool
import pytest


@pytest.fixture
def run_main(monkeypatch, capsys):
    """Runs main with replaced parts; returns what was printed and the routes that were tried."""

    def run_main(*arguments, versions, why_not="git is not installed", fails=None):
        tried = []
        versions = iter(versions)

        def install(route):
            def install():
                tried.append(route)
                if fails == route:
                    raise subprocess.CalledProcessError(1, ["python", "-m", "pip", "install", route])

            return install

        monkeypatch.setattr(tool, "installed_version", lambda: next(versions))
        monkeypatch.setattr(tool, "why_not_official", lambda: why_not)
        monkeypatch.setattr(tool, "install_official", install("official"))
        monkeypatch.setattr(tool, "install_from_index", install("index"))
        monkeypatch.setattr("sys.argv", ["install_detectron2.py", *arguments])
        tool.main()
        return capsys.readouterr().out.strip(), tried

    return run_main


def test_nothing_to_do_where_it_is_there(run_main):
    assert run_main(versions=["0.6"], why_not=None) == ("Detectron2 0.6 is installed already (route 1)", [])


@pytest.mark.parametrize(
    ("arguments", "before", "why_not", "route", "said"),
    [
        ((), None, None, "official", "(route 2: official, built from source)"),
        ((), None, "git is not installed", "index", "without its compiled ops, because git is not installed)"),
        (("--route", "official"), None, "git is not installed", "official", "(route 2"),
        (("--route", "official"), "0.5", None, "official", "(route 2"),
        (("--route", "index"), "0.6", None, "index", "because --route index asks for it)"),
    ],
)
def test_routes(run_main, arguments, before, why_not, route, said):
    printed, tried = run_main(*arguments, versions=[before, "0.6"], why_not=why_not)
    assert tried == [route]
    last = printed.splitlines()[-1]
    assert last.startswith("Detectron2 0.6 installed ") and said in last


def test_an_official_one_that_does_not_build_leaves_route_3(run_main):
    printed, tried = run_main(versions=[None, "0.5"], why_not=None, fails="official")
    assert tried == ["official", "index"]
    assert printed.splitlines()[-1].startswith("Detectron2 0.5 installed (route 3")
    assert printed.count("could not be built or installed, see above: python -m pip install official") == 2


@pytest.mark.parametrize("route", ["official", "index"])
def test_a_failure_names_the_command(run_main, route):
    with pytest.raises(SystemExit, match=rf"failed at: python -m pip install {route}\n.*--route index"):
        run_main("--route", route, versions=[None], fails=route)


def test_an_installed_detectron2_that_does_not_import(run_main):
    with pytest.raises(SystemExit, match="was installed but does not import"):
        run_main(versions=[None, None])


def test_torch_comes_first(monkeypatch):
    def version(name):
        raise tool.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(tool.metadata, "version", version)
    monkeypatch.setattr("sys.argv", ["install_detectron2.py"])
    with pytest.raises(SystemExit, match=r"Detectron2 needs torch first: pip install torch torchvision"):
        tool.main()


def test_version_detection(monkeypatch, capsys):
    answers = {}
    monkeypatch.setattr(tool.subprocess, "run", lambda *args, **kwargs: answers["run"])
    monkeypatch.setattr(tool.importlib.util, "find_spec", lambda name: answers["spec"])
    answers.update(spec=None, run=None)
    assert tool.installed_version() is None
    answers.update(spec=object(), run=SimpleNamespace(returncode=0, stdout="0.6\n", stderr=""))
    assert tool.installed_version() == "0.6"
    answers.update(run=SimpleNamespace(returncode=1, stdout="", stderr="ImportError: no fvcore"))
    assert tool.installed_version() is None
    assert "detectron2 is there but does not import:\nImportError: no fvcore" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (SimpleNamespace(returncode=0), None),
        (
            SimpleNamespace(returncode=128, stderr="x\nfatal: no such host\n"),
            "https://github.com/facebookresearch/detectron2.git cannot be reached (fatal: no such host)",
        ),
        (SimpleNamespace(returncode=7, stderr=""), "cannot be reached (git ended with code 7)"),
        (subprocess.TimeoutExpired("git", 30), "detectron2.git did not answer within 30 seconds"),
        (PermissionError("not executable"), "git does not start (not executable)"),
    ],
    ids=["answers", "refuses", "refuses silently", "silent", "not executable"],
)
def test_reachability(monkeypatch, answer, expected):
    monkeypatch.setattr(tool.shutil, "which", lambda name: f"/bin/{name}")

    def run(command, env, timeout, **kwargs):
        assert command[:2] == ["git", "ls-remote"] and command[2] == tool.OFFICIAL_REPOSITORY
        assert env["GIT_TERMINAL_PROMPT"] == "0", "git must not ask for a password"
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(tool.subprocess, "run", run)
    found = tool.why_not_official()
    assert found is expected if expected is None else expected in found


@pytest.mark.parametrize(("missing", "cxx"), [("git", None), ("c++", None), ("clang++", "clang++ -O2")])
def test_a_missing_program_is_named(monkeypatch, missing, cxx):
    monkeypatch.delenv("CXX", raising=False)
    if cxx:
        monkeypatch.setenv("CXX", cxx)
    monkeypatch.setattr(tool.shutil, "which", lambda name: None if name == missing else f"/bin/{name}")
    monkeypatch.setattr(tool.subprocess, "run", lambda *args, **kwargs: pytest.fail("git was started"))
    assert tool.why_not_official() == f"{missing} is not installed"


def test_the_official_route_is_pinned(monkeypatch):
    commands = []

    def run(command, check):
        commands.append(command)
        if "-w" in command:
            (Path(command[command.index("-w") + 1]) / "detectron2-0.6-py3-none-any.whl").touch()

    monkeypatch.setattr(tool.subprocess, "run", run)
    monkeypatch.setattr(tool.metadata, "packages_distributions", dict)
    tool.install_official()
    build, install = commands
    assert build[1:4] == ["-m", "pip", "wheel"] and "--no-build-isolation" in build and "--no-deps" in build
    assert "git+https://github.com/facebookresearch/detectron2.git@02b5c4e295e990042a714712c21dc79b731e8833" in build
    assert install[1:4] == ["-m", "pip", "install"] and "--no-build-isolation" in install
    assert install[-3].endswith("detectron2-0.6-py3-none-any.whl")
    assert install[-2:] == ["-c", str(tool.CONSTRAINTS)] and tool.CONSTRAINTS.is_file()


def wheel_of(folder, name, version, files):
    """A wheel as setuptools makes it."""
    path = folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    files = {
        **{f"detectron2/{file}": text for file, text in files.items()},
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/top_level.txt": "detectron2\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(path, "w") as wheel:
        for file, text in files.items():
            wheel.writestr(file, text)
    return path


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """A virtual environment with pip and nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    return folder / ("Scripts" if os.name == "nt" else "bin") / "python"


def test_nothing_of_the_old_one_stays_behind(bare_python, tmp_path):
    """The real pip, from 0.5 to the official one and back, and once more over itself."""
    old = wheel_of(tmp_path, "detectron2-cdo", "0.5", {"__init__.py": "", "_C.py": "", "old.py": ""})
    new = wheel_of(tmp_path, "detectron2", "0.6", {"__init__.py": "", "new.py": ""})
    script = (
        "import importlib.util, sys; from importlib import metadata; from pathlib import Path\n"
        f"spec = importlib.util.spec_from_file_location('tool', {tool.__file__!r})\n"
        "tool = importlib.util.module_from_spec(spec); spec.loader.exec_module(tool)\n"
        "tool.replace_installed(Path(sys.argv[1]), '--no-deps', '--no-index')\n"
    )
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    environment.pop("PYTHONPATH", None)
    (site,) = bare_python.parent.parent.glob("lib/python*/site-packages")
    for wheel, said, files, info in (
        (old, "", {"__init__.py", "_C.py", "old.py"}, "detectron2_cdo-0.5.dist-info"),
        (new, "Uninstalling what is there: detectron2-cdo 0.5", {"__init__.py", "new.py"}, "detectron2-0.6.dist-info"),
        (new, "Uninstalling what is there: detectron2 0.6", {"__init__.py", "new.py"}, "detectron2-0.6.dist-info"),
        (old, "Uninstalling what is there: detectron2 0.6", {"__init__.py", "_C.py", "old.py"}, "detectron2_cdo-0.5.d"),
    ):
        command = [str(bare_python), "-c", script, str(wheel)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert result.stdout.strip() == said
        assert {path.name for path in (site / "detectron2").iterdir() if path.is_file()} == files
        (found,) = (path.name for path in site.iterdir() if path.name.startswith("detectron2") and path.suffix)
        assert found.startswith(info)


SETUP = """
import pathlib
pathlib.Path({marker!r}).write_text("setup.py of the archive has run")
from setuptools import find_packages, setup
setup(name="detectron2-cdo", version="0.5", packages=find_packages())
"""


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """An sdist of the right name in the only place that pip may look at; it leaves a mark when any of it runs."""
    marker = tmp_path / "marker"
    source = tmp_path / "detectron2-cdo-0.5"
    (source / "detectron2").mkdir(parents=True)
    (source / "setup.py").write_text(SETUP.format(marker=str(marker)))
    (source / "PKG-INFO").write_text("Metadata-Version: 1.0\nName: detectron2-cdo\nVersion: 0.5\n")
    (source / "detectron2" / "__init__.py").write_text("import numpy as np\nx = np.float(3)\n")
    index = tmp_path / "index"
    index.mkdir()
    path = index / "detectron2-cdo-0.5.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(source, arcname=source.name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    return SimpleNamespace(marker=marker, sha256=hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.fixture
def installed(monkeypatch):
    """What pip was told to install; downloads are real."""
    installed = []
    pip = tool.pip

    def replaced(command, *arguments):
        if command == "install":
            installed.append(arguments)
            for argument in arguments:
                if argument.endswith(".whl"):
                    with zipfile.ZipFile(argument) as wheel:
                        installed.append(wheel.read("detectron2/__init__.py").decode())
                        installed.append("detectron2/_C.py" in wheel.namelist())
        else:
            pip(command, *arguments)

    monkeypatch.setattr(tool, "pip", replaced)
    monkeypatch.setattr(tool.metadata, "packages_distributions", dict)  # nothing is there to be replaced
    return installed


def test_an_archive_of_another_hash_is_not_run(archive, installed, capfd):
    assert archive.sha256 != tool.SDIST_SHA256
    with pytest.raises(subprocess.CalledProcessError):
        tool.install_from_index()
    assert "DO NOT MATCH THE HASHES" in capfd.readouterr().err
    assert not archive.marker.exists()
    assert installed == []


def test_an_archive_of_the_right_hash_is_repaired_and_installed(archive, installed, monkeypatch):
    monkeypatch.setattr(tool, "SDIST_SHA256", archive.sha256)
    tool.install_from_index()
    assert archive.marker.exists()
    requirements, (*options, wheel), package, has_stub = installed
    assert "fvcore" in requirements
    assert "--no-deps" in options and wheel.endswith(".whl") and "detectron2_cdo-0.5" in wheel
    assert package == "import numpy as np\nx = float(3)\n"
    assert has_stub


def test_repair(tmp_path):
    package = tmp_path / "detectron2"
    (package / "data").mkdir(parents=True)
    old = (
        "Image.LINEAR Image.LINEARIZE np.int(1) np.float, np.bool) np.object]\n"
        "np.int32 np.int64 np.int_ np.float32 np.bool_ np.object_ np.integer np.floating anp.int xImage.LINEAR\n"
        "# λ\n"
    )
    (package / "data" / "transforms.py").write_text(old, encoding="utf-8")
    (package / "plain.py").write_text("x = 1\n")
    (package / "notes.txt").write_text("np.int")
    tool.repair(tmp_path)
    assert (package / "data" / "transforms.py").read_text(encoding="utf-8") == (
        "Image.BILINEAR Image.LINEARIZE int(1) float, bool) object]\n"
        "np.int32 np.int64 np.int_ np.float32 np.bool_ np.object_ np.integer np.floating anp.int xImage.LINEAR\n"
        "# λ\n"
    )
    assert (package / "plain.py").read_text() == "x = 1\n"
    assert (package / "notes.txt").read_text() == "np.int"
    tool.repair(tmp_path)  # a second time changes nothing
    assert "Image.BILINEAR Image.LINEARIZE int(1)" in (package / "data" / "transforms.py").read_text(encoding="utf-8")

    spec = importlib.util.spec_from_file_location("stub_c", package / "_C.py")
    stub = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stub)
    assert stub.has_cuda() is False
    assert "pure Python" in stub.get_compiler_version() and "pure Python" in stub.get_cuda_version()
    with pytest.raises(RuntimeError, match=r"detectron2\._C\.nms_rotated is not available.*--route official"):
        _ = stub.nms_rotated
    with pytest.raises(AttributeError):
        _ = stub.__path__
