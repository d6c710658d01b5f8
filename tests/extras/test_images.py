"""Specification of extras/images.py: what a stage is told about the images of its rows before it
starts."""

import unicodedata

import pytest
from PIL import Image

import tools
from extras import images
from support.launch import run_here


def picture(size=(60, 40)):
    return Image.effect_noise(size, 90).convert("RGB")


def row(number, image, *zooms):
    turns = [{"text": "", "zoom": {"bbox_2d": box, "source": source}} for box, source in zooms]
    return {"id": str(number), "image": image, "question": "?", "answer": "a",
            "turns": [*turns, {"text": "<answer>a</answer>"}]}


@pytest.fixture
def data(tmp_path):
    """A folder with images/a.png."""
    (tmp_path / "images").mkdir()
    picture().save(tmp_path / "images/a.png")
    return tmp_path


def problem(data, *names):
    """Return what check_images says about rows with these images, "" if they can be used."""
    path = data / "rows.jsonl"
    rows = [row(number, name) for number, name in enumerate(names)]
    tools.write_jsonl(path, rows)
    try:
        images.check_images(path, rows)
    except tools.InputError as error:
        return str(error)
    return ""


def test_the_first_missing_image_is_told_by_line_and_the_others_are_counted(data):
    path = data / "rows.jsonl"
    names = ["images/a.png", "images/no.jpg", "images/a.png", "images/no.jpg", "images/nor.jpg"]
    rows = [row(number, name) for number, name in enumerate(names)]
    tools.write_jsonl(path, rows)
    path.write_text("\n\n" + path.read_text())  # blank lines count as lines
    with pytest.raises(tools.InputError) as error:
        images.check_images(path, rows)
    assert str(error.value) == (
        f"{path}:4: {data}/images/no.jpg: image is missing; run the stage that wrote this data "
        "again (and 2 more rows)")
    images.check_images(path, rows[:1])  # a stage that uses the first row only
    assert problem(data, "images/no.jpg", "images/no.jpg").endswith("again (and 1 more row)")
    assert problem(data, "images/no.jpg").endswith("again")


