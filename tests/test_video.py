"""What the notebooks of `track` and `video` leave to a slower place: scipy, ffmpeg, an HTTP server, cameras and windows that are not there.

Tests that need an ffmpeg (on PATH, or imageio-ffmpeg) skip without one, and say so.
"""
import csv
import functools
import gc
import http.server
import json
import os
import re
import struct
import subprocess
import sys
import threading
import time
import warnings
import weakref

import cv2
import numpy as np
import pytest

import fer_nbdev.inference as inference
import fer_nbdev.video as library
from fer_nbdev.core import Box, read_image, sample_portrait
from fer_nbdev.inference import Predictor, to_pandas
from fer_nbdev.track import CutDetector, FaceTracker, ProbabilitySmoother, assign
from fer_nbdev.video import Frame, Timeline, VideoReader, VideoWriter, annotate_frame, find_ffmpeg, predict_video, process_video, read_frames

FFMPEG = find_ffmpeg()
needs_ffmpeg = pytest.mark.skipif(FFMPEG is None, reason="no ffmpeg on PATH, and imageio-ffmpeg is not installed")


# ------------------------------------------------------------------------------------------------------ helpers

@pytest.fixture(scope="module")
def portrait():
    return read_image(sample_portrait())[30:430, 60:460]


def gradient(k, width=160, height=120):
    "A frame that says which one it is, in eight bands"
    bits = np.repeat([230 if k >> b & 1 else 25 for b in range(8)], width // 8)
    return np.broadcast_to(np.pad(bits, (0, width - len(bits)), mode="edge")[None, :, None], (height, width, 3)).astype(np.uint8)


def number(image):
    "Which one is it?"
    wide = image.shape[1] // 8
    return sum(1 << b for b in range(8) if image[:, b * wide + wide // 4:(b + 1) * wide - wide // 4].mean() > 128)


def write(path, images, fps=25, codec="MJPG"):
    images = list(images)
    out = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), fps, images[0].shape[1::-1])
    for image in images:
        out.write(np.ascontiguousarray(image[..., ::-1]))
    out.release()
    return path


def ffmpeg(*arguments):
    subprocess.run([FFMPEG, "-v", "error", "-y", *map(str, arguments)], check=True, stdin=subprocess.DEVNULL)


def about(path):
    "What ffmpeg says of a file"
    return subprocess.run([FFMPEG, "-hide_banner", "-i", str(path)], capture_output=True, text=True, check=False).stderr


@pytest.fixture
def without_ffmpeg(monkeypatch):
    monkeypatch.setattr(library, "find_ffmpeg", lambda: None)


@pytest.fixture
def predictor():
    "The bundled model, and a detector that finds bright squares on black: quick and exact"
    return Predictor("accurate", threads=1, detector=bright)


def bright(image):
    found, _, stats, _ = cv2.connectedComponentsWithStats((image[..., 0] > 60).astype(np.uint8))
    return [(x, y, x + w, y + h) for x, y, w, h, area in stats[1:found] if area > 200]


def squares(*places, width=320, height=180, side=40):
    image = np.zeros((height, width, 3), np.uint8)
    for x, y in places:
        image[round(y):round(y) + side, round(x):round(x) + side] = 90 + np.arange(side, dtype=np.uint8)[:, None]
    return image


def running():
    return [t for t in threading.enumerate() if t.name.startswith("fer_nbdev")]


def none_left(seconds=5):
    until = time.monotonic() + seconds
    while running() and time.monotonic() < until:
        time.sleep(.01)
    return not running()


# ---------------------------------------------------------------------------------------------------- tracking

def test_assign_is_as_good_as_scipys():
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(0)
    for _ in range(400):
        cost = rng.normal(size=rng.integers(1, 13, 2)).round(rng.integers(1, 4))
        rows, columns = optimize.linear_sum_assignment(cost)
        pairs = assign(cost)
        assert len(pairs) == len(rows)
        assert sum(cost[i, j] for i, j in pairs) == pytest.approx(cost[rows, columns].sum(), abs=1e-9)


def test_assign_with_forbidden_pairs_is_as_good_as_scipys():
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(1)
    for _ in range(400):
        cost = rng.random(rng.integers(1, 9, 2))
        forbidden = rng.random(cost.shape) < .4
        rows, columns = optimize.linear_sum_assignment(np.where(forbidden, 1000., cost))
        allowed = [(i, j) for i, j in zip(rows, columns) if not forbidden[i, j]]
        pairs = assign(np.where(forbidden, np.inf, cost))
        assert len(pairs) == len(allowed) and not any(forbidden[i, j] for i, j in pairs)
        assert sum(cost[i, j] for i, j in pairs) == pytest.approx(sum(cost[i, j] for i, j in allowed), abs=1e-9)


@pytest.mark.parametrize("every", [1, 3])
def test_numbers_survive_a_crossing_and_missed_frames(predictor, every):
    "Two squares cross on lines of their own; one is not there for half a second, and comes back as the same"
    def places(t):
        return [(10 + 90 * t, 20)] * (not 1.2 < t < 1.6) + [(270 - 90 * t, 110)]

    frames = list(predict_video([squares(*places(k / 25)) for k in range(70)], predictor, every=every))
    owners = {}
    for frame in frames:
        for p in frame.preds:
            owners.setdefault(p.track_id, set()).add(p.box.y0 > 70)
    assert len(frames) == 70 and sorted(owners) == [1, 2] and all(len(rows) == 1 for rows in owners.values())
    assert {p.track_id for p in frames[-1].preds} == {1, 2}


def test_boxes_between_detections_follow_the_face(predictor):
    truth = [40 + 4 * k for k in range(50)]
    frames = list(predict_video([squares((x, 60)) for x in truth], predictor, every=5))
    off = [abs(f.preds[0].box.x0 - x) for f, x in zip(frames[20:], truth[20:])]
    assert max(off) <= 3, off            # left where they were, they would be off by up to 16


def test_the_model_is_asked_where_faces_are_searched(predictor):
    asked, ask = [], predictor.predict
    predictor.predict = lambda image, boxes: asked.append(len(boxes)) or ask(image, boxes)
    brighter = [np.where(s > 0, s + np.uint8(3 * k), s) for k in range(31) for s in [squares((40 + k, 60))]]  # so that each face gets another answer
    frames = list(predict_video(brighter, predictor, every=5))
    assert asked == [1] * 6 and [len(f.preds) for f in frames] == [0] + [1] * 30  # the frame after a new face is searched too, to confirm it
    assert frames[5].preds[0].probs == frames[1].preds[0].probs != frames[6].preds[0].probs
    assert frames[5].preds[0].box.x0 > frames[1].preds[0].box.x0


def test_a_cut_begins_new_numbers():
    rng = np.random.default_rng(0)
    grounds = [cv2.resize(rng.integers(0, 256, (6, 8, 3), np.uint8), (320, 180)) for _ in range(2)]
    images, predictor = [grounds[k >= 31] for k in range(60)], Predictor("accurate", threads=1, detector=lambda image: [(100, 60, 140, 100)])
    frames = list(predict_video(images, predictor))
    assert [p.track_id for p in frames[30].preds] == [1] and [p.track_id for p in frames[-1].preds] == [2]
    assert all(p.track_id == 2 for f in frames[31:] for p in f.preds)
    frames = list(predict_video(images, predictor, cut=-1))
    assert {p.track_id for f in frames for p in f.preds} == {1}


def test_frames_of_one_colour_are_no_cuts():
    rng = np.random.default_rng(0)
    flat = [np.full((90, 160, 3), colour, np.uint8) for colour in (0, 0, 0, 200, (100, 101, 101), (3, 77, 201))]
    scene = rng.integers(0, 256, (90, 160, 3), dtype=np.uint8)
    cut = CutDetector()
    assert [cut(image) for image in [*flat, scene, scene, flat[0], flat[0]]] == [False] * 6 + [True, False, True, False]


def test_smoothing_steadies_the_answers_of_the_model(portrait):
    rng = np.random.default_rng(0)
    noisy = [np.clip(portrait + rng.normal(0, 40, portrait.shape), 0, 255).astype(np.uint8) for _ in range(40)]
    model = Predictor("accurate", threads=1, detector="none")
    spread = {}
    for smoothing in (0, .5):
        frames = list(predict_video(noisy, model, smoothing=smoothing, every=1, cut=-1, tracker=FaceTracker(min_hits=1)))
        probs = np.array([list(f.preds[0].probs.values()) for f in frames[15:]])
        assert probs.sum(1) == pytest.approx(1, abs=1e-4)
        spread[smoothing] = probs.std(0).max()
    assert spread[.5] < spread[0] / 2


# ------------------------------------------------------------------------------------------------------ reading

def test_a_face_is_uncertain_only_where_no_emotion_is_likely_enough():
    from fer_nbdev.core import UNCERTAIN, Prediction
    smoother, said = ProbabilitySmoother(0, margin=.1), []
    for k, (happy, sad) in enumerate([(.6, .3), (.48, .52), (.46, .44)]):
        p = library._steady(Prediction("?", 0., dict(happy=happy, sad=sad, neutral=1 - happy - sad)), 1, smoother, float(k), .5)
        said.append((p.emotion, p.confidence))
    assert said == [("happy", .6), ("sad", .52), (UNCERTAIN, .46)]  # happy is held at .48, and sad is sure enough


def test_every_frame_arrives_once_with_its_time(tmp_path):
    path = write(tmp_path / "a.avi", map(gradient, range(60)))
    frames = list(read_frames(path))
    assert [f.number for f in frames] == list(range(60)) == [number(f.image) for f in frames]
    assert [f.time for f in frames] == pytest.approx(np.arange(60) / 25)
    part = list(read_frames(path, start=1, end=2))
    assert [f.number for f in part] == list(range(25, 50)) and part[0].time == 1


def test_colours_are_rgb(tmp_path):
    red = np.zeros((64, 64, 3), np.uint8)
    red[..., 0] = 250
    seen = next(iter(read_frames(write(tmp_path / "red.avi", [red] * 3)))).image.mean((0, 1))
    assert seen[0] > 200 > 60 > max(seen[1:])


@pytest.mark.parametrize("codec", ["MJPG", "mp4v"])
def test_a_late_start_is_reached_by_a_jump_and_gives_the_same_frames(tmp_path, codec):
    path = write(tmp_path / ("a.avi" if codec == "MJPG" else "a.mp4"), [gradient(k % 256) for k in range(400)], fps=8, codec=codec)
    expected = [(f.number, f.time, number(f.image)) for f in read_frames(path) if 45 <= f.time < 46]
    assert len(expected) == 8 and [(f.number, f.time, number(f.image)) for f in read_frames(path, start=45, end=46)] == expected
    reader, grabbed = read_frames(path, start=45, end=46), []

    class Counting:
        def __getattr__(self, name):
            return getattr(capture, name)

        def grab(self):
            grabbed.append(1)
            return capture.grab()

    capture, reader.capture = reader.capture, Counting()
    list(reader)
    assert len(grabbed) < 120, "not all 360 before it"


def test_image_sequences(tmp_path):
    for k in (1, 2, 9, 10, 11):
        cv2.imwrite(str(tmp_path / f"frame{k}.png"), gradient(k))
    (tmp_path / "notes.txt").write_text("no image")
    for source in (tmp_path, str(tmp_path / "*.png"), [str(tmp_path / f"frame{k}.png") for k in (1, 2, 9, 10, 11)]):
        reader = read_frames(source, fps=10)
        assert reader.count == 5 and reader.duration == pytest.approx(.5) and not reader.live
        frames = list(reader)
        assert [number(f.image) for f in frames] == [1, 2, 9, 10, 11] and [f.time for f in frames] == pytest.approx([0, .1, .2, .3, .4])
    endless = VideoReader((gradient(k % 100) for k in iter(int, 1)), end=.2)
    assert len(list(endless)) == 5 and endless.duration == pytest.approx(.2)
    (tmp_path / "frame3.png").write_bytes(b"broken")
    with pytest.warns(UserWarning, match="frame3.png.* left out"):  # as a damaged frame of a film is
        frames = list(read_frames(tmp_path, fps=10))
    assert [number(f.image) for f in frames] == [1, 2, 9, 10, 11] and [f.time for f in frames] == pytest.approx([0, .1, .3, .4, .5])
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="no frame that can be read"):
        list(read_frames([tmp_path / "frame3.png"]))
    with pytest.raises(ValueError, match="uint8"):
        list(read_frames([np.zeros((9, 9, 3))]))


