"""Does the tracker keep its numbers, where is a face between two detections, and how steady is the answer?

Made videos have a known truth: 640 x 360 pixels, 25 frames a second, faces of FER2013's PublicTest on the photographs that
scikit-learn brings, moved along straight and winding paths. They cross, half of them vanish for up to a second, and at a cut
everything is exchanged. Faces come from those that YuNet finds alone on a photograph, so that losing one is due to the scene.

Tracking: detection in every third frame, by YuNet, and by a made detector that trembles (3% of the side), misses every tenth
face and those covered by more than a third, and sees one that is not there in every fiftieth frame. py-motmetrics counts in the
frames with detection; a box on a covered face is neither right nor wrong. `plain IoU` gives a box to the track whose last box
overlaps it most. Norfair and ByteTrack (of the package trackers) take part where they can be imported; what installing them adds is measured
by --install. The settings of FaceTracker were chosen on other videos (seeds 0 to 7) than these, and those of ProbabilitySmoother on other faces.

Between: boxes in the frames without detection (YuNet in every third), against the truth: left where they were, moved by the
tracker, moved by optical flow (pyramidal Lucas-Kanade on a grid of points in the box), interpolated (which needs the next detection,
so it delays the answer), and found by detection in every frame.

Smoothing: faces that change every two to five seconds to another picture to which the model gives another emotion, moved,
turned, lit and blurred a little, differently from frame to frame. Right is what the model says of the unchanged picture; pictures are taken
of which it is at least half sure.
"""
import argparse
import json
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np

import _report
from _report import ROOT, earlier, report
from detect import paste

FPS, WIDTH, HEIGHT, EVERY, COVERED = 25, 640, 360, 3, 1 / 3
# time constant, margin, asked in every so manieth frame
SMOOTHING = ((0, 0, 1), (0, .1, 1), (.25, 0, 1), (.5, 0, 1), (1, 0, 1), (.1, .1, 1), (.25, .1, 1), (.5, .1, 1), (1, .1, 1), (.25, .2, 1), (.25, .1, 3))
INSTALL = {"scipy": "scipy", "Norfair": "norfair", "ByteTrack": "trackers"}
EXAMPLES = """examples:
  python bench/tracking.py --data fer2013.csv --yunet yunet.onnx --install     the measurement
  python bench/tracking.py --quick --out /tmp                                  a quick try; without --data faces are drawn, and YuNet is left out"""


# ------------------------------------------------------------------------------------------------- made videos

def path(rng, n, side):
    "Centre and side of a face in n frames, [n, 3]: straight lines that the edges throw back, or a winding path"
    t, low, high = np.arange(n) / FPS, np.full(2, side / 2), np.array([WIDTH, HEIGHT]) - side / 2
    if rng.random() < .5:
        angle = rng.uniform(0, 2 * np.pi)
        where = rng.uniform(low, high) + t[:, None] * rng.uniform(40, 160) * np.array([np.cos(angle), np.sin(angle)]) - low
        there = np.mod(where, 2 * (high - low))
        where = low + np.where(there > high - low, 2 * (high - low) - there, there)
    else:
        where = (low + high) / 2 + (high - low) / 2 * np.sin(2 * np.pi * rng.uniform(.05, .25, 2) * t[:, None] + rng.uniform(0, 2 * np.pi, 2))
    return np.column_stack([where, side * (1 + .15 * np.sin(.2 * np.pi * t + rng.uniform(0, 2 * np.pi)))])


