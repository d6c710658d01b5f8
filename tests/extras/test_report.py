"""Specification of extras/report.py: intervals by hand, seeds that are one experiment, errors about
damaged folders, and the page, which is also driven in a real browser where there is one."""

import html
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import evaluate
import tools
from extras import report

# what a model may write to attack the page
EVIL = "</script><img src=x onerror=document.title='run'><b id=evil>{{DATA}}"


def run_report(monkeypatch, *args):
    """Run report.py with these arguments, in this process."""
    monkeypatch.setattr("sys.argv", ["report.py", *map(str, args)])
    report.main()


# ---- Tables over seeds --------------------------------------------------------------------------


def test_an_interval_over_seeds_is_students():
    """By hand: 0.7, 0.8, 0.9 have s = 0.1, and t = 4.303 for two degrees of freedom: half = 4.303 *
    0.1 / sqrt(3)."""
    mean, half = report.over_seeds([0.7, 0.8, 0.9], 0.5)
    assert mean == pytest.approx(0.8) and half == pytest.approx(0.248434, abs=1e-6)
    assert report.over_seeds([0.25], 0.1) == (0.25, pytest.approx(0.196))
    assert report.over_seeds([0.25]) == (0.25, None)
    # s = 0.7071, over sqrt(2)
    assert report.over_seeds([1.0, 2.0])[1] == pytest.approx(12.706 / 2)


def evaluated(accuracy, error, turns, samples=400, **figures):
    """Return a table.json with one level."""
    return {"hard": {"accuracy": accuracy, "standard_error": dict.fromkeys(accuracy, error),
                     "mean_turns_correct": turns, "questions": 200, "samples": samples,
                     **figures}}


@pytest.fixture
def levels():
    """Return the figures of three seeds of "full", and of "llama-3.1"."""
    tables = {}
    for seed, (accuracy, turns) in enumerate([(0.2, 7.0), (0.3, None), (0.4, 8.0)]):
        accuracies = {"6": accuracy, "32": accuracy + 0.5}
        tables[f"full.seed{seed}"] = evaluated(accuracies, 0.01, turns, target_seen=accuracy)
    tables["llama-3.1"] = evaluated({"6": 0.1, "32": 0.125}, 0.05, None)
    return report.compare(tables)


def test_seeds_of_an_experiment_are_one_row(levels):
    """By hand; a seed without any correct conversation has no turns."""
    head, full, llama = report.comparison("hard", levels["hard"])
    assert head == ["hard", "seeds", "T=6", "T=32", "turns (correct)", "target seen"]
    assert full == ["full", "3", "30.0 ± 24.8", "80.0 ± 24.8", "7.5 ± 6.4", "30.0 ± 24.8"]
    assert llama == ["llama-3.1", "1", "10.0 ± 9.8", "12.5 ± 9.8", "", ""]


def test_runs_of_other_levels_and_budgets_share_a_table():
    """Each level has the runs that were evaluated on it; a budget that a run lacks is left
    empty."""
    one = evaluated({"6": 0.1}, 0.0, None)
    two = evaluated({"4": 0.2}, 0.0, None)
    levels = report.compare({"one": {**one, "easy": one["hard"]}, "two": two})
    assert report.comparison("hard", levels["hard"])[1:] == [
        ["one", "1", "", "10.0 ± 0.0", "", ""], ["two", "1", "20.0 ± 0.0", "", "", ""]]
    assert list(levels["easy"]) == ["one"]


@pytest.mark.parametrize("other", [
    evaluated({"6": 0.1}, 0.0, None, samples=40), evaluated({"4": 0.1}, 0.0, None), {}], ids=str)
def test_seeds_that_were_evaluated_differently_are_not_merged(other):
    with pytest.raises(tools.InputError, match="full.seed0 and full.seed2 are seeds of one exp"):
        report.compare({"full.seed0": evaluated({"6": 0.1}, 0.0, None), "full.seed2": other})


def test_names_are_never_taken_for_seeds_by_chance():
    with pytest.raises(tools.InputError, match="two runs are called one"):
        report.by_name([(Path("a/one"), None), (Path("b/one"), None)])
    with pytest.raises(tools.InputError, match="one.seed0 would be a seed of one, which is there"):
        report.compare({"one.seed0": {}, "one": {}})
    table = evaluated({"6": 0.1}, 0.0, None)
    levels = report.compare({"llama-3.1": table, "llama-3.2": table, "a.seed1": table})
    assert list(levels["hard"]) == ["llama-3.1", "llama-3.2", "a"]


