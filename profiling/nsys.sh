#!/usr/bin/env bash
# One iteration of a recipe under Nsight Systems, and the table of its phases.
#
#     profiling/nsys.sh RECIPE [--set KEY=VALUE …]
#
# ITERATION=2    the iteration that is captured, counted from 0; those before it warm up
# OUT=nsys       the folder for the capture (.nsys-rep, .sqlite) and for the run
# PYTHON=python  the interpreter that has Flowgrove
# NSYS_OPTIONS   more options of `nsys profile`, like --gpu-metrics-devices=all
#
# The NVTX range "iteration N" of domain flowgrove begins and ends the capture. Graph nodes are traced one by one, so
# that a replayed CUDA graph shows its kernels; that slows graphs down, as every trace of many launches does.
set -euo pipefail

fail() { echo "$1" >&2; exit 2; }

[ $# -ge 1 ] && [ "${1#-}" = "$1" ] || fail "usage: profiling/nsys.sh RECIPE [--set KEY=VALUE …]"
command -v nsys >/dev/null || fail "nsys is not on PATH: install Nsight Systems, or add its bin folder to PATH"
iteration=${ITERATION:-2} out=${OUT:-nsys} python=${PYTHON:-python}
case $iteration in '' | *[!0-9]*) fail "ITERATION is '$iteration': write a whole number from 0 up" ;; esac
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
recipe=$1
shift
mkdir -p "$out"
capture="$out/iteration_$iteration"

# shellcheck disable=SC2086 # NSYS_OPTIONS are words
nsys profile \
    --trace=cuda,nvtx,osrt,cudnn,cublas --cuda-graph-trace=node --cuda-memory-usage=true --sample=none --cpuctxsw=none \
    --capture-range=nvtx --nvtx-capture="iteration $iteration@flowgrove" --capture-range-end=stop \
    --force-overwrite=true --output="$capture" ${NSYS_OPTIONS:-} \
    "$python" -m flowgrove train "$recipe" "$@" --resume never --out "$out/run_$(date +%Y%m%d_%H%M%S)" \
    --set run.iterations=$((iteration + 1)) --set run.eval_every=0 --set run.checkpoint_every=0
nsys export --type=sqlite --force-overwrite=true --output="$capture.sqlite" "$capture.nsys-rep"
"$python" "$here/nsys_report.py" "$capture.sqlite" --csv "$capture.csv"
echo "$capture.nsys-rep opens in Nsight Systems' window"
