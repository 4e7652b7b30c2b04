"""Mutated real files into everything that reads one. Each case must give a right answer or a documented error, soon, in little memory.

    python tests/_fuzz.py TARGET --seed 1 --cases 1000

runs one target in this process and prints a JSON line. `run` does so in a process of its own, so that a crash of a native decoder, a
hang or a bite into all the memory becomes a failure with its case: a case is made from (target, seed, number) alone, so `--first N
--cases 1` brings it back."""
import argparse
import contextlib
import gzip
import hashlib
import io
import json
import logging
import lzma
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
SECONDS, MEGABYTES = 20, 1500  # what a case may take; the address space that a worker gets beyond what it starts with
NUMBERS = (0, 1, 2, 3, 127, 128, 255, 256, 32767, 32768, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1)
WORDS = (b"-1", b"256", b"007", b"4294967301", b"1e3", b"1.5", b"nan", b"inf", b"", b" ", b"\t", b"9" * 5000, "²".encode(), "٣".encode(),
         b"\xff\xfe", b"\0", b'"', b'""', b"'", b"+5", b"0x10", b"True", b"null", b"~", b"[]", b"{}", b"[[[[", b"*a", b"&a",
         b"!!python/object/apply:os.system", b"<<", b"-", b"\n", b"\r", b"\r\n", b",", b",,", b":", b"#", b"../../x", b"2024-01-01",
         b"\xef\xbb\xbf", b"{0}", b"{row.__class__}")


# ------------------------------------------------------------------------------------------------ mutations

def _flip(data, rng):
    for _ in range(rng.choice((1, 1, 2, 8, 30))):
        i = rng.randrange(len(data))
        data[i] ^= 1 << rng.randrange(8)

def _overwrite(data, rng):
    i, n = rng.randrange(len(data)), rng.choice((1, 2, 4, 16, 64))
    data[i:i + n] = rng.choice((rng.randbytes(n), bytes(n), b"\xff" * n))[:len(data) - i]

def _number(data, rng):
    "A size somewhere in it becomes another one: what decoders allocate by."
    kind = rng.choice(("<H", ">H", "<I", ">I"))
    size = struct.calcsize(kind)
    i = rng.randrange(min(len(data), rng.choice((64, 64, 512, len(data)))))
    if i + size > len(data): return
    value = rng.choice((*NUMBERS, struct.unpack_from(kind, data, i)[0] + rng.choice((-1, 1))))
    struct.pack_into(kind, data, i, value % (1 << 8 * size))

def _cut(data, rng): del data[rng.randrange(len(data)):]
def _drop(data, rng):
    i = rng.randrange(len(data))
    del data[i:i + rng.choice((1, 4, 30, 500))]
def _repeat(data, rng):
    i = rng.randrange(len(data))
    data[i:i] = data[i:i + rng.choice((1, 4, 30, 500))] * rng.choice((1, 1, 2, 50))
def _insert(data, rng):
    i = rng.randrange(len(data) + 1)
    data[i:i] = rng.randbytes(rng.choice((1, 4, 30)))

def _word(data, rng):
    "Put something that means trouble in text: in place of a token, or between two."
    i = rng.randrange(len(data))
    j = i
    while j < len(data) and j - i < 40 and data[j:j + 1].isalnum(): j += 1
    data[i:j if rng.random() < .7 else i] = rng.choice(WORDS)

def _lines(data, rng):
    lines = bytes(data).splitlines(keepends=True)
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    change = rng.randrange(4)
    if change == 0: del lines[i]
    elif change == 1: lines[i], lines[j] = lines[j], lines[i]
    elif change == 2: lines.insert(j, lines[i])
    else:
        swap = rng.choice(((b"\n", b""), (b"\n", b"\r"), (b",", b";"), (b",", b",,"), (b" ", b"  "), (b" ", b"\t"), (b" ", b"")))
        lines[i] = lines[i].replace(*swap, rng.choice((1, 2)))
    data[:] = b"".join(lines)

