"""Every image has its rows, and each once: whatever kind of source it comes from, and whatever is killed on the way.

What a worker does is tested in this process, without Ray. The kills are real: one Ray for the file, as small as it can be, in which
a worker gets SIGKILL in the middle of a part; and a process of its own that starts a Ray and gets SIGKILL itself.
"""
import csv
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fer_nbdev.core import EMOTIONS, sample_portrait
from fer_nbdev.data import synthetic_faces
from fer_nbdev.inference import Predictor, to_pandas

pd = pytest.importorskip("pandas")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
fsspec = pytest.importorskip("fsspec")
local = pytest.importorskip("fsspec.implementations.local")

from fer_nbdev.scale import (NO_FACE, DatasetSummary, _answers, _begin, _csv_fields, _csv_records, _entries, _find_files,  # noqa: E402
                             _fingerprint, _images, _Output, _PartWorker, _Places, _prepare, _ray_session, predict_dataset)

SETTINGS = dict(model="fast", detector="none", threads=1)
COLUMNS = ["image", "face", "x0", "y0", "x1", "y1", "emotion", "confidence", *EMOTIONS]


@pytest.fixture(scope="module")
def faces():
    return synthetic_faces(140)


@pytest.fixture(scope="module")
def photos(faces, tmp_path_factory):
    "140 faces in folders of folders; two more files are broken, and some are no images."
    folder = tmp_path_factory.mktemp("source") / "photos"
    for i, (pixels, label) in enumerate(zip(faces.pixels, faces.labels)):
        path = folder / label / f"{i % 3}" / f"face {i:03}é.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "sad" / "torn.png").write_bytes(path.read_bytes()[:100])
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def expected(photos):
    "The table that `Predictor.predict_many` makes of them, and the errors."
    answers = list(Predictor(**SETTINGS).predict_many(sorted(photos.rglob("*.png")) + [photos / "empty.jpg"]))
    return to_pandas([(str(p), a) for p, a in answers if isinstance(a, list)]), {str(p): str(a) for p, a in answers if not isinstance(a, list)}


def check_equal(out, expected):
    "The rows of a result are those of `predict_many`, each once, and the failed images have a row with the same error."
    table, (ours, errors) = pd.read_parquet(out), expected
    assert list(table.columns) == [*COLUMNS, "error"]
    failed = table[table.error.notna()]
    assert dict(zip(failed.image, failed.error)) == errors and len(failed) == len(errors)
    table = table[table.error.isna()].sort_values(["image", "face"]).reset_index(drop=True)
    ours = ours.sort_values(["image", "face"]).reset_index(drop=True)
    assert not table.duplicated(["image", "face"]).any()
    for c in COLUMNS[:7]:
        assert list(table[c]) == list(ours[c]), c
    np.testing.assert_allclose(table[COLUMNS[7:]].to_numpy(), ours[COLUMNS[7:]].to_numpy(float), atol=1e-6)


def do_here(sources, out, part_size=1000, column=None, options=None, parts=None, **settings):
    "What `predict_dataset` does, without Ray: every part by one worker in this process."
    settings = {**SETTINGS, **settings}
    fingerprint = _fingerprint(Predictor(**settings))
    manifest = _prepare(_Output(out, options), [str(s) for s in (sources if isinstance(sources, list) else [sources])], fingerprint, part_size, column)
    worker = _PartWorker(settings, fingerprint, str(out), options, column, None, None)
    answers = [worker({"part": np.array([k])}) for k in (range(manifest["parts"]) if parts is None else parts)]
    assert not any(a["error"][0] for a in answers), answers
    return sum(int(a["images"][0]) for a in answers)


# ------------------------------------------------------------------------------------------------------- sources