def video(seed, faces, photos, seconds, people=3):
    "Yields image, [(person, box)] and whether a scene begins; later people stand in front of earlier ones"
    import cv2
    rng, n, person = np.random.default_rng(seed), seconds * FPS, 0
    edges, scenes = [0, int(rng.integers(.3 * n, .7 * n)), n], rng.permutation(len(photos) * 2)
    for (begin, end), which in zip(pairwise(edges), scenes):
        ground, cast = cv2.resize(photos[which % len(photos)][:, ::1 if which < len(photos) else -1], (WIDTH, HEIGHT)), []
        for _ in range(people):
            hidden, at = np.zeros(end - begin, bool), rng.integers(0, end - begin)
            hidden[at:at + rng.integers(5, FPS)] = rng.random() < .5
            cast.append((person, faces[rng.integers(len(faces))], path(rng, end - begin, rng.uniform(60, 110)), hidden))
            person += 1
        for f in range(end - begin):
            image, truth = ground.copy(), []
            for who, face, where, hidden in cast:
                if not hidden[f]:
                    x, y, side = where[f]
                    paste(image, face, round(x - side / 2), round(y - side / 2), round(side))
                    truth.append((who, np.array([x - side / 2, y - side / 2, x + side / 2, y + side / 2])))
            yield np.repeat(image[..., None], 3, 2), truth, f == 0


def shared(a, b):
    "Area that boxes share, [n, m]"
    a, b = (np.asarray(x, float).reshape(-1, 4) for x in (a, b))
    return np.clip(np.minimum(a[:, None, 2:], b[:, 2:]) - np.maximum(a[:, None, :2], b[:, :2]), 0, None).prod(-1)


def area(boxes):
    boxes = np.asarray(boxes, float).reshape(-1, 4)
    return (boxes[:, 2:] - boxes[:, :2]).prod(-1)


def iou(a, b):
    "Intersection over union, [n, m]"
    both = shared(a, b)
    return both / np.maximum(area(a)[:, None] + area(b) - both, 1e-9)


def split_covered(truth):
    "Faces that can be seen, and boxes of those that others cover"
    boxes = np.array([b for _, b in truth]).reshape(-1, 4)
    covered = np.triu(shared(boxes, boxes), 1).max(1, initial=0) > COVERED * area(boxes)
    return [t for t, c in zip(truth, covered) if not c], boxes[covered]


def made_detections(rng, seen):
    "What a poor detector would say"
    boxes = []
    for _, b in seen:
        if rng.random() >= .1:
            side = (b[2] - b[0]) * (1 + rng.normal(0, .03))
            centre = (b[:2] + b[2:]) / 2 + rng.normal(0, .03 * side, 2)
            boxes.append([*(centre - side / 2), *(centre + side / 2)])
    if rng.random() < .02:
        x, y, side = rng.uniform(0, WIDTH - 100), rng.uniform(0, HEIGHT - 100), rng.uniform(40, 100)
        boxes.append([x, y, x + side, y + side])
    return np.clip(np.array(boxes).reshape(-1, 4), 0, [WIDTH, HEIGHT] * 2)


# ---------------------------------------------------------------------------------------------------- trackers

class Ours:
    "FaceTracker, with or without CutDetector"
    def __init__(self, cuts):
        from fer_nbdev.track import CutDetector, FaceTracker
        self.tracker, self.is_cut = FaceTracker(coast=.01), CutDetector() if cuts else lambda image: False

    def cut(self, image):
        if self.is_cut(image):
            self.tracker.reset()

    def update(self, boxes, now):
        return {i: np.array(b, float) for i, b in self.tracker.update(boxes, now).items()}


class PlainIoU:
    "Each box goes to the track whose last box overlaps it most; confirmed and forgotten as FaceTracker does"
    def __init__(self):
        self.tracks, self.last = [], 0

    def cut(self, image):
        "It knows nothing of cuts"

    def update(self, boxes, now):
        overlap = iou([t["box"] for t in self.tracks], boxes)
        for k in np.argsort(-overlap, axis=None) if overlap.size else ():
            i, j = np.unravel_index(k, overlap.shape)
            if overlap[i, j] < .3 or overlap[i].min() < 0:
                continue
            self.tracks[i].update(box=boxes[j], seen=now, hits=self.tracks[i]["hits"] + 1)
            overlap[i], overlap[:, j] = -1, 0
            boxes = boxes.copy()
            boxes[j] = np.nan
        self.tracks = [t for t in self.tracks if t["seen"] == now or t["id"] and now - t["seen"] <= 2]
        self.tracks += [{"box": b, "seen": now, "hits": 1, "id": None} for b in boxes if np.isfinite(b).all()]
        for t in self.tracks:
            if t["id"] is None and t["hits"] >= 2:
                t["id"] = self.last = self.last + 1
        return {t["id"]: t["box"] for t in self.tracks if t["id"] and t["seen"] == now}