def test_a_folder_that_is_named_like_an_image_is_left_out(tmp_path):
    for k in range(2):
        cv2.imwrite(str(tmp_path / f"{k}.png"), gradient(k))
    (tmp_path / "album.jpg").mkdir()
    for source in (tmp_path, tmp_path / "*"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert [number(f.image) for f in read_frames(source)] == [0, 1]


@needs_ffmpeg
def test_a_variable_frame_rate_keeps_its_times(tmp_path):
    write(tmp_path / "a.avi", map(gradient, range(50)))
    ffmpeg("-i", tmp_path / "a.avi", "-vf", "select='lt(n,20)+not(mod(n,3))'", "-fps_mode", "vfr", "-c:v", "libx264", "-crf", "10", tmp_path / "vfr.mp4")
    frames = list(read_frames(tmp_path / "vfr.mp4"))
    kept = [k for k in range(50) if k < 20 or k % 3 == 0]
    assert [number(f.image) for f in frames] == kept
    assert [f.time for f in frames] == pytest.approx([k / 25 for k in kept], abs=.002)
    assert [number(f.image) for f in read_frames(tmp_path / "vfr.mp4", start=1, end=1.5)] == [k for k in kept if 25 <= k < 37.5]
    with VideoWriter(tmp_path / "cfr.avi", fps=25) as out:               # and leave at a fixed one, each frame in its place
        for f in frames:
            out.write(f.image, f.time)
    out = [number(f.image) for f in read_frames(tmp_path / "cfr.avi")]
    assert len(out) == kept[-1] + 1 and all(abs(out[k] - k) <= 1 for k in kept)


@needs_ffmpeg
def test_a_video_that_changes_its_size(tmp_path):
    for name, size in (("a", (160, 120)), ("b", (320, 180))):
        write(tmp_path / f"{name}.avi", [gradient(k, *size) for k in range(30)])
        ffmpeg("-i", tmp_path / f"{name}.avi", "-c:v", "libx264", "-f", "mpegts", tmp_path / f"{name}.ts")
    (tmp_path / "ab.ts").write_bytes((tmp_path / "a.ts").read_bytes() + (tmp_path / "b.ts").read_bytes())
    frames = list(read_frames(tmp_path / "ab.ts"))
    assert len(frames) >= 58 and {f.image.shape for f in frames} == {(120, 160, 3)}
    assert all(b.time > a.time for a, b in zip(frames, frames[1:])), "times go on where the second part begins anew"
    assert frames[-1].time == pytest.approx(60 / 25, abs=.2)


def test_images_of_several_sizes(tmp_path, predictor, without_ffmpeg):
    "Tracks end where the size changes, and the video keeps its first size"
    images = [squares((100, 60))] * 20 + [squares((100, 60), width=400, height=400)] * 20
    frames = list(predict_video(images, predictor, every=2))
    assert [p.track_id for p in frames[19].preds] == [1] and [p.track_id for p in frames[-1].preds] == [2]
    process_video(images, tmp_path / "out.avi", predictor)
    out = list(read_frames(tmp_path / "out.avi"))
    assert len(out) == 40 and {f.image.shape for f in out} == {(180, 320, 3)}
    assert out[-1].image[:, :60].max() < 30, "fitted into the middle, on black"


def test_portrait_rotation_is_applied(tmp_path):
    "A phone that is held upright stores lying frames and a matrix that turns them"
    upright = np.zeros((120, 160, 3), np.uint8)
    upright[:, :80] = 220                                                # bright on the left, dark on the right
    data = write(tmp_path / "lying.mp4", [upright] * 10, codec="mp4v").read_bytes()
    at = data.index(b"tkhd") + 4 + 4 + 20 + 16
    assert struct.unpack(">9i", data[at:at + 36])[0] == 1 << 16
    (tmp_path / "turned.mp4").write_bytes(data[:at] + struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 120 << 16, 0, 1 << 30) + data[at + 36:])
    image = next(iter(read_frames(tmp_path / "turned.mp4"))).image
    assert image.shape == (160, 120, 3)
    assert image[:60].mean() > 180 and image[-60:].mean() < 40           # a quarter turn clockwise: left is up


