"""Specification of the scripted teacher and of the collection.

What the student learns from is true, legal and leads to the answer; deliberate mistakes are context
only. A killed collection continues where it was, and its result is that of an undisturbed one, byte
for byte. A served teacher: extras/test_served.py.
"""

import argparse
import collections
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

import build_data
import collect_coldstart
import tools
from build_data import (LEVELS, PHRASES, POSITIONS, SHAPES, colours_of, describe_cell,
                        describe_colour, position_box, positions_with)
from collect_coldstart import STRATEGIES, Teacher
from support.launch import ROOT, run_script

SEARCHES = [strategy for strategy in STRATEGIES if strategy != "guess"]
INDEX_OF_BOX = {tuple(position_box(position)): index for index, position in enumerate(POSITIONS)}
WHOLE_IMAGE = (None, None)

# ---- Helpers: follow a search on the layout -----------------------------------------------------
# A view is (region, cell): (None, None) is the whole image, (region, None) a whole region, and
# "refused" is what a turn sees after a call that the tool refuses.


def scene(level, index):
    return build_data.make_scene(np.random.default_rng([9, index]), level)


def searches(strategy, count=30):
    """Yield (row, the teacher's [(text, learn), ...]) for `count` scenes of each level."""
    for level, index in itertools.product(LEVELS, range(count)):
        row = scene(level, index)
        yield row, list(Teacher(row, strategy, np.random.default_rng([1, index])).turns())


def follow(row, turns):
    """Play the calls of [(text, learn), ...] on the layout. Yield (text, kind, view) per turn: the
    view that the text speaks about, and the kind of parse_turn, "error" for any refused call."""
    views = [WHOLE_IMAGE]
    view = WHOLE_IMAGE
    for text, _ in turns:
        kind, call = tools.parse_turn(text)
        if kind == "zoom":
            source = tools.source_index(call["source"])
            kind = "zoom" if source < len(views) else "error"
        yield text, kind, view
        view = "refused"
        if kind == "zoom":
            region, cell = views[source]
            assert cell is None  # no strategy zooms into a cell: there is nothing smaller
            target = INDEX_OF_BOX[tuple(call["bbox_2d"])]
            view = (target, None) if region is None else (region, target)
            views.append(view)


def honest_words(row, view):
    """Return what an honest turn says first about a view."""
    if view == "refused":
        return PHRASES["sorry"]
    region, cell = view
    if region is None:
        return describe_colour("wallpaper", row["colour"], row["wallpaper"])
    if cell is None:
        return describe_colour("region", row["colour"], colours_of(row["objects"], region))
    return describe_cell(row["objects"], region, cell)


def is_empty_cell(row, view):
    return view != "refused" and honest_words(row, view) == PHRASES["empty"]


def target_of(row):
    """Return the view of the target's cell."""
    return tuple(row["objects"][0][:2])


def unseen_regions(text):
    """Return the regions that a thought says are still to be looked at, in its order."""
    match = re.search(PHRASES["later"].format(places="([a-z -]+)"), text)
    return [POSITIONS.index(position) for position in match[1].split()] if match else []


def scans_of(row, turns):
    """Return the views that a search asked for, without wrong guesses, one list per scan: "Scan
    again" begins another one."""
    scans = [[]]
    for text, _, view in follow(row, turns):
        if view not in ("refused", WHOLE_IMAGE) and not is_empty_cell(row, view):
            scans[-1].append(view)
        if PHRASES["again"] in text:
            scans.append([])
    return scans


def complete_scan(row, regions):
    """Return the views of a search through these regions: every region, then at once each cell that
    holds the colour, in reading order. It does not stop at the target."""
    views = []
    for region in regions:
        views.append((region, None))
        for position in positions_with(row["colour"], colours_of(row["objects"], region)):
            views.append((region, POSITIONS.index(position)))
    return views


def up_to_target(row, views):
    """Return the views up to the target, or all of them if it is not among them."""
    target = target_of(row)
    return views[:views.index(target) + 1] if target in views else views


def reading_order(start):
    return [(start + index) % 9 for index in range(9)]


def hinted_regions(row):
    """Return the regions that have wallpaper of the colour."""
    return [region for region in range(9) if row["wallpaper"][region] == row["colour"]]


def announced_order(text):
    """Return the phrase key of the order that a first turn announces."""
    order, = (name for name in ("scan", "shuffle", "hint") if PHRASES[name] in text)
    return order