def test_images_may_be_in_another_folder_than_the_rows(data, tmp_path):
    tools.write_jsonl(tmp_path / "results/rows.jsonl", [row(0, "images/a.png")])
    rows = tools.read_jsonl(tmp_path / "results/rows.jsonl")
    images.check_images(tmp_path / "results/rows.jsonl", rows, folder=data)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """A folder of files that are no images, or no whole ones."""
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "folder.jpg").mkdir()
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.png").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    Image.new("F", (3, 3)).save(folder / "float.tif")
    Image.new("1", (10_000, 9_000)).save(folder / "huge.png")
    for suffix in ("jpg", "png", "gif", "webp"):
        picture((90, 90)).save(folder / f"cut.{suffix}")
        content = (folder / f"cut.{suffix}").read_bytes()
        (folder / f"cut.{suffix}").write_bytes(content[:len(content) * 3 // 4])
    return folder


@pytest.mark.parametrize("name, words", [
    ("empty.jpg", "not a readable image"), ("text.png", "not a readable image"),
    ("folder.jpg", "not a readable image"), ("cut.jpg", "truncated"), ("cut.png", "truncated"),
    ("cut.gif", "truncated"), ("cut.webp", "not a readable image"),
    ("float.tif", "numbers of 32 bits"), ("huge.png", "too many pixels (90,000,000"),
    ("a\0b.png", "not a readable image"), ("n" * 300 + ".png", "not a readable image"),
    ("https://x.org/a.png", "is not the path of an image; store the image"),
    ("data:image/png;base64," + 5000 * "A", "is not the path of an image; store the image"),
    (5000 * "A", "is not the path of an image; store the image")], ids=lambda text: text[:20])
def test_what_cannot_be_an_image_is_told(damaged, name, words):
    message = problem(damaged, name)
    assert message.startswith(f"{damaged}/rows.jsonl:1: ") and words in message
    assert len(message) < 2000 and "\n" not in message


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tif"])
def test_a_whole_image_is_not_decoded(data, monkeypatch, suffix):
    """Whatever follows it, it is accepted."""
    picture().save(data / f"x.{suffix}")
    content = (data / f"x.{suffix}").read_bytes()
    (data / f"more.{suffix}").write_bytes(content + bytes(5000))
    assert problem(data, f"more.{suffix}") == ""

    def to_rgb(image):
        raise AssertionError("was decoded")

    monkeypatch.setattr(tools, "to_rgb", to_rgb)
    assert problem(data, f"x.{suffix}") == ""


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_is_that_of_the_upright_image(data, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture().save(data / f"x.{suffix}", exif=exif)
    size = tools.open_image(data / f"x.{suffix}", images.read_size)
    assert size == tools.open_image(data / f"x.{suffix}").size


@pytest.mark.parametrize("zooms, words", [
    ([([0, 0, 0.5, 0.5], "original_image"), ([0, 0, 1, 0.03], "observation_1")], ""),
    ([([0, 0, 1, 0.002], "original_image")], "trajectory 1, turn 1: The box is too narrow"),
    # 500 x 200 pixels are left, and then 500 x 2
    ([([0, 0, 0.5, 1], "original_image"), ([0, 0, 1, 0.01], "observation_1")],
     "trajectory 1, turn 2: The box is too narrow"),
    ([([0, 0, 1, 1], "observation_1")], "trajectory 1, turn 1: There is no observation_1 yet")])
def test_zooms_are_replayed_on_sizes(data, zooms, words):
    """As they will be on the image, of 1000 x 200 pixels."""
    Image.new("RGB", (1000, 200)).save(data / "wide.png")
    path = data / "rows.jsonl"
    rows = [row(0, "images/a.png"), row(1, "wide.png", *zooms)]
    tools.write_jsonl(path, rows)
    images.check_images(path, rows)  # a stage that plays the questions does not look at turns
    if words:
        with pytest.raises(tools.InputError, match=f"rows.jsonl:2: {words}.* Remove this row$"):
            images.check_images(path, rows, replays_zooms=True)
        with pytest.raises(tools.InputError, match=words):
            tools.replay(rows[1], tools.open_image(data / "wide.png"))
    else:
        images.check_images(path, rows, replays_zooms=True)


def test_links_may_not_leave_the_folder_of_the_data(data, tmp_path):
    """The folder itself may be a link, and so may a folder directly in it, as data/images that lies
    on a larger disk."""
    disk = tmp_path / "disk"
    disk.mkdir()
    picture().save(disk / "b.png")
    (disk / "to_b.png").symlink_to("b.png")
    (disk / "away.png").symlink_to(tmp_path / "secret.png")
    picture().save(tmp_path / "secret.png")
    own = tmp_path / "own"
    own.mkdir()
    (own / "disk").symlink_to(disk)
    (own / "inner").mkdir()
    (own / "inner/disk").symlink_to(disk)
    (own / "inner/b.png").symlink_to("../disk/b.png")
    (own / "b.png").symlink_to(disk / "b.png")
    (own / "c.png").symlink_to("inner/c.png")
    picture().save(own / "inner/c.png")
    (tmp_path / "link").symlink_to("own")
    for folder in (own, tmp_path / "link"):
        assert problem(folder, "disk/b.png", "disk/to_b.png", "c.png", "inner/c.png") == ""
        for name in ("disk/away.png", "inner/disk/b.png", "inner/b.png", "b.png"):
            message = problem(folder, "c.png", name)
            assert message == (
                f"{folder}/rows.jsonl:2: {folder}/{name}: a link leads out of the folder {folder}; "
                "copy the image into it (only a whole folder directly in it may be a link)")


@pytest.mark.parametrize("name, there", [
    ("images\\a.png", "images/a.png"), ("images/A.PNG", "images/a.png"),
    ("images/a.png ", "images/a.png"), ("images/o%20o.png", "images/o o.png"),
    ("images/\u00fc.png", unicodedata.normalize("NFD", "images/\u00fc.png"))], ids=ascii)
def test_another_spelling_of_a_missing_image_is_told(data, name, there):
    """Backslashes, case, spaces, and accents, which a Mac stores apart from their letter."""
    picture().save(data / there)
    assert problem(data, name).endswith(f"image is missing; run the stage that wrote this data "
                                        f"again; there is {data}/{there}")
    assert "there is" not in problem(data, "images/b.png")


def test_the_command_looks_at_files(data):
    assert problem(data, "images/a.png", "images/a.png") == ""
    done = run_here("extras/images.py", data / "rows.jsonl")
    assert f"{data}/rows.jsonl: the images of 2 rows can be opened" in done.stdout
    problem(data, "images/no.png")
    done = run_here("extras/images.py", data / "rows.jsonl")
    assert done.returncode == 1 and "rows.jsonl:1: " in done.stderr
