"""Nasty images: each is read as its maker meant it, or refused by a message that names it, quickly and in little memory."""
import io
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from PIL import Image

import _images
from fer_nbdev.core import read_image

HERE = Path(__file__).resolve().parent
CASES = list(_images.corpus())


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about damaged notes
        yield


def test_the_corpus_is_nasty_in_many_ways():
    assert len(CASES) == len({c.name for c in CASES}) > 200
    assert sum(c.pixels is not None for c in CASES) > 80 and sum(c.error is not None for c in CASES) > 100
    for fmt in _images.MODES:
        assert sum(c.name.startswith(f"{fmt} of ") for c in CASES) >= 20, f"{fmt} is hardly truncated"


def test_images_are_read_as_they_were_meant_or_refused_by_name(tmp_path):
    "From bytes and from a file under its own, often wrong, name; no single case takes long."
    for i, case in enumerate(CASES):
        started = time.perf_counter()
        case.check(read_image, case.data, "bytes")
        path = tmp_path / f"{i}{case.suffix}"
        path.write_bytes(case.data)
        case.check(read_image, path, str(path))
        assert time.perf_counter() - started < 20, case.name


def test_a_case_that_is_read_wrongly_is_noticed():
    "The check itself: mirrored, in BGR, a little too bright, turned, not refused, refused without the name."
    case = next(c for c in CASES if c.name == "png")
    for change in (lambda a: a[:, ::-1], lambda a: a[..., ::-1], lambda a: a + 1, lambda a: a.swapaxes(0, 1), lambda a: a.astype(float)):
        with pytest.raises(AssertionError):
            case.check(lambda source: change(read_image(source)), case.data, "bytes")
    broken = next(c for c in CASES if c.error is not None)
    with pytest.raises(AssertionError):
        broken.check(lambda source: _images.picture(), broken.data, "bytes")
    with pytest.raises(AssertionError):
        broken.check(read_image, broken.data, "/the/name/that/is/missing")


def test_open_pil_images_are_read_alike():
    from io import BytesIO

    from PIL import Image
    for case in CASES:
        if case.pixels is not None:
            case.check(read_image, Image.open(BytesIO(case.data)), "PIL")


def test_bytes_may_lie_apart_in_memory():
    data = io.BytesIO()
    Image.new("RGB", (4, 3), (200, 0, 0)).save(data, "PNG")
    apart = memoryview(bytes(b for pair in zip(data.getvalue(), data.getvalue()) for b in pair))[::2]
    assert read_image(apart).shape == (3, 4, 3)


@pytest.mark.skipif(os.name != "posix", reason="there are no pipes with names")
def test_pipes_and_devices_do_not_hang(tmp_path):
    os.mkfifo(tmp_path / "photo.jpg")
    for path in (tmp_path / "photo.jpg", "/dev/zero", os.devnull):
        with pytest.raises(ValueError, match="pipe or a device"):
            read_image(path)


MEMORY = """
import json, resource, sys, warnings
sys.path.insert(0, sys.argv[1])
import _images
from _fuzz import peak, reset_peak
from fer_nbdev.core import read_image
warnings.simplefilter("ignore")
read_image(_images.stored(_images.picture(), "PNG"))

bad = [(c.name, c.data) for c in _images.bad_cases() if "bomb" in c.name or "declares" in c.name or "large picture" in c.name]
with open("/proc/self/statm") as f: space = int(f.read().split()[0]) * resource.getpagesize()
# what is above was made here; reading must stay below one gigabyte more, or it fails as out of memory does
resource.setrlimit(resource.RLIMIT_AS, (space + 2**30,) * 2)
grown = {}
for name, data in bad:
    before = reset_peak()
    try: read_image(data)
    except ValueError as e: assert "out of memory" not in str(e).lower() and "MemoryError" not in str(e), (name, str(e))
    grown[name] = peak() - before
print(json.dumps(grown))
"""

COST = """
import sys
sys.path.insert(0, sys.argv[1])
import _images, numpy as np
from PIL import Image
from fer_nbdev.core import read_image
side, mode = 3000, sys.argv[2]
if mode in ("I;16", "F"): image = Image.fromarray(np.full((side, side), 7, np.uint16 if mode != "F" else np.float32))
else: image = Image.new(mode, (side, side), 7)
if mode in ("RGBA", "LA"): image.putalpha(Image.linear_gradient("L").resize((side, side)))
data = _images.stored(image, "TIFF")
del image
open(sys.argv[3], "wb").write(data)
"""

PEAK = """
import sys
sys.path.insert(0, sys.argv[1])
from _fuzz import peak, reset_peak
from fer_nbdev.core import read_image, sample_portrait
import PIL.TiffImagePlugin
read_image(sample_portrait())
before = reset_peak()
assert read_image(sys.argv[2]).shape == (3000, 3000, 3)
print((peak() - before) * 2**20 / 9e6)
"""


def _python(code, *args):
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout else None


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and RLIMIT_AS")
def test_bombs_do_not_fill_the_memory():
    """Peak memory of a process of its own, capped at a gigabyte more than it began with.

    An icon is decoded as it is opened, so one just above the limit costs what the limit allows.
    """
    grown = _python(MEMORY, HERE)
    assert len(grown) >= 8 and max(grown.values()) < 300, grown


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "I;16", "F"])
def test_memory_follows_the_pixels(mode, tmp_path):
    "What is held at most, in bytes a pixel: Pillow's own copy or two, and the array that comes out. Whole-picture floats would take 30 and more."
    _python(COST, HERE, mode, tmp_path / "large.tif")
    assert _python(PEAK, HERE, tmp_path / "large.tif") < 22
