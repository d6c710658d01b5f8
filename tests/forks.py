"""Starts stages without the seconds that their imports take (not collected by pytest): this process
has imported everything, and forks itself for each; on several processes torchrun's own agent forks
the workers.

A line of JSON on stdin starts one, {"args": [...], "nproc": N, "out": FILE, "err": FILE}; a line on
stdout is its exit code, when it has ended.
"""

import json
import os
import runpy
import sys
from pathlib import Path

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import collect_coldstart
import rl


def work(args):
    sys.argv = args
    runpy.run_path(args[0], run_name="__main__")


def start(args, nproc, out, err):
    for fd, name in enumerate((os.devnull, out, err)):
        os.dup2(os.open(name, os.O_RDWR), fd)
    if nproc == 1:
        return work(args)
    config = LaunchConfig(1, 1, nproc, run_id="test", rdzv_backend="c10d", max_restarts=0,
                          rdzv_endpoint="localhost:0", start_method="fork")
    elastic_launch(config, work)(args)


def main():
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            return start(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