BINARY = (_flip, _flip, _overwrite, _number, _number, _number, _cut, _drop, _repeat, _insert)
TEXT = (_word, _word, _word, _lines, _lines, _flip, _cut, _drop, _repeat, _overwrite)

def _mended_png(data):
    "The checksums of a png made right again, or nothing behind them would ever be decoded."
    if not data.startswith(b"\x89PNG\r\n\x1a\n"): return data
    at = 8
    while at + 12 <= len(data):
        n = struct.unpack_from(">I", data, at)[0]
        if at + 12 + n > len(data): break
        struct.pack_into(">I", data, at + 8 + n, zlib.crc32(data[at + 4:at + 8 + n]))
        at += 12 + n
    return data

def mutate(rng, seed, others=(), kinds=BINARY):
    "A changed copy of the bytes `seed`, maybe spliced with another."
    data = bytearray(seed)
    if others and rng.random() < .1:
        other = rng.choice(others)
        data = data[:rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1):]
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        if data: rng.choice(kinds)(data, rng)
    return bytes(_mended_png(data) if rng.random() < .8 else data)


# ------------------------------------------------------------------------------------------------ targets

class Wrong(AssertionError):
    "An answer that is not right, or an error that is not as documented."

def told(e, name):
    "The error is of a documented kind and names what it is about."
    if name not in str(e): raise Wrong(f"{type(e).__name__} does not name {name}: {e}")
    if len(str(e)) > 100_000: raise Wrong(f"an error of {len(str(e)):,} characters")
    return "error"

def right(true, what):
    if not true: raise Wrong(what)

class Target:
    "`case(rng)` makes an input, as bytes; `run(data)` feeds it and says 'ok' or 'error'."
    kinds, suffix = BINARY, ".bin"
    def __init__(self, folder):
        self.folder = folder
        self.seeds = self.make_seeds()
    def case(self, rng): return mutate(rng, rng.choice(self.seeds), self.seeds, self.kinds)
    def write(self, name, data):
        path = self.folder / name
        path.write_bytes(data)
        return path

class ImageBytes(Target):
    MAX = 300_000
    def make_seeds(self):
        import _images
        small = _images.picture(40, 30)
        seeds = [c.data for c in _images.good_cases() if len(c.data) < 20_000]
        for fmt in ("PPM", "TGA", "ICO", "JPEG2000", "PCX", "SGI", "DDS", "ICNS", "IM", "MSP", "QOI", "AVIF", "BLP"):
            with contextlib.suppress(Exception):
                image = _images.Image.fromarray(small)
                seeds.append(_images.stored(image.convert("1") if fmt == "MSP" else image, fmt))
        return seeds
    def run(self, data):
        from fer_nbdev.core import read_image
        return self.judge(lambda: read_image(data, max_pixels=self.MAX), "the image")
    def judge(self, read, name):
        try: found = read()
        except ValueError as e: return told(e, name)
        right(isinstance(found, np.ndarray) and found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3, "no RGB uint8")
        right(0 < found.shape[0] * found.shape[1] <= self.MAX and found.flags.c_contiguous, f"shape {found.shape}")
        return "ok"

class ImagePath(ImageBytes):
    SUFFIXES = (".jpg", ".png", ".gif", ".webp", ".tif", ".bmp", "", ".ico")
    def run(self, data):
        from fer_nbdev.core import read_image
        path = self.write("case" + self.SUFFIXES[len(data) % len(self.SUFFIXES)], data)
        return self.judge(lambda: read_image(path, max_pixels=self.MAX), repr(str(path)))

class ImagePIL(ImageBytes):
    def run(self, data):
        from PIL import Image
        from fer_nbdev.core import read_image
        try: image = Image.open(io.BytesIO(data))
        except Exception: return "not opened"
        return self.judge(lambda: read_image(image, max_pixels=self.MAX), "the PIL image")

