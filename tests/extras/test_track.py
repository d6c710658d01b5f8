"""Specification of extras/track.py, with a tracker that writes down how it was called."""

import atexit
import importlib.util
import json
import sys

import pytest

import tools
from extras import track
from support.launch import run_script

RECORDER = """
import json, pathlib
calls = pathlib.Path(__file__).with_name("calls.jsonl")
def record(name, *values):
    with calls.open("a") as file:
        print(json.dumps([name, *values]), file=file)
def init(project, name, config, resume):
    record("init", project, name, config["steps"], resume)
def log(metrics, step):
    record("log", metrics, step)
def finish():
    record("finish")
"""


@pytest.fixture
def no_library(monkeypatch):
    """Neither tracker is installed."""
    monkeypatch.setattr(track.importlib.util, "find_spec", lambda name: None)


@pytest.fixture(params=["trackio", "wandb"])
def recorded(request, monkeypatch, tmp_path):
    """Install a tracker; return a function that reads its calls."""
    (tmp_path / f"{request.param}.py").write_text(RECORDER)
    monkeypatch.syspath_prepend(tmp_path)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(track.importlib.util, "find_spec",
                        lambda name: find_spec(name) if name == request.param else None)
    yield lambda: [json.loads(line) for line in (tmp_path / "calls.jsonl").open()]
    sys.modules.pop(request.param, None)


def command(stage, trained_folder, world, out):
    flags = {"sft.py": ["--data", world / "coldstart.jsonl", "--batch_size", 2],
             "rl.py": ["--data", world / "train.jsonl", "--eval_every", 0, "--prompts_per_step", 1,
                       "--group_size", 2, "--max_new_tokens", 8]}[stage]
    return [stage, "--model", trained_folder, "--out", out, *flags, "--steps", 2]


@pytest.mark.parametrize("stage", ["sft.py", "rl.py"])
def test_every_line_of_the_log_is_mirrored(recorded, stage, trained_folder, world, tmp_path,
                                           monkeypatch):
    """Its numbers at its step, in a run that is named like the folder; finished when Python
    ends."""
    at_exit = []
    monkeypatch.setattr(atexit, "register",
                        lambda function, *args, **kwargs: at_exit.append(function))
    out = tmp_path / "my-run"
    run_script(*command(stage, trained_folder, world, out), "--track", "my-project")
    init, *logs = recorded()
    assert init == ["init", "my-project", "my-run", 2, "never"]
    lines = tools.read_jsonl(out / "metrics.jsonl")
    assert [step for _, _, step in logs] == [1, 2]
    for (_, numbers, _), line in zip(logs, lines, strict=True):
        assert numbers and numbers.items() <= line.items()
        assert all(value is None or isinstance(value, str)
                   for name, value in line.items() if name not in [*numbers, "step"])
    finish, = [function for function in at_exit if function.__name__ == "finish"]
    finish()
    assert recorded()[-1] == ["finish"]


@pytest.mark.parametrize("stage", ["sft.py", "rl.py"])
def test_without_a_tracker_the_flag_is_refused(no_library, stage, trained_folder, world, tmp_path):
    completed = run_script(*command(stage, trained_folder, world, tmp_path / "out"), "--track", "p",
                           check=False)
    assert "error: --track needs trackio or wandb: pip install trackio" in completed.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_is_no_library(monkeypatch, tmp_path):
    """wandb leaves a folder of its name where it runs."""
    for name in ("trackio", "wandb"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(tools.InputError, match="pip install trackio"):
        track.find_library()


def test_without_the_flag_nothing_is_imported(recorded, trained_folder, world, tmp_path):
    run_script(*command("sft.py", trained_folder, world, tmp_path / "out"))
    assert not (tmp_path / "calls.jsonl").exists() and not {"trackio", "wandb"} & set(sys.modules)