def test_published_figures_are_printed_next_to_ours(capsys):
    """At the largest budget; a run without one of the benchmarks has an empty cell there."""
    def level(benchmark, **accuracy):
        return {"benchmark": benchmark, "accuracy": accuracy}

    report.print_published({"mine": {"easy": {"accuracy": {"6": 1.0}}}})
    assert capsys.readouterr().out == ""
    report.print_published({
        "mine": {"vstar": level("vstar", **{"6": 0.9, "12": 1 / 3}),
                 "4k": level("hrbench_4k", **{"6": 0.5})},
        "other": {"vstar": level("vstar", **{"6": 0.25})}})
    printed = capsys.readouterr().out
    assert "| % | vstar | hrbench_4k |" in printed
    assert "| Mini-o3 7B, published | 88.2 | 77.5 |" in printed
    assert "| mine, here | 33.3 | 50.0 |\n| other, here | 25.0 |  |" in printed


# ---- The chart ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name, start", [("chart.png", b"\x89PNG"), ("chart.svg", b"<?xml")])
def test_a_chart_of_accuracy_over_turns(levels, tmp_path, name, start):
    pytest.importorskip("matplotlib", reason="matplotlib is not in requirements.txt")
    report.draw_accuracy(levels, tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)


def test_a_mean_over_the_last_steps_by_hand():
    assert report.smooth([(1, 4.0), (2, 2.0), (5, 6.0), (6, 1.0)], 2) == [
        (1, 4.0), (2, 3.0), (5, 4.0), (6, 3.5)]
    assert report.smooth([]) == []


def test_a_chart_of_training_curves(tmp_path, monkeypatch):
    """Without any evaluation: of a run with evaluations, and of one that has none yet."""
    pytest.importorskip("matplotlib", reason="matplotlib is not in requirements.txt")
    steps = [{"step": 1, "entropy": None, "val_accuracy_initial": 0.8},
             {"step": 2, "entropy": 0.25, "val_accuracy": 0.9, "val_accuracy_in_cap": 0.4,
              "val_over_turn": 0.0}]
    for name, rows in (("long", steps), ("new", steps[:1])):
        (tmp_path / name).mkdir()
        tools.write_jsonl(tmp_path / name / "metrics.jsonl", rows)
    run_report(monkeypatch, "--curves", tmp_path / "long/metrics.jsonl",
               tmp_path / "new/metrics.jsonl", "--curves_chart", tmp_path / "curves.png",
               "--out", tmp_path / "page.html")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("flags, words", [
    (["--curves_chart", "c.png"], "--curves_chart needs --curves"), ([], "name the folders"),
    (["--curves", "m.jsonl", "--conversation"], "--conversation need the folder")])
def test_nothing_to_report_is_one_line(monkeypatch, flags, words):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    with pytest.raises(tools.InputError, match=words):
        run_report(monkeypatch, *flags)


def test_a_chart_without_matplotlib_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = "^--chart needs matplotlib: pip install matplotlib$"
    with pytest.raises(tools.InputError, match=message):
        run_report(monkeypatch, tmp_path, "--chart", tmp_path / "chart.png")