def faces_csv(rows=6, order=("emotion", "pixels", "Usage")):
    "A small challenge csv of drawn faces."
    from fer_nbdev.data import synthetic_faces
    t = synthetic_faces(70)
    pick = [0, 8, 23, 58, 63, 69][:rows]
    cells = [dict(emotion=str(t.emotion[i]), pixels=" ".join(map(str, t.pixels[i].ravel())), Usage=str(t.usage[i])) for i in pick]
    return "\n".join([",".join(order), *(",".join(c[k] for k in order) for c in cells), ""]).encode()

def plain_csv(data):
    "FER2013's csv by the most simple-minded reader there is: (pixels, emotion, usage), or None where it is not one."
    from fer_nbdev.data import USAGES
    try: header, *lines = [line for line in data.split(b"\n")]
    except ValueError: return None
    names = [c.strip().strip('"').lower() for c in header.decode("utf-8-sig", "replace").split(",")]
    rows = []
    for line in lines:
        if not line.strip(): continue
        cells = [c.strip(b' \t\r\n"') for c in line.split(b",")]
        if len(cells) != len(names) or not {"emotion", "pixels", "usage"} <= set(names): return None
        emotion, pixels, usage = (cells[names.index(n)] for n in ("emotion", "pixels", "usage"))
        words = pixels.split()
        if len(words) != 2304 or not all(w.isdigit() and len(w) < 9 and int(w) < 256 for w in words): return None
        if not emotion.isdigit() or len(emotion) > 9 or int(emotion) > 6 or usage.lower() not in [u.lower().encode() for u in USAGES]: return None
        rows.append(([int(w) for w in words], int(emotion), [u.lower().encode() for u in USAGES].index(usage.lower())))
    return rows or None

class Fer2013Csv(Target):
    kinds = TEXT
    def make_seeds(self):
        return [faces_csv(), faces_csv(3, ("emotion", "Usage", "pixels")), faces_csv(2).replace(b"\n", b"\r\n"), b"\xef\xbb\xbf" + faces_csv(2), faces_csv(1)]
    def run(self, data):
        from fer_nbdev.data import read_fer2013
        path, expected = self.write("faces.csv", data), plain_csv(data)
        try: t = read_fer2013(path, cache=False)
        except ValueError as e:
            right(expected is None, f"refused a good csv: {e}")
            return told(e, str(path))
        right(expected is not None, "took a csv that is not one")
        right(len(t) == len(expected) and t.pixels.dtype == np.uint8, "another number of rows")
        right(all((t.pixels[i].ravel() == p).all() and t.emotion[i] == e and t.usage[i] == ("Training", "PublicTest", "PrivateTest")[u]
                  for i, (p, e, u) in enumerate(expected)), "other values")
        return "ok"