# ---- Teacher: what every search has in common ---------------------------------------------------


@pytest.mark.parametrize("strategy", SEARCHES)
def test_every_strategy_finds_the_answer_and_only_then_gives_it(strategy):
    for row, turns in searches(strategy):
        steps = list(follow(row, turns))
        text, _, view = steps[-1]
        assert tools.parse_turn(text) == ("answer", row["answer"])
        assert view == target_of(row)
        assert all(kind in ("zoom", "error") for _, kind, _ in steps[:-1])


@pytest.mark.parametrize("strategy", SEARCHES)
def test_every_taught_call_is_legal_and_goes_where_the_thought_says(strategy):
    for row, turns in searches(strategy):
        for (text, learn), (_, kind, _) in zip(turns, follow(row, turns)):
            if learn and kind != "answer":
                assert kind == "zoom"
                _, call = tools.parse_turn(text)
                position = POSITIONS[INDEX_OF_BOX[tuple(call["bbox_2d"])]]
                assert PHRASES["go"].format(place=position) + "</think>" in text


@pytest.mark.parametrize("strategy", SEARCHES)
def test_mistakes_and_only_mistakes_are_not_learned(strategy):
    """A mistake is a call that the tool refuses, false words about the view, or a zoom into a cell
    with nothing in it."""
    num_mistakes = collections.Counter()
    for row, turns in searches(strategy):
        steps = list(follow(row, turns))
        next_views = [view for _, _, view in steps[1:]] + [None]
        for (text, learn), (_, kind, view), next_view in zip(turns, steps, next_views):
            is_refused = kind == "error"
            goes_to_empty_cell = kind == "zoom" and is_empty_cell(row, next_view)
            is_false = not text.startswith("<think>" + honest_words(row, view))
            assert learn == (not is_refused and not goes_to_empty_cell and not is_false), text
            num_mistakes.update({"refused": is_refused, "empty": goes_to_empty_cell,
                                 "false": is_false})
    expected = {"recover": {"refused"}, "backtrack": {"empty"}, "search_again": {"false"}}
    made = {name for name, count in num_mistakes.items() if count > 0}
    assert made == expected.get(strategy, set())


@pytest.mark.parametrize("strategy", SEARCHES)
def test_verdicts_are_true(strategy):
    """ "Want square. Yes." is said in front of the target and nowhere else, "No." in front of every
    other object."""
    for row, turns in searches(strategy, 10):
        for text, _, view in follow(row, turns):
            is_cell = view != "refused" and view[1] is not None
            is_object = is_cell and not is_empty_cell(row, view)
            verdict = re.search(r" Want (\w+)\. (Yes|No)\.", text)
            assert (verdict is not None) == is_object
            if verdict:
                assert verdict[1] == row["target_attribute"]
                assert (verdict[2] == "Yes") == (view == target_of(row))


# ---- Teacher: the order of the regions ----------------------------------------------------------


@pytest.mark.parametrize("strategy", SEARCHES)
def test_a_search_looks_where_its_first_turn_says(strategy):
    """Mistakes apart, it looks at the regions in the announced order, at every candidate once, and
    at nothing else, up to the target. If the target was overlooked, it scans all nine regions in
    reading order."""
    orders = set()
    for row, turns in searches(strategy):
        first_text, _ = turns[0]
        orders.add(announced_order(first_text))
        first_scan, *more_scans = scans_of(row, turns)
        all_views = complete_scan(row, unseen_regions(first_text))
        expected = up_to_target(row, all_views)
        if strategy == "recheck":
            expected.append(target_of(row))
        if strategy == "search_again":
            expected = [view for view in all_views if view != target_of(row)]
        assert first_scan == expected
        announced = [unseen_regions(text) for text, _ in turns if PHRASES["again"] in text]
        assert len(announced) == len(more_scans) == (target_of(row) not in first_scan)
        for regions, scan in zip(announced, more_scans):
            assert regions == reading_order(regions[0])
            assert scan == up_to_target(row, complete_scan(row, regions))
    fixed_order = {"scan": {"scan"}, "shuffle": {"shuffle"}, "hint": {"hint"},
                   "search_again": {"hint"}}
    assert orders == fixed_order.get(strategy, {"scan", "shuffle", "hint"})


