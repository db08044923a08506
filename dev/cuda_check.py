"""Compiles the CUDA kernels for every architecture, warnings as errors, and reads the PTX that comes out.

No GPU is needed. nvcc is taken from CUDA_HOME, the PATH or /usr/local/cuda; where there is none, or with
--package-index, it is installed from the package index into a folder of its own. The PTX must hold no fused
multiply-add, no flushing of subnormals and no approximate division: each would let CUDA and CPU differ.

    python dev/cuda_check.py
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHS = ("75", "80", "86", "89", "90", "100", "120")
PACKAGES = ("nvidia-cuda-nvcc", "nvidia-cuda-cccl", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-runtime")
PACKAGE_VERSION = "13.0.*"
FLAGS = "-std=c++17 -O3 --fmad=false -Werror all-warnings -Xcompiler -Wall,-Wextra,-Werror".split()
# Division must be div.rn: div.full and div.approx round otherwise. Integers use mad, never fma.
FORBIDDEN = {
    "fused multiply-add": re.compile(r"\bfma\."),
    "flush to zero": re.compile(r"\.ftz\b"),
    "approximation": re.compile(r"\.approx\b|\bdiv\.full\b"),
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package-index", action="store_true", help="use nvcc from the package index")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "nvcc", help="where that nvcc is put")
    args = parser.parse_args(argv)

    home = None if args.package_index else installed_toolkit()
    home = home or toolkit_from_package_index(args.folder)
    nvcc = home / "bin" / "nvcc"
    version = run([nvcc, "--version"]).split("release ")[1].split(",")[0]
    print(f"nvcc {version} in {home}")
    known = run([nvcc, "--list-gpu-arch"]).split()
    archs = [arch for arch in ARCHS if f"compute_{arch}" in known]
    print(f"architectures: {' '.join(archs)}")

    failed = False
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        problems, seconds = check(nvcc, source, archs)
        print(f"{source.name}: {seconds:.1f} s, {'; '.join(problems) if problems else 'clean'}")
        failed = failed or bool(problems)
    sys.exit(1 if failed else 0)


def check(nvcc, source, archs):
    """Compiles `source` for all `archs` at once; returns what is wrong, as lines, and the seconds it took."""
    begin = time.time()
    with tempfile.TemporaryDirectory() as folder:
        targets = [f"-gencode=arch=compute_{a},code=[compute_{a},sm_{a}]" for a in archs]
        command = [nvcc, *FLAGS, *targets, "--threads", "0", "--keep", f"--keep-dir={folder}", "-c", source]
        result = subprocess.run([*command, "-o", Path(folder) / "out.o"], capture_output=True, text=True)
        if result.returncode != 0:
            print(result.stdout + result.stderr, file=sys.stderr)
            return ["does not compile"], time.time() - begin
        listings = {path.name: path.read_text() for path in Path(folder).glob("*.ptx")}
    problems = []
    if len(listings) != len(archs):
        problems.append(f"{len(listings)} PTX files for {len(archs)} architectures")
    for name, text in sorted(listings.items()):
        for what, pattern in FORBIDDEN.items():
            count = len(pattern.findall(text))
            if count > 0:
                problems.append(f"{count} x {what} in {name}")
    return problems, time.time() - begin


def installed_toolkit():
    """The folder of a CUDA toolkit that has its headers, or None."""
    on_path = shutil.which("nvcc")
    beside = on_path and Path(os.path.realpath(on_path)).parent.parent
    homes = [os.environ.get("CUDA_HOME"), beside, "/usr/local/cuda"]
    for home in filter(None, homes):
        if (Path(home) / "bin" / "nvcc").exists() and (Path(home) / "include" / "cuda_runtime.h").exists():
            return Path(home)
    return None


def toolkit_from_package_index(folder):
    """Installs nvcc and what it needs under `folder`, unless they are there, and returns CUDA_HOME."""
    home = folder / "nvidia" / "cu13"
    if not (home / "bin" / "nvcc").exists():
        print(f"installing nvcc from the package index into {os.fspath(folder)!r}")
        pip = f"{sys.executable} -m pip install --quiet --disable-pip-version-check --target".split()
        run([*pip, folder, *(f"{package}=={PACKAGE_VERSION}" for package in PACKAGES)])
    # The names under which compilers and linkers look for libraries.
    for link, target in ((home / "lib64", "lib"), (home / "lib" / "libcudart.so", "libcudart.so.13")):
        if not link.exists():
            link.symlink_to(target)
    return home


def run(command):
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{result.stdout}{result.stderr}")
    return result.stdout


if __name__ == "__main__":
    main()