class Fer2013Archive(Target):
    "The csv packed: gz, xz and zip."
    def make_seeds(self):
        seeds, text = [gzip.compress(faces_csv(2)), lzma.compress(faces_csv(2))], faces_csv(2)
        for how in (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
            out = io.BytesIO()
            with zipfile.ZipFile(out, "w", how) as z: z.writestr("fer2013.csv", text)
            seeds.append(out.getvalue())
        return seeds
    def case(self, rng):
        i = rng.randrange(len(self.seeds))
        return bytes([min(i, 2)]) + mutate(rng, self.seeds[i], (), self.kinds)
    def run(self, data):
        from fer_nbdev.data import read_fer2013
        path = self.write("faces.csv" + (".gz", ".xz", ".zip")[data[0] if data else 0], data[1:])
        try: t = read_fer2013(path, cache=False)
        except ValueError as e: return told(e, str(path))
        right(t.pixels.shape[1:] == (48, 48), "no faces")
        return "ok"

class Fer2013Cache(Target):
    "The `.npy` beside a csv: whatever is in it, the table is that of the csv."
    def make_seeds(self):
        from fer_nbdev.data import read_fer2013
        self.csv = self.write("kept.csv", faces_csv(3))
        self.table, self.cache = read_fer2013(self.csv), self.folder / "kept.csv.npy"
        return [self.cache.read_bytes()]
    def run(self, data):
        from fer_nbdev.data import read_fer2013
        self.cache.write_bytes(data)
        t = read_fer2013(self.csv)
        right(len(t) == len(self.table) and (t.pixels == self.table.pixels).all()
              and (t.emotion == self.table.emotion).all() and (t.usage == self.table.usage).all(), "the cache changed the table")
        return "ok"

class FerPlusCsv(Target):
    kinds = TEXT
    def make_seeds(self):
        from fer_nbdev.votes import FERPLUS_CLASSES
        rows = [("Training", "fer0000000.png", 4, 0, 0, 1, 3, 2, 0, 0, 0, 0),
                ("PublicTest", "", 0, 0, 0, 0, 0, 0, 0, 0, 0, 10),
                ("PrivateTest", "fer0000002.png", 5, 5, 0, 0, 0, 0, 0, 0, 0, 0)]
        return ["\n".join([",".join(["Usage", "Image name", *FERPLUS_CLASSES]), *(",".join(map(str, r)) for r in rows), ""]).encode()]
    def run(self, data):
        from fer_nbdev.votes import read_ferplus
        path = self.write("votes.csv", data)
        try: votes = read_ferplus(path)
        except ValueError as e: return told(e, str(path))
        right(votes.votes.dtype == np.uint8 and votes.votes.shape == (len(votes.usage), 10) == (len(votes.dropped), 10)
              and votes.votes.max(initial=0) <= 10, "no votes")
        lines = [line.strip().split(",") for line in data.decode("utf-8-sig").splitlines()[1:] if line.strip()]
        right([[int(c) for c in cells[2:]] for cells in lines] == votes.votes.tolist(), "other votes")
        return "ok"

class Folder(ImageBytes):
    "A folder of class folders with one damaged picture among good ones."
    def make_seeds(self):
        import _images
        for split in ("train", "test"):
            for emotion in ("happy", "sad"):
                (self.folder / split / emotion).mkdir(parents=True)
                (self.folder / split / emotion / "good.png").write_bytes(_images.stored(_images.picture(48, 48), "PNG"))
        return [d for d in super().make_seeds() if len(d) < 6000]
    def run(self, data):
        from fer_nbdev.data import IMAGE_SUFFIXES, read_fer2013
        path = self.folder / "train" / "sad" / f"case{sorted(IMAGE_SUFFIXES)[len(data) % len(IMAGE_SUFFIXES)]}"
        path.write_bytes(data)
        try: t = read_fer2013(self.folder)
        except ValueError as e: return told(e, str(path))
        finally: path.unlink()
        right(len(t) == 5 and t.pixels.shape == (5, 48, 48) and t.classes == ("happy", "sad"), f"{t}")
        return "ok"

class Card(Target):
    kinds = TEXT
    def make_seeds(self):
        from fer_nbdev.cards import weights_folder
        folder = min((p.parent for p in weights_folder().glob("*/card.json")), key=lambda p: (p / "model.onnx").stat().st_size)
        self.model = self.folder / "model"
        shutil.copytree(folder, self.model)
        card = json.loads((folder / "card.json").read_text())
        short = {k: card[k] for k in ("format", "name", "classes", "img_size", "files")}
        return [json.dumps(short).encode(), json.dumps(short, indent=1).encode(), (folder / "card.json").read_bytes()]
    def run(self, data):
        from fer_nbdev.cards import read_card
        (self.model / "card.json").write_bytes(data)
        try: card = read_card(self.model)
        except (ValueError, FileNotFoundError) as e: return told(e, str(self.model))
        right(isinstance(card["classes"], list) and len(card["classes"]) > 1 and type(card["img_size"]) is int, "a card without classes or size")
        right(card["files"]["model.onnx"]["sha256"] == hashlib.sha256((self.model / "model.onnx").read_bytes()).hexdigest(), "the sum was not checked")
        return "ok"

class Graph(Card):
    "A model.onnx that its card vouches for: whoever made it up can do that too."
    kinds = BINARY
    def make_seeds(self):
        cards = super().make_seeds()
        self.card = json.loads(cards[0])
        from _models import small_graph
        return [small_graph(self.card["classes"])]
    def run(self, data):
        from fer_nbdev.classify import FaceClassifier, _kept_card, _open_session
        (self.model / "model.onnx").write_bytes(data)
        self.card["files"] = {"model.onnx": dict(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))}
        self.card["img_size"] = 48
        (self.model / "card.json").write_text(json.dumps(self.card))
        _kept_card.cache_clear(); _open_session.cache_clear()
        try: probs = FaceClassifier(self.model, threads=1).predict_faces(np.zeros((2, 48, 48), np.uint8))
        except ValueError as e: return told(e, str(self.model))
        right(probs.shape == (2, len(self.card["classes"])), f"probabilities {probs.shape}")
        return "ok"

