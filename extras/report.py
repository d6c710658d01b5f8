"""Look at evaluations: tables over seeds, one page, charts, one conversation as a picture.

    python extras/report.py results/rl results/sft --curves checkpoints/rl/metrics.jsonl
    python extras/report.py results/sft results/rl --chart docs/turns.png     # needs matplotlib
    python extras/report.py results/rl --picture docs/trajectory.png --animation docs/search.gif
    python extras/report.py --curves checkpoints/rl/metrics.jsonl     # also while it is trained
    python extras/report.py --curves checkpoints/*/metrics.jsonl --curves_chart curves.png

The page, results/report.html, needs no network. It has tables, accuracy over turns, training
curves, and trajectories with their numbered zooms, crops and thoughts. With an image each, those of
all questions would make it slow to open, so it has those of a few questions of each level, half of
them the ones that went wrong most often; --questions says how many. Runs called NAME.seed0,
NAME.seed1, ... are one experiment. They are shown as one line with its 95% interval over seeds.
"""

import collections
import importlib.util
import json
import math
import re
import statistics
from pathlib import Path

import root
import evaluate
import tools
from extras import pictures, terminal
from extras.images import check_images
from extras.chat_client import data_url

# ---- Tables: runs that differ in the seed only are one experiment -------------------------------

# Published figures in %: Avg@32 on VisualProbe and V*, Avg@8 on HR-Bench, Avg@1 on MME-RealWorld.
# The names are the "source" of imported rows.
BENCHMARKS = ["visual_probe_hard", "visual_probe_medium", "visual_probe_easy", "vstar",
              "hrbench_4k", "hrbench_8k", "mme_realworld_test"]
PUBLISHED = {"GPT-4o": (11.2, 15.4, 47.5, 65.2, 62.0, 58.3, 45.2),
             "Qwen2.5-VL-7B-Instruct": (23.9, 26.0, 39.1, 75.5, 68.2, 62.7, 57.3),
             "Pixel Reasoner 7B": (28.8, 29.6, 58.4, 86.3, 74.0, 66.9, 64.4),
             "DeepEyes 7B": (35.1, 29.8, 60.1, 83.3, 73.2, 69.5, 64.0),
             "Mini-o3 7B": (48.0, 50.4, 67.0, 88.2, 77.5, 73.3, 65.5)}

# Student's t for 95% by degrees of freedom, 1 to 10. Beyond ten the last one is used, which makes
# the interval a little wider than it is.
T95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228]


def over_seeds(values, error=None):
    """Return (mean, half of its 95% interval) of one figure over seeds.

    Several seeds: t s / sqrt(n), where s is the unbiased deviation between seeds. One seed: 1.96
    times `error`, the standard error over questions; half is None if there is no error either.
    """
    num_seeds = len(values)
    if num_seeds > 1:
        t = T95[min(num_seeds - 1, len(T95)) - 1]
        half = t * statistics.stdev(values) / math.sqrt(num_seeds)
        return statistics.fmean(values), half
    if error is None:
        return values[0], None
    return values[0], 1.96 * error


def check_level(level_table):
    """Raise ValueError, LookupError or TypeError unless one level of a table.json is usable."""
    accuracy = level_table["accuracy"]
    errors = level_table["standard_error"]
    mean_turns = level_table.get("mean_turns_correct") or 0
    target_seen = level_table.get("target_seen") or 0
    budgets = {str(int(budget)) for budget in accuracy}
    possible = all(0 <= figure <= 1
                   for figure in [*accuracy.values(), *errors.values(), target_seen])
    complete = bool(accuracy) and accuracy.keys() == errors.keys() == budgets
    if not (possible and complete and 0 <= mean_turns < 1e9):
        raise ValueError("a figure is missing or not possible")


def read_table(folder):
    """Return the table.json of an evaluation. Raise InputError if it is missing or damaged."""
    path = folder / "table.json"
    tools.check(path.is_file(), f"{folder} has no table.json: evaluate into it first")
    try:
        table = tools.parse_json(path.read_text(encoding="utf-8"))
        for level_table in table.values():
            check_level(level_table)
        if not table:
            raise ValueError("there is no accuracy in it")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise tools.InputError(f"{path} is not what evaluate.py writes ({error!r}): evaluate into "
                               f"{folder} again") from None
    return table


