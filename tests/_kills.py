"""Writers in a child process, killed at random moments; afterwards what they wrote is whole, old or new.

A `Writer` writes version 0, 1, 2 ... of something over and over; `version(folder)` reads it back with the reader that users have and
says which one it is, or raises. The child says on a pipe which version it has begun and which it has finished, so the parent knows
what may be there: the last finished one or the one in the making."""
import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))


def _faces(n=35):
    from fer_nbdev.data import synthetic_faces
    return synthetic_faces(n)

class Writer:
    heavy = False  # imports torch
    def __init__(self, folder): self.folder, self.path = Path(folder), Path(folder) / self.name
    modulus = None  # where only part of the number can be read back
    def prepare(self): pass
    def same(self, a, b): return a == b if self.modulus is None else a % self.modulus == b % self.modulus

class Recipes(Writer):
    name, heavy = "recipe.yaml", True
    def write(self, version):
        from fer_nbdev.recipe import Recipe
        Recipe(about="x" * 20_000 + str(version)).write(self.path)
    def version(self):
        from fer_nbdev.recipe import read_recipe
        about = read_recipe(self.path).about
        assert len(about) > 20_000
        return int(about[20_000:])

class Findings(Writer):
    name, heavy = "findings.csv", True
    def prepare(self):
        import pandas as pd
        from fer_nbdev.clean import _COLUMNS
        row = dict(row=3, usage="Training", kind="copy", label="happy", suggested="", score=1., related=5,
                   ferplus="", votes=9, action="drop", new_label="", pixels="p00")
        self.table = pd.DataFrame([row] * 3000)[list(_COLUMNS)]
    def write(self, version):
        from fer_nbdev.clean import write_findings
        write_findings(self.table.assign(votes=version), self.path)
    def version(self):
        from fer_nbdev.clean import read_findings
        votes = read_findings(self.path).votes
        assert len(votes) == 3000 and votes.nunique() == 1
        return int(votes[0])

class Weights(Writer):
    name, heavy = "last.safetensors", True
    def write(self, version):
        import torch
        from fer_nbdev.callbacks import save_weights
        save_weights({"w": torch.full((200_000,), float(version))}, self.path, dict(epoch=version, rows=[], state=dict(pairs=[["model", dict(tensor="w")]])))
    def version(self):
        from fer_nbdev.callbacks import load_checkpoint
        epoch, _, state = load_checkpoint(self.path)
        assert (state["model"] == epoch).all()
        return epoch

class ModelFolder(Writer):
    name, heavy = "model", True
    def write(self, version):
        from _models import small_graph
        from fer_nbdev.cards import write_model
        from fer_nbdev.core import EMOTIONS
        weights = np.random.default_rng(version).normal(0, 1, (48 * 48, 7)).astype(np.float32)
        write_model(self.path, small_graph(EMOTIONS, weights=weights), dict(format=1, name="model", classes=list(EMOTIONS), img_size=48, version=version))
    def version(self):
        from fer_nbdev.cards import read_card
        from fer_nbdev.classify import FaceClassifier
        from fer_nbdev.core import EMOTIONS
        card = read_card(self.path)
        model, face = FaceClassifier(self.path, threads=1), np.random.default_rng(0).integers(0, 256, (1, 48, 48), dtype=np.uint8)
        logits = face.reshape(1, -1).astype(np.float32) @ np.random.default_rng(card["version"]).normal(0, 1, (48 * 48, 7)).astype(np.float32)
        assert model.predict_faces(face).argmax() == logits.argmax() and list(model.classes) == list(EMOTIONS), "the network is not that of the card"
        return card["version"]