@pytest.mark.parametrize("part_size", [1, 7, 1000])
def test_a_folder_gives_the_rows_of_predict_many(part_size, photos, expected, tmp_path):
    assert do_here(photos, tmp_path / "out", part_size) == 142
    assert len(list((tmp_path / "out").glob("part-*.parquet"))) == -(-142 // part_size)
    check_equal(tmp_path / "out", expected)


def test_other_words_for_the_same_folder(photos, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(photos.parent)
    for i, source in enumerate(["photos", f"file://{photos}", [f"{photos}/*.jpg", "photos/**/*.png"], sorted(map(str, photos.rglob("*.??g")))]):
        do_here(source, tmp_path / str(i), 50)
        check_equal(tmp_path / str(i), expected)


def test_an_archive(photos, expected, tmp_path):
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as z:
        for p in photos.rglob("*.*"):
            z.write(p, p.relative_to(photos))
    do_here(f"zip://::{tmp_path}/all.zip", tmp_path / "out", 50)
    table = pd.read_parquet(tmp_path / "out")
    table["image"] = [str(photos / name.split("::")[0].removeprefix("zip://")) for name in table.image]
    ours, errors = expected
    assert set(table.image[table.error.notna()]) == set(errors)
    table = table[table.error.isna()].sort_values("image")
    np.testing.assert_allclose(table[list(EMOTIONS)].to_numpy(), ours.sort_values("image")[list(EMOTIONS)].to_numpy(float), atol=1e-6)


def _png(pixels):
    f = io.BytesIO()
    Image.fromarray(pixels).save(f, "PNG")
    return f.getvalue()


def _check_rows(out, table, faces):
    "Row i of a table of images is the face i."
    rows = pd.read_parquet(out)
    assert list(rows.image) == [f"{table}#{i}" for i in range(len(faces.pixels))] and rows.error.isna().all()
    np.testing.assert_allclose(rows[list(EMOTIONS)].to_numpy(), Predictor(**SETTINGS).predict_faces(faces.pixels), atol=1e-6)


@pytest.mark.parametrize("kind", ["bytes", "struct", "pixels", "list"])
@pytest.mark.parametrize("group, part_size", [(1000, 1000), (1000, 9), (11, 30), (50, 20)])
def test_parquet(kind, group, part_size, faces, tmp_path):
    "However the rows are grouped and cut, each comes once, in order."
    column = {"bytes": lambda p: _png(p), "struct": lambda p: {"bytes": _png(p), "path": "a.png"}, "list": lambda p: p.ravel().tolist(),
              "pixels": lambda p: " ".join(map(str, p.ravel()))}[kind]
    table = pa.table({"label": faces.emotion, "picture" if kind == "struct" else "image": [column(p) for p in faces.pixels]})
    pq.write_table(table, tmp_path / "faces.parquet", row_group_size=group)
    assert do_here(tmp_path / "faces.parquet", tmp_path / "out", part_size, "picture" if kind == "struct" else None) == len(faces)
    _check_rows(tmp_path / "out", tmp_path / "faces.parquet", faces)


@pytest.mark.parametrize("part_size", [9, 1000])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_csv(part_size, end, faces, tmp_path):
    "The challenge's own layout, with a note that goes over two lines and an empty line in between."
    with open(tmp_path / "faces.csv", "w", newline="", encoding="utf-8-sig") as f:
        f.write(f"emotion,note, pixels{end}")
        for i, p in enumerate(faces.pixels):
            f.write(f'{i % 7},"a ""note""{end * 2}of three lines",{" ".join(map(str, p.ravel()))}{end}' + (end if i % 5 == 0 else ""))
    assert do_here(tmp_path / "faces.csv", tmp_path / "out", part_size) == len(faces)
    _check_rows(tmp_path / "out", tmp_path / "faces.csv", faces)


def test_a_table_of_paths_is_relative_to_the_table(photos, expected, tmp_path):
    names = [p.relative_to(photos).as_posix() for p in sorted(photos.rglob("*.png"))]
    table = photos / "index.csv"
    try:
        table.write_text("path,who\n" + "".join(f'"{n}",me\n' for n in [*names, photos / "empty.jpg"]), encoding="utf-8")
        do_here(table, tmp_path / "out", 50)
    finally:
        table.unlink()
    check_equal(tmp_path / "out", expected)


def test_failures_are_rows(tmp_path):
    "What is wrong with one row is written there, and the others are answered."
    good = " ".join(["9"] * 2304)
    (tmp_path / "a.csv").write_text(f"pixels\n{good}\n1 2 3\n1 2 3 256\n\"\"\n1 2 3 x\ngone.png\n{good}\n9 9999999999999999999999 9 9\n")
    do_here(tmp_path / "a.csv", tmp_path / "out")
    table = pd.read_parquet(tmp_path / "out")
    words = [None, "no square", "0 to 255", "no image", "no file", "no file", None, "0 to 255"]
    assert len(table) == len(words)
    for found, word in zip(table.error, words):
        assert (found is None or found != found) if word is None else word in found, (found, word)
    assert table.face.notna().tolist() == [w is None for w in words] and table.emotion.notna().tolist() == [w is None for w in words]


def test_an_image_without_a_face_says_so(tmp_path):
    Image.fromarray(np.full((80, 80), 200, np.uint8)).save(tmp_path / "wall.png")
    Image.open(sample_portrait()).save(tmp_path / "grace.png")
    do_here(tmp_path, tmp_path / "out", detector="haar")
    grace, wall = pd.read_parquet(tmp_path / "out").to_dict("records")
    assert wall["emotion"] == NO_FACE and pd.isna(wall["error"]) and pd.isna(wall["face"])
    assert grace["emotion"] in EMOTIONS and grace["face"] == 0 and grace["x1"] > grace["x0"]


class _Distant(local.LocalFileSystem):
    "A server with a host in its address, whose files are those of a local folder; like a bucket it cannot rename into place."
    protocol = "distant"

    @classmethod
    def _strip_protocol(cls, path):
        path = str(path)
        return path if not path.startswith("distant://") else "/" + path.removeprefix("distant://").partition("/")[2]


def test_readers_of_a_tar_file_do_not_get_into_each_others_way(tmp_path, faces):
    with tarfile.open(tmp_path / "faces.tar", "w") as tar:
        for i, face in enumerate(np.concatenate([faces.pixels, faces.pixels[:, :, ::-1]])):
            data = io.BytesIO()
            Image.fromarray(face).save(data, "png")
            entry = tarfile.TarInfo(f"{i:03}.png")
            entry.size = data.tell()
            data.seek(0)
            tar.addfile(entry, data)
    predictor, places = Predictor(**SETTINGS), _Places()
    names = [name for name, _ in _find_files(places, f"tar://::{tmp_path}/faces.tar")]
    assert len(names) == 280
    one, many = (dict(_answers(predictor, places, [(n, n) for n in names], readers, 64)) for readers in (1, 16))
    assert one == many


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_tables_in_a_tar_file_are_read_while_others_read_its_images(kind, tmp_path, faces):
    "The images lie beside the tables, so every table is opened while readers are busy with the images of the one before."
    with tarfile.open(tmp_path / "tables.tar", "w") as tar:
        def add(name, data):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
        for t, batch in enumerate(faces.pixels.reshape(20, 7, 48, 48)):
            names = [f"{t:02}-{i}.png" for i in range(len(batch))]
            for name, face in zip(names, batch):
                data = io.BytesIO()
                Image.fromarray(face).save(data, "png")
                add(name, data.getvalue())
            table = pd.DataFrame(dict(path=names))
            add(f"{t:02}.{kind}", table.to_csv(index=False).encode() if kind == "csv" else table.to_parquet(index=False))
    predictor, places = Predictor(**SETTINGS), _Places()
    entries = list(_entries(places, _find_files(places, f"tar://*.{kind}::{tmp_path}/tables.tar"), 100, None))
    def run(readers):
        return [(name, str(a)) for name, a in _answers(predictor, places, (image for e in entries for image in _images(places, e, None)), readers, 64)]
    one = run(1)
    assert len(one) == 140 and not any("cannot be read" in a or "not an image" in a for _, a in one)
    for _ in range(3):
        assert run(16) == one


def test_addresses_with_a_host_and_a_result_that_is_not_local(photos, expected, tmp_path):
    fsspec.register_implementation("distant", _Distant, clobber=True)
    assert _Places().name("distant://host/photos", "/photos/a.png") == "distant://host/photos/a.png"
    assert _Places().name("http://host:80/photos/", "http://host:80/photos/a.png") == "http://host:80/photos/a.png"  # fsspec's paths of web servers are whole
    do_here(f"distant://host{photos}", f"distant://host{tmp_path}/out", 50)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"_begun", "_manifest.json", "_plan.parquet", *(f"part-{k:06}.parquet" for k in range(3))}
    table = pd.read_parquet(tmp_path / "out")
    assert all(name.startswith("distant://host/") for name in table.image)
    table["image"] = table.image.str.removeprefix("distant://host")
    ours, errors = expected
    assert set(table.image[table.error.notna()]) == set(errors)
    theirs = table[table.error.isna()].sort_values("image")[list(EMOTIONS)].to_numpy()
    np.testing.assert_allclose(theirs, ours.sort_values("image")[list(EMOTIONS)].to_numpy(float), atol=1e-6)


def test_what_is_no_source(photos, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "no.csv").write_text("a,b\n1,2\n")
    (tmp_path / "none.csv").write_text("path\n")
    for source, error, word in [("nowhere", FileNotFoundError, "nowhere"), (tmp_path / "empty", ValueError, "no images"),
                                (str(tmp_path / "*.gif"), ValueError, "no images"), (tmp_path / "bad.parquet", ValueError, "bad.parquet"),
                                (tmp_path / "no.csv", ValueError, "none of the columns"), (tmp_path / "none.csv", ValueError, "no images"),
                                ([], ValueError, "no images"), ("memory://a", ValueError, "this process"), ("nosuch://a", ValueError, "nosuch"),
                                ("zip::/a.zip", ValueError, "zip://"), (photos / "notes.txt", ValueError, "no images")]:
        with pytest.raises(error, match=word.replace("*", ".")):
            predict_dataset(source, tmp_path / "out", "fast", detector="none")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_settings_that_cannot_be_meant(photos, tmp_path):
    wrong = dict(workers=dict(workers=0), readers=dict(readers=1.5), at_once=dict(at_once=-1), part_size=dict(part_size=0),
                 threads=dict(threads=0), num_cpus=dict(num_cpus=0), num_gpus=dict(num_gpus=-1), function=dict(detector=len),
                 unknown=dict(model="best"), eyes=dict(align=True, detector="haar"), column=dict(column="x"))
    for word, settings in wrong.items():
        source = photos
        if word == "column":
            source = tmp_path / "a.csv"
            source.write_text("path\na.png\n")
        with pytest.raises(ValueError, match=word):
            predict_dataset(source, tmp_path / "out", **settings)


def test_the_listing_is_read_in_a_stream(tmp_path):
    "A million images are listed without holding them: the first comes before the last is asked for."
    def endless():
        for i in range(10**9):
            yield f"/photos/{i}.png", 1
    first = next(_entries(_Places(), endless(), 10, None))
    assert first.address == "/photos/0.png"


# ------------------------------------------------------------------------------------------- what belongs together

def test_a_changed_run_is_refused(photos, tmp_path):
    do_here(photos, tmp_path / "out", 50)
    out = tmp_path / "out"
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    others = dict(models=dict(model="accurate"), detector=dict(detector="haar"), tta=dict(tta=True), margin=dict(margin=.1),
                  min_confidence=dict(min_confidence=.5), part_size=dict(part_size=7))
    for word, settings in others.items():
        with pytest.raises(ValueError, match=word):
            predict_dataset(photos, out, **{"model": "fast", "detector": "none", **settings})
    for change in (lambda p: p.write_bytes(b"larger now"), lambda p: p.rename(p.with_name("renamed.png")), lambda p: p.unlink()):
        copy = tmp_path / "copy"
        copy.mkdir()
        for name in "a.png", "b.png":
            Image.fromarray(np.zeros((9, 9), np.uint8)).save(copy / name)
        do_here(copy, tmp_path / "out2")
        change(copy / "b.png")
        with pytest.raises(ValueError, match="images"):
            predict_dataset(copy, tmp_path / "out2", "fast", detector="none")
        for p in (*copy.iterdir(), *(tmp_path / "out2").glob("*.*")):
            p.unlink()
        copy.rmdir()
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == before
    (out / "_manifest.json").unlink()
    with pytest.raises(ValueError, match="_manifest.json"):
        predict_dataset(photos, out, "fast", detector="none")


def test_a_finished_run_starts_nothing(photos, tmp_path, monkeypatch):
    do_here(photos, tmp_path / "out", 50)
    monkeypatch.setitem(sys.modules, "ray", None)
    done = predict_dataset(photos, tmp_path / "out", "fast", detector="none", workers=2)
    assert done == DatasetSummary(str(tmp_path / "out"), 0, 0, 0, 0, parts=0, skipped=3, seconds=done.seconds)
    (tmp_path / "out" / "part-000001.parquet").unlink()
    with pytest.raises(ImportError, match=r'pip install "fer_nbdev\[scale\]"'):
        predict_dataset(photos, tmp_path / "out", "fast", detector="none")


def test_a_worker_with_another_model_says_so(photos, tmp_path):
    do_here(photos, tmp_path / "out", 50)
    other = _PartWorker({**SETTINGS, "tta": True}, _fingerprint(Predictor(**SETTINGS)), str(tmp_path / "out"), None, None, None, None)
    assert "not the one that was asked for" in other({"part": np.array([0])})["error"][0]
    blind = _PartWorker(SETTINGS, _fingerprint(Predictor(**SETTINGS)), str(tmp_path / "elsewhere"), None, None, None, None)
    assert "share" in blind({"part": np.array([0])})["error"][0]


def test_a_part_that_kills_its_workers_is_named(tmp_path):
    output = _Output(tmp_path)
    for n in 1, 2, 3:
        assert len(_begin(output, 7)) == n
    with pytest.raises(ValueError, match="3 workers died over part 7"):
        _begin(output, 7)


def test_a_table_that_shrinks_is_noticed(faces, tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [_png(p) for p in faces.pixels]}), path)
    entry = list(_entries(_Places(), _find_files(_Places(), str(path)), 1000, None))[-1]
    pq.write_table(pa.table({"image": [_png(p) for p in faces.pixels[:-1]]}), path)
    with pytest.raises(ValueError, match="has changed"):
        list(_images(_Places(), entry, None))