def by_name(pairs):
    """Return {name of the folder: value} for pairs (folder, value). Raise InputError if two folders
    have the same name."""
    named = {}
    for folder, value in pairs:
        name = folder.absolute().name
        tools.check(name not in named, f"two runs are called {name}: rename one, or NAME.seed0, "
                    "NAME.seed1 if only seeds differ")
        named[name] = value
    return named


def name_and_seed(folder):
    """Return (NAME, N) of a folder NAME.seedN of an evaluation. Raise InputError for another."""
    match = re.fullmatch(r"(.+)\.seed(\d+)", folder.name)
    tools.check(folder.is_dir() and match, f"{folder} is not a folder NAME.seedN of an evaluation")
    return match[1], int(match[2])


def group_seeds(tables):
    """Return {experiment: {run: table}} for {run: table}. NAME.seedN is a run of NAME."""
    experiments = collections.defaultdict(dict)
    for run, table in tables.items():
        name = re.sub(r"\.seed[0-9]+$", "", run)
        tools.check(name == run or name not in tables, f"{run} would be a seed of {name}, which is "
                    "there as a run of its own: rename one")
        experiments[name][run] = table
    return experiments


def measured_alike(table):
    """Return what must be equal in all seeds of an experiment: levels, budgets, questions and
    samples."""
    return {level: (list(level_table["accuracy"]), level_table.get("questions"),
                    level_table.get("samples")) for level, level_table in table.items()}


def compare(tables):
    """Return the figures of all experiments at every level, over seeds.

    tables: {run: table.json}. Result: {level: {experiment: {"seeds": count, "accuracy": {budget:
    (mean, half)}, "turns": (mean, half) or None, "target_seen": the same}}}. A seed without any
    correct conversation has neither. Raise InputError if the seeds of an experiment were not
    evaluated alike, or if a run has the name of an experiment.
    """
    levels = collections.defaultdict(dict)
    for name, seeds in group_seeds(tables).items():
        # 1. all seeds must have been evaluated like the first one
        first, *others = seeds
        for other in others:
            tools.check(measured_alike(seeds[first]) == measured_alike(seeds[other]),
                        f"{first} and {other} are seeds of one experiment, but their levels, "
                        "budgets, questions or samples differ: evaluate them alike, or rename one")
        # 2. mean and interval of every figure
        for level, first_table in seeds[first].items():
            level_tables = [table[level] for table in seeds.values()]
            accuracy = {}
            for budget, error in first_table["standard_error"].items():
                values = [level_table["accuracy"][budget] for level_table in level_tables]
                accuracy[budget] = over_seeds(values, error)
            levels[level][name] = {"seeds": len(seeds), "accuracy": accuracy,
                                   "turns": figure_over_seeds(level_tables, "mean_turns_correct"),
                                   "target_seen": figure_over_seeds(level_tables, "target_seen")}
    return levels


def figure_over_seeds(level_tables, name):
    """Return over_seeds of a figure that a seed may lack; None if all do."""
    values = [level_table[name] for level_table in level_tables
              if level_table.get(name) is not None]
    return over_seeds(values) if values else None


def format_figure(figure, scale=1):
    """Return "mean ± half" of a pair (mean, half), "mean" if half is None, "" for None."""
    if figure is None:
        return ""
    mean, half = figure
    if half is None:
        return f"{scale * mean:.1f}"
    return f"{scale * mean:.1f} ± {scale * half:.1f}"


def comparison(level, experiments):
    """Return a table of texts with all experiments at one level, its head first. Accuracy is in %,
    with 95% intervals."""
    budgets = set()
    for figures in experiments.values():
        budgets.update(int(budget) for budget in figures["accuracy"])
    budgets = sorted(budgets)
    rows = [[level, "seeds", *(f"T={budget}" for budget in budgets), "turns (correct)",
             "target seen"]]
    for name, figures in experiments.items():
        cells = [format_figure(figures["accuracy"].get(str(budget)), 100) for budget in budgets]
        rows.append([name, str(figures["seeds"]), *cells, format_figure(figures["turns"]),
                     format_figure(figures["target_seen"], 100)])
    return rows


