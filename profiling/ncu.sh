#!/usr/bin/env bash
# One fused op at a named shape under Nsight Compute: its counters, and where they put it under the roofline.
#
#     profiling/ncu.sh OP [SHAPE]
#
# OP is flow_step, flow_logprob or grpo_loss; SHAPE one of `flowgrove bench ops` (flux_720) or ROWSxELEMENTS.
# DTYPE=bf16     of the velocity: bf16 or fp32
# BACKEND=cuda   or triton
# OUT=ncu        the folder for the report (.ncu-rep)
# PYTHON=python  the interpreter that has Flowgrove
# NCU_OPTIONS    more options of ncu, like --set=full
#
# Only kernels inside the op's NVTX range are measured, so neither its inputs nor what warms it up.
set -euo pipefail

fail() { echo "$1" >&2; exit 2; }

[ $# -ge 1 ] && [ $# -le 2 ] && [ "${1#-}" = "$1" ] || fail "usage: profiling/ncu.sh OP [SHAPE]"
command -v ncu >/dev/null || fail "ncu is not on PATH: install Nsight Compute, or add its folder to PATH"
op=$1 shape=${2:-flux_720} dtype=${DTYPE:-bf16} backend=${BACKEND:-cuda} out=${OUT:-ncu} python=${PYTHON:-python}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
driver=("$here/ncu_op.py" "$op" --shape "$shape" --dtype "$dtype" --backend "$backend")
"$python" "${driver[@]}" --check
mkdir -p "$out"
report="$out/${op}_${shape}_${dtype}_$backend"

# shellcheck disable=SC2086 # NCU_OPTIONS are words
ncu --nvtx --nvtx-include "flowgrove@$op/" --kernel-name-base function \
    --section SpeedOfLight --section SpeedOfLight_RooflineChart --section MemoryWorkloadAnalysis \
    --section LaunchStats --section Occupancy \
    --metrics gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed \
    --force-overwrite --export "$report" ${NCU_OPTIONS:-} "$python" "${driver[@]}"
ncu --import "$report.ncu-rep" --page details
echo "$report.ncu-rep opens in Nsight Compute's window, with the roofline chart"
