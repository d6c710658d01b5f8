"""Questions about images: draw the synthetic Visual Probe world (the default), import a published
data set (--import), or keep the questions of a suitable difficulty (--filter).

A drawn image has nine framed regions of nine cells each. Some cells hold an object: a shape in one
of six colours, with a digit on it. The model sees every view at about 84 x 84 pixels, so it reads
an image on three scales:
    whole image     which regions have red wallpaper      (a hint: they hold something red)
    one region      which cells hold something red        (shape and digit are too small to read)
    one cell        "red square 7"

The look-alikes of the target have its colour. They differ in what decides the question: the shape
in "What digit is on the red square?", the digit in "Which shape is the red object with digit 7?".

What differs from the paper's VisualProbe:
1. Images are drawn, not photographed, so that a model of 1.6 M parameters can learn them in
   minutes without a network. That model is built here, too (sft.py --model tiny).
2. A row keeps the layout of its scene ("objects", "wallpaper"). Only the scripted teacher reads it.
3. `instruct.jsonl` holds questions about single views. They stand in for what a pretrained
   vision-language model knows already.

Commands (all of this is CPU work; a GPU or more nodes change nothing):
    1 CPU         python build_data.py --workers 1
    any other     python build_data.py
    smaller       python build_data.py --train 300 --test 40 --scenes 100 --out /tmp/data
    RL data       python build_data.py --import visualprobe --source downloads
    others        see extras/import_data.py
    not too hard  python build_data.py --filter results/sft/train.rates.jsonl
"""

import hashlib
import json
import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import tools
from extras import terminal
from tools import check

# ---- Scenes: which object is in which cell, and the question about it ---------------------------

COLOURS = {"red": (214, 40, 40), "green": (40, 160, 60), "blue": (50, 80, 220),
           "yellow": (205, 175, 0), "purple": (150, 50, 180), "cyan": (0, 165, 185)}
SHAPES = ["circle", "square", "triangle", "star"]
# side: of the image in pixels, a multiple of 9. radius: of an object, in sides of a cell.
# lookalikes, others: numbers of objects with the target's colour and with another colour.
LEVELS = {"easy": {"side": 504, "radius": 0.43, "lookalikes": 2, "others": 3},
          "medium": {"side": 630, "radius": 0.40, "lookalikes": 5, "others": 5},
          "hard": {"side": 756, "radius": 0.37, "lookalikes": 10, "others": 7}}
# A split's index is part of its random seeds, so that no two splits share one.
SPLITS = ["train", "easy", "medium", "hard", "instruct", "val"]
# The nine regions of an image, and the nine cells of a region. Both are given by index, 0 to 8.
POSITIONS = ["top-left", "top", "top-right", "left", "center", "right",
             "bottom-left", "bottom", "bottom-right"]


def position_box(position):
    """Return the box [x0, y0, x1, y1] of a position, relative to its view and rounded as the
    teacher writes it."""
    row, column = divmod(POSITIONS.index(position), 3)
    edges = [0.0, 0.333, 0.667, 1.0]
    return [edges[column], edges[row], edges[column + 1], edges[row + 1]]


def grid_position(region, cell):
    """Return (column, row) of a cell in the whole image, each from 0 to 8."""
    region_row, region_column = divmod(region, 3)
    cell_row, cell_column = divmod(cell, 3)
    return 3 * region_column + cell_column, 3 * region_row + cell_row


def random_object(rng):
    """Return (colour, shape, digit), each drawn uniformly."""
    colour = str(rng.choice(list(COLOURS)))
    shape = str(rng.choice(SHAPES))
    digit = int(rng.integers(10))
    return colour, shape, digit


def ask_about(question_kind, colour, shape, digit):
    """Return (question, answer, target attribute) for an object. The target attribute tells it from
    others of its colour: of a red square with digit 7,
        "digit": ("What digit is on the red square?", "7", "square")
        "shape": ("Which shape is the red object with digit 7?", "square", "7")"""
    if question_kind == "digit":
        return f"What digit is on the {colour} {shape}?", str(digit), shape
    return f"Which shape is the {colour} object with digit {digit}?", shape, str(digit)


