"""Source videos of prompts: files, folders of frames and bytes, and what is said of those that cannot be used."""

import io
import json
import pickle

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from flowgrove.data.columns import Columns
from flowgrove.data.prompt import (
    Prompt,
    conditional,
    described,
    encoding_key,
    mask_of,
    metadata_of,
    unconditional,
    video_of,
)
from flowgrove.data.prompts import read_prompts
from flowgrove.data.sources import Video
from flowgrove.errors import UserError
from flowgrove.models.sources import fitted, source_video
from flowgrove.report.grids import source_tiles
from flowgrove.report.video import write_mp4
from pictured import drawn_picture, drawn_video, saved
from planner_cases import user_error

KEY = "data.prompts"
FIVE = Columns(frames=5, metadata="all")


def frames_of(count, height=16, width=24):
    """Grey frames that tell their number."""
    return [np.full((height, width, 3), 20 + 30 * number, np.uint8) for number in range(count)]


def levels(frames):
    return [round(float(np.asarray(frame).mean())) for frame in frames]


@pytest.fixture
def videos(tmp_path):
    """One video of 6 frames in each form."""
    frames = frames_of(6)
    write_mp4(tmp_path / "v.mp4", np.stack(frames), 8)
    pictures = [Image.fromarray(frame) for frame in frames]
    pictures[0].save(tmp_path / "v.gif", save_all=True, append_images=pictures[1:])
    pictures[0].save(tmp_path / "v.webp", save_all=True, append_images=pictures[1:], lossless=True)
    (tmp_path / "frames").mkdir()
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / "frames" / f"{number:03d}.png")
    (tmp_path / "frames" / ".hidden").write_text("none of them")
    return tmp_path


def rows_of(folder, rows, columns=FIVE):
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_prompts(folder / "p.jsonl", KEY, None, columns)


@pytest.mark.parametrize("name", ["v.mp4", "v.gif", "v.webp", "frames"])
def test_the_first_frames_are_read_in_their_order_whatever_holds_them(videos, name):
    (prompt,) = rows_of(videos, [{"prompt": "x", "video": name, "tag": 1}])
    found = source_video(prompt, 8, 12)
    assert [frame.size for frame in found] == [(12, 8)] * 5
    assert np.abs(np.array(levels(found)) - [20, 50, 80, 110, 140]).max() <= 3
    assert levels([video_of(prompt).middle]) == pytest.approx([80], abs=3)
    assert metadata_of(prompt) == {"tag": 1}


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_bytes_in_a_file_are_videos(videos, tmp_path, kind):
    held = [{"bytes": (videos / name).read_bytes(), "path": None} for name in ("v.mp4", "v.gif")]
    columns = {"prompt": ["x", "y", "z"], "video": [*held, None]}
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "p")
        (tmp_path / "p").rename(tmp_path / "p.parquet")
    else:
        saved(tmp_path / "p.saved", columns)
    one, two, none = read_prompts(tmp_path / f"p.{kind}", KEY, None, FIVE)
    assert all(
        np.abs(np.array(levels(video_of(prompt).load())) - [20, 50, 80, 110, 140]).max() <= 3 for prompt in (one, two)
    )
    assert video_of(none) is None


def test_a_turned_video_is_upright(tmp_path):
    av = pytest.importorskip("av")
    sides = np.zeros((16, 32, 3), np.uint8)
    sides[:, :16] = 255  # white at the left
    with av.open(str(tmp_path / "v.mp4"), "w") as file:
        stream = file.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 16, 32, "yuv420p"
        if not hasattr(stream, "set_display_rotation"):
            pytest.skip("this PyAV writes no rotation")
        stream.set_display_rotation(90)
        for packet in (*stream.encode(av.VideoFrame.from_ndarray(sides, format="rgb24")), *stream.encode(None)):
            file.mux(packet)
    with av.open(str(tmp_path / "v.mp4")) as file:
        angle = next(file.decode(video=0)).rotation
    (frame,) = Video("v", "v", tmp_path / "v.mp4").load()
    assert frame.size == (16, 32)
    top = np.asarray(frame)[:16].mean() > 128
    assert top == (angle == -90), "counterclockwise by the angle: left goes to the bottom by 90"


def test_what_takes_no_video_reads_none(tmp_path):
    (prompt,) = rows_of(tmp_path, [{"prompt": "x", "video": "gone.mp4"}], Columns(metadata="all"))
    assert video_of(prompt) is None
    assert metadata_of(prompt) == {"video": "gone.mp4"}


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("gone.mp4", "row 2 of .*p.jsonl names the video .*gone.mp4, which cannot be read"),
        (5, "row 2 of .*p.jsonl has 5 in the column video: write the path of a video$"),
        (["v.mp4"], "in the column video: write the path of a video$"),
    ],
)
def test_a_video_that_is_not_there_is_named_with_its_row(videos, value, told):
    with pytest.raises(UserError, match=told) as caught:
        rows_of(videos, [{"prompt": "x", "video": "v.mp4"}, {"prompt": "y", "video": value}])
    assert "\n" not in str(caught.value)
    assert KEY in str(caught.value)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is no video that can be read"),
        (b"no video at all", "is no video that can be read"),
        (drawn_picture("a", 0), "has 1 frame, and model.frames is 5: give a video that is as long"),
        (drawn_video("a", 5)[:300], "bad.mp4"),
        (drawn_video("a", 4), "has 4 frames, and model.frames is 5"),
    ],
)
def test_a_video_that_is_no_use_is_one_line(tmp_path, content, told):
    (tmp_path / "bad.mp4").write_bytes(content)
    said = user_error(Video("bad.mp4", "the video bad.mp4", tmp_path / "bad.mp4", frames=5).load)
    assert told in said
    assert "\n" not in said