# ---------------------------------------------------------------------------------------------------- with Ray

def _below(pid):
    "The processes that a process has started, and those that they have."
    parents = {}
    for p in Path("/proc").iterdir():
        if p.name.isdigit():
            try:
                parents.setdefault(int((p / "stat").read_text().rpartition(")")[2].split()[1]), []).append(int(p.name))
            except OSError:
                pass
    found, ahead = [], [pid]
    while ahead:
        children = parents.get(ahead.pop(), [])
        found += children
        ahead += children
    return found


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at processes in /proc")


@pytest.fixture(scope="module")
def ray():
    pytest.importorskip("ray.data")
    os.environ["RAY_worker_niceness"] = "0"     # Ray's own 15 lets its workers wait for all other tests
    with _ray_session(cpus=2, gpus=0) as ray:
        yield ray


@linux
def test_a_killed_worker_costs_nothing(ray, photos, expected, tmp_path):
    "Both workers are killed once, in the middle of a part; nothing of this imports torch."
    killed, loaded = [], []

    def kill(done):
        worker = int(done["worker"].rpartition(":")[2])
        loaded.append(Path(f"/proc/{worker}/maps").read_text() if _alive(worker) else "")
        if len(killed) < 2 and worker not in killed:
            time.sleep(.05)     # into the next part
            os.kill(worker, signal.SIGKILL)
            killed.append(worker)

    done = predict_dataset(photos, tmp_path / "out", "fast", detector="none", tta=False, workers=2, part_size=5, progress=kill)
    assert len(killed) == 2 and (done.images, done.failed, done.parts, done.skipped) == (142, 2, 29, 0)
    check_equal(tmp_path / "out", expected)
    assert {p.name for p in (tmp_path / "out").iterdir() if not p.name.startswith("part-")} == {"_plan.parquet", "_manifest.json"}
    assert any("onnxruntime" in maps for maps in loaded) and not any("libtorch" in maps for maps in loaded)
    assert ray.is_initialized(), "a Ray that ran before is left as it was"
    with pytest.raises(ValueError, match="already"):
        predict_dataset(photos, tmp_path / "other", "fast", detector="none", ray_address="10.0.0.1:6379")