@pytest.mark.parametrize("strategy", SEARCHES)
def test_every_order_covers_all_nine_regions(strategy):
    """hint: the regions with the colour's wallpaper, then the others; scan: in reading order from a
    random start; shuffle: at random."""
    starts = set()
    orders = set()
    for row, turns in searches(strategy):
        first_text, _ = turns[0]
        order = announced_order(first_text)
        regions = unseen_regions(first_text)
        assert sorted(regions) == list(range(9))
        if order == "hint":
            hinted = hinted_regions(row)
            assert regions == hinted + [region for region in range(9) if region not in hinted]
        if order == "scan":
            assert regions == reading_order(regions[0])
            starts.add(regions[0])
        if order == "shuffle":
            orders.add(tuple(regions))
    assert strategy != "scan" or starts == set(range(9))
    # the teacher's random numbers are the same for each level
    assert strategy != "shuffle" or len(orders) > 25


@pytest.mark.parametrize("strategy", SEARCHES)
def test_scenes_without_a_hint_are_solved_too(strategy):
    """No region has the colour's wallpaper (seldom, unless there are many other objects): the order
    "hint" is plain reading order."""
    drawn = [build_data.make_scene(np.random.default_rng([9, index]), "easy", lookalikes=1,
                                   others=20) for index in range(60)]
    rows = [row for row in drawn if not hinted_regions(row)]
    assert len(rows) > 10
    for index, row in enumerate(rows):
        turns = list(Teacher(row, strategy, np.random.default_rng([1, index])).turns())
        first_text, _ = turns[0]
        last_text, _ = turns[-1]
        assert first_text.startswith(f"<think>I see no {row['colour']} walls.")
        is_hint = announced_order(first_text) == "hint"
        assert not is_hint or unseen_regions(first_text) == list(range(9))
        assert tools.parse_turn(last_text) == ("answer", row["answer"])


def test_the_hint_saves_turns():
    """On average: the wallpaper is a hint, not the answer."""
    mean_turns = {strategy: np.mean([len(turns) for _, turns in searches(strategy)])
                  for strategy in ("hint", "scan")}
    assert mean_turns["hint"] < 0.85 * mean_turns["scan"]


@pytest.mark.parametrize("strategy", ["scan", "shuffle", "hint"])
def test_the_last_turn_holds_all_that_is_left_to_do(strategy):
    """Its thought lists the unseen regions and, by the observation that shows them, the candidates,
    so that nothing older has to be remembered."""
    listed = PHRASES["here"].format(source=r"(\w+)", places="([a-z -]+)")
    for row, turns in searches(strategy):
        regions = unseen_regions(turns[0][0])
        candidates = {}
        for num_observations, (text, kind, (region, cell)) in enumerate(follow(row, turns)):
            if region is not None and cell is None:
                assert regions.pop(0) == region
                candidates[f"observation_{num_observations}"] = positions_with(
                    row["colour"], colours_of(row["objects"], region))
            if cell is not None:
                candidates[source].remove(POSITIONS[cell])
            if PHRASES["again"] in text:
                assert regions == [] and not any(candidates.values())
                regions = unseen_regions(text)
            if kind == "zoom":
                assert unseen_regions(text) == regions
                said = {source: positions.split() for source, positions in re.findall(listed, text)}
                assert said == {source: left for source, left in candidates.items() if left}
                source = tools.parse_turn(text)[1]["source"]


# ---- Teacher: what strategies are named after ---------------------------------------------------


def test_recover_corrects_its_call_in_the_next_turn():
    num_corrected = 0
    for row, turns in searches("recover"):
        for (wrong, kind, _), (good, next_kind, _) in itertools.pairwise(follow(row, turns)):
            if kind == "error":
                assert next_kind == "zoom" and good.startswith("<think>" + PHRASES["sorry"])
                assert re.findall(r" Go [a-z-]+\.", wrong) == re.findall(r" Go [a-z-]+\.", good)
                num_corrected += 1
    assert num_corrected > 60  # by chance, a short search ends before its mistake


def test_search_again_overlooks_the_target_once():
    for row, turns in searches("search_again"):
        assert sum(PHRASES["again"] in text for text, _ in turns) == 1
        first_regions = [region for region, cell in scans_of(row, turns)[0] if cell is None]
        # all nine regions, the overlooked target's too
        assert first_regions == unseen_regions(turns[0][0]) and len(first_regions) == 9
        views = [view for _, _, view in follow(row, turns)]
        target_region, _ = target_of(row)
        assert views.count((target_region, None)) == 2  # overlooked, then seen