def test_frames_in_a_folder_are_ordered_by_their_numbers_and_nothing_else_there_is_one(tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "a note.txt").write_text("first by name")
    for number, frame in enumerate(frames_of(8), 4):
        Image.fromarray(frame).save(tmp_path / "f" / f"shot{number}.png")
    assert levels(Video("f", "f", tmp_path / "f", frames=8).load()) == [20 + 30 * number for number in range(8)]
    assert "has 8 frames, and" in user_error(Video("f", "f", tmp_path / "f", frames=9).load)


def test_a_pillow_without_one_of_the_formats_reads_the_others(videos, monkeypatch):
    Image.init()
    monkeypatch.delitem(Image.OPEN, "WEBP")
    for name in ("v.mp4", "v.gif"):
        assert len(Video(name, name, videos / name, frames=5).load()) == 5


def test_errors_name_the_row(videos):
    (prompt,) = rows_of(videos, [{"prompt": "x", "video": "frames"}])
    (videos / "frames" / "002.png").unlink()
    (videos / "frames" / "003.png").unlink()
    assert f"frames, the video in row 1 of {videos / 'p.jsonl'}, has 4 frames" in user_error(video_of(prompt).load)


def test_a_folder_names_the_frame_that_is_bad(videos):
    (videos / "frames" / "002.png").write_bytes(b"no picture")
    said = user_error(Video("frames", "frames", videos / "frames", frames=5).load)
    assert said.startswith("002.png in frames is no picture")


def test_a_sound_alone_is_no_video(tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "sound.mp4"), "w") as file:
        stream = file.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        for packet in (*stream.encode(frame), *stream.encode(None)):
            file.mux(packet)
    assert "it holds no video" in user_error(Video("s", "s", tmp_path / "sound.mp4").load)


def test_prompts_are_equal_if_their_videos_are(videos):
    video, gif = (Video(name, name, videos / name, frames=5) for name in ("v.mp4", "v.gif"))
    plain, one, other = Prompt("a"), Prompt("a", video=video), Prompt("a", video=gif)
    assert len({plain, one, other, Prompt("a", video=video)}) == 3
    again = pickle.loads(pickle.dumps(one))
    assert again == one
    assert video_of(again) == video
    assert conditional(Prompt("a", negative="n", metadata={"t": 1}, video=video)) == one
    assert unconditional(Prompt("a", negative="n", video=video), "z") == Prompt("n", video=video)
    assert len({encoding_key(prompt) for prompt in (plain, one, other)}) == 3
    assert described(one)["video"] == f"v.mp4 {(videos / 'v.mp4').stat().st_size}"
    assert "video" not in described(Prompt("a", negative="n"))


def test_a_mask_is_a_video_of_its_own(videos):
    rows = [{"prompt": "x", "video": "v.mp4", "mask": "v.gif"}, {"prompt": "x", "video": "v.mp4", "mask": None}]
    masked, plain = rows_of(videos, rows)
    assert (video_of(masked).path, mask_of(masked).path) == (videos / "v.mp4", videos / "v.gif")
    assert mask_of(plain) is None
    assert masked != plain
    assert encoding_key(masked) != encoding_key(plain)
    assert pickle.loads(pickle.dumps(masked)) == masked
    assert mask_of(conditional(masked)) == mask_of(unconditional(masked, "")) == mask_of(masked)
    assert described(masked)["mask"].startswith("v.gif ")
    assert metadata_of(masked) == {}


def test_another_frame_makes_another_video(videos):
    def key():
        return encoding_key(Prompt("a", video=Video("frames", "frames", videos / "frames", frames=5)))

    before = key()
    (videos / "frames" / "003.png").write_bytes(drawn_picture("another", 1))
    assert key() != before


def test_grids_show_the_middle_frame_after_the_pictures(videos):
    video = Video("frames", "frames", videos / "frames", frames=5)
    tiles = source_tiles([Prompt("a", video=video), Prompt("b")], 8, 12)
    assert tiles.shape == (2, 1, 8, 12, 3)
    expected = fitted(Image.fromarray(frames_of(3)[2]), 8, 12)
    assert np.array_equal(tiles[0, 0], np.asarray(expected))
    assert (tiles[1] == 128).all(), "grey for a prompt without one"


def test_helpers_of_tests_draw_videos_that_move():
    one, two = Video("v", "v", content=drawn_video("a", 2), frames=2).load()
    assert one.size == Image.open(io.BytesIO(drawn_picture("a", 0))).size
    assert np.abs(np.asarray(one).astype(int) - np.asarray(two)).mean() > 5