def test_a_chart_is_a_png_or_svg(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    with pytest.raises(tools.InputError, match="--chart c.doc must end in .png or .svg"):
        run_report(monkeypatch, tmp_path, "--chart", "c.doc")


# ---- The page -----------------------------------------------------------------------------------


@pytest.fixture
def page(world, tmp_path, monkeypatch):
    """Write the page about two runs, and return its path. The first has a correct trajectory, an
    incorrect one whose text attacks the page, and an unscored one. The second has 150 correct
    ones."""
    row = tools.read_jsonl(world / "coldstart.jsonl")[0]
    attack = dict(row, reward=0.0, prediction=EVIL, finish_reason="void",
                  turns=[dict(turn, text=EVIL) for turn in row["turns"]])
    unscored = dict(row, reward=None)
    for name, rows in (("one", [row, attack, unscored]), ("two", [row] * 150)):
        tools.write_jsonl(tmp_path / name / "train.jsonl", rows)
        table = evaluate.summarise({"train": rows}, [2, 32])
        (tmp_path / name / "table.json").write_text(json.dumps(table))
    tools.write_jsonl(tmp_path / "run" / "metrics.jsonl",
                      [{"step": i, "reward": i / 9, "val_accuracy": None} for i in range(1, 4)])
    run_report(monkeypatch, tmp_path / "one", tmp_path / "two", "--data", world / "train.jsonl",
        "--curves", tmp_path / "run/metrics.jsonl", "--out", tmp_path / "report.html")
    return tmp_path / "report.html"


def test_the_report_holds_everything_and_escapes_what_models_write(page, world):
    text = page.read_text()
    assert text.count("<script") == text.count("</script>") == 2 and "<img src=x" not in text
    # no network, no parsing of texts
    assert not re.search(r"(src|href)=.?(https?:)?//", text) and "innerHTML" not in text
    script = r'<script type="application/json" id="data">(.*)</script>\n<script>'
    data = json.loads(re.search(script, text, re.DOTALL)[1])
    assert [(run["name"], len(run["rows"])) for run in data["runs"]] == [("one", 3), ("two", 150)]
    assert data["runs"][0]["rows"][1]["turns"][0]["text"] == EVIL
    assert data["curves"]["run"][2]["reward"] == 3 / 9
    assert list(data["levels"]["train"]) == ["one", "two"]
    assert data["tables"]["train"][1][:2] == ["one", "1"]
    shown = data["runs"][0]["rows"][0]
    assert list(data["images"]) == [shown["image_path"]]
    assert data["images"][shown["image_path"]].startswith("data:image/")
    first_row = tools.read_jsonl(world / "coldstart.jsonl")[0]
    assert shown["image_path"] == str(world / first_row["image"])


def test_the_page_has_the_questions_that_went_wrong_most_often_and_others():
    """By hand: c is not right three times over both runs, b once. Two of three questions: c as the
    hardest, and a as the first of the others. One: the hardest."""
    def row(name, reward, level="easy"):
        return {"id": name, "level": level, "reward": reward}

    runs = {"one": [row("a", 1), row("b", 0), row("c", 0), row("c", None)],
            "two": [row("a", 1), row("b", 1), row("c", 0), row("a", 0, "hard")]}
    picked = report.pick_trajectories(runs, 2)
    assert picked == {"one": [row("a", 1), row("c", 0), row("c", None)],
                      "two": [row("a", 1), row("c", 0), row("a", 0, "hard")]}
    assert report.pick_trajectories(runs, 1)["one"] == [row("c", 0), row("c", None)]
    assert report.pick_trajectories(runs, 3) == runs


def test_the_page_says_what_is_not_on_it(world, tmp_path, monkeypatch, capsys):
    rows = [dict(row, reward=1.0) for row in tools.read_jsonl(world / "coldstart.jsonl")[:30]]
    num_questions = len({row["id"] for row in rows})
    assert num_questions > 2
    tools.write_jsonl(tmp_path / "one" / "train.jsonl", rows)
    table = evaluate.summarise({"train": rows}, [2, 32])
    (tmp_path / "one" / "table.json").write_text(json.dumps(table))
    flags = ["--data", world / "train.jsonl", "--out", tmp_path / "report.html", "--questions"]
    run_report(monkeypatch, tmp_path / "one", *flags, 2)
    note = f"of {len(rows)} trajectories are here: those of 2 questions of each level"
    assert note in (tmp_path / "report.html").read_text() and note in capsys.readouterr().out
    run_report(monkeypatch, tmp_path / "one", *flags, num_questions)
    assert "trajectories are here" not in (tmp_path / "report.html").read_text()


def test_a_page_about_a_run_that_is_still_going(tmp_path, monkeypatch):
    """Curves without any evaluation."""
    tools.write_jsonl(tmp_path / "rl" / "metrics.jsonl", [{"step": 1, "reward": 0.5}])
    monkeypatch.chdir(tmp_path)
    run_report(monkeypatch, "--curves", tmp_path / "rl/metrics.jsonl")
    assert '{"step": 1, "reward": 0.5}' in (tmp_path / "results/curves.html").read_text()


QUESTION = '"id": "a", "question": "q", "answer": "a"'
GOOD = {"train": {"accuracy": {"6": 0.5}, "standard_error": {"6": 0.1}, "mean_turns_correct": 3.0,
                  "samples": 3}}


def damaged(fields):
    """Return the text of a table.json in which some fields are something else."""
    return json.dumps({"train": {**GOOD["train"], **fields}})


@pytest.mark.parametrize("file, text, message", [
    ("one/table.json", None, "has no table.json: evaluate into it first"),
    ("one/table.json", "[1]", "table.json is not what"),
    ("one/table.json", "[" * 100_000, "table.json is not what"),
    ("one/table.json", "{}", "there is no accuracy"),
    ("one/table.json", damaged({"accuracy": {}, "standard_error": {}}), "table.json is not what"),
    ("one/table.json", damaged({"standard_error": {}}), "missing or not possible"),
    ("one/table.json", damaged({"accuracy": {"6": math.nan}}), "not JSON"),
    ("one/table.json", damaged({"accuracy": {"6": "0.5"}}), "table.json is not what"),
    ("one/table.json", damaged({"accuracy": {"6": -3}}), "missing or not possible"),
    ("one/table.json", damaged({"accuracy": {"6": 1.5}}), "missing or not possible"),
    ("one/table.json", damaged({"mean_turns_correct": "many"}), "table.json is not what"),
    ("one/table.json", damaged({"mean_turns_correct": 10 ** 400}), "missing or not possible"),
    ("one/table.json", damaged({"accuracy": {" 6": 0.5}, "standard_error": {" 6": 0.1}}),
     "missing or not possible"),
    ("one/table.json", damaged({"samples": 4}),
     "train.jsonl has 3 rows, but table.json is about 4 samples"),
    ("one/train.jsonl", None, "train.jsonl does not exist"),
    ("one/train.jsonl", '{"turns": 3}', "train.jsonl:1: field 'id'"),
    ("one/train.jsonl", '{%s, "image": "../a.png", "turns": []}' % QUESTION, "must stay inside"),
    ("one/train.jsonl", '{%s, "image": "a", "turns": [], "reward": "1"}' % QUESTION, "'reward'"),
    ("run/metrics.jsonl", '\n{"reward": 1}',
     "metrics.jsonl:2: field 'step' must be a whole number")],
    ids=lambda value: str(value)[:60])
def test_a_missing_or_damaged_file_is_one_line(page, world, monkeypatch, file, text, message):
    path = page.parent / file
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    before = page.read_bytes()
    with pytest.raises(tools.InputError, match=message):
        run_report(monkeypatch, page.parent / "one", "--data", world / "train.jsonl",
            "--curves", page.parent / "run/metrics.jsonl", "--out", page)
    assert page.read_bytes() == before


def test_images_that_are_not_next_to_the_questions(page, world, monkeypatch):
    with pytest.raises(tools.InputError, match="image is missing.*with --data"):
        run_report(monkeypatch, page.parent / "one", "--data", page.parent / "train.jsonl",
                   "--out", page)


def test_a_level_without_questions_is_one_line(page, world, monkeypatch):
    with pytest.raises(tools.InputError, match="names no file train.jsonl"):
        run_report(monkeypatch, page.parent / "two", "--data", world / "coldstart.jsonl",
                   "--out", page)


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
               None)
