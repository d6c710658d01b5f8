#!/usr/bin/env bash
# Everything with one command, on 2 CPU cores or on the GPUs of this machine:
#     bash run.sh            the main job: cold start, RL with and without the mask, evaluation
#     bash run.sh play       a minute: the policy in checkpoints/rl plays a few questions
#     bash run.sh scratch    the main job, with the base model before it
#     bash run.sh test       all tests
# It makes .venv if there is none, and writes into this folder only. Kill it whenever you like: the
# same command goes on where it stopped, since a stage that is done leaves its minutes in
# results/done. Remove that folder to begin anew.
set -euo pipefail
cd "$(dirname "$0")"
TEST_SETS=(easy.jsonl medium.jsonl hard.jsonl)

say() { printf '\n== %s\n' "$1"; }

install() {
    if [ ! -e .venv/installed ]; then
        say "install: a minute, or more where downloads are slow"
        "${PYTHON:-python3}" -m venv .venv
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
        touch .venv/installed
    fi
    source .venv/bin/activate
}

# stage NAME WHAT LOOK COMMAND...: say what comes and run the command, unless it was done before
stage() {
    local name=$1 what=$2 look=$3 start=$SECONDS
    shift 3
    if [ -e "results/done/$name" ]; then
        say "$name: done before"
        return
    fi
    say "$name: $what"
    "$@"
    local seconds=$((SECONDS - start))
    mkdir -p results/done
    printf '%d:%02d\n' $((seconds / 60)) $((seconds % 60)) > "results/done/$name.part"
    mv "results/done/$name.part" "results/done/$name"
    say "$name: done in $(cat "results/done/$name"). $look"
}

parallel() {    # on every GPU, or on 2 cores
    local processes
    processes=$(python -c "import torch; print(torch.cuda.device_count() or 2)")
    torchrun --nproc_per_node="$processes" "$@"
}

play() {
    stage play-data "12 questions are drawn" "They are in data/play." \
        python build_data.py --train 3 --val 3 --test 4 --scenes 0 --out data/play
    python evaluate.py --data "${TEST_SETS[@]/#/data/play/}" --num_samples 1 --out results/play
    python extras/report.py results/play --data "${TEST_SETS[@]/#/data/play/}" --conversation \
        --out results/play.html
    say "open results/play.html: every turn with its picture"
}

main_job() {    # $1: flags of build_data.py
    stage cold-start-data "a scripted teacher solves the questions" \
        "Read a line of data/coldstart.jsonl." python collect_coldstart.py
    stage cold-start "the base model learns to search" "See checkpoints/sft/metrics.jsonl." \
        parallel sft.py --resume
    stage rl "RL with the over-turn mask" \
        "See its curves: python extras/report.py --curves checkpoints/rl/metrics.jsonl" \
        parallel rl.py --resume
    stage rl-no-mask "the same without the mask" "See checkpoints/rl-no-mask/metrics.jsonl." \
        parallel rl.py --no-overturn_mask --out checkpoints/rl-no-mask --resume
    local run
    for run in sft rl rl-no-mask; do
        stage "evaluate-$run" "accuracy over turn budgets" "See results/$run/table.json." \
            parallel evaluate.py --model "checkpoints/$run" --num_samples 2 --out "results/$run"
    done
    python extras/report.py results/sft results/rl results/rl-no-mask \
        --curves checkpoints/rl/metrics.jsonl checkpoints/rl-no-mask/metrics.jsonl
    say "minutes of each stage (of the last start, if it was killed)"
    (cd results/done && grep "" *)
    say "open results/report.html: tables, curves and conversations"
}

case "${1:-main}" in
main) install
    stage data "questions are drawn" "See the pictures in data/images." \
        python build_data.py --scenes 0
    main_job ;;
scratch) install
    stage data-scratch "questions and instructions are drawn" "See data/instruct.jsonl." \
        python build_data.py
    stage base "a stand-in for a pretrained model is trained" "See checkpoints/base." \
        parallel sft.py --model tiny --data data/instruct.jsonl --out checkpoints/base \
        --batch_size 16 --epochs 2.5 --aggregation response --resume
    main_job ;;
play) install; play ;;
test) install; python -m pytest -q tests ;;
*) echo "run.sh: '$1' is none of play, scratch, test, or nothing" >&2; exit 2 ;;
esac
