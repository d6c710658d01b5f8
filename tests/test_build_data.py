"""Specification of the synthetic Visual Probe world.

Every question has exactly one answer, which can be read from the image and from nothing else in it;
a part's wallpaper hints at what it holds and can be seen from afar; the seed decides every byte,
whatever the number of processes; what the instruction data says about a view is true.
"""

import base64
import csv
import hashlib
import io
import itertools
import json
import re
import struct
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import build_data
from extras import crash
import sft
import tools
from build_data import COLOURS, LEVELS, SHAPES
from conftest import Forked, run_script
from tools import POSITIONS


def scenes(count=120):
    """`count` scenes of each level."""
    return [build_data.make_scene(np.random.default_rng([n, i]), level)
            for n, level in enumerate(LEVELS) for i in range(count)]


def crowded_scenes(count=40):
    """`count` scenes of each level with as many objects as the instruction data ever holds."""
    return [build_data.make_scene(np.random.default_rng([n, i]), level, 15, 39)
            for n, level in enumerate(LEVELS) for i in range(count)]


def draw(scene):
    return build_data.draw_scene(np.random.default_rng(0), scene)


def asked_for(scene):
    """The objects that satisfy the question, read from its words alone, and what it asks for."""
    digit = re.fullmatch(r"What digit is on the (\w+) (\w+)\?", scene["question"])
    shape = re.fullmatch(r"Which shape is the (\w+) object with digit (\d)\?", scene["question"])
    assert bool(digit) != bool(shape)
    if digit:
        return [o for o in scene["objects"] if o[2:4] == list(digit.groups())], 4
    return [o for o in scene["objects"] if o[2] == shape[1] and o[4] == int(shape[2])], 3


def close(image, colour):
    """Boolean map of the pixels that look like this colour, as only objects do: wallpaper is a
    faint tint."""
    return np.abs(np.asarray(image).astype(int) - COLOURS[colour]).max(axis=-1) < 30


def ninth(pixels, index):
    """One of the nine places of a view."""
    side, (y, x) = len(pixels) // 3, divmod(index, 3)
    return pixels[side * y:side * (y + 1), side * x:side * (x + 1)]


def core(pixels, cut=0.25):
    """The middle of a place, clear of frames: what lies there is an object."""
    cut = int(cut * len(pixels))
    return pixels[cut:-cut, cut:-cut]


def hue(colour):
    """A colour without its brightness, which is noise in these images: what it has more or less of
    than grey."""
    return np.asarray(colour) - np.mean(colour)


TINTS = {None: np.zeros(3), **{name: 0.35 * hue(colour) for name, colour in COLOURS.items()}}


def papers(image, scene):
    """The wallpaper of each part, read from the whole image: the tint nearest to the mean colour of
    the part's free places."""
    pixels, found = np.asarray(image).astype(float), []
    taken = {tuple(o[:2]) for o in scene["objects"]}
    for part in range(9):
        free = [core(ninth(ninth(pixels, part), place), 0.3)
                for place in range(9) if (part, place) not in taken]
        seen = hue(np.mean(free, axis=(0, 1, 2)))
        found.append(min(TINTS, key=lambda name: np.linalg.norm(seen - TINTS[name])))
    return found


# -------------------------------------------------------------------------------------------------
# Scenes


def test_exactly_one_object_satisfies_the_question():
    for scene in scenes() + crowded_scenes():
        found, field = asked_for(scene)
        assert found == scene["objects"][:1] and str(found[0][field]) == scene["answer"]


def test_both_kinds_all_colours_shapes_and_digits_are_asked_for():
    rows = scenes()
    for level in LEVELS:
        kinds = {r["source"] for r in rows if r["level"] == level}
        assert kinds == {"synthetic_digit", "synthetic_shape"}
    targets = [r["objects"][0] for r in rows]
    assert {t[2] for t in targets} == set(COLOURS) and {t[3] for t in targets} == set(SHAPES)
    assert {t[4] for t in targets} == set(range(10))
    assert {t[0] for t in targets} == {t[1] for t in targets} == set(range(9))
    digits = [r["answer"] for r in rows if r["source"] == "synthetic_digit"]
    shapes = [r["answer"] for r in rows if r["source"] == "synthetic_shape"]
    assert max(map(digits.count, "0123456789")) < 0.25 * len(digits)  # no answer to bet on
    assert max(map(shapes.count, SHAPES)) < 0.4 * len(shapes)


def test_no_two_objects_share_a_place():
    for scene in scenes() + crowded_scenes():
        spots = [tuple(o[:2]) for o in scene["objects"]]
        assert len(set(spots)) == len(spots) and all(0 <= v < 9 for spot in spots for v in spot)


def test_lookalikes_share_the_colour_and_nobody_else_does():
    for scene in scenes():
        same = [o for o in scene["objects"] if o[2] == scene["colour"]]
        assert len(same) == 1 + LEVELS[scene["level"]]["lookalikes"]
        assert len(scene["objects"]) == len(same) + LEVELS[scene["level"]]["others"]


def test_other_numbers_of_objects_can_be_asked_for():
    for scene in crowded_scenes():
        assert len(scene["objects"]) == 1 + 15 + 39
        assert [o[2] == scene["colour"] for o in scene["objects"]] == [True] * 16 + [False] * 39
    one = build_data.make_scene(np.random.default_rng(0), "hard", lookalikes=1)
    assert len(one["objects"]) == 1 + 1 + LEVELS["hard"]["others"]
    one = build_data.make_scene(np.random.default_rng(0), "hard", others=1)
    assert len(one["objects"]) == 1 + LEVELS["hard"]["lookalikes"] + 1


def test_a_wallpaper_is_the_colour_of_an_object_in_its_part():
    for scene in scenes() + crowded_scenes():
        assert len(scene["wallpaper"]) == 9
        for part, wall in enumerate(scene["wallpaper"]):
            held = {o[2] for o in scene["objects"] if o[0] == part}
            assert wall in held or (wall is None and not held)


def test_a_wallpaper_is_a_hint_and_not_the_answer():
    """Every object of a part has the same chance to lend its colour: a part that holds one red and
    one blue object is red as often as blue, and the target's own part often has another
    wallpaper."""
    first, target = [], []
    for scene in scenes():
        for part, wall in enumerate(scene["wallpaper"]):
            held = [o[2] for o in scene["objects"] if o[0] == part]
            if len(held) == 2 and held[0] != held[1]:
                first.append(wall == held[0])
        target.append(scene["wallpaper"][scene["objects"][0][0]] == scene["colour"])
    assert len(first) > 200 and 0.4 < np.mean(first) < 0.6
    assert 0.6 < np.mean(target) < 0.95


def test_levels_get_harder_in_every_respect():
    easy, medium, hard = (LEVELS[level] for level in ("easy", "medium", "hard"))
    for a, b in ((easy, medium), (medium, hard)):
        assert a["side"] < b["side"]
        assert a["lookalikes"] < b["lookalikes"] and a["others"] < b["others"]
        # relative to its place; each place is an 81st of any image
        assert a["radius"] > b["radius"]


def test_the_row_keeps_what_the_teacher_needs_and_is_a_question():
    for scene in scenes(20):
        tools.check_question({"id": "1", "image": "1.jpg", **scene})
        _, _, colour, shape, digit = scene["objects"][0]
        assert scene["colour"] == colour
        assert {scene["target_attribute"], scene["answer"]} == {shape, str(digit)}
        assert json.loads(tools.json_line(scene)) == scene


# -------------------------------------------------------------------------------------------------
# Images


