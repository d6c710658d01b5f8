"""Show one conversation: as a picture, as an animation, as text. extras/report.py calls this."""

import textwrap
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont, ImageOps

import tools

BOX_COLOUR = (255, 0, 120)
NUM_COLOURS = 128       # of an animation; more would make the file larger


class ShownTurn(NamedTuple):
    """A turn as it is shown. view: the crop to which the turn before led, None after a refused
    call. box: of this turn's crop in the original image, None if it led to none. zoom_number: how
    many crops there are up to this turn. (Black crops of --blank_crops are shown as they were.)"""
    number: int
    view: Image.Image
    text: str
    box: tuple
    zoom_number: int


def shown_turns(row, image):
    """Return the ShownTurns of a trajectory about this image."""
    views = tools.replay(row, image)
    boxes = tools.view_boxes(row)
    turns = []
    view = image
    num_zooms = 0
    for number, turn in enumerate(row["turns"], 1):
        box = None
        next_view = None
        # The crop of the last turn was never shown.
        if "zoom" in turn and number < len(row["turns"]):
            num_zooms += 1
            box = boxes[num_zooms]
            next_view = views[num_zooms]
        turns.append(ShownTurn(number, view, turn["text"], box, num_zooms))
        view = next_view
    return turns


def example(rows):
    """Return a correct trajectory of five to seven turns, or None if there is none."""
    candidates = [row for row in rows if row["reward"] == 1 and 5 <= len(row["turns"]) <= 7]
    return candidates[len(candidates) // 2] if candidates else None


def outcome(row):
    """Return what became of a trajectory, in one line."""
    return (f"answer: {row['answer']}   prediction: {row['prediction']}   "
            f"finish: {row['finish_reason']}")


def print_trajectory(row):
    """Print a trajectory turn by turn: what the model writes, and what the tool shows it."""
    image = tools.open_image(row["image_path"])
    turns = shown_turns(row, image)
    print(f"\n{row['image_path']}, {image.width} x {image.height}\n{plain(row['question'])}")
    for turn in turns:
        if turn.number > 1:
            shown = "an error message"
            if turn.view is not None:
                shown = f"a crop of {turn.view.width} x {turn.view.height} pixels"
            print(f"    the tool shows {shown}")
        print(f"turn {turn.number}: {plain(turn.text)}")
    print(plain(outcome(row)))


def plain(text):
    """Return a text without control characters, with which a model could drive the terminal."""
    return "".join(char if char.isprintable() or char == "\n" else "?" for char in text)


def fit(image, width):
    """Return an image of this width, or narrower if it would be more than twice as high."""
    scale = min(width / image.width, 2 * width / image.height)
    return image.resize((max(1, round(scale * image.width)), max(1, round(scale * image.height))))


def draw_box(draw, box, number, scene_size, font):
    """Draw a zoom's box and its number into the scene."""
    # boxes of neighbouring numbers have different insets, so that equal boxes can be told apart
    inset = 2 + 2 * ((number + 1) % 3)
    left, top, right, bottom = (round(value * side) for value, side in zip(box, scene_size * 2))
    inset = min(inset, (right - left) // 2, (bottom - top) // 2)    # of a small box
    draw.rectangle((left + inset, top + inset, right - inset, bottom - inset),
                   outline=BOX_COLOUR, width=2)
    draw.text((left + inset + 4, top + inset + 2), str(number), "white", font, stroke_width=2,
              stroke_fill="black")


def draw_trajectory(row, path, side=560, size=110, pad=10):
    """Draw one trajectory as PNG: on the left the image with numbered boxes, on the right each
    turn's view with its text. Boxes of nested zooms are drawn where they are in the original."""
    image = tools.open_image(row["image_path"])
    font = ImageFont.load_default(size=15)

    # 1. the scene with the boxes; a tile (view or None, text) for every turn
    scene = fit(image, side)
    draw = ImageDraw.Draw(scene)
    tiles = []
    for turn in shown_turns(row, image):
        text = textwrap.fill(f"turn {turn.number}  {turn.text}", 78, break_on_hyphens=False)
        tiles.append((turn.view, text))
        if turn.box is not None:
            draw_box(draw, turn.box, turn.zoom_number, scene.size, font)

    # 2. how much room they need
    caption = "\n".join([*textwrap.wrap(row["question"], 75), outcome(row)])
    caption_height = draw.textbbox((0, 0), caption, font)[3]
    tile_heights = [max(size, draw.textbbox((0, 0), text, font)[3]) + pad for _, text in tiles]
    height = max(scene.height + caption_height + pad, sum(tile_heights))

    # 3. put them onto one sheet
    sheet = Image.new("RGB", (2 * side + size + 4 * pad, height + 2 * pad), "white")
    draw = ImageDraw.Draw(sheet)
    sheet.paste(scene, (pad, pad))
    draw.text((pad, scene.height + 2 * pad), caption, "black", font)
    y = pad
    for (view, text), tile_height in zip(tiles, tile_heights):
        if view is not None:
            sheet.paste(ImageOps.contain(view, (size, size)), (side + 2 * pad, y))
        draw.text((side + size + 3 * pad, y), text, "black", font)
        y += tile_height
    tools.write_atomic(path, lambda file: sheet.save(file, "PNG"))


def draw_animation(row, path, side=480, size=220, pad=10, seconds=2.5):
    """Draw one trajectory as GIF, a picture for each turn: on the left the image with the boxes up
    to this turn's zoom, on the right what the model has seen last, and what it writes now."""
    image = tools.open_image(row["image_path"])
    turns = shown_turns(row, image)
    font = ImageFont.load_default(size=15)
    scene = fit(image, side)
    texts = [textwrap.fill(f"turn {turn.number}  {turn.text}", 46, break_on_hyphens=False)
             for turn in turns]

    # 1. how much room they need; all pictures have one size
    measure = ImageDraw.Draw(scene).textbbox
    question = textwrap.fill(row["question"], 100)
    question_height = measure((0, 0), question, font)[3] + pad
    text_height = max(measure((0, 0), text, font)[3] for text in texts)
    text_width = max(measure((0, 0), text, font)[2] for text in texts)
    width = side + max(size, text_width) + 3 * pad
    height = question_height + max(scene.height, size + pad + text_height) + 2 * pad

    # 2. one picture after the other
    frames = []
    for turn, text in zip(turns, texts):
        if turn.box is not None:
            draw_box(ImageDraw.Draw(scene), turn.box, turn.zoom_number, scene.size, font)
        sheet = Image.new("RGB", (width, height), "white")
        draw = ImageDraw.Draw(sheet)
        draw.text((pad, pad), question, "black", font)
        sheet.paste(scene, (pad, pad + question_height))
        if turn.view is not None:
            sheet.paste(ImageOps.contain(turn.view, (size, size)),
                        (side + 2 * pad, pad + question_height))
        draw.text((side + 2 * pad, 2 * pad + question_height + size), text, "black", font)
        frames.append(sheet)

    # 3. One palette for all, so that what does not change is not stored again; boxes keep their
    #    colour. The last picture stays twice as long.
    palette = frames[-1].quantize(NUM_COLOURS - 1)
    palette.putpalette([*palette.getpalette()[:3 * (NUM_COLOURS - 1)], *BOX_COLOUR])
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    durations = [round(1000 * seconds)] * (len(frames) - 1) + [round(2000 * seconds)]
    tools.write_atomic(path, lambda file: frames[0].save(
        file, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0))
