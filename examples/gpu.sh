#!/usr/bin/env bash
# Everything that only a GPU can show, one step after the other; about a quarter of an hour on one H200.
#   examples/gpu.sh IMAGES OUT [STEP ...]     IMAGES holds train/CLASS/*.jpg and val/CLASS/*.jpg, 32 x 32
# Steps, all unless some are named: tests operator rank10 batches latency throughput reading savings several. What each prints
# goes to OUT/STEP.log, its figures to OUT/STEP.json, of savings to OUT/savings. A step that fails or takes too long does not
# stop the others; the exit status is then 1. `python` is that of the environment growkit is installed in.
set -uo pipefail
[ $# -ge 2 ] || { sed -n '2,6s/^# //p' "$0" >&2; exit 2; }
[ -d "$1/train" ] || { echo "$1: no folder train/ in it; give a folder of images" >&2; exit 2; }
images=$(realpath "$1") root=$(realpath "$(dirname "$0")/..")
mkdir -p "$2" && out=$(realpath "$2")
shift 2
steps=("$@")
[ ${#steps[@]} -gt 0 ] || steps=(tests operator rank10 batches latency throughput reading savings several)
gpus=$(python -c 'import torch; print(max(torch.cuda.device_count(), 2 * (not torch.cuda.is_available())))')
benchmarks=$root/examples/benchmarks failed=0

step() {  # NAME SECONDS COMMAND ...
  local began=$SECONDS status=0
  timeout "$2" "${@:3}" >"$out/$1.log" 2>&1 || status=$?
  [ $status -eq 0 ] || failed=1
  echo "$1: exit $status after $((SECONDS - began)) s, $out/$1.log"
}

cd "$root" || exit 1
for name in "${steps[@]}"; do
  figures=(--out "$out/$name.json")
  case $name in
    tests)
      mapfile -t files < <(grep -rlw mark.gpu tests --include '*.py')  # others may need what is not installed
      step tests 400 python -m pytest -m gpu "${files[@]}" ;;
    operator) step operator 300 python "$benchmarks/operator_cost.py" --ranks 1,4 --rounds 8 "${figures[@]}" ;;
    rank10) step rank10 200 python "$benchmarks/operator_cost.py" --ranks 10 --rounds 2 "${figures[@]}" ;;
    batches)
      step batches 300 python "$benchmarks/operator_cost.py" --ranks 1,4 --rounds 4 --grad-accum-steps 4 "${figures[@]}" ;;
    latency)
      step latency 200 python "$benchmarks/latency.py" --provider cuda --seconds 8 --compiled "${figures[@]}" ;;
    throughput)
      step throughput 300 python "$benchmarks/throughput.py" --data "$images" --batch-size 256 --workers 12 \
        --rounds 3 --with cache-device,cache-ram,compile,cuda-graphs "${figures[@]}" ;;
    reading)
      step reading 200 python "$benchmarks/throughput.py" --data "$images" --batch-size 256 --workers 12 \
        --rounds 3 --read-only --aa rand-m9-mstd0.5 --reprob 0.25 "${figures[@]}" ;;
    savings)
      step savings 600 python "$benchmarks/savings.py" --data "$images" --out "$out/savings" --results "$out" \
        --pairs width --epochs 10 --seeds 2 --jobs 3 ;;
    several)
      if [ "$gpus" -lt 2 ]; then echo "several: needs two GPUs"; continue; fi
      step several 300 python -m torch.distributed.run --standalone --nproc-per-node "$gpus" \
        "$benchmarks/several_processes.py" --rounds 8 "${figures[@]}" ;;
    *) echo "$name: no such step" >&2; exit 2 ;;
  esac
done
exit $failed
