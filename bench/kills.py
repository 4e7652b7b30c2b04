"""Does a writer that is killed at any moment ever leave half a file, and does a killed training always go on?

Each writer (`tests/_kills.py`) writes new versions of its file or folder over and over in a child process, which is ended by SIGKILL at a random
moment; then the readers that users have look at what is there. It must be the version that was finished last, or the one in
the making, whole. A training run of a tiny network is killed and resumed until it ends; its files must be whole every time, and its weights in the
end those of a run that nobody touched. What `fsync` before renaming costs is measured beside it.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path.insert(0, str(TESTS))
import _kills  # noqa: E402
from _report import report  # noqa: E402

EXAMPLES = """examples:
  python bench/kills.py                            25 kills of each writer, more than 300 in all
  python bench/kills.py --kills 2 --out /tmp       a quick try
  python bench/kills.py --only Training --kills 100"""


def cost_of_fsync(sizes=(2_000, 2_000_000, 20_000_000), repeat=15):
    "Size -> milliseconds of `write_whole`, with and without waiting for the disk."
    from unittest.mock import patch
    from fer_nbdev import core
    found = {}
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        for size in sizes:
            data, ms = os.urandom(size), {"with": [], "without": []}
            for _ in range(repeat):
                for how in ms:
                    with patch.object(core, "_to_disk", core._to_disk if how == "with" else lambda path: None):
                        begun = time.perf_counter()
                        with core.write_whole(Path(folder) / "file.bin") as temp: temp.write_bytes(data)
                        ms[how].append(1000 * (time.perf_counter() - begun))
            found[size] = {how: round(statistics.median(v), 2) for how, v in ms.items()}
    return found


def main():
    p = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=25, help="of each writer (default: 25)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--only", action="append", choices=[*_kills.WRITERS, "Training"], help="a writer; may be repeated (default: all)")
    p.add_argument("--out", type=Path, help="folder for kills.json, in place of bench/results")
    a = p.parse_args()
    if a.out:
        import _report
        _report.RESULTS = a.out
    found = {}
    for name in a.only or [*_kills.WRITERS, "Training"]:
        done = subprocess.run([sys.executable, "-W", "ignore", str(TESTS / "_kills.py"), name, "--kills", str(a.kills), "--seed", str(a.seed)],
                              capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}, check=False)
        if done.returncode: raise SystemExit(f"{name}: {done.stderr[-2000:]}")
        found[name] = json.loads(done.stdout.splitlines()[-1])
        print(found[name], file=sys.stderr)
    failures = {name: row["failure"] for name, row in found.items() if "failure" in row}
    kills = sum(row.get("kills", 0) for row in found.values())
    training = found.get("Training", {})
    report("kills", dict(kills=kills, failures=failures, writers=found, ms_to_write={str(k): v for k, v in cost_of_fsync().items()}), seed=a.seed,
           question="Does a kill at any moment leave half a file?",
           answer=f"{kills} kills of {len(found)} writers: {len(failures)} writers left anything but the old or the new, "
                  f"hidden temporary files aside; {training.get('resumed', 0)} killed trainings went on, to the same weights")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
