"""What evaluations have left, to look at: tables over seeds, one page, a chart, a picture.

    python extras/report.py results/rl results/sft --curves checkpoints/rl/metrics.jsonl
    python extras/report.py results/sft results/rl --chart docs/turns.png     # needs matplotlib
    python extras/report.py results/rl --picture docs/trajectory.png

The page, results/report.html, needs no network: tables, accuracy over turns, training curves, and
every trajectory with its numbered zooms, crops and thoughts. Runs called NAME.seed0, NAME.seed1,
... are one experiment, shown as one line with its 95% interval over seeds.
"""

import argparse
import collections
import importlib.util
import json
import math
import re
import statistics
import sys
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

import root  # noqa: F401
import evaluate
import tools

# -------------------------------------------------------------------------------------------------
# Tables: runs that differ in the seed only are one experiment

# Published figures in %: Avg@32 on VisualProbe and V*, Avg@8 on HR-Bench, Avg@1 on MME-RealWorld
BENCHMARKS = ["visual_probe_hard", "visual_probe_medium", "visual_probe_easy", "vstar",
              "hrbench_4k", "hrbench_8k", "mme_realworld_test"]     # "source" of imported rows
PUBLISHED = {"GPT-4o": (11.2, 15.4, 47.5, 65.2, 62.0, 58.3, 45.2),
             "Qwen2.5-VL-7B-Instruct": (23.9, 26.0, 39.1, 75.5, 68.2, 62.7, 57.3),
             "Pixel Reasoner 7B": (28.8, 29.6, 58.4, 86.3, 74.0, 66.9, 64.4),
             "DeepEyes 7B": (35.1, 29.8, 60.1, 83.3, 73.2, 69.5, 64.0),
             "Mini-o3 7B": (48.0, 50.4, 67.0, 88.2, 77.5, 73.3, 65.5)}

# Student's t by degrees of freedom; beyond ten the last one, which is a little wide
T95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228]


def over_seeds(values, error=None):
    """(mean, half of its 95% interval) of one figure over seeds: t s / sqrt(n), s the unbiased
    deviation between seeds. Of a single run: 1.96 standard errors over questions, where there is
    one (error), else None."""
    n = len(values)
    if n > 1:
        mean, deviation = statistics.fmean(values), statistics.stdev(values)
        return mean, T95[min(n - 1, len(T95)) - 1] * deviation / math.sqrt(n)
    return values[0], None if error is None else 1.96 * error


def read_table(folder):
    """The table.json of an evaluation. Raises InputError if it is missing or something else."""
    path = folder / "table.json"
    tools.check(path.is_file(), f"{folder} has no table.json: evaluate into it first")
    try:
        table = tools.parse_json(path.read_text(encoding="utf-8"))
        for part in table.values():
            accuracy, errors, turns = (part["accuracy"], part["standard_error"],
                                       part.get("mean_turns_correct") or 0)
            right = all(0 <= figure <= 1 for figure in [*accuracy.values(), *errors.values()])
            if not (right and accuracy.keys() == errors.keys() == {str(int(T)) for T in accuracy}
                    and accuracy and 0 <= turns < 1e9):
                raise ValueError("a figure is missing or not possible")
        if not table:
            raise ValueError("there is no accuracy in it")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise tools.InputError(f"{path} is not what evaluate.py writes ({error!r}): evaluate into "
                               f"{folder} again") from None
    return table


def by_name(pairs):
    """[(folder, thing)] -> {folder's name: thing}. Raises InputError if two share a name."""
    found = {}
    for folder, thing in pairs:
        name = folder.absolute().name
        tools.check(name not in found, f"two runs are called {name}: rename one, or NAME.seed0, "
                   "NAME.seed1 if only seeds differ")
        found[name] = thing
    return found


