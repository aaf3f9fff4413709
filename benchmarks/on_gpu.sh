#!/usr/bin/env bash
# Tests and measures on a machine with GPUs: one part a call, each bounded in time, each with a few files in FOLDER.
# Usage: benchmarks/on_gpu.sh PART FOLDER [arguments for the part's program]
#        benchmarks/on_gpu.sh list
# COMMIT=abc1234 is written into the results where there is no git, PYTHON=python3.12 takes another Python, LIMIT=200 gives
# every program of a part at most so many seconds, DRY_RUN=1 only prints.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
python=${PYTHON:-python3}
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

list() {
    cat <<'END'
In the order of their worth; seconds at most; files beside PART.log.
  tests       560  the kernels' tests on a GPU, all of them, whatever fails  tests_gpu.xml tests_kernels.xml
  attention   590  forward, backward, memory against dense attention         attention.json attention.png
  two         590  several GPUs that share a sequence, against one           two_gpus.json two_gpus.png
  overlay     480  losses of the quickstart, Triton against PyTorch          overlay.png triton.jsonl torch.jsonl
  sanitize    560  the kernels under compute-sanitizer, two of its tools
  decode      240  one step of one layer, 4k to 1M tokens of context         decode.json decode.png
  generation  420  one token of a whole model, 4k to 1M tokens of context    generation.json
  quality     590  what the selection is worth at equal budget               gpu.jsonl and a report
END
}

at_most() {
    echo $((${LIMIT:-$1} < $1 ? LIMIT : $1))
}

# bounded SECONDS COMMAND...: interrupted when time is up, so that pytest still tells what failed.
bounded() {
    local seconds
    seconds=$(at_most "$1")
    shift
    if [[ ${DRY_RUN:-0} == 1 ]]; then
        printf '%q ' timeout "$seconds" "$@"
        echo
        return
    fi
    timeout --signal=INT --kill-after=20 "$seconds" "$@" 2>&1 | tee -a "$log"
}

# measure SECONDS PROGRAM [arguments]: the program begins nothing new in the last quarter, and writes its report then.
measure() {
    local seconds=$1 program=$2
    shift 2
    bounded "$seconds" "$python" "benchmarks/$program.py" --out "$out" ${COMMIT:+--commit "$COMMIT"} \
        --seconds $(($(at_most "$seconds") * 3 / 4)) "$@"
}

tests() {
    local common=(-p no:cacheprovider --timeout 200 --tb short --durations 10 --continue-on-collection-errors) failed=0
    bounded 270 "$python" -m pytest -m gpu tests "${common[@]}" --junitxml "$out/tests_gpu.xml" "$@" || failed=1
    # Compiling is most of the time, and many processes compile at once; what needs much memory has run above, alone.
    if "$python" -c 'import xdist' 2>/dev/null; then common+=(-n 6 --dist worksteal); fi
    bounded 290 "$python" -m pytest -m 'not gpu and not slow' tests/kernels/test_gpu_{attention,decode,operator,selection}.py \
        "${common[@]}" --junitxml "$out/tests_kernels.xml" "$@" || failed=1
    return "$failed"
}

overlay() {
    local scratch backend failed=0
    scratch=$(mktemp -d)
    for backend in triton torch; do
        bounded 220 "$python" -m sparsek_dist train configs/quickstart.yaml run.root="$scratch" run.name="$backend" \
            attention.backend="$backend" train.precision=float32 parallel.sequence_degree=1 train.steps=200 \
            train.observe_every=0 train.save_every=200 data.cache="$scratch/tokens" "$@" || failed=1
        cp "$scratch/$backend/metrics.jsonl" "$out/$backend.jsonl" 2>/dev/null
    done
    bounded 40 "$python" benchmarks/overlay.py "$scratch/triton" "$scratch/torch" --out "$out/overlay.png" || failed=1
    rm -rf "$scratch"
    return "$failed"
}

sanitize() {
    local tool failed=0
    # With torch's own pool of memory, reads beyond a tensor would stay inside what was allocated.
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    for tool in memcheck racecheck; do
        bounded 280 compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" benchmarks/sanitize.py "$@" || failed=1
    done
    return "$failed"
}

quality() {
    bounded 550 "$python" -m benchmarks.quality --scale gpu --out "$out" --seconds $(($(at_most 550) - 20)) "$@" || return
    bounded 40 "$python" -m benchmarks.quality --scale gpu --out "$out" --report
}

part=${1:-}
case $part in
    list)
        list
        exit
        ;;
    tests | attention | two | overlay | sanitize | decode | generation | quality) ;;
    *)
        sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" >&2
        exit 2
        ;;
esac
if (($# < 2)); then
    echo "error: $part needs a FOLDER for its results" >&2
    exit 2
fi
mkdir -p "$2" && out=$(cd "$2" && pwd) || exit 2
log=$out/$part.log
shift 2
[[ ${DRY_RUN:-0} == 1 ]] || : >"$log"
case $part in
    tests) tests "$@" ;;
    attention) measure 590 attention "$@" ;;
    two) measure 590 two_gpus "$@" ;;
    overlay) overlay "$@" ;;
    sanitize) sanitize "$@" ;;
    decode) measure 240 decode "$@" ;;
    generation) measure 420 generation --device cuda --dense "$@" ;;
    quality) quality "$@" ;;
esac
status=$?
if ((status == 0)); then echo "$part: done"; else echo "$part: FAILED, exit status $status"; fi
exit "$status"
