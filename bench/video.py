"""How many frames a second does a video go at, and does memory stay where it is?

The video is made here: 1280 x 720 pixels, 25 frames a second, three faces (matplotlib's portrait in three sizes) that move over
a gray ground, as MPEG-4. Every run is a process of its own on two cores, warm: one frame was predicted before. Frames a second
are by the clock, from opening the video to the finished file; processor time includes that of ffmpeg, where it writes.

`fer` is called as its documentation says, Video.analyze, but spared its pictures: save_frames=False, zip_images=False. It looks
for faces in every frame, knows no tracks and writes an annotated video; `frequency=3` leaves out two of three frames, so that
its video has a third of them. It takes part where --envs names the folder with its environment, as bench/peers.py makes it.

Memory is the resident size of the process, its largest value in each minute of one long video with all outputs but the window.
"""
import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import _report
from _report import report

WIDTH, HEIGHT, FPS, LIMIT_FPS, LIMIT_MB = 1280, 720, 25, 25, 20
RUNS = {  # name -> settings of one run
    "annotated": {"out": True},
    "annotated, by ffmpeg": {"out": True, "ffmpeg": True},
    "annotated, one stage after the other": {"out": True, "overlap": False},
    "annotated, detection in every frame": {"out": True, "every": 1},
    "annotated, Haar": {"out": True, "haar": True},
    "table only": {},
}
FER = """
import json, logging, os, resource, sys, time
logging.disable(logging.WARNING)
import cv2
from fer.classes import Video
from fer.fer import FER
path, out, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
detector, (_, image) = FER(), cv2.VideoCapture(path).read()
detector.detect_emotions(image)
video = Video(path, outdir=out)
cpu, wall = time.process_time(), time.perf_counter()
rows = video.analyze(detector, display=False, output='pandas', save_frames=False, zip_images=False, **options)
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
print(json.dumps(dict(seconds=wall, cpu=cpu, rows=len(rows))))
"""
EXAMPLES = """examples:
  python bench/video.py --yunet yunet.onnx --envs ../peers        the measurement, about ten minutes
  python bench/video.py --quick --out /tmp                        a quick try"""


def portraits():
    "The portrait in three sizes, and where each is at a time, periodic in ten seconds"
    import cv2
    from fer_nbdev.core import read_image, sample_portrait
    photo = read_image(sample_portrait())
    sizes = [cv2.resize(photo, None, fx=s, fy=s, interpolation=cv2.INTER_AREA) for s in (.6, .5, .7)]
    return list(zip(sizes, ((150, 90, 130, 40), (520, 200, 90, 110), (860, 130, 60, 90))))


def draw(faces, seconds):
    "The picture at a time"
    image, turn = np.full((HEIGHT, WIDTH, 3), 110, np.uint8), 2 * np.pi * seconds / 10
    for k, (face, (x, y, wide, high)) in enumerate(faces):
        x, y = round(x + wide * np.sin(turn + k)), round(y + high * np.cos(turn + 2 * k))
        x, y = max(0, min(x, WIDTH - face.shape[1])), max(0, min(y, HEIGHT - face.shape[0]))
        image[y:y + face.shape[0], x:x + face.shape[1]] = face
    return image


def make_video(path, seconds):
    "Ten seconds, over and over"
    import cv2
    faces, frames = portraits(), {}
    out = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), FPS, (WIDTH, HEIGHT))
    for k in range(round(seconds * FPS)):
        at = k % (10 * FPS)
        if at not in frames:
            frames[at] = cv2.imencode(".png", draw(faces, at / FPS)[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1])[1]
        out.write(cv2.imdecode(frames[at], cv2.IMREAD_COLOR))
    out.release()


def used():
    "Seconds of the processor, ours and our children's"
    return sum(getattr(resource.getrusage(who), field) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN) for field in ("ru_utime", "ru_stime"))


