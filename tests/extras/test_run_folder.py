"""Specification of extras/run_folder.py, in its order: what is checked before a run starts, what a
checkpoint says about its run, an earlier run in the same folder. How a run continues is in
test_sft.py, what rl.py says at its end in test_rl.py."""

import json
import multiprocessing
import os
import signal
from types import SimpleNamespace

import pytest

import tools
from extras import run_folder

# ---- Before a run starts ------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["model", "./model", "other/../model", "link", "model/inside"])
def test_the_folder_of_the_model_is_refused_in_every_spelling(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to("model")
    for model in ("model", tmp_path / "model"):
        with pytest.raises(tools.InputError, match="is the folder of --model"):
            run_folder.check_out(run_folder.Path(out), model)


@pytest.mark.parametrize("model", [None, "Qwen/model", "model/inside", "model2"])
def test_other_folders_are_not_refused(tmp_path, monkeypatch, model):
    """Nor those in which the model lies, such as an earlier run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model/inside").mkdir(parents=True)
    (tmp_path / "model2").mkdir()
    run_folder.check_out(run_folder.Path("model"), model)
    run_folder.check_out(run_folder.Path("new"), model)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(tools.InputError, match="--out .*file is a file"):
        run_folder.check_out(tmp_path / "file", None)


def try_to_lock(folder, results):
    """Put the refusal into the queue, or "locked"; then wait to be killed."""
    try:
        with run_folder.lock_folder(folder):
            results.put("locked")
            signal.pause()
    except tools.InputError as error:
        results.put(str(error))


def test_a_second_run_is_refused_until_the_first_has_ended(tmp_path):
    """It ends with its block, or by SIGKILL. A forked child has no part in it."""
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()

    def second_run():
        process = fork.Process(target=try_to_lock, args=(tmp_path / "out", results))
        process.start()
        return process, results.get(timeout=30)

    with run_folder.lock_folder(tmp_path / "out"):
        process, result = second_run()
        process.join()
        assert "another run is writing to" in result and str(tmp_path / "out") in result
        # other ranks of the run that has it
        run_folder.lock_folder(tmp_path / "out", rank=1).__enter__()
    process, result = second_run()
    assert result == "locked"
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    run_folder.lock_folder(tmp_path / "out").close()


# ---- What a checkpoint says about its run -------------------------------------------------------


def args_of(tmp_path, **changed):
    flags = {"data": tmp_path / "rows.jsonl", "lr": 0.1, "seed": 0, "out": tmp_path, "judge": None,
             "save_every": 2, "baseline": 0.5, "freeze_vision": None, **changed}
    return SimpleNamespace(**flags)


@pytest.mark.parametrize("changed, text", [
    ({}, ""), ({"save_every": 9, "out": "elsewhere"}, ""),
    ({"lr": 9.0, "seed": 5}, "--lr 0.1 -> 9.0, --seed 0 -> 5"),
    ({"baseline": "group", "freeze_vision": True},
     "--baseline 0.5 -> group, --freeze_vision None -> True"),
    ({"judge": "http://user:secret@host/v1"}, "--judge False -> True")], ids=str)
def test_flags_that_differ_are_named(tmp_path, changed, text):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    saved = json.loads(json.dumps(run_folder.describe_flags(args_of(tmp_path))))
    current = run_folder.describe_flags(args_of(tmp_path, **changed))
    assert run_folder.changed_flags(saved, current) == text
    assert "secret" not in json.dumps(current)


def test_data_is_compared_by_its_content(tmp_path):
    """One file or several, in whatever folder they are."""
    for name in ("rows.jsonl", "sub/rows.jsonl", "more.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{name != 'more.jsonl'}\n")

    def described(*names):
        return run_folder.describe_flags(SimpleNamespace(data=[str(tmp_path / n) for n in names]))

    saved = described("rows.jsonl")
    assert run_folder.changed_flags(saved, described("sub/rows.jsonl")) == ""
    assert "more.jsonl" in run_folder.changed_flags(saved, described("rows.jsonl", "more.jsonl"))
    (tmp_path / "rows.jsonl").write_text("{}\n")
    assert run_folder.changed_flags(saved, described("rows.jsonl")).count("rows.jsonl") == 2


# ---- The end of a run ---------------------------------------------------------------------------


@pytest.mark.parametrize("norms, words", [
    ([1.0, None, 2.0], None), ([None, 1.0, None], "the last 1 of 3 steps were skipped"),
    ([1.0, None, None], "the last 2 of 3 steps were skipped")])
def test_a_run_whose_last_steps_were_skipped_says_so(tmp_path, capsys, norms, words):
    """An earlier step may have broken the weights that are exported."""
    tools.write_jsonl(tmp_path / "metrics.jsonl", [
        {"step": step, "grad_norm": norm} for step, norm in enumerate(norms, 1)])
    run_folder.report_sft_model(tmp_path)
    first, *others = capsys.readouterr().out.splitlines()
    assert first == f"sft: model written to {tmp_path}"
    assert len(others) == (words is not None)
    assert all(f"sft: {words}, because" in line for line in others)


# ---- An earlier run in the same folder ----------------------------------------------------------


def write_run(out, step=None):
    """Write what a run leaves, with a checkpoint of this step, and a file that is the user's."""
    for name in ("metrics.jsonl", "model.safetensors", "config.json", "rollouts/step_00004.jsonl",
                 "notes.txt"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(str(step))
    if step:
        (out / f"state/step_{step:07d}").mkdir(parents=True)
        (out / f"state/step_{step:07d}/checkpoint.json").write_text("{}")


def test_every_earlier_run_is_kept_whole(tmp_path, capsys):
    """Log, checkpoints and model together; nothing else is moved, nothing is ever deleted."""
    out = tmp_path / "my out"
    for number, step in ((1, 7), (2, 3), (3, None)):
        write_run(out, step)
        run_folder.start_over(out, "sft", False, 40)
        old = out / f"old_run_{number}"
        assert (old / "metrics.jsonl").read_text() == str(step)
        assert (old / "rollouts/step_00004.jsonl").exists() and (old / "config.json").exists()
        assert sorted(path.name for path in out.glob("*")) == sorted(
            ["notes.txt", *(f"old_run_{earlier + 1}" for earlier in range(number))])
        printed = capsys.readouterr().out
        assert "sft: starts at step 0 of 40" in printed
        advice = f"from its step {step}, stop this one and give --resume --out '{old}'"
        assert (advice in printed) == (step is not None)
    run_folder.start_over(out, "sft", True, 40)
    first, *others = capsys.readouterr().out.splitlines()
    assert first == f"sft: --resume finds no checkpoint; starts at step 0 of 40 in {out}"
    assert [line.split("--resume")[1] for line in others] == [
        f" --out '{out}/old_run_{number}'" for number in (1, 2)]
    assert run_folder.checkpoints(out / "old_run_1")[0].name == "step_0000007"


def test_a_state_folder_that_is_a_link_is_kept(tmp_path):
    """A large disk may hold it. A relative link must not break where it is moved to."""
    write_run(tmp_path / "large_disk", 7)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/state").symlink_to("../large_disk/state")
    old_folder = run_folder.set_aside(tmp_path / "out")
    assert run_folder.checkpoints(old_folder)[0].name == "step_0000007"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["old_run_1"]


def test_a_kill_while_a_run_is_set_aside_does_not_divide_it(tmp_path, monkeypatch):
    write_run(tmp_path, 7)
    replace = os.replace

    def killed(source, target):
        if source.name == "rollouts":
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            run_folder.set_aside(tmp_path)
    assert not run_folder.checkpoints(tmp_path)     # --resume does not continue half of it
    assert run_folder.set_aside(tmp_path) == tmp_path / "old_run_1"
    names = {path.name for path in (tmp_path / "old_run_1").iterdir()}
    assert names == {"state", "metrics.jsonl", "rollouts", "model.safetensors", "config.json"}
