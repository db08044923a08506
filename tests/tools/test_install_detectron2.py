"""install_detectron2.py: which route it takes, that nothing of an unchecked archive runs, and how 0.5 is mended.

No test installs anything or asks the network: pip and git are replaced, and where the real pip runs it sees one folder.
"""

import hashlib
import importlib.util
import subprocess
import tarfile
import zipfile
from types import SimpleNamespace

import pytest


@pytest.fixture
def tool(load_script):
    return load_script("tools/install_detectron2.py")


@pytest.fixture
def run_main(tool, monkeypatch, capsys):
    """Runs main with replaced parts; returns what was printed and the routes that were tried."""

    def run_main(*arguments, versions, reachable=False, fails=None):
        tried = []
        versions = iter(versions)

        def install(route):
            def install():
                tried.append(route)
                if fails == route:
                    raise subprocess.CalledProcessError(1, ["python", "-m", "pip", "install", route])

            return install

        monkeypatch.setattr(tool, "installed_version", lambda: next(versions))
        monkeypatch.setattr(tool, "official_is_reachable", lambda: reachable)
        monkeypatch.setattr(tool, "install_official", install("official"))
        monkeypatch.setattr(tool, "install_from_index", install("index"))
        monkeypatch.setattr("sys.argv", ["install_detectron2.py", *arguments])
        tool.main()
        return capsys.readouterr().out.strip(), tried

    return run_main


def test_nothing_to_do_where_it_is_there(run_main):
    assert run_main(versions=["0.6"], reachable=True) == ("Detectron2 0.6 is installed already (route 1)", [])


@pytest.mark.parametrize(
    ("arguments", "before", "reachable", "route", "said"),
    [
        ((), None, True, "official", "(route 2: official, built from source)"),
        ((), None, False, "index", "(route 3: from the package index, pure Python, without its compiled ops)"),
        (("--route", "official"), None, False, "official", "(route 2"),
        (("--route", "official"), "0.5", True, "official", "(route 2"),
        (("--route", "index"), "0.6", True, "index", "(route 3"),
    ],
)
def test_routes(run_main, arguments, before, reachable, route, said):
    printed, tried = run_main(*arguments, versions=[before, "0.6"], reachable=reachable)
    assert tried == [route]
    assert printed.startswith("Detectron2 0.6 installed ") and said in printed


def test_a_failure_names_the_command(run_main):
    with pytest.raises(SystemExit, match=r"failed at: python -m pip install official\n.*--route index"):
        run_main(versions=[None], reachable=True, fails="official")


def test_an_installed_detectron2_that_does_not_import(run_main):
    with pytest.raises(SystemExit, match="was installed but does not import"):
        run_main(versions=[None, None])


def test_torch_comes_first(tool, monkeypatch):
    def version(name):
        raise tool.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(tool.metadata, "version", version)
    monkeypatch.setattr("sys.argv", ["install_detectron2.py"])
    with pytest.raises(SystemExit, match=r"Detectron2 needs torch first: pip install torch torchvision"):
        tool.main()


def test_version_detection(tool, monkeypatch, capsys):
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
        (SimpleNamespace(returncode=0), True),
        (SimpleNamespace(returncode=128), False),
        (subprocess.TimeoutExpired("git", 30), False),
        (FileNotFoundError("git"), False),
    ],
    ids=["answers", "refuses", "silent", "no git"],
)
def test_reachability(tool, monkeypatch, answer, expected):
    def run(command, env, timeout, **kwargs):
        assert command[:2] == ["git", "ls-remote"] and command[2] == tool.OFFICIAL_REPOSITORY
        assert env["GIT_TERMINAL_PROMPT"] == "0", "git must not ask for a password"
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(tool.subprocess, "run", run)
    assert tool.official_is_reachable() is expected


def test_the_official_route_is_pinned(tool, monkeypatch):
    commands = []
    monkeypatch.setattr(tool.subprocess, "run", lambda command, check: commands.append(command))
    tool.install_official()
    (command,) = commands
    assert command[1:4] == ["-m", "pip", "install"] and "--no-build-isolation" in command
    assert "git+https://github.com/facebookresearch/detectron2.git@02b5c4e295e990042a714712c21dc79b731e8833" in command
    assert command[-2:] == ["-c", str(tool.CONSTRAINTS)] and tool.CONSTRAINTS.is_file()


SETUP = """
import pathlib
pathlib.Path({marker!r}).write_text("setup.py of the archive has run")
from setuptools import find_packages, setup
setup(name="detectron2-cdo", version="0.5", packages=find_packages())
"""


@pytest.fixture
def archive(tool, tmp_path, monkeypatch):
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
def installed(tool, monkeypatch):
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
    return installed


def test_an_archive_of_another_hash_is_not_run(tool, archive, installed, capfd):
    assert archive.sha256 != tool.SDIST_SHA256
    with pytest.raises(subprocess.CalledProcessError):
        tool.install_from_index()
    assert "DO NOT MATCH THE HASHES" in capfd.readouterr().err
    assert not archive.marker.exists()
    assert installed == []


def test_an_archive_of_the_right_hash_is_mended_and_installed(tool, archive, installed, monkeypatch):
    monkeypatch.setattr(tool, "SDIST_SHA256", archive.sha256)
    tool.install_from_index()
    assert archive.marker.exists()
    requirements, (*options, wheel), package, has_stub = installed
    assert "fvcore" in requirements
    assert "--no-deps" in options and wheel.endswith(".whl") and "detectron2_cdo-0.5" in wheel
    assert package == "import numpy as np\nx = float(3)\n"
    assert has_stub


def test_mend(tool, tmp_path):
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
    tool.mend(tmp_path)
    assert (package / "data" / "transforms.py").read_text(encoding="utf-8") == (
        "Image.BILINEAR Image.LINEARIZE int(1) float, bool) object]\n"
        "np.int32 np.int64 np.int_ np.float32 np.bool_ np.object_ np.integer np.floating anp.int xImage.LINEAR\n"
        "# λ\n"
    )
    assert (package / "plain.py").read_text() == "x = 1\n"
    assert (package / "notes.txt").read_text() == "np.int"
    tool.mend(tmp_path)  # a second time changes nothing
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
