"""Specification of the synthetic Visual Probe world.

Every question has exactly one answer, which can be read from the image and from nothing else in it.
A region's wallpaper hints at what the region holds and can be seen from afar. The seed decides
every byte, whatever the number of processes. What the instruction data says about a view is true.
Published data sets and the filter: extras/test_import_data.py.
"""

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
import torch

import build_data
import tools
from build_data import COLOURS, LEVELS, POSITIONS, SHAPES
from extras import crash
from support.launch import ROOT, Forked, refused, run_script


def scenes(count=120):
    """`count` scenes of each level."""
    return [build_data.make_scene(np.random.default_rng([level_index, index]), level)
            for level_index, level in enumerate(LEVELS) for index in range(count)]


def crowded_scenes(count=40):
    """`count` scenes of each level with as many objects as the instruction data ever holds."""
    return [build_data.make_scene(np.random.default_rng([level_index, index]), level, 15, 39)
            for level_index, level in enumerate(LEVELS) for index in range(count)]


def draw(scene):
    return build_data.draw_scene(np.random.default_rng(0), scene)


def fitting_objects(scene):
    """The objects that fit the question, read from its words alone, and which field it asks for."""
    digit = re.fullmatch(r"What digit is on the (\w+) (\w+)\?", scene["question"])
    shape = re.fullmatch(r"Which shape is the (\w+) object with digit (\d)\?", scene["question"])
    assert bool(digit) != bool(shape)
    if digit:
        return [o for o in scene["objects"] if o[2:4] == list(digit.groups())], 4
    return [o for o in scene["objects"] if o[2] == shape[1] and o[4] == int(shape[2])], 3


def pixels_like(image, colour):
    """Boolean map (height, width) of the pixels that look like this colour, as only objects do:
    wallpaper is a faint tint."""
    return np.abs(np.asarray(image).astype(int) - COLOURS[colour]).max(axis=-1) < 30


def ninth(pixels, index):
    """The pixels at one of the nine positions of a view."""
    side = len(pixels) // 3
    row, column = divmod(index, 3)
    return pixels[side * row:side * (row + 1), side * column:side * (column + 1)]


def middle(pixels, cut=0.25):
    """The middle of a cell, clear of frames: what is there is an object."""
    margin = int(cut * len(pixels))
    return pixels[margin:-margin, margin:-margin]


def tint_of(colour):
    """A colour without its brightness, which is noise in these images: its difference to grey."""
    return np.asarray(colour) - np.mean(colour)


TINTS = {None: np.zeros(3), **{name: 0.35 * tint_of(colour) for name, colour in COLOURS.items()}}


def read_wallpaper(image, scene):
    """The wallpaper of each region, read from the whole image: the tint nearest to the mean colour
    of the region's empty cells."""
    pixels = np.asarray(image).astype(float)
    occupied = {tuple(o[:2]) for o in scene["objects"]}
    wallpaper = []
    for region in range(9):
        empty_cells = [middle(ninth(ninth(pixels, region), cell), 0.3)
                       for cell in range(9) if (region, cell) not in occupied]
        tint = tint_of(np.mean(empty_cells, axis=(0, 1, 2)))
        wallpaper.append(min(TINTS, key=lambda name: np.linalg.norm(tint - TINTS[name])))
    return wallpaper


# ---- Scenes -------------------------------------------------------------------------------------


def test_positions_are_thirds_in_reading_order():
    assert build_data.position_box("top-left") == [0.0, 0.0, 0.333, 0.333]
    assert build_data.position_box("right") == [0.667, 0.333, 1.0, 0.667]
    assert build_data.position_box("bottom") == [0.333, 0.667, 0.667, 1.0]


@pytest.mark.parametrize("question_kind, expected", [
    ("digit", ("What digit is on the red square?", "7", "square")),
    ("shape", ("Which shape is the red object with digit 7?", "square", "7"))])
def test_questions_by_hand(question_kind, expected):
    assert build_data.ask_about(question_kind, "red", "square", 7) == expected


def test_exactly_one_object_satisfies_the_question():
    for scene in scenes() + crowded_scenes():
        fitting, asked_field = fitting_objects(scene)
        assert fitting == scene["objects"][:1] and str(fitting[0][asked_field]) == scene["answer"]


