"""Installs Detectron2 into the running Python, by the first of three routes that works, and says which it took.

1. It is there already: nothing to do.
2. Official: the pinned commit of facebookresearch/detectron2, built from source (about two minutes; needs git, a C++
   compiler, and torch installed).
3. From the package index: an sdist of Detectron2 0.5 that lacks its C++ sources. It is checked by hash, repaired for
   today's numpy and Pillow, and installed without compiled ops; gs_d2 needs none of them. The last line says why
   route 2 did not work.

Run it again at any time: it ends at route 1. `--route official` or `--route index` insists on one and replaces what is
there: once the new one is built, every distribution that has a package `detectron2` is uninstalled, so that no file or
metadata of it stays behind.
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib import metadata
from pathlib import Path

OFFICIAL_REPOSITORY = "https://github.com/facebookresearch/detectron2.git"
OFFICIAL_COMMIT = "02b5c4e295e990042a714712c21dc79b731e8833"  # main of June 2026
SDIST = "detectron2-cdo==0.5"
SDIST_SHA256 = "53c9e79e9cc943e80419c588ea44b5479507a8628ed14a4e06bd093e29311b18"
CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"
# What Detectron2 0.5 imports; its own list also pins a formatter and packages for old Pythons.
SDIST_REQUIREMENTS = (
    "Pillow matplotlib pycocotools termcolor yacs tabulate cloudpickle tqdm tensorboard fvcore iopath omegaconf"
).split()
# Names that numpy 1.24 and Pillow 10 removed.
RENAMES = [
    (re.compile(r"\bImage\.LINEAR\b"), "Image.BILINEAR"),
    (re.compile(r"\bnp\.(int|float|bool|object)\b"), r"\1"),
]
STUB_C = '''"""Stands in for Detectron2's compiled ops, which this build (from the package index) does not have."""


# What Detectron2 prints of its build at the start of every run.
def get_compiler_version():
    return "none: pure Python build"


def get_cuda_version():
    return "none: pure Python build"


def has_cuda():
    return False


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    raise RuntimeError(
        f"detectron2._C.{name} is not available: this Detectron2 0.5 was installed from the package index without its "
        "C++ sources. Install the official one: python tools/install_detectron2.py --route official"
    )
'''


def installed_version():
    """Version of the Detectron2 that `import detectron2` finds, or None."""
    if importlib.util.find_spec("detectron2") is None:
        return None
    probe = subprocess.run(
        [sys.executable, "-c", "import detectron2, detectron2.config; print(detectron2.__version__)"],
        capture_output=True,
        text=True,
    )
    if probe.returncode != 0:
        print(f"detectron2 is there but does not import:\n{probe.stderr}", file=sys.stderr)
        return None
    return probe.stdout.strip()


def why_not_official():
    """Why the official Detectron2 cannot be fetched and built here; None where it seems that it can."""
    compiler = (os.environ.get("CXX") or "c++").split()[0]
    for program in ("git", compiler):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    try:
        answer = subprocess.run(
            ["git", "ls-remote", OFFICIAL_REPOSITORY, "HEAD"],
            env={**os.environ, "GIT_TERMINAL_PROMPT": "0"},
            capture_output=True,
            text=True,
            timeout=30,
        )
    except subprocess.TimeoutExpired:
        return f"{OFFICIAL_REPOSITORY} did not answer within 30 seconds"
    except OSError as error:
        return f"git does not start ({error})"
    if answer.returncode != 0:
        said = answer.stderr.strip().splitlines() or [f"git ended with code {answer.returncode}"]
        return f"{OFFICIAL_REPOSITORY} cannot be reached ({said[-1]})"
    return None


def pip(*arguments):
    constraints = ["-c", str(CONSTRAINTS)] if arguments[0] == "install" and CONSTRAINTS.exists() else []
    subprocess.run([sys.executable, "-m", "pip", *arguments, *constraints], check=True)


def replace_installed(wheel, *options):
    """Installs the wheel in place of whichever distributions have a package `detectron2` now."""
    owners = sorted(set(metadata.packages_distributions().get("detectron2", ())))
    if owners:
        print(f"Uninstalling what is there: {', '.join(f'{name} {metadata.version(name)}' for name in owners)}")
        pip("uninstall", "--quiet", "--yes", *owners)
    pip("install", "--quiet", *options, str(wheel))


def install_official():
    with tempfile.TemporaryDirectory() as folder:
        source = f"git+{OFFICIAL_REPOSITORY}@{OFFICIAL_COMMIT}"
        pip("wheel", "--no-deps", "--no-build-isolation", "-w", folder, source)
        (wheel,) = Path(folder).glob("*.whl")
        replace_installed(wheel, "--no-build-isolation")


def install_from_index():
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        requirements = folder / "requirements.txt"
        requirements.write_text(f"{SDIST} --hash=sha256:{SDIST_SHA256}\n")
        # With --require-hashes pip checks the archive before it runs anything in it.
        pip(
            "download", "--quiet", "--no-deps", "--no-build-isolation", "--no-binary", ":all:",
            "--require-hashes", "-r", str(requirements), "-d", str(folder),
        )  # fmt: skip
        (archive,) = folder.glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data") if hasattr(tarfile, "data_filter") else tar.extractall(folder)
        (source,) = (path for path in folder.iterdir() if path.is_dir())
        repair(source)
        build = [sys.executable, "setup.py", "-q", "build_py", "bdist_wheel", "--skip-build"]
        subprocess.run(build, cwd=source, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
        (wheel,) = (source / "dist").glob("*.whl")
        pip("install", "--quiet", *SDIST_REQUIREMENTS)
        replace_installed(wheel, "--no-deps")


def repair(source: Path):
    """Makes the 0.5 sources run on today's numpy and Pillow, and stand without their compiled module."""
    for path in source.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        repaired = text
        for pattern, replacement in RENAMES:
            repaired = pattern.sub(replacement, repaired)
        if repaired != text:
            path.write_text(repaired, encoding="utf-8")
    (source / "detectron2" / "_C.py").write_text(STUB_C)


def install(route):
    """Takes that route, or with "auto" route 2 where it works and else 3; says which, and why not 2."""
    why_not = "--route index asks for it"
    if route != "index":
        why_not = why_not_official() if route == "auto" else None
        if why_not is None:
            try:
                install_official()
                return "route 2: official, built from source"
            except subprocess.CalledProcessError as error:
                if route == "official":
                    raise
                why_not = f"the official one could not be built or installed, see above: {text_of(error.cmd)}"
    print(f"Taking route 3, the package index, because {why_not}")
    install_from_index()
    return f"route 3: from the package index, pure Python, without its compiled ops, because {why_not}"


def text_of(command):
    return " ".join(map(str, command))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--route", choices=["auto", "official", "index"], default="auto", help="insist on one way")
    route = parser.parse_args(argv).route
    try:
        metadata.version("torch")
    except metadata.PackageNotFoundError:
        sys.exit("Detectron2 needs torch first: pip install torch torchvision, then run this again")

    version = installed_version()
    if version is not None and route == "auto":
        print(f"Detectron2 {version} is installed already (route 1)")
        return
    try:
        taken = install(route)
    except subprocess.CalledProcessError as error:
        sys.exit(
            f"Installing Detectron2 failed at: {text_of(error.cmd)}\n"
            "See the messages above; `--route official` and `--route index` insist on one way."
        )
    importlib.invalidate_caches()
    version = installed_version()
    if version is None:
        sys.exit("Detectron2 was installed but does not import; see the messages above")
    print(f"Detectron2 {version} installed ({taken})")


if __name__ == "__main__":
    main()