def print_published(tables):
    """Print every run next to the published figures, at its largest budget. Only levels are shown
    whose questions are those of a benchmark. tables: {run: table.json}."""
    # 1. our accuracies, and the benchmarks among them
    ours = {}       # {run: {benchmark: accuracy}}
    for run, table in tables.items():
        ours[run] = {}
        for level_table in table.values():
            largest = max(level_table["accuracy"], key=int)
            ours[run][level_table.get("benchmark")] = level_table["accuracy"][largest]
    columns = [index for index, benchmark in enumerate(BENCHMARKS)
               if any(benchmark in figures for figures in ours.values())]
    if not columns:
        return
    # 2. a row for every published model, then one for every run
    rows = [[f"{model}, published", *(str(figures[index]) for index in columns)]
            for model, figures in PUBLISHED.items()]
    for run, figures in ours.items():
        accuracies = [figures.get(BENCHMARKS[index]) for index in columns]
        cells = ["" if accuracy is None else f"{100 * accuracy:.1f}" for accuracy in accuracies]
        rows.append([f"{run}, here", *cells])
    print()
    evaluate.print_rows(["%", *(BENCHMARKS[index] for index in columns)], rows)


# ---- The page -----------------------------------------------------------------------------------


def check_step(row):
    """Raise InputError unless a row of metrics.jsonl has its step."""
    tools.check(isinstance(row.get("step"), int), "field 'step' must be a whole number, as in the "
                "metrics.jsonl of a training stage")


def check_evaluated(row):
    """Raise InputError unless a row is an evaluated trajectory. One without turns is allowed: a
    server may have given no reply."""
    if row.get("turns") == []:
        tools.check_question(row)
    else:
        tools.check_trajectory(row)
    tools.check(row.get("reward") in (None, 0, 1), "field 'reward' must be 0, 1 or null")


def read_trajectories(folders, tables, data):
    """Return the trajectories of evaluations, {run: [row]}. Raise InputError where something is
    missing.

    folders: {run: folder}; tables: {run: table.json}; data: the question files, next to which the
    images are. A row gets two more fields: its "level", and "image_path".
    """
    image_folders = {file.stem: file.parent for file in data}
    runs = {}
    # each level has a file of rows, except for the mean over levels
    for run, folder in folders.items():
        runs[run] = []
        for level, level_table in tables[run].items():
            if level == "mean":
                continue
            tools.check(level in image_folders, f"{folder} has a level '{level}', but --data names "
                        f"no file {level}.jsonl for its images")
            rows = tools.read_jsonl(folder / f"{level}.jsonl", check_evaluated)
            num_samples = level_table.get("samples")
            tools.check(len(rows) == num_samples, f"{folder}/{level}.jsonl has {len(rows)} rows, "
                        f"but table.json is about {num_samples} samples: evaluate into it again")
            try:
                check_images(folder / f"{level}.jsonl", rows, image_folders[level])
            except tools.InputError as error:
                raise tools.InputError(f"{error}; or name the files of these questions with "
                                       "--data") from None
            for row in rows:
                image_path = str(image_folders[level] / row["image"])
                runs[run].append({**row, "level": level, "image_path": image_path})
    return runs


