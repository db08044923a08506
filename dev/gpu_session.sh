#!/usr/bin/env bash
# Everything that only a GPU can show, for a machine lent for minutes and without a network: builds the extension with
# CUDA kernels, runs the GPU tests, and the fuzz driver of tests/cuda_on_cpu on the device, plain and under
# compute-sanitizer. Logs go to $OUT (default output/gpu_session); the last line says what failed.
#
#   OUT=logs dev/gpu_session.sh                 all steps, under ten minutes
#   OUT=logs dev/gpu_session.sh build tests     some of: build tests fuzz memcheck racecheck initcheck synccheck
set -uo pipefail
cd "$(dirname "$0")/.."

OUT=${OUT:-output/gpu_session}
PYTHON=${PYTHON:-python3}
ARCH=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1)
OPS="box_iou two_pass_match group_subsample"
mkdir -p "$OUT"
failed=""

# step NAME SECONDS COMMAND...: runs it with a limit, keeps its output and goes on after a failure.
step() {
  local name=$1 limit=$2
  shift 2
  echo "== $name"
  local begin=$SECONDS
  if timeout "$limit" "$@" > "$OUT/$name.log" 2>&1; then
    echo "   passed in $((SECONDS - begin)) s: $(grep -v '^$' "$OUT/$name.log" | tail -n 1)"
  else
    echo "   FAILED after $((SECONDS - begin)) s, see $name.log"
    tail -n 15 "$OUT/$name.log"
    failed="$failed $name"
  fi
}

describe() {
  nvidia-smi
  "$PYTHON" -c 'import torch; print(torch.__version__, torch.version.cuda, torch.cuda.get_device_name())'
  nvcc --version
}

build() {
  FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=$ARCH "$PYTHON" setup.py build_ext --inplace
}

# The fuzz driver with the real kernels in the place of the shim.
build_fuzz() {
  nvcc -std=c++17 -O2 --fmad=false -Xcompiler -ffp-contract=off -lineinfo -arch="sm_${ARCH/./}" \
    csrc/cuda/*.cu csrc/cpu/*.cpp tests/cuda_on_cpu/fuzz.cpp -o "$FUZZ"
}

# Only the ops' tests: the others need Detectron2. Without pytest there, take wheels/ along.
tests() {
  "$PYTHON" -c 'import pytest, hypothesis' 2> /dev/null ||
    "$PYTHON" -m pip install --quiet --no-index --find-links wheels pytest hypothesis || return 1
  PYTHONPATH=$PWD "$PYTHON" -m pytest -q -m gpu tests/ops --durations=10 -p no:cacheprovider
}

# fuzz CASES COMMAND...: the driver for each op, after COMMAND.
fuzz() {
  local cases=$1 op
  shift
  for op in $OPS; do "$@" "$FUZZ" "$op" "$cases" 1 || return 1; done
}

FUZZ=$(mktemp -d)/fuzz
export -f describe build build_fuzz tests fuzz
export ARCH FUZZ OPS PYTHON

steps=${*:-build tests fuzz memcheck racecheck initcheck synccheck}
step machine 60 bash -c describe
step fuzz_build 180 bash -c build_fuzz
for name in $steps; do
  case $name in
    build) step build 240 bash -c build ;;
    tests) step tests 300 bash -c tests ;;
    fuzz) step fuzz 120 bash -c 'fuzz 1000' ;;
    memcheck | racecheck | initcheck | synccheck)
      step "$name" 90 bash -c "fuzz 15 compute-sanitizer --tool $name --error-exitcode 9" ;;
    *) echo "no step is called $name" && failed="$failed $name" ;;
  esac
done
rm -r "$(dirname "$FUZZ")"
[ -z "$failed" ] && echo "all passed" || { echo "failed:$failed"; exit 1; }
