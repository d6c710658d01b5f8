#!/usr/bin/env bash
# Everything with one command, on 2 CPU cores or on the GPUs of this machine:
#     bash run.sh            the main job: cold start, RL with and without the mask, evaluation
#     bash run.sh play       a minute: the policy in checkpoints/rl plays a few questions
#     bash run.sh scratch    the main job, with the base model before it
#     bash run.sh test       all tests
# It makes .venv if there is none. Stop it with Ctrl-C whenever you like: the same command goes on
# where it was. A stage that is done leaves its minutes in .run/; it is done again if what it has
# made is gone or newer, or if a stage before it was done again. `rm -r .run` begins anew. The
# minutes that it tells before a stage are those of 2 CPU cores.
set -euo pipefail
cd "$(dirname "$0")"
TEST_SETS=(easy.jsonl medium.jsonl hard.jsonl)
seen=""         # the stages so far

say() { printf '\n== %s\n' "$1"; }

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

install() {
    if [ ! -e .venv/installed ] || [ requirements.txt -nt .venv/installed ]; then
        if [ ! -e .venv/bin/python ] || ! is_new_enough .venv/bin/python; then
            local python=${PYTHON:-python3}
            is_new_enough "$python" || {
                echo "run.sh: $python is not Python 3.11 or newer; name one:" \
                    "PYTHON=python3.12 bash run.sh" >&2
                exit 1
            }
            "$python" -m venv --clear .venv
        fi
        say "install: a minute, or more where downloads are slow"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
        touch .venv/installed
    fi
    export PATH="$PWD/.venv/bin:$PATH"
}

# stage NAME FILE WHAT LOOK COMMAND...: run a command that makes FILE, unless it was done before;
# say what it does, and what to look at. Training that was stopped is resumed.
stage() {
    local name=$1 file=$2 what=$3 look=$4 start=$SECONDS mark=.run/$1 other seconds
    shift 4
    case " $seen " in *" $name "*) return ;; esac     # questions are drawn with the instructions
    seen="$seen $name"
    if [ -e "$mark" ] && [ -e "$file" ] && [ ! "$file" -nt "$mark" ]; then
        say "$name: done before"
        return
    fi
    say "$name: $what"
    if [ -e "$mark.started" ]; then
        case "$*" in *sft.py* | *rl.py*) set -- "$@" --resume ;; esac
    fi
    # From now on what other stages have made is out of date, but for those that came before it.
    mkdir -p .run
    for other in .run/*; do
        case " $seen " in *" $(basename "$other" .started) "*) ;; *) rm -f "$other" ;; esac
    done
    rm -f "$mark"
    touch "$mark.started"
    "$@"
    seconds=$((SECONDS - start))
    printf '%d:%02d\n' $((seconds / 60)) $((seconds % 60)) > "$mark.started"
    mv "$mark.started" "$mark"
    say "$name: done in $(cat "$mark"). $look"
}

parallel() {    # on every GPU, or on 2 cores
    local processes
    processes=$(python -c "import torch; print(torch.cuda.device_count() or 2)")
    python -m torch.distributed.run --nproc_per_node="$processes" "$@"
}

play() {
    python build_data.py --train 3 --val 3 --test 4 --scenes 0 --out data/play
    python evaluate.py --data "${TEST_SETS[@]/#/data/play/}" --num_samples 1 --out results/play
    python extras/report.py results/play --data "${TEST_SETS[@]/#/data/play/}" --conversation \
        --out results/play/report.html
    say "open results/play/report.html: every turn with its picture"
}

train_base() {
    stage data data/instruct.jsonl "questions and instructions are drawn, 2 minutes" \
        "See data/instruct.jsonl." python build_data.py
    stage base checkpoints/base/model.safetensors \
        "a stand-in for a pretrained model is trained, 15 minutes" \
        "See checkpoints/base/metrics.jsonl." \
        parallel sft.py --model tiny --data data/instruct.jsonl --out checkpoints/base \
        --batch_size 16 --epochs 2.5 --aggregation response
}

main_job() {
    stage data data/val.jsonl "questions are drawn, 1 minute" "See the pictures in data/images." \
        python build_data.py --scenes 0
    stage cold-start-data data/coldstart.jsonl "a scripted teacher solves the questions, 1 minute" \
        "Read a line of data/coldstart.jsonl." python collect_coldstart.py
    stage cold-start checkpoints/sft/model.safetensors \
        "the base model learns to search, 9 minutes" \
        "See checkpoints/sft/metrics.jsonl." parallel sft.py
    stage rl checkpoints/rl/model.safetensors "RL with the over-turn mask, 5 minutes" \
        "See checkpoints/rl/metrics.jsonl." parallel rl.py
    stage rl-no-mask checkpoints/rl-no-mask/model.safetensors \
        "the same without the mask, 5 minutes" "See checkpoints/rl-no-mask/metrics.jsonl." \
        parallel rl.py --no-overturn_mask --out checkpoints/rl-no-mask
    local run name
    for run in sft rl rl-no-mask; do
        stage "evaluate-$run" "results/$run/table.json" "accuracy over turn budgets, 2 minutes" \
            "See results/$run/table.json." \
            parallel evaluate.py --model "checkpoints/$run" --num_samples 2 --out "results/$run"
    done
    python extras/report.py results/sft results/rl results/rl-no-mask \
        --curves checkpoints/rl/metrics.jsonl checkpoints/rl-no-mask/metrics.jsonl
    say "minutes of each stage (of its last start, if it was stopped)"
    for name in $seen; do echo "$name $(cat ".run/$name")"; done
    say "open results/report.html: tables, curves and conversations"
}

run_tests() {   # in two halves at the same time, one for each core
    local half=(tests/test_rl.py tests/test_sft.py) status=0 output
    output=$(mktemp)
    export OMP_NUM_THREADS=1    # more threads than cores wait for each other
    python -m pytest -q "${half[@]}" > "$output" 2>&1 &
    trap 'kill $! 2> /dev/null || true' EXIT      # also after Ctrl-C
    python -m pytest -q tests "${half[@]/#/--ignore=}" || status=1
    wait $! || status=1
    say "the other half: ${half[*]}"
    cat "$output"
    rm "$output"
    return $status
}

[ $# -le 1 ] || { echo "run.sh: takes one word, or none" >&2; exit 2; }
case "${1:-}" in
"") install; main_job ;;
scratch) install; train_base; main_job ;;
play) install; play ;;
test) install; run_tests ;;
*) echo "run.sh: '$1' is none of play, scratch, test, or nothing" >&2; exit 2 ;;
esac