class Norfair:
    "Norfair with IoU of the boxes it estimates; two seconds until it forgets, two detections until it believes"
    def __init__(self):
        import norfair
        self.library = norfair
        self.tracker = norfair.Tracker(distance_function="iou", distance_threshold=.7, hit_counter_max=round(2 * FPS / EVERY), initialization_delay=1)

    cut = PlainIoU.cut

    def update(self, boxes, now):
        found = [self.library.Detection(b.reshape(2, 2)) for b in boxes]
        return {t.id: t.estimate.reshape(4) for t in self.tracker.update(found) if any(t.last_detection is d for d in found)}


class ByteTrack:
    "ByteTrack as the package trackers has it; two seconds until it forgets, two detections until it believes"
    def __init__(self):
        import supervision
        from trackers import ByteTrackTracker
        self.library = supervision
        self.tracker = ByteTrackTracker(frame_rate=FPS / EVERY, lost_track_buffer=60, minimum_consecutive_frames=2)

    cut = PlainIoU.cut

    def update(self, boxes, now):
        d = self.tracker.update(self.library.Detections(boxes.reshape(-1, 4), confidence=np.ones(len(boxes))))
        return {int(i): b for i, b in zip(d.tracker_id, d.xyxy) if i >= 0} if len(d) else {}


def contestants():
    "Name -> a function that makes a tracker; the two others only where they are installed"
    made = {"plain IoU": PlainIoU}
    for name, module, cls in (("Norfair", "norfair", Norfair), ("ByteTrack (trackers)", "trackers", ByteTrack)):
        try:
            __import__(module)
            made[name] = cls
        except ImportError as e:
            print(f"{name} is left out: {e}", file=sys.stderr)
    return made | {"FaceTracker": lambda: Ours(False), "FaceTracker and CutDetector": lambda: Ours(True)}


def count_cuts(films):
    "How many cuts CutDetector finds, and how many it sees where there is none"
    from fer_nbdev.track import CutDetector
    found = false = 0
    for film, cuts in films:
        is_cut = CutDetector()
        for k, (_, _, _, _, image) in enumerate(film):
            hit = is_cut(image)
            found, false = found + (hit and k in cuts), false + (hit and k not in cuts)
    return {"cuts": sum(len(cuts) for _, cuts in films), "found": int(found), "false": int(false), "frames": sum(len(film) for film, _ in films)}


def track(films, detectors):
    "Scores of every tracker with every detector"
    import motmetrics
    host, result = motmetrics.metrics.create(), {}
    for detector in detectors:
        rows = result[detector] = {}
        for name, make in contestants().items():
            books, seconds, count = [], 0, 0
            for film in films:
                book, tracker = motmetrics.MOTAccumulator(auto_id=True), make()
                for now, seen, covered, found, image in film:
                    start = time.perf_counter()
                    tracker.cut(image)
                    if found is None:
                        seconds += time.perf_counter() - start
                        continue
                    tracks = tracker.update(found[detector], now)
                    seconds, count = seconds + time.perf_counter() - start, count + EVERY
                    overlap = iou([b for _, b in seen], list(tracks.values()))
                    keep = (overlap.max(0, initial=0) >= .4) | (iou(covered, list(tracks.values())).max(0, initial=0) < .4)
                    ids = [i for i, k in zip(tracks, keep) if k]
                    distance = 1 - overlap[:, keep]
                    book.update([who for who, _ in seen], ids, np.where(distance > .6, np.nan, distance))
                books.append(book)
            asked = ["num_switches", "num_fragmentations", "idp", "idr", "idf1", "mota", "num_unique_objects"]
            row = host.compute_many(books, metrics=asked, generate_overall=True).loc["OVERALL"]
            rows[name] = {"switches": int(row.num_switches), "fragmentations": int(row.num_fragmentations), "people": int(row.num_unique_objects),
                          **{k: round(float(row[k]), 4) for k in ("idp", "idr", "idf1", "mota")}, "us_per_frame": round(1e6 * seconds / count, 1)}
            print(detector, name, rows[name], file=sys.stderr)
    return result


