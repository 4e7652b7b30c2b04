"""How long does an import take? Fresh processes, alternating; the median of several, less what Python itself takes.

Each process also says which heavy libraries it loaded. The files are in the disk cache, as they are when somebody
runs a command twice: one round of each is made before the clock counts.
"""
import json
import statistics
import subprocess
import sys

from _report import ROOT, measure, report

REPEAT = 9
LIMIT = 0.5
STATEMENTS = {"import fer_nbdev": "import fer_nbdev", "from fer_nbdev import predict": "from fer_nbdev import predict"}
HEAVY = ("torch", "torchvision", "fastai", "pandas", "sklearn")


def run(statement):
    "What a fresh process that runs `statement` has loaded of HEAVY."
    code = f"{statement}\nimport sys\nprint([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "bench", capture_output=True, text=True, check=True)
    return json.loads(done.stdout.replace("'", '"'))


def main():
    statements = {"nothing": "", **STATEMENTS}
    loaded = {name: run(code) for name, code in statements.items()}
    seconds = {name: [] for name in statements}
    for _ in range(REPEAT):
        for name, code in statements.items():
            seconds[name] += measure(lambda: run(code), 1)
    median = {name: statistics.median(s) for name, s in seconds.items()}
    took = {name: round(median[name] - median["nothing"], 3) for name in STATEMENTS}
    fine = all(t < LIMIT for t in took.values()) and not any(loaded.values())
    report("import_time",
           {"seconds": took, "python_itself": round(median["nothing"], 3), "repeat": REPEAT,
            "all_seconds": {name: [round(x, 3) for x in s] for name, s in seconds.items()},
            "heavy_libraries_loaded": loaded, "within_limits": fine},
           question="How long does an import take?",
           answer="; ".join(f"`{name}` {t:.2f} s" for name, t in took.items())
                  + ("; neither torch nor fastai is loaded" if not any(loaded.values()) else "; loads heavy libraries"),
           limit_seconds=LIMIT)
    return fine


if __name__ == "__main__":
    sys.exit(not main())