DRIVER = """
import sys
from fer_nbdev.scale import predict_dataset
predict_dataset(sys.argv[1], sys.argv[2], "fast", detector="none", tta=True, workers=1, part_size=10)
"""


@linux
def test_a_killed_driver_is_gone_on_with(ray, photos, tmp_path):
    "A process with its own Ray is killed in the middle: its Ray ends with it, and the next call does what is missing, though a worker may still be at it."
    out, env = tmp_path / "out", {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(photos), str(out)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    until = time.monotonic() + 300
    while not list(out.glob("part-*")) and time.monotonic() < until and driver.poll() is None:
        time.sleep(.01)
    started = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in _below(driver.pid)}
    driver.kill()
    driver.wait()
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("part-*")}
    assert 0 < len(before) < 15, driver.stderr.read(5000) if not before else "it was too fast to be killed"
    done = predict_dataset(photos, out, "fast", detector="none", tta=True, workers=1)
    parts = {p.name: p.stat().st_mtime_ns for p in out.glob("part-*")}
    assert len(parts) == 15 and done.skipped + done.parts == 15 and len(before) <= done.skipped <= len(before) + 1 and before.keys() <= parts.keys()
    predictor = Predictor(**SETTINGS, tta=True)
    answers = list(predictor.predict_many(sorted(photos.rglob("*.png")) + [photos / "empty.jpg"]))
    check_equal(out, (to_pandas([(str(p), a) for p, a in answers if isinstance(a, list)]), {str(p): str(a) for p, a in answers if not isinstance(a, list)}))
    head = [pid for pid, command in started.items() if b"gcs_server" in command or b"raylet/raylet" in command]
    assert len(head) == 2 and not any(map(_alive, head)), "the killed driver's Ray is still there"
    for pid in filter(_alive, started):     # workers without a Ray end by themselves, within a minute
        os.kill(pid, signal.SIGKILL)
    driver.stderr.close()