class Cache(Writer):
    "The parsed csv beside it: an old cache is of an old csv, so the table is always that of the csv there is."
    name, modulus = "faces.csv", 256
    def write(self, version):
        from fer_nbdev.core import write_whole
        from fer_nbdev.data import read_fer2013
        line = f"{version % 7}," + " ".join([str(version % 256)] * 2304) + ",Training\n"
        with write_whole(self.path) as temp: temp.write_text("emotion,pixels,Usage\n" + line * 200)
        read_fer2013(self.path)
    def version(self):
        from fer_nbdev.data import read_fer2013
        plain, table = (read_fer2013(self.path, cache=cache) for cache in (False, True))
        assert len(table) == 200 and (table.pixels == plain.pixels).all() and (table.emotion == plain.emotion).all()
        return int(table.pixels[0, 0, 0])

class Folders(Writer):
    "`to_folders` makes a new folder each time: it is there and complete, or it is not there."
    name = "faces"
    def write(self, version):
        from fer_nbdev.data import to_folders
        if not hasattr(self, "table"): self.table = _faces(140)
        to_folders(self.table, self.folder / f"faces-{version}")
    def version(self):
        from fer_nbdev.data import read_fer2013
        there = sorted(int(p.name[6:]) for p in self.folder.glob("faces-*"))
        assert there == list(range(len(there))), there
        assert all(len(read_fer2013(self.folder / f"faces-{n}")) == 140 for n in there[-2:]), "a folder that is not complete"
        return len(there) - 1

class History(Writer):
    name, heavy = "history.csv", True
    def write(self, version):
        from types import SimpleNamespace
        from fer_nbdev.callbacks import History as H
        H._write(SimpleNamespace(out=self.folder, rows=[dict(epoch=i, accuracy=version) for i in range(2000)]))
    def version(self):
        import csv
        with open(self.path, newline="") as f: rows = list(csv.DictReader(f))
        plain = json.loads((self.folder / "history.json").read_text())
        assert len(rows) == len(plain) == 2000 and {r["accuracy"] for r in rows} <= {str(plain[0]["accuracy"]), str(plain[0]["accuracy"] - 1)}, "two histories"
        return int(rows[0]["accuracy"])

class VideoTable(Writer):
    name, suffix = "faces.csv", ".csv"
    def write(self, version):
        from fer_nbdev.core import Box, Prediction
        from fer_nbdev.video import Frame, _open_table
        with _open_table(self.path, ("happy", "sad")) as add:
            for i in range(1500): add(Frame(i, i / 25, None, [Prediction("happy", .9, dict(happy=.9, sad=.1), Box(0, 0, 9, 9), version)]))
    def rows(self):
        import csv
        with open(self.path, newline="") as f: return [r["track_id"] for r in csv.DictReader(f)]
    def version(self):
        rows = self.rows()
        assert len(rows) == 1500 and len(set(rows)) == 1
        return int(rows[0])

class VideoParquet(VideoTable):
    name = "faces.parquet"
    def rows(self):
        import pyarrow.parquet as pq
        return pq.read_table(self.path)["track_id"].to_pylist()

class Video(Writer):
    name, modulus = "clip.mp4", 30
    def write(self, version):
        from fer_nbdev.video import VideoWriter
        with VideoWriter(self.path, fps=25) as out:
            for i in range(20): out.write(np.full((64, 64, 3), 8 * (version % 30) + 8, np.uint8), i / 25)
    def version(self):
        import cv2
        video, frames = cv2.VideoCapture(str(self.path)), []
        while (frame := video.read())[0]: frames.append(frame[1].mean())
        assert len(frames) == 20 and max(frames) - min(frames) < 3, "half a video"
        return round((np.mean(frames) - 8) / 8)

class Yunet(Writer):
    "The download into the cache: with another file in place of the network, whose sum is expected instead."
    name = "cache/face_detection_yunet_2023mar.onnx"
    def write(self, version):
        import hashlib
        from unittest.mock import patch
        from fer_nbdev import detect
        data = f"{version:08d}".encode() * 25_000
        with (patch.object(detect, "YUNET_SHA256", hashlib.sha256(data).hexdigest()),
              patch.object(detect, "_download", lambda url, timeout: data),
              patch.dict(os.environ, FER_CACHE=str(self.path.parent))):
            detect.fetch_yunet()
    def version(self):
        data = self.path.read_bytes()
        assert len(data) == 200_000 and len(set(data[i:i + 8] for i in range(0, len(data), 8))) == 1
        return int(data[:8])

