"""Specification of run.sh: which commands it gives, in which order, and that it goes on where it
was stopped. python writes down how it was called and makes the file that the command would make."""

import os
import shutil
import subprocess

import pytest

from root import ROOT

STUB = """#!/usr/bin/env bash
if [ "$1" = -c ]; then [[ "$2" == *torch* ]] && echo 2; exit 0; fi
echo "$*" | sed 's/^-m torch.distributed.run --nproc_per_node=2/torchrun/' >> calls.txt
if [ -e stop ] && [[ "$*" == *"$(cat stop)" ]]; then
    how=$(cat how); rm stop how
    if [ "$how" = kill ]; then kill -9 $PPID; fi
    exit 1
fi
for file in data/val.jsonl data/instruct.jsonl data/coldstart.jsonl checkpoints/{base,sft,rl}/m \\
    checkpoints/rl-no-mask/m results/{sft,rl,rl-no-mask,play}/table.json; do
    mkdir -p "${file%/*}"
done
case "$*" in
*"build_data.py --scenes 0") touch data/val.jsonl ;;
*build_data.py) touch data/val.jsonl data/instruct.jsonl ;;
*collect_coldstart.py) touch data/coldstart.jsonl ;;
*"sft.py --model tiny"*) touch checkpoints/base/model.safetensors ;;
*sft.py*) touch checkpoints/sft/model.safetensors ;;
*"--no-overturn_mask"*) touch checkpoints/rl-no-mask/model.safetensors ;;
*rl.py*) touch checkpoints/rl/model.safetensors ;;
*evaluate.py*) touch "${!#}/table.json" ;;
esac
"""
DATA = "build_data.py --scenes 0"
MAIN_JOB = [
    "collect_coldstart.py", "torchrun sft.py", "torchrun rl.py",
    "torchrun rl.py --no-overturn_mask --out checkpoints/rl-no-mask",
    *(f"torchrun evaluate.py --model checkpoints/{run} --num_samples 2 --out results/{run}"
      for run in ("sft", "rl", "rl-no-mask"))]
REPORT = ("extras/report.py results/sft results/rl results/rl-no-mask --curves "
          "checkpoints/rl/metrics.jsonl checkpoints/rl-no-mask/metrics.jsonl")
BASE = ("torchrun sft.py --model tiny --data data/instruct.jsonl --out checkpoints/base "
        "--batch_size 16 --epochs 2.5 --aggregation response")


@pytest.fixture
def run(tmp_path):
    """Return a function that gives run.sh a word and returns (the completed process, its calls).
    stop_at: a command that fails the first time, or kills run.sh (how: "fail", "kill")."""
    folder = tmp_path / "a folder"
    (folder / ".venv/bin").mkdir(parents=True)
    shutil.copy(ROOT / "run.sh", folder)
    shutil.copy(ROOT / "requirements.txt", folder)
    (folder / ".venv/installed").touch()
    python = folder / ".venv/bin/python"
    python.write_text(STUB)
    python.chmod(0o755)

    def call(*words, stop_at=None, how=None):
        (folder / "calls.txt").write_text("")
        if stop_at:
            (folder / "stop").write_text(stop_at.removeprefix("torchrun "))
            (folder / "how").write_text(how)
        completed = subprocess.run(["bash", folder / "run.sh", *words], capture_output=True,
                                   text=True, cwd="/", env={"PATH": os.environ["PATH"]})
        return completed, (folder / "calls.txt").read_text().splitlines()

    call.folder = folder
    return call


def test_the_main_job(run):
    """Every stage once, and the report each time; minutes and the page's place at the end."""
    completed, calls = run()
    assert completed.returncode == 0, completed.stderr
    assert calls == [DATA, *MAIN_JOB, REPORT]
    assert "== rl: RL with the over-turn mask" in completed.stdout
    assert "\nrl-no-mask 0:0" in completed.stdout and "results/report.html" in completed.stdout
    completed, calls = run()
    assert calls == [REPORT] and "== rl: done before" in completed.stdout


