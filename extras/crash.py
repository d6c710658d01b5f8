"""Kill training at random moments and see that nothing changes: ten SIGKILLs a case (not collected
by pytest).

For sft.py and rl.py, on one and on two processes, whole and sharded: one run without interruption,
and one that is killed again and again (during rollouts, updates, saves) and resumed. Their weights
must be the same, bit for bit.

    python extras/crash.py                 all cases, ten kills each
    python extras/crash.py --kills 2 rl    fewer, one stage
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


def heed_ctrl_c():
    """A shell makes what it starts in the background ignore Ctrl-C, and their children too: not
    this one."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def launch(args, nproc=1, env=None):
    """Start a stage as a user would, on one process or under torchrun; env: more variables. Returns
    the process."""
    launcher = [sys.executable] if nproc == 1 else [
        sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={nproc}",
        "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    return subprocess.Popen(
        [*launcher, str(ROOT / args[0]), *map(str, args[1:])], stdout=subprocess.PIPE, text=True,
        stderr=subprocess.PIPE, preexec_fn=heed_ctrl_c,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(env or {})})


def finish(process, timeout=600):
    """Wait for the end; returns (exit code, what it printed to stdout, to stderr)."""
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def processes(pid):
    """A process and all that it has started, itself first. torchrun puts its workers into sessions
    of their own, so that a signal to its group does not reach them."""
    children = [path.read_text().split()
                for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return [pid, *(found for part in children for child in part
                   for found in processes(int(child)))]


def kill(process):
    """SIGKILL to the stage and to all of its processes."""
    for pid in processes(process.pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.communicate(timeout=60)


def wait_until(process, reached):
    """Wait while a stage runs until reached() is true; it must not end before."""
    while not reached():
        assert process.poll() is None, process.communicate()[1][-2000:]
        time.sleep(0.01)


def run_killed(args, nproc, out, kills, span, seed=0, launch=launch):
    """Run a stage with --resume, killing it `kills` times, each time up to `span` seconds after it
    has logged a step; then let it finish. Returns how many kills hit a stage that still had steps
    to do."""
    rng, hits, log, steps = (random.Random(seed), 0, Path(out) / "metrics.jsonl",
                             args[args.index("--steps") + 1])
    for _ in range(kills):
        process, before = launch([*args, "--out", out, "--resume"], nproc), time.time()
        while process.poll() is None and not (
                log.exists() and log.stat().st_mtime > before and log.stat().st_size > 0):
            time.sleep(0.02)
        time.sleep(rng.uniform(0, span))
        # it may be done, but must not have failed
        assert process.poll() in (None, 0), finish(process)[2][-2000:]
        kill(process)
        hits += log.read_bytes().count(b"\n") < steps
    code, _, err = finish(launch([*args, "--out", out, "--resume"], nproc))
    assert code == 0, err[-2000:]
    return hits


def same_weights(a, b):
    a, b = (load_file(Path(folder) / "model.safetensors") for folder in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def main():
    parser = argparse.ArgumentParser(
        description="Kill training at random moments; the weights must not change.")
    parser.add_argument("stages", nargs="*", choices=["sft", "rl", []], default=[],
                        help="which stages (default: both)")
    parser.add_argument("--kills", type=int, default=10, help="kills a case")
    parser.add_argument("--seed", type=int, default=0, help="moments of the kills")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    data, policy = folder / "data", folder / "policy"
    for command in (["build_data.py", "--train", 12, "--val", 1, "--test", 1, "--scenes", 1,
                     "--out", data],
                    ["collect_coldstart.py", "--data", data / "train.jsonl",
                     "--out", data / "coldstart.jsonl"],
                    ["sft.py", "--model", "tiny", "--data", data / "coldstart.jsonl",
                     "--steps", 40, "--lr", 3e-3, "--out", policy]):
        code, _, err = finish(launch(command, 1))
        assert code == 0, err[-2000:]
    cases = {"sft": ["sft.py", "--model", policy, "--data", data / "coldstart.jsonl",
                     "--batch_size", 4, "--steps", 15 * args.kills, "--save_every", 1],
             "rl": ["rl.py", "--model", policy, "--data", data / "train.jsonl",
                    "--prompts_per_step", 4, "--group_size", 4, "--max_new_tokens", 64, "--max_num_seqs", 8,
                    "--eval_every", 0, "--steps", 4 * args.kills, "--save_every", 1]}
    failed = False
    for stage in args.stages or ["sft", "rl"]:
        for nproc, flags in ((1, []), (2, []), (2, ["--shard_optimizer"])):
            name = f"{stage} {nproc} {' '.join(flags)}".strip().replace(" ", "_")
            start = time.time()
            code, _, err = finish(
                launch([*cases[stage], *flags, "--out", folder / f"{name}_whole"], nproc))
            assert code == 0, err[-2000:]
            hits = run_killed([*cases[stage], *flags], nproc, folder / name, args.kills, 3.0,
                              args.seed)
            same = same_weights(folder / name, folder / f"{name}_whole")
            failed |= not same
            print(f"{name}: {hits} kills of a running stage, "
                  f"weights {'the same, bit for bit' if same else 'DIFFER'} "
                  f"({time.time() - start:.0f} s)", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
