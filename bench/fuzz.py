"""Does any damaged file make a reader crash, hang, fill the memory, or fail with an error that is not documented?

The cases of `tests/_fuzz.py` for as long as one likes: real files (pictures of every format, csv, archives, cards, networks, recipes,
findings, checkpoints, weights) with bits flipped, sizes changed, pieces cut, doubled, spliced. Each target runs in processes of its own, so that a
crash inside a native decoder is a failure of that case and not the end. What a reader answers is checked against a simple-minded
reader where there can be one. A case is a failure if its answer is wrong, its error is of another kind than documented or does not name
the file, if it takes more than 20 seconds or 1.5 GB of address space, or ends the process. Failing inputs are kept in `--keep`.
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import _fuzz  # noqa: E402
from _report import report  # noqa: E402

EXAMPLES = """examples:
  python bench/fuzz.py                                     six minutes over all targets
  python bench/fuzz.py --minutes 60 --seed 7               an hour, other cases
  python bench/fuzz.py --minutes .5 --out /tmp             a quick try
  python bench/fuzz.py --only "image path" --minutes 10    one target"""


def row(found, keep):
    "What one target came to, with its failing inputs kept."
    name, seed = found["target"], found["seed"]
    failures = {kind: dict(times=len(at), cases=at[:5], kept=[_fuzz.save_case(name, seed, n, keep).name for n in at[:2]])
                for kind, at in found["failures"].items()}
    return dict(cases=found["cases"], answered=found["ok"], refused=found["error"], failures=failures, seconds=round(found["seconds"], 1),
                cases_a_second=round(found["cases"] / found["seconds"]), peak_mb=round(found["peak_mb"], 1),
                most_memory_of_a_case=dict(mb=round(found["peak"][0], 1), case=found["peak"][1]),
                slowest_case=dict(seconds=round(found["slowest"][0], 3), case=found["slowest"][1]))


def main():
    p = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minutes", type=float, default=6, help="of all targets together (default: 6)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--only", action="append", choices=_fuzz.TARGETS, help="a target; may be repeated (default: all)")
    p.add_argument("--keep", type=Path, default=Path("fuzz-failures"), help="folder for inputs that failed (default: fuzz-failures)")
    p.add_argument("--out", type=Path, help="folder for fuzz.json, in place of bench/results")
    a = p.parse_args()
    if a.out:
        import _report
        _report.RESULTS = a.out
    targets, results = a.only or list(_fuzz.TARGETS), {}
    for name in targets:
        results[name] = row(_fuzz.run(name, seed=a.seed, seconds=60 * a.minutes / len(targets)), a.keep)
        print(f"{name}: {results[name]['cases']:,} cases, {sum(f['times'] for f in results[name]['failures'].values())} failures", file=sys.stderr)
    total = {k: sum(r[k] for r in results.values()) for k in ("cases", "answered", "refused", "seconds")}
    total["failures"] = sum(f["times"] for r in results.values() for f in r["failures"].values())
    total["cases_a_minute"] = round(60 * total["cases"] / total["seconds"])
    slowest = max(r["slowest_case"]["seconds"] for r in results.values())
    report("fuzz", dict(total=total, targets=results), seed=a.seed, minutes=a.minutes, question="Does any damaged file crash a reader?",
           answer=f"{total['cases']:,} damaged files into {len(results)} readers: {total['answered']:,} were read rightly, "
                  f"{total['refused']:,} refused by name, {total['failures']:,} failures; the slowest took {slowest:.2f} s")
    return bool(total["failures"])


if __name__ == "__main__":
    sys.exit(main())
