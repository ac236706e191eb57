#!/usr/bin/env bash
# Everything that is to be measured on a GPU, in one go of at most 25 minutes.
#
#   benchmarks/gpu.sh [--dry-run] [FOLDER]        (default benchmarks/results/gpu)
#
# Each stage has its own time limit and log; a stage that ended well is not run again, so that the
# same command goes on where it was stopped. report.md is written whatever happens; the exit code
# is 1 if a stage failed. Needs torch, pandas, matplotlib, pytest, hypothesis; the training step
# transformers too. --dry-run goes through the same stages with tiny shapes on a CPU (DEVICE=cpu).
set -u

DEVICE=${DEVICE:-cuda}
PYTHON=${PYTHON:-python3}
TOTAL=${TOTAL:-1500}
if [ "${1:-}" = "--dry-run" ]; then
    DEVICE=cpu
    shift
fi
here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$here")
out=${1:-$here/results/gpu}
mkdir -p "$out/logs" "$out/done" || exit 1
out=$(cd "$out" && pwd)
cd "$root" || exit 1
export PYTHONPATH="$root/src:$root/tests${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export WHATWHERE_CHOICES="$out/choices.json"

begun=$SECONDS
report_time=40 # kept back for the report
failed=0

# stage NAME SECONDS COMMAND...: run a command unless it ended well before.
stage() {
    local name=$1 limit=$2 code left
    shift 2
    if [ -e "$out/done/$name" ]; then
        echo "== $name: done before"
        return
    fi
    left=$((TOTAL - (SECONDS - begun) - report_time))
    if [ "$left" -lt 5 ]; then
        echo "== $name: no time is left"
        echo "not run: no time was left" >"$out/logs/$name.status"
        failed=1
        return
    fi
    [ "$left" -lt "$limit" ] && limit=$left
    echo "== $name (at most $limit s)"
    timeout --kill-after=5 "$limit" "$@" >"$out/logs/$name.log" 2>&1
    code=$?
    tail -n 12 "$out/logs/$name.log"
    if [ "$code" = 0 ]; then
        echo "ended well" >"$out/logs/$name.status"
        touch "$out/done/$name"
        return
    fi
    if [ "$code" = 124 ] || [ "$code" = 137 ]; then
        echo "stopped after $limit s" >"$out/logs/$name.status"
    else
        echo "failed with code $code" >"$out/logs/$name.status"
    fi
    echo "== $name: $(cat "$out/logs/$name.status")"
    failed=1
}

bench() {
    stage "$1" "$2" "$PYTHON" -m whatwhere.lab.bench "${@:3}" --device "$DEVICE" --output "$out/$1"
}

if [ "$DEVICE" = cpu ]; then
    lengths="128 256" heads64="--heads 2 --batch 1 --no-memory" heads128=$heads64 keys=512 odd=65
    batches=1 model="--model quick --batch 2 --lengths 32" dtype=fp32 rounds=3
    calibrated="--lengths 128 256 --heads 2 --batch 1" small="--heads 2 --batch 1 --no-memory"
else
    lengths="4096 8192 16384" heads64="--heads 32 --kv-heads 32" heads128="--heads 16 --kv-heads 16"
    keys=32768 odd="1000 4097" batches="1 8" model="--model 124m --lengths 1024" dtype=bf16
    rounds=21 calibrated="--lengths 1024 4096 16384" small=""
fi
tests=$(grep -rl --include='*.py' 'mark\.gpu' tests | sort)
"$PYTHON" -c "import pydantic, tyro, rich, transformers" 2>/dev/null ||
    tests=$(echo "$tests" | grep -v '^tests/\(lab\|models\)/') # cannot be imported without

parallel=$("$PYTHON" -c "import xdist" 2>/dev/null && echo "-n 8") # kernels are compiled side by side
[ "$DEVICE" = cpu ] && parallel="-k magnitudes" # interpreted, all take minutes

# The lists above are words on purpose.
# shellcheck disable=SC2086
{
    stage versions 60 "$PYTHON" benchmarks/gpu_report.py --versions "$out/versions.txt"
    stage widths 150 "$PYTHON" benchmarks/gpu_widths.py "$out/widths.csv" --device "$DEVICE"
    stage tests 300 "$PYTHON" -m pytest -m gpu -ra -p no:cacheprovider $tests
    stage kernels 240 "$PYTHON" -m pytest -q -p no:cacheprovider $parallel \
        tests/test_triton.py tests/test_triton_decode.py
    bench attention-64 300 attention --lengths $lengths --head-dim 64 $heads64 --causal \
        --encodings pope --dtype $dtype --rounds $rounds --against peers
    bench attention-128 360 attention --lengths $lengths --head-dim 128 $heads128 --causal \
        --encodings pope pope-id --dtype $dtype --rounds $rounds --against peers
    bench decode 150 decode --lengths $keys --head-dim 64 128 --batch $batches --dtype $dtype \
        --rounds $rounds --against peers
    bench step 200 step $model --dtype $dtype --rounds $rounds
    stage calibrate 240 "$PYTHON" -m whatwhere.lab.bench --calibrate --device "$DEVICE" \
        $calibrated --head-dim 64 128 --dtype $dtype --rounds $rounds
    bench odd 150 attention --lengths $odd $small --causal --full --dtype $dtype --rounds $rounds
}

timeout --kill-after=5 "$report_time" "$PYTHON" benchmarks/gpu_report.py "$out" \
    $([ "$DEVICE" = cpu ] && echo --dry-run) || failed=1
echo "report: $out/report.md"
exit $failed