def compare(tables):
    """{run: table.json}, seeds put together: {level: {experiment: {"seeds": count, "accuracy": {T:
    (mean, half)}, "turns": (mean, half) or None}}}. A seed without any correct conversation has no
    turns. Raises InputError if the seeds of an experiment were not evaluated alike, or if a run is
    called like an experiment."""
    experiments = collections.defaultdict(dict)
    for run, table in tables.items():
        name = re.sub(r"\.seed[0-9]+$", "", run)
        tools.check(name == run or name not in tables, f"{run} would be a seed of {name}, which is "
                   "there as a run of its own: rename one")
        experiments[name][run] = table
    levels = collections.defaultdict(dict)
    for name, seeds in experiments.items():
        measured = {run: {level: (list(part["accuracy"]), part.get("questions"),
                                  part.get("samples")) for level, part in table.items()}
                    for run, table in seeds.items()}
        first, *others = seeds
        for other in others:
            tools.check(measured[first] == measured[other], f"{first} and {other} are seeds of one "
                       "experiment, but their levels, budgets, questions or samples differ: "
                       "evaluate them alike, or rename one")
        for level, part in seeds[first].items():
            parts = [table[level] for table in seeds.values()]
            turns = [p["mean_turns_correct"] for p in parts if p.get("mean_turns_correct")]
            levels[level][name] = {
                "seeds": len(parts), "turns": over_seeds(turns) if turns else None,
                "accuracy": {T: over_seeds([p["accuracy"][T] for p in parts], error)
                             for T, error in part["standard_error"].items()}}
    return levels


def comparison(level, experiments):
    """A table of texts, its head first, of all experiments at one level, in %, 95% intervals."""
    def shown(figure, scale=1):
        mean, half = figure or (None, None)
        text = "" if mean is None else f"{scale * mean:.1f}"
        return text + ("" if half is None else f" ± {scale * half:.1f}")

    budgets = sorted({int(T) for found in experiments.values() for T in found["accuracy"]})
    rows = [[name, str(found["seeds"]),
             *(shown(found["accuracy"].get(str(T)), 100) for T in budgets), shown(found["turns"])]
            for name, found in experiments.items()]
    return [[level, "seeds", *(f"T={T}" for T in budgets), "turns (correct)"], *rows]


# -------------------------------------------------------------------------------------------------
# The page


def print_published(evaluated):
    """Every run, at its largest budget, beside what was published, where a level's questions are of
    a benchmark with published figures. evaluated: {run: table}."""
    ours = {run: {part.get("benchmark"): part["accuracy"][max(part["accuracy"], key=int)]
                  for part in table.values()} for run, table in evaluated.items()}
    columns = [i for i, benchmark in enumerate(BENCHMARKS)
               if any(benchmark in found for found in ours.values())]
    if columns:
        rows = [[f"{model}, published", *(str(figures[i]) for i in columns)]
                for model, figures in PUBLISHED.items()]
        for run, found in ours.items():
            cells = (found.get(BENCHMARKS[i]) for i in columns)
            rows.append([f"{run}, here", *("" if c is None else f"{100 * c:.1f}" for c in cells)])
        print()
        evaluate.print_rows(["%", *(BENCHMARKS[i] for i in columns)], rows)


def check_step(row):
    tools.check(isinstance(row.get("step"), int), "field 'step' must be a whole number, as in the "
               "metrics.jsonl of a training stage")


def check_played(row):
    silent = row.get("turns") == []     # a server may have said nothing
    (tools.check_question if silent else tools.check_trajectory)(row)
    tools.check(row.get("reward") in (None, 0, 1), "field 'reward' must be 0, 1 or null")


def read_trajectories(folders, tables, data):
    """What was played in evaluations, {run: folder} with {run: table.json}: {run: [row]}, where a
    row also has its level, "file", and the path of its image, "picture". data: the question files,
    beside which images lie. Raises InputError where something is missing."""
    roots, runs = {file.stem: file.parent for file in data}, {}
    for run, folder in folders.items():
        runs[run] = []
        for level in [level for level in tables[run] if level != "mean"]:
            tools.check(level in roots, f"{folder} has a level '{level}', but --data names no file "
                       f"{level}.jsonl for its images")
            rows = tools.read_jsonl(folder / f"{level}.jsonl", check_played)
            samples = tables[run][level].get("samples")
            tools.check(len(rows) == samples, f"{folder}/{level}.jsonl has {len(rows)} rows, but "
                       f"table.json is about {samples} samples: evaluate into it again")
            runs[run] += [{**row, "file": level, "picture": str(roots[level] / row["image"])}
                          for row in rows]
    return runs