def pick_trajectories(runs, num_questions):
    """Return the trajectories about at most num_questions questions of each level, {run: [row]}.

    Half of the questions are those that were not right most often over all runs, the others the
    first ones besides. A question is known by its level and id."""
    # 1. How often did each one go wrong? In the order in which they come first.
    num_wrong = collections.Counter()
    for rows in runs.values():
        for row in rows:
            num_wrong[row["level"], row["id"]] += row["reward"] != 1
    # 2. Pick. A sort keeps the order of what is equal.
    picked = set()
    for level in {level for level, _ in num_wrong}:
        questions = [question for question in num_wrong if question[0] == level]
        hardest = sorted(questions, key=lambda question: -num_wrong[question])
        hardest = hardest[:(num_questions + 1) // 2]
        others = [question for question in questions if question not in hardest]
        picked.update(hardest, others[:num_questions - len(hardest)])
    return {run: [row for row in rows if (row["level"], row["id"]) in picked]
            for run, rows in runs.items()}


SHOWN_FIELDS = ("question", "answer", "prediction", "finish_reason", "reward", "turns", "level",
                "image_path")


def write_page(path, levels, tables, curves, all_runs, num_questions, image_bytes=60_000):
    """Write one page that holds everything, its images in at most image_bytes each. Of the
    trajectories it has those of num_questions questions of each level."""
    # 1. every image once, however many trajectories are about it
    runs = pick_trajectories(all_runs, num_questions)
    image_paths = {}
    for rows in runs.values():
        image_paths.update(dict.fromkeys(row["image_path"] for row in rows))
    images = {image_path: data_url(tools.open_image(image_path), image_bytes)
              for image_path in terminal.progress_bar(image_paths, desc="images")}
    # 2. all data as JSON inside the page; no tag in a model's text may end the script
    shown_runs = []
    for run, rows in runs.items():
        shown_rows = [{field: row.get(field) for field in SHOWN_FIELDS} for row in rows]
        shown_runs.append({"name": run, "rows": shown_rows})
    num_shown, num_trajectories = (sum(map(len, rows.values())) for rows in (runs, all_runs))
    note = "" if num_shown == num_trajectories else (
        f"{num_shown} of {num_trajectories} trajectories are here: those of {num_questions} "
        "questions of each level, half of them the ones that went wrong most often. "
        "--questions N shows more.")
    data = json.dumps({"levels": levels, "tables": tables, "curves": curves, "runs": shown_runs,
                       "images": images, "note": note})
    page = (root.ROOT / "docs" / "report.html").read_text(encoding="utf-8")
    page = page.replace("{{DATA}}", data.replace("<", "\\u003c"))
    tools.write_atomic(path, lambda file: file.write(page.encode()))
    print(f"\n{path}: {len(runs)} evaluations, {num_shown} trajectories, {len(images)} images, "
          f"{len(curves)} training curves, {len(page) / 1e6:.1f} MB")
    if note:
        print(note)


# ---- Charts -------------------------------------------------------------------------------------


def check_chart(path, flag="--chart"):
    """Raise InputError unless a chart can be drawn into this file. None: no chart is asked for."""
    if path is not None:
        tools.check(importlib.util.find_spec("matplotlib"),
                    f"{flag} needs matplotlib: pip install matplotlib")
        tools.check(path.suffix.lower() in (".png", ".svg"),
                    f"{flag} {path} must end in .png or .svg")


def save_chart(figure, path):
    """Write a figure of matplotlib as PNG or SVG."""
    kind = path.suffix[1:].lower()
    tools.write_atomic(path, lambda file: figure.savefig(file, format=kind, dpi=110))
    print(f"drew {path}")


def draw_line(axes, xs, figures, label, linestyle="-"):
    """Draw one line with 95% intervals, in %. figures: for every x a pair (mean, half)."""
    means = [100 * mean for mean, _ in figures]
    halves = [100 * (half or 0) for _, half in figures]
    axes.errorbar(xs, means, halves, label=label, marker="o", markersize=4, capsize=3,
                  linestyle=linestyle)


def label_turns(axes, budgets):
    """Label the x axis of a chart of accuracy over turns."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(budgets, budgets, minor=False)
    axes.set(xlabel="turns allowed at test time")


def draw_accuracy(levels, path):
    """Draw accuracy over turns with 95% intervals, one panel per level (needs matplotlib)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1 + 5 * len(levels), 4), layout="constrained")
    panels = figure.subplots(1, len(levels), squeeze=False)[0]
    for axes, (level, experiments) in zip(panels, levels.items()):
        for index, (name, figures) in enumerate(experiments.items()):
            budgets = [int(budget) for budget in figures["accuracy"]]
            # after ten lines the colours repeat
            linestyle = "-" if index < 10 else "--"
            draw_line(axes, budgets, figures["accuracy"].values(), name, linestyle)
        label_turns(axes, budgets)
        axes.set(title=level, ylim=(0, 100), ylabel="accuracy, %")
        axes.grid(alpha=0.3)
        axes.legend()
    save_chart(figure, path)


# what draw_curves shows: {metric of metrics.jsonl: title of its panel}
CURVES = {"val_accuracy": "held-out accuracy, all turns",
          "val_accuracy_in_cap": "held-out accuracy within the training cap",
          "val_over_turn": "over_turn on held-out questions",
          "entropy": "entropy of a sampled token, mean of 10 steps"}


def smooth(points, width=10):
    """Return points (x, y) in which each y is the mean of the last `width` ones."""
    smoothed = []
    for index, (x, _) in enumerate(points):
        window = [y for _, y in points[max(0, index + 1 - width):index + 1]]
        smoothed.append((x, statistics.fmean(window)))
    return smoothed


