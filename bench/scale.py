"""How many images a second do `predict_dataset` and Ray predict, with one worker and with two, and does a killed worker cost a row?

The faces of FER2013, repeated until there are enough, are written as png files of 48x48 pixels into folders of a thousand. All ways
predict the same files: `Predictor.predict_many` with one thread for the network and one that reads, which is what one worker does
without Ray, and again with its defaults; then `predict_dataset` with one and two workers, each in a process of its own that starts a
Ray and ends it. Reported are images a second of the whole call, the seconds from the call to the first finished part less what
that part should take (the start), and images a second from the first finished part to the last. In one more run a worker gets
SIGKILL after a third of the parts. At the end every way must have the rows of `predict_many`, each once, and the same probabilities.

With a detector the images are portraits of 512x600 pixels, fewer of them. What a hundred million images would take is arithmetic:
the seconds of a worker an image, without the start, over the hours of a number of cores.
"""
import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import _report
from _report import report

EXAMPLES = """examples:
  python bench/scale.py --data fer2013.csv                     the measurement, some minutes
  python bench/scale.py --limit 5000 --portraits 50 --out /tmp a quick try
  python bench/scale.py --folder /data/scale                   keep the png files for another time"""
CALL = """
import json, os, resource, signal, sys, time
options = json.loads(sys.argv[1])
kill, done, start = options.pop("kill"), [], time.perf_counter()
from fer_nbdev.scale import predict_dataset
imported = time.perf_counter() - start
killed = []
def note(part):
    done.append((time.perf_counter() - start, part["images"], part["worker"]))
    if kill and not killed and part["done"] >= part["total"] / 3:
        time.sleep(.1)
        os.kill(int(part["worker"].rpartition(":")[2]), signal.SIGKILL)
        killed.append(part["worker"])
summary = predict_dataset(progress=note, **options)
print(json.dumps(dict(seconds=time.perf_counter() - start, imported=imported, done=done, killed=killed, images=summary.images, failed=summary.failed,
                      memory_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)))
"""


def write_faces(folder, data, n):
    "`n` png files of faces in folders of a thousand; what is there already is kept."
    from PIL import Image

    from fer_nbdev.data import read_fer2013, synthetic_faces
    table = read_fer2013(data) if data else synthetic_faces(2100)
    for i in range(n):
        path = folder / f"{i // 1000:04}" / f"{i:07}.png"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(table.pixels[i % len(table)]).save(path)
    return str(table)


def write_portraits(folder, n):
    "`n` copies of the portrait that ships inside matplotlib, each of another brightness."
    from PIL import Image, ImageEnhance

    from fer_nbdev.core import sample_portrait
    portrait = Image.open(sample_portrait()).convert("RGB")
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        ImageEnhance.Brightness(portrait).enhance(.8 + .4 * i / n).save(folder / f"{i:06}.jpg", quality=90)


def _plain(source, model, detector, workers, threads, queue):
    import resource

    import cv2

    from fer_nbdev.inference import Predictor
    if workers == 1:
        cv2.setNumThreads(1)
    start, table = time.perf_counter(), {}
    predictor = Predictor(model, detector=detector, threads=threads)
    for path, preds in predictor.predict_many(sorted(Path(source).rglob("*.*g")), workers):
        table[str(path)] = [(p.emotion, round(p.confidence, 4)) for p in preds]
    queue.put((time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, table))


def plain(source, model, detector, workers=None, threads=None):
    "Seconds, megabytes and answers of `predict_many`, in a process of its own."
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_plain, args=(source, model, detector, workers, threads, queue))
    process.start()
    answer = queue.get()
    process.join()
    return answer


