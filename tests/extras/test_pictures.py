"""Specification of extras/pictures.py: boxes and crops are where they belong."""

import numpy as np
import pytest
from PIL import Image, ImageOps

import tools
from extras import pictures


@pytest.fixture
def solved(world):
    """Return a correct trajectory of several turns."""
    row = next(row for row in tools.read_jsonl(world / "coldstart.jsonl") if len(row["turns"]) > 2)
    return {**row, "image_path": str(world / row["image"])}


def test_picture_of_a_trajectory(solved, tmp_path):
    """The first zoom's box is drawn where it is in the original, which is 560 pixels wide and
    begins at (10, 10). Next to it, 110 pixels wide from 580 on, is what each turn has seen."""
    pictures.draw_trajectory(solved, tmp_path / "t.png")
    drawn = tools.open_image(tmp_path / "t.png")
    image = tools.open_image(solved["image_path"])
    x0, y0, x1, y1 = solved["turns"][0]["zoom"]["bbox_2d"]
    inset = 2 + 2 * 2
    edges = [(x0, (y0 + y1) / 2, inset, 0), ((x0 + x1) / 2, y0, 0, inset),
             (x1, (y0 + y1) / 2, -inset, 0), ((x0 + x1) / 2, y1, 0, -inset)]
    for x, y, dx, dy in edges:
        pixel_x = 10 + round(x * 560) + dx
        pixel_y = 10 + round(y * 560 * image.height / image.width) + dy
        assert drawn.getpixel((pixel_x, pixel_y)) == (255, 0, 120)
    first = drawn.crop((580, 10, 690, 10 + round(110 * image.height / image.width)))
    shown = image.resize(first.size, Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(first, float) - np.asarray(shown, float)).mean() < 2
    column = [drawn.getpixel((582, y)) for y in range(first.height + 20, drawn.height - 10)]
    assert any(pixel != (255, 255, 255) for pixel in column)    # another view below the first


def test_animation_of_a_trajectory(solved, tmp_path):
    """A picture for each turn. The first has the first zoom's box and no other; in the second the
    crop of that box is shown. Colours are rounded to a palette."""
    pictures.draw_animation(solved, tmp_path / "t.gif")
    animation = Image.open(tmp_path / "t.gif")
    assert animation.n_frames == len(solved["turns"]) and animation.info["loop"] == 0
    frames = []
    for index in range(animation.n_frames):
        animation.seek(index)
        frames.append(np.asarray(animation.convert("RGB"), float))         # (height, width, 3)
    is_box = [(np.abs(frame - pictures.BOX_COLOUR).sum(-1) < 40).sum() for frame in frames]
    num_zooms = sum("zoom" in turn for turn in solved["turns"][:-1])
    assert is_box[0] > 50 and np.all(np.diff(is_box[:num_zooms]) > 0)
    # the crop: at the left end of the right half, below the question
    image = tools.open_image(solved["image_path"])
    crop = tools.replay(solved, image)[1]
    size = ImageOps.contain(crop, (220, 220)).size
    shown = np.asarray(crop.resize(size), float)
    top = next(y for y in range(frames[1].shape[0]) if (frames[1][y, 500:520] != 255).all())
    drawn = frames[1][top:top + size[1], 500:500 + size[0]]
    assert np.abs(drawn - shown).mean() < 12


def test_text_of_a_trajectory(solved, capsys):
    pictures.print_trajectory(solved)
    printed = capsys.readouterr().out
    for number, turn in enumerate(solved["turns"], 1):
        assert f"turn {number}: {turn['text']}" in printed
    assert solved["question"] in printed and f"prediction: {solved['prediction']}" in printed
    assert printed.count("the tool shows a crop of") == sum(
        "zoom" in turn for turn in solved["turns"][:-1])


def test_the_example_is_correct_and_of_middle_length():
    """The one in the middle; none if there is none."""
    rows = [{"reward": reward, "turns": [{}] * length, "number": number}
            for number, (reward, length) in enumerate([(1, 4), (1, 5), (0, 6), (1, 7), (1, 8)])]
    assert pictures.example(rows)["number"] == 3
    assert pictures.example(rows[:1]) is None


@pytest.mark.parametrize("size", [(3000, 300), (300, 3000), (1500, 1500)])
def test_small_boxes_and_odd_sizes(tmp_path, size):
    """A box that is narrower than the frame around it; pictures that are very flat or very high. No
    picture is larger than a screen."""
    Image.new("RGB", size, "blue").save(tmp_path / "image.png")
    zooms = [{"bbox_2d": [0.5, 0.5, 0.52, 0.52], "source": "original_image"},
             {"bbox_2d": [0.9, 0.9, 0.93, 0.93], "source": "original_image"}]
    turns = [*({"text": "<think>Go.</think>", "zoom": zoom} for zoom in zooms),
             {"text": "<answer>\x1b[2J1</answer>"}]
    row = {"id": "a", "question": "What?", "answer": "1", "prediction": "1",
           "finish_reason": "answer", "turns": turns, "image_path": str(tmp_path / "image.png")}
    pictures.draw_trajectory(row, tmp_path / "t.png")
    pictures.draw_animation(row, tmp_path / "t.gif")
    for name in ("t.png", "t.gif"):
        assert max(Image.open(tmp_path / name).size) < 1500


def test_a_model_cannot_drive_the_terminal(solved, capsys):
    turns = [{"text": "<answer>\x1b[2J\u202e1</answer>"}]
    pictures.print_trajectory({**solved, "turns": turns})
    printed = capsys.readouterr().out
    assert "<answer>?[2J?1</answer>" in printed and "\x1b" not in printed