class Recipes(Target):
    kinds = TEXT
    def make_seeds(self):
        from fer_nbdev.recipe import Recipe, list_recipes, plain_recipe, read_recipe
        import yaml
        seeds = [yaml.safe_dump(plain_recipe(read_recipe(n)), sort_keys=False).encode() for n in list(list_recipes())[:4]]
        return [*seeds,
                b"arch: se_resnet\nepochs: 3\nlr: 5e-4\naugment:\n  rotate: 20\nclasses: [happy, sad]\n"
                b"per_class: {Training: 10}\nstats: [.5, .25]\nvalid: .1\n",
                b"{schedule: plateau, schedule_args: {factor: .5, patience: 3}, arch_args: {width: 16}, pretrained: a.pt, patience: 4, clip: 1,"
                b" damage: {p_blur: .3, noise: 9}}",
                json.dumps(plain_recipe(Recipe())).encode()]
    def run(self, data):
        from fer_nbdev.recipe import plain_recipe, read_recipe, write_recipe
        path = self.write("case.yaml", data)
        try: recipe = read_recipe(path)
        except ValueError as e: return told(e, str(path))
        write_recipe(recipe, self.folder / "again.yaml")
        def plain(r): return json.dumps(plain_recipe(r), sort_keys=True)
        right(plain(read_recipe(self.folder / "again.yaml")) == plain(recipe), "it reads back as another recipe")
        json.dumps(plain_recipe(recipe), allow_nan=False)
        return "ok"

class Findings(Target):
    kinds = TEXT
    def make_seeds(self):
        head = "row,usage,kind,label,suggested,score,related,ferplus,votes,action,new_label,pixels"
        rows = ["3,Training,copy,happy,,1.0,1,happy,9,drop,,p00aa", "5,Training,label,sad,angry,0.71,,,4,relabel,angry,pbb11",
                '8,PublicTest,not a face,fear,,0.5,,"not a face",10,keep,,pc0ffee']
        quoted = ['"' + r.replace(",", '","') + '"' for r in rows[:2]]
        return ["\n".join([head, *rows, ""]).encode(), "\r\n".join(["\ufeff" + head, *rows]).encode(), "\n".join([head, *quoted]).encode()]
    def run(self, data):
        from fer_nbdev.clean import ACTIONS, FINDING_KINDS, read_findings, write_findings
        path = self.write("findings.csv", data)
        try: found = read_findings(path)
        except ValueError as e: return told(e, str(path))
        right(all(found[c].dtype == np.int64 for c in ("row", "related", "votes")) and np.isfinite(found.score).all(), f"{dict(found.dtypes)}")
        right(found.kind.isin(FINDING_KINDS).all() and found.action.isin(ACTIONS).all() and found.index.is_unique, "unknown kinds or actions")
        write_findings(found, self.folder / "again.csv")
        again = read_findings(self.folder / "again.csv")
        right(again.to_dict("list") == found[list(again.columns)].to_dict("list"), "it reads back otherwise")
        return "ok"

