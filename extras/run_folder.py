"""The folder of a training run, --out: what is checked before a run starts in it, what it keeps,
and what becomes of an earlier run. sft.py and rl.py use these functions; none of them needs torch.

    OUT/
        lock                     held by the process that trains here, see lock_folder
        state/step_0000200/      a checkpoint: 0.pt, 1.pt, ..., one file for each shard, and
                                 checkpoint.json, which is written last: with it the checkpoint is
                                 complete
        metrics.jsonl, rollouts/ the log; conversations that rl.py has saved
        config.json, ...         the exported model
        old_run_1/               an earlier run in OUT. It has the same files, so it can be
                                 continued where it is: --resume --out OUT/old_run_1
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import time
from pathlib import Path

import tools

try:
    import fcntl
except ImportError:     # Windows
    fcntl = None

# What a run writes to its folder. Everything else in it is left alone.
RUN_FILES = ["state", "metrics.jsonl", "rollouts", "*.safetensors", "*.safetensors.index.json",
             "config.json", "generation_config.json", "*processor_config.json", "tokenizer*.json",
             "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
             "chat_template*"]
# Flags whose value is one file or several.
FILE_FLAGS = ["data", "eval_data", "prompts"]
# Flags that do not change what a run learns: a resumed run may have others without a word.
WITHOUT_EFFECT = ["out", "resume", "save_every", "keep_checkpoints", "save_rollouts_every",
                  "micro_batch_tokens", "max_seq_len", "shard_optimizer", "gradient_checkpointing",
                  "max_num_seqs", "short_model_len", "num_speculative_tokens", "track"]


# ---- Before a run starts ------------------------------------------------------------------------


def check_out(out, model):
    """Raise InputError if `out` is a file, or if it is the folder of the model that training starts
    from or lies in it, also by another spelling or a link. model: a folder, a hub id, or None."""
    tools.check(not out.exists() or out.is_dir(), f"--out {out} is a file: name a folder")
    if model is None or not Path(model).is_dir():
        return
    resolved = out.resolve()
    tools.check(Path(model).resolve() not in [resolved, *resolved.parents],
                f"--out {out} is the folder of --model {model}, or lies in it: training would "
                "write into the model that it starts from; name another folder")


def check_warmup(warmup_ratio):
    """Raise InputError if --warmup_ratio is a number of steps, as other trainers want it."""
    tools.check(warmup_ratio <= 1, f"--warmup_ratio {warmup_ratio} is above 1: it is a fraction of "
                "the steps")


def check_overlap(training, held_out):
    """Raise InputError if a held-out question, or another one about its image, is trained on: it
    would choose a checkpoint that knows it by heart. Both are lists of (row, folder of images)."""
    trained_ids = {row["id"] for row, _ in training}
    trained_images = {(folder / row["image"]).resolve() for row, folder in training}
    shared_ids = [row["id"] for row, folder in held_out if row["id"] in trained_ids
                  or (folder / row["image"]).resolve() in trained_images]
    if shared_ids:
        raise tools.InputError(
            f"{len(shared_ids)} of {len(held_out)} held-out questions of --eval_data are in "
            f"--data, too, by their id or image; the first is '{shared_ids[0]}': give other "
            "questions, or --eval_every 0")


def lock_folder(folder, rank=0, attempt=1):
    """Return a context manager that keeps other runs out of a folder. Raise InputError if one is
    there. With several processes only rank 0 holds the lock. attempt: above 1 if torchrun has
    restarted this process; then the process before it has a minute to end.

    The lock (POSIX, fcntl.lockf) belongs to the process. It goes when the process ends, also by
    SIGKILL, and children do not inherit it. The empty file `lock` stays and means nothing."""
    # 1. Who needs no lock?
    if rank > 0 or fcntl is None:
        return contextlib.nullcontext()
    # 2. Try to take it, until the process before this one has had time to end.
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock_file = (folder / "lock").open("a")
    deadline = time.time() + (60 if attempt > 1 else 0)
    while True:
        try:
            fcntl.lockf(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock_file        # closing it, at the end of `with`, gives the lock back
        except (BlockingIOError, PermissionError):      # another process holds it
            if time.time() > deadline:
                lock_file.close()
                raise tools.InputError(f"another run is writing to {folder}: wait until it has "
                                       "ended, or give another --out") from None
        except OSError as error:    # this file system has no locks
            print(f"no lock on {folder} ({error.strerror}): see that no other run writes there",
                  flush=True)
            return lock_file
        time.sleep(0.2)


# ---- What a checkpoint says about its run -------------------------------------------------------


def describe_flags(args):
    """Return {flag: value} of the flags that change a run, ready for JSON. A file is described by
    its name and a digest, so that other content is noticed. Of the judge only whether there is one:
    its URL may hold a password."""
    flags = {}
    for name, value in vars(args).items():
        if name in WITHOUT_EFFECT:
            continue
        if name in FILE_FLAGS and value is not None:
            paths = value if isinstance(value, list) else [value]
            value = " ".join(describe_file(Path(path)) for path in paths)
        elif name == "judge":
            value = value is not None
        elif isinstance(value, Path):
            value = str(value)
        flags[name] = value
    return flags


def describe_file(path):
    """Return the name of a file with a digest of its content."""
    if not path.is_file():
        return path.name
    return f"{path.name} ({hashlib.sha256(path.read_bytes()).hexdigest()[:8]})"


def changed_flags(saved, current):
    """Return a text with every flag that differs, "" if none does: --lr 0.001 -> 9.0, ..."""
    changes = []
    for name, value in current.items():
        if name in saved and saved[name] != value:
            changes.append(f"--{name} {saved[name]} -> {value}")
    return ", ".join(changes)


def check_same_run(folder, saved, current):
    """Raise InputError if a checkpoint cannot be continued by this run: another stage, another type
    of weights, another number of trained parameters. saved: its checkpoint.json."""
    tools.check(saved["stage"] == current["stage"], f"{folder} was saved by {saved['stage']}.py, "
                f"and {current['stage']}.py cannot continue it; give another --out")
    tools.check(saved["dtype"] == current["dtype"], f"{folder} was saved in {saved['dtype']}, and "
                f"this run is in {current['dtype']}; give --dtype {saved['dtype']}")
    tools.check(saved["num_parameters"] == current["num_parameters"],
                f"{folder} trains {saved['num_parameters']} parameters, and this run "
                f"{current['num_parameters']}: it belongs to another --model, or --freeze_vision "
                "or --lora was different")


# ---- Checkpoints --------------------------------------------------------------------------------


def step_of(folder):
    """Return the step of a checkpoint's folder, -1 if its name is of another kind."""
    match = re.fullmatch(r"step_(\d+)", folder.name)
    return int(match[1]) if match else -1