def resident():
    "Megabytes of this process in memory"
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def run_ours(path, folder, settings):
    "One run in this process -> seconds, processor seconds, frames, rows"
    import fer_nbdev.video as library
    from fer_nbdev import Predictor
    if not settings.get("ffmpeg"):
        library.find_ffmpeg = lambda: None
    predictor = Predictor("accurate", detector="haar" if settings.get("haar") else settings["yunet"] or "haar")
    first = next(iter(library.VideoReader(path)))
    predictor.predict(first.image)
    peaks, out, every = {}, f"{folder}/out.mp4" if settings.get("out") else None, settings.get("every", 3)

    def note(frame):
        if settings.get("memory"):
            minute = int(frame.time // settings["memory"])
            peaks[minute] = max(peaks.get(minute, 0), resident())

    start, cpu = time.perf_counter(), used()
    if settings.get("overlap", True):
        jsonl = f"{folder}/faces.jsonl" if settings.get("memory") else None
        seen = library.process_video(path, out, predictor, table=f"{folder}/faces.csv", jsonl=jsonl, every=every, progress=note)
        frames, people = seen.frames, len(seen.summary())
    else:
        reader, people, frames = library.VideoReader(path), set(), 0
        steps = library._predict_frames(reader, predictor, every, library.FaceTracker(), library.ProbabilitySmoother(), library.CutDetector())
        with library.VideoWriter(out, reader.fps) as video, library._csv_table(f"{folder}/faces.csv", predictor.classes) as add:
            for frame in steps:
                add(frame)
                video.write(library.annotate_frame(frame.image, frame.preds), frame.time)
                people |= {p.track_id for p in frame.preds}
                frames += 1
        people = len(people)
    return {"seconds": time.perf_counter() - start, "cpu": used() - cpu, "frames": frames, "people": people,
            "rows": sum(1 for _ in open(f"{folder}/faces.csv")) - 1, "peaks_mb": [round(peaks[k], 1) for k in sorted(peaks)]}


def start(command, **options):
    "The JSON that a process prints last"
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, **options)
    if done.returncode:
        raise RuntimeError(f"{command[:2]} ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def ours(path, settings, yunet):
    "A run in a process of its own"
    with tempfile.TemporaryDirectory() as folder:
        return start([sys.executable, __file__, "--run", json.dumps({"path": str(path), "folder": folder, "yunet": yunet and str(yunet), **settings})])


def theirs(python, path, options):
    "The same for `fer`"
    import cv2
    with tempfile.TemporaryDirectory() as folder:
        result = start([python, "-c", FER, path, folder, json.dumps(options)], cwd=folder,
                       env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""})
        written = [cv2.VideoCapture(str(p)) for p in Path(folder).glob("*.mp4")]
        return result | {"written": int(max((w.get(cv2.CAP_PROP_FRAME_COUNT) for w in written), default=0))}


def speed(path, seconds, yunet, fer, rounds):
    "Every contestant in turns -> medians"
    frames, every = round(seconds * FPS), {}
    for _ in range(rounds):
        for name, settings in RUNS.items():
            if not settings.get("haar") and not yunet:
                continue
            every.setdefault(f"fer_nbdev, {name}", []).append(ours(path, settings, yunet))
        for name, options in (("fer", {}), ("fer, frequency=3", {"frequency": 3})) if fer else ():
            every.setdefault(name, []).append(theirs(fer, path, options))
        print({name: round(frames / runs[-1]["seconds"], 1) for name, runs in every.items()}, file=sys.stderr)
    return {name: {"frames_per_second": round(frames / statistics.median(r["seconds"] for r in runs), 2),
                   "cpu_ms_per_frame": round(1000 * statistics.median(r["cpu"] for r in runs) / frames, 2),
                   **{k: runs[0][k] for k in ("people", "rows", "written") if k in runs[0]}} for name, runs in every.items()}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--yunet", type=Path, help="a YuNet model (default: the one that the library finds)")
    parser.add_argument("--envs", type=Path, metavar="FOLDER", help="the environments of bench/peers.py, to compare with `fer`")
    parser.add_argument("--seconds", type=float, default=10, help="length of the video that is timed (default: %(default)s)")
    parser.add_argument("--minutes", type=int, default=10, help="length of the video for the memory (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each run is made (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one round of two seconds, and half a minute for the memory: shows that it works")
    parser.add_argument("--out", type=Path, default=_report.RESULTS, metavar="FOLDER", help="where video.json is written (default: bench/results)")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    args = parser.parse_args()
    for path in (args.yunet, args.envs):
        if path is not None and not path.exists():
            parser.error(f"there is no {path}")
    return args