def test_recheck_looks_at_the_target_twice():
    for row, turns in searches("recheck"):
        views = [view for _, _, view in follow(row, turns)]
        assert views[-2:] == [target_of(row)] * 2 and views.count(target_of(row)) == 2
        assert [PHRASES["check"] in text for text, _ in turns[-2:]] == [True, False]


def test_backtrack_says_so_and_returns_to_its_candidates():
    num_mistakes = 0
    for row, turns in searches("backtrack"):
        for (_, learn), (text, next_learn) in itertools.pairwise(turns):
            if not learn:
                assert text.startswith("<think>" + PHRASES["empty"] + PHRASES["back"])
                assert next_learn
                num_mistakes += 1
    assert num_mistakes > 60


def test_a_guess_comes_after_one_to_four_turns_and_says_so():
    """Unless the search has ended before. It is a digit or a shape, as the question asks, and
    evenly spread."""
    num_turns = collections.Counter()
    guesses = collections.Counter()
    for row, turns in searches("guess", 100):
        text, learn = turns[-1]
        kind, answer = tools.parse_turn(text)
        assert kind == "answer" and learn
        if "Guess" not in text:  # the target was seen first
            assert answer == row["answer"] and len(turns) <= 4
            continue
        assert text.endswith(f" Guess {answer}.</think><answer>{answer}</answer>")
        assert answer in (SHAPES if row["answer"] in SHAPES else set("0123456789"))
        num_turns[len(turns)] += 1
        guesses[answer] += 1
    assert set(num_turns) == {1, 2, 3, 4} and min(num_turns.values()) > 40
    assert len(guesses) == 14 and min(guesses.values()) > 3


def test_refused_calls_are_wrong_in_several_ways():
    """Malformed JSON, a box out of range, swapped corners, three numbers, an observation that does
    not exist."""
    rng = np.random.default_rng(0)
    image = Image.new("RGB", (90, 90))
    errors = collections.Counter()
    for _ in range(200):
        call_json = collect_coldstart.refused_call(rng, "observation_1", "center", 1)
        turn, finish_reason, _ = tools.take_turn(
            [image, image], f"<grounding>{call_json}</grounding>", 1, 9, 9)
        assert finish_reason is None
        errors[re.sub("[2-9]", "n", turn["error"])] += 1
    assert len(errors) == 4 and min(errors.values()) > 10


# ---- solve --------------------------------------------------------------------------------------


def test_trajectories_are_played_through_the_real_tool(world, prompts):
    """Every strategy, with images: rows are complete, correct, and replay to the views that the
    turns speak about."""
    rows = tools.read_jsonl(world / "train.jsonl")
    strategies = set()
    for index in range(160):
        row = rows[index % len(rows)]
        solved = collect_coldstart.solve((index, row), world, prompts, 32, 0)
        is_wrong_guess = solved["strategy"] == "guess" and solved["reward"] == 0.0
        if solved["finish_reason"] == "over_turn" or is_wrong_guess:
            continue
        tools.check_trajectory(solved)
        strategies.add(solved["strategy"])
        # 1. The row
        assert (solved["finish_reason"], solved["reward"]) == ("answer", 1.0)
        assert solved["prediction"] == row["answer"]
        assert solved["system"] == prompts["system"] and solved["teacher"] == "scripted"
        assert {key: solved[key] for key in solved if key in row} == tools.without_layout(row)
        # 2. Its turns
        texts = [(turn["text"], turn.get("learn", True)) for turn in solved["turns"]]
        for turn, (_, kind, _) in zip(solved["turns"], follow(row, texts)):
            assert kind == ("zoom" if "zoom" in turn else "error" if "error" in turn else "answer")
        # 3. Its views
        image = tools.open_image(world / row["image"])
        views = tools.replay(solved, image)
        assert len(views) == 1 + sum("zoom" in turn for turn in solved["turns"])
        is_guess = solved["strategy"] == "guess"
        assert is_guess or abs(views[-1].size[0] - image.size[0] / 9) <= 2
    assert strategies == set(STRATEGIES)


@pytest.mark.parametrize("own_text, stored", [
    ("Look.", "Look."), ("", ""), (None, tools.PROMPTS["system"])])