def test_a_corrupt_tail_is_said_and_what_is_before_is_used(tmp_path, predictor, without_ffmpeg):
    data = write(tmp_path / "a.avi", [squares((20 + k, 60)) for k in range(50)]).read_bytes()
    (tmp_path / "cut.avi").write_bytes(data[: len(data) * 2 // 3])
    with pytest.warns(UserWarning, match=r"ends after \d+ of 50 frames"):
        seen = process_video(tmp_path / "cut.avi", tmp_path / "out.avi", predictor)
    assert 20 < seen.frames < 45 and len(list(read_frames(tmp_path / "out.avi"))) == seen.frames
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(read_frames(tmp_path / "a.avi"))) == 50
        assert len(list(read_frames(tmp_path / "a.avi", end=1))) == 25


def test_damage_in_the_middle(tmp_path):
    data = bytearray(write(tmp_path / "a.avi", map(gradient, range(60))).read_bytes())
    starts = [m.start() for m in re.finditer(b"00dc\\S", bytes(data))][:60]
    for at in starts[20:23]:
        data[at + 8: at + 200] = b"\x00" * 192
    (tmp_path / "b.avi").write_bytes(data)
    with pytest.warns(UserWarning, match="[1-9] damaged frames"):
        frames = list(read_frames(tmp_path / "b.avi"))
    whole = [f for f in frames if f.number not in range(20, 23)]
    assert 54 <= len(frames) < 60 and all(number(f.image) == f.number and f.time == pytest.approx(f.number / 25) for f in whole)
    assert frames[-1].number == 59


@pytest.mark.parametrize("content", [b"", b"hello", os.urandom(5000)], ids=["empty", "text", "noise"])
def test_unreadable_files(tmp_path, content):
    (tmp_path / "bad.mp4").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.mp4.*no video"):
        process_video(tmp_path / "bad.mp4", tmp_path / "out.mp4")
    assert not (tmp_path / "out.mp4").exists()


def test_an_mp4_without_its_index_and_a_video_without_frames(tmp_path):
    data = write(tmp_path / "a.mp4", map(gradient, range(20)), codec="mp4v").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="cut off"):
        read_frames(tmp_path / "cut.mp4")
    header = write(tmp_path / "b.avi", map(gradient, range(20))).read_bytes()
    (tmp_path / "none.avi").write_bytes(header[: header.index(b"00dc") - 4])
    with pytest.raises(ValueError, match=r"none\.avi"):
        list(read_frames(tmp_path / "none.avi"))
    with pytest.raises(ValueError, match="no frame"):
        list(read_frames([]))
    with pytest.raises(FileNotFoundError, match="holiday"):
        read_frames(tmp_path / "holiday.mp4")


