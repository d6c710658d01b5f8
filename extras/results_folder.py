"""The folder of an evaluation, --out: what is kept of an interrupted one, and what becomes of other
results. evaluate.py uses these functions; none of them needs torch.

    OUT/
        partial.DIGEST.RANK.jsonl       conversations that are finished, until the table is written
        table.json, settings.json       the scores, and what they depend on
        LEVEL.jsonl, LEVEL.rates.jsonl  conversations and pass rates of each level
        old_results/1/, 2/, ...         earlier results of other settings: the same files
"""

import hashlib
import json

import tools
from extras import model_folder


def is_served(args):
    """Return whether --model is the URL of a server."""
    return "://" in args.model


def settings_of(args):
    """Return the flags that results depend on, as {name: text}. Served models are known by their
    name: a server may move to another address, and a URL may hold a password."""
    no_influence = ["max_num_seqs", "short_model_len", "num_speculative_tokens", "out", "judge"]
    if is_served(args):
        no_influence.append("model")
    settings = {name: str(value) for name, value in vars(args).items() if name not in no_influence}
    settings["has_judge"] = str(bool(args.judge))
    return settings


# ---- An interrupted evaluation ------------------------------------------------------------------


def run_digest(level, rows, args, prompts):
    """Return a name for all that the samples of a level depend on. A run of other settings,
    questions or weights does not take over samples that an interrupted one has left."""
    settings = settings_of(args)
    del settings["data"]    # the level's own rows count
    files = model_folder.fingerprint(args.model)
    text = json.dumps([level, rows, settings, prompts, files])
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def journal_path(out, digest, rank):
    """Return the file to which a rank appends finished samples."""
    return out / f"partial.{digest}.{rank}.jsonl"


def journal_paths(out, digest):
    """Return the files to which the ranks of a run, however many they were, have appended."""
    return sorted(out.glob(f"partial.{digest}.*.jsonl"))


def count_saved(out, digests):
    """Return how many samples with a score the journals of these digests hold."""
    num_saved = 0
    for digest in digests:
        for path in journal_paths(out, digest):
            text = path.read_bytes()
            num_saved += text.count(b"\n") - text.count(b'"reward": null')
    return num_saved


# ---- Results of another evaluation --------------------------------------------------------------


def set_aside(levels, args):
    """Write settings.json: what the results in --out depend on. If results of other settings lie
    there (another model, fewer questions), move them to --out/old_results/1, 2, ... first. They
    would be replaced in part, and mixed with the new ones.

    levels: {level: trajectory rows} of the new evaluation. args: the flags of evaluate.py."""
    # 1. What lies there?
    settings = settings_of(args)
    settings["conversations"] = {level: len(rows) for level, rows in levels.items()}
    old_table = read_json(args.out / "table.json")
    # 2. Move the results of other settings.
    if old_table and read_json(args.out / "settings.json") != settings:
        number = 1
        while (args.out / "old_results" / str(number)).exists():
            number += 1
        folder = args.out / "old_results" / str(number)
        folder.mkdir(parents=True)
        names = []
        for level in old_table:
            names += [f"{level}.jsonl", f"{level}.rates.jsonl"]
        # The table goes last: if a kill interrupts this, the next run finds it and moves the rest.
        for name in [*names, "settings.json", "table.json"]:
            if (args.out / name).exists():
                (args.out / name).rename(folder / name)
        print(f"the results of another evaluation in {args.out}/ are moved to {folder}/")
    # 3. The settings of the new ones.
    text = json.dumps(settings, indent=1) + "\n"
    tools.write_atomic(args.out / "settings.json", lambda file: file.write(text.encode()))


def read_json(path):
    """Return the content of a JSON file, or {} if there is none or it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