def make_scene(rng, level, lookalikes=None, others=None):
    """Draw lots for one image and return its question row, without "id" and "image".

    lookalikes, others: numbers of objects, instead of the level's. In the row, "objects" are lists
    [region, cell, colour, shape, digit], the target first. "wallpaper" has one entry per region:
    the colour of one of its objects, or None if it has none."""
    num_lookalikes = LEVELS[level]["lookalikes"] if lookalikes is None else lookalikes
    num_others = LEVELS[level]["others"] if others is None else others
    # 1. The target, and a cell for every object: (region, cell) in random order.
    question_kind = ["digit", "shape"][rng.integers(2)]
    target_colour, target_shape, target_digit = random_object(rng)
    random_cells = [divmod(cell_number, 9) for cell_number in rng.permutation(81).tolist()]
    objects = [[*random_cells[0], target_colour, target_shape, target_digit]]
    # 2. Look-alikes have the target's colour. What decides the question is drawn again, among all
    #    but the target's, so that no other object fits.
    for region, cell in random_cells[1:1 + num_lookalikes]:
        shape = str(rng.choice(SHAPES))
        digit = int(rng.integers(10))
        if question_kind == "digit":
            shape = str(rng.choice([other for other in SHAPES if other != target_shape]))
        else:
            digit = int(rng.choice([other for other in range(10) if other != target_digit]))
        objects.append([region, cell, target_colour, shape, digit])
    # 3. The other objects have any other colour.
    other_colours = [other for other in COLOURS if other != target_colour]
    for region, cell in random_cells[1 + num_lookalikes:1 + num_lookalikes + num_others]:
        colour = str(rng.choice(other_colours))
        shape = str(rng.choice(SHAPES))
        digit = int(rng.integers(10))
        objects.append([region, cell, colour, shape, digit])
    # 4. The wallpaper is a hint and not the answer: any object of a region may lend its colour.
    wallpaper = []
    for region in range(9):
        object_colours = [colour for object_region, _, colour, _, _ in objects
                          if object_region == region]
        wallpaper.append(str(rng.choice(object_colours)) if object_colours else None)
    question, answer, target_attribute = ask_about(
        question_kind, target_colour, target_shape, target_digit)
    column, row = grid_position(*random_cells[0])
    target_bbox = [round(edge / 9, 4) for edge in (column, row, column + 1, row + 1)]
    return {"question": question, "answer": answer, "source": f"synthetic_{question_kind}",
            "level": level, "target_bbox": target_bbox, "colour": target_colour,
            "target_attribute": target_attribute, "objects": objects, "wallpaper": wallpaper}


# ---- Images of scenes ---------------------------------------------------------------------------


def draw_background(rng, scene):
    """Return the image of a scene without its objects: noise, tinted by each region's wallpaper."""
    image_side = LEVELS[scene["level"]]["side"]
    # 1. Smooth noise: a coarse grid of greys with a little colour, enlarged.
    coarse_noise = rng.integers(90, 160, size=(14, 14, 1)) + rng.integers(-8, 9, size=(14, 14, 3))
    coarse_image = Image.fromarray(coarse_noise.astype(np.uint8))
    smooth_image = coarse_image.resize((image_side, image_side), Image.Resampling.BICUBIC)
    # 2. A faint tint for each region, repeated over its pixels: (9, 3) -> (side, side, 3).
    tints = np.zeros((9, 3), dtype=np.int16)
    for region, colour in enumerate(scene["wallpaper"]):
        if colour is not None:
            tints[region] = np.round(0.35 * (np.array(COLOURS[colour]) - 128))
    region_side = image_side // 3
    tinted_regions = tints.reshape(3, 3, 3).repeat(region_side, axis=0)
    tinted_regions = tinted_regions.repeat(region_side, axis=1)
    # 3. Fine noise on every pixel.
    fine_noise = rng.integers(-5, 6, size=(image_side, image_side, 1), dtype=np.int16)
    pixels = np.clip(np.asarray(smooth_image) + tinted_regions + fine_noise, 0, 255)
    return Image.fromarray(pixels.astype(np.uint8))


def draw_shape(draw, shape, center_x, center_y, radius, fill):
    """Fill one shape, in pixels. Factors of the radius give the four shapes similar areas."""
    # Shapes that the library can draw.
    if shape == "circle":
        draw.circle((center_x, center_y), radius, fill=fill)
        return
    if shape == "square":
        half_side = 0.86 * radius
        draw.rectangle([center_x - half_side, center_y - half_side,
                        center_x + half_side, center_y + half_side], fill=fill)
        return
    # The others are polygons: the angle and the distance from the centre of every corner.
    if shape == "triangle":
        center_y += 0.15 * radius
        corner_angles = -np.pi / 2 + 2 * np.pi / 3 * np.arange(3)
        corner_radii = np.full(3, 1.15 * radius)
    else:  # a star: five outer corners, and an inner one after each of them
        corner_angles = -np.pi / 2 + np.pi / 5 * np.arange(10)
        corner_radii = np.where(np.arange(10) % 2, 0.5, 1.12) * radius
    corners = []
    for corner_angle, corner_radius in zip(corner_angles, corner_radii):
        corners.append((center_x + corner_radius * np.cos(corner_angle),
                        center_y + corner_radius * np.sin(corner_angle)))
    draw.polygon(corners, fill=fill)