def test_both_kinds_all_colours_shapes_and_digits_are_asked_for():
    rows = scenes()
    for level in LEVELS:
        kinds = {row["source"] for row in rows if row["level"] == level}
        assert kinds == {"synthetic_digit", "synthetic_shape"}
    regions, cells, colours, shapes, digits = zip(*(row["objects"][0] for row in rows))
    assert set(colours) == set(COLOURS) and set(shapes) == set(SHAPES)
    assert set(digits) == set(range(10))
    assert set(regions) == set(cells) == set(range(9))
    digits = [row["answer"] for row in rows if row["source"] == "synthetic_digit"]
    shapes = [row["answer"] for row in rows if row["source"] == "synthetic_shape"]
    assert max(map(digits.count, "0123456789")) < 0.25 * len(digits)  # no answer to bet on
    assert max(map(shapes.count, SHAPES)) < 0.4 * len(shapes)


def test_no_two_objects_share_a_cell():
    for scene in scenes() + crowded_scenes():
        cells = [tuple(o[:2]) for o in scene["objects"]]
        assert len(set(cells)) == len(cells)
        assert all(0 <= index < 9 for cell in cells for index in cell)


def test_lookalikes_share_the_colour_and_nobody_else_does():
    for scene in scenes():
        alike = [o for o in scene["objects"] if o[2] == scene["colour"]]
        assert len(alike) == 1 + LEVELS[scene["level"]]["lookalikes"]
        assert len(scene["objects"]) == len(alike) + LEVELS[scene["level"]]["others"]


def test_other_numbers_of_objects_can_be_asked_for():
    for scene in crowded_scenes():
        assert len(scene["objects"]) == 1 + 15 + 39
        assert [o[2] == scene["colour"] for o in scene["objects"]] == [True] * 16 + [False] * 39
    one = build_data.make_scene(np.random.default_rng(0), "hard", lookalikes=1)
    assert len(one["objects"]) == 1 + 1 + LEVELS["hard"]["others"]
    one = build_data.make_scene(np.random.default_rng(0), "hard", others=1)
    assert len(one["objects"]) == 1 + LEVELS["hard"]["lookalikes"] + 1


def test_a_wallpaper_is_the_colour_of_an_object_in_its_region():
    for scene in scenes() + crowded_scenes():
        assert len(scene["wallpaper"]) == 9
        for region, colour in enumerate(scene["wallpaper"]):
            colours = {o[2] for o in scene["objects"] if o[0] == region}
            assert colour in colours or (colour is None and not colours)


def test_a_wallpaper_is_a_hint_and_not_the_answer():
    """Every object of a region has the same chance to lend its colour: a region that holds one red
    and one blue object is red as often as blue, and the target's own region often has another
    wallpaper."""
    first_won, target_won = [], []
    for scene in scenes():
        for region, wallpaper in enumerate(scene["wallpaper"]):
            colours = [o[2] for o in scene["objects"] if o[0] == region]
            if len(colours) == 2 and colours[0] != colours[1]:
                first_won.append(wallpaper == colours[0])
        target_region = scene["objects"][0][0]
        target_won.append(scene["wallpaper"][target_region] == scene["colour"])
    assert len(first_won) > 200 and 0.4 < np.mean(first_won) < 0.6
    assert 0.6 < np.mean(target_won) < 0.95


def test_levels_get_harder_in_every_respect():
    levels = [LEVELS[level] for level in ("easy", "medium", "hard")]
    for easier, harder in itertools.pairwise(levels):
        assert easier["side"] < harder["side"]
        assert easier["lookalikes"] < harder["lookalikes"] and easier["others"] < harder["others"]
        # relative to its cell, which is an 81st of any image
        assert easier["radius"] > harder["radius"]


def test_the_row_keeps_what_the_teacher_needs_and_is_a_question():
    for scene in scenes(20):
        tools.check_question({"id": "1", "image": "1.jpg", **scene})
        _, _, colour, shape, digit = scene["objects"][0]
        assert scene["colour"] == colour
        assert {scene["target_attribute"], scene["answer"]} == {shape, str(digit)}
        assert json.loads(tools.json_line(scene)) == scene


# ---- Images of scenes ---------------------------------------------------------------------------


