#!/usr/bin/env bash
# Everything that only a GPU can show, in one go, for a machine lent for half an hour and without a network. A step that
# fails or takes too long does not keep the next from running. One folder holds the results: a log for each step, what
# the steps write, and summary.md.
#
#   dev/gpu_session.sh --output results              all steps, at most 30 minutes
#   dev/gpu_session.sh --only build,tests            some; --skip leaves some out
#   dev/gpu_session.sh --rehearse                    on a CPU, in small sizes, without what needs a GPU
#
# PYTHON is the interpreter with torch and Detectron2 (default: python3).
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

# Name, seconds at most, and what it is.
STEPS="
machine      30  commit, machine, card, driver and versions
build       180  the extension, with CUDA kernels for this card
fuzz_build   90  the fuzz driver of tests/cuda_on_cpu, with the real kernels
tests       240  pytest -m gpu
fuzz         60  the fuzz driver
memcheck     45  the fuzz driver under compute-sanitizer, and the next three
racecheck    45
initcheck    45
synccheck    45
ops         180  benchmarks/ops.py: Detectron2, torchvision and torch.compile
detector    240  benchmarks/detector.py: Detectron2 and torch.compile
faces        45  generates images to train on
train       240  200 iterations of wider_gs.yaml, and an evaluation
profile      75  where the time of its training step goes
amp         120  iterations in float16 with a scaled loss
tiles        90  a pyramid whose largest level does not fit into memory
"
TOTAL=1800
NEED_A_GPU="build fuzz_build fuzz memcheck racecheck initcheck synccheck"

usage() {
  sed -n '2,11s/^# \{0,1\}//p' "$0"
  echo "Steps:$STEPS"
}

refuse() {
  echo "gpu_session.sh: error: $1" >&2
  exit 2
}

names() { awk 'NF { print $1 }' <<< "$STEPS"; }
limit_of() { awk -v name="$1" '$1 == name { print $2 }' <<< "$STEPS"; }
is_among() { [[ " $2 " == *" $1 "* ]]; }

OUT=${OUT:-output/gpu_session} only="" skip="" REHEARSE=""
while [ $# -gt 0 ]; do
  case $1 in
    --output | --only | --skip)
      [ $# -gt 1 ] || refuse "$1 needs a value"
      case $1 in
        --output) OUT=$2 ;;
        --only) only="$only ${2//,/ }" ;;
        --skip) skip="$skip ${2//,/ }" ;;
      esac
      shift 2
      ;;
    --rehearse) REHEARSE=1 && shift ;;
    --help | -h) usage && exit ;;
    *) refuse "no argument is called $1; --help lists them" ;;
  esac
done
for name in $only $skip; do
  is_among "$name" "$(names | tr '\n' ' ')" || refuse "no step is called $name; --help lists them"
done
mkdir -p "$OUT" || refuse "--output $OUT cannot be made a folder"
OUT=$(cd "$OUT" && pwd)

PYTHON=${PYTHON:-python3}
DEVICE=cuda ARCH="" SLOWER=1
if [ -n "$REHEARSE" ]; then
  DEVICE=cpu SLOWER=3  # a CPU compiles more slowly, too
else
  ARCH=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2> /dev/null | head -n 1)
fi
DATA=$OUT/datasets
FUZZ=$OUT/fuzz
PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

# The steps. Each runs in a shell of its own, with what is exported below.

machine() {
  echo "commit $(git rev-parse HEAD 2> /dev/null || echo unknown)$(git diff --quiet HEAD 2> /dev/null || echo ', changed')"
  date -u +"%Y-%m-%d %H:%M UTC"
  uname -a
  if [ "$DEVICE" = cuda ]; then nvidia-smi && { nvcc --version || true; } || return 1; fi
  "$PYTHON" -m gs_d2.collect_env
}

build() { FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=$ARCH "$PYTHON" setup.py build_ext --inplace; }

