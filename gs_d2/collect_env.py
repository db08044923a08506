"""``python -m gs_d2.collect_env`` prints what a bug report needs; it works where parts are missing, and says which.

It imports nothing of gs_d2 at import, writes no file, and reads no environment variable but those it lists. In the
text the home folder is ``~``, and passwords in addresses are ``***``.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from gs_d2 import __version__

_ROOT = Path(__file__).resolve().parents[1]
# Distributions whose version is looked up without importing them.
_PACKAGES = (
    "fvcore iopath yacs omegaconf scipy matplotlib pillow h5py opencv-python onnx onnxruntime safetensors tensorboard"
)
_VARIABLES = """
    DETECTRON2_DATASETS FVCORE_CACHE TORCH_HOME PYTHONPATH LD_PRELOAD PYTHONHASHSEED
    OMP_NUM_THREADS OMP_WAIT_POLICY OMP_PROC_BIND MKL_NUM_THREADS KMP_AFFINITY GS_D2_CPU_CAPABILITY
    CXX CUDA_HOME FORCE_CUDA TORCH_CUDA_ARCH_LIST CUDA_VISIBLE_DEVICES CUBLAS_WORKSPACE_CONFIG PYTORCH_CUDA_ALLOC_CONF
    MASTER_ADDR MASTER_PORT WORLD_SIZE RANK LOCAL_RANK NCCL_DEBUG NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME
    SLURM_NNODES SLURM_NTASKS