@pytest.mark.parametrize("options", [dict(start=-1), dict(start=float("nan")), dict(start=2, end=1), dict(end=0), dict(fps=0), dict(fps=1e6)], ids=str)
def test_options_of_the_reader(options):
    with pytest.raises(ValueError, match="|".join(options)):
        read_frames([gradient(0)], **options)


def test_a_file_is_not_live(tmp_path):
    with pytest.raises(ValueError, match="live"):
        read_frames(write(tmp_path / "a.avi", [gradient(0)] * 3), live=True)


@pytest.mark.parametrize("source", [b"bytes", 3.5, None, True, -1, np.zeros((4, 4), np.uint8)], ids=repr)
def test_what_is_no_video(source):
    with pytest.raises(ValueError, match="a video is"):
        read_frames(source)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_an_image_is_no_film_of_its_rows(channels):
    with pytest.raises(ValueError, match="a single image goes into a list"):
        read_frames(np.zeros((40, 30, channels), np.uint8))
    assert len(list(read_frames(np.zeros((2, 40, 30), np.uint8)))) == 2  # a gray film


@pytest.mark.parametrize("source", ["99999999999", 2**31], ids=repr)
def test_camera_numbers_that_cannot_be(source):
    with pytest.raises(ValueError, match=f"no camera {source}"):
        read_frames(source)


@pytest.mark.skipif(os.name == "nt", reason="Windows allows no colon in a name")
def test_a_colon_in_a_name_is_no_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("2024-01-01T12:30:00.avi", map(gradient, range(3)))
    reader = read_frames("2024-01-01T12:30:00.avi")
    assert len(list(reader)) == 3 and reader.name == "'2024-01-01T12:30:00.avi'"
    assert os.path.isabs(VideoWriter("a.mp4", sound="12:30.mp4").sound) and VideoWriter("a.mp4", sound="http://a/b.mp4").sound == "http://a/b.mp4"


def test_an_address(tmp_path):
    "A file behind http is read as a file is, and is not live; a wrong address is named"
    write(tmp_path / "a.mp4", map(gradient, range(30)), codec="mp4v")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        try:
            reader = read_frames(f"{address}/a.mp4")
            assert not reader.live and [number(f.image) for f in reader] == [number(f.image) for f in read_frames(tmp_path / "a.mp4")]
            with pytest.raises(ValueError, match="gone.mp4 cannot be opened"):
                read_frames(f"{address}/gone.mp4", timeout=3)
        finally:
            server.shutdown()
    with pytest.raises(ValueError, match="cannot be opened"):
        read_frames(f"{address}/a.mp4", timeout=2)


# ------------------------------------------------------------------------------------------------- cameras, windows

class FakeCamera:
    "A camera with a picture every hundredth of a second, for half a second"
    def __init__(self, index, *_):
        self.begin, self.last, self.open = time.monotonic(), 0, index == 0

    def isOpened(self):
        return self.open

    def get(self, _):
        return -1.

    def grab(self):
        time.sleep(max(0, self.begin + (self.last + 1) / 100 - time.monotonic()))
        self.last = max(self.last + 1, int((time.monotonic() - self.begin) * 100))
        return self.last < 50

    def retrieve(self):
        return True, gradient(self.last)[..., ::-1]

    def release(self):
        self.open = False