class CheckpointFile(Target):
    def make_seeds(self):
        import torch
        from fer_nbdev.callbacks import _pack, save_weights
        tensors = {}
        tree = _pack(dict(model=dict(w=torch.arange(6.).reshape(2, 3), b=torch.ones(2)),
                          opt=dict(state=[dict(step=torch.tensor(3.))], hypers=[dict(lr=.1)]), ema=None), tensors)
        save_weights(tensors, self.folder / "seed.safetensors", dict(epoch=1, rows=[dict(epoch=0, accuracy=.2), dict(epoch=1, accuracy=.3)], state=tree))
        return [(self.folder / "seed.safetensors").read_bytes()]
    def run(self, data):
        from fer_nbdev.callbacks import load_checkpoint
        path = self.write("last.safetensors", data)
        try: epoch, rows, state = load_checkpoint(path)
        except ValueError as e: return told(e, str(path))
        right(isinstance(epoch, int) and isinstance(rows, list) and isinstance(state, dict), "no checkpoint")
        return "ok"

class Weights(CheckpointFile):
    "Weights for transfer: safetensors, and the zip of pickles that torch saves."
    def make_seeds(self):
        import torch
        state, out = {"w": torch.arange(6.).reshape(2, 3), "b": torch.ones(2)}, io.BytesIO()
        torch.save(state, out)
        old = io.BytesIO()
        torch.save(state, old, _use_new_zipfile_serialization=False)
        return [super().make_seeds()[0], out.getvalue(), old.getvalue()]
    def run(self, data):
        from fer_nbdev.models import _read_weights
        path = self.write("weights" + (".safetensors" if data[8:9] == b"{" else ".pth"), data)
        try: state = _read_weights(path)
        except ValueError as e: return told(e, path.name)
        right(state and all(hasattr(v, "shape") for v in state.values()), "no weights")
        return "ok"

TARGETS = {"image bytes": ImageBytes, "image path": ImagePath, "image PIL": ImagePIL,
           "fer2013 csv": Fer2013Csv, "fer2013 archive": Fer2013Archive, "fer2013 cache": Fer2013Cache, "fer+ csv": FerPlusCsv,
           "class folders": Folder, "card": Card, "graph": Graph, "recipe": Recipes, "findings": Findings,
           "checkpoint": CheckpointFile, "transfer weights": Weights}
LIGHT = ("image bytes", "image path", "image PIL", "fer2013 csv", "fer2013 archive", "fer2013 cache", "fer+ csv",
         "class folders", "card", "graph")  # need no torch


# ------------------------------------------------------------------------------------------------ one process, many cases

def make_case(target, name, seed, number):
    "The input with this number: the same on every run."
    return target.case(random.Random(f"{name} {seed} {number}"))

def peak():
    "The most memory that this process has held so far, in MB. (`getrusage` is no use: it hands a child the peak of its parent.)"
    with open("/proc/self/status") as f: return next(int(line.split()[1]) for line in f if line.startswith("VmHWM")) / 1024

def reset_peak():
    "Begin to count anew; returns what is held now."
    with open("/proc/self/clear_refs", "w") as f: f.write("5")
    return peak()

def _address_space():
    import resource  # not on Windows
    with open("/proc/self/statm") as f: return int(f.read().split()[0]) * resource.getpagesize()

