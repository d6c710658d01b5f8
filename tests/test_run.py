"""Specification of run.sh: which commands it gives, in which order, and that it goes on where it
was killed. python and torchrun write down how they were called, and do nothing else."""

import os
import shutil
import subprocess

import pytest

from root import ROOT

STUB = """#!/usr/bin/env bash
[ "$1" = -c ] && { echo 2; exit; }
echo "$(basename "$0") $*" >> calls.txt
if [ -e kill ] && [[ "$*" == *"$(cat kill)"* ]]; then rm kill; kill -9 $PPID; fi
if [ -e fail ] && [[ "$*" == *"$(cat fail)"* ]]; then rm fail; echo "rl.py: error: no"; exit 1; fi
exit 0
"""
DATA = "python build_data.py --scenes 0"
TRAIN = "torchrun --nproc_per_node=2"
MAIN_JOB = [
    "python collect_coldstart.py", f"{TRAIN} sft.py --resume", f"{TRAIN} rl.py --resume",
    f"{TRAIN} rl.py --no-overturn_mask --out checkpoints/rl-no-mask --resume",
    *(f"{TRAIN} evaluate.py --model checkpoints/{run} --num_samples 2 --out results/{run}"
      for run in ("sft", "rl", "rl-no-mask"))]
REPORT = ("python extras/report.py results/sft results/rl results/rl-no-mask --curves "
          "checkpoints/rl/metrics.jsonl checkpoints/rl-no-mask/metrics.jsonl")


@pytest.fixture
def run(tmp_path):
    """Return a function that gives run.sh a word and returns its (exit status, output, calls)."""
    shutil.copy(ROOT / "run.sh", tmp_path)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/installed").touch()
    (tmp_path / ".venv/bin/activate").write_text('PATH="$PWD/.venv/bin:$PATH"')
    for name in ("python", "torchrun"):
        path = tmp_path / ".venv/bin" / name
        path.write_text(STUB)
        path.chmod(0o755)

    def call(*words):
        (tmp_path / "calls.txt").write_text("")
        completed = subprocess.run(["bash", tmp_path / "run.sh", *words], capture_output=True,
                                   text=True, cwd="/", env={"PATH": os.environ["PATH"]})
        return completed, (tmp_path / "calls.txt").read_text().splitlines()

    return call


def test_the_main_job(run):
    """Every stage once, and the report each time; minutes and the page's place at the end."""
    completed, calls = run()
    assert completed.returncode == 0 and calls == [DATA, *MAIN_JOB, REPORT]
    assert "== rl: RL with the over-turn mask" in completed.stdout
    assert "rl-no-mask:0:00" in completed.stdout and "results/report.html" in completed.stdout
    completed, calls = run()
    assert calls == [REPORT] and "== rl: done before" in completed.stdout


@pytest.mark.parametrize("stage", range(len(MAIN_JOB)))
@pytest.mark.parametrize("how", ["kill", "fail"])
def test_it_goes_on_where_it_was_killed_or_failed(run, tmp_path, stage, how):
    call = MAIN_JOB[stage].removeprefix("python ").removeprefix(f"{TRAIN} ")
    (tmp_path / how).write_text(call)
    completed, calls = run()
    assert completed.returncode != 0 and calls == [DATA, *MAIN_JOB[:stage + 1]]
    completed, calls = run()
    assert completed.returncode == 0 and calls == [*MAIN_JOB[stage:], REPORT]


def test_from_scratch(run):
    _, calls = run("scratch")
    base = (f"{TRAIN} sft.py --model tiny --data data/instruct.jsonl --out checkpoints/base "
            "--batch_size 16 --epochs 2.5 --aggregation response --resume")
    assert calls == ["python build_data.py", base, *MAIN_JOB, REPORT]


def test_play(run):
    """The questions are drawn once and played each time."""
    _, first = run("play")
    _, second = run("play")
    assert [call.split()[1] for call in first] == ["build_data.py", "evaluate.py",
                                                   "extras/report.py"]
    assert second == first[1:]


def test_tests(run):
    assert run("test")[1] == ["python -m pytest -q tests"]


def test_another_word_is_one_line(run):
    completed, calls = run("plya")
    assert completed.returncode == 2 and not calls
    assert completed.stderr == "run.sh: 'plya' is none of play, scratch, test, or nothing\n"


def test_it_installs_once(run, tmp_path, monkeypatch):
    """Into .venv. The stub of python3 makes no folder, so nothing else is run."""
    (tmp_path / ".venv/installed").unlink()
    (tmp_path / "bin").mkdir()
    shutil.copy(tmp_path / ".venv/bin/python", tmp_path / "bin/python3")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    _, calls = run("test")
    assert calls == ["python3 -m venv .venv", "python -m pip install --quiet "
                     "--disable-pip-version-check -r requirements.txt",
                     "python -m pytest -q tests"]
    assert run("test")[1] == calls[2:]