@pytest.fixture
def camera(monkeypatch):
    monkeypatch.setattr(cv2, "VideoCapture", FakeCamera)


def test_a_live_source_drops_late_frames_and_a_file_never_does(camera, tmp_path):
    def slow(image):
        time.sleep(.05)
        return []

    model = Predictor("accurate", threads=1, detector=slow)
    delays = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        begin = time.monotonic()
        for frame in predict_video(0, model, every=1):
            delays.append(time.monotonic() - begin - frame.time)
    assert 5 <= len(delays) <= 14, "a twentieth of a second each, for half a second"
    assert max(delays) < .25, "what is shown is never much older than one frame takes"
    frames = list(predict_video([gradient(k) for k in range(30)], model, every=1))
    assert [number(f.image) for f in frames] == list(range(30))


def test_a_camera_ends_with_a_word_and_the_outputs_are_whole(monkeypatch, tmp_path, predictor, without_ffmpeg):
    real, _ = cv2.VideoCapture, monkeypatch.setattr(cv2, "VideoCapture", FakeCamera)
    with pytest.warns(UserWarning, match="camera 0 gives no more frames"):
        seen = process_video("0", tmp_path / "out.avi", predictor, table=tmp_path / "faces.csv")
    with pytest.raises(ValueError, match="camera 1 cannot be opened"):
        read_frames(1)
    monkeypatch.setattr(cv2, "VideoCapture", real)
    assert seen.frames > 0 and 10 <= len(list(read_frames(tmp_path / "out.avi"))) <= 15 and (tmp_path / "faces.csv").exists()


def test_ctrl_c_ends_a_camera_but_breaks_off_a_file(camera, tmp_path, predictor, without_ffmpeg):
    def interrupt(frame):
        if frame.number > 5:
            raise KeyboardInterrupt

    seen = process_video(0, tmp_path / "live.avi", predictor, progress=interrupt)
    assert seen.frames and (tmp_path / "live.avi").exists()
    with pytest.raises(KeyboardInterrupt):
        process_video([gradient(k) for k in range(30)], tmp_path / "file.avi", predictor, progress=interrupt)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["live.avi"] and none_left()


class FakeWindow:
    "What OpenCV's windows do, with keys that are typed beforehand"
    def __init__(self, monkeypatch, keys):
        self.shown, self.keys, self.open = [], iter(keys), True
        monkeypatch.setenv("DISPLAY", ":0")
        for name in ("namedWindow", "imshow", "waitKey", "getWindowProperty", "destroyWindow"):
            monkeypatch.setattr(cv2, name, getattr(self, name))

    def namedWindow(self, title): self.title = title
    def imshow(self, title, image): self.shown.append(image)
    def waitKey(self, ms): return next(self.keys, -1)
    def getWindowProperty(self, title, which): return 1.
    def destroyWindow(self, title): self.open = False


def test_s_saves_and_q_ends(monkeypatch, tmp_path, predictor):
    monkeypatch.chdir(tmp_path)
    window = FakeWindow(monkeypatch, [-1, -1, ord("s"), -1, ord("q")])
    seen = process_video([squares((60 + k, 60)) for k in range(40)], model=predictor, window=True)
    assert seen.frames == len(window.shown) == 5 and not window.open and none_left()
    saved = read_image("frame-000002.png")
    assert (saved == window.shown[2][..., ::-1]).all() and window.title.startswith("fer")


def test_no_display_is_said_before_anything_is_read(monkeypatch, tmp_path):
    if not sys.platform.startswith("linux"):
        pytest.skip("only there a display can be missing")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with pytest.raises(ValueError, match="no display.*--no-window"):
        process_video([gradient(0)], tmp_path / "out.avi", window=True)
    monkeypatch.setenv("DISPLAY", ":0")

    def headless(title):
        raise cv2.error("The function is not implemented")

    monkeypatch.setattr(cv2, "namedWindow", headless)
    with pytest.raises(ValueError, match="opens no windows"):
        process_video([gradient(0)], tmp_path / "out.avi", window=True)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------ pipeline

def test_threads_end_with_the_generator_and_errors_arrive():
    def endless():
        k = 0
        while True:
            yield gradient(k % 100)
            k += 1

    model = Predictor("accurate", threads=1, detector=lambda image: [])
    frames = predict_video(endless(), model)
    assert next(frames).number == 0 and next(frames).number == 1
    frames.close()
    assert none_left()

    def fails(image):
        raise RuntimeError("detector")

    for source, detector, error in ((endless(), fails, "detector"), (["gone.png"], bright, "gone.png")):
        with pytest.raises((RuntimeError, FileNotFoundError), match=error):
            list(predict_video(source, Predictor("accurate", threads=1, detector=detector)))
    assert none_left()


def test_answers_do_not_wait_for_the_next_image_of_a_slow_source():
    taken = []

    def slow():
        for k in range(4):
            if k: time.sleep(.5)
            taken.append(k)
            yield k

    newest = {k: taken[-1] for batch in inference._ready(str, slow(), workers=1, at_once=64) for k, _ in batch}
    # the last one that was taken when the answer was there; before the second nobody knows that they are slow
    assert [newest[k] for k in (1, 2, 3)] == [1, 2, 3]