def with_ray(source, model, detector, workers, out, part_size, kill=False):
    "What a call of `predict_dataset` took, in a process of its own with a Ray of its own."
    options = dict(source=str(source), out=str(out), model=model, detector=detector, workers=workers, part_size=part_size, kill=kill)
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    done = subprocess.run([sys.executable, "-c", CALL, json.dumps(options)], env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    found = json.loads(done.stdout.splitlines()[-1])
    times, images = [t for t, _, _ in found["done"]], [n for _, n, _ in found["done"]]
    found["rate"] = sum(images) / found["seconds"]
    steady = (sum(images) - images[0]) / (times[-1] - times[0]) if times[-1] > times[0] else None
    found["steady_rate"] = steady
    found["start_seconds"] = times[0] - workers * images[0] / steady if steady else times[0]
    return found


def check_rows(out, answers):
    "(lost, doubled, different) rows of a result against the answers of `predict_many`."
    import pyarrow.parquet as pq
    rows = pq.read_table(out).select(["image", "face", "emotion", "confidence"]).to_pydict()
    seen, different = {}, 0
    for image, face, emotion, confidence in zip(*rows.values()):
        seen[image, face] = seen.get((image, face), 0) + 1
        expected = answers.get(image, [])
        if face is not None and not (face < len(expected) and expected[face][0] == emotion and abs(expected[face][1] - confidence) < 2e-4):
            different += 1
    wanted = {(image, i) for image, preds in answers.items() for i in range(len(preds))} | {(image, None) for image, preds in answers.items() if not preds}
    return {"lost": len(wanted - seen.keys()), "doubled": sum(n - 1 for n in seen.values()), "not_asked_for": len(seen.keys() - wanted), "different": different}


def compare(source, model, detector, tmp, part_size, kill):
    "All ways over one folder."
    ways, figures = {}, {}
    seconds, memory, answers = plain(source, model, detector, 1, 1)
    n = len(answers)
    ways["predict_many, 1 thread"] = n / seconds
    figures["predict_many, 1 thread"] = {"seconds": round(seconds, 2), "memory_mb": round(memory)}
    seconds, memory, _ = plain(source, model, detector)
    ways["predict_many"] = n / seconds
    figures["predict_many"] = {"seconds": round(seconds, 2), "memory_mb": round(memory)}
    for workers in 1, 2:
        name = f"Ray, {workers} worker" + "s" * (workers > 1)
        found = with_ray(source, model, detector, workers, tmp / f"{source.name} {workers}", part_size)
        ways[name] = found["rate"]
        figures[name] = {**_round(found), **check_rows(tmp / f"{source.name} {workers}", answers)}
    if kill:
        found = with_ray(source, model, detector, 2, tmp / f"{source.name} killed", part_size, kill=True)
        figures["Ray, 2 workers, one killed"] = {**_round(found), "killed": len(found["killed"]), **check_rows(tmp / f"{source.name} killed", answers)}
    return ways, figures


def _round(found):
    return {"seconds": round(found["seconds"], 2), "start_seconds": round(found["start_seconds"], 2),
            "steady_rate": found["steady_rate"] and round(found["steady_rate"], 1),
            "driver_memory_mb": round(found["memory_mb"]), "workers_that_worked": len({w for _, _, w in found["done"]})}


def listing_seconds(source):
    "Seconds an image that the driver needs to list the files and to write the plan."
    from fer_nbdev.scale import _entries, _find_files, _Listing, _Output, _parts, _Places, _write_plan
    with tempfile.TemporaryDirectory() as tmp:
        start, places = time.perf_counter(), _Places()
        listing = _Listing(_parts(_entries(places, _find_files(places, str(source)), 1000, None), 1000))
        _write_plan(_Output(tmp), listing)
        return (time.perf_counter() - start) / listing.images


def estimate(figures, per_listing, cores=64):
    "Hours for a hundred million images on one core and on machines with `cores` cores: the seconds of a worker an image, without the start."
    table = {"images": 100_000_000, "cores_a_machine": cores, "listing_hours": round(1e8 * per_listing / 3600, 2)}
    for title, ways in figures.items():
        rate = ways["Ray, 1 worker"]["steady_rate"]
        if rate:
            core_hours = 1e8 / rate / 3600
            table[title] = {"images_a_second_and_core": rate, "core_hours": round(core_hours, 1),
                            "hours_on_1_machine": round(core_hours / cores, 2), "hours_on_16_machines": round(core_hours / cores / 16, 3)}
    return table


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="CSV", help="FER2013; without it faces are drawn")
    parser.add_argument("--limit", type=int, default=100_000, metavar="N", help="how many faces (default: %(default)s)")
    parser.add_argument("--portraits", type=int, default=1000, metavar="N", help="how many photos for the detector (default: %(default)s)")
    parser.add_argument("--model", default="fast", help="a bundled model or a model folder (default: %(default)s)")
    parser.add_argument("--detector", default="haar", help="the detector of the second part (default: %(default)s)")
    parser.add_argument("--part-size", type=int, default=1000, metavar="N", help="images in a part (default: %(default)s)")
    parser.add_argument("--folder", type=Path, metavar="FOLDER", help="where the images are written and kept (default: a temporary folder)")
    parser.add_argument("--out", type=Path, default=_report.RESULTS, metavar="FOLDER", help="where scale.json is written (default: bench/results)")
    args = parser.parse_args()
    if args.limit < 10 or args.portraits < 10 or args.part_size < 1:
        parser.error("--limit and --portraits take numbers from 10 up, --part-size from 1 up")
    return args