# ------------------------------------------------------------------------------------------------ between detections

def flow(before, after, boxes):
    "Boxes moved by the median flow of a grid of points in each"
    import cv2
    moved = []
    for x0, y0, x1, y1 in boxes:
        x, y = np.meshgrid(np.linspace(x0, x1, 8)[1:-1], np.linspace(y0, y1, 8)[1:-1])
        points = np.stack([x, y], -1).reshape(-1, 1, 2).astype(np.float32)
        new, status, _ = cv2.calcOpticalFlowPyrLK(before, after, points, None, winSize=(15, 15), maxLevel=2)
        shift = np.median((new - points)[status[:, 0] == 1].reshape(-1, 2), 0) if status.any() else np.zeros(2)
        moved.append(np.array([x0, y0, x1, y1]) + np.tile(shift, 2))
    return moved


def between(films, yunet):
    "How well boxes fit in the frames without detection, and what they cost"
    from fer_nbdev.detect import detect_faces
    from fer_nbdev.track import FaceTracker
    overlaps, seconds, count = {}, {}, 0

    def timed(name, f):
        start = time.perf_counter()
        boxes = f()
        seconds[name] = seconds.get(name, 0) + time.perf_counter() - start
        return boxes

    def add(name, boxes, seen):
        overlaps.setdefault(name, []).extend(iou([b for _, b in seen], list(boxes)).max(1, initial=0))

    for film in films:
        tracker, held, flowing, gray, waiting = FaceTracker(), [], [], None, []
        for now, seen, _, found, image in film:
            last, gray = gray, np.ascontiguousarray(image[..., 0])
            if found is not None:
                boxes = list(found["YuNet"])
                for k, (_, others) in enumerate(waiting):
                    share = (k + 1) / EVERY
                    pairs = iou(held, boxes)
                    add("interpolated, two frames late",
                        [(1 - share) * h + share * boxes[int(p.argmax())] if p.max(initial=0) > .1 else h for h, p in zip(held, pairs)], others)
                held, flowing, waiting = boxes, boxes, []
                tracker.update(boxes, now)
                continue
            count += 1
            waiting.append((now, seen))
            add("left where they were", held, seen)
            add("FaceTracker.predict", timed("FaceTracker.predict", lambda: tracker.predict(now)).values(), seen)
            flowing = timed("optical flow", lambda: flow(last, gray, flowing))
            add("optical flow", flowing, seen)
            add("detected in every frame", timed("detected in every frame", lambda: detect_faces(image, yunet)), seen)
    return {name: {"iou": round(float(np.mean([o for o in all_ if o >= .3])), 4), "recall": round(float(np.mean([o >= .3 for o in all_])), 4),
                   "ms": round(1000 * seconds.get(name, 0) / count, 3)} for name, all_ in overlaps.items()}


# ---------------------------------------------------------------------------------------------------- smoothing

def wavering(rng, n, scale, seconds=.2):
    "Noise that forgets within `seconds`, [n]"
    keep, x = np.exp(-1 / FPS / seconds), rng.normal(0, scale)
    values = []
    for step in rng.normal(0, scale * np.sqrt(1 - keep**2), n):
        x = keep * x + step
        values.append(x)
    return np.array(values)


