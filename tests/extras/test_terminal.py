"""Specification of extras/terminal.py: flags and their help, progress, errors, and Ctrl-C."""

import argparse
import errno
import importlib
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tools
from extras import terminal

# ---- Flags --------------------------------------------------------------------------------------


def number_flags(**flags):
    return argparse.Namespace(**flags)


def test_flags_that_are_numbers_are_finite_and_above_0_unless_said_otherwise():
    flags = number_flags(lr=0.1, seed=-1, weight_decay=0, out="x", shard=False, resume=None)
    terminal.check_number_flags(flags, may_be_zero=["weight_decay"], any_number=["seed"])


@pytest.mark.parametrize("flags, message", [
    ({"lr": 0}, "--lr 0 must be a number above 0"),
    ({"lr": -1.5}, "--lr -1.5 must be a number above 0"),
    ({"lr": math.inf}, "--lr inf must be a number above 0"),
    ({"lr": math.nan}, "--lr nan must be a number above 0"),
    ({"weight_decay": -1}, "--weight_decay -1 must be a number of at least 0"),
    ({"weight_decay": math.nan}, "--weight_decay nan must be a number of at least 0"),
])
def test_a_flag_out_of_its_range_is_named(flags, message):
    with pytest.raises(tools.InputError, match=f"^{message}$"):
        terminal.check_number_flags(number_flags(**flags), may_be_zero=["weight_decay"])


class Parsed(Exception):
    """Holds the parser of a script, when it is about to read the command line."""


@pytest.mark.parametrize("script", [
    "build_data", "collect_coldstart", "sft", "rl", "evaluate", "course.assignments",
    "extras.benchmark", "extras.crash", "extras.experiments", "extras.failures", "extras.plan",
    "extras.report"])
def test_help_describes_every_flag_with_its_default(monkeypatch, script):
    """A flag without a value by default says in words what it does then."""
    def stop(parser):
        raise Parsed(parser)

    monkeypatch.setattr("argparse.ArgumentParser.parse_args", stop)
    module = importlib.import_module(script)
    with pytest.raises(Parsed) as parsed:
        if script == "extras.plan":
            module.rl.parse_args(module.DESCRIPTION)
        module.main()
    [parser] = parsed.value.args
    for action in parser._actions:
        text = parser._get_formatter()._expand_help(action)
        assert len(text) > 3 and "%" not in text.replace("in %", ""), action.dest
        assert not re.search(r"None|\[\]|\(\)|Path\(|False", text), text
        has_value = action.nargs != 0 and action.option_strings
        if has_value and not action.required:
            assert text.count("(default") == 1, text
        # SUPPRESS: the parser keeps only what was given, and the help names what it is otherwise.
        is_shown = has_value and action.default is not argparse.SUPPRESS
        if isinstance(action.default, (str, int, float, Path)) and is_shown:
            assert f"(default: {action.default})" in text

# ---- Running a script ---------------------------------------------------------------------------


def end_of_run(monkeypatch, error):
    """Return what a stage that fails with this error gives to sys.exit."""
    def main():
        raise error

    monkeypatch.setattr(sys, "argv", ["/somewhere/rl.py"])
    with pytest.raises(SystemExit) as end:
        terminal.run(main)
    return end.value.code


@pytest.mark.parametrize("error, message", [
    (tools.InputError("--lr 0 must be a number above 0"), "--lr 0 must be a number above 0"),
    (OSError(errno.ENOSPC, "No space left on device"), "No space left on device (while writing); "
     "earlier files are untouched: free the disk or change --out and run again"),
    (PermissionError(errno.EACCES, "Permission denied", "out/x"), "Permission denied (out/x)"),
    (FileExistsError(errno.EEXIST, "File exists", "out"), "File exists (out); a file is where a "
     "folder is needed: change --out"),
], ids=["a user's mistake", "disk full", "no permission", "a file as folder"])
def test_what_a_user_can_cause_is_one_line(monkeypatch, error, message):
    assert end_of_run(monkeypatch, error) == f"rl.py: error: {message}"