def draw_curves(curves, path):
    """Draw what tells whether an RL run gets worse, over its steps, one line per run (needs
    matplotlib). curves: {run: rows of metrics.jsonl}."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.5), layout="constrained")
    for axes, (metric, title) in zip(figure.subplots(2, 2).flat, CURVES.items()):
        for run, rows in curves.items():
            points = [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]
            initial = rows[0].get(f"{metric}_initial") if rows else None
            if initial is not None:     # before the first step
                points.insert(0, (0, initial))
            if metric == "entropy":
                points = smooth(points)
            axes.plot(*zip(*points) if points else ([], []), label=run, marker="o", markersize=3)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    save_chart(figure, path)


# ---- The command --------------------------------------------------------------------------------


def parse_args():
    """Return the flags. Raise InputError if the chart cannot be drawn, before anything is read."""
    parser = terminal.make_parser("Tables, a page and pictures of evaluations.")
    add = parser.add_argument
    add("runs", nargs="*", type=Path, help="folders written by evaluate.py; NAME.seed0, "
        "NAME.seed1, ... are one experiment (default: none, for training curves alone)")
    add("--data", type=Path, nargs="+", help="their question files, next to which the images are",
        default=[Path(f"data/{level}.jsonl") for level in ("easy", "medium", "hard")])
    add("--curves", type=Path, nargs="+", default=(), metavar="METRICS",
        help="metrics.jsonl files of training, for the page (default: none)")
    add("--out", type=Path, help="the page (default: results/report.html; without an evaluation "
        "results/curves.html)")
    add("--chart", type=Path, help="draw accuracy over turns into this PNG or SVG, with matplotlib "
        "(default: not drawn)")
    add("--curves_chart", type=Path, help="draw the held-out accuracy of --curves over the steps "
        "into this PNG or SVG, with matplotlib (default: not drawn)")
    add("--questions", type=int, default=20, help="questions of each level whose trajectories are "
        "on the page")
    add("--picture", type=Path, help="draw a correct trajectory of the first run into this PNG "
        "(default: not drawn)")
    add("--animation", type=Path, help="draw it turn by turn into this GIF (default: not drawn)")
    add("--conversation", action="store_true", help="print it turn by turn")
    args = parser.parse_args()
    terminal.check_number_flags(args, [])
    args.out = args.out or Path("results", "report.html" if args.runs else "curves.html")
    check_chart(args.chart)
    check_chart(args.curves_chart, "--curves_chart")
    tools.check(args.curves or not args.curves_chart, "--curves_chart needs --curves METRICS")
    tools.check(args.runs or args.curves, "name the folders of evaluations, such as results/rl, or "
                "--curves")
    tools.check(args.runs or not (args.chart or args.picture or args.animation
                                  or args.conversation),
                "--chart, --picture, --animation and --conversation need the folder of an "
                "evaluation, such as results/rl")
    return args


def show_example(args, rows):
    """Draw and print a correct trajectory of five to seven turns, as the flags ask for."""
    if not (args.picture or args.animation or args.conversation):
        return
    row = pictures.example(rows)
    if row is None:
        print("no correct trajectory of five to seven turns to show")
        return
    if args.picture:
        pictures.draw_trajectory(row, args.picture)
        print(f"drew {args.picture}")
    if args.animation:
        pictures.draw_animation(row, args.animation)
        print(f"drew {args.animation}")
    if args.conversation:
        pictures.print_trajectory(row)


def main():
    """Print the tables, write the page, and draw what is asked for."""
    args = parse_args()
    # 1. read and compare
    folders = by_name((folder, folder) for folder in args.runs)
    tables = {run: read_table(folder) for run, folder in folders.items()}
    curves = by_name((file.absolute().parent, tools.read_jsonl(file, check_step))
                     for file in args.curves)
    if args.curves_chart:
        draw_curves(curves, args.curves_chart)
    levels = compare(tables)
    comparisons = {level: comparison(level, experiments) for level, experiments in levels.items()}
    # 2. write and draw
    runs = read_trajectories(folders, tables, args.data)
    write_page(args.out, levels, comparisons, curves, runs, args.questions)
    if args.chart:
        draw_accuracy(levels, args.chart)
    if not args.runs:
        return
    # 3. print
    print("accuracy in %, mean over seeds where there are several, ± half of its 95% interval")
    for head, *rows in comparisons.values():
        print()
        evaluate.print_rows(head, rows)
    print_published(tables)
    show_example(args, next(iter(runs.values())))


if __name__ == "__main__":
    terminal.run(main)
