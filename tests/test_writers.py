"""What is written is whole: killed at any moment, on a full disk, where nothing may be written, where something else stands."""
import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tempfile
from pathlib import Path

import numpy as np
import pytest

import _kills
from fer_nbdev.core import _check_target, read_checked, spare_path, write_whole

posix = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, and kills with SIGKILL")


KILLED = [name for name in (*_kills.WRITERS, "Training") if name != "Report"]


@posix
def test_writers_that_are_killed_leave_the_old_file_or_the_new_one():
    "All writers but that of reports, which draws for a second, and a training run, in one process that forks; `bench/kills.py` does it hundreds of times."
    pytest.importorskip("torch")
    pytest.importorskip("pyarrow")
    done = subprocess.run([sys.executable, "-W", "ignore", _kills.__file__, *KILLED, "--kills", "2"], capture_output=True, text=True, timeout=600,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {row["writer"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert set(found) == set(KILLED)
    assert not {name: row["failure"] for name, row in found.items() if "failure" in row}
    assert all(row["kills"] == 2 for row in found.values())


class Careless(_kills.Writer):
    "Writes straight into the file, as one would without thinking."
    name = "careless.txt"
    def write(self, version):
        with open(self.path, "w") as f:
            for _ in range(200):
                f.write(f"{version}\n" * 500)
                f.flush()
                time.sleep(.001)
    def version(self):
        lines = self.path.read_text().split()
        assert len(lines) == 100_000, "half a file"
        return int(lines[0])


@posix
def test_a_careless_writer_is_found_out(monkeypatch):
    monkeypatch.setitem(_kills.WRITERS, "Careless", Careless)
    with pytest.raises((AssertionError, IndexError, ValueError)):
        _kills.rounds("Careless", 20)


# ------------------------------------------------------------------------------------------------ full, forbidden, occupied

def _recipe(path):
    from fer_nbdev.recipe import Recipe
    Recipe(about="x" * 200_000).write(path)

def _weights(path):
    import torch
    from fer_nbdev.callbacks import save_weights
    save_weights({"w": torch.zeros(100_000)}, path)

def _model(path):
    from _models import small_graph
    from fer_nbdev.cards import write_model
    from fer_nbdev.core import EMOTIONS
    write_model(Path(path).parent, small_graph(EMOTIONS, weights=np.zeros((2304, 7), np.float32)), dict(format=1))

def _table(path):
    from fer_nbdev.video import Frame, _open_table
    from fer_nbdev.core import Box, Prediction
    with _open_table(path, ("happy", "sad")) as add:
        for i in range(12_000): add(Frame(i, i / 25, None, [Prediction("happy", .9, dict(happy=.9, sad=.1), Box(i, i, i + 9, i + 9), i)]))

def _video(path):
    from fer_nbdev.video import VideoWriter
    noise = np.random.default_rng(0).integers(0, 256, (64, 320, 320, 3), dtype=np.uint8)
    with VideoWriter(path, fps=25) as out:
        for i, image in enumerate(noise): out.write(image, i / 25)

def _text(path):
    with write_whole(path) as temp: temp.write_text("x" * 200_000)

LIGHT = {"text.txt": _text, "faces.csv": _table, "clip.avi": _video}
HEAVY = {"recipe.yaml": _recipe, "last.safetensors": _weights, "model.onnx": _model, "faces.parquet": _table}


@contextlib.contextmanager
def _small_files(limit):
    "No file of this process may grow beyond `limit` bytes: the portable way to a full disk."
    import resource  # not on Windows
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal_before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, signal_before)


@posix
@pytest.mark.parametrize("name", [*LIGHT, *HEAVY])
def test_a_full_disk_is_a_clear_error_and_the_old_file_stays(name, tmp_path):
    if name in HEAVY:
        pytest.importorskip("torch")
    if name == "faces.parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / name
    path.write_bytes(b"old")
    with _small_files(50_000), pytest.raises((OSError, ValueError)) as e:
        {**LIGHT, **HEAVY}[name](path)
    assert str(tmp_path) in str(e.value) or "No space" in str(e.value) or "could not write" in str(e.value), e.value
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == [name]
    {**LIGHT, **HEAVY}[name](path)  # and with room it works
    assert path.stat().st_size > 10_000


@posix
def test_a_disk_that_is_really_full(tmp_path):
    "A file system of 200 kB, where this process may mount one."
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", tmp_path], capture_output=True, check=False).returncode:
        pytest.skip("may not mount a small file system")
    try:
        (tmp_path / "kept.txt").write_text("old")
        with pytest.raises(OSError) as e, write_whole(tmp_path / "kept.txt") as temp:
            temp.write_bytes(bytes(300_000))
        assert e.value.errno == errno.ENOSPC and str(tmp_path / "kept.txt") in str(e.value)
        assert [p.name for p in tmp_path.iterdir()] == ["kept.txt"] and (tmp_path / "kept.txt").read_text() == "old"
        with write_whole(tmp_path / "kept.txt") as temp: temp.write_text("new")
        assert (tmp_path / "kept.txt").read_text() == "new"
        subprocess.run(["mount", "-o", "remount,ro", tmp_path], check=True)
        with pytest.raises(OSError) as e, write_whole(tmp_path / "kept.txt") as temp:
            temp.write_text("newer")
        assert str(tmp_path / "kept.txt") in str(e.value) and (tmp_path / "kept.txt").read_text() == "new"
    finally:
        subprocess.run(["umount", tmp_path], check=True)


FORBIDDEN = """
import os, sys
from fer_nbdev.core import write_whole
if os.getuid() == 0: os.setgid(65534); os.setuid(65534)
for path in sys.argv[1:]:
    try:
        with write_whole(path) as temp: temp.write_text("new")
    except OSError as e: assert os.path.dirname(path) in str(e), e
    else: raise SystemExit(f"{path} was written")
"""


@posix
def test_files_and_folders_that_may_not_be_written_stay():
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # where anybody may go
        folder = Path(folder)
        folder.chmod(0o777)
        (folder / "file.txt").write_text("old")
        (folder / "file.txt").chmod(0o444)
        (folder / "shut").mkdir()
        (folder / "shut" / "inside.txt").write_text("old")
        (folder / "shut").chmod(0o555)
        paths = [folder / "file.txt", folder / "shut" / "inside.txt", folder / "shut" / "new" / "deep.txt"]
        done = subprocess.run([sys.executable, "-c", FORBIDDEN, *map(str, paths)], capture_output=True, text=True, timeout=60, check=False, cwd="/",
                              env={**os.environ, "PYTHONPATH": str(_kills.HERE.parent)})
        if "Permission denied" in done.stderr and "fer_nbdev" in done.stderr and "write_whole" not in done.stderr:
            pytest.skip("nobody may read the package here")
        assert done.returncode == 0, done.stderr[-2000:]
        assert paths[0].read_text() == paths[1].read_text() == "old" and not paths[2].exists()
        assert sorted(p.name for p in folder.rglob("*")) == ["file.txt", "inside.txt", "shut"]


def test_what_is_no_file_is_not_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old")
    targets = [tmp_path / "folder"]
    if os.name == "posix":
        os.mkfifo(tmp_path / "pipe")
        targets.append(tmp_path / "pipe")
    for path in targets:
        kind = os.stat(path).st_mode
        with pytest.raises(ValueError, match="expected the path of a file"), write_whole(path) as temp: temp.write_text("new")
        assert os.stat(path).st_mode == kind
    for device in {os.devnull, *(["/dev/full"] if Path("/dev/full").exists() else [])}:  # only asked, since root could really replace them
        with pytest.raises(ValueError, match="device"): _check_target(Path(device))
    with pytest.raises(OSError, match="file"), write_whole(tmp_path / "file" / "under") as temp: temp.write_text("new")
    assert (tmp_path / "file").read_text() == "old"


def test_long_names_fit_beside_themselves(tmp_path):
    for stem in ("x" * 250, "é" * 120, "😀" * 60, "a" + "é" * 120):
        with write_whole(tmp_path / f"{stem}.csv") as temp: temp.write_text("new")
        assert (tmp_path / f"{stem}.csv").read_text() == "new"


# ------------------------------------------------------------------------------------------------ two files that belong together

def test_a_folder_is_the_old_model_or_the_new_one_at_every_step(tmp_path, monkeypatch):
    "Stop before each step of the writer, and look: the card and the network that is opened always belong together."
    pytest.importorskip("torch")
    pytest.importorskip("onnx")
    from _models import small_graph
    from fer_nbdev.cards import write_model
    from fer_nbdev.classify import FaceClassifier
    from fer_nbdev.core import EMOTIONS
    face, out = np.full((1, 48, 48), 99, np.uint8), tmp_path / "model"
    def write(version):
        weights = np.zeros((2304, 7), np.float32)
        weights[:, version] = 1
        write_model(out, small_graph(EMOTIONS, weights=weights), dict(format=1, name="m", classes=list(EMOTIONS), img_size=48, version=version))
    class Stop(BaseException): pass
    replace, seen = os.replace, []
    for step in range(4):
        if out.exists(): shutil.rmtree(out)
        write(0)
        done = []
        def counted(a, b):
            if len(done) == step: raise Stop
            done.append(b)
            replace(a, b)
        monkeypatch.setattr(os, "replace", counted)
        with contextlib.suppress(Stop): write(1)
        monkeypatch.setattr(os, "replace", replace)
        model = FaceClassifier(out)
        assert model.predict_faces(face).argmax() == model.card["version"]
        seen.append(model.card["version"])
        write(2)  # the next export tidies up
        assert sorted(p.name for p in out.iterdir()) == ["card.json", "model.onnx"] and FaceClassifier(out).predict_faces(face).argmax() == 2
    assert seen == [0, 0, 1, 1]  # nothing renamed, the spare one laid down, the card renamed, all done



def test_a_spare_file_outside_of_the_folder_is_not_read(tmp_path):
    import hashlib
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.onnx").write_bytes(b"a")
    (tmp_path / "secret.onnx").write_bytes(b"b")
    for sha256 in ("/../../secret", hashlib.sha256(b"b").hexdigest(), "", None, 5):
        with pytest.raises(ValueError, match="not the file that the card describes"): read_checked(tmp_path / "m" / "model.onnx", sha256)
    assert spare_path(tmp_path / "m" / "model.onnx", "a" * 64).parent == tmp_path / "m"
