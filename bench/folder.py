"""How fast does a folder of photos go: in a plain loop, as batches, and with reading and detection in threads?

The photos are drawn from the portrait that ships inside matplotlib, by a seed: one to four faces, cut and scaled to between 320 and
1,600 pixels, some in a mirror, some in gray, one in twenty without a face; saved as JPEG. They are in the disk cache. Each way
answers the same slice of the folder in turn, slice by slice, with one `Predictor`; the medians over the slices are reported.
The ways must agree, or the run fails. OpenCV's own threads are left as they are: the plain loop has the cores for detection too.
"""
import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import _report
from _report import hardware, report

SLICE = 100
EXAMPLES = """examples:
  python bench/folder.py                             the measurement, some minutes
  python bench/folder.py --detector yunet            with another detector
  python bench/folder.py --photos 60 --out /tmp      a quick try"""


def draw_photo(portrait, rng):
    "A photo with up to four of the portrait, scaled, cut and mirrored."
    from PIL import Image, ImageOps
    width, height = portrait.size
    n = int(rng.choice([0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 3, 3, 4]))
    tiles = []
    for _ in range(max(1, n)):
        left, top, right, bottom = rng.uniform(0, .15, 4) * (width, height, width, height)
        tile = portrait.crop((int(left), int(top), int(width - right), int(height - bottom))) if n else portrait.crop((400, 0, 512, 80))
        tile = tile.resize((round(600 * tile.width / tile.height), 600))
        tiles.append(ImageOps.mirror(tile) if rng.random() < .5 else tile)
    photo = Image.new("RGB", (sum(t.width for t in tiles), 600), (235, 235, 235))
    for i, tile in enumerate(tiles):
        photo.paste(tile, (sum(t.width for t in tiles[:i]), 0))
    scale = float(rng.uniform(320, 1600)) / max(photo.size)
    photo = photo.resize((round(photo.width * scale), round(photo.height * scale)), Image.Resampling.BICUBIC)
    return photo.convert("L") if rng.random() < .1 else photo


def draw_folder(folder, n, seed):
    "`n` photos as files; returns their paths and what they hold."
    import numpy as np
    from PIL import Image
    from fer_nbdev.core import sample_portrait
    rng, portrait, paths, pixels = np.random.default_rng(seed), Image.open(sample_portrait()).convert("RGB"), [], 0
    for i in range(n):
        photo = draw_photo(portrait, rng)
        paths.append(folder / f"photo {i:04}.jpg")
        photo.save(paths[-1], quality=90)
        pixels += photo.width * photo.height
    return paths, {"photos": n, "megapixels": round(pixels / n / 1e6, 2), "megabytes": round(sum(p.stat().st_size for p in paths) / 1e6, 1), "seed": seed}


def memory_mb():
    "Megabytes that this process holds, where Linux tells; 0 elsewhere."
    status = Path("/proc/self/status")
    return next((int(line.split()[1]) // 1024 for line in status.read_text().splitlines() if line.startswith("VmRSS")), 0) if status.exists() else 0


def ways(predictor):
    "What is compared: a name, and a function from paths to lists of predictions."
    def many(workers):
        return lambda paths: [preds for _, preds in predictor.predict_many(paths, workers=workers)]
    return {"plain loop": lambda paths: [predictor.predict(p) for p in paths], "predict_batch": predictor.predict_batch,
            "predict_many with 1 worker": many(1), "predict_many with 2 workers": many(2)}


def check_same(answers):
    "All ways see the same faces, and give them the same probabilities; equally large ones may come in any order."
    first, *others = ([sorted(preds, key=lambda p: p.box) for preds in answer] for answer in answers)
    for other in others:
        for ours, theirs in zip(first, other, strict=True):
            far = [abs(p.probs[c] - q.probs[c]) for p, q in zip(ours, theirs) for c in p.probs]
            if [p.box for p in ours] != [q.box for q in theirs] or max(far, default=0) > 1e-6:
                raise RuntimeError(f"the ways do not agree: {ours} and {theirs}")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=1000, metavar="N", help="how many to draw (default: %(default)s)")
    parser.add_argument("--model", default="accurate", help="a bundled model or a model folder (default: %(default)s)")
    parser.add_argument("--detector", default="haar", help="see detect_faces (default: %(default)s)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of the network (default: the Predictor's own)")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--out", type=Path, default=_report.RESULTS, metavar="FOLDER", help="where folder.json is written (default: bench/results)")
    args = parser.parse_args()
    if args.photos < 1:
        parser.error("--photos takes a number from 1 up")
    return args


def main():
    args = parse_args()
    _report.RESULTS = args.out
    from fer_nbdev import Predictor
    predictor = Predictor(args.model, detector=args.detector, threads=args.threads)
    wall, cpu, held, faces, turn = {}, {}, [], 0, ways(predictor)
    with tempfile.TemporaryDirectory() as tmp:
        paths, about = draw_folder(Path(tmp), args.photos, args.seed)
        for way in turn.values():
            way(paths[:4])
        for start in range(0, len(paths), SLICE):
            part, answers = paths[start:start + SLICE], {}
            for name in list(turn)[start // SLICE % len(turn):] + list(turn)[:start // SLICE % len(turn)]:
                begin, begin_cpu = time.perf_counter(), time.process_time()
                answers[name] = turn[name](part)
                wall.setdefault(name, []).append((time.perf_counter() - begin) / len(part))
                cpu.setdefault(name, []).append((time.process_time() - begin_cpu) / len(part))
            check_same(list(answers.values()))
            held.append(memory_mb())
            faces += sum(map(len, answers["plain loop"]))
    rate = {name: 1 / statistics.median(wall[name]) for name in turn}
    ratio = {name: statistics.median(a / b for a, b in zip(wall["plain loop"], wall[name])) for name in turn}
    best = max(rate, key=rate.get)
    defaults = dict(photos=1000, model="accurate", detector="haar", threads=None, seed=0)
    changed = "".join(f" --{k} {getattr(args, k)}" for k, d in defaults.items() if getattr(args, k) != d)
    report("folder",
           {"images_per_second": {k: round(v, 1) for k, v in rate.items()}, "times_the_plain_loop": {k: round(v, 2) for k, v in ratio.items()},
            "cpu_ms_per_image": {k: round(1000 * statistics.median(v), 1) for k, v in cpu.items()}, "faces_found": faces,
            "memory_mb_after_each_slice": held,
            "all_ms_per_image": {k: [round(1000 * x, 1) for x in v] for k, v in wall.items()}},
           question="How fast does a folder of photos go?",
           answer=f"{args.photos:,} drawn photos on {hardware()['cores']} cores, detector {args.detector}, model {args.model}, in photos a second: "
                  + ", ".join(f"{name} {v:.1f}" for name, v in rate.items()) + f"; {best} is {ratio[best]:.2f} times the plain loop",
           data=about, model=args.model, detector=args.detector,
           command="python bench/folder.py" + changed)
    return True


if __name__ == "__main__":
    sys.exit(not main())
