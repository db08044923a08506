"""`python -m gs_d2.collect_env`: what it reports, with everything there and with parts missing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gs_d2 import __version__, collect_env

ROOT = Path(__file__).resolve().parent.parent

HIDE = """
import runpy, sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if any(name == hidden or name.startswith(hidden + ".") for hidden in {hidden}):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hide())
runpy.run_module("gs_d2.collect_env", run_name="__main__")
"""


def report_without(*hidden: str) -> dict[str, str]:
    result = subprocess.run(
        [sys.executable, "-c", HIDE.format(hidden=hidden)], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return rows_of(result.stdout)


def rows_of(report: str) -> dict[str, str]:
    own = report.split("\n\n")[0]
    return dict(re.split(r"\s{2,}", line, maxsplit=1) for line in own.splitlines())


@pytest.fixture(scope="module")
def report():
    return collect_env.collect_env_info()


def test_what_runs_here(report):
    rows = rows_of(report)
    assert rows["gs_d2"].startswith(f"{__version__}, ")
    assert rows["torch"].startswith(f"{torch.__version__} (")
    for name in ("torchvision", "numpy", "pycocotools"):
        assert re.match(r"\d[\w.+]* \(.+\)", rows[name]), rows[name]
    assert re.match(r"\d", rows["fvcore"])
    assert rows["gs_d2._C"].endswith(".so")
    assert rows["gs_d2._C, CPU"].split()[0] in ("baseline", "avx2", "avx512")
    assert int(rows["CPU cores"].split(",")[0]) == os.cpu_count()
    assert rows["torch threads"] == str(torch.get_num_threads())
    if not torch.cuda.is_available():
        assert rows["GPUs"] == "torch sees none"
    assert "Detectron2's own report:\n" in report and "PyTorch built with" in report


def test_the_kind_of_detectron2(report):
    import detectron2

    import detectron2._C as theirs  # isort: skip

    kind = "pure Python" if theirs.__file__.endswith(".py") else "official"
    assert rows_of(report)["detectron2"].startswith(f"{detectron2.__version__}, {kind}, with")


def test_the_commit(report, monkeypatch, tmp_path):
    if (ROOT / ".git").exists():
        head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        assert f", commit {head}" in rows_of(report)["gs_d2"]
    monkeypatch.setattr(collect_env, "_ROOT", tmp_path)
    assert collect_env._commit() == "not a git checkout"


def test_without_detectron2_and_the_extension():
    rows = report_without("detectron2", "gs_d2._C", "pycocotools", "torchvision")
    assert "No module named 'detectron2'" in rows["detectron2"]
    assert "python tools/install_detectron2.py" in rows["detectron2"]
    assert rows["gs_d2._C"].startswith("gs_d2's extension is not built or does not load (")
    assert "pip install --no-build-isolation -e ." in rows["gs_d2._C"]
    assert rows["pycocotools"].endswith("pip install pycocotools")
    assert rows["torchvision"].startswith("not installed (No module named 'torchvision')")
    assert rows["torch"].startswith(torch.__version__)


def test_without_torch():
    rows = report_without("torch", "numpy")
    assert rows["torch"] == "not installed (No module named 'torch'); pip install torch torchvision"
    assert "No module named 'torch'" in rows["gs_d2._C"]
    assert "numpy" in rows and "CPU" in rows and "GPUs" not in rows


def test_what_is_there_but_broken(monkeypatch, tmp_path):
    (tmp_path / "torchvision.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    monkeypatch.delitem(sys.modules, "torchvision")
    monkeypatch.syspath_prepend(tmp_path)
    assert collect_env._imported("torchvision", "do this") == (
        "does not import (OSError('libcudart.so.13: cannot open shared object file')); do this"
    )


def test_only_listed_variables_and_no_secrets(monkeypatch):
    home = os.path.expanduser("~")
    monkeypatch.setenv("DETECTRON2_DATASETS", f"{home}/datasets")
    monkeypatch.setenv("FVCORE_CACHE", "s3://user:pass-word@bucket/cache")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("HF_TOKEN", "hidden-token")
    monkeypatch.setenv("WANDB_API_KEY", "hidden-key")
    monkeypatch.setattr(collect_env, "_detectron2_report", lambda: f"\n{home}x and {home}\n")
    report = collect_env.collect_env_info()
    rows = rows_of(report)
    assert rows["DETECTRON2_DATASETS"] == "~/datasets"
    assert rows["FVCORE_CACHE"] == "s3://***@bucket/cache"
    assert rows["OMP_NUM_THREADS"] == "3"
    assert "hidden" not in report and "pass-word" not in report
    assert report.endswith(f"{home}x and ~\n"), "only the home folder itself is shortened"


@pytest.mark.parametrize(
    ("flags", "wanted", "chosen"),
    [
        (collect_env._AVX512, None, "avx512"),
        (collect_env._AVX512 - {"avx512vl"}, None, "avx2"),
        (collect_env._AVX512 - {"fma"}, None, "baseline"),
        (collect_env._AVX512, "avx2", "avx2 (GS_D2_CPU_CAPABILITY; this processor has avx512)"),
        (collect_env._AVX512, "baseline", "baseline (GS_D2_CPU_CAPABILITY; this processor has avx512)"),
        ({"sse2"}, "avx2", "baseline"),
        (collect_env._AVX2, "avx512", "avx2"),
    ],
)
def test_the_instruction_set(monkeypatch, flags, wanted, chosen):
    monkeypatch.delenv("GS_D2_CPU_CAPABILITY", raising=False)
    if wanted:
        monkeypatch.setenv("GS_D2_CPU_CAPABILITY", wanted)
    monkeypatch.setattr(collect_env, "_cpuinfo", lambda: f"processor\t: 0\nflags\t\t: {' '.join(sorted(flags))}\n")
    assert collect_env._instruction_set() == chosen


def test_the_instruction_set_is_asked_for_as_in_the_extension():
    source = (ROOT / "csrc" / "cpu" / "instruction_set.cpp").read_text()
    assert set(re.findall(r'__builtin_cpu_supports\("(\w+)"\)', source)) == collect_env._AVX512


def test_architectures_of_a_cuda_build(monkeypatch):
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda op, key: True)
    listing = "ELF file 1: _C.1.sm_75.cubin\nELF file 2: _C.2.sm_120.cubin\nELF file 3: _C.3.sm_90.cubin"
    monkeypatch.setattr(collect_env, "_run", lambda *command: listing if "--list-elf" in command else None)
    assert dict(collect_env._extension())["gs_d2._C, CUDA"] == "built for sm 75, 90, 120"
    monkeypatch.setattr(collect_env, "_run", lambda *command: None)
    assert dict(collect_env._extension())["gs_d2._C, CUDA"] == "built in (no cuobjdump here)"