def test_the_target_box_shows_the_target():
    """Zooming into target_bbox, or into its region and then its cell, returns the pixels of the
    target's cell."""
    for scene in scenes(8):
        image = draw(scene)
        side = LEVELS[scene["level"]]["side"]
        region, cell, colour = scene["objects"][0][:3]
        assert image.size == (side, side)
        left = side // 9 * (3 * (region % 3) + cell % 3)
        top = side // 9 * (3 * (region // 3) + cell // 3)
        x0, y0, x1, y1 = (edge * side for edge in scene["target_bbox"])
        assert abs(x0 - left) + abs(y0 - top) < 0.1
        assert abs(x1 - left - side / 9) + abs(y1 - top - side / 9) < 0.1
        direct = tools.zoom([image], {"bbox_2d": scene["target_bbox"], "source": "original_image"})
        views = [image]
        for source, index in (("original_image", region), ("observation_1", cell)):
            box = build_data.position_box(POSITIONS[index])
            views.append(tools.zoom(views, {"bbox_2d": box, "source": source}))
        for view in (direct, views[-1]):
            assert max(abs(length - side // 9) for length in view.size) <= 2
            assert middle(pixels_like(view, colour)).mean() > 0.2


def test_the_image_shows_every_object_and_no_other():
    """In a cell is its object. Anywhere in a region, wallpaper and frames included, are only
    colours that the region holds."""
    for scene in scenes(4) + crowded_scenes(1):
        image = draw(scene)
        maps = {colour: pixels_like(image, colour) for colour in COLOURS}
        visible_objects, visible_colours = [], set()
        for colour, region in itertools.product(COLOURS, range(9)):
            region_map = ninth(maps[colour], region)
            if region_map.sum() > 10:
                visible_colours.add((region, colour))
            visible_objects += [[region, cell, colour] for cell in range(9)
                                if middle(ninth(region_map, cell)).mean() > 0.15]
        assert sorted(visible_objects) == sorted(o[:3] for o in scene["objects"])
        assert visible_colours == {(o[0], o[2]) for o in scene["objects"]}


def test_the_wallpaper_can_be_seen_in_the_image_and_at_the_size_that_the_model_sees():
    for scene in scenes(12):
        image = draw(scene)
        assert read_wallpaper(image, scene) == scene["wallpaper"]
        small_image = tools.resize_for_model(image, 6000, 8000)
        assert read_wallpaper(small_image, scene) == scene["wallpaper"]


def test_frames_tell_where_a_region_and_a_cell_are():
    """A thin dark frame along the edges of every region, a thick one along those of the image."""
    for scene in scenes(2):
        pixels = np.asarray(draw(scene)).astype(float).mean(axis=-1)
        side = len(pixels) // 9
        for index in range(9):  # columns and rows of cells: the strips at their edges and inside
            columns = pixels[:, side * index:side * (index + 1)]
            rows = pixels[side * index:side * (index + 1)].T
            for lines in (columns, rows):
                assert (lines[:, :side // 12].mean() < 45) == (index % 3 == 0)
                assert (lines[:, -(side // 12):].mean() < 45) == (index % 3 == 2)
                assert (lines[:, side // 8:side // 4].mean() < 60) == (index == 0)
                assert (lines[:, -(side // 4):-(side // 8)].mean() < 60) == (index == 8)


# ---- Questions: seeds, splits and reruns --------------------------------------------------------


def test_the_seed_decides_every_byte(tmp_path):
    job = ("train", 5, "medium")
    row = build_data.make_question(job, tmp_path / "a", 3)
    assert build_data.make_question(job, tmp_path / "b", 3) == row
    image, same_image = (tmp_path / folder / row["image"] for folder in ("a", "b"))
    assert image.read_bytes() == same_image.read_bytes()
    other = build_data.make_question(job, tmp_path / "a", 4)
    # two seeds can share a folder
    assert other["objects"] != row["objects"] and other["image"] != row["image"]


def test_a_rerun_draws_only_what_is_missing(tmp_path):
    """After a kill: a finished image is left alone, a lost one is drawn again to the byte, and the
    rows are the same."""
    jobs = [("easy", 0, "easy"), ("easy", 1, "easy")]
    rows = [build_data.make_question(job, tmp_path, 0) for job in jobs]
    lost, finished = (tmp_path / row["image"] for row in rows)
    lost_bytes = lost.read_bytes()
    lost.unlink()
    finished.write_bytes(b"finished")
    assert [build_data.make_question(job, tmp_path, 0) for job in jobs] == rows
    assert lost.read_bytes() == lost_bytes and finished.read_bytes() == b"finished"


def test_splits_and_questions_differ(tmp_path):
    """No scene appears twice, within a split or across them, at the same level and index too."""
    jobs = [(split, index, "easy") for split in build_data.SPLITS[:4] for index in range(4)]
    rows = [build_data.make_question(job, tmp_path, 0) for job in jobs]
    for key in ("id", "image", "objects"):
        assert len({str(row[key]) for row in rows}) == len(rows)
    assert len({(tmp_path / row["image"]).read_bytes() for row in rows}) == len(rows)


def test_a_change_of_a_level_never_reuses_an_old_image(tmp_path, monkeypatch):
    """The name of an image depends on what is drawn: with other settings a rerun in the same folder
    draws it again."""
    before = build_data.make_question(("easy", 0, "easy"), tmp_path, 0)["image"]
    monkeypatch.setitem(LEVELS, "easy", {**LEVELS["easy"], "radius": 0.3})
    after = build_data.make_question(("easy", 0, "easy"), tmp_path, 0)["image"]
    assert before != after and (tmp_path / before).read_bytes() != (tmp_path / after).read_bytes()


# ---- The teacher's phrases ----------------------------------------------------------------------

OBJECTS = [[0, 8, "red", "star", 7], [0, 2, "red", "circle", 1], [0, 4, "blue", "square", 0],
           [5, 0, "red", "star", 2]]
WALLPAPER = ["blue", None, "red", None, None, "blue", None, None, None]


@pytest.mark.parametrize("region, colour, phrase", [
    (0, "red", "I see red in top-right bottom-right."), (5, "blue", "I see no blue.")])
def test_a_region_by_hand(region, colour, phrase):
    cell_colours = build_data.colours_of(OBJECTS, region)
    assert build_data.describe_colour("region", colour, cell_colours) == phrase


@pytest.mark.parametrize("colour, phrase", [
    ("blue", "I see blue walls in top-left right."), ("green", "I see no green walls.")])
def test_wallpaper_by_hand(colour, phrase):
    assert build_data.describe_colour("wallpaper", colour, WALLPAPER) == phrase


@pytest.mark.parametrize("cell, phrase", [(8, "I see red star 7."), (0, "I see nothing.")])
def test_a_cell_by_hand(cell, phrase):
    assert build_data.describe_cell(OBJECTS, 0, cell) == phrase


def test_positions_with_a_colour_by_hand():
    cell_colours = build_data.colours_of(OBJECTS, 0)
    assert build_data.positions_with("red", cell_colours) == ["top-right", "bottom-right"]
    assert build_data.positions_with("red", build_data.colours_of(OBJECTS, 1)) == []


# ---- Instruction data ---------------------------------------------------------------------------


def test_lessons_on_a_region_by_hand():
    colours = build_data.colours_of(OBJECTS, 0)
    assert build_data.lessons_on_region(colours, "Q?", ["red", "green"], crowded=False) == [
        ("Q?", "I see red in top-right bottom-right."),
        ("Where is green?", "I see no green."),
        ("Where is everything?", "I see red in top-right bottom-right. I see blue in center."),
        ("What is where?", "top-left nothing. top nothing. top-right red. left nothing. center "
         "blue. right nothing. bottom-left nothing. bottom nothing. bottom-right red."),
        ("Where is green, place by place?", " ".join(f"{name} nothing." for name in POSITIONS))]
    questions = dict(build_data.lessons_on_region(colours, "Q?", ["red", "blue"], crowded=True))
    assert "What is where?" not in questions and len(questions) == 4
    empty = dict(build_data.lessons_on_region([None] * 9, "Q?", ["red", "blue"], crowded=False))
    assert empty["Where is everything?"] == "I see nothing."


def test_lessons_on_wallpaper_by_hand():
    assert build_data.lessons_on_wallpaper(WALLPAPER, "Q?", ["red", "blue", "cyan"]) == [
        ("Q?", "I see red walls in top-right."),
        ("Which walls are blue?", "I see blue walls in top-left right."),
        ("Which walls are cyan?", "I see no cyan walls."),
        ("Which walls are what?", "I see red walls in top-right. I see blue walls in top-left "
         "right."),
        ("What is where?", "top-left blue walls. top nothing. top-right red walls. left nothing. "
         "center nothing. right blue walls. bottom-left nothing. bottom nothing. bottom-right "
         "nothing."),
        ("Which walls are red, place by place?", "top-left nothing. top nothing. top-right red "
         "walls. left nothing. center nothing. right nothing. bottom-left nothing. bottom nothing. "
         "bottom-right nothing.")]


@pytest.mark.parametrize("cells, regions, text", [
    (["top", "left"], ["right"], " In observation_3 top left. Later right. Go top."),
    ([], ["right"], " Later right. Go right."), (["top"], [], " In observation_3 top. Go top."),
    ([], [], " Nothing.")])
def test_a_todo_list_by_hand(cells, regions, text):
    assert build_data.describe_todo_list("observation_3", cells, regions) == text


@pytest.fixture(scope="module")
def instructions(tmp_path_factory):
    """Folder, the rows about eight scenes, and these scenes, as they were drawn."""
    out = tmp_path_factory.mktemp("instructions")
    draw_scene = build_data.draw_scene
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
    """What an instruction row is about, by its view's name: (scene, region or None, cell or
    None)."""
    name = re.fullmatch(r"views/0_(\d+)_(?:all|p(\d)(\d)?)\.jpg", row["image"])
    index, region, cell = name.groups()
    return drawn[int(index)], region and int(region), cell and int(cell)


def test_instructions_are_one_turn_trajectories_without_the_protocol(instructions):
    out, rows, _ = instructions
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        tools.check_trajectory(row)
        assert [set(turn) for turn in row["turns"]] == [{"text"}]
        assert row["turns"][0]["text"] == row["answer"]
        assert not re.search("<|original_image|bbox", row["question"] + row["answer"])
        # the size at which the model sees it
        assert tools.open_image(out / row["image"]).size == (84, 84)


def test_every_other_scene_is_crowded_and_has_no_view_of_the_whole_image(instructions):
    """Each view of one cell comes with a lesson that does not need it, a to-do list or sorting. Six
    of ten are described, too."""
    _, rows, drawn = instructions
    assert len(drawn) == 8
    num_described, num_cells = 0, 0
    for index, scene in enumerate(drawn):
        scene_rows = [row for row in rows if row["id"].startswith(f"instruct_{index:05d}_")]
        texts = [row for row in scene_rows if row["question"].startswith(("Done:", "Want"))]
        about = [subject(row, drawn)[1:] for row in scene_rows if row not in texts]
        num_about_image = about.count((None, None))
        num_about_regions = sum(region is not None and cell is None for region, cell in about)
        num_objects = len(scene["objects"])
        level = LEVELS[scene["level"]]
        if index % 2:
            assert 21 <= num_objects <= 55 and (num_about_image, num_about_regions) == (0, 24)
        else:
            assert num_objects == 1 + level["lookalikes"] + level["others"]
            assert (num_about_image, num_about_regions) == (6, 15)
        assert len(texts) == min(10, num_objects) + 1
        assert all(subject(row, drawn)[2] is not None for row in texts)
        num_described += len(about) - num_about_image - num_about_regions
        num_cells += len(texts)
    assert 0.4 < num_described / num_cells < 0.8


WORLD = r"What digit is on the (\w+) (\w+)\?|Which shape is the (\w+) object with digit (\d)\?"
MAP = r"What is where\?|(?:Where is|Which walls are) (\w+), place by place\?"


def asked_colour(question):
    """The colour that a search question names; None for another question."""
    about = re.fullmatch(WORLD, question)
    return about and (about[1] or about[3])


def positions_in(answer, word):
    """{colour: positions} of a reply such as "I see red in top left. I see blue in right."; word
    " walls": of "I see red walls in top left." """
    form = rf"(I see \w+{word} in [a-z -]+\. ?)+|I see no \w+{word}\.|I see nothing\."
    assert re.fullmatch(form, answer)
    phrases = re.findall(rf"I see (\w+){word} in ([a-z -]+)\.", answer)
    return {colour: positions.split() for colour, positions in phrases}


def positions_by_colour(colours):
    """{colour: its positions} of nine colours or Nones."""
    return {colour: [name for name, other in zip(POSITIONS, colours) if other == colour]
            for colour in colours if colour is not None}


def test_instructions_about_wallpaper_are_true(instructions):
    """ "Which walls are red?", or a search question about something red, names exactly the regions
    whose wallpaper looks red in the stored view of the whole image."""
    out, rows, drawn = instructions
    num_checked = {True: 0, False: 0}
    for row in rows:
        scene, region, _ = subject(row, drawn)
        about = re.fullmatch(r"Which walls are (\w+)\?", row["question"])
        assert region is None or about is None
        if region is None and not re.fullmatch(MAP, row["question"]):
            view = tools.open_image(out / row["image"])
            visible = positions_by_colour(read_wallpaper(view, scene))
            colour = about[1] if about else asked_colour(row["question"])
            if colour != "what":
                visible = {name: visible[name] for name in visible if name == colour}
                assert visible or row["answer"] == f"I see no {colour} walls."
            assert positions_in(row["answer"], " walls") == visible
            num_checked[bool(visible)] += 1
    assert min(num_checked.values()) > 2


def test_instructions_about_a_region_are_true(instructions):
    """ "Where is red?", or a search question about something red, names exactly the cells of the
    stored view's pixels that hold red."""
    out, rows, drawn = instructions
    num_checked = {True: 0, False: 0}
    for row in rows:
        about = re.fullmatch(r"Where is (\w+)\?", row["question"])
        _, region, cell = subject(row, drawn)
        assert about is None or region is not None and cell is None
        if region is not None and cell is None and not re.fullmatch(MAP, row["question"]):
            view = tools.open_image(out / row["image"])
            subject_word = about[1] if about else asked_colour(row["question"])
            visible = {}
            for colour in COLOURS if subject_word == "everything" else [subject_word]:
                pixels = pixels_like(view, colour)
                positions = [name for index, name in enumerate(POSITIONS)
                             if middle(ninth(pixels, index)).mean() > 0.1]
                if positions:
                    visible[colour] = positions
            if not visible:
                everything = subject_word == "everything"
                nothing = "I see nothing." if everything else f"I see no {subject_word}."
                assert row["answer"] == nothing
            assert positions_in(row["answer"], "") == visible
            num_checked[bool(visible)] += 1
    assert min(num_checked.values()) > 20


def test_maps_name_what_is_at_each_position(instructions):
    """ "What is where?": the nine positions in reading order with the colour of their object, or of
    their wallpaper; "Where is red, place by place?": with that colour only."""
    _, rows, drawn = instructions
    all_names, one_colour = set(), {True: 0, False: 0}
    for row in rows:
        about = re.fullmatch(MAP, row["question"])
        scene, region, cell = subject(row, drawn)
        if about is None:
            continue
        assert cell is None and ("walls" not in row["question"] or region is None)
        if region is None:
            names = [f"{colour} walls" if colour else "nothing" for colour in scene["wallpaper"]]
        else:
            colours = {o[1]: o[2] for o in scene["objects"] if o[0] == region}
            names = [colours.get(cell, "nothing") for cell in range(9)]
        if about[1]:
            names = [name if name.split()[0] == about[1] else "nothing" for name in names]
            one_colour[set(names) != {"nothing"}] += 1
        expected = [f"{position} {name}." for position, name in zip(POSITIONS, names)]
        assert row["answer"] == " ".join(expected)
        all_names |= set(names)
    assert all_names >= {*COLOURS, "nothing", "red walls"}
    assert min(one_colour.values()) > 3


def test_instructions_about_a_cell_name_its_object(instructions):
    """The colour is checked against the pixels of the stored view, shape and digit against the
    layout."""
    out, rows, drawn = instructions
    num_empty = 0
    for row in rows:
        if row["question"] != "What is this?":
            continue
        scene, region, cell = subject(row, drawn)
        objects = [o for o in scene["objects"] if o[:2] == [region, cell]]
        phrase = "I see {} {} {}.".format(*objects[0][2:]) if objects else "I see nothing."
        assert row["answer"] == phrase
        view = tools.open_image(out / row["image"])
        visible = [name for name in COLOURS if middle(pixels_like(view, name)).mean() > 0.1]
        assert visible == [o[2] for o in objects]
        num_empty += not objects
    assert num_empty > 0


def test_search_questions_about_a_cell_are_answered_with_verdict_and_answer(instructions):
    """What is in the cell, what is wanted, the verdict, and after a Yes the answer, each checked
    against the layout and the question's own words. Both verdicts occur for both kinds of
    question."""
    _, rows, drawn = instructions
    verdicts = collections.Counter()
    for row in rows:
        about = re.fullmatch(WORLD, row["question"])
        scene, region, cell = subject(row, drawn)
        if about is None or cell is None:
            continue
        objects = [o[2:] for o in scene["objects"] if o[:2] == [region, cell]]
        phrase, answer, is_target = "I see nothing.", "", False
        if objects:
            colour, shape, digit = objects[0]
            phrase = f"I see {colour} {shape} {digit}."
            assert asked_colour(row["question"]) == colour
            is_target = about[2] == shape or about[4] == str(digit)
            if is_target:
                answer = f" Answer {digit if about[2] else shape}."
        wanted = about[2] or about[4]
        verdict = "Yes" if is_target else "No"
        assert row["answer"] == f"{phrase} Want {wanted}. {verdict}.{answer}"
        verdicts[bool(about[2]), is_target] += 1
    assert len(verdicts) == 4 and min(verdicts.values()) > 2


def test_sorting_gives_every_object_its_verdict(instructions):
    """"Want 5: blue star 5, red circle 2." lists objects; the reply repeats each and says whether
    it carries what is wanted."""
    _, rows, _ = instructions
    verdicts = []
    for row in rows:
        if not row["question"].startswith("Want"):
            continue
        wanted, object_list = re.fullmatch(r"Want (\w+): (.*)\.", row["question"]).groups()
        expected = []
        for name in object_list.split(", "):
            verdicts.append("Yes" if wanted in name.split() else "No")
            expected.append(f"I see {name}. Want {wanted}. {verdicts[-1]}.")
        assert row["answer"] == " ".join(expected)
    assert min(verdicts.count("Yes"), verdicts.count("No")) > 10


def parse_todo_list(text):
    """(cells, regions, where to go or None, observation or None) of a to-do list in words."""
    cells = re.search(r" In (observation_\d+) ([a-z -]+)\.", text)
    regions = re.search(r" Later ([a-z -]+)\.", text)
    go = re.search(r" Go ([a-z-]+)\.", text)
    return (cells[2].split() if cells else [], regions[1].split() if regions else [],
            go and go[1], cells and cells[1])


def test_a_todo_list_loses_its_first_step(instructions):
    """What the reply still lists is what the question listed, less the position visited. Next comes
    the first of the rest, a cell in an observation before a region."""
    _, rows, _ = instructions
    todo_rows = [row for row in rows if row["question"].startswith("Done:")]
    assert len(todo_rows) > 12          # four in ten of the lessons in text
    for row in todo_rows:
        cells, regions, go, source = parse_todo_list(row["question"])
        assert go == ([*cells, *regions] or [None])[0]
        cells_left, regions_left, next_go, next_source = parse_todo_list(row["answer"])
        if cells:
            assert (cells_left, regions_left) == (cells[1:], regions)
        else:
            assert (cells_left, regions_left) == ([], regions[1:])
        assert next_go == ([*cells_left, *regions_left] or [None])[0]
        assert not cells_left or next_source == source
        assert next_go is not None or row["answer"] == "Next: Nothing."


# ---- The tiny model -----------------------------------------------------------------------------


def test_the_strings_of_the_protocol_are_single_tokens(make_tiny):
    tokenizer = make_tiny(torch.float32).tokenizer
    call = '{"bbox_2d": [0.0, 0.333, 0.333, 1.0], "source": "observation_12"}'
    token_ids = tokenizer.encode(f"<think></think><grounding>{call}</grounding>")
    # the thought's two, the opening, four numbers with commas, the source's name between two
    assert len(token_ids) == 2 + 1 + 7 + 3
    for text in ("<answer>", "</answer>", "original_image", *build_data.SPECIAL_TOKENS):
        assert len(tokenizer.encode(text)) == 1
    for digit in "0123456789":  # the same token in a reply, in a list and alone
        digit_id, = tokenizer.encode(digit)
        assert digit_id in tokenizer.encode(f"I see red star {digit}. Want {digit}.")


def test_the_seed_decides_the_weights(instructions):
    texts = build_data.project_texts(instructions[1][:50])
    weights = [build_data.build_tiny(texts, seed)[0].state_dict() for seed in (0, 0, 1)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    name = "model.language_model.embed_tokens.weight"
    assert not torch.equal(weights[0][name], weights[2][name])


# ---- The command --------------------------------------------------------------------------------


def test_results_come_in_order_whatever_the_number_of_processes():
    for num_workers in (1, 2):
        results = build_data.map_in_processes(abs, range(-40, 0), num_workers, "jobs")
        assert list(results) == list(range(40, 0, -1))


def test_a_killed_worker_is_one_line():
    line = "a worker process of 'jobs' was killed, perhaps for lack of memory; run the command"
    with pytest.raises(tools.InputError, match=line):
        list(build_data.map_in_processes(os._exit, [1], 1, "jobs "))


def test_workers_end_with_their_parent(tmp_path):
    """Nothing is left after a stage alone was killed, as by a lack of memory."""
    process = Forked(["build_data.py", "--train", 3000, "--workers", 2, "--out", tmp_path / "out"])
    crash.wait_until(process, lambda: len(list(tmp_path.glob("out/images/*.jpg"))) > 20)
    pids = crash.processes(process.pid)
    assert len(pids) >= 3
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    deadline = time.time() + 30
    while any(is_running(pid) for pid in pids):
        assert time.time() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_while_workers_start_is_one_line(tmp_path, signal_number):
    """A terminal sends Ctrl-C to all processes, a batch system SIGTERM to the first one. Nothing
    but the progress and that line is printed, and no process is left."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "build_data.py"), "--train", "3000", "--workers", "2",
         "--out", str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=crash.restore_ctrl_c)
    crash.wait_until(process, lambda: len(crash.processes(process.pid)) >= 3)
    pids = crash.processes(process.pid)
    for pid in pids if signal_number == signal.SIGINT else pids[:1]:
        os.kill(pid, signal_number)
    exit_code, stdout, stderr = crash.finish(process, 60)
    assert (exit_code, stdout) == (130, "")
    lines = [line for line in stderr.splitlines() if not line.startswith("train   : ")]
    assert lines == [
        "build_data.py: interrupted; only the files that are named above are written"]
    # Workers notice a moment later that their parent has gone.
    deadline = time.time() + 20
    while any(is_running(pid) for pid in pids) and time.time() < deadline:
        time.sleep(0.05)
    assert not any(is_running(pid) for pid in pids)


def is_running(pid):
    """Whether a process runs: it is there, and it has not ended without anybody noticing."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


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
        jobs = [(split, index, level) for index, level in enumerate(levels)]
        assert rows == [build_data.make_question(job, tmp_path, 1) for job in jobs]
        assert f"{split}.jsonl: {len(rows)} questions" in done.stdout
    rows = tools.read_jsonl(out / "instruct.jsonl", tools.check_trajectory)
    expected = [build_data.make_instructions(index, tmp_path, 1, 6000, 8000) for index in range(2)]
    assert rows == [*expected[0], *expected[1]]
    assert f"instruct.jsonl: {len(rows)} single-view questions" in done.stdout
    assert "finished in" in done.stdout
    files = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.jpg"))
    assert files == sorted(path.relative_to(out) for path in out.rglob("*.jpg"))
    assert all((tmp_path / file).read_bytes() == (out / file).read_bytes() for file in files)


def test_each_level_of_the_training_questions_has_a_file_of_its_own(built):
    out, _ = built
    rows = tools.read_jsonl(out / "train.jsonl")
    for level in LEVELS:
        level_rows = [row for row in rows if row["level"] == level]
        assert tools.read_jsonl(out / f"train_{level}.jsonl") == level_rows != []


def test_every_image_of_every_row_opens(built):
    out, _ = built
    for split in build_data.SPLITS:
        for row in tools.read_jsonl(out / f"{split}.jsonl"):
            image = tools.open_image(out / row["image"])
            side = 84 if split == "instruct" else LEVELS[row["level"]]["side"]
            assert image.size == (side, side)
    assert not [path for path in out.rglob(".*")]  # no temporary file is left


SMALL = ["--train", 1, "--val", 1, "--test", 1, "--scenes", 1, "--workers", 1]


def test_without_scenes_there_are_no_instructions(tmp_path):
    """What an earlier run has written stays."""
    for scenes in (1, 0):
        run_script("build_data.py", *SMALL, "--scenes", scenes, "--out", tmp_path / "one")
    run_script("build_data.py", *SMALL, "--scenes", 0, "--out", tmp_path / "none")
    assert (tmp_path / "one/instruct.jsonl").exists() and (tmp_path / "none/val.jsonl").exists()
    assert not (tmp_path / "none/instruct.jsonl").exists()


@pytest.mark.parametrize("flags", [
    ["--train", 0], ["--val", 0], ["--test", -1], ["--scenes", -1], ["--workers", 0],
    ["--seed", -1], ["--min_pixels", 0], ["--max_pixels", 0], ["--min_pixels", 9000]], ids=str)
def test_a_bad_number_is_one_line(tmp_path, flags):
    line = refused("build_data.py", *SMALL, *flags, "--out", tmp_path / "out")
    assert "\n" not in line and flags[0] in line
    assert not (tmp_path / "out").exists()


KNOWN = "visualprobe, vstar, hrbench, mme_realworld, deepeyes, mini_o3_coldstart"
RANGE = "--pass_rate_range must be two pass rates, 0 <= LOW <= HIGH <= 1"


@pytest.mark.parametrize("flags, message", [
    (["--import", "vstar"], "--import needs --source"),
    (["--import", "vstar", "--source", "no/such"], "--source no/such does not exist"),
    (["--import", "cifar", "--source", "."], f"--import cifar: known are {KNOWN}"),
    (["--import", "vstar", "--source", ".", "--train", "5", "--pass_rate_range", "0", "1"],
     "--pass_rate_range and --train cannot be used with --import"),
    (["--import", "vstar", "--source", ".", "--filter", "r.jsonl"],
     "--filter cannot be used with --import"),
    (["--filter", "r.jsonl", "--out", "x"], "--out cannot be used with --filter"),
    (["--filter", "r.jsonl"], "r.jsonl does not exist; make it with: python evaluate.py"),
    (["--filter", "r.jsonl", "--pass_rate_range", "0.9", "0.1"], RANGE),
    (["--filter", "r.jsonl", "--pass_rate_range", "nan", "1"], RANGE),
    (["--source", "."], "--source cannot be used without --import or --filter"),
    (["--pass_rate_range", "0", "1"],
     "--pass_rate_range cannot be used without --import or --filter")], ids=str)
def test_flags_that_do_not_belong_together_are_one_line(monkeypatch, tmp_path, flags, message):
    monkeypatch.chdir(tmp_path)
    assert refused("build_data.py", *flags).startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("kept")
    done = run_script("build_data.py", *SMALL, "--out", tmp_path / "file", check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "build_data.py: error:" in done.stderr
    assert (tmp_path / "file").read_text() == "kept"
