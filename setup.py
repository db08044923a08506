"""Builds gs_d2 and its extension gs_d2._C.

CUDA kernels are built when FORCE_CUDA=1, or when torch sees a GPU and CUDA_HOME has nvcc; TORCH_CUDA_ARCH_LIST is
honoured. Everything else (dependencies, Detectron2) is set up by the Makefile; see the README.
"""

import glob
import os
import shutil
import sys

MIN_PYTHON = (3, 10)
if sys.version_info < MIN_PYTHON:
    sys.exit("gs_d2 needs Python {}.{} or newer, this is {}.{}".format(*MIN_PYTHON, *sys.version_info[:2]))

from setuptools import Extension, find_packages, setup  # noqa: E402

ROOT = os.path.dirname(os.path.abspath(__file__))
TORCH_TARGET_VERSION = "0x020a000000000000"  # torch 2.10: the oldest that the one binary loads under
PYTHON_TARGET_VERSION = "0x030a0000"


def extension():
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        sys.exit("gs_d2's build needs torch: pip install torch torchvision, then\npip install --no-build-isolation .")
    compiler = os.environ.get("CXX") or "c++"
    if shutil.which(compiler.split()[0]) is None:
        sys.exit(
            f"gs_d2's build needs a C++17 compiler, and '{compiler}' is not there: install one "
            "(Debian and Ubuntu: apt-get install g++) or point CXX at it"
        )

    sources = sorted([*glob.glob("csrc/cpu/*.cpp"), "csrc/ops/library.cpp", *glob.glob("csrc/ops/*_cpu.cpp")])
    depends = sorted(glob.glob("csrc/**/*.h", recursive=True))
    # One rounding per operation: labels and draws must not depend on the compiler or the device.
    cxx_flags = [
        "-O3",
        "-g0",
        "-std=c++17",
        "-ffp-contract=off",
        "-fno-trapping-math",
        "-fno-math-errno",
        "-Wall",
    ]
    cxx_flags += ["-fvisibility=hidden", f"-ffile-prefix-map={ROOT}=."]
    macros = [("Py_LIMITED_API", PYTHON_TARGET_VERSION), ("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)]
    return Extension(
        "gs_d2._C",
        sources=sources,
        depends=depends,
        include_dirs=cpp_extension.include_paths(),
        library_dirs=[os.path.join(os.path.dirname(torch.__file__), "lib")],
        libraries=["torch_cpu", "torch"],
        language="c++",
        define_macros=macros,
        extra_compile_args={"cxx": cxx_flags},
        extra_link_args=["-Wl,--no-as-needed"],
        py_limited_api=True,
    ), cpp_extension.BuildExtension


ext_module, build_ext = extension()
setup(
    name="gs_d2",
    version="0.1.0",
    description="Scale-invariant face detection by group sampling, on Detectron2",
    license="Apache-2.0",
    packages=find_packages(include=["gs_d2", "gs_d2.*"]),
    python_requires=">={}.{}".format(*MIN_PYTHON),
    # Detectron2 is not listed: the package index has no official build of it (tools/install_detectron2.py).
    install_requires=["torch>=2.10", "numpy"],
    extras_require={"detection": ["torchvision", "scipy", "pycocotools", "fvcore", "matplotlib"]},
    ext_modules=[ext_module],
    cmdclass={"build_ext": build_ext},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
    zip_safe=False,
)