DRIVE = """<script>
const seen = {}, find = id => document.getElementById(id);
const all = what => [...document.querySelectorAll(what)], count = what => all(what).length;
const press = key => document.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
const choose = (id, value) => {
  find(id).value = value;
  find(id).dispatchEvent(new Event("change"));
};
const chosen = () => all("#list button").findIndex(b => b.getAttribute("aria-current") === "true");
const look = name => {
  seen[name] = [find("count").textContent, count("#list button"), chosen(),
    count("#shown ol.turns li"), count("#shown rect")];
};
addEventListener("load", () => {
  look("all"); press("j"); press("j"); look("third"); press("k"); look("second");
  seen.text = document.querySelector("#shown pre").textContent;
  choose("filter_run", "two"); find("after").click(); look("page two");
  choose("filter_verdict", "incorrect"); look("none");
  choose("filter_run", "one"); look("incorrect");
  choose("filter_verdict", "all"); choose("filter_finish", "answer"); look("answered");
  seen.lines = count("#accuracy polyline"); seen.curves = count("#curves svg");
  seen.crop = document.querySelector("#shown canvas").width; seen.evil = find("evil");
  document.body.replaceChildren(JSON.stringify(seen)); });
</script></html>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_the_report_in_a_browser(page, world):
    """Filters, pages and keys, in a real browser; nothing that a model wrote has run."""
    page.write_text(page.read_text().replace("</html>", DRIVE))
    dom = subprocess.run([BROWSER, "--headless", "--no-sandbox", "--disable-gpu",
                          "--virtual-time-budget=5000", "--dump-dom",
                          page.as_uri()], capture_output=True, text=True, timeout=120).stdout
    seen = json.loads(html.unescape(re.search(r"<body>(.*)</body>", dom, re.DOTALL)[1]))
    row = tools.read_jsonl(world / "coldstart.jsonl")[0]
    turns = len(row["turns"])
    zooms = sum("zoom" in turn for turn in row["turns"][:-1])
    assert seen["all"] == ["153 of 153 trajectories", 100, 0, turns, zooms]
    assert seen["third"][2] == 2 and seen["second"][2] == 1 and seen["text"] == EVIL
    assert seen["page two"] == ["150 of 153 trajectories", 50, 0, turns, zooms]
    assert seen["none"] == ["0 of 153 trajectories", 0, -1, 0, 0]
    assert seen["incorrect"][:2] == ["1 of 153 trajectories", 1]
    assert seen["answered"][:2] == ["2 of 153 trajectories", 2]
    assert seen["lines"] == 2 and seen["curves"] == 1 and seen["evil"] is None
    assert "<title>Mini-o3 report</title>" in dom