@pytest.mark.parametrize("stage", range(len(MAIN_JOB)))
@pytest.mark.parametrize("how", ["kill", "fail"])
def test_it_goes_on_where_it_was_stopped(run, stage, how):
    """Training is resumed; the other commands go on by themselves."""
    completed, calls = run(stop_at=MAIN_JOB[stage], how=how)
    assert completed.returncode != 0 and calls == [DATA, *MAIN_JOB[:stage + 1]]
    completed, calls = run()
    again = MAIN_JOB[stage]
    if "sft.py" in again or "rl.py" in again:
        again += " --resume"
    assert completed.returncode == 0 and calls == [again, *MAIN_JOB[stage + 1:], REPORT]
    assert run()[1] == [REPORT]


def test_from_scratch(run):
    """Also after the main job: everything is trained anew, from the new base. The other way round
    everything is there."""
    run()
    assert run("scratch")[1] == ["build_data.py", BASE, *MAIN_JOB, REPORT]
    assert run()[1] == [REPORT] == run("scratch")[1]


@pytest.mark.parametrize("file, first", [
    ("data/coldstart.jsonl", 0), ("checkpoints/sft/model.safetensors", 1),
    ("results/rl/table.json", 5)])
@pytest.mark.parametrize("change", ["removed", "newer"])
def test_what_is_gone_or_newer_is_made_again(run, file, first, change):
    """And everything after it: not resumed, but from the start."""
    run()
    path = run.folder / file
    if change == "removed":
        path.unlink()
    else:
        os.utime(path, (2e9, 2e9))
    assert run()[1] == [*MAIN_JOB[first:], REPORT]


def test_anew(run):
    run()
    shutil.rmtree(run.folder / ".run")
    assert run()[1] == [DATA, *MAIN_JOB, REPORT]


def test_play(run):
    _, calls = run("play")
    assert [call.split()[0] for call in calls] == ["build_data.py", "evaluate.py",
                                                   "extras/report.py"]


TESTS = ["-m pytest -q tests --ignore=tests/test_rl.py --ignore=tests/test_sft.py",
         "-m pytest -q tests/test_rl.py tests/test_sft.py"]


def test_tests(run):
    """Two halves at the same time; if one of them fails, so does the command."""
    completed, calls = run("test")
    assert completed.returncode == 0 and sorted(calls) == TESTS
    assert "the other half: tests/test_rl.py tests/test_sft.py" in completed.stdout
    for half in TESTS:
        assert run("test", stop_at=half, how="fail")[0].returncode == 1


@pytest.mark.parametrize("words, message", [
    (["plya"], "run.sh: 'plya' is none of play, scratch, test, or nothing\n"),
    (["play", "--fast"], "run.sh: takes one word, or none\n")])
def test_another_word_is_one_line(run, words, message):
    completed, calls = run(*words)
    assert completed.returncode == 2 and not calls and completed.stderr == message


def test_it_installs_once(run):
    """And again if the requirements are newer. A Python that is there is kept."""
    (run.folder / ".venv/installed").unlink()
    install = "-m pip install --quiet --disable-pip-version-check -r requirements.txt"
    first, *tests = run("test")[1]
    assert first == install and sorted(tests) == TESTS
    assert sorted(run("test")[1]) == TESTS
    os.utime(run.folder / "requirements.txt", (2e9, 2e9))
    assert run("test")[1][0] == install


def test_an_old_python_is_refused_in_one_line(run, monkeypatch, tmp_path):
    shutil.rmtree(run.folder / ".venv")
    (tmp_path / "python3").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python3").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    completed, calls = run("test")
    assert completed.returncode == 1 and not calls
    assert completed.stderr == ("run.sh: python3 is not Python 3.11 or newer; name one: "
                                "PYTHON=python3.12 bash run.sh\n")