def write_page(path, levels, tables, curves, runs, image_bytes=60_000):
    """One page that holds everything, its images in at most image_bytes each."""
    pictures = dict.fromkeys(row["picture"] for rows in runs.values() for row in rows)
    images = {picture: tools.data_url(tools.open_image(picture), image_bytes)
              for picture in tools.progress_bar(pictures, desc="images")}
    kept = ("question", "answer", "prediction", "finish_reason", "reward", "turns", "file", "picture")
    shown = [{"name": run, "rows": [{key: row.get(key) for key in kept} for row in rows]}
             for run, rows in runs.items()]
    data = json.dumps({"levels": levels, "tables": tables, "curves": curves, "runs": shown,
                       "images": images})
    page = (root.ROOT / "docs" / "report.html").read_text(encoding="utf-8")
    page = page.replace("{{DATA}}", data.replace("<", "\\u003c"))   # no tag ends the script
    tools.write_atomic(path, lambda file: file.write(page.encode()))
    print(f"\n{path}: {len(runs)} runs, {sum(map(len, runs.values()))} trajectories, "
          f"{len(images)} images, {len(page) / 1e6:.1f} MB")


# -------------------------------------------------------------------------------------------------
# Pictures


def draw_accuracy(levels, path):
    """Accuracy over turns with 95% intervals, one panel per level, as a picture (matplotlib)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1 + 5 * len(levels), 4), layout="constrained")
    panels = figure.subplots(1, len(levels), squeeze=False)[0]
    for axes, (level, experiments) in zip(panels, levels.items()):
        for i, (name, found) in enumerate(experiments.items()):
            budgets = [int(T) for T in found["accuracy"]]
            means, halves = zip(*found["accuracy"].values())
            axes.errorbar(budgets, [100 * m for m in means], [100 * (h or 0) for h in halves],
                          label=name, marker="o", markersize=4, capsize=3,
                          linestyle="-" if i < 10 else "--")   # the ten colours come again
        axes.set_xscale("log", base=2)
        axes.set_xticks(budgets, budgets, minor=False)
        axes.set(title=level, ylim=(0, 100), ylabel="accuracy, %",
                 xlabel="turns allowed at test time")
        axes.grid(alpha=0.3)
        axes.legend()
    kind = path.suffix[1:].lower()
    tools.write_atomic(path, lambda file: figure.savefig(file, format=kind, dpi=110))
    print(f"drew {path}")


def draw_trajectory(row, path, side=560, size=110, pad=10):
    """PNG of one trajectory: the image with numbered boxes, then each turn's view with its text.
    Boxes of nested zooms are drawn where they lie in the original."""
    image = tools.open_image(row["picture"])
    views, boxes, tiles = tools.replay(row, image), [(0.0, 0.0, 1.0, 1.0)], []
    font = ImageFont.load_default(size=15)
    scene = image.resize((side, round(side * image.height / image.width)))
    draw, seen = ImageDraw.Draw(scene), image
    for number, turn in enumerate(row["turns"], 1):
        text = f"turn {number}  {turn['text']}"
        tiles.append((seen, textwrap.fill(text, 78, break_on_hyphens=False)))
        seen = None
        if "zoom" in turn and number < len(row["turns"]):
            a, b, c, d = boxes[tools.source_index(turn["zoom"]["source"])]
            x0, y0, x1, y1 = turn["zoom"]["bbox_2d"]
            box = a + x0 * (c - a), b + y0 * (d - b), a + x1 * (c - a), b + y1 * (d - b)
            boxes.append(box)
            inset = 2 + 2 * (len(boxes) % 3)    # so that equal boxes can be told apart
            left, top, right, bottom = (round(v * s) for v, s in zip(box, scene.size * 2))
            draw.rectangle((left + inset, top + inset, right - inset, bottom - inset),
                           outline=(255, 0, 120), width=2)
            draw.text((left + inset + 4, top + inset + 2), str(len(boxes) - 1), "white", font,
                      stroke_width=2, stroke_fill="black")
            seen = views[len(boxes) - 1]
    facts = "\n".join(textwrap.wrap(row["question"], 75) + [
        f"answer: {row['answer']}   prediction: {row['prediction']}   finish: {row['finish']}"])
    heights = [max(size, draw.textbbox((0, 0), text, font)[3]) + pad for _, text in tiles]
    tall = max(scene.height + draw.textbbox((0, 0), facts, font)[3] + pad, sum(heights))
    sheet = Image.new("RGB", (2 * side + size + 4 * pad, tall + 2 * pad), "white")
    sheet.paste(scene, (pad, pad))
    draw, y = ImageDraw.Draw(sheet), pad
    draw.text((pad, scene.height + 2 * pad), facts, "black", font)
    for (seen, text), height in zip(tiles, heights):
        if seen is not None:
            sheet.paste(ImageOps.contain(seen, (size, size)), (side + 2 * pad, y))
        draw.text((side + size + 3 * pad, y), text, "black", font)
        y += height
    tools.write_atomic(path, lambda file: sheet.save(file, "PNG"))


def draw_one(rows, path):
    """A picture of a correct trajectory of five to seven turns."""
    fits = [row for row in rows if row["reward"] == 1 and 5 <= len(row["turns"]) <= 7]
    if fits:
        draw_trajectory(fits[len(fits) // 2], path)
    print(f"drew {path}" if fits else "no correct trajectory of five to seven turns to draw")


# -------------------------------------------------------------------------------------------------


def parse_args():
    parser = argparse.ArgumentParser(description="Tables, a page and pictures of evaluations.")
    add = parser.add_argument
    add("runs", nargs="+", type=Path, help="folders written by evaluate.py; NAME.seed0, "
        "NAME.seed1, ... are one experiment")
    add("--data", type=Path, nargs="+", help="their question files, beside which images lie",
        default=[Path(f"data/{level}.jsonl") for level in ("easy", "medium", "hard")])
    add("--curves", type=Path, nargs="+", default=[], metavar="METRICS",
        help="metrics.jsonl files of training, for the page")
    add("--out", type=Path, default=Path("results/report.html"), help="the page")
    add("--chart", type=Path, help="draw accuracy over turns into this PNG or SVG (matplotlib)")
    add("--picture", type=Path, help="draw a correct trajectory of the first run into this PNG")
    args = parser.parse_args()
    tools.check(not args.chart or importlib.util.find_spec("matplotlib"),
               "--chart needs matplotlib: pip install matplotlib")
    tools.check(not args.chart or args.chart.suffix.lower() in (".png", ".svg"),
               f"--chart {args.chart} must end in .png or .svg")
    return args


def main():
    args = parse_args()
    folders = by_name((folder, folder) for folder in args.runs)
    evaluated = {run: read_table(folder) for run, folder in folders.items()}
    curves = by_name((file.absolute().parent, tools.read_jsonl(file, check_step))
                     for file in args.curves)
    levels = compare(evaluated)
    tables = {level: comparison(level, experiments) for level, experiments in levels.items()}
    print("accuracy in %, mean over seeds where there are several, ± half of its 95% interval")
    for head, *rows in tables.values():
        print()
        evaluate.print_rows(head, rows)
    print_published(evaluated)
    runs = read_trajectories(folders, evaluated, args.data)
    write_page(args.out, levels, tables, curves, runs)
    if args.chart:
        draw_accuracy(levels, args.chart)
    if args.picture:
        draw_one(next(iter(runs.values())), args.picture)


if __name__ == "__main__":
    tools.run(main)