def checkpoints(out):
    """Return the folders of all checkpoints that are complete, the newest first."""
    markers = (Path(out) / "state").glob("step_*/checkpoint.json")
    folders = [marker.parent for marker in markers if step_of(marker.parent) > 0]
    return sorted(folders, key=step_of, reverse=True)


def read_checkpoint(folder, current, bucket_sizes, load_shard):
    """Return (its checkpoint.json, its shards) of a checkpoint. load_shard(path) reads one file.
    Raise InputError if it is of another kind of run than `current`, and ValueError if a file is
    missing, damaged or of another run.

    All is checked here, before anything is loaded into an optimizer: half a state would be worse
    than none. bucket_sizes: how many parameters each bucket of the optimizer has."""
    # 1. What is it?
    saved = read_file(folder / "checkpoint.json", lambda path: json.loads(path.read_text()))
    names = {*current, "step", "num_shards", "world_size"}
    check_file(isinstance(saved, dict) and saved.keys() >= names, "checkpoint.json")
    check_same_run(folder, saved, current)
    # 2. All of its shards, of its own step.
    shards = []
    for number in range(saved["num_shards"]):
        name = f"{number}.pt"
        shard = read_file(folder / name, load_shard)
        check_file(isinstance(shard, dict) and shard.keys() == {"step", "optimizer"}, name)
        check_file(shard["step"] == saved["step"] == step_of(folder), name)
        shards.append(shard["optimizer"])
        # 3. Each bucket's tensors are a shard long.
        check_file([bucket["size"] for bucket in shards[-1]] == bucket_sizes, name)
        for bucket, first_bucket in zip(shards[-1], shards[0]):
            check_file(bucket.keys() == first_bucket.keys(), name)
            shard_length = math.ceil(bucket["size"] / saved["num_shards"])
            for tensor_name in bucket.keys() - {"size", "step"}:
                check_file(len(bucket[tensor_name]) == shard_length, name)
    return saved, shards


def read_file(path, read):
    """Return read(path). Raise ValueError with the file's name if that fails, however it fails."""
    try:
        return read(path)
    except Exception as error:      # of a damaged file: any of a dozen
        first_sentence = tools.first_line(error).split(". ")[0]
        raise ValueError(f"{path.name}: {first_sentence}") from None


def check_file(condition, name):
    """Raise ValueError, which says that a file of a checkpoint is not its own, unless condition."""
    if not condition:
        raise ValueError(f"{name} belongs to another step or another model")


def prune(out, keep_checkpoints):
    """Delete all but the newest keep_checkpoints, and what is left of deleted ones."""
    oldest_kept = checkpoints(out)[:keep_checkpoints][-1]
    for folder in list(oldest_kept.parent.glob("step_*")):
        if step_of(folder) < step_of(oldest_kept):
            shutil.rmtree(folder, ignore_errors=True)


def what_is_saved(out):
    """Return a text that says how a run that ends too early can go on."""
    folders = checkpoints(out)
    if not folders:
        return "no step of this run is saved"
    return f"step {step_of(folders[0])} is saved: continue with --resume"


