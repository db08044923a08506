"""Builds gs_d2 and its extension gs_d2._C.

CUDA kernels are built when FORCE_CUDA=1, or when torch sees a GPU and CUDA_HOME has nvcc; the variable
TORCH_CUDA_ARCH_LIST is honoured. With FORCE_CUDA=1 it is an error if they cannot be built. Everything else
(dependencies, Detectron2) is set up by the Makefile; see the README.
"""

import glob
import os
import re
import shutil
import subprocess
import sys

MIN_PYTHON = (3, 10)
if sys.version_info < MIN_PYTHON:
    sys.exit("gs_d2 needs Python {}.{} or newer, this is {}.{}".format(*MIN_PYTHON, *sys.version_info[:2]))

from setuptools import Extension, find_packages, setup  # noqa: E402
from setuptools.command.build_py import build_py  # noqa: E402

ROOT = os.path.dirname(os.path.abspath(__file__))
TORCH_TARGET_VERSION = "0x020a000000000000"  # torch 2.10: the oldest that the one binary loads under
PYTHON_TARGET_VERSION = "0x030A0000"  # spelled as torch defines it too


MACROS = [("Py_LIMITED_API", PYTHON_TARGET_VERSION), ("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)]
CUDA_ARCHS = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
# One rounding per operation: labels and draws must not depend on the compiler or the device.
CXX_FLAGS = ["-O3", "-g0", "-std=c++17", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"]
CXX_FLAGS += ["-Wall", "-fvisibility=hidden", f"-ffile-prefix-map={ROOT}=."]
NVCC_FLAGS = ["-O3", "-std=c++17", "--fmad=false"]
NVCC_FLAGS += ["-Xcompiler", "-Wall,-fvisibility=hidden,-ffp-contract=off"]


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

    backends = ["cpu"]
    include_dirs = cpp_extension.include_paths()
    library_dirs = [os.path.join(os.path.dirname(torch.__file__), "lib")]
    # Only these two of torch's libraries, kept even where no symbol is taken from them: the same file loads
    # under a torch without CUDA, and finds torch's CUDA part through libtorch where there is one.
    link_args = ["-Wl,--no-as-needed", "-ltorch_cpu", "-ltorch"]
    cuda_home = find_cuda(torch, cpp_extension)
    if cuda_home:
        backends.append("cuda")
        include_dirs.append(os.path.join(cuda_home, "include"))
        library_dirs += [os.path.join(cuda_home, "lib64"), os.path.join(cuda_home, "lib")]
        # The static runtime, its symbols kept in: a shared one would be missing on machines without CUDA.
        link_args += ["-lcudart_static", "-Wl,--exclude-libs,libcudart_static.a", "-ldl", "-lrt", "-lpthread"]

    sources = [f"csrc/{backend}/*.{suffix}" for backend in backends for suffix in ("cpp", "cu")]
    sources += ["csrc/ops/library.cpp"] + [f"csrc/ops/*_{backend}.cpp" for backend in backends]
    return Extension(
        "gs_d2._C",
        sources=sorted(path for pattern in sources for path in glob.glob(pattern)),
        depends=sorted(glob.glob("csrc/**/*.h", recursive=True)),
        include_dirs=include_dirs,
        library_dirs=library_dirs,
        language="c++",
        define_macros=MACROS,
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
        extra_link_args=link_args,
        py_limited_api=True,
    ), cpp_extension.BuildExtension


def find_cuda(torch, cpp_extension):
    """The CUDA toolkit to build with, or None for a build without CUDA kernels."""
    forced = os.environ.get("FORCE_CUDA", "0") == "1"
    if not forced and not torch.cuda.is_available():
        return None

    def without(message):
        if forced:
            sys.exit(f"gs_d2: {message}")
        print(f"gs_d2: {message}: building for the CPU only", file=sys.stderr)

    if missing := missing_cuda_sources():
        return without(f"the sources of the CUDA kernels are incomplete, {', '.join(missing)} missing in {ROOT}")
    # torch takes the folder above that of the nvcc on the PATH, which may be a link or a script elsewhere.
    homes = [cpp_extension.CUDA_HOME, os.environ.get("CUDA_HOME")]
    homes += [os.path.dirname(os.path.dirname(os.path.realpath(shutil.which("nvcc") or "")))]
    homes += ["/usr/local/cuda"]
    home = next((h for h in homes if h and is_toolkit(h)), None) if torch.version.cuda else None
    if not home:
        got = "none was found" if torch.version.cuda else f"torch {torch.__version__} is a CPU build"
        return without(f"CUDA kernels need a torch built with CUDA and a CUDA toolkit in CUDA_HOME ({got})")
    cpp_extension.CUDA_HOME = home
    if "TORCH_CUDA_ARCH_LIST" not in os.environ:
        command = [os.path.join(home, "bin", "nvcc"), "--list-gpu-arch"]
        known = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        archs = [arch for arch in CUDA_ARCHS if "compute_" + arch.replace(".", "") in known]
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(archs) + "+PTX"
    return home


def missing_cuda_sources():
    """What is not there of the CUDA kernels' files: those of every op that has CPU files."""
    ops = [os.path.basename(path)[: -len("_cpu.cpp")] for path in sorted(glob.glob("csrc/ops/*_cpu.cpp"))]
    files = ["csrc/cuda/kernels.h"] + [file for op in ops for file in (f"csrc/cuda/{op}.cu", f"csrc/ops/{op}_cuda.cpp")]
    return [file for file in files if not os.path.exists(file)]


def is_toolkit(home):
    return all(os.path.exists(os.path.join(home, file)) for file in ("bin/nvcc", "include/cuda_runtime.h"))


class BuildPy(build_py):
    """Copies the configs beside gs_d2/model_zoo too, and removes what an earlier build left and is gone since.

    An editable install finds the configs in the checkout.
    """

    def run(self):
        super().run()
        if getattr(self, "editable_mode", False):
            return
        package = os.path.join(self.build_lib, "gs_d2")
        wanted = set(map(os.path.normpath, self.get_outputs(include_bytecode=False)))
        for config in glob.glob("configs/**/*.yaml", recursive=True):
            target = os.path.normpath(os.path.join(package, "model_zoo", config))
            self.mkpath(os.path.dirname(target))
            self.copy_file(config, target)
            wanted.add(target)
        for path in map(os.path.normpath, glob.glob(os.path.join(package, "**"), recursive=True)):
            if os.path.isfile(path) and path not in wanted and not os.path.basename(path).startswith("_C."):
                os.remove(path)


def text_of(path):
    with open(os.path.join(ROOT, path), encoding="utf-8") as file:
        return file.read()


ext_module, build_ext = extension()
setup(
    name="gs_d2",
    version=re.search(r'^__version__ = "(.+)"$', text_of("gs_d2/__init__.py"), re.MULTILINE)[1],
    description="Scale-invariant face detection by group sampling, on Detectron2",
    long_description=text_of("README.md"),
    long_description_content_type="text/markdown",
    keywords=["face detection", "object detection", "group sampling", "WIDER FACE", "Detectron2", "PyTorch"],
    project_urls={"Paper": "https://doi.org/10.1109/TPAMI.2020.3012414"},
    license="Apache-2.0",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: C++",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
    packages=find_packages(include=["gs_d2", "gs_d2.*"]),
    package_data={"gs_d2.model_zoo": ["weights/*"]},
    python_requires=">={}.{}".format(*MIN_PYTHON),
    # Detectron2 is not listed: the package index has no official build of it (tools/install_detectron2.py).
    install_requires=["torch>=2.10", "numpy"],
    extras_require={
        # all but ops and sampling
        "detection": [
            *("fvcore", "h5py", "matplotlib", "pillow", "pycocotools", "pyyaml"),
            *("safetensors", "scipy", "torchvision", "tqdm"),
        ],
        "timm": ["timm>=1.0"],  # FaceDetector(), and backbones of timm (docs/backbones.md)
        "heic": ["pillow_heif"],  # pictures of phones
        "web": ["gradio>=6"],  # demo/web.py
        "video": ["opencv-python"],  # demo/demo.py --video-input
        "export": ["onnx", "onnxruntime", "onnxscript"],  # docs/export.md
    },
    ext_modules=[ext_module],
    cmdclass={"build_ext": build_ext, "build_py": BuildPy},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
    zip_safe=False,
)