class Report(Writer):
    name, heavy = "report", True
    FILES = {"report.html", "scores.json", "predictions.csv", "report.txt", "confusion.png", "answers.png", "answer.png", "misclassified.png"}
    def prepare(self):
        self.table = _faces(70)
    def write(self, version):
        from fer_nbdev.evaluate import evaluate_model
        from fer_nbdev.report import write_report
        probs = np.random.default_rng(0).dirichlet(np.ones(7), len(self.table)).astype(np.float32)
        write_report(self.path, evaluate_model(lambda faces: probs[:len(faces)], self.table, None, name=f"version-{version}", n_resamples=20), n_faces=2)
    def version(self):
        from PIL import Image
        assert {p.name for p in self.path.iterdir() if not p.name.startswith(".")} == self.FILES
        for p in self.path.glob("[!.]*.png"): Image.open(p).load()
        page, plain = (self.path / "report.html").read_text(), (self.path / "report.txt").read_text()
        model = json.loads((self.path / "scores.json").read_text())["about"]["model"]
        said = {int(text.rpartition("version-")[2].split()[0].strip(",:;")) for text in (model, plain.split(",")[0].split(":")[0])}
        assert page.rstrip().endswith("</html>") and max(said) - min(said) <= 1, said  # all is put in place at the end, but file by file
        return max(said)

WRITERS = {w.__name__: w for w in (Recipes, Findings, Weights, ModelFolder, Cache, Folders, History, VideoTable, VideoParquet, Video, Yunet, Report)}


def begin(writer, first):
    "A child that writes version after version, and says so on a pipe. It is forked, so it has imported everything already."
    out, into = os.pipe()
    pid = os.fork()
    if pid: return pid, os.fdopen(out), os.close(into)
    os.setsid()  # it and what it starts (ffmpeg) are killed together
    try:
        for version in range(first, first + 10_000):
            os.write(into, f"begin {version}\n".encode())
            writer.write(version)
            os.write(into, f"done {version}\n".encode())
    except BaseException as e: os.write(into, f"failed {e!r}\n".encode())
    finally: os._exit(1)