def work(name, seed, first, cases, seconds, mark=None):
    "Run cases of one target in this process and print what came of them, a JSON line at the end."
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    ended = dict(ok=0, error=0, failures={}, slowest=(0., -1), peak=(0., -1))
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        target = TARGETS[name](Path(folder))
        for data in target.seeds[:2]: target.run(data if name != "fer2013 archive" else b"\0" + data)  # imports, before memory is counted
        if sys.platform == "linux":
            import resource
            resource.setrlimit(resource.RLIMIT_AS, (_address_space() + MEGABYTES * 2**20,) * 2)
        start, n, most = time.perf_counter(), first, reset_peak()
        while (cases is None or n < first + cases) and (seconds is None or time.perf_counter() - start < seconds):
            if mark is not None: os.pwrite(mark, struct.pack("<q", n), 0)
            data = make_case(target, name, seed, n)
            signal.setitimer(signal.ITIMER_REAL, SECONDS)  # its default action ends the process, even inside native code
            begun = time.perf_counter()
            try: kind = target.run(data)
            except BaseException as e:
                where = [f for f in traceback.extract_tb(e.__traceback__) if "fer_nbdev" in f.filename]
                if isinstance(e, Wrong): key = f"{type(e).__name__}: {str(e)[:90].replace(folder, '')}"
                else: key = f"{type(e).__name__} in {where[-1].name if where else '?'}"
                ended["failures"].setdefault(key, []).append(n)
            else: ended["error" if kind == "error" else "ok"] += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            ended["slowest"] = max(ended["slowest"], (time.perf_counter() - begun, n))
            if (now := peak()) > most: ended["peak"], most = max(ended["peak"], (now - most, n)), now
            n += 1
        ended.update(cases=n - first, seconds=time.perf_counter() - start, peak_mb=peak())
    return ended

def run(name, seed=0, first=0, cases=None, seconds=None):
    "`work` in a process of its own. A process that ends otherwise is a failure of the case that it was at; the rest goes on behind it."
    total = None
    while True:
        with tempfile.NamedTemporaryFile() as mark:
            command = [sys.executable, str(Path(__file__).resolve()), name, "--seed", str(seed), "--first", str(first), "--mark", mark.name]
            if cases is not None: command += ["--cases", str(cases)]
            if seconds is not None: command += ["--seconds", str(seconds)]
            begun = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
            if done.returncode == 0: part = json.loads(done.stdout.splitlines()[-1])
            else:
                at = mark.read(8)
                if len(at) < 8: raise RuntimeError(f"{name} could not begin: {done.stderr[-2000:]}")
                at, = struct.unpack("<q", at)
                if done.returncode == -signal.SIGALRM: kind = "hang"
                elif done.returncode < 0: kind = f"crash, signal {-done.returncode}"
                else: kind = f"exit code {done.returncode}: {done.stderr[-200:]}"
                part = dict(ok=0, error=0, failures={kind: [at]}, slowest=[0., -1], peak=[0., -1], cases=at - first + 1,
                            seconds=time.perf_counter() - begun, peak_mb=0.)
        total = part if total is None else _joined(total, part)
        if done.returncode == 0: return dict(total, target=name, seed=seed)
        first = at + 1
        if cases is not None: cases -= part["cases"]
        if seconds is not None: seconds -= part["seconds"]
        if (cases is not None and cases <= 0) or (seconds is not None and seconds <= 0): return dict(total, target=name, seed=seed)

def _joined(a, b):
    failures = {k: a["failures"].get(k, []) + b["failures"].get(k, []) for k in {**a["failures"], **b["failures"]}}
    return dict(failures=failures, slowest=max(a["slowest"], b["slowest"]), peak=max(a["peak"], b["peak"]),
                peak_mb=max(a["peak_mb"], b["peak_mb"]), **{k: a[k] + b[k] for k in ("ok", "error", "cases", "seconds")})

def save_case(name, seed, number, folder):
    "Make a case again and keep its bytes."
    with tempfile.TemporaryDirectory() as scratch: data = make_case(TARGETS[name](Path(scratch)), name, seed, number)
    path = Path(folder) / f"{name.replace(' ', '_')}-{seed}-{number}.bin"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("target", choices=TARGETS)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--first", type=int, default=0, help="number of the first case")
    p.add_argument("--cases", type=int, help="how many")
    p.add_argument("--seconds", type=float, help="or for how long")
    p.add_argument("--mark", help="a file that says which case is at work")
    a = p.parse_args()
    mark = None if a.mark is None else os.open(a.mark, os.O_WRONLY)
    print(json.dumps(work(a.target, a.seed, a.first, a.cases, a.seconds, mark)))

if __name__ == "__main__": main()