def main():
    args = parse_args()
    _report.RESULTS = args.out
    os.environ.update(OMP_NUM_THREADS="1", RAY_worker_niceness="0")     # Ray's workers would else yield to everything else
    tmp = Path(tempfile.mkdtemp(prefix="scale-"))
    folder = args.folder or tmp / "images"
    try:
        faces, portraits = folder / f"faces {args.limit}", folder / f"portraits {args.portraits}"
        data = write_faces(faces, args.data, args.limit)
        write_portraits(portraits, args.portraits)
        part = min(args.part_size, -(-args.limit // 20))
        titles = {f"{args.limit:,} faces of 48x48, detector none": (faces, "none", part, True),
                  f"{args.portraits:,} portraits of 512x600, detector {args.detector}":
                      (portraits, args.detector, max(1, args.portraits // 20), False)}
        rates, figures = {}, {}
        for title, (source, detector, part_size, kill) in titles.items():
            rates[title], figures[title] = compare(source, args.model, detector, tmp, part_size, kill)
        per_listing = listing_seconds(faces)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    first = next(iter(figures.values()))
    wrong = [f"{way}: {f}" for ways in figures.values() for way, f in ways.items() if any(f.get(k) for k in ("lost", "doubled", "not_asked_for", "different"))]
    if wrong:
        raise RuntimeError("the rows are not those of predict_many: " + "; ".join(wrong))
    one, two, killed = (first[way] for way in ("Ray, 1 worker", "Ray, 2 workers", "Ray, 2 workers, one killed"))
    if not killed["killed"]:
        raise RuntimeError("no worker was killed: take a larger --limit")
    scaling = {title: round(ways["Ray, 2 workers"]["steady_rate"] / ways["Ray, 1 worker"]["steady_rate"], 2) for title, ways in figures.items()}
    paper = estimate(figures, per_listing)
    hours = paper[next(iter(figures))]
    told = {title: ", ".join(f"{way} {rate:,.0f}" for way, rate in ways.items()) for title, ways in rates.items()}
    answer = "; ".join(f"{title}: {ways} images a second, two workers {scaling[title]:.2f} times one once they run" for title, ways in told.items())
    defaults = dict(limit=100_000, portraits=1000, model="fast", detector="haar", part_size=1000)
    changed = "".join(f" --{k.replace('_', '-')} {getattr(args, k)}" for k, d in defaults.items() if getattr(args, k) != d)
    report("scale",
           {"images_per_second": {t: {w: round(r, 1) for w, r in ways.items()} for t, ways in rates.items()}, "ways": figures, "two_workers_to_one": scaling,
            "overhead_of_ray": {t: round(1 - ways["Ray, 1 worker"]["steady_rate"] / rates[t]["predict_many, 1 thread"], 3) for t, ways in figures.items()},
            "listing_microseconds_per_image": round(1e6 * per_listing, 1), "hundred_million": paper},
           question="Does batch inference scale over processes, and does a killed one cost anything?",
           answer=f"{answer}; Ray starts in {one['start_seconds']:.0f} s; "
                  f"with a worker killed in the middle {killed['lost']} rows are lost and {killed['doubled']} doubled; "
                  f"the process that directs holds {two['driver_memory_mb']} MB at most; "
                  f"on paper, 100 million such faces take {hours['core_hours']:,.0f} hours of one core",
           data=data, model=args.model, part_size=part,
           command="python bench/scale.py" + (" --data fer2013.csv" if args.data else "") + changed)
    return True


if __name__ == "__main__":
    sys.exit(not main())