def test_a_table_of_the_frames_of_a_video(predictor):
    pytest.importorskip("pandas")
    frames = [f for f in predict_video([squares((60 + k, 60)) for k in range(12)], predictor, start=.2)]
    table = to_pandas(frames)
    assert [*table.image] == [f.number for f in frames if f.preds] and table.image[0] > 5
    assert set(table.track_id) == {1} and [*zip(table.x0, table.y0, table.x1, table.y1)] == [tuple(f.preds[0].box) for f in frames if f.preds]
    assert [*table.columns[8:10]] == ["track_id", predictor.classes[0]] and "track_id" not in to_pandas(predictor(squares((60, 60))))


def test_few_frames_are_alive_at_a_time(predictor):
    alive, most = [], 0

    def images():
        for k in range(120):
            image = squares((20 + k, 60))
            alive.append(weakref.ref(image))
            yield image

    for _ in predict_video(images(), predictor):
        gc.collect()
        most = max(most, sum(r() is not None for r in alive))
    assert most <= 8, most


@pytest.mark.parametrize("options", [dict(every=0), dict(every=1.5), dict(smoothing=-1), dict(margin=2), dict(cut=3),
                                     dict(detector="mtcnn"), dict(model="best")], ids=str)
def test_settings_are_checked_at_once(options):
    with pytest.raises(ValueError):
        predict_video([gradient(0)], **options)


def test_alignment_is_refused():
    def eyes(image):
        return np.array([[10., 10., 60., 60.]]), np.array([[[20., 30.], [50., 30.]]])

    with pytest.raises(ValueError, match="align"):
        predict_video([gradient(0)], Predictor("accurate", detector=eyes, align=True))


# ------------------------------------------------------------------------------------------------------- outputs

def test_outputs_say_the_same(tmp_path, predictor, without_ffmpeg):
    images = [squares((60 + k, 60), (200, 100)) for k in range(40)]
    frames = list(predict_video(images, predictor))
    seen = process_video(images, tmp_path / "o.avi", predictor, table=[tmp_path / "t.csv", tmp_path / "sub" / "u.csv"],
                         jsonl=tmp_path / "l.jsonl", timeline=tmp_path / "t.png")
    rows = list(csv.DictReader(open(tmp_path / "t.csv")))
    assert len(rows) == sum(len(f.preds) for f in frames) > 60 and (tmp_path / "t.csv").read_bytes() == (tmp_path / "sub" / "u.csv").read_bytes()
    lines = [json.loads(line) for line in open(tmp_path / "l.jsonl")]
    assert [line["frame"] for line in lines] == list(range(40))
    flat = [(f.number, p) for f in frames for p in f.preds]
    for row, (index, p), face in zip(rows, flat, (face for line in lines for face in line["faces"])):
        assert int(row["frame"]) == index and int(row["track_id"]) == p.track_id == face["track_id"] and row["emotion"] == p.emotion == face["emotion"]
        assert [int(row[k]) for k in ("x0", "y0", "x1", "y1")] == list(p.box) == face["box"]
        assert [float(row[c]) for c in p.probs] == pytest.approx(list(p.probs.values()), abs=1e-4)
        assert list(face["probs"].values()) == pytest.approx(list(p.probs.values()))
    assert len(list(read_frames(tmp_path / "o.avi"))) == 40
    assert read_image(tmp_path / "t.png").std() > 10 and [r["track_id"] for r in seen.summary()] == [1, 2]
    assert sum(r["frames"] for r in seen.summary()) == len(rows)


def test_parquet_equals_csv(tmp_path, predictor, monkeypatch):
    parquet, pandas = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pandas")
    monkeypatch.setitem(library._open_table.__globals__, "_parquet_table", functools.partial(library._parquet_table, at_once=7))
    process_video([squares((60 + k, 60)) for k in range(40)], model=predictor, table=[tmp_path / "t.csv", tmp_path / "t.parquet"])
    a, b = pandas.read_csv(tmp_path / "t.csv"), parquet.read_table(tmp_path / "t.parquet").to_pandas()
    assert parquet.ParquetFile(tmp_path / "t.parquet").num_row_groups > 3
    pandas.testing.assert_frame_equal(a, b, check_dtype=False, atol=1e-6)


def test_without_faces(tmp_path, predictor, without_ffmpeg):
    blank = [np.zeros((90, 160, 3), np.uint8)] * 12
    with pytest.warns(UserWarning, match="no face was followed"):
        seen = process_video(blank, tmp_path / "o.avi", predictor, table=tmp_path / "t.csv", timeline=tmp_path / "t.png")
    assert seen.summary() == [] and "0 people" in str(seen) and len((tmp_path / "t.csv").read_text().splitlines()) == 1
    assert len(list(read_frames(tmp_path / "o.avi"))) == 12 and not (tmp_path / "t.png").exists()
    with pytest.raises(ValueError, match="nobody"):
        seen.plot()


def test_nothing_is_left_where_something_fails(tmp_path, predictor, without_ffmpeg):
    def breaks():
        yield from [squares((60, 60))] * 9
        raise RuntimeError("source")

    with pytest.raises(RuntimeError, match="source"):
        process_video(breaks(), tmp_path / "o.avi", predictor, table=tmp_path / "t.csv")
    for out, table in (("o.gif", "t.csv"), ("o.avi", "t.xlsx")):
        with pytest.raises(ValueError, match="ends in"):
            process_video([squares((60, 60))], tmp_path / out, predictor, table=tmp_path / table)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="no frame was written"), VideoWriter(tmp_path / "o.avi"):
        pass
    with pytest.raises(ValueError, match="context manager"):
        VideoWriter(tmp_path / "o.avi").write(gradient(0), 0)
    assert not list(tmp_path.iterdir())