def test_a_trajectory_keeps_the_system_text_of_its_question(own_text, stored):
    row = {"id": "1", "image": "1.jpg", "question": "What?", "answer": "7", "system": own_text}
    turns = [{"text": "<answer>7</answer>"}]
    solved = collect_coldstart.trajectory_row(row, tools.PROMPTS, turns, "answer", "7", "scripted")
    assert solved["system"] == stored


def test_a_guess_is_tried_again_until_it_is_correct(world, prompts, monkeypatch):
    """Rejection sampling: with ten attempts 1 - 0.9^10 = 65% of digits and 94% of shapes are
    guessed correctly in the end. Wrong ones stay wrong rows, which the collection leaves out."""
    monkeypatch.setattr(collect_coldstart, "STRATEGIES", {"guess": 1.0})
    rows = tools.read_jsonl(world / "train.jsonl")
    solved = [collect_coldstart.solve((index, rows[index % len(rows)]), world, prompts, 32, 0)
              for index in range(60)]
    guesses = [row for row in solved if row["strategy"] == "guess"]
    for row in guesses:
        assert row["reward"] == 1.0 or row["attempts"] == collect_coldstart.MAX_ATTEMPTS
    assert 0.5 < sum(row["reward"] for row in guesses) / len(guesses) < 1.0
    assert max(row["attempts"] for row in guesses if row["reward"] == 1.0) > 3


def test_a_search_is_not_tried_again(world, prompts, monkeypatch):
    monkeypatch.setattr(collect_coldstart, "STRATEGIES", {"scan": 1.0})
    row = tools.read_jsonl(world / "train.jsonl")[0]
    solved = collect_coldstart.solve((0, {**row, "answer": "none"}), world, prompts, 32, 0)
    assert solved["attempts"] == 1


def test_a_trajectory_depends_on_seed_and_index_only(world, prompts):
    row = tools.read_jsonl(world / "train.jsonl")[0]
    once, again = ([collect_coldstart.solve((index, row), world, prompts, 32, seed)
                    for index, seed in itertools.product(range(4), range(2))] for _ in range(2))
    assert once == again and len({str(solved["turns"]) for solved in once}) > 4


# ---- The command: what it keeps -----------------------------------------------------------------


def collect(folder, out, *flags, check=True):
    common = ["--data", folder / "train.jsonl", "--out", folder / out, "--workers", 2]
    return run_script("collect_coldstart.py", *common, *flags, check=check)


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory):
    """160 questions about twelve images, and the result of an undisturbed collection in
    whole.jsonl."""
    out = tmp_path_factory.mktemp("collect")
    (out / "images").symlink_to(world / "images")
    rows = tools.read_jsonl(world / "train.jsonl")
    questions = [{**rows[index % 12], "id": f"q{index}"} for index in range(160)]
    tools.write_jsonl(out / "train.jsonl", questions)
    (out / "whole.txt").write_text(collect(out, "whole.jsonl").stdout)
    return out


def test_the_command_keeps_correct_trajectories_and_counts(folder):
    rows = tools.read_jsonl(folder / "whole.jsonl", tools.check_trajectory)
    stdout = (folder / "whole.txt").read_text()
    for row in rows:
        assert row["reward"] == 1.0 and row["finish_reason"] == "answer"
        assert len(row["turns"]) <= 32
        assert not {"objects", "wallpaper"} & set(row)  # only the teacher may know the layout
    assert f"160 trajectories, {len(rows)} correct and kept, {160 - len(rows)} left out" in stdout
    assert "finished in" in stdout
    for name, values in (("strategy", [row["strategy"] for row in rows]),
                         ("turns", [len(row["turns"]) for row in rows])):
        counts = collections.Counter(values)
        assert f"per {name}: " + ", ".join(f"{key}: {counts[key]}"
                                           for key in sorted(counts)) in stdout
    assert {row["strategy"] for row in rows} == set(STRATEGIES)
    numbers = [int(row["id"][1:]) for row in rows]
    assert numbers == sorted(numbers)
    assert not list(folder.glob("*whole*partial*"))