"""
# What csrc/cpu/instruction_set.cpp asks of the processor, by its names in /proc/cpuinfo.
_AVX2 = {"avx2", "bmi2", "fma"}
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}


def collect_env_info() -> str:
    """The report: one line for each fact, then Detectron2's own report where it can be imported.

    Never raises because of what is missing or broken: its line says so, and what to do.
    """
    rows = [
        ("platform", platform.platform()),
        ("Python", f"{sys.version.split()[0]} ({sys.executable})"),
        ("gs_d2", f"{__version__}, {_commit()} ({_ROOT / 'gs_d2'})"),
        *_extension(),
        ("torch", _imported("torch", "pip install torch torchvision")),
        ("torchvision", _imported("torchvision", "pip install torchvision")),
        ("numpy", _imported("numpy", "pip install numpy")),
        ("detectron2", _detectron2()),
        ("pycocotools", _imported("pycocotools.mask", "pip install pycocotools", distribution="pycocotools")),
        *((name, _installed(name)) for name in _PACKAGES.split()),
        *_processor(),
        ("compiler", _first_line(*(os.environ.get("CXX") or "c++").split(), "--version")),
        *_gpus(),
        *((name, os.environ[name]) for name in _VARIABLES.split() if name in os.environ),
    ]
    width = max(len(name) for name, _ in rows)
    report = "".join(f"{name:<{width}}  {value}\n" for name, value in rows)
    return _without_secrets(report + _detectron2_report())


def _without_secrets(text: str) -> str:
    text = re.sub(r"(\w+://)[^/\s@]+@", r"\1***@", text)
    home = os.path.expanduser("~")
    return re.sub(rf"(?<![\w.-]){re.escape(home)}(?![\w.-])", "~", text) if len(home) > 1 else text


def _commit() -> str:
    if not (_ROOT / ".git").exists():
        return "not a git checkout"
    commit = _first_line("git", "-C", str(_ROOT), "rev-parse", "HEAD")
    changed = _run("git", "-C", str(_ROOT), "status", "--porcelain", "--untracked-files=no")
    return f"commit {commit}" + (" with local changes" if changed else "")


def _extension() -> list[tuple[str, str]]:
    try:
        ops = importlib.import_module("gs_d2.ops")
    except ImportError as error:
        return [("gs_d2._C", str(error))]
    except Exception as error:
        return [("gs_d2._C", f"does not load: {error!r}")]
    import torch

    path = ops._C.__file__
    rows = [("gs_d2._C", path), ("gs_d2._C, CPU", _instruction_set())]
    if not torch._C._dispatch_has_kernel_for_dispatch_key("gs_d2::box_iou", "CUDA"):
        return [*rows, ("gs_d2._C, CUDA", "not built in; to build it: FORCE_CUDA=1 and a CUDA toolkit, see setup.py")]
    listing = _run(_cuda_tool("cuobjdump"), "--list-elf", path)
    archs = sorted(set(re.findall(r"\.sm_(\d+\w?)\.", listing or "")), key=lambda arch: (len(arch), arch))
    return [*rows, ("gs_d2._C, CUDA", f"built for sm {', '.join(archs)}" if archs else "built in (no cuobjdump here)")]


def _instruction_set() -> str:
    """Which of its CPU kernels the extension runs, decided as csrc/cpu/instruction_set.cpp decides."""
    found = re.search(r"^flags\s*:(.*)$", _cpuinfo(), re.MULTILINE)
    flags = set(found[1].split()) if found else set()
    wanted = os.environ.get("GS_D2_CPU_CAPABILITY")
    best = "avx512" if flags >= _AVX512 else "avx2" if flags >= _AVX2 else "baseline"
    chosen = wanted if wanted == "baseline" or (wanted == "avx2" and best != "baseline") else best
    return chosen if chosen == best else f"{chosen} (GS_D2_CPU_CAPABILITY; this processor has {best})"


def _imported(module: str, remedy: str, distribution: str | None = None) -> str:
    """Version and place of a module that is really imported, or why it is not and the remedy."""
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        return f"not installed ({error}); {remedy}"
    except Exception as error:  # a broken binary raises nearly anything, and is what the report is for
        return f"does not import ({error!r}); {remedy}"
    version = _installed(distribution) if distribution else getattr(loaded, "__version__", "version unknown")
    return f"{version} ({os.path.dirname(loaded.__file__)})"


def _installed(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _detectron2() -> str:
    try:
        from gs_d2 import compat
    except ImportError as error:
        return str(error)
    except Exception as error:
        return f"does not import: {error!r}"
    place = compat.detectron2.__file__
    try:
        extension = importlib.util.find_spec("detectron2._C")
        compiled = extension is not None and not str(extension.origin).endswith(".py")
        if compiled:
            importlib.import_module("detectron2._C")
    except Exception as error:
        return f"{compat.detectron2.__version__}, its extension does not load: {error!r} ({place})"
    kind = "official, with its extension" if compiled else "pure Python, without its extension"
    return f"{compat.detectron2.__version__}, {kind} ({os.path.dirname(place)})"


def _detectron2_report() -> str:
    try:
        from detectron2.utils.collect_env import collect_env_info as theirs

        return f"\nDetectron2's own report:\n{theirs()}"
    except ImportError:
        return ""
    except Exception as error:  # theirs fails where an imported package has no version, for instance
        return f"\nDetectron2's own report fails: {error!r}\n"


def cpu_name() -> str:
    model = re.search(r"^model name\s*:\s*(.*)$", _cpuinfo(), re.MULTILINE)
    return model[1] if model else platform.processor() or platform.machine()


def _processor() -> list[tuple[str, str]]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows = [("CPU", cpu_name())]
    rows += [("CPU cores", f"{os.cpu_count()}, of which this process may use {usable}")]
    if "torch" in sys.modules:
        rows += [("torch threads", str(sys.modules["torch"].get_num_threads()))]
    return rows


def _gpus() -> list[tuple[str, str]]:
    driver = _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    rows = [("NVIDIA driver", driver), ("nvcc", _run(_cuda_tool("nvcc"), "--version") or "not found")]
    rows[1] = ("nvcc", rows[1][1].splitlines()[-1])
    torch = sys.modules.get("torch")
    if torch is None:
        return rows
    rows.append(("torch's CUDA", f"{torch.version.cuda or 'none: a CPU build'}, cuDNN {_cudnn(torch)}"))
    if not torch.cuda.is_available():
        return [*rows, ("GPUs", "torch sees none")]
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        rows.append(
            (f"GPU {i}", f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {gpu.total_memory >> 20} MiB")
        )
    return rows


def _cudnn(torch) -> str:
    try:
        return str(torch.backends.cudnn.version() or "none")
    except Exception as error:  # a cuDNN of another version
        return f"does not load ({error})"


def _cuda_tool(name: str) -> str:
    home = os.environ.get("CUDA_HOME")
    inside = os.path.join(home, "bin", name) if home else ""
    return inside if os.path.exists(inside) else name


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return ""


def _run(*command: str) -> str | None:
    """What a command prints, or None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _first_line(*command: str) -> str:
    return (_run(*command) or "not found").splitlines()[0]


if __name__ == "__main__":
    print(collect_env_info(), end="")