@needs_ffmpeg
@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".avi"])
def test_sound_is_kept_and_as_long_as_the_picture(tmp_path, predictor, suffix):
    write(tmp_path / "mute.avi", [squares((40 + k, 60)) for k in range(75)])
    ffmpeg("-i", tmp_path / "mute.avi", "-f", "lavfi", "-i", "sine=frequency=440:duration=3",
           "-c:v", "libx264", "-c:a", "aac", "-shortest", tmp_path / "sound.mp4")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        process_video(tmp_path / "sound.mp4", tmp_path / f"out{suffix}", predictor, start=1, end=2.2)
    said = about(tmp_path / f"out{suffix}")
    assert "Audio:" in said and ("mjpeg" if suffix == ".avi" else "h264") in said
    hours, minutes, seconds = re.search(r"Duration: (\d+):(\d+):([\d.]+)", said).groups()
    assert float(seconds) == pytest.approx(1.2, abs=.15)
    frames = list(read_frames(tmp_path / f"out{suffix}"))
    assert len(frames) == 30 and frames[0].time == pytest.approx(0, abs=.05)


@needs_ffmpeg
def test_a_long_gap_stays_where_there_is_sound(tmp_path):
    ffmpeg("-f", "lavfi", "-i", "sine=frequency=440:duration=14", tmp_path / "tone.wav")
    for sound, frames in ((tmp_path / "tone.wav", 66), (None, 2)):
        with VideoWriter(tmp_path / "out.mp4", 5, sound) as out:
            for time in (0., 13.): out.write(squares((60, 60)), time)
        assert out.count == len(list(read_frames(tmp_path / "out.mp4"))) == frames


@needs_ffmpeg
def test_ffmpeg_without_sound_with_odd_sides_and_with_errors(tmp_path, predictor):
    images = [squares((40 + k, 60), width=321, height=181) for k in range(20)]
    path = write(tmp_path / "mute.avi", images)
    process_video(path, tmp_path / "out.mp4", predictor)
    assert "Audio:" not in about(tmp_path / "out.mp4") and len(list(read_frames(tmp_path / "out.mp4"))) == 20
    with (pytest.warns(UserWarning, match="without sound: ffmpeg cannot take it from .*gone"),
          VideoWriter(tmp_path / "mute.mp4", sound=tmp_path / "gone.mp4") as out):
        out.write(images[0], 0)
    assert len(list(read_frames(tmp_path / "mute.mp4"))) == 1
    with pytest.raises(ValueError, match="ffmpeg could not write"), VideoWriter(tmp_path / "no.mp4") as out:
        out.write(images[0], 0)
        out._sink.process.kill()
        for k in range(1, 400):
            out.write(images[k % 20], k / 25)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mute.avi", "mute.mp4", "out.mp4"]


def test_without_ffmpeg_it_says_so(tmp_path, predictor, without_ffmpeg):
    path = write(tmp_path / "a.avi", [squares((40 + k, 60)) for k in range(12)])
    with pytest.warns(UserWarning, match="without sound.*ffmpeg"):
        process_video(path, tmp_path / "out.mp4", predictor)
    assert len(list(read_frames(tmp_path / "out.mp4"))) == 12


def test_a_timeline_of_any_length_has_a_limited_size():
    rng, line, probs = np.random.default_rng(0), Timeline(("a", "b"), points=50), []
    from fer_nbdev.core import Prediction
    for k in range(5000):
        p = float(rng.random())
        probs.append(p)
        line.add(Frame(k, k / 10, None, [Prediction("a" if p > .5 else "b", max(p, 1 - p), {"a": p, "b": 1 - p}, None, 7)]))
    times, curve = line.track(7)
    assert 25 <= len(times) <= 50 and curve.sum(1) == pytest.approx(1, abs=1e-5)
    row, = line.summary()
    assert row["probs"]["a"] == pytest.approx(np.mean(probs), abs=1e-3) and row["frames"] == 5000 and row["last"] == pytest.approx(499.9)
    labels = np.array(probs) > .5
    assert row["changes"] == (np.diff(labels) != 0).sum() and row["shares"]["a"] == pytest.approx(labels[1:].mean(), abs=1e-3)
    with pytest.raises(ValueError, match="no track 3"):
        line.track(3)


def test_annotations_show_what_they_say(portrait):
    from fer_nbdev.core import UNCERTAIN, Prediction
    probs = {"angry": .1, "disgust": 0., "fear": 0., "happy": .7, "sad": .1, "surprise": 0., "neutral": .1}
    before = portrait.copy()
    for box in (Box(100, 100, 300, 300), Box(0, 0, 30, 30), Box(380, 380, 400, 400), Box(0, 0, 400, 400)):
        drawn = annotate_frame(portrait, [Prediction("happy", .7, probs, box, 1)])
        assert drawn.shape == portrait.shape and (drawn != portrait).any() and (portrait == before).all()
        amber = (drawn == (255, 176, 0)).all(-1)
        assert amber[box.y0:box.y1, box.x0].mean() > .5
    assert (annotate_frame(portrait, []) == portrait).all() and (annotate_frame(portrait, [Prediction("happy", .7, probs)]) == portrait).all()
    few, many = ((annotate_frame(portrait, [Prediction("happy", .7, probs, Box(100, 100, 200, 200))], bars=b) != portrait).any(-1).sum() for b in (0, 1))
    assert many > few + 1000
    pale = annotate_frame(portrait, [Prediction(UNCERTAIN, .7, probs, Box(100, 100, 300, 300))])
    assert not (pale == (255, 176, 0)).all(-1)[100:300, 100].any()
    annotate_frame(portrait[:24, :32], [Prediction("ärgerlich", .7, {"ärgerlich": .7, "froh": .3}, Box(2, 2, 20, 20))])


