"""How fast is FER2013's csv read? Each read in a fresh process: seconds of the call alone, and the process's peak memory.

Three readers take turns: `read_fer2013` without its cache, `read_fer2013` from its cache, and what most notebooks do,
`pandas.read_csv` and then `np.array(pixels.split())` row by row. The imports are made before the clock starts. The csv
itself is in the disk cache, since it is read once before the first round: this measures parsing, not the disk. All
readers must return the same faces and labels, or the run fails.

The csv is reached through a link in a temporary folder, so that no cache is written, read or replaced beside it.
"""
import argparse
import hashlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import _report
from _report import ROOT, report

READERS = ("read_fer2013", "read_fer2013 from cache", "pandas and a loop")
LIMITS = {"seconds": 5, "peak_gb": 1.2, "cached_seconds": .2}
WHOLE_MB = 290  # the limits are for the challenge's csv of 301 MB, not for a smaller one
EXAMPLES = """examples:
  python bench/read_csv.py --data fer2013.csv               the measurement, about two minutes
  python bench/read_csv.py                                  the same on drawn faces, without limits
  python bench/read_csv.py --data fer2013.csv --limit 300 --repeat 1 --out /tmp    a quick try"""


def peak_gb():
    "Most memory that this process has held so far, in units of 1e9 bytes."
    status = Path("/proc/self/status")
    if status.exists():  # unlike ru_maxrss, this does not count what the parent held before the process began
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1e9
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def read_as_notebooks_do(path):
    "Faces, labels and splits by pandas and a Python loop over the rows."
    import numpy as np
    import pandas as pd
    table = pd.read_csv(path)
    table.columns = table.columns.str.strip()
    pixels = np.array([np.array(p.split(), dtype=np.uint8).reshape(48, 48) for p in table["pixels"]])
    return pixels, table["emotion"].to_numpy(), table["Usage"].to_numpy(str)


def read_once(reader, path):
    "In a process of its own: read `path`, print seconds, peak memory and a digest of what was read."
    import numpy as np
    if reader == READERS[2]:
        import pandas  # noqa: F401
    else:
        from fer_nbdev.data import read_fer2013
    start = time.perf_counter()
    if reader == READERS[2]:
        pixels, emotion, usage = read_as_notebooks_do(path)
    else:
        table = read_fer2013(path, cache=reader == READERS[1])
        pixels, emotion, usage = table.pixels, table.emotion, table.usage
    seconds, peak = time.perf_counter() - start, peak_gb()
    digest = hashlib.sha256(pixels.tobytes() + np.asarray(emotion, np.int64).tobytes() + "".join(usage).encode()).hexdigest()
    print(json.dumps({"seconds": seconds, "peak_gb": peak, "rows": len(pixels), "digest": digest}))


def run(reader, path):
    "What `read_once` prints in a fresh process."
    done = subprocess.run([sys.executable, __file__, "--once", reader, "--data", str(path)], cwd=ROOT / "bench",
                          stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def write_csv(path, rows):
    "A csv in the challenge's layout with `rows` drawn faces."
    from fer_nbdev.data import synthetic_faces
    table = synthetic_faces(rows)
    with open(path, "w", encoding="ascii") as f:
        f.write("emotion,pixels,Usage\n")
        for face, emotion, usage in zip(table.pixels, table.emotion, table.usage):
            f.write(f"{emotion},{' '.join(map(str, face.ravel().tolist()))},{usage}\n")


def place_csv(folder, data, limit):
    "The csv to read, in `folder`: a link to `data`, its first `limit` rows, or drawn faces. Returns its path."
    path = folder / (data.name if data else "synthetic.csv")
    if data is None:
        write_csv(path, limit or 2000)
    elif limit:
        with open(data, "rb") as source, open(path, "wb") as f:
            f.writelines(line for line, _ in zip(source, range(limit + 1)))
    else:
        try:
            path.symlink_to(data.resolve())
        except OSError:  # Windows lets few users make links
            shutil.copyfile(data, path)
    return path


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="PATH", help="fer2013.csv of the challenge; without it a csv of drawn faces is made")
    parser.add_argument("--limit", type=int, metavar="N",
                        help="read only the first N rows of an uncompressed csv, or draw N faces (default: all rows, 2000 faces)")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="rounds; the medians are reported (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=_report.RESULTS, metavar="FOLDER", help="where read_csv.json is written (default: bench/results)")
    parser.add_argument("--once", choices=READERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.data is not None and not args.data.is_file():
        parser.error(f"no csv at {args.data}")
    if args.repeat < 1 or args.limit is not None and args.limit < 1:
        parser.error("--repeat and --limit take numbers from 1 up")
    if args.limit and args.data and args.data.suffix.lower() in (".gz", ".xz", ".zip"):
        parser.error(f"--limit cuts plain csv files only, not {args.data.name}")
    return args


def main():
    args = parse_args()
    if args.once:
        read_once(args.once, args.data)
        return True
    _report.RESULTS = args.out
    with tempfile.TemporaryDirectory() as tmp:
        path = place_csv(Path(tmp), args.data, args.limit)
        megabytes = path.stat().st_size / 1e6
        run(READERS[1], path)  # writes the cache, and brings the csv into the disk cache
        runs = {reader: [] for reader in READERS}
        for _ in range(args.repeat):
            for reader in READERS:
                runs[reader].append(run(reader, path))
    if len({r["digest"] for rs in runs.values() for r in rs}) > 1:
        raise RuntimeError("the readers do not return the same faces, labels and splits")
    seconds = {reader: statistics.median(r["seconds"] for r in rs) for reader, rs in runs.items()}
    peak = {reader: max(r["peak_gb"] for r in rs) for reader, rs in runs.items()}
    ours, cached, pandas = READERS
    ratio, whole = seconds[pandas] / seconds[ours], megabytes > WHOLE_MB
    within = seconds[ours] <= LIMITS["seconds"] and peak[ours] < LIMITS["peak_gb"] and seconds[cached] < LIMITS["cached_seconds"]
    rows = runs[ours][0]["rows"]
    report("read_csv",
           {"seconds": {k: round(v, 3) for k, v in seconds.items()}, "peak_gb": {k: round(v, 3) for k, v in peak.items()},
            "times_as_long": {"pandas and a loop / read_fer2013": round(ratio, 2), "read_fer2013 / from cache": round(seconds[ours] / seconds[cached], 1)},
            "repeat": args.repeat, "all_seconds": {k: [round(r["seconds"], 3) for r in rs] for k, rs in runs.items()},
            "within_limits": within if whole else None},
           question="How fast is FER2013's csv read?",
           answer=f"`read_fer2013` takes {seconds[ours]:.1f} s and at most {peak[ours]:.2f} GB for {rows:,} faces ({megabytes:.0f} MB), "
                  f"{seconds[cached]:.2f} s from its cache; "
                  f"pandas and a loop take {seconds[pandas]:.1f} s and {peak[pandas]:.2f} GB, {ratio:.1f} times as long",
           data={"source": path.name, "rows": rows, "megabytes": round(megabytes, 1)}, limits=LIMITS,
           command="python bench/read_csv.py" + (f" --data {args.data.name}" if args.data else "") + (f" --limit {args.limit}" if args.limit else ""))
    return within or not whole


if __name__ == "__main__":
    sys.exit(not main())