@linux
def test_the_command_line_retries_and_exit_codes(ray, photos, tmp_path):
    "The command, a second time for nothing, and the failed parts alone again."
    from typer.testing import CliRunner

    from fer_nbdev.cli import app
    line = ["predict", str(photos), "--engine", "ray", "--out", str(tmp_path / "out"), "--model", "fast", "--detector", "none", "--workers", "1"]
    first, second = (CliRunner().invoke(app, line) for _ in range(2))
    assert (first.exit_code, second.exit_code) == (1, 0) and "142 images: 140 faces" in first.stdout and "there already" in second.stdout
    (tmp_path / "few").mkdir()
    manifest = json.loads((tmp_path / "out" / "_manifest.json").read_text())
    assert (manifest["images"], manifest["parts"], manifest["settings"]["detector"]) == (142, 1, "none")
    again = predict_dataset(photos, tmp_path / "out", "fast", detector="none", retry_failed=True, workers=1)
    assert (again.parts, again.failed, again.skipped) == (1, 2, 0)


def test_quotes_in_names_and_letters_of_other_alphabets(tmp_path, faces):
    for name in ('5" screen.png', "plain.png", 'a,"b".png'):
        Image.fromarray(faces.pixels[0]).save(tmp_path / name)
    (tmp_path / "names.csv").write_text('note,path\ntall,5" screen.png\n"two\nlines, ""quoted""",plain.png\n,"a,""b"".png"\n')
    entries = list(_entries(_Places(), [(str(tmp_path / "names.csv"), None)], 2, None))
    assert [e.rows for e in entries] == [2, 1]
    assert [Path(name).name for e in entries for name, _ in _images(_Places(), e, None)] == ['5" screen.png', "plain.png", 'a,"b".png']
    (tmp_path / "latin.csv").write_bytes("path\ncaf\u00e9.png\n".encode("latin-1"))
    entry, = _entries(_Places(), [(str(tmp_path / "latin.csv"), None)], 2, None)
    with pytest.raises(ValueError, match="not a text in UTF-8"):
        list(_images(_Places(), entry, None))


def test_records_of_a_csv_are_those_of_pythons_csv(tmp_path):
    "Wherever quotes, commas, blanks and line ends stand; and a cell of thousands of lines takes no longer than a table of as many."
    rng = random.Random(0)
    for _ in range(2000):
        data = ("path\n" + "".join(rng.choice(['"', ",", "\n", "a", " ", "\r\n", '""', "é"]) for _ in range(rng.randrange(14)))).encode()
        found = list(_csv_records(io.BytesIO(data)))
        rows = [row for start, stop in found for row in _csv_fields(data[start:stop])]
        assert rows == [row for row in csv.reader(io.StringIO(data.decode(), newline="")) if row], data
    long = 'path\n"' + "a line of a long note\n" * 20_000 + '"\n' + "b.png\n" * 20_000
    begun = time.perf_counter()
    assert len(list(_csv_records(io.BytesIO(long.encode())))) == 20_002
    assert time.perf_counter() - begun < 5