def test_long_solutions_are_left_out_and_counted(folder):
    """With a cap of 5 turns some solutions are too long: they are wrong answers as far as the file
    is concerned."""
    tools.write_jsonl(folder / "few.jsonl", tools.read_jsonl(folder / "train.jsonl")[:40])
    stdout = collect(folder, "short.jsonl", "--data", folder / "few.jsonl", "--max_turns", 5).stdout
    kept = tools.read_jsonl(folder / "short.jsonl")
    assert 0 < len(kept) < 38
    assert all(len(row["turns"]) <= 5 and row["reward"] == 1.0 for row in kept)
    counts = re.search(r"40 trajectories, (\d+) correct and kept, (\d+) left out \((.*)\)", stdout)
    assert int(counts[1]) == len(kept) and int(counts[2]) == 40 - len(kept)
    assert counts[3] == str({"over_turn": 40 - len(kept)})


# ---- The command: killed and started again ------------------------------------------------------


@pytest.fixture(scope="module")
def killed(folder):
    """(path of the partial file, its complete lines) of a collection into killed.jsonl that was
    killed."""
    def partial_files():
        return [path for path in folder.glob("killed.jsonl*partial")
                if path.read_bytes().count(b"\n") >= 3]

    command = [sys.executable, str(ROOT / "collect_coldstart.py"), "--data",
               str(folder / "train.jsonl"), "--out", str(folder / "killed.jsonl"),
               "--workers", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               start_new_session=True)
    while process.poll() is None and not partial_files():
        time.sleep(0.005)
    assert process.poll() is None, "it ended before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)  # its worker too
    assert process.wait() == -signal.SIGKILL and not (folder / "killed.jsonl").exists()
    path, = partial_files()
    lines = path.read_bytes().split(b"\n")[:-1]
    path.unlink()
    assert 3 <= len(lines) < 160
    return path, lines


