"""What every benchmark here shares: timing, and one JSON file a question with the machine it ran on.

    from _report import measure, report
    seconds = measure(lambda: f(x), repeat=5)
    report("my_question", {"seconds": min(seconds)}, data="fer2013.csv")

writes `bench/results/my_question.json`. Nothing in there is typed by hand.
"""
import contextlib
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("fer_nbdev", "numpy", "opencv-python", "opencv-python-headless", "onnxruntime", "matplotlib", "pillow",
            "typer", "pandas", "scikit-learn", "torch", "torchvision", "fastai", "timm", "onnx", "nbdev")


def measure(f, repeat=5):
    "Seconds of `repeat` calls of `f`, in the order they were made. Warm up before, if that is what you ask."
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        f()
        seconds.append(time.perf_counter() - start)
    return seconds


@contextlib.contextmanager
def on_cores(n):
    "What is started inside runs on the last `n` usable cores, where the system can do that."
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[-n:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _cpu():
    "The processor's name: `platform.processor()` is empty or just 'x86_64' on Linux."
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def _memory_gb():
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def _gpu():
    "The GPU's name, only where the benchmark has imported torch itself: a light one must not import it here."
    torch = sys.modules.get("torch")
    return torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else None


def hardware():
    "The machine: processor, usable cores, threads asked for, memory, GPU, load before the run was reported."
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": _cpu(), "cores": cores, "memory_gb": _memory_gb(), "gpu": _gpu(),
            "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
            "load_average": [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None}


def _git(*args):
    done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def commit():
    "The commit that was measured; ends in '+' if the tree (results aside) differs from it, None without git."
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--", ".", ":(exclude)bench/results")
    except FileNotFoundError:
        return None
    return None if head is None else head + ("+" if changed else "")


def versions(packages=PACKAGES):
    "Installed versions of `packages`; what is not installed is left out."
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return found


def earlier(name):
    "What an earlier call reported, with empty results where there was none: for what grows over several calls or machines."
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"results": {}}


def report(name, results, **context):
    """Write `bench/results/NAME.json` whole or not at all, print it, and return its path.

    `results` are the figures. `context` says what else a reader needs (data, seed, limits) and may replace
    any of the fields that are filled in here, for instance `versions` of another environment.
    """
    record = {"name": name, "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
              "commit": commit(), "command": f"python bench/{Path(sys.argv[0]).name}",
              "hardware": hardware(), "platform": platform.platform(), "python": platform.python_version(),
              "versions": versions(), **context, "results": results}
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    part = RESULTS / f".{name}.{os.getpid()}.part"
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    print(text, end="")
    return path
