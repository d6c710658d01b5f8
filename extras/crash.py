"""Kill training at random moments and see that nothing changes: ten SIGKILLs a case.

For sft.py and rl.py, on one and on two processes, whole and sharded: one run without interruption,
and one that is killed again and again (during rollouts, updates, saves) and resumed. Their weights
must be the same, bit for bit.

    python extras/crash.py                 all cases, ten kills each
    python extras/crash.py --kills 2 rl    fewer, one stage

The functions that start, end and kill stages are used by tests, too.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
STAGES = ["sft", "rl"]


# ---- Processes ----------------------------------------------------------------------------------


def restore_ctrl_c():
    """Let Ctrl-C end this process. A shell makes what it starts in the background ignore Ctrl-C,
    and the children of these processes inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def launch(args, nproc=1, env=None):
    """Start a stage as a user would, on one process or under torchrun, and return the process. env:
    more environment variables."""
    launcher = [sys.executable]
    if nproc > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={nproc}",
                     "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(env or {})}
    return subprocess.Popen(
        [*launcher, str(ROOT / args[0]), *map(str, args[1:])], stdout=subprocess.PIPE, text=True,
        stderr=subprocess.PIPE, preexec_fn=restore_ctrl_c, env=environment)


def finish(process, timeout=600):
    """Wait for the end of a process and return (exit code, stdout, stderr)."""
    stdout, stderr = process.communicate(timeout=timeout)
    return process.returncode, stdout, stderr


def processes(pid):
    """Return the ids of a process and of all that it has started, itself first. torchrun puts its
    workers into sessions of their own, so that a signal to its group does not reach them."""
    pids = [pid]
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text().split():
            pids += processes(int(child))
    return pids


def kill(process):
    """Send SIGKILL to a stage and to all of its processes."""
    for pid in processes(process.pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.communicate(timeout=60)


def wait_until(process, reached):
    """Wait until reached() is true while a stage runs. The stage must not end before."""
    while not reached():
        assert process.poll() is None, process.communicate()[1][-2000:]
        time.sleep(0.01)


# ---- One case -----------------------------------------------------------------------------------


def wait_for_a_step(process, log, start_time):
    """Wait until a stage has logged a step since start_time, or has ended."""
    while process.poll() is None:
        if log.exists() and log.stat().st_mtime > start_time and log.stat().st_size > 0:
            return
        time.sleep(0.02)


def run_killed(args, nproc, out, kills, span, seed=0, launch=launch):
    """Run a stage with --resume, killing it `kills` times, each time up to `span` seconds after it
    has logged a step; then let it finish. Return how many kills hit a stage that still had steps to
    do."""
    rng = random.Random(seed)
    log = Path(out) / "metrics.jsonl"
    num_steps = args[args.index("--steps") + 1]
    num_hits = 0
    for _ in range(kills):
        start_time = time.time()
        process = launch([*args, "--out", out, "--resume"], nproc)
        wait_for_a_step(process, log, start_time)
        time.sleep(rng.uniform(0, span))
        # it may have finished, but must not have failed
        assert process.poll() in (None, 0), finish(process)[2][-2000:]
        kill(process)
        if log.read_bytes().count(b"\n") < num_steps:
            num_hits += 1
    run_to_the_end([*args, "--out", out, "--resume"], nproc, launch)
    return num_hits


def run_to_the_end(args, nproc=1, launch=launch):
    """Run a stage; it must not fail."""
    exit_code, _, stderr = finish(launch(args, nproc))
    assert exit_code == 0, stderr[-2000:]


def same_weights(folder, other_folder):
    """Return whether the models of two folders are the same, bit for bit."""
    weights = load_file(Path(folder) / "model.safetensors")
    other = load_file(Path(other_folder) / "model.safetensors")
    return (weights.keys() == other.keys()
            and all(torch.equal(weights[name], other[name]) for name in weights))


# ---- The command --------------------------------------------------------------------------------


def prepare(folder):
    """Make a small data set, its trajectories, and a policy to start from."""
    data = folder / "data"
    run_to_the_end(["build_data.py", "--train", 12, "--val", 1, "--test", 1, "--scenes", 1,
                    "--out", data])
    run_to_the_end(["collect_coldstart.py", "--data", data / "train.jsonl",
                    "--out", data / "coldstart.jsonl"])
    run_to_the_end(["sft.py", "--model", "tiny", "--data", data / "coldstart.jsonl",
                    "--steps", 40, "--lr", 3e-3, "--out", folder / "policy"])


def main():
    """Run every case whole and killed, and print whether the weights are the same. Exit with 1 if
    some are not."""
    parser = argparse.ArgumentParser(
        description="Kill training at random moments; the weights must not change.")
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="sft or rl (default: both)")
    parser.add_argument("--kills", type=int, default=10,
                        help="kills of every case (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0,
                        help="moments of the kills (default: %(default)s)")
    args = parser.parse_args()
    if not set(args.stages) <= set(STAGES):
        parser.error(f"stages are {' and '.join(STAGES)}")
    if args.kills < 1:
        parser.error(f"--kills {args.kills} must be at least 1")

    # 1. what every case starts from
    folder = Path(tempfile.mkdtemp())
    prepare(folder)
    commands = {
        "sft": ["sft.py", "--model", folder / "policy", "--data", folder / "data/coldstart.jsonl",
                "--batch_size", 4, "--steps", 15 * args.kills, "--save_every", 1],
        "rl": ["rl.py", "--model", folder / "policy", "--data", folder / "data/train.jsonl",
               "--prompts_per_step", 4, "--group_size", 4, "--max_new_tokens", 64,
               "--max_num_seqs", 8, "--eval_every", 0, "--steps", 4 * args.kills,
               "--save_every", 1]}

    # 2. every case whole, then killed and resumed
    failed = False
    for stage in args.stages or STAGES:
        for nproc, flags in ((1, []), (2, []), (2, ["--shard_optimizer"])):
            name = "_".join([stage, str(nproc), *flags])
            start_time = time.time()
            command = [*commands[stage], *flags]
            run_to_the_end([*command, "--out", folder / f"{name}_whole"], nproc)
            num_hits = run_killed(command, nproc, folder / name, args.kills, 3.0, args.seed)
            same = same_weights(folder / name, folder / f"{name}_whole")
            failed = failed or not same
            print(f"{name}: {num_hits} kills of a running stage, "
                  f"weights {'the same, bit for bit' if same else 'DIFFER'} "
                  f"({time.time() - start_time:.0f} s)", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
