"""Start stages without the seconds that their imports take (not collected by pytest). This process
has imported everything and forks itself for each stage. On several processes torchrun's own agent
forks the workers. See Forked in launch.py.

Each line of JSON on stdin is answered by one line on stdout. An object holds the arguments of
start() and starts a stage: the answer is its pid. A pid asks for its exit code: the answer is empty
while it runs.
"""

import gc
import importlib
import json
import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
runpy.run_path(str(ROOT / "extras" / "root.py"))


def run_stage(args):
    """Run a stage, or a script that a test has written. args[0] is its path."""
    from extras import terminal
    sys.argv = args
    path = Path(args[0])
    if path.parent == ROOT:
        terminal.run(importlib.import_module(path.stem).main)
    else:
        runpy.run_path(args[0], run_name="__main__")


def start(args, nproc, nodes, restarts, port, folder, env, out, err):
    """Run a stage in this forked process, with the given folder, variables and output files."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch
    os.chdir(folder)
    os.environ.update(env)
    for descriptor, name in enumerate((os.devnull, out, err)):
        os.dup2(os.open(name, os.O_RDWR), descriptor)
    if nproc * nodes == 1:
        run_stage(args)
        return
    config = LaunchConfig(nodes, nodes, nproc, run_id="test", rdzv_backend="c10d",
                          rdzv_endpoint=f"localhost:{port}", max_restarts=restarts,
                          start_method="fork")
    elastic_launch(config, run_stage)(args)


def main():
    """Import everything, then answer requests until stdin ends."""
    # Imports are here because the worker processes that a data stage spawns import this file.
    for name in ("collect_coldstart", "rl", "torch.distributed.launcher.api"):
        importlib.import_module(name)
    importlib.import_module("support.exact").install()
    gc.freeze()     # otherwise every fork collects all imported objects when it ends
    for line in sys.stdin:
        request = json.loads(line)
        if isinstance(request, int):
            pid, status = os.waitpid(request, os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else ""
        else:
            answer = os.fork()
            if answer == 0:
                start(**request)
                return
        print(answer, flush=True)


if __name__ == "__main__":
    main()