def continue_from(folder, saved, current, problems, total_steps, world_size):
    """Print that a run continues from a checkpoint, and what is different now. problems: why newer
    checkpoints were not taken; these are renamed to damaged_step_N."""
    stage = current["stage"]
    # 1. Where it goes on.
    because = f"{', '.join(problems)}: " if problems else ""
    print(f"{stage}: {because}continues from step {saved['step']} of {total_steps}, checkpoint "
          f"{folder}", flush=True)
    # 2. What is different.
    changes = changed_flags(saved["flags"], current["flags"])
    if changes:
        print(f"{stage}: other flags than those of the checkpoint: {changes}", flush=True)
    if saved["world_size"] != world_size:
        print(f"{stage}: {folder} was saved by {saved['world_size']} processes, now there are "
              f"{world_size}: the run continues with the same data in the same order, but equals "
              "the uninterrupted one only within rounding", flush=True)
    # 3. Newer checkpoints. An incomplete one will be overwritten.
    for newer in sorted(folder.parent.glob("step_*")):
        if step_of(newer) <= step_of(folder):
            continue
        if not (newer / "checkpoint.json").exists():
            print(f"{stage}: {newer.name} is incomplete: a kill interrupted its save", flush=True)
            continue
        damaged = newer.with_name(f"damaged_{newer.name}")
        shutil.rmtree(damaged, ignore_errors=True)
        os.replace(newer, damaged)
        print(f"{stage}: {newer.name} is kept as {damaged.name}", flush=True)


def report_sft_model(out):
    """Print where sft.py has left its model, and say if the last steps were skipped."""
    print(f"sft: model written to {out}", flush=True)
    report_skipped_steps("sft", tools.read_jsonl(Path(out) / "metrics.jsonl"))


def report_skipped_steps(stage, lines):
    """Say how many of the last steps were skipped, because their loss or gradient was not finite:
    an earlier step may have broken the weights. lines: the log's."""
    num_skipped = 0
    for line in reversed(lines):
        if line["grad_norm"] is not None:
            break
        num_skipped += 1
    if num_skipped > 0:
        print(f"{stage}: the last {num_skipped} of {len(lines)} steps were skipped, because loss "
              "or gradient was not finite: the model may be broken; see how loss and grad_norm "
              "grew in metrics.jsonl, and start again with a lower --lr", flush=True)


def report_rl_model(out):
    """Print which step's model rl.py has left in `out`, and say if nothing was trained, or if the
    last steps were skipped. The log knows all of it."""
    lines = tools.read_jsonl(Path(out) / "metrics.jsonl")
    evaluated = [line for line in lines if line.get("val_accuracy") is not None]
    chosen = f"that of the last step, {lines[-1]['step']} (nothing was evaluated)"
    if evaluated:
        # Of equal ones the later, as in rl.train.
        best = max(evaluated, key=lambda line: (line["val_accuracy"], line["step"]))
        chosen = f"that of step {best['step']}, val_accuracy {best['val_accuracy']:.3f}"
    print(f"rl: model written to {out}: {chosen}", flush=True)
    if not any(line["num_trained_responses"] for line in lines):
        print("rl: nothing was trained, the weights are those of --model: in no group did rewards "
              "differ; try easier questions, a larger --group_size or more --max_turns", flush=True)
    report_skipped_steps("rl", lines)


# ---- An earlier run in the same folder ----------------------------------------------------------


def start_over(out, stage, resume, total_steps):
    """Tell that a run starts at step 0, after setting aside what an earlier one has left in `out`:
    its checkpoints, log and model. Tell how that one can be continued, or, if a run was to be
    continued, each that was set aside before."""
    old_folder = set_aside(out)
    reason = "--resume finds no checkpoint; " if resume else ""
    print(f"{stage}: {reason}starts at step 0 of {total_steps} in {out}", flush=True)
    if old_folder is not None:
        print(f"{stage}: what an earlier run had left there is kept in {old_folder}", flush=True)
    old_folders = sorted(out.glob("old_run_*")) if resume else [old_folder]
    for folder in old_folders:
        if folder is not None and checkpoints(folder):
            print(f"{stage}: to continue the run in {folder} from its step "
                  f"{step_of(checkpoints(folder)[0])}, stop this one and give "
                  f"--resume --out {shlex.quote(str(folder))}", flush=True)


def set_aside(out):
    """Move what a run has left in `out` to out/old_run_N, the first N that is free, and return that
    folder; None if there was nothing. If a kill interrupts this, the next start moves the rest to
    the same place."""
    # 1. Whatever is not an empty file. Some file systems say that every folder has 0 bytes.
    found = []
    for pattern in RUN_FILES:
        found += [path for path in sorted(out.glob(pattern))
                  if not path.is_file() or path.stat().st_size > 0]
    incomplete_folder = out / ".old_run"
    if not found and not incomplete_folder.exists():
        return None
    # 2. Move it.
    incomplete_folder.mkdir(exist_ok=True)
    for path in found:
        move(path, incomplete_folder / path.name)
    number = 1
    while (out / f"old_run_{number}").exists():
        number += 1
    old_folder = out / f"old_run_{number}"
    os.replace(incomplete_folder, old_folder)
    return old_folder


def move(path, target):
    """Move a file or a folder. A link (a state folder on a larger disk) leads to the same place
    afterwards, also if it was a relative one."""
    if not path.is_symlink():
        os.replace(path, target)
        return
    target.unlink(missing_ok=True)      # left by a kill between the next two lines
    target.symlink_to(path.resolve())
    path.unlink()