NCCL_ERROR = """NCCL error in: ProcessGroupNCCL.cpp:3690, {kind}
{kind}: {meaning}
Last error:
{cause}
"""


def test_only_the_end_of_another_process_is_told_as_such(monkeypatch):
    """With its cause, which NCCL writes on the last line; any other error keeps its traceback."""
    peer_ended = NCCL_ERROR.format(kind="remote error", meaning="a remote process exited",
                                   cause="socketProgress: Connection closed by 10.0.0.7<41>")
    line = end_of_run(monkeypatch, RuntimeError(peer_ended))
    assert "rank 0 stops because another process has ended (NCCL error in" in line
    assert line.endswith("socketProgress: Connection closed by 10.0.0.7<41>)")
    assert "\n" not in line

    wrong_call = NCCL_ERROR.format(kind="invalid usage", meaning="a wrong call",
                                   cause="Duplicate GPU detected: rank 0 and rank 1")
    with pytest.raises(RuntimeError, match="Duplicate GPU"):
        end_of_run(monkeypatch, RuntimeError(wrong_call))


@pytest.mark.parametrize("rank, interrupt, line", [
    (0, KeyboardInterrupt(), "rl.py: interrupted; nothing new was saved\n"),
    (0, KeyboardInterrupt("step 7 is saved"), "rl.py: interrupted; step 7 is saved\n"),
    (1, KeyboardInterrupt("step 7 is saved"), "")],
    ids=["nothing", "something", "another rank"])
def test_ctrl_c_ends_at_once_with_one_line(monkeypatch, capsys, rank, interrupt, line):
    def main():
        raise interrupt

    exit_codes = []
    monkeypatch.setattr(sys, "argv", ["rl.py"])
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr(os, "_exit", exit_codes.append)
    terminal.run(main)
    assert exit_codes == [130]
    assert capsys.readouterr().err == line


PRINTS = """
import sys
from extras import terminal
def main():
    print("\u4e2d", flush=True)
    print("bar", file=sys.stderr, flush=True)
    open(sys.argv[1], "w").write("computed")
terminal.run(main)
"""


@pytest.mark.parametrize("redirect, exit_code, stderr", [
    ("| head -c 0", 0, "bar\n"), ("2>&1 | head -c 0", 0, ""),
    (">&-", 0, "bar\n"), ("2>&-", 0, ""), ("<&- >&- 2>&-", 0, ""),
    (">/dev/full", 1, "bar\n-c: error: what was printed is lost (No space left on device); the "
     "files are written\n"), ("2>/dev/full", 0, ""),
], ids=str)
def test_output_that_cannot_be_printed_costs_nothing_else(tmp_path, redirect, exit_code, stderr):
    command = f'set -o pipefail; "$0" -c "$1" "$2" {redirect}'
    result = subprocess.run(["bash", "-c", command, sys.executable, PRINTS, tmp_path / "out"],
                            cwd=Path(tools.__file__).parent, capture_output=True, text=True,
                            env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (result.returncode, result.stderr) == (exit_code, stderr)
    assert result.stdout.split("\n")[0] in ("\\u4e2d", "")
    assert (tmp_path / "out").read_text() == "computed"


def test_only_rank_0_prints_how_long_a_stage_took(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rl.py"])
    monkeypatch.delenv("RANK", raising=False)
    terminal.run(lambda: None)
    assert capsys.readouterr().out == "rl.py: finished in 0 min 0 s\n"
    monkeypatch.setenv("RANK", "1")
    terminal.run(lambda: None)
    assert capsys.readouterr().out == ""

# ---- Progress -----------------------------------------------------------------------------------


def test_progress_in_a_log_is_a_plain_line_now_and_then(capsys):
    """Standard error is no terminal here: a line at the start, one at the end, none in between."""
    bar = terminal.progress_bar(range(1000), desc="sft")
    for step in bar:
        bar.set_postfix_str(f"loss {step}", refresh=False)
    lines = capsys.readouterr().err.split("\n")
    assert [line.split(" [")[0] for line in lines[:-1]] == ["sft: 0/1000", "sft: 1000/1000"]
    assert lines[1].endswith(", loss 999]") and lines[-1].strip() == ""