def answer_of(rows, yunet, cores):
    "Like beside like: what is searched in every frame, and what in every third."
    def told(name, how):
        return f"{rows[name]['frames_per_second']:.3g} {how}" if name in rows else ""
    detector = "YuNet" if yunet else "Haar"
    ours = [told("fer_nbdev, annotated", f"frames/s with {detector} in every third frame"),
            told("fer_nbdev, annotated, Haar", "with Haar in every third") if yunet else "",
            told("fer_nbdev, annotated, detection in every frame", f"with {detector} in every frame")]
    theirs = [told("fer", "with Haar in every frame"), told("fer, frequency=3", "in every third")]
    return f"{', '.join(filter(None, ours))}, on {cores} cores" + f"; `fer` {', '.join(filter(None, theirs))}" * any(theirs)


def main():
    args = parse_args()
    if args.run:
        settings = json.loads(args.run)
        return print(json.dumps(run_ours(settings.pop("path"), settings.pop("folder"), settings)))
    from fer_nbdev.detect import find_yunet
    from fer_nbdev.video import find_ffmpeg
    _report.RESULTS = args.out
    if args.quick:
        args.seconds, args.rounds = 2, 1
    if hasattr(os, "sched_getaffinity"):
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:2]))
    if not find_ffmpeg():
        RUNS.pop("annotated, by ffmpeg")
    yunet, fer = args.yunet or find_yunet(), args.envs and (args.envs / "fer" / "bin" / "python").absolute()
    minute, minutes = (5, 6) if args.quick else (60, args.minutes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        make_video(path, args.seconds)
        rows = speed(path, args.seconds, yunet and yunet.absolute(), fer, args.rounds)
        make_video(path, minute * minutes)
        long = ours(path, {"out": True, "memory": minute}, yunet and yunet.absolute())
    peaks = long["peaks_mb"]
    grown, best = peaks[-1] - peaks[0], next((r for name, r in rows.items() if name == "fer_nbdev, annotated"), next(iter(rows.values())))
    report("video", {"speed": rows,
                     "memory": {"from_minute": 1 * minute / 60, "to_minute": minutes * minute / 60, "from_mb": peaks[0], "to_mb": peaks[-1],
                                "grown_mb": round(grown, 1), "peaks_mb": peaks, "frames": long["frames"], "seconds": round(long["seconds"], 1)},
                     "within_limits": bool(best["frames_per_second"] >= LIMIT_FPS and grown < LIMIT_MB)},
           question="How many frames of 720p with three faces does a second take, annotated?",
           answer=answer_of(rows, yunet is not None, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
           limits={"frames_per_second": LIMIT_FPS, "grown_mb": LIMIT_MB}, yunet=yunet.name if yunet else None, ffmpeg=bool(find_ffmpeg()),
           video={"size": [WIDTH, HEIGHT], "fps": FPS, "seconds": args.seconds, "faces": 3, "rounds": args.rounds},
           command="python bench/video.py" + (f" --yunet {args.yunet.name}" if args.yunet else "")
                   + (" --envs ../peers" if args.envs else "") + (" --quick" if args.quick else ""))


if __name__ == "__main__":
    main()