def test_the_target_box_shows_the_target():
    """Zooming into target_bbox, or into its part and then its place, returns the pixels of the
    target's place."""
    for scene in scenes(8):
        image = draw(scene)
        side, (part, place, colour) = LEVELS[scene["level"]]["side"], scene["objects"][0][:3]
        assert image.size == (side, side)
        left, top = (side // 9 * (3 * (part // k % 3) + place // k % 3) for k in (1, 3))
        x0, y0, x1, y1 = (v * side for v in scene["target_bbox"])
        assert abs(x0 - left) + abs(y0 - top) < 0.1
        assert abs(x1 - left - side / 9) + abs(y1 - top - side / 9) < 0.1
        direct = tools.zoom([image], {"bbox_2d": scene["target_bbox"], "source": "original_image"})
        steps = [image]
        for number, index in enumerate((part, place)):
            source = "observation_1" if number else "original_image"
            box = build_data.position_box(POSITIONS[index])
            steps.append(tools.zoom(steps, {"bbox_2d": box, "source": source}))
        for view in (direct, steps[-1]):
            assert max(abs(v - side // 9) for v in view.size) <= 2
            assert core(close(view, colour)).mean() > 0.2


def test_the_image_shows_every_object_and_no_other():
    """On a place lies its object; anywhere in a part, walls and frames included, are only colours
    that the part holds."""
    for scene in scenes(4) + crowded_scenes(1):
        image = draw(scene)
        seen = {colour: close(image, colour) for colour in COLOURS}
        places = [[part, place, colour]
                  for colour, part, place in itertools.product(COLOURS, range(9), range(9))
                  if core(ninth(ninth(seen[colour], part), place)).mean() > 0.15]
        parts = [(part, colour) for colour, part in itertools.product(COLOURS, range(9))
                 if ninth(seen[colour], part).sum() > 10]
        assert sorted(places) == sorted(o[:3] for o in scene["objects"])
        assert set(parts) == {(part, colour) for part, _, colour, _, _ in scene["objects"]}


def test_the_wallpaper_can_be_seen_in_the_image_and_at_the_size_that_the_model_sees():
    for scene in scenes(12):
        image = draw(scene)
        assert papers(image, scene) == scene["wallpaper"]
        assert papers(tools.resize_for_model(image, 6000, 8000), scene) == scene["wallpaper"]


def test_frames_tell_where_a_part_and_a_place_lie():
    """A thin dark frame along the edges of every part, a thick one along the edges of the wall."""
    for scene in scenes(2):
        pixels = np.asarray(draw(scene)).astype(float).mean(axis=-1)
        cell = len(pixels) // 9
        for x in range(9):  # columns and rows of places: the strips at their edges, those inside
            for lines in (pixels[:, cell * x:cell * (x + 1)], pixels[cell * x:cell * (x + 1)].T):
                dark = [lines[:, :cell // 12].mean() < 45, lines[:, -(cell // 12):].mean() < 45]
                assert dark == [x % 3 == 0, x % 3 == 2]
                assert (lines[:, cell // 8:cell // 4].mean() < 60) == (x == 0)
                assert (lines[:, -(cell // 4):-(cell // 8)].mean() < 60) == (x == 8)


# -------------------------------------------------------------------------------------------------
# Determinism and splits


def test_the_seed_decides_every_byte(tmp_path):
    job = ("train", 5, "medium")
    row = build_data.make_question(job, tmp_path / "a", 3)
    assert build_data.make_question(job, tmp_path / "b", 3) == row
    a, b = ((tmp_path / name / row["image"]).read_bytes() for name in "ab")
    assert a == b
    other = build_data.make_question(job, tmp_path / "a", 4)
    # two seeds can share a folder
    assert other["objects"] != row["objects"] and other["image"] != row["image"]


def test_a_rerun_draws_only_what_is_missing(tmp_path):
    """After a kill: a finished image is left alone, a lost one is drawn again to the byte, and the
    rows are the same."""
    jobs = [("easy", 0, "easy"), ("easy", 1, "easy")]
    rows = [build_data.make_question(job, tmp_path, 0) for job in jobs]
    first, second = (tmp_path / row["image"] for row in rows)
    before = first.read_bytes()
    first.unlink()
    second.write_bytes(b"finished")
    assert [build_data.make_question(job, tmp_path, 0) for job in jobs] == rows
    assert first.read_bytes() == before and second.read_bytes() == b"finished"


def test_splits_and_questions_differ(tmp_path):
    """No scene appears twice, within a split or across them, at the same level and index too."""
    jobs = [(split, i, "easy") for split in build_data.SPLITS[:4] for i in range(4)]
    rows = [build_data.make_question(job, tmp_path, 0) for job in jobs]
    for key in ("id", "image", "objects"):
        assert len({str(r[key]) for r in rows}) == len(rows)
    assert len({(tmp_path / r["image"]).read_bytes() for r in rows}) == len(rows)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A small world, as the command makes it, in two processes."""
    out = tmp_path_factory.mktemp("built")
    done = run_script("build_data.py", "--train", 6, "--val", 3, "--test", 3, "--scenes", 2,
                      "--seed", 1, "--workers", 2, "--out", out)
    return out, done


def test_the_command_writes_what_one_process_would(built, tmp_path):
    out, done = built
    mixed = {"train": ["easy", "medium", "hard"] * 2, "val": ["easy", "medium", "hard"]}
    for split in ("train", "val", "easy", "medium", "hard"):
        rows = tools.read_jsonl(out / f"{split}.jsonl", tools.check_question)
        levels = mixed.get(split, [split] * 3)
        jobs = [(split, i, level) for i, level in enumerate(levels)]
        assert rows == [build_data.make_question(job, tmp_path, 1) for job in jobs]
        assert f"{split}.jsonl: {len(rows)} questions" in done.stdout
    rows = tools.read_jsonl(out / "instruct.jsonl", tools.check_trajectory)
    made = [build_data.make_instructions(i, tmp_path, 1, 6000, 8000) for i in range(2)]
    assert rows == [*made[0], *made[1]]
    assert f"instruct.jsonl: {len(rows)} single-view questions" in done.stdout
    assert "finished in" in done.stdout
    files = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*.jpg"))
    assert files == sorted(p.relative_to(out) for p in out.rglob("*.jpg"))
    assert all((tmp_path / f).read_bytes() == (out / f).read_bytes() for f in files)


def test_each_level_of_the_training_questions_has_a_file_of_its_own(built):
    out, _ = built
    rows = tools.read_jsonl(out / "train.jsonl")
    for level in LEVELS:
        mine = [row for row in rows if row["level"] == level]
        assert tools.read_jsonl(out / f"train_{level}.jsonl") == mine != []


def test_a_change_of_a_level_never_reuses_an_old_picture(tmp_path, monkeypatch):
    """The name of an image depends on what is drawn: with other settings a rerun in the same folder
    draws anew."""
    before = build_data.make_question(("easy", 0, "easy"), tmp_path, 0)["image"]
    monkeypatch.setitem(LEVELS, "easy", {**LEVELS["easy"], "radius": 0.3})
    after = build_data.make_question(("easy", 0, "easy"), tmp_path, 0)["image"]
    assert before != after and (tmp_path / before).read_bytes() != (tmp_path / after).read_bytes()


def test_every_image_of_every_row_opens(built):
    out, _ = built
    for split in build_data.SPLITS:
        for row in tools.read_jsonl(out / f"{split}.jsonl"):
            image = tools.open_image(out / row["image"])
            side = 84 if split == "instruct" else LEVELS[row["level"]]["side"]
            assert image.size == (side, side)
    assert not [p for p in out.rglob(".*")]  # no temporary file is left behind


# -------------------------------------------------------------------------------------------------
# Instruction data


@pytest.fixture(scope="module")
def instructions(tmp_path_factory):
    """Folder, the rows about eight scenes, and these scenes, as they were drawn."""
    out, draw_scene = tmp_path_factory.mktemp("instructions"), build_data.draw_scene
    rows, drawn = [], []

    def draw_and_keep(rng, scene):
        drawn.append(scene)
        return draw_scene(rng, scene)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_data, "draw_scene", draw_and_keep)
        for index in range(8):
            rows += build_data.make_instructions(index, out, 0, 6000, 8000)
    return out, rows, drawn


def subject(row, drawn):
    """What an instruction row is about, by its view's name: (scene, part or None, place or
    None)."""
    name = re.fullmatch(r"views/0_(\d+)_(?:all|p(\d)(\d)?)\.jpg", row["image"])
    index, part, place = name.groups()
    return drawn[int(index)], part and int(part), place and int(place)


def test_instructions_are_one_turn_trajectories_without_the_protocol(instructions):
    out, rows, _ = instructions
    assert len({r["id"] for r in rows}) == len(rows)
    for row in rows:
        tools.check_trajectory(row)
        assert [set(t) for t in row["turns"]] == [{"text"}]
        assert row["turns"][0]["text"] == row["answer"]
        assert not re.search("<|original_image|bbox", row["question"] + row["answer"])
        # the size at which the model sees it
        assert tools.open_image(out / row["image"]).size == (84, 84)


def test_every_other_scene_is_crowded_and_shows_no_view_of_the_whole(instructions):
    """Beside each view of one place stands a text, a list or sorting; six of ten are named."""
    _, rows, drawn = instructions
    assert len(drawn) == 8
    named, shown = 0, 0
    for index, scene in enumerate(drawn):
        mine = [row for row in rows if row["id"].startswith(f"instruct_{index:05d}_")]
        texts = [row for row in mine if row["question"].startswith(("Done:", "Want"))]
        about = [subject(row, drawn)[1:] for row in mine if row not in texts]
        whole = about.count((None, None))
        parts = sum(part is not None and place is None for part, place in about)
        count, level = len(scene["objects"]), LEVELS[scene["level"]]
        if index % 2:
            assert 21 <= count <= 55 and (whole, parts) == (0, 24)
        else:
            assert count == 1 + level["lookalikes"] + level["others"]
            assert (whole, parts) == (6, 15)
        assert len(texts) == min(10, count) + 1
        assert all(subject(row, drawn)[2] is not None for row in texts)
        named, shown = named + len(about) - whole - parts, shown + len(texts)
    assert 0.4 < named / shown < 0.8


def test_an_errand_is_the_list_without_its_first_step(instructions):
    """What the reply still lists is what the question listed, less the place gone to; it goes to
    the first of the rest, to a place in an observation before a part."""
    _, rows, _ = instructions
    errands = [row for row in rows if row["question"].startswith("Done:")]
    assert len(errands) > 12          # four in ten of what goes beside a single place
    for row in errands:
        def lists(text):
            here = re.search(r" In (observation_\d+) ([a-z -]+)\.", text)
            later = re.search(r" Later ([a-z -]+)\.", text)
            go = re.search(r" Go ([a-z-]+)\.", text)
            return (here[2].split() if here else [], later[1].split() if later else [],
                    go and go[1], here and here[1])
        here, later, go, source = lists(row["question"])
        left_here, left_later, goes, left_source = lists(row["answer"])
        first = (here or later or [None])[0]
        assert go == first
        assert (left_here, left_later) == ((here[1:], later) if here else (here, later[1:]))
        assert goes == (left_here or left_later or [None])[0]
        assert not left_here or left_source == source
        assert goes is not None or row["answer"] == "Next: Nothing."


def test_sorting_gives_every_object_its_verdict(instructions):
    """"Want 5: blue star 5, red circle 2." lists objects; the reply repeats each and says whether
    it carries what is wanted."""
    _, rows, _ = instructions
    verdicts = []
    for row in (row for row in rows if row["question"].startswith("Want")):
        wanted, listed = re.fullmatch(r"Want (\w+): (.*)\.", row["question"]).groups()
        expected = []
        for name in listed.split(", "):
            verdicts.append("Yes" if wanted in name.split() else "No")
            expected.append(f"I see {name}. Want {wanted}. {verdicts[-1]}.")
        assert row["answer"] == " ".join(expected)
    assert min(verdicts.count("Yes"), verdicts.count("No")) > 10


WORLD = r"What digit is on the (\w+) (\w+)\?|Which shape is the (\w+) object with digit (\d)\?"
MAP = r"What is where\?|(?:Where is|Which walls are) (\w+), place by place\?"


def asked_colour(question):
    """The colour that a question of the world names; None for another question."""
    about = re.fullmatch(WORLD, question)
    return about and (about[1] or about[3])


def said(answer, word):
    """{colour: places} of a reply such as "I see red in top left. I see blue in right."; word
    " walls": of "I see red walls in top left." """
    form = rf"(I see \w+{word} in [a-z -]+\. ?)+|I see no \w+{word}\.|I see nothing\."
    assert re.fullmatch(form, answer)
    found = re.findall(rf"I see (\w+){word} in ([a-z -]+)\.", answer)
    return {colour: places.split() for colour, places in found}


def groups(names):
    """{name: the places that have it} of a list with a name, or None, per place."""
    return {name: [p for p, n in zip(POSITIONS, names) if n == name]
            for name in names if name is not None}


def test_instructions_about_walls_are_true(instructions):
    """ "Which walls are red?", or a question of the world about something red, names exactly the
    parts whose wallpaper looks red in the stored view of the whole image."""
    out, rows, drawn = instructions
    checked = {True: 0, False: 0}
    for row in rows:
        scene, part, _ = subject(row, drawn)
        about = re.fullmatch(r"Which walls are (\w+)\?", row["question"])
        assert part is None or about is None
        if part is None and not re.fullmatch(MAP, row["question"]):
            seen = groups(papers(tools.open_image(out / row["image"]), scene))
            asked = about[1] if about else asked_colour(row["question"])
            if asked != "what":
                seen = {colour: places for colour, places in seen.items() if colour == asked}
                assert seen or row["answer"] == f"I see no {asked} walls."
            assert said(row["answer"], " walls") == seen
            checked[bool(seen)] += 1
    assert min(checked.values()) > 2


def test_instructions_about_a_part_are_true(instructions):
    """ "Where is red?", or a question of the world about something red, names exactly the places of
    the stored view's pixels that hold red."""
    out, rows, drawn = instructions
    checked = {True: 0, False: 0}
    for row in rows:
        about = re.fullmatch(r"Where is (\w+)\?", row["question"])
        _, part, place = subject(row, drawn)
        assert about is None or part is not None and place is None
        if part is not None and place is None and not re.fullmatch(MAP, row["question"]):
            view, seen = tools.open_image(out / row["image"]), {}
            asked = about[1] if about else asked_colour(row["question"])
            for colour in COLOURS if asked == "everything" else [asked]:
                pixels = close(view, colour)
                seen[colour] = [name for i, name in enumerate(POSITIONS)
                                if core(ninth(pixels, i)).mean() > 0.1]
            if not any(seen.values()):
                nothing = "I see nothing." if asked == "everything" else f"I see no {asked}."
                assert row["answer"] == nothing
            there = {colour: places for colour, places in seen.items() if places}
            assert said(row["answer"], "") == there
            checked[any(seen.values())] += 1
    assert min(checked.values()) > 20


def test_maps_name_what_is_at_each_place(instructions):
    """ "What is where?": the nine places in reading order with the colour of their object, or of
    their wallpaper; "Where is red, place by place?": with that colour only."""
    _, rows, drawn = instructions
    seen, one_colour = set(), {True: 0, False: 0}
    for row in rows:
        about, (scene, part, place) = re.fullmatch(MAP, row["question"]), subject(row, drawn)
        if about is None:
            continue
        assert place is None and ("wallpaper" in row["question"]) <= (part is None)
        if part is None:
            names = [f"{wall} walls" if wall else "nothing" for wall in scene["wallpaper"]]
        else:
            colours = {o[1]: o[2] for o in scene["objects"] if o[0] == part}
            names = [colours.get(place, "nothing") for place in range(9)]
        if about[1]:
            names = [name if name.split()[0] == about[1] else "nothing" for name in names]
            one_colour[set(names) != {"nothing"}] += 1
        assert row["answer"] == " ".join(f"{place} {name}." for place, name in zip(POSITIONS, names))
        seen |= set(names)
    assert seen >= {*COLOURS, "nothing", "red walls"}
    assert min(one_colour.values()) > 3


def test_instructions_about_a_place_name_its_object(instructions):
    """The colour is checked against the pixels of the stored view, shape and digit against the
    layout."""
    out, rows, drawn = instructions
    empty = 0
    for row in (r for r in rows if r["question"] == "What is this?"):
        scene, part, place = subject(row, drawn)
        there = [o for o in scene["objects"] if o[:2] == [part, place]]
        seen = "I see {} {} {}.".format(*there[0][2:]) if there else "I see nothing."
        assert row["answer"] == seen
        view = tools.open_image(out / row["image"])
        assert [c for c in COLOURS if core(close(view, c)).mean() > 0.1] == [o[2] for o in there]
        empty += not there
    assert empty > 0


def test_questions_about_a_place_are_answered_with_verdict_and_answer(instructions):
    """A question of the world over one place: what is there, what is wanted, the verdict, and after
    a Yes the answer, each checked against the layout and the question's own words. Both verdicts
    occur for both kinds of question."""
    _, rows, drawn = instructions
    verdicts = {}
    for row in rows:
        about, (scene, part, place) = re.fullmatch(WORLD, row["question"]), subject(row, drawn)
        if about is None or place is None:
            continue
        there = [o[2:] for o in scene["objects"] if o[:2] == [part, place]]
        seen = "I see {} {} {}.".format(*there[0]) if there else "I see nothing."
        wanted = about[2] or about[4]
        found = bool(there) and (there[0] == [about[1], about[2], there[0][2]]
                                 or about[4] == str(there[0][2]))
        answer = f" Answer {there[0][2] if about[2] else there[0][1]}." if found else ""
        assert row["answer"] == f"{seen} Want {wanted}. {'Yes' if found else 'No'}.{answer}"
        assert not there or asked_colour(row["question"]) == there[0][0]
        verdicts[bool(about[2]), found] = verdicts.get((bool(about[2]), found), 0) + 1
    assert len(verdicts) == 4 and min(verdicts.values()) > 2


def test_descriptions_by_hand():
    objects = [[0, 8, "red", "star", 7], [0, 2, "red", "circle", 1], [0, 4, "blue", "square", 0],
               [5, 0, "red", "star", 2]]
    assert build_data.describe_part(objects, 0, "red") == "I see red in top-right bottom-right."
    assert build_data.describe_part(objects, 5, "blue") == "I see no blue."
    every = "I see red in top-right bottom-right. I see blue in center."
    for part, reply in ((0, every), (1, "I see nothing.")):
        colours = build_data.colours_of(objects, part)
        lessons = build_data.lessons_on_nine("part", colours, "?", ["red", "blue"], False)
        assert ("Where is everything?", reply) in list(lessons)
    walls = ["blue", None, "red", None, None, "blue", None, None, None]
    assert build_data.describe_walls(walls, "blue") == "I see blue walls in top-left right."
    assert build_data.describe_walls(walls, "green") == "I see no green walls."
    every = "I see red walls in top-right. I see blue walls in top-left right."
    lessons = build_data.lessons_on_nine("wallpaper", walls, "?", ["red", "blue"], False)
    assert ("Which walls are what?", every) in list(lessons)
    assert build_data.describe_cell(objects, 0, 8) == "I see red star 7."
    assert build_data.describe_cell(objects, 0, 0) == "I see nothing."


# -------------------------------------------------------------------------------------------------
# Published data sets, in their own formats at small scale


def picture(number=0, size=(60, 40), kind="PNG"):
    """Bytes of an image file; each number is another image."""
    file = io.BytesIO()
    Image.new("RGB", size, (number % 256, 3 * number % 256, 200)).save(file, kind)
    return file.getvalue()


def bomb(side):
    """A PNG that claims side x side pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = (struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part))
              for part in (header, b"IDAT" + zlib.compress(bytes(100)), b"IEND"))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def stored(data, suffix="png"):
    return f"images/{hashlib.sha256(data).hexdigest()[:20]}.{suffix}"


def base64_of(data):
    return base64.b64encode(data).decode()


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def write_tsv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        table.writeheader()
        table.writerows(rows)


def write_parquet(path, rows, **more):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, **more)


def refused(monkeypatch, *flags):
    """The one line with which the command refuses these flags, without its name; Python prints it
    on stderr and exits with code 1."""
    monkeypatch.setattr(sys, "argv", ["build_data.py", *map(str, flags)])
    with pytest.raises(SystemExit, match=r"build_data\.py: error: ") as stop:
        tools.run(build_data.main)
    return stop.value.code.removeprefix("build_data.py: error: ")


def imported(capsys, name, source, out, seed=0):
    """Import; returns ({stem: rows}, {stem: (read, written)}, {"3 skipped: why (first: file:row)",
    ...})."""
    capsys.readouterr()
    build_data.import_data(name, source, out, seed)
    lines = capsys.readouterr().out.splitlines()
    form = r".*/(\w+)\.jsonl: (\d+) rows read, (\d+) written"
    found = (re.fullmatch(form, line) for line in lines)
    counts = {m[1]: (int(m[2]), int(m[3])) for m in found if m}
    rows = {path.stem: tools.read_questions(path) for path in out.glob("*.jsonl")}
    written = {stem: number for stem, (_, number) in counts.items()}
    assert {stem: len(r) for stem, r in rows.items()} == written
    for row in itertools.chain(*rows.values()):
        tools.open_image(out / row["image"])
    return rows, counts, {line.strip() for line in lines if line.startswith("    ")}


def probe(name, number, folder="VisualProbe_Hard", image=None, **more):
    """A row of VisualProbe."""
    return {"doc_id": f"{name}_{number}", "problem": f"<image>\nWhat is {number}?",
            "solution": "White.", "images": [image or f"{folder}/data/{number}.jpg"],
            "data_source": name, **more}


def visualprobe(source, count=3):
    for folder, name in (("VisualProbe_train", "train"), ("VisualProbe_Easy", "val"),
                         ("VisualProbe_Hard", "val"), ("DeepEyes_train_4K", "train")):
        for i in range(count):
            write(source / folder / "data" / f"{i}.jpg", picture(i, kind="JPEG"))
        rows = [probe(folder.lower(), i, folder) for i in range(count)]
        write(source / folder / f"{name}.json", json.dumps(rows))


def test_visualprobe(tmp_path, capsys):
    """Every folder becomes a file named after it; images are kept to the byte, the same image of
    several sets once."""
    visualprobe(tmp_path / "in")
    rows, counts, notes = imported(capsys, "visualprobe", tmp_path / "in", tmp_path / "out")
    assert counts == dict.fromkeys(["train", "easy", "hard", "deepeyes_train_4k"], (3, 3))
    assert notes == set()
    image = picture(2, kind="JPEG")
    assert rows["hard"][2] == {
        "id": "visualprobe_hard_2", "image": stored(image, "jpg"), "question": "What is 2?",
        "answer": "White.", "source": "visualprobe_hard", "level": "hard"}
    assert "level" not in rows["deepeyes_train_4k"][0] and "level" not in rows["train"][0]
    assert (tmp_path / "out" / stored(image, "jpg")).read_bytes() == image
    assert len(list((tmp_path / "out" / "images").iterdir())) == 3
    source = tmp_path / "in" / "VisualProbe_Hard"
    alone, _, _ = imported(capsys, "visualprobe", source, tmp_path / "alone")
    assert alone == {"hard": rows["hard"]}  # one data set's own folder as the source


def test_rows_that_cannot_be_used_are_counted_and_the_others_kept(tmp_path, capsys):
    source, secret = tmp_path / "in", write(tmp_path / "secret.png", picture(7))
    folder = source / "VisualProbe_Hard"
    good, jpeg = write(folder / "data" / "good.png", picture(1)), picture(5, (300, 300), "JPEG")
    for name, data in (("cut.jpg", jpeg[:len(jpeg) // 2]), ("text.jpg", b"no image"),
                       ("bomb.png", bomb(60_000)), ("large.png", bomb(12_000)),
                       ("page.ppm", picture(3, kind="PPM"))):
        write(folder / "data" / name, data)
    (folder / "data" / "link.png").symlink_to(secret)
    (folder / "data" / "near.png").symlink_to(good)
    here = "VisualProbe_Hard/data"
    paths = [f"{here}/good.png", "../secret.png", "VisualProbe_Hard/../../secret.png", str(secret),
             f"{here}/link.png", f"{here}/near.png", f"{here}/cut.jpg", f"{here}/text.jpg",
             f"{here}/page.ppm", f"{here}/bomb.png", f"{here}/large.png", f"{here}/none.png", here,
             "a\0b", "n" * 5000]
    rows = [probe("p", i, image=path) for i, path in enumerate(paths)]
    rows += [[], probe("p", 20, images=["a", "b"]), probe("p", 21, images=[3]),
             probe("p", 22, images=None),
             {**rows[0], "doc_id": "p_23", "problem": "<image>\n \ud800"},
             {**rows[0], "doc_id": "p_24", "solution": 0.5},
             {k: v for k, v in rows[0].items() if k != "problem"},
             {**rows[0], "doc_id": "p_26", "problem": "<image>\n"},
             rows[0], probe("p", 28, image="VisualProbe_Hard/data/../data/good.png")]
    write(folder / "val.json", json.dumps(rows))
    found, counts, notes = imported(capsys, "visualprobe", source, tmp_path / "out")
    assert [row["id"] for row in found["hard"]] == ["p_0", "p_5"] and counts == {"hard": (25, 2)}
    images = [p.name for p in (tmp_path / "out" / "images").iterdir()]
    assert images == [Path(stored(good.read_bytes())).name]
    assert notes == {
        "5 skipped: image path leaves the folder of the data (first: val.json:2)",
        "3 skipped: image cannot be decoded (first: val.json:7)",
        "2 skipped: image has too many pixels (first: val.json:10)",
        "5 skipped: image is missing (first: val.json:12)",
        "1 skipped: not a readable row (first: val.json:16)",
        "2 skipped: not exactly one image (first: val.json:17)",
        "1 skipped: text is not UTF-8 (first: val.json:20)",
        "1 skipped: field 'solution' is missing or not text (first: val.json:21)",
        "1 skipped: field 'problem' is missing or not text (first: val.json:22)",
        "1 skipped: field 'question' must be a non-empty string (first: val.json:23)",
        "1 skipped: id stands in an earlier row too (first: val.json:24)"}
    assert sum(int(note.split()[0]) for note in notes) == 23


def vstar_row(number, label="B", text=None):
    options = "(A) rubber\n(B) cotton wool\n(C) a (red) one\n(D) 4"
    return {"image": f"direct_attributes/sa_{number}.jpg", "category": "direct_attributes",
            "label": label, "text": text or f"What is it?\n{options}\nAnswer with the letter."}


def vstar(source, rows):
    for i in range(len(rows)):
        write(source / "direct_attributes" / f"sa_{i}.jpg", picture(i))
    write(source / "test_questions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def test_vstar_keeps_the_options_in_their_order(tmp_path, capsys):
    """Options are listed once; the sentence behind them goes, since the prompts say how to answer.
    A wrong label is counted."""
    rows = [vstar_row(0), vstar_row(1, "C"), vstar_row(2, "E"), vstar_row(3, "AB"),
            vstar_row(4, text="What is it?"),
            vstar_row(5, text="What?\n(A) x\n(C) y")]
    vstar(tmp_path / "in", rows)
    with open(tmp_path / "in" / "test_questions.jsonl", "ab") as file:
        again = json.dumps(vstar_row(0, "A")).replace("direct_attributes\"", "\\ud800\"")
        file.write(b'{"broken\n\xff\xfe\n' + again.encode())
    found, counts, notes = imported(capsys, "vstar", tmp_path / "in", tmp_path / "out")
    assert counts == {"test": (9, 2)} and notes == {
        "2 skipped: the label is not the letter of an option (first: test_questions.jsonl:3)",
        "2 skipped: options are not a list of (A), (B), ... in this order "
        "(first: test_questions.jsonl:5)",
        "2 skipped: not a readable row (first: test_questions.jsonl:7)",
        "1 skipped: id stands in an earlier row too (first: test_questions.jsonl:9)"}
    assert found["test"][0] == {
        "id": "direct_attributes/sa_0", "image": stored(picture(0)), "source": "vstar",
        "category": "direct_attributes",
        "question": "What is it?\n(A) rubber\n(B) cotton wool\n(C) a (red) one\n(D) 4",
        "options": ["rubber", "cotton wool", "a (red) one", "4"], "answer": "cotton wool"}
    assert found["test"][1]["answer"] == "a (red) one"
    options = found["test"][1]["options"]
    for prediction, right in (("C", True), ("(C)", True), ("(C) a (red) one", True),
                              ("A (red) one.", True), ("B", False)):
        assert tools.match_answer(prediction, "a (red) one", options) == right


def in_question(row):
    """The options as the question lists them: {letter: text}."""
    return dict(re.findall(r"^\(([A-Z])\) (.*)$", row["question"], re.MULTILINE))


@pytest.mark.parametrize("listed", [True, False])
def test_vstar_is_shuffled_where_the_right_option_always_comes_first(tmp_path, capsys, listed):
    """The seed and the id decide the order, not the other rows; the answer stays the right text, at
    every letter equally."""
    count, source = 60, tmp_path / "in"
    if listed:
        vstar(source, [vstar_row(i, "A") for i in range(count)])
        with (source / "test_questions.jsonl").open("a") as file:   # neither says that A is wrong
            file.write("\n\nnot json\n")
    else:
        for i in range(count):
            options = ["rubber", "cotton wool", "a (red) one", "4"]
            about = {"target_object": ["glove"], "bbox": [[1, 2, 3, 4]], "question": "What is it?",
                     "options": options}
            write(source / "direct_attributes" / f"sa_{i}.jpg", picture(i))
            write(source / "direct_attributes" / f"sa_{i}.json", json.dumps(about))
    rows = {seed: imported(capsys, "vstar", source, tmp_path / f"out{seed}", seed)[0]["test"]
            for seed in (0, 1)}
    for row in rows[0]:
        assert list(in_question(row).values()) == row["options"] and row["answer"] == "rubber"
        assert sorted(row["options"]) == ["4", "a (red) one", "cotton wool", "rubber"]
    assert all(5 < [row["options"][i] for row in rows[0]].count("rubber") < 25 for i in range(4))
    assert [row["options"] for row in rows[0]] != [row["options"] for row in rows[1]]
    assert imported(capsys, "vstar", source, tmp_path / "again", 0)[0]["test"] == rows[0]
    for path in source.rglob("*"):  # fewer rows, the same orders
        if path.stem in ("sa_0", "sa_17"):
            path.unlink()
    fewer = imported(capsys, "vstar", source, tmp_path / "fewer", 0)[0]["test"]
    assert fewer == [row for row in rows[0] if row["id"].split("/")[1] not in ("sa_0", "sa_17")]


def hrbench_row(number, **more):
    return {"index": number, "question": "What is\nthere?", "answer": "C", "category": "single",
            "A": "5%", "B": "5", "C": "$5", "D": "six", "cycle_category": f"cycle {number % 4}",
            "image": base64_of(picture(number // 4)), **more}


def test_hrbench(tmp_path, capsys):
    """Two tables, quoted cells over several lines, images in base64, shared by four cycles; options
    that read alike."""
    source = tmp_path / "in"
    source.mkdir()
    write_tsv(source / "hr_bench_4k.tsv", [hrbench_row(i) for i in range(4)] + [
        hrbench_row(4, image="%%%"), hrbench_row(5, image=""), hrbench_row(6, answer="E"),
        hrbench_row(7, B=" "),
        hrbench_row(8, image=base64_of(picture(9, (200, 200), "JPEG")[:-900])),
        hrbench_row(9, answer="D")])
    unasked = {k: v for k, v in hrbench_row(0).items() if k != "question"}
    write_tsv(source / "hr_bench_8k.tsv", [unasked])
    message = r"8k\.jsonl is not written, since no row can be used"
    with pytest.raises(tools.InputError, match=message):
        imported(capsys, "hrbench", source, tmp_path / "out")
    note = "1 skipped: field 'question' is missing or not text (first: hr_bench_8k.tsv:1)"
    assert note in capsys.readouterr().out
    assert not (tmp_path / "out" / "8k.jsonl").exists()
    write_tsv(source / "hr_bench_8k.tsv", [hrbench_row(0)])
    rows, counts, notes = imported(capsys, "hrbench", source, tmp_path / "out")
    assert counts == {"4k": (10, 5), "8k": (1, 1)} and notes == {
        "1 skipped: image is missing (first: hr_bench_4k.tsv:6)",
        "1 skipped: the label is not the letter of an option (first: hr_bench_4k.tsv:7)",
        "1 skipped: field 'B' is missing or not text (first: hr_bench_4k.tsv:8)",
        "2 skipped: image cannot be decoded (first: hr_bench_4k.tsv:5)"}
    assert rows["4k"][3] == {
        "id": "hrbench_4k_3", "image": stored(picture(0)), "source": "hrbench_4k",
        "question": "What is\nthere?\n(A) 5%\n(B) 5\n(C) $5\n(D) six", "answer": "(C)",
        "options": ["5%", "5", "$5", "six"], "category": "single", "cycle": "cycle 3"}
    right = [tools.match_answer(letter, "(C)", rows["4k"][0]["options"]) for letter in "ABCD"]
    assert right == [False, False, True, False]
    assert rows["4k"][4]["answer"] == "six" and rows["8k"][0]["source"] == "hrbench_8k"
    assert len({row["image"] for row in rows["4k"][:4]}) == 1


def mme_row(number, options=None, **more):
    listed = ["(A) It's \"here\"", "(B) There, (C)", "(C) 3.5", "(D) é\n", "(E) Not there."]
    return {"index": f"perception/remote sensing/{number}", "image": base64_of(picture(number)),
            "question": "Where's it?", "multi-choice options": str(options or listed),
            "answer": "D", "category": "Perception", "l2-category": "position", **more}


def test_mme_realworld(tmp_path, capsys):
    """Its options are a list that was printed. Nothing in it is ever run."""
    source, trap = tmp_path / "in", tmp_path / "trap"
    source.mkdir()
    for name in ("MME-RealWorld.tsv", "MME-RealWorld-Lite.tsv"):
        write_tsv(source / name, [
            mme_row(0), mme_row(1, f"[open({str(trap)!r}, 'w')]"), mme_row(2, "[" * 5000),
            mme_row(3, answer="A"), mme_row(4, ["(A) one", "(C) two"])])
    with open(source / "MME-RealWorld.tsv", "ab") as file:
        file.write(mme_row(0)["index"].encode() + b"5\t" + base64_of(picture(1)).encode()
                   + b"\tcaf\xe9?\t\"['(A) x', '(B) y']\"\tA\tc\tl\r\n")
    rows, counts, notes = imported(capsys, "mme_realworld", source, tmp_path / "out")
    assert counts == {"test": (6, 2), "lite": (5, 2)} and not trap.exists()
    order = "options are not a list of (A), (B), ... in this order"
    assert f"3 skipped: {order} (first: MME-RealWorld.tsv:2)" in notes
    assert "1 skipped: text is not UTF-8 (first: MME-RealWorld.tsv:6)" in notes
    assert rows["lite"][0] == {
        "id": "perception/remote sensing/0", "image": stored(picture(0)), "category": "Perception",
        "question": "Where's it?\n(A) It's \"here\"\n(B) There, (C)\n(C) 3.5\n(D) é\n"
                    "(E) Not there.",
        "answer": "é", "options": ["It's \"here\"", "There, (C)", "3.5", "é", "Not there."],
        "source": "mme_realworld_lite"}


def test_a_table_that_ends_inside_a_cell_is_refused(tmp_path, capsys):
    """Nobody could tell how many rows an open quote has swallowed."""
    write_tsv(tmp_path / "hr_bench_4k.tsv", [hrbench_row(0), hrbench_row(1)])
    whole = (tmp_path / "hr_bench_4k.tsv").read_bytes()
    (tmp_path / "hr_bench_4k.tsv").write_bytes(whole + b'3\t"what')
    with pytest.raises(tools.InputError, match=r"hr_bench_4k\.tsv: cannot be read to its end"):
        imported(capsys, "hrbench", tmp_path, tmp_path / "out")


def test_a_table_without_rows_is_counted(tmp_path, capsys):
    write_tsv(tmp_path / "hr_bench_4k.tsv", [hrbench_row(0)])
    write(tmp_path / "hr_bench_4k_more.tsv", "\t".join(hrbench_row(0)) + "\n")
    rows, _, notes = imported(capsys, "hrbench", tmp_path, tmp_path / "out")
    assert [row["id"] for row in rows["4k"]] == ["hrbench_4k_0"]
    assert notes == {"1 skipped: not a readable row (first: hr_bench_4k_more.tsv:1)"}


def test_vstar_json_without_an_image_is_counted(tmp_path, capsys):
    about = json.dumps({"question": "What is it?", "options": ["rubber", "wool"]})
    write(tmp_path / "direct_attributes" / "sa_0.jpg", picture(0))
    write(tmp_path / "direct_attributes" / "sa_0.json", about)
    write(tmp_path / "package.json", about)
    rows, _, notes = imported(capsys, "vstar", tmp_path, tmp_path / "out")
    assert [row["id"] for row in rows["test"]] == ["direct_attributes/sa_0"]
    assert notes == {"1 skipped: image is missing (first: package.json:1)"}


def deepeyes_row(number, **more):
    return {"data_source": "vstar", "prompt": [{"role": "user", "content": "<image>..."}],
            "env_name": "visual_toolbox_v2", "images": [{"bytes": picture(number), "path": None}],
            "reward_model": {"ground_truth": "red", "style": "model"},
            "extra_info": {"question": f"<image>\nWhat {number}?", "answer": "red",
                           "index": number}, **more}


def test_deepeyes(tmp_path, capsys):
    bad = [deepeyes_row(3, images=2 * [{"bytes": picture(), "path": None}]),
           deepeyes_row(4, extra_info=None), deepeyes_row(5, reward_model={"ground_truth": None}),
           deepeyes_row(6, images=[{"bytes": None, "path": "/etc/x"}])]
    for name, kind in (("data_0.1.2_visual_toolbox_v2", "vstar"),
                       ("data_thinklite_reasoning_acc", "thinklite_eureka")):
        good = [deepeyes_row(i, data_source=kind) for i in range(3)]
        write_parquet(tmp_path / f"{name}.parquet", good + bad)
    rows, counts, notes = imported(capsys, "deepeyes", tmp_path, tmp_path / "out")
    assert counts == {"train": (14, 6)} and sum(int(note.split()[0]) for note in notes) == 8
    assert rows["train"][2] == {
        "id": "data_0.1.2_visual_toolbox_v2_vstar_2", "image": stored(picture(2)),
        "question": "What 2?", "answer": "red", "source": "deepeyes_vstar"}
    assert rows["train"][3]["source"] == "deepeyes_thinklite_eureka"


def test_hrbench_as_parquet_gives_the_same_rows(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    write_tsv(tmp_path / "a" / "hr_bench_8k.tsv", [hrbench_row(i) for i in range(4)])
    write_parquet(tmp_path / "b" / "hr_bench_8k.parquet", [hrbench_row(i) for i in range(4)])
    first, second = (imported(capsys, "hrbench", tmp_path / name, tmp_path / f"out_{name}")[0]
                     for name in ("a", "b"))
    assert first == second != {}


def test_a_second_run_rewrites_no_image_and_gives_the_same_rows(tmp_path, capsys):
    """Nor does a run after a kill: an image that is there is whole, since it was put in place in
    one step."""
    visualprobe(tmp_path / "in")
    first = imported(capsys, "visualprobe", tmp_path / "in", tmp_path / "out")
    texts = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.jsonl")}
    image, lost = (tmp_path / "out" / stored(picture(i, kind="JPEG"), "jpg") for i in (0, 1))
    before = image.stat().st_mtime_ns, image.stat().st_ino
    lost.unlink()
    (tmp_path / "out" / "hard.jsonl").unlink()
    assert imported(capsys, "visualprobe", tmp_path / "in", tmp_path / "out") == first
    assert (image.stat().st_mtime_ns, image.stat().st_ino) == before
    assert lost.read_bytes() == picture(1, kind="JPEG")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.jsonl")} == texts


def test_a_killed_import_leaves_no_half_file_and_the_next_run_ends_the_same(tmp_path):
    visualprobe(tmp_path / "in", 200)
    command = ["build_data.py", "--import", "visualprobe", "--source", tmp_path / "in", "--out"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_script(*command, whole)
    process = Forked([*command, killed])
    crash.wait_until(process, lambda: len(list(killed.glob("images/*"))) > 20)
    crash.kill(process)
    for path in [*killed.glob("[!.]*.jsonl"), *killed.glob("images/[!.]*")]:
        assert (whole / path.relative_to(killed)).read_bytes() == path.read_bytes()
    run_script(*command, killed)
    for path in whole.rglob("*.*"):
        assert (killed / path.relative_to(whole)).read_bytes() == path.read_bytes()


def peak_memory(name, source, out):
    """Most bytes that Python objects took while a data set was imported."""
    tracemalloc.start()
    build_data.import_data(name, source, out, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize("suffix", ["tsv", "parquet"])
def test_memory_does_not_grow_with_the_rows(tmp_path, suffix):
    """Of a row that was read only its id stays: 4 or 40 images of 300 kB take the same memory."""
    noise, peaks = np.random.default_rng(0), {}
    for count in (4, 4, 40):  # the first time warms up
        source = tmp_path / f"in{len(peaks)}{count}"
        source.mkdir(exist_ok=True)
        files = [io.BytesIO() for _ in range(count)]
        for file in files:
            Image.fromarray(noise.integers(0, 256, (300, 333, 3), dtype=np.uint8)).save(file, "PNG")
        rows = [hrbench_row(i, image=base64_of(file.getvalue())) for i, file in enumerate(files)]
        if suffix == "tsv":
            write_tsv(source / "hr_bench_4k.tsv", rows)
        else:
            write_parquet(source / "hr_bench_4k.parquet", rows)
        del rows, files
        peaks[count] = peak_memory("hrbench", source, tmp_path / "out")
    assert 300_000 < peaks[40] < peaks[4] + 36 * 1000


@pytest.mark.parametrize("name", list(build_data.IMPORTERS))
def test_a_folder_without_the_data_set_is_one_line(monkeypatch, tmp_path, name):
    write(tmp_path / "in" / "readme.txt", "nothing")
    source, out = tmp_path / "in", tmp_path / "out"
    line = refused(monkeypatch, "--import", name, "--source", source, "--out", out)
    expected = build_data.IMPORTERS[name][-1]
    assert line == f"{source}: nothing to import; {name} expects {expected}"
    assert not out.exists()


def test_parquet_without_pyarrow_is_one_line(monkeypatch, tmp_path):
    write(tmp_path / "hr_bench_4k.parquet", b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    line = refused(monkeypatch, "--import", "hrbench", "--source", tmp_path, "--out", tmp_path)
    assert line == "reading .parquet files needs pyarrow: pip install pyarrow"


def test_a_parquet_row_that_is_not_utf8_is_counted(tmp_path, capsys):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.Table.from_pylist([hrbench_row(i) for i in range(3)])
    texts = pyarrow.array([b"one", b"caf\xe9", b"two"], pyarrow.binary()).view(pyarrow.string())
    column = table.schema.get_field_index("question")
    source = tmp_path / "hr_bench_4k.parquet"  # a file as the source
    parquet.write_table(table.set_column(column, "question", texts), source)
    rows, _, notes = imported(capsys, "hrbench", source, tmp_path / "out")
    assert [row["id"] for row in rows["4k"]] == ["hrbench_4k_0", "hrbench_4k_2"]
    assert notes == {"1 skipped: not a readable row (first: hr_bench_4k.parquet:2)"}


def test_a_broken_parquet_file_is_one_line(tmp_path, capsys):
    pytest.importorskip("pyarrow")
    write(tmp_path / "hr_bench_4k.parquet", b"PAR1 and no more")
    with pytest.raises(tools.InputError, match=r"hr_bench_4k\.parquet: cannot be read to its end"):
        imported(capsys, "hrbench", tmp_path, tmp_path / "out")


# -------------------------------------------------------------------------------------------------
# Cold-start conversations

SYSTEM = "You are asked <|im_end|> {question}."
USER = "Look: {question} <|image_pad|>\n<image>\nWhat is it? "
FIRST = ('<think>a</think>'
         '<grounding>{"bbox_2d": [0, 0, 0.5, 1.0], "source": "original_image"}</grounding>')
SHOWN = "After {name}, here:\n<image>\nGo on.<|im_start|> "
BROKEN = "<grounding>{'bbox_2d': 3}</grounding>"
REFUSED = " Error {error}: cannot be read. "
SECOND = '<grounding>{"bbox_2d": [0.5, 0.5, 1, 1], "source": "observation_1"}</grounding>'
ANSWER = "<think>b</think><answer> a red hat </answer>"
WHOLE = [USER, FIRST, SHOWN, BROKEN, REFUSED, SECOND, SHOWN, ANSWER]


def talk(texts, system=SYSTEM):
    roles = itertools.cycle(["human", "gpt"])
    return ([] if system is None else [{"from": "system", "value": system}]) \
        + [{"from": role, "value": text} for role, text in zip(roles, texts)]


def cold_row(texts, sizes=((400, 300), (196, 308), (112, 84)), sample=5, rollout=2, system=SYSTEM,
             **more):
    """A row with as many images as the texts show."""
    shown = sum(text.count("<image>") for text in texts[::2])
    images = [{"bytes": picture(i, size), "path": None} for i, size in enumerate(sizes[:shown])]
    names = [f"{i}.png" for i in range(shown)]
    return {"conversations": json.dumps(talk(texts, system)), "images": images,
            "image_names": names, "data_source": "visual_probe", "sample_index": sample,
            "rollout_index": rollout, **more}


def test_a_coldstart_conversation_keeps_its_own_words(tmp_path, capsys):
    """Sizes by hand: half of 400 x 300 is 200 x 300, stored as 196 x 308; its lower right quarter
    is 100 x 150, stored as 112 x 84, which is another shape: counted, not fatal."""
    write_parquet(tmp_path / "a.parquet", [cold_row(WHOLE)])
    rows, counts, notes = imported(capsys, "mini_o3_coldstart", tmp_path, tmp_path / "out")
    (row,), name = rows["coldstart"], rows["coldstart"][0].pop("id")
    assert counts == {"coldstart": (1, 1)} and re.fullmatch("mini_o3_5_2_[0-9a-f]{8}", name)
    assert notes == {"1 stored observations differ in shape from our crops; their rows are kept "
                     "(first: a.parquet:1)"}
    zooms = [{"bbox_2d": [0.0, 0.0, 0.5, 1.0], "source": "original_image"},
             {"bbox_2d": [0.5, 0.5, 1.0, 1.0], "source": "observation_1"}]
    assert row == {
        "image": stored(picture(0, (400, 300))), "source": "visual_probe",
        "question": USER.replace("<image>", "").strip(), "answer": "a red hat",
        "prediction": "a red hat", "finish_reason": "answer", "reward": 1.0, "teacher": "mini_o3",
        "system": SYSTEM, "user": USER, "turns": [
            {"text": FIRST, "zoom": zooms[0], "tool_message": SHOWN},
            {"text": BROKEN, "error": REFUSED, "tool_message": REFUSED},
            {"text": SECOND, "zoom": zooms[1], "tool_message": SHOWN},
            {"text": ANSWER}]}
    assert len(list((tmp_path / "out" / "images").iterdir())) == 1  # crops follow from the zooms
    tools.check_trajectory({"id": name, **row})


def test_a_coldstart_conversation_becomes_exactly_its_texts(tmp_path, capsys, make_tiny):
    """The ids decode to the original texts in order; special tokens and braces in them are ordinary
    text."""
    write_parquet(tmp_path / "a.parquet", [cold_row(WHOLE)])
    imported(capsys, "mini_o3_coldstart", tmp_path, tmp_path / "out")
    (row,) = tools.read_jsonl(tmp_path / "out" / "coldstart.jsonl", tools.check_trajectory)
    policy = make_tiny(torch.float32)
    sequence = sft.encode(policy, row, tmp_path / "out")
    tokens = iter([policy.num_image_tokens(grid) for _, grid in sequence.images])

    def shown(text):
        before, *after = text.split("<image>")
        for part in after:
            before += f"<|vision_start|>{'<|image_pad|>' * next(tokens)}<|vision_end|>{part}"
        return before

    expected = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
    for number, text in enumerate(WHOLE):
        role = "assistant" if number % 2 else "user"
        end = "\n" if number < len(WHOLE) - 1 else ""
        expected += f"<|im_start|>{role}\n{shown(text)}<|im_end|>{end}"
    assert policy.tokenizer.decode(sequence.token_ids) == expected and next(tokens, None) is None
    starts, ends = sequence.token_ids.count(policy.im_start_id), sequence.token_ids.count(policy.im_end_id)
    assert starts == ends == 1 + len(WHOLE)
    images = sum(policy.num_image_tokens(grid) for _, grid in sequence.images)
    assert sequence.token_ids.count(policy.image_token_id) == images
    written = policy.tokenizer.decode([i for i, mine in zip(sequence.token_ids, sequence.loss_mask) if mine])
    assert written == "".join(f"{text}<|im_end|>" for text in WHOLE[1::2])
    start = sequence.token_ids[:sequence.loss_mask.index(True)]  # what the engine starts from
    assert policy.prompt_ids(row, sequence.images[0][1]) == start


def test_beginnings_are_merged_wherever_they_lie(tmp_path, capsys):
    """Rows of one rollout, one per reply, over two shards in any order: only the longest stays.
    Another conversation of the same rollout, and the same beginning in another rollout, are
    conversations of their own."""
    short = [USER, FIRST, SHOWN, ANSWER]
    rows = [cold_row(WHOLE[:4]), cold_row(WHOLE), cold_row(short), cold_row(WHOLE[:2]),
            cold_row(WHOLE[:6]), cold_row(short, rollout=3), cold_row(WHOLE),
            cold_row(WHOLE, system="Other."), cold_row(WHOLE, system=None)]
    seen = set()
    for number, order in enumerate(([0, 1, 2, 3, 4, 5, 6, 7, 8], [8, 6, 4, 2, 0, 7, 5, 3, 1])):
        source = tmp_path / f"in{number}"
        source.mkdir()
        write_parquet(source / "a.parquet", [rows[i] for i in order[:5]])
        write_parquet(source / "b.parquet", [rows[i] for i in order[5:]])
        out = tmp_path / f"out{number}"
        found, counts, notes = imported(capsys, "mini_o3_coldstart", source, out)
        assert counts == {"coldstart": (9, 5)}
        assert {re.sub(r" \(first.*", "", note) for note in notes} >= {
            "3 skipped: the beginning of a longer conversation, merged into it",
            "1 skipped: id stands in an earlier row too"}
        kept = ((row["id"], len(row["turns"]), row["system"]) for row in found["coldstart"])
        seen.add(tuple(sorted(kept)))
        _, texts = next(build_data.records(source / "a.parquet", ["conversations", "sample_index"]))
        assert list(texts) == ["conversations", "sample_index"]  # the first pass reads no image
    (kept,) = seen
    whole = [(4, SYSTEM), (4, "Other."), (4, "")]
    assert sorted(row[1:] for row in kept) == sorted([*whole, (2, SYSTEM), (2, SYSTEM)])


def test_coldstart_rows_that_contradict_themselves_are_counted(tmp_path, capsys):
    impossible = FIRST.replace("original_image", "observation_3")
    extra = {"bytes": picture(9), "path": None}
    bad = {
        "turn 1: 'reply' must be a string with <image> 1 times, and absent on the last turn":
            [USER, FIRST, REFUSED, BROKEN, SHOWN, ANSWER],
        "field 'user' must be a string with <image> exactly once, or absent":
            [USER + "<image>", FIRST, REFUSED, ANSWER],
        "the conversation goes on after an answer": [USER, ANSWER, REFUSED, ANSWER],
        "no final answer": [USER, FIRST],
        "conversation is not texts by system, human, gpt, ..., gpt in turn": [USER, FIRST, SHOWN],
    }
    rows = [cold_row([USER, ANSWER], sample=0),
            *(cold_row(texts, sample=i) for i, texts in enumerate(bad.values(), 1)),
            # observations that are too few or too many
            cold_row([USER, FIRST, REFUSED, ANSWER], sample=8),
            cold_row([USER, BROKEN, SHOWN, ANSWER], sample=9),
            cold_row([USER + "<image>", ANSWER], sample=10),
            cold_row([USER, impossible, SHOWN, ANSWER], sample=11),
            cold_row([USER, "<answer> </answer>"], sample=12),
            cold_row([USER, ANSWER], sample=13, images=[extra, extra]),
            cold_row([USER, ANSWER], sample=14, images=[]),
            cold_row([USER, ANSWER], sample=15, conversations="[{"),
            cold_row([USER, ANSWER], sample=16, conversations="[3]"),
            cold_row([USER, ANSWER], sample=17, conversations="[" * 100_000),
            cold_row([USER, ANSWER], sample=None),
            cold_row([USER, ANSWER], sample=18, images=[{"bytes": bomb(60_000), "path": None}]),
            cold_row(["<image>\ud800", ANSWER], sample=19),
            # refused for other reasons than its JSON: an impossible zoom, no call at all
            cold_row([USER, impossible, REFUSED, ANSWER], sample=20),
            cold_row([USER, "Hm.", REFUSED, ANSWER], sample=21)]
    write_parquet(tmp_path / "a.parquet", rows)
    found, counts, notes = imported(capsys, "mini_o3_coldstart", tmp_path, tmp_path / "out")
    assert counts == {"coldstart": (len(rows), 3)}
    assert [row["id"].split("_")[2] for row in found["coldstart"]] == ["0", "20", "21"]
    errors = [turn.get("error") for row in found["coldstart"] for turn in row["turns"]]
    assert errors == [None, REFUSED, None, REFUSED, None]
    matches = (re.match(r"(\d+) skipped: (.*) \(first", note) for note in notes)
    assert {m[2]: int(m[1]) for m in matches} == {
        **dict.fromkeys(bad, 1), "no final answer": 2, "image is missing": 1,
        "image has too many pixels": 1, "text is not UTF-8": 1,
        "conversations is not a JSON list of messages": 3,
        "images and observations differ in number": 5,
        "field 'sample_index' is missing or not text": 1}


@pytest.mark.parametrize("stored_size, same", [
    ((200, 100), True), ((400, 200), True), ((196, 112), True), ((224, 84), True),
    ((100, 200), False), ((140, 140), False), ((100, 100), False), ((1000, 460), False)])
def test_shapes_of_observations(stored_size, same):
    """A crop of 200 x 100: scaled, or rounded to the model's grid, it is the same; turned or
    squeezed it is not."""
    assert build_data.same_shape({"bytes": picture(0, stored_size)}, (200, 100)) == same
    assert not build_data.same_shape({"bytes": b"?"}, (200, 100))


def test_own_words_are_checked_when_a_file_is_read():
    zoom = {"bbox_2d": [0, 0, 1, 1], "source": "original_image"}
    turns = [{"text": "", "zoom": zoom, "tool_message": "<image>"},
             {"text": "", "error": "no", "tool_message": "no"}, {"text": ""}]
    row = {"id": "1", "image": "a.png", "question": "q", "answer": "a", "user": "<image>",
           "turns": turns}
    tools.check_trajectory(row)
    for user in ("", "<image><image>", 3):
        with pytest.raises(tools.InputError, match="'user'"):
            tools.check_question({**row, "user": user})
    for number, reply in ((0, ""), (0, "<image><image>"), (0, 3), (1, "<image>"), (2, "more")):
        turns = json.loads(json.dumps(row["turns"]))
        turns[number]["tool_message"] = reply
        with pytest.raises(tools.InputError, match=f"turn {number + 1}: 'reply'"):
            tools.check_trajectory({**row, "turns": turns})


# -------------------------------------------------------------------------------------------------
# Questions of a suitable difficulty


def with_rates(folder, rates):
    """Ten questions q0, ..., q9 and a file with these rates: {number: rate}."""
    questions = [{"id": f"q{i}", "image": f"{i}.png", "question": "?", "answer": "a",
                  "colour": "red"} for i in range(10)]
    source, known = folder / "train.jsonl", folder / "train.rates.jsonl"
    tools.write_jsonl(source, questions)
    tools.write_jsonl(known, [{"id": f"q{i}", "pass_rate": rate} for i, rate in rates.items()])
    return ["build_data.py", "--source", source, "--filter", known], questions


def test_filter_keeps_what_is_neither_too_easy_nor_too_hard(monkeypatch, tmp_path):
    """Both ends belong to the interval; what was never rated is left out and counted."""
    rates = {0: 0, 1: 0.1, 2: 0.5, 3: 0.9, 4: 1, 5: 0.95, 6: 0.05, 77: 0.5}
    command, questions = with_rates(tmp_path, rates)
    more = [{"id": "q7", "pass_rate": 0.2}, {"id": "q2", "pass_rate": 0.5}]
    tools.write_jsonl(tmp_path / "more.jsonl", more)
    done = run_script(*command, tmp_path / "more.jsonl")
    kept = {1: 0.1, 2: 0.5, 3: 0.9, 7: 0.2}
    out = tmp_path / "train_filtered.jsonl"
    rows = [{**questions[i], "pass_rate": rate} for i, rate in kept.items()]
    assert tools.read_questions(out) == rows
    assert (f"{out}: 4 questions kept with a pass rate from 0.1 to 0.9, left out: 2 below, "
            "2 above, 2 without a rate; 1 rates belong to no question") in done.stdout
    monkeypatch.setattr(sys, "argv", [*map(str, command), "--keep", "0", "0.05"])
    build_data.main()
    assert [row["id"] for row in tools.read_questions(out)] == ["q0", "q6"]


NO_RATE = "rates.jsonl:2: a row of rates has an 'id' and a 'pass_rate' from 0 to 1"


@pytest.mark.parametrize("line, message", [
    ('{"id": "q2", "pass_rate": 0.4}',
     "rates.jsonl:2: id 'q2' has another pass_rate, 0.5, in an earlier line or file"),
    ('{"id": "q3", "pass_rate": NaN}', "rates.jsonl:2: Out of range float values are not JSON"),
    ('{"id": "q3", "pass_rate": 1e999}', "rates.jsonl:2: Out of range float values are not JSON"),
    ('{"id": "q3", "pass_rate": -0.1}', NO_RATE), ('{"id": "q3", "pass_rate": true}', NO_RATE),
    ('{"pass_rate": 1}', NO_RATE), ('{"id": "q2"}', NO_RATE)])
def test_bad_rates_are_one_line(tmp_path, line, message):
    with_rates(tmp_path, {2: 0.5})
    rates, source = tmp_path / "train.rates.jsonl", tmp_path / "train.jsonl"
    with open(rates, "a") as file:
        file.write(line + "\n")
    with pytest.raises(tools.InputError, match=re.escape(message)):
        build_data.filter_questions([rates], source, 0.1, 0.9)
    assert not (tmp_path / "train_filtered.jsonl").exists()


def test_a_filter_that_keeps_nothing_writes_nothing(tmp_path):
    with_rates(tmp_path, {2: 1.0})
    rates, source = tmp_path / "train.rates.jsonl", tmp_path / "train.jsonl"
    with pytest.raises(tools.InputError, match="question of .*train.jsonl is left: widen --keep"):
        build_data.filter_questions([rates], source, 0.1, 0.9)
    assert not (tmp_path / "train_filtered.jsonl").exists()


@pytest.mark.parametrize("flags, message", [
    (["--import", "vstar"], "--import needs --source"),
    (["--import", "vstar", "--source", "no/such"], "--source no/such does not exist"),
    (["--import", "vstar", "--source", ".", "--train", "5", "--keep", "0", "1"],
     "--keep and --train cannot be used with --import"),
    (["--import", "vstar", "--source", ".", "--filter", "r.jsonl"],
     "--filter cannot be used with --import"),
    (["--filter", "r.jsonl", "--out", "x"], "--out cannot be used with --filter"),
    (["--filter", "r.jsonl"], "r.jsonl does not exist; make it with: python evaluate.py"),
    (["--filter", "r.jsonl", "--keep", "0.9", "0.1"],
     "--pass_rate_range must be two pass rates, 0 <= LOW <= HIGH <= 1"),
    (["--filter", "r.jsonl", "--keep", "nan", "1"],
     "--pass_rate_range must be two pass rates, 0 <= LOW <= HIGH <= 1"),
    (["--source", "."], "--source cannot be used without --import or --filter"),
    (["--keep", "0", "1"], "--keep cannot be used without --import or --filter")], ids=str)
def test_flags_that_do_not_belong_together_are_one_line(monkeypatch, tmp_path, flags, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["build_data.py", *flags])
    with pytest.raises(tools.InputError, match=re.escape(message)):
        build_data.main()
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------------
# Mistakes of the user


SMALL = ["--train", 1, "--val", 1, "--test", 1, "--scenes", 1, "--workers", 1]


@pytest.mark.parametrize("flags", [
    ["--train", 0], ["--val", 0], ["--test", -1], ["--scenes", 0], ["--workers", 0], ["--seed", -1],
    ["--min_pixels", 0], ["--max_pixels", 0], ["--min_pixels", 9000]], ids=str)
def test_a_bad_flag_is_one_line(monkeypatch, tmp_path, flags):
    line = refused(monkeypatch, *SMALL, *flags, "--out", tmp_path / "out")
    assert "\n" not in line and flags[0] in line
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("kept")
    done = run_script("build_data.py", *SMALL, "--out", tmp_path / "file", check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "build_data.py: error:" in done.stderr
    assert (tmp_path / "file").read_text() == "kept"
