"""Results of another evaluation in --out are moved, not replaced or mixed with the new ones."""

import json

import tools

NO_INFLUENCE = ("out", "max_num_seqs", "num_speculative_tokens")


def set_aside(levels, args):
    """Write settings.json: what the results in --out depend on. If results of other settings lie
    there (another model, fewer questions), move them to --out/old_results/1, 2, ... first.

    levels: {level: trajectory rows} of the new evaluation. args: the flags of evaluate.py."""
    settings = {name: str(value) for name, value in vars(args).items() if name not in NO_INFLUENCE}
    settings["conversations"] = {level: len(rows) for level, rows in levels.items()}
    old_table = read_json(args.out / "table.json")
    if old_table and read_json(args.out / "settings.json") != settings:
        old_results = args.out / "old_results"
        folder = old_results / str(1 + len(list(old_results.glob("*"))))
        folder.mkdir(parents=True)
        names = ["table.json", "settings.json"]
        for level in old_table:
            names += [f"{level}.jsonl", f"{level}.rates.jsonl"]
        for name in names:
            if (args.out / name).exists():
                (args.out / name).rename(folder / name)
        print(f"the results of another evaluation in {args.out}/ are moved to {folder}/")
    text = json.dumps(settings, indent=1) + "\n"
    tools.write_atomic(args.out / "settings.json", lambda file: file.write(text.encode()))


def read_json(path):
    """Return the content of a JSON file, or {} if there is none or it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