def draw_scene(rng, scene):
    """Return the image of a scene: background, frames, and objects with their digits."""
    image_side = LEVELS[scene["level"]]["side"]
    region_side = image_side // 3
    cell_side = image_side / 9
    image = draw_background(rng, scene)
    draw = ImageDraw.Draw(image)
    # 1. Frames tell where in a view a cell is: thin ones around regions, a thick one around all.
    for region in range(9):
        left = region_side * (region % 3)
        top = region_side * (region // 3)
        draw.rectangle([left, top, left + region_side - 1, top + region_side - 1],
                       outline=(20, 20, 20), width=round(cell_side / 10))
    draw.rectangle([0, 0, image_side - 1, image_side - 1],
                   outline=(20, 20, 20), width=round(cell_side / 3.5))
    # 2. Objects vary a little in position, size and colour.
    font = ImageFont.load_default(size=0.58 * cell_side)
    for region, cell, colour, shape, digit in scene["objects"]:
        column, row = grid_position(region, cell)
        center_x = (column + 0.5) * cell_side + rng.uniform(-0.02, 0.02) * cell_side
        center_y = (row + 0.5) * cell_side + rng.uniform(-0.02, 0.02) * cell_side
        radius = LEVELS[scene["level"]]["radius"] * cell_side * rng.uniform(0.94, 1.0)
        channels = [channel + rng.integers(-15, 16) for channel in COLOURS[colour]]
        fill = tuple(np.clip(channels, 0, 255).tolist())
        draw_shape(draw, shape, center_x, center_y, radius, fill)
        draw.text((center_x, center_y), str(digit), font=font, anchor="mm", fill=(255, 255, 255),
                  stroke_width=max(1, round(cell_side / 42)), stroke_fill=(0, 0, 0))
    return image


def save_image(image, path, quality):
    """Write a JPEG file atomically: a kill leaves no half-written one."""
    tools.write_atomic(path, partial(image.save, format="JPEG", quality=quality, subsampling=0))


def make_question(job, out, seed):
    """Return one question row, and store its image in out / "images". job: (split, index, level).

    An image that exists is not drawn again, so that a run after a kill continues. For this, layout
    and drawing have separate random streams, and an image's name depends on all that it shows."""
    split, question_index, level = job
    seed_path = [seed, SPLITS.index(split), question_index]
    scene = make_scene(np.random.default_rng([*seed_path, 0]), level)
    digest = hashlib.sha256(json.dumps([scene, LEVELS[level]]).encode()).hexdigest()[:8]
    image_path = f"images/{split}_{seed}_{question_index:05d}_{digest}.jpg"
    if not (out / image_path).exists():
        image = draw_scene(np.random.default_rng([*seed_path, 1]), scene)
        save_image(image, out / image_path, quality=85)
    return {"id": f"{split}_{question_index:05d}", "image": image_path, **scene}


# ---- The teacher's phrases: what a view shows, in words -----------------------------------------

# The base model's data and the scripted teacher share this small language: a word that has to be
# copied from one turn to the next must look the same in both.
PHRASES = {
    "region": "I see {colour} in {places}.",           # which cells of a region have this colour
    "no_region": "I see no {colour}.",
    "wallpaper": "I see {colour} walls in {places}.",  # which regions have wallpaper of this colour
    "no_wallpaper": "I see no {colour} walls.",
    "cell": "I see {colour} {shape} {digit}.",
    "empty": "I see nothing.",
    "verdict": " Want {wanted}. {verdict}.",           # is the object in this cell the target?
    "answer": " Answer {answer}.",                     # the answer, after the verdict Yes
    "here": " In {source} {places}.",                  # cells still to visit, in one observation
    "later": " Later {places}.",                       # regions still to visit
    "go": " Go {place}.",                              # the next view
    "scan": " Scan.", "shuffle": " Shuffle.", "hint": " Hint.",  # the order of regions, in turn one
    "guess": " Guess {answer}.",                       # an answer before the target was seen
    "again": " Not found. Scan again.", "back": " Wrong guess. Back.", "check": " Check.",
    "sorry": "That call was refused.",
}


def find_object(objects, region, cell):
    """Return (colour, shape, digit) of the object in a cell, or None if the cell is empty."""
    for object_region, object_cell, colour, shape, digit in objects:
        if (object_region, object_cell) == (region, cell):
            return colour, shape, digit
    return None


def colours_of(objects, region):
    """Return the nine colours of a region's cells, None for an empty cell."""
    cell_colours = [None] * 9
    for object_region, cell, colour, _, _ in objects:
        if object_region == region:
            cell_colours[cell] = colour
    return cell_colours


def positions_with(colour, nine_colours):
    """Return the positions at which a colour is among nine, such as those of colours_of."""
    return [POSITIONS[index] for index in range(9) if nine_colours[index] == colour]


def describe_colour(phrase_key, colour, nine_colours):
    """Return in words where a colour is among nine: those of a region's cells (phrase_key "region")
    or the wallpaper of the image's regions ("wallpaper").
        region         I see red in top-left.         I see no red.
        wallpaper      I see red walls in top-left.   I see no red walls."""
    positions = positions_with(colour, nine_colours)
    if not positions:
        return PHRASES[f"no_{phrase_key}"].format(colour=colour)
    return PHRASES[phrase_key].format(colour=colour, places=" ".join(positions))


def describe_cell(objects, region, cell):
    """Return "I see red square 7." or "I see nothing."."""
    found_object = find_object(objects, region, cell)
    if found_object is None:
        return PHRASES["empty"]
    colour, shape, digit = found_object
    return PHRASES["cell"].format(colour=colour, shape=shape, digit=digit)


def describe_all_colours(phrase_key, nine_colours):
    """Return describe_colour of every colour that occurs, or "I see nothing."."""
    phrases = [describe_colour(phrase_key, colour, nine_colours)
               for colour in COLOURS if colour in nine_colours]
    return " ".join(phrases) or PHRASES["empty"]


def describe_each_position(nine_colours, named_colours, noun=""):
    """Return what is at each position: "top-left nothing. top red. ...". A colour that is not among
    the named ones counts as nothing. noun: what follows a colour, such as " walls"."""
    sentences = []
    for position, colour in zip(POSITIONS, nine_colours):
        content = colour + noun if colour in named_colours else "nothing"
        sentences.append(f"{position} {content}.")
    return " ".join(sentences)


# ---- Instruction data: one view, one question, one reply in the teacher's words -----------------


def lessons_on_region(cell_colours, question, asked_colours, crowded):
    """Return pairs (question, reply) about the view of a region.

    question: a search question about asked_colours[0]. With asked colours red and blue:
        What digit is on the red star?   I see red in top-left.
        Where is blue?                   I see no blue.
        Where is everything?             I see red in top-left. I see green in right.
        What is where?                   top-left red. top nothing. ...      (unless crowded)
        Where is blue, place by place?   top-left nothing. top nothing. ..."""
    first, second = asked_colours
    lessons = [(question, describe_colour("region", first, cell_colours)),
               (f"Where is {second}?", describe_colour("region", second, cell_colours)),
               ("Where is everything?", describe_all_colours("region", cell_colours))]
    if not crowded:
        lessons.append(("What is where?", describe_each_position(cell_colours, COLOURS)))
    lessons.append((f"Where is {second}, place by place?",
                    describe_each_position(cell_colours, [second])))
    return lessons


def lessons_on_wallpaper(wallpaper, question, asked_colours):
    """Return pairs (question, reply) about the view of a whole image.

    question: a search question about asked_colours[0]. With asked colours red, blue and cyan:
        What digit is on the red star?         I see red walls in top-left.
        Which walls are blue?                  I see no blue walls.
        Which walls are cyan?                  I see no cyan walls.
        Which walls are what?                  I see red walls in top-left. I see green walls ...
        What is where?                         top-left red walls. top nothing. ...
        Which walls are red, place by place?   top-left red walls. top nothing. ..."""
    first, second, third = asked_colours
    return [(question, describe_colour("wallpaper", first, wallpaper)),
            (f"Which walls are {second}?", describe_colour("wallpaper", second, wallpaper)),
            (f"Which walls are {third}?", describe_colour("wallpaper", third, wallpaper)),
            ("Which walls are what?", describe_all_colours("wallpaper", wallpaper)),
            ("What is where?", describe_each_position(wallpaper, COLOURS, " walls")),
            (f"Which walls are {first}, place by place?",
             describe_each_position(wallpaper, [first], " walls"))]


def lesson_on_cell(rng, objects, region, cell):
    """Return (question, reply) about the view of one cell: "What is this?", or a search question,
    whose reply has a verdict, too.
        What digit is on the red star?   I see red star 7. Want star. Yes. Answer 7."""
    reply = describe_cell(objects, region, cell)
    question_kind = ["name", "digit", "shape"][rng.integers(3)]
    if question_kind == "name":
        return "What is this?", reply
    # A search visits cells of the colour in its question. Half of the time the object there is
    # asked for, otherwise any shape and digit, which may be those of the object by chance.
    asked_colour, asked_shape, asked_digit = random_object(rng)
    found_object = find_object(objects, region, cell)
    if found_object is not None:
        asked_colour = found_object[0]
        if rng.random() < 0.5:
            _, asked_shape, asked_digit = found_object
    question, _, target_attribute = ask_about(
        question_kind, asked_colour, asked_shape, asked_digit)
    is_target = found_object is not None and target_attribute in map(str, found_object)
    verdict = "Yes" if is_target else "No"
    reply += PHRASES["verdict"].format(wanted=target_attribute, verdict=verdict)
    if is_target:
        _, answer, _ = ask_about(question_kind, *found_object)
        reply += PHRASES["answer"].format(answer=answer)
    return question, reply


def lesson_on_sorting(rng):
    """Return (question, reply) that need no image: a list of objects, and a verdict on each.
        Want 5: blue star 5, red circle 2.
        I see blue star 5. Want 5. Yes. I see red circle 2. Want 5. No."""
    objects = [list(random_object(rng)) for _ in range(rng.integers(2, 5))]
    # Wanted is a shape (field 1) or, more often, a digit (field 2), since ten digits are harder to
    # tell apart than four shapes. Half of the objects are changed to have it.
    wanted_field = int(rng.choice([1, 2], p=[0.3, 0.7]))
    wanted_value = objects[0][wanted_field]
    for object_fields in objects:
        if rng.random() >= 0.5:
            object_fields[wanted_field] = wanted_value
    object_names = []
    replies = []
    for object_index in rng.permutation(len(objects)):
        colour, shape, digit = objects[object_index]
        object_names.append(f"{colour} {shape} {digit}")
        verdict = "Yes" if wanted_value in (shape, digit) else "No"
        replies.append(PHRASES["cell"].format(colour=colour, shape=shape, digit=digit)
                       + PHRASES["verdict"].format(wanted=wanted_value, verdict=verdict))
    return f"Want {wanted_value}: {', '.join(object_names)}.", " ".join(replies)


def describe_rest(source, cells, regions):
    """Return in words what a search still has to visit: positions of cells in the observation
    `source`, and positions of regions in the image."""
    phrases = ""
    if cells:
        phrases += PHRASES["here"].format(source=source, places=" ".join(cells))
    if regions:
        phrases += PHRASES["later"].format(places=" ".join(regions))
    return phrases


def describe_todo_list(source, cells, regions):
    """Return describe_rest and the first view of it, or " Nothing." if there is none."""
    if not cells and not regions:
        return " Nothing."
    first_position = (cells + regions)[0]
    return describe_rest(source, cells, regions) + PHRASES["go"].format(place=first_position)


def lesson_on_todo_list(rng):
    """Return (question, reply) that need no image: a to-do list before and after one step.
        Done: In observation_3 top bottom. Later right. Go top. What next?
        Next: In observation_3 bottom. Later right. Go bottom."""
    regions = rng.permutation(POSITIONS)[:rng.integers(0, 10)].tolist()
    cells = [POSITIONS[index] for index in sorted(rng.permutation(9)[:rng.integers(0, 4)])]
    source = f"observation_{rng.integers(1, 32)}"
    list_before = describe_todo_list(source, cells, regions)
    if cells:
        list_after = describe_todo_list(source, cells[1:], regions)
    else:
        list_after = describe_todo_list(source, cells, regions[1:])
    return f"Done:{list_before} What next?", f"Next:{list_after}"


def zoom_to(view, index):
    """Return the crop of one position, by the agent's own tool and at the teacher's coordinates."""
    box = position_box(POSITIONS[index])
    return tools.zoom([view], {"bbox_2d": box, "source": "original_image"})


def search_question(rng, scene, num_colours):
    """Return (question, asked colours): a search question about the scene's colour, and that colour
    followed by others."""
    shuffled_colours = rng.permutation(list(COLOURS)).tolist()
    other_colours = [other for other in shuffled_colours if other != scene["colour"]]
    question_kind = ["digit", "shape"][rng.integers(2)]
    asked_shape = str(rng.choice(SHAPES))
    asked_digit = int(rng.integers(10))
    question, _, _ = ask_about(question_kind, scene["colour"], asked_shape, asked_digit)
    return question, [scene["colour"], *other_colours][:num_colours]


def make_instructions(scene_index, out, seed, min_pixels, max_pixels):
    """Return instruction rows about one scene. Its views are stored in out / "views", at
    the size at which the model sees them.

    Every second scene is crowded (20 to 54 objects besides the target): one reply about a region
    then names many positions. Its wallpaper is left out, and so is "What is where?"."""
    rng = np.random.default_rng([seed, SPLITS.index("instruct"), scene_index])
    level = list(LEVELS)[rng.integers(3)]
    crowded = scene_index % 2 == 1
    num_lookalikes = rng.integers(4, 16) if crowded else None  # None: as many as the level has
    num_others = rng.integers(16, 40) if crowded else None
    scene = make_scene(rng, level, num_lookalikes, num_others)
    image = draw_scene(rng, scene)
    views = []  # (name, image, lessons)
    # 1. The whole image: which regions have which wallpaper.
    if not crowded:
        question, asked_colours = search_question(rng, scene, 3)
        lessons = lessons_on_wallpaper(scene["wallpaper"], question, asked_colours)
        views.append(("all", image, lessons))
    # 2. Some regions: which cells have which colour. Region 4 is called p4.
    for region in rng.permutation(9)[:6 if crowded else 3].tolist():
        question, asked_colours = search_question(rng, scene, 2)
        cell_colours = colours_of(scene["objects"], region)
        lessons = lessons_on_region(cell_colours, question, asked_colours, crowded)
        views.append((f"p{region}", zoom_to(image, region), lessons))
    # 3. Up to ten cells with an object, and one at random. Cell 7 of region 4 is called p47. Each
    #    view has a lesson that does not need it (a to-do list or sorting); six in ten also have one
    #    about the cell, since objects are soon learned.
    object_order = rng.permutation(len(scene["objects"]))[:10]
    chosen_cells = [scene["objects"][object_index][:2] for object_index in object_order]
    chosen_cells.append(rng.integers(9, size=2).tolist())
    for region, cell in chosen_cells:
        lessons = []
        if rng.random() < 0.6:
            lessons.append(lesson_on_cell(rng, scene["objects"], region, cell))
        if rng.random() < 0.4:
            lessons.append(lesson_on_todo_list(rng))
        else:
            lessons.append(lesson_on_sorting(rng))
        views.append((f"p{region}{cell}", zoom_to(zoom_to(image, region), cell), lessons))
    # 4. Store the views, and make a row of each lesson.
    rows = []
    for view_name, view, lessons in views:
        image_path = f"views/{seed}_{scene_index:05d}_{view_name}.jpg"
        view_for_model = tools.resize_for_model(view, min_pixels, max_pixels)
        save_image(view_for_model, out / image_path, quality=95)
        for question, reply in lessons:
            row_id = f"instruct_{scene_index:05d}_{len(rows):02d}"
            rows.append(instruction_row(row_id, image_path, question, reply))
    return rows


def instruction_row(row_id, image_path, question, reply):
    """Return a trajectory row of one turn, without a system text."""
    return {"id": row_id, "image": image_path, "question": question, "answer": reply,
            "source": "synthetic_instruct", "system": "", "turns": [{"text": reply}]}


# ---- The tiny model: a Qwen2.5-VL of 1.6 M parameters, a tokenizer made from our texts ----------

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>",
                  "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type in ['image', 'image_url'] %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def project_texts(rows):
    """Return the texts on which the tiny tokenizer is trained: prompts, phrases, and the rows."""
    fixed_texts = [*tools.PROMPTS.values(), *PHRASES.values(),
                   *(f" {position}" for position in POSITIONS),
                   "What digit is on the red square?",
                   "Which shape is the red object with digit 7?", " Yes. No.", "user\nassistant\n"]
    row_texts = []
    for row in rows:
        row_texts += [row["question"], row["answer"]]
        row_texts += [turn["text"] for turn in row["turns"]]
    # Every word also without a space before it, as in <answer>square</answer>.
    bare_words = []
    for text in row_texts:
        bare_words += text.strip(".?").split()
    # BPE merges what is frequent first. Prompts are seldom in the rows: counted 50 times, their
    # words become whole tokens even if the rows fill the vocabulary.
    return fixed_texts * 50 + row_texts + bare_words


def build_tokenizer(texts):
    """Return a byte-level BPE tokenizer trained on `texts`.

    The strings of the protocol are single tokens, so a turn is short. A frequent word is one token
    with a space before it (in thoughts, where words are copied from turn to turn) and another one
    without (in <answer>square</answer>). A digit is always a token of its own."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    word_pattern = Regex(r" ?[A-Za-z]+(?:-[a-z]+)*|[0-9]|[ \n]|[^A-Za-z0-9 \n]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(word_pattern, "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIAL_TOKENS, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    # Of several names that match, the longest wins. Their order decides only the ids.
    tokenizer.add_tokens([
        "<think>", "</think>", '<grounding>{"bbox_2d": [', '], "source": "', '"}</grounding>',
        "<answer>", "</answer>", "0.0", "0.333", "0.667", "1.0", ", ", "original_image",
        *(f"observation_{number}" for number in range(63, 0, -1))])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL_TOKENS, clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE)


def build_tiny(texts, seed):
    """Return (model, tokenizer, image processor): a Qwen2.5-VL with random weights that can learn
    the drawn world in minutes.

    A head of 32 numbers has 16 frequencies theta^(-i/16): 1, 0.61, 0.37, 0.22, ... rad a position.
    M-RoPE shares them out over the axes t, h, w, fastest first; mrope_section says how many each
    gets. t gets none (images have one frame), h gets the first, w the other 15. Text tokens have
    the same position on all axes (sft.mrope_positions), so w serves the text, too. It needs fast
    frequencies, about 0.3 or more, to tell neighbouring columns apart, and slow ones, which hardly
    turn over hundreds of positions, so that a word that far back can be found by its content. A
    larger theta would leave too few fast ones, a
    smaller one too few slow ones."""
    import torch  # here, so that drawing does not have to load it
    from transformers import (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration,
                              Qwen2VLImageProcessorPil)

    tokenizer = build_tokenizer(texts)
    token_ids = dict(zip(SPECIAL_TOKENS, tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS)))
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32768,
            bos_token_id=None, eos_token_id=token_ids["<|im_end|>"], rope_parameters={
                "rope_type": "default", "rope_theta": 3000.0, "mrope_section": [0, 1, 15]}),
        vision_config=dict(
            depth=3, hidden_size=96, intermediate_size=256, num_heads=4, out_hidden_size=128,
            window_size=112, fullatt_block_indexes=[2]),
        image_token_id=token_ids["<|image_pad|>"], video_token_id=token_ids["<|video_pad|>"],
        vision_start_token_id=token_ids["<|vision_start|>"],
        vision_end_token_id=token_ids["<|vision_end|>"], tie_word_embeddings=False)
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    # The library's std of 0.02 is made for wide models. In this narrow one signals would vanish.
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "embed_tokens" in name:
                param.normal_()
            elif param.dim() > 1:
                param.normal_(std=param[0].numel() ** -0.5)  # 1 / sqrt(fan in)
    pad_id = token_ids["<|endoftext|>"]
    model.generation_config.eos_token_id = [token_ids["<|im_end|>"], pad_id]
    model.generation_config.pad_token_id = pad_id
    # In this library both "edges" are areas in pixels, whatever their names say.
    image_processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 6000, "longest_edge": 8000})
    return model, tokenizer, image_processor


# ---- The command --------------------------------------------------------------------------------


def map_in_processes(function, jobs, num_workers, title, initial=0):
    """Yield function(job) for each job, in order, computed by processes, with a progress bar.

    initial: number of jobs that were done before. Raise InputError if a worker is killed."""
    spawn_context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, spawn_context, initializer=end_with_parent)
    try:
        with terminal.only_parent_answers_ctrl_c():
            results = pool.map(function, jobs, chunksize=16)
        yield from terminal.progress_bar(results, desc=title, initial=initial,
                                         total=initial + len(jobs))
    except BrokenProcessPool:
        raise tools.InputError(
            f"a worker process of '{title.strip()}' was killed, perhaps for lack of memory; run "
            "the command again, it continues where it was, or with fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def end_with_parent():
    """Make this worker end if its parent is killed. Otherwise it would wait for jobs forever."""
    def wait_for_parent():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=wait_for_parent, daemon=True).start()


def parse_args():
    """Return the flags. Raise InputError for those that do not belong together."""
    parser = terminal.make_parser(
        "Draw the synthetic world, import a published data set, or filter questions.")
    add = parser.add_argument_group("what to draw").add_argument
    add("--train", type=int, default=4600, help="training questions, levels mixed")
    add("--test", type=int, default=200, help="questions in each of easy, medium and hard")
    add("--val", type=int, default=240, help="questions by which rl.py chooses its checkpoint")
    add("--scenes", type=int, default=1000, help="scenes for instruction data, about 39 rows each "
        "(0: none is written; only the base model needs it)")
    add("--min_pixels", type=int, default=6000, help="smallest stored instruction view, in pixels")
    add("--max_pixels", type=int, default=8000, help="largest stored instruction view, in pixels")
    add("--workers", type=int, default=os.cpu_count(), help="processes that draw")
    add = parser.add_argument_group("import a data set instead").add_argument
    add("--import", dest="data_set", metavar="NAME", help="which one, see "
        "extras/import_data.py (default: none)")
    add("--source", type=Path,
        help="its folder; with --filter, the file of questions to choose from (default there: "
             "data/train.jsonl)")
    add = parser.add_argument_group("filter questions instead").add_argument
    add("--filter", type=Path, nargs="+", metavar="RATES", help="pass rates, from evaluate.py; "
        "the questions of --source that are kept are written next to it, to *_filtered.jsonl "
        "(default: none)")
    add("--pass_rate_range", type=float, nargs=2, metavar=("LOW", "HIGH"), default=[0.1, 0.9],
        help="pass rates of the questions to keep")
    add = parser.add_argument_group("common").add_argument
    add("--seed", type=int, default=0, help="another seed draws and shuffles differently")
    add("--out", type=Path, help="folder to write to (default: data, or data/NAME with "
        "--import)")
    args = parser.parse_args()
    check_args(args, parser)
    args.source = args.source or Path("data/train.jsonl")
    args.out = args.out or Path("data", args.data_set or "")
    return args


def check_args(args, parser):
    """Raise InputError for flags that make no sense, alone or together."""
    # 1. Values that make no sense.
    terminal.check_number_flags(args, ["seed", "scenes"])
    check(args.min_pixels <= args.max_pixels, "--max_pixels must be at least --min_pixels")
    lowest, highest = args.pass_rate_range
    check(0 <= lowest <= highest <= 1,
          "--pass_rate_range must be two pass rates, 0 <= LOW <= HIGH <= 1")
    # 2. Flags that were given and have no meaning in what is to be done.
    mode = "without --import or --filter"
    meaningless_flags = {"source", "pass_rate_range"}
    if args.data_set:
        mode = "with --import"
        meaningless_flags = vars(args).keys() - {"data_set", "source", "seed", "out"}
    elif args.filter:
        mode = "with --filter"
        meaningless_flags = vars(args).keys() - {"filter", "source", "pass_rate_range"}
    terminal.check_unused(args, parser, meaningless_flags, mode)
    # 3. The folder to import from.
    if args.data_set:
        check(args.source, "--import needs --source, the folder of the downloaded data set")
        check(args.source.exists(), f"--source {args.source} does not exist")


def write_rows(path, rows, noun):
    """Write rows to a file and print how many there are. noun: of what."""
    tools.write_jsonl(path, rows)
    print(f"{path}: {len(rows)} {noun}")


def draw_world(args):
    """Write every file of the synthetic world: questions, then the instruction data."""
    # 1. Questions. The levels take turns in train and val; each test set has one level.
    levels = list(LEVELS)
    num_questions = {"train": args.train, "val": args.val, "easy": args.test, "medium": args.test,
                     "hard": args.test}
    make_row = partial(make_question, out=args.out, seed=args.seed)
    for split in num_questions:
        jobs = []
        for question_index in range(num_questions[split]):
            level = split if split in levels else levels[question_index % 3]
            jobs.append((split, question_index, level))
        rows = list(map_in_processes(make_row, jobs, args.workers, f"{split:8}"))
        write_rows(args.out / f"{split}.jsonl", rows, "questions")
        if split == "train":
            # Once more by level: for RL on one level, or on another mixture.
            for level in levels:
                level_rows = [row for row in rows if row["level"] == level]
                write_rows(args.out / f"train_{level}.jsonl", level_rows, "questions")
    # 2. Instruction data.
    if args.scenes == 0:
        return
    make_rows = partial(make_instructions, out=args.out, seed=args.seed,
                        min_pixels=args.min_pixels, max_pixels=args.max_pixels)
    instruction_rows = []
    for scene_rows in map_in_processes(make_rows, range(args.scenes), args.workers, "instruct"):
        instruction_rows += scene_rows
    write_rows(args.out / "instruct.jsonl", instruction_rows, "single-view questions")


def main():
    """Draw the world, import a data set or filter questions."""
    args = parse_args()
    try:
        if args.data_set:
            from extras import import_data
            import_data.import_data(args.data_set, args.source, args.out, args.seed)
        elif args.filter:
            from extras import import_data
            import_data.filter_questions(args.filter, args.source, *args.pass_rate_range)
        else:
            draw_world(args)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("only the files that are named above are written") from None


if __name__ == "__main__":
    terminal.run(main)
