"""Starts stages without the seconds that their imports take (not collected by pytest): this process
has imported everything, and forks itself for each; on several processes torchrun's own agent forks
the workers. See Forked of conftest.py.

A line of JSON on stdin is answered by a line on stdout. An object, the arguments of start(), starts
a stage: the answer is its pid. A pid asks for its exit code: the answer is empty while it runs.
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


def work(args):
    """Run a stage, or a test's own script."""
    import tools
    sys.argv, path = args, Path(args[0])
    if path.parent == ROOT:
        tools.run(importlib.import_module(path.stem).main)
    else:
        runpy.run_path(args[0], run_name="__main__")


def start(args, nproc, nodes, restarts, port, folder, env, out, err):
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch
    os.chdir(folder)
    os.environ.update(env)
    for fd, name in enumerate((os.devnull, out, err)):
        os.dup2(os.open(name, os.O_RDWR), fd)
    if nproc * nodes == 1:
        return work(args)
    config = LaunchConfig(nodes, nodes, nproc, run_id="test", rdzv_backend="c10d",
                          rdzv_endpoint=f"localhost:{port}", max_restarts=restarts,
                          start_method="fork")
    elastic_launch(config, work)(args)


def main():
    # not above: the workers that a data stage spawns import this file
    for name in ("collect_coldstart", "rl", "support.exact", "torch.distributed.launcher.api"):
        importlib.import_module(name)
    gc.freeze()     # else every fork tidies up after all imports when it ends
    for line in sys.stdin:
        asked = json.loads(line)
        if isinstance(asked, int):
            ended, status = os.waitpid(asked, os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if ended else ""
        else:
            answer = os.fork()
            if answer == 0:
                return start(**asked)
        print(answer, flush=True)


if __name__ == "__main__":
    main()