# ---------------------------------------------------------------------------------------------------- command line

def test_the_commands(tmp_path, monkeypatch):
    from typer.testing import CliRunner
    from fer_nbdev.cli import app
    monkeypatch.chdir(tmp_path)
    portrait = read_image(sample_portrait())
    write("talk.avi", [portrait[k:400 + k, 40:440] for k in range(30)])

    def fer(line):
        return CliRunner().invoke(app, line.split())

    done = fer("video talk.avi --out o.mp4 --csv t.csv --timeline t.png --json - --every 2 --smoothing 0 --end 1")
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["frame"] for line in lines] == list(range(25)) and len(lines[-1]["faces"]) == 1 and "25 frames" in done.stderr
    assert {"o.mp4", "t.csv", "t.png"} <= set(os.listdir())
    summary = fer("video talk.avi --min-confidence 1")
    assert "1 person" in summary.output and "uncertain 100%" in summary.output
    for line, said in (("video gone.mp4", "gone.mp4"), ("video talk.avi --start 9", "no frame"), ("video talk.avi --out x.gif", "x.gif"),
                       ("webcam 99 --no-window", "camera 99"), ("video talk.avi --detector mtcnn", "mtcnn"),
                       ("video talk.avi --every 0", "every"), ("video talk.avi --end 0", "end")):
        done = fer(line)
        assert done.exit_code == 2 and said in done.output and "Traceback" not in done.output, (line, done.output)


def test_the_webcam_command(camera, monkeypatch, tmp_path):
    from typer.testing import CliRunner
    from fer_nbdev.cli import app
    monkeypatch.chdir(tmp_path)
    window = FakeWindow(monkeypatch, [-1, ord("s"), ord("q")])
    done = CliRunner().invoke(app, ["webcam", "--detector", "haar"])
    assert done.exit_code == 0 and "3 frames" in done.output and len(window.shown) == 3 and len(list(tmp_path.glob("frame-*.png"))) == 1
    done = CliRunner().invoke(app, ["webcam", "--no-window", "--json", "-", "--detector", "haar", "--seconds", "0.2"])
    assert done.exit_code == 0 and json.loads(done.stdout.splitlines()[0])["faces"] == []


def test_the_imports_are_light():
    code = ("import sys, fer_nbdev.track, fer_nbdev.video; "
            "print([m for m in 'torch fastai fastcore pandas sklearn scipy matplotlib cv2 onnxruntime'.split() if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_nothing_that_is_read_is_written_over(tmp_path, predictor, without_ffmpeg):
    write(tmp_path / "a.avi", map(gradient, range(3)))
    (tmp_path / "frames").mkdir()
    for k in range(3):
        cv2.imwrite(str(tmp_path / f"frames/{k}.png"), gradient(k))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.*")}
    a, link = tmp_path / "a.avi", tmp_path / "link.avi"
    link.hardlink_to(a)
    for source, outputs, said in ((a, dict(out=a), "is the input"), (a, dict(out=link), "is the input"), (a, dict(jsonl=a), "is the input"),
                                  (tmp_path / "frames", dict(timeline=tmp_path / "frames/1.png"), "is the input"),
                                  (a, dict(jsonl=tmp_path / "b.avi"), "lines of JSON"),
                                  (a, dict(table=[tmp_path / "t.csv", tmp_path / "t.csv"]), "two outputs")):
        with pytest.raises(ValueError, match=said):
            process_video(source, model=predictor, **outputs)
    link.unlink()
    assert {p: p.read_bytes() for p in tmp_path.rglob("*.*")} == before


def test_a_writer_takes_frames_only(tmp_path, without_ffmpeg):
    image = gradient(1)
    for wrong in (image[..., 0], image / 255, np.dstack([image, image[..., :1]]), image.astype(int), image.tolist()):
        with pytest.raises(ValueError, match="uint8"), VideoWriter(tmp_path / "a.avi") as out:
            out.write(wrong, 0.)
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="seconds"), VideoWriter(tmp_path / "a.avi") as out:
            out.write(image, wrong)
    assert not list(tmp_path.iterdir())


def test_a_gap_is_not_written_without_a_word(tmp_path, predictor, without_ffmpeg):
    class Gap(VideoReader):
        def __iter__(self): yield from (Frame(k, 8. * k, squares((60, 60))) for k in range(2))

    told = []
    def stop(frame):
        told.append(frame.number)
        if len(told) == 5: raise InterruptedError

    with pytest.raises(InterruptedError):
        process_video(Gap([None]), tmp_path / "out.avi", predictor, progress=stop)
    assert told == [0, 1, 1, 1, 1] and not list(tmp_path.iterdir())


def test_at_most_sixty_frames_a_second_are_written(tmp_path, predictor, without_ffmpeg):
    images = [squares((60 + k / 10, 60)) for k in range(200)]
    process_video(VideoReader(images, fps=1000), tmp_path / "out.avi", predictor, table=tmp_path / "t.csv")
    reader = read_frames(tmp_path / "out.avi")
    assert reader.fps == 60 and len(list(reader)) == 13
    assert len((tmp_path / "t.csv").read_text().splitlines()) > 150


def test_a_start_far_beyond_the_end(tmp_path):
    write(tmp_path / "long.avi", (gradient(k % 100) for k in range(400)), fps=10)
    for start in (45, 500):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # the film is whole
            with pytest.raises(ValueError, match=f"no frame at {start} s or later.* ends at 39.90 s"):
                list(read_frames(tmp_path / "long.avi", start=start))