def moving_faces(rng, face, n):
    "A face as it comes out of a video, uint8 [n, 48, 48]"
    import cv2
    size = len(face)
    x, y, turn, grow, light, contrast, blur = (wavering(rng, n, s) for s in (.02 * size, .02 * size, 2, .03, 8, .07, .3))
    frames = []
    for k in range(n):
        matrix = cv2.getRotationMatrix2D((size / 2, size / 2), turn[k], np.exp(grow[k]))
        matrix[:, 2] += x[k], y[k]
        image = cv2.warpAffine(face, matrix, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        image = cv2.GaussianBlur(image, (0, 0), max(.05, .3 + blur[k])).astype(float)
        frames.append((image - 128) * np.exp(contrast[k]) + 128 + light[k] + rng.normal(0, 3, image.shape))
    return np.clip(frames, 0, 255).astype(np.uint8)


def smoothing(faces, predictor, minutes, rng):
    "Flips and lag of the label for several settings"
    from fer_nbdev.track import ProbabilitySmoother
    said = predictor.predict_faces(faces)
    faces, clean = faces[said.max(1) >= .5], said.argmax(1)[said.max(1) >= .5]
    segments, total = [], 0
    while total < minutes * 60 * FPS:
        pick = rng.integers(len(faces))
        if not segments or clean[pick] != segments[-1][0]:
            n = int(rng.integers(2 * FPS, 5 * FPS))
            segments.append((clean[pick], predictor.predict_faces(moving_faces(rng, faces[pick], n))))
            total += n
    truth = np.concatenate([[label] * len(p) for label, p in segments])
    probs, rows = np.concatenate([p for _, p in segments]), []
    starts = np.cumsum([0, *(len(p) for _, p in segments)])
    for constant, margin, every in SMOOTHING:
        smoother, labels = ProbabilitySmoother(constant, margin), []
        for k, p in enumerate(probs):
            labels.append(smoother(1, p, k / FPS)[1] if k % every == 0 else labels[-1])
        right = np.array(labels) == truth
        lags = [next((k for k in range(b - a) if right[a + k]), b - a) / FPS for a, b in pairwise(starts)][1:]
        rows.append({"time_constant": constant, "margin": margin, "every": every,
                     "flips_per_minute": round(60 * FPS * float((np.diff(labels) != 0).sum()) / total, 2),
                     "lag": round(float(np.mean(lags)), 3), "median_lag": round(float(np.median(lags)), 3), "accuracy": round(float(right.mean()), 4)})
        print(rows[-1], file=sys.stderr)
    return {"rows": rows, "minutes": total / FPS / 60, "changes_per_minute": 60 * FPS * (len(segments) - 1) / total}


# ------------------------------------------------------------------------------------------------------ install

def resolved(*packages):
    "Name -> version of what pip would install"
    with tempfile.TemporaryDirectory() as tmp:
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--dry-run", "--ignore-installed", "--report", f"{tmp}/r.json", *packages],
                       check=True, capture_output=True)
        return {i["metadata"]["name"].lower(): i["metadata"]["version"] for i in json.loads(Path(tmp, "r.json").read_text())["install"]}


