"""Run stages from tests: in this process, forked from a warm process (see forks.py), or under
torchrun's agent."""

import contextlib
import functools
import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from extras import crash, terminal

ROOT = Path(__file__).resolve().parent.parent.parent


def raise_interrupt(exit_code):
    """Raise KeyboardInterrupt. This replaces os._exit, with which a stage answers Ctrl-C and which
    would end pytest without a message."""
    raise KeyboardInterrupt


def run_here(script, *args):
    """Run a stage in this process, on one thread, and return a CompletedProcess. It does what a new
    process would do, without the seconds that imports take."""
    stdout = io.StringIO()
    stderr = io.StringIO()
    exit_code = 0
    num_threads = torch.get_num_threads()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    torch.set_num_threads(1)
    with (pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(stdout),
          contextlib.redirect_stderr(stderr)):
        patch.setattr("sys.argv", [script, *map(str, args)])
        patch.setattr("os._exit", raise_interrupt)
        try:
            terminal.run(importlib.import_module(Path(script).stem).main)
        except SystemExit as end:
            # Python prints a text code to stderr and exits with 1
            exit_code = end.code if isinstance(end.code, int) else 1
            print(end.code, file=stderr)
        finally:
            torch.set_num_threads(num_threads)
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return subprocess.CompletedProcess(args, exit_code, stdout.getvalue(), stderr.getvalue())


def refused(script, *flags):
    """Return the one line with which a stage refuses these flags, without its name. Python prints
    the line on stderr and exits with code 1."""
    beginning = f"{script}: error: "
    with (pytest.MonkeyPatch.context() as patch,
          pytest.raises(SystemExit, match=re.escape(beginning)) as stop):
        patch.setattr("sys.argv", [script, *map(str, flags)])
        terminal.run(importlib.import_module(Path(script).stem).main)
    return stop.value.code.removeprefix(beginning)


@functools.cache
def forks():
    """Return the process that forks stages (forks.py). It is started once and ends with this
    process."""
    return subprocess.Popen([sys.executable, str(ROOT / "tests" / "support" / "forks.py")],
                            text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


class Forked:
    """A running stage with the methods of a Popen that tests use.

    It starts sooner than with crash.launch. nproc: processes of each node; nodes: how many agents
    meet at `port` of this machine; restarts: how often torchrun's agent starts the workers again
    after one has died; env: more environment variables.
    """

    def __init__(self, args, nproc=1, nodes=1, restarts=0, port=0, env=None):
        self.stdout_file = tempfile.NamedTemporaryFile("r")
        self.stderr_file = tempfile.NamedTemporaryFile("r")
        self.returncode = None
        self.pid = int(self.ask({
            "args": [str(ROOT / args[0]), *map(str, args[1:])], "nproc": nproc, "nodes": nodes,
            "restarts": restarts, "port": port, "folder": os.getcwd(), "env": env or {},
            "out": self.stdout_file.name, "err": self.stderr_file.name}))

    def ask(self, request):
        """Send one line of JSON to the forking process and return its answer."""
        print(json.dumps(request), file=forks().stdin, flush=True)
        return forks().stdout.readline().strip()

    def poll(self):
        """Return the exit code, or None while the stage runs."""
        if self.returncode is None:
            answer = self.ask(self.pid)
            self.returncode = int(answer) if answer else None
        return self.returncode

    def communicate(self, timeout=60):
        """Wait for the end and return what the stage printed to stdout and to stderr."""
        deadline = time.time() + timeout
        while self.poll() is None:
            if time.time() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.01)
        return [self.stdout_file.read(), self.stderr_file.read()]


def run_script(*args, nproc=1, env=None, check=True, timeout=300):
    """Run a stage as a user would and return a CompletedProcess. One process and no variables: in
    this process. Otherwise: forked, on several processes under torchrun's agent."""
    if nproc == 1 and env is None and args[0] in ("sft.py", "rl.py", "evaluate.py"):
        return checked(run_here(*args), check)
    process = Forked(args, nproc, env=env)
    try:
        completed = subprocess.CompletedProcess(args, *crash.finish(process, timeout))
    except subprocess.TimeoutExpired:
        crash.kill(process)
        raise
    return checked(completed, check)


def checked(completed, check=True):
    """Return a CompletedProcess. Raise AssertionError with the end of its output if it failed and
    `check` is true."""
    if check and completed.returncode != 0:
        raise AssertionError(f"{completed.args} exited with {completed.returncode}\n"
                             f"{completed.stdout[-2000:]}\n{completed.stderr[-4000:]}")
    return completed