def kill(process, delay):
    "Let it write for a while, kill it and its children, and say which versions it began and finished."
    pid, said, _ = process
    time.sleep(delay)
    with contextlib.suppress(ProcessLookupError): os.killpg(pid, signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with said: lines = [line.split(" ", 1) for line in said.read().splitlines()]
    assert not (failed := [text for word, text in lines if word == "failed"]), failed
    return ([int(text) for word, text in lines if word == wanted] for wanted in ("begin", "done"))

def rounds(name, kills, seed=0):
    """Kill a writer so many times, in one folder. Raises AssertionError about a half one.

    Returns how often the old version stood there and how often the one in the making.
    """
    rng, found = random.Random(f"{name} {seed}"), dict(kills=0, old=0, new=0, between=0, leftovers=0)
    with tempfile.TemporaryDirectory() as folder:
        writer = WRITERS[name](folder)
        writer.prepare()
        writer.write(0)
        took, last = time.perf_counter(), 1
        writer.write(1)
        took = time.perf_counter() - took
        for _ in range(kills):
            begun, done = kill(begin(writer, last + 1), rng.uniform(0, 2.5 * took))
            finished, making = (done or [last])[-1], (begun or [last])[-1]
            there = writer.version()
            known = writer.same(there, finished) or writer.same(there, making)
            assert known, f"{name}: version {there} is there; {finished} was finished, {making} in the making"
            found["kills"] += 1
            found["between" if finished == making else "old" if writer.same(there, finished) else "new"] += 1
            last = finished if writer.same(there, finished) else making
        found["leftovers"] = sum(1 for p in Path(folder).rglob("*") if ".tmp" in p.name)
        writer.write(last + 1)  # leftovers are in nobody's way
        assert writer.same(writer.version(), last + 1)
    return found | dict(ms_a_write=round(1000 * took, 1))

def _train(table, out):
    "Three epochs of a tiny network; goes on where the run in `out` stopped."
    from fer_nbdev.recipe import Recipe
    from fer_nbdev.train import train
    recipe = Recipe(arch="fast_resnet", arch_args=dict(widths=[4, 4, 4], blocks=[0, 0, 0]), epochs=3, bs=56, precision="fp32", lr=.01)
    train(recipe, table, out, resume=True, device="cpu", progress=False)

def _in_child(work):
    "Do something in a forked process (PyTorch's gradients do not survive a fork); returns its number and what it says at the end."
    out, into = os.pipe()
    pid = os.fork()
    if pid:
        os.close(into)
        return pid, os.fdopen(out)
    os.setsid()
    said = "done"
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # it prints its epochs
    try: work()
    except BaseException as e: said = f"failed {e!r}"
    os.write(into, said.encode())
    os._exit(0)

def whole_run(out):
    "Every file of a run that is there can be read whole; returns the epoch from which it would go on, -1 where there is no checkpoint yet."
    from PIL import Image
    from fer_nbdev.callbacks import load_checkpoint, load_weights
    from fer_nbdev.recipe import read_recipe
    here = {p.name for p in out.iterdir()} if out.is_dir() else set()
    for name in here:
        if name.startswith("."): continue
        if name.endswith(".json"): json.loads((out / name).read_text())
        elif name.endswith(".png"): Image.open(out / name).load()
        elif name.endswith(".yaml"): read_recipe(out / name)
        elif name == "best.safetensors": load_weights(out / name)
    return load_checkpoint(out / "last.safetensors")[0] if "last.safetensors" in here else -1

def training_rounds(kills, seed=0):
    "Kill a training run so many times. It must go on every time, lose at most its epoch, and end in the weights of a run that nobody touched."
    rng, found = random.Random(f"training {seed}"), dict(kills=0, resumed=0, ended=0, before_the_first_epoch=0)
    table = _faces(140)
    import torch, fer_nbdev.train  # noqa: E401, F401, before the fork
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        took = time.perf_counter()
        pid, said = _in_child(lambda: _train(table, Path(folder) / "whole"))
        assert said.read() == "done" and os.waitpid(pid, 0)
        took, n = time.perf_counter() - took, 0
        best = (Path(folder) / "whole" / "best.safetensors").read_bytes()
        while found["kills"] < kills:
            out, epoch = Path(folder) / f"run-{n}", -1
            while True:
                pid, said = _in_child(lambda: _train(table, out))
                if found["kills"] < kills:
                    time.sleep(rng.uniform(0, .7 * took))
                    with contextlib.suppress(ProcessLookupError): os.killpg(pid, signal.SIGKILL)
                    with contextlib.suppress(ProcessLookupError): os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                with said: ended = said.read()
                assert ended in ("done", ""), ended
                now = whole_run(out)
                assert now >= epoch, f"epoch {epoch} was there, now it is {now}"
                if ended == "done": break
                found["kills"] += 1
                found["before_the_first_epoch" if now < 0 else "resumed"] += 1
                epoch = now
            assert (out / "best.safetensors").read_bytes() == best, "a run that was killed ends in other weights"
            found["ended"] += 1
            n += 1
    return found | dict(seconds_a_run=round(took, 2))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("writers", nargs="*", help=f"of {', '.join([*WRITERS, 'Training'])} (default: all)")
    p.add_argument("--kills", type=int, default=20, help="of each")
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    for name in a.writers or [*WRITERS, "Training"]:
        try: found = training_rounds(a.kills, a.seed) if name == "Training" else rounds(name, a.kills, a.seed)
        except (AssertionError, ValueError, OSError, KeyError) as e: found = dict(failure=f"{type(e).__name__}: {e}")
        print(json.dumps(dict(writer=name, **found)), flush=True)

if __name__ == "__main__": main()