def install_cost():
    "Megabytes and packages that each would add to the plain install"
    from configparser import ConfigParser
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini")
    base, costs = resolved(*config["DEFAULT"]["requirements"].split()), {}
    for name, package in INSTALL.items():
        wanted = resolved(package)
        new = {p: v for p, v in wanted.items() if p not in base}
        with tempfile.TemporaryDirectory() as tmp:
            subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp, *(f"{p}=={v}" for p, v in new.items())],
                           check=True, capture_output=True)
            size = sum(f.stat().st_size for f in Path(tmp).rglob("*") if f.is_file())
        older = [p for p in wanted if p in base and wanted[p].split(".")[0] != base[p].split(".")[0] and wanted[p] < base[p]]
        note = "and takes back " + ", ".join(f"{p} from {base[p]} to {wanted[p]}" for p in older) if older else ""
        costs[name] = {"megabytes": round(size / 1e6, 1), "packages": len(new), "note": note}
    return costs


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="FER2013 csv; without it faces are drawn")
    parser.add_argument("--yunet", type=Path, help="a YuNet model (default: the one that the library finds)")
    parser.add_argument("--install", action="store_true", help="also measure what Norfair, trackers and scipy would add to the plain install (downloads them)")
    parser.add_argument("--videos", type=int, default=16, metavar="N", help="videos of twenty seconds (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=12, help="minutes of faces for the smoothing (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="two videos, one minute: shows that it works")
    parser.add_argument("--out", type=Path, default=_report.RESULTS, metavar="FOLDER", help="where tracking.json is written (default: bench/results)")
    return parser.parse_args()


def main():
    args = parse_args()
    import cv2
    from sklearn.datasets import load_sample_images
    from fer_nbdev import Predictor
    from fer_nbdev.data import read_fer2013, synthetic_faces
    from fer_nbdev.detect import detect_faces, find_yunet
    _report.RESULTS = args.out
    if args.quick:
        args.videos, args.minutes = 2, 1
    yunet = args.yunet or find_yunet() if args.data else None
    table = read_fer2013(args.data) if args.data else synthetic_faces(700)
    faces = table.split("PublicTest").pixels
    photos = [cv2.cvtColor(p, cv2.COLOR_RGB2GRAY) for p in load_sample_images().images]

    def is_found(face):
        image = cv2.resize(photos[1], (320, 240))
        paste(image, face, 110, 70, 90)
        return len(detect_faces(np.repeat(image[..., None], 3, 2), yunet)) == 1

    cast = [f for f in faces[:400] if is_found(f)] if yunet else list(faces[:400])
    films, cuts = [], []
    for seed in range(100, 100 + args.videos):
        rng, film, begins = np.random.default_rng(seed), [], []
        for k, (image, truth, begin) in enumerate(video(seed, cast, photos, 20)):
            begins += [k] if begin and k else []
            seen, covered = split_covered(truth)
            found = {"made detector": made_detections(rng, seen)} if k % EVERY == 0 else None
            if found and yunet:
                found["YuNet"] = np.array(detect_faces(image, yunet), float).reshape(-1, 4)
            film.append((k / FPS, seen, covered, found, np.repeat(image[..., :1], 3, 2)))
        films.append(film)
        cuts.append(begins)
    tracking = track(films, (["YuNet"] if yunet else []) + ["made detector"])
    middle = between(films[:4], yunet) if yunet else {}
    steady = smoothing(faces[:800], Predictor("accurate"), args.minutes, np.random.default_rng(1))
    install = install_cost() if args.install else earlier("tracking")["results"].get("install", {})
    rows = next(iter(tracking.values()))
    ours, cut = rows["FaceTracker"], rows["FaceTracker and CutDetector"]
    rival, theirs = max(((n, r) for n, r in rows.items() if not n.startswith("FaceTracker")), key=lambda nr: nr[1]["idf1"])
    report("tracking", {"tracking": tracking, "cuts": count_cuts(list(zip(films, cuts))), "between": middle, "smoothing": steady, "install": install},
           question="Does a face keep its number in a video?",
           answer=f"IDF1 {ours['idf1']:.2f} and {ours['switches']} switches among {ours['people']} faces that cross, vanish and are cut away, "
                  f"{cut['idf1']:.2f} and {cut['switches']} with CutDetector; "
                  f"by {rival}, the best of the others, {theirs['idf1']:.2f} and {theirs['switches']}",
           data={"source": args.data.name if args.data else "synthetic_faces", "videos": args.videos, "seconds": 20, "faces": len(cast)},
           yunet=yunet.name if yunet else None,
           versions=_report.versions((*_report.PACKAGES, "motmetrics", "norfair", "trackers", "supervision", "scipy")),
           command="python bench/tracking.py" + (f" --data {args.data.name}" if args.data else "")
                   + (f" --yunet {args.yunet.name}" if args.yunet else "") + (" --quick" if args.quick else ""))


if __name__ == "__main__":
    main()