fuzz_build() {
  nvcc -std=c++17 -O2 --fmad=false -Xcompiler -ffp-contract=off -lineinfo -arch="sm_${ARCH/./}" \
    csrc/cuda/*.cu csrc/cpu/*.cpp tests/cuda_on_cpu/fuzz.cpp -o "$FUZZ"
}

# Without Detectron2 the ops' tests only. Without pytest there, take wheels/ along.
tests() {
  local folder=tests arguments=(--durations=10)
  "$PYTHON" -c 'import pytest, hypothesis' 2> /dev/null ||
    "$PYTHON" -m pip install --quiet --no-index --find-links wheels pytest hypothesis || return 1
  "$PYTHON" -c 'import detectron2' 2> /dev/null || folder=tests/ops
  if [ -n "$REHEARSE" ]; then arguments=(--collect-only) folder=tests/ops; fi
  "$PYTHON" -m pytest -q -m gpu "$folder" -p no:cacheprovider "${arguments[@]}"
}

# fuzz_after CASES COMMAND...: the driver for each op, after COMMAND.
fuzz_after() {
  local cases=$1 op
  shift
  for op in box_iou two_pass_match group_subsample; do "$@" "$FUZZ" "$op" "$cases" 1 || return 1; done
}

fuzz() { fuzz_after 1000; }
sanitize() { fuzz_after 15 compute-sanitizer --tool "$1" --error-exitcode 9; }
memcheck() { sanitize memcheck; }
racecheck() { sanitize racecheck; }
initcheck() { sanitize initcheck; }
synccheck() { sanitize synccheck; }

ops() {
  local cases=(W1 W2-100 C1 R1-50k) arguments=()
  if [ -n "$REHEARSE" ]; then cases=(R1-2k) arguments=(--quick); fi
  "$PYTHON" benchmarks/ops.py --device "$DEVICE" --output "$OUT" "${arguments[@]}" --cases "${cases[@]}"
}

detector() {
  local arguments=(--compile --repeats 20)
  if [ -n "$REHEARSE" ]; then arguments=(--quick); fi
  "$PYTHON" benchmarks/detector.py --device "$DEVICE" --output "$OUT" "${arguments[@]}"
}

faces() {
  local train=64 val=8
  if [ -n "$REHEARSE" ]; then train=4 val=2; fi
  "$PYTHON" tools/synthesize_faces.py --output "$DATA" --train "$train" --val "$val"
}

# run_training FOLDER ITERATIONS OPTS...: of wider_gs.yaml from random weights, with BatchNorm in the place of FrozenBN,
# which has to be trained somewhere to normalise anything.
run_training() {
  local folder=$1 iterations=$2
  shift 2
  small_network
  DETECTRON2_DATASETS=$DATA "$PYTHON" train_net.py --config-file configs/wider_gs.yaml \
    MODEL.DEVICE "$DEVICE" MODEL.WEIGHTS "" MODEL.RESNETS.NORM BN MODEL.BACKBONE.FREEZE_AT 0 \
    SOLVER.REFERENCE_WORLD_SIZE 0 SOLVER.IMS_PER_BATCH 2 SOLVER.BASE_LR 0.001 SOLVER.MAX_ITER "$iterations" \
    SOLVER.STEPS "()" SOLVER.CHECKPOINT_PERIOD 100000 SOLVER.GS.KEEP_BEST "" TEST.EVAL_PERIOD 0 TEST.GS.PYRAMID False \
    OUTPUT_DIR "$folder" "${SMALL[@]}" "$@"
}

small_network() {
  SMALL=()
  if [ -n "$REHEARSE" ]; then
    SMALL=(MODEL.RESNETS.DEPTH 18 MODEL.RESNETS.RES2_OUT_CHANNELS 64 MODEL.ROI_BOX_HEAD.FC_DIM 16 INPUT.GS.SCALES "[0.5]"
      INPUT.GS.MAX_CROP_SIZE 96 DATALOADER.NUM_WORKERS 0 MODEL.RPN.PRE_NMS_TOPK_TRAIN 500 MODEL.RPN.PRE_NMS_TOPK_TEST 500)
  fi
}

train() {
  local iterations=200
  if [ -n "$REHEARSE" ]; then iterations=2; fi
  run_training "$OUT/train" "$iterations"
}

profile() {
  local sizes=()
  small_network
  if [ -n "$REHEARSE" ]; then sizes=(--size 128 128 --faces 5 --steps 1); fi
  "$PYTHON" benchmarks/profile_step.py --config-file configs/wider_gs.yaml --device "$DEVICE" "${sizes[@]}" "${SMALL[@]}"
}

# A CPU has no GradScaler; there bfloat16 stands in for it.
amp() {
  if [ -n "$REHEARSE" ]; then
    run_training "$OUT/amp" 2 MODEL.GS.AUTOCAST_DTYPE bfloat16
  else
    run_training "$OUT/amp" 50 SOLVER.AMP.ENABLED True
  fi
}

tiles() {
  local arguments=(--copies 5)
  if [ -n "$REHEARSE" ]; then arguments=(--copies 3); fi
  "$PYTHON" dev/provoke_out_of_memory.py --device "$DEVICE" "${arguments[@]}"
}

# What runs them.

# Runs a step with its limit, or less if less of the total is left, and keeps its output.
step() {
  local name=$1 limit begin=$SECONDS status code
  limit=$((SLOWER * $(limit_of "$name")))
  if [ $((SLOWER * TOTAL - SECONDS)) -lt "$limit" ]; then limit=$((SLOWER * TOTAL - SECONDS)); fi
  if [ "$limit" -le 0 ]; then
    status="no time left"
  elif [ -n "$REHEARSE" ] && is_among "$name" "$NEED_A_GPU"; then
    status="skipped: needs a GPU"
  else
    echo "== $name (at most $limit s)"
    timeout --kill-after 10 "$limit" bash -c "$name" > "$OUT/$name.log" 2>&1
    code=$?
    case $code in
      0) status=passed ;;
      124 | 137) status="FAILED: over $limit s" ;;
      *) status="FAILED: exit code $code" ;;
    esac
    if [ "$status" != passed ]; then tail -n 15 "$OUT/$name.log"; fi
    echo "   $status, $((SECONDS - begin)) s"
  fi
  case $status in FAILED* | no*) failed="$failed $name" ;; esac
  echo "| $name | $status | $((SECONDS - begin)) |" >> "$OUT/summary.md"
}

export ARCH DATA DEVICE FUZZ OUT PYTHON PYTHONPATH REHEARSE
# shellcheck disable=SC2046  # a list of names
export -f $(names) fuzz_after run_training sanitize small_network

failed=""
{
  echo "# A GPU session, $(date -u +%Y-%m-%d)${REHEARSE:+, rehearsed on a CPU}"
  echo
  echo "Commit $(git rev-parse HEAD 2> /dev/null || echo unknown). machine.log says on what."
  echo
  echo "| step | status | seconds |"
  echo "|---|---|---|"
} > "$OUT/summary.md"
for name in $(names); do
  if [ -n "$only" ] && ! is_among "$name" "$only"; then continue; fi
  if is_among "$name" "$skip"; then continue; fi
  step "$name"
done
rm -rf "$FUZZ"
cat "$OUT/summary.md"
if [ -n "$failed" ]; then echo "failed:$failed" && exit 1; fi
echo "all passed"