def test_a_killed_collection_continues_where_it_was(folder, killed):
    """The kill came in the middle of a line. What was finished is not solved again: a mark in it is
    still there."""
    path, lines = killed
    path.write_bytes(b"\n".join(lines)[:-len(lines[-1]) // 2])
    collect(folder, "killed.jsonl")
    assert (folder / "killed.jsonl").read_bytes() == (folder / "whole.jsonl").read_bytes()
    marked = [{**json.loads(line), "mark": True} for line in lines]
    tools.write_jsonl(path, marked)
    collect(folder, "killed.jsonl")
    rows = tools.read_jsonl(folder / "killed.jsonl")
    assert [row for row in rows if "mark" in row] == [row for row in marked if row["reward"] == 1.0]
    assert not list(folder.glob("*killed*partial*")) and not list(folder.glob(".*"))


def test_the_same_command_twice_at_a_time(world, prompts, tmp_path, monkeypatch):
    """The faster one removes the journal of both."""
    def solve_all(solve, jobs, *_):
        yield from map(solve, jobs)
        for path in tmp_path.glob("*.partial"):
            path.unlink()

    monkeypatch.setattr(collect_coldstart, "map_in_processes", solve_all)
    rows = tools.read_jsonl(world / "train.jsonl")[:2]
    args = argparse.Namespace(data=world / "train.jsonl", out=tmp_path / "x.jsonl", max_turns=32,
                              seed=0, workers=1)
    trajectories, _ = collect_coldstart.collect(rows, args, prompts)
    assert len(trajectories) == 2 and not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("change", ["questions", "ids", "max_turns", "prompts"])
def test_a_leftover_of_another_collection_never_leaks_in(folder, killed, change):
    """Either it is refused by name, or it is not used: every row kept belongs to this
    collection."""
    path, lines = killed
    path.write_bytes(b"\n".join(lines) + b"\n")
    rows = tools.read_jsonl(folder / "train.jsonl")[:80]
    if change == "questions":  # drawn with another seed: other images under the same ids
        rows = [{**other, "id": row["id"]} for row, other in itertools.pairwise(rows)]
    if change == "ids":
        rows = [{**row, "id": "x" + row["id"]} for row in rows]
    tools.write_jsonl(folder / "other.jsonl", rows)
    new_prompts = {"system": "Look."} if change == "prompts" else {}
    (folder / "prompts.json").write_text(json.dumps(new_prompts))
    max_turns = 5 if change == "max_turns" else 32
    done = collect(folder, "killed.jsonl", "--data", folder / "other.jsonl", "--max_turns",
                   max_turns, "--prompts", folder / "prompts.json", check=False)
    path.unlink(missing_ok=True)
    if done.returncode:
        assert done.returncode == 1 and "partial" in done.stderr and "Traceback" not in done.stderr
        return
    question_of = {row["id"]: row for row in rows}
    for row in tools.read_jsonl(folder / "killed.jsonl"):
        question = question_of[row["id"]]
        assert all(row[key] == question[key] for key in ("image", "question", "answer"))
        assert len(row["turns"]) <= max_turns
        assert row["system"] == tools.load_prompts(folder / "prompts.json")["system"]


# ---- The command: a user's mistakes -------------------------------------------------------------


@pytest.fixture
def small(folder, tmp_path):
    """Two questions in a folder of their own."""
    (tmp_path / "images").symlink_to(folder / "images")
    tools.write_jsonl(tmp_path / "train.jsonl", tools.read_jsonl(folder / "train.jsonl")[:2])
    return tmp_path


@pytest.mark.parametrize("flags, words", [
    (["--workers", 0], "--workers"), (["--seed", -1], "--seed"), (["--limit", -1], "--limit"),
    (["--max_turns", 0], "--max_turns"), (["--out", "elsewhere.jsonl"], "folder"),
    (["--prompts", "no.json"], "no.json"),
    (["--data", "nowhere/train.jsonl", "--out", "nowhere/x.jsonl"],
     "python build_data.py")], ids=str)
def test_a_bad_flag_is_one_line_and_exit_code_1(small, flags, words):
    done = collect(small, "bad.jsonl", *flags, check=False)
    assert done.returncode == 1
    assert re.fullmatch(r"collect_coldstart\.py: error: .*\n", done.stderr) and words in done.stderr
    assert not list(small.glob("bad*"))


@pytest.mark.parametrize("num_questions", [0, 2])
def test_a_collection_without_any_trajectory_leaves_the_old_file(small, num_questions):
    """Nothing to solve, or nothing solved within two turns: one line, and what was collected before
    is still there."""
    (small / "old.jsonl").write_text("kept")
    questions = tools.read_jsonl(small / "train.jsonl")[:num_questions]
    tools.write_jsonl(small / "train.jsonl", questions)
    done = collect(small, "old.jsonl", "--max_turns", 2, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert (small / "old.jsonl").read_text() == "kept"


def test_a_missing_image_is_told_before_anything_is_solved(small):
    first, second = tools.read_jsonl(small / "train.jsonl")
    tools.write_jsonl(small / "train.jsonl", [first, {**second, "image": "images/gone.jpg"}])
    done = collect(small, "bad.jsonl", check=False)
    assert re.fullmatch(r"collect_coldstart\.py: error: .*train\.jsonl:2: .*gone\.jpg: image is "
                        r"missing; .*\n", done.stderr)
    assert not list(small.glob("bad*"))


def test_the_questions_are_not_overwritten(small):
    before = (small / "train.jsonl").read_bytes()
    done = collect(small, "train.jsonl", check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert (small / "train.jsonl").read_bytes() == before


@pytest.mark.parametrize("changes", [
    {"objects": [["x"]]}, {"objects": [[0, 9, "red", "star", 1]]},
    {"objects": [[0, 1, "red", "star"]]}, {"objects": [[0, 1, "red", "star", "1"]]},
    {"objects": [[0, 1, "grey", "star", 1]]}, {"objects": [[-1, 0, "red", "star", 1]]},
    {"objects": "x"}, {"objects": []}, {"wallpaper": "redredred"}, {"wallpaper": [None] * 8},
    {"wallpaper": [1] * 9}, {"colour": "grey"}, {"colour": 1},
    {"target_attribute": 7}], ids=str)
def test_a_damaged_layout_is_refused_by_line(small, changes):
    first, second = tools.read_jsonl(small / "train.jsonl")
    tools.write_jsonl(small / "train.jsonl", [first, {**second, **changes}])
    with pytest.raises(tools.InputError, match="train.jsonl:2: .*layout"):
        tools.read_jsonl(small / "train.jsonl", collect_coldstart.check_layout)


@pytest.mark.parametrize("key", ["objects", "wallpaper", "colour", "target_attribute"])
def test_questions_without_a_layout_are_refused_by_line(small, key):
    first, second = tools.read_jsonl(small / "train.jsonl")
    del second[key]
    tools.write_jsonl(small / "train.jsonl", [first, second])
    done = collect(small, "bad.jsonl", check=False)
    assert done.returncode == 1 and "train.jsonl:2:" in done.stderr and "layout" in done.stderr
    assert done.stderr.count("\n") == 1
