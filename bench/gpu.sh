#!/usr/bin/env bash
# Everything that needs a GPU, in one command, on a machine without a network: builds the extension in place, checks it,
# times it. Made for one Hopper GPU; each part ends within ten minutes.
#
#   bash bench/gpu.sh OUTDIR [--part checks|timings|all] [--revision ID]
#
# checks   bench/probe.cu (what the machine can do), every case of tests/cases.py on the GPU against the reference,
#          compute-sanitizer, the machine code, tests marked gpu; OUTDIR/checks.json
# timings  samplers and their peers (bench/gpu.py timings), training layers (bench/layers.py);
#          OUTDIR/<date>-<revision>-<device>.json, .md, .png and OUTDIR/layers-*
# OUTDIR/gpu-PART.log has what every step said. A step that fails, or takes longer than it may, does not stop the others.
# The last lines say how each ended. Exit status: 0, 1 if a step failed, 2 if nothing can run here. A step that does not
# apply here (no compute-sanitizer, say) is NOT RUN, which is no failure, and is said.
set -uo pipefail

part=all revision='' out=''
while (($#)); do
  case $1 in
    --part) part=${2:-}; shift 2 || exit 2 ;;
    --revision) revision=${2:-}; shift 2 || exit 2 ;;
    -*) echo "gpu.sh: unknown option $1" >&2; exit 2 ;;
    *) [[ -z $out ]] || { echo "gpu.sh: one OUTDIR, not also $1" >&2; exit 2; }; out=$1; shift ;;
  esac
done
if [[ -z $out || ! $part =~ ^(checks|timings|all)$ ]]; then
  echo "usage: bash bench/gpu.sh OUTDIR [--part checks|timings|all] [--revision ID]" >&2
  exit 2
fi
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
export PATH=$PATH:/usr/local/cuda/bin:/usr/local/cuda/compute-sanitizer
export PYTHONUNBUFFERED=1 PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1

work=$(mktemp -d)
log=$out/gpu-$part.log
: >"$log"
finish() { jobs -p | xargs -r kill 2>/dev/null; rm -rf "$work"; }
trap finish EXIT
export TORCHINDUCTOR_CACHE_DIR=$work/inductor TRITON_CACHE_DIR=$work/triton

PART_SECONDS=560 # of one part: within ten minutes, whatever its steps do
NOT_RUN=3        # exit status of a step that does not apply here
failed=0

note() { # NAME RESULT SECONDS REMARK
  printf '%s\t%s\t%s\t%s\n' "$@" >>"$work/steps"
  printf '%-18s %-9s %4s s  %s\n' "$@"
}

# step NAME SECONDS COMMAND...: runs it for at most so long, and within what is left of the part.
step() {
  local name=$1 limit=$2 left=$((deadline - SECONDS)) began=$SECONDS status remark=''
  shift 2
  ((limit <= left)) || limit=$left
  if ((limit < 5)); then
    note "$name" 'TIMED OUT' 0 'no time was left'
    return 1
  fi
  timeout --kill-after=5 "$limit" "$@" >"$work/$name.log" 2>&1 </dev/null
  status=$?
  { printf '\n==== %s (status %s, %s s): %s\n' "$name" "$status" $((SECONDS - began)) "$*"; tail -c 1000000 "$work/$name.log"; } >>"$log"
  remark=$(grep -av '^[[:space:]]*$' "$work/$name.log" | tail -n 1 | tr '\t' ' ' | cut -c 1-100)
  case $status in
    0) note "$name" ok $((SECONDS - began)) '' ;;
    "$NOT_RUN") note "$name" 'NOT RUN' $((SECONDS - began)) "$remark" ;;
    124 | 137) note "$name" 'TIMED OUT' $((SECONDS - began)) "$remark" ;;
    *) note "$name" FAILED $((SECONDS - began)) "$remark" ;;
  esac
  return "$status"
}

build() {
  python3 -m pip install -q --no-build-isolation --no-deps --no-index -e . ||
    { echo 'pip cannot install here; building in place'; python3 setup.py build_ext --inplace; } || return 1
  python3 -c 'from fastgen.backends.cpu import native; assert native().has_cuda, "built without CUDA: nvcc was not found"'
}

probe() {
  nvcc -std=c++17 -O3 -gencode=arch=compute_90a,code=sm_90a bench/probe.cu -o "$work/probe" && "$work/probe" "$work/probe.json"
}

# Without torch's caching allocator every tensor is an allocation of its own, whose end the tool can see.
sanitize() { # TOOL
  command -v compute-sanitizer || { echo 'compute-sanitizer is not installed'; return "$NOT_RUN"; }
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --target-processes all --error-exitcode 9 --print-limit 20 \
    python3 bench/gpu_small.py >"$work/$1.txt" 2>&1
  local status=$?
  cat "$work/$1.txt"
  if grep -q 'Device not supported' "$work/$1.txt"; then
    echo 'compute-sanitizer: this device is not supported here'
    return "$NOT_RUN"
  fi
  return "$status"
}

# torch.compile's kernels, made ahead while the GPU is idle: found again when they are timed. Its figures are not used.
cache() {
  timeout --kill-after=5 140 python3 bench/gpu.py contenders compile --seconds 140 --out "$work/cache.jsonl" \
    --config wavenet-nv wavenet-mol pixelcnnpp-cifar && return
  echo 'not all was compiled ahead'
  return "$NOT_RUN"
}

pytests() { # ARGUMENTS...: none selected is no failure
  python3 -m pytest -q -p no:cacheprovider "$@"
  local status=$?
  ((status == 5)) && return "$NOT_RUN"
  return "$status"
}
export -f build probe sanitize cache pytests
export work NOT_RUN

run_checks() {
  step build 300 bash -c build &
  local building=$!
  step probe 120 bash -c probe
  wait "$building"
  step cases 200 python3 bench/gpu.py cases --out "$work/cases.json" --seconds 180
  step calls 90 python3 bench/gpu.py calls --out "$work/calls.json"
  local tool
  for tool in memcheck synccheck racecheck initcheck; do step "$tool" 100 bash -c "sanitize $tool"; done
  step machine-code 90 bash -c "pytests tests/test_team.py -k 'spill or tensor_cores'"
  step gpu-tests 90 bash -c 'pytests -m gpu tests'
  python3 bench/gpu_report.py gather "$work" "$out"
}

run_timings() {
  local layers=150 samplers # seconds; the layers get what the samplers leave, too
  step compiler-cache 150 bash -c cache &
  local caching=$!
  [[ $part == all ]] || step build 300 bash -c build
  wait "$caching"
  samplers=$((deadline - SECONDS - layers))
  step timings "$samplers" python3 bench/gpu.py timings --out "$out" --seconds $((samplers - 30)) --revision "$revision"
  step layers $((deadline - SECONDS)) python3 bench/layers.py --out "$out"
  grep -a '^|' "$work/timings.log" | head -n 70
}

python3 bench/gpu.py machine --out "$work/machine.json" --revision "$revision" || exit 2
deadline=$((SECONDS + PART_SECONDS))
if [[ $part != timings ]]; then run_checks; fi
deadline=$((SECONDS + PART_SECONDS))
if [[ $part != checks ]]; then run_timings; fi

echo
echo 'step               result    time'
while IFS=$'\t' read -r name result seconds remark; do
  printf '%-18s %-9s %4s s  %s\n' "$name" "$result" "$seconds" "$remark"
  [[ $result == FAILED || $result == 'TIMED OUT' ]] && failed=1
done <"$work/steps"
exit "$failed"
