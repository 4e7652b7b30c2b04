"""How long does it take from a fresh process to an import, and to the first prediction? The median of several, less what Python itself takes.

Fresh processes take turns. Each says which heavy libraries it loaded. The files are in the disk cache, as they are when somebody
runs a command twice: one round of each is made before the clock counts. The first prediction is that of the portrait inside
matplotlib, by path, with the bundled model; another process goes through its steps one by one and says what each of them costs.
"""
import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import _report
from _report import ROOT, measure, report

LIMITS = {"import": .3, "first prediction": 1.}
HEAVY = ("torch", "torchvision", "fastai", "pandas", "sklearn")
EXAMPLES = """examples:
  python bench/import_time.py                              the measurement, a minute
  python bench/import_time.py --repeat 2 --out /tmp        a quick try"""
STEPS = """
import json, time
steps, start = {}, time.perf_counter()
def step(name):
    global start
    steps[name], start = time.perf_counter() - start, time.perf_counter()
import numpy; step("import numpy")
from fer_nbdev import Predictor
from fer_nbdev.core import read_image
from fer_nbdev.detect import crop_faces, detect_faces; step("import fer_nbdev")
import PIL.Image; step("import PIL")
import cv2; step("import cv2")
import onnxruntime; step("import onnxruntime")
predictor = Predictor(); step("check the model folder")
predictor.predict_faces(numpy.zeros((1, 48, 48), numpy.uint8)); step("open the session, run once")
image = read_image({photo!r}); step("read the photo")
boxes = detect_faces(image, {detector!r}); step("find the faces")
predictor.predict(image, boxes); step("crop and infer")
print(json.dumps(steps))
"""


def run(statement):
    "What a fresh process that runs `statement` has loaded of HEAVY."
    code = f"{statement}\nimport sys\nprint([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "bench", capture_output=True, text=True, check=True)
    return json.loads(done.stdout.replace("'", '"'))


def steps(photo, detector, repeat):
    "Milliseconds of each step on the way to the first prediction, medians."
    command = [sys.executable, "-c", STEPS.replace("{photo!r}", repr(photo)).replace("{detector!r}", repr(detector))]
    runs = [json.loads(subprocess.run(command, cwd=ROOT / "bench", capture_output=True, text=True, check=True).stdout) for _ in range(repeat)]
    return {name: round(1000 * statistics.median(r[name] for r in runs), 1) for name in runs[0]}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=9, metavar="N", help="processes of each kind (default: %(default)s)")
    parser.add_argument("--detector", default="haar", help="see detect_faces (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=_report.RESULTS, metavar="FOLDER", help="where import_time.json is written (default: bench/results)")
    args = parser.parse_args()
    if args.repeat < 1:
        parser.error("--repeat takes a number from 1 up")
    return args


def main():
    args = parse_args()
    _report.RESULTS = args.out
    from fer_nbdev.core import sample_portrait
    photo = str(sample_portrait())
    statements = {"nothing": "", "import fer_nbdev": "import fer_nbdev", "from fer_nbdev import predict": "from fer_nbdev import predict",
                  "first prediction": f"from fer_nbdev import predict\nassert predict({photo!r}, detector={args.detector!r})"}
    loaded = {name: run(code) for name, code in statements.items()}
    seconds = {name: [] for name in statements}
    for _ in range(args.repeat):
        for name, code in statements.items():
            seconds[name] += measure(lambda: run(code), 1)
    median = {name: statistics.median(s) for name, s in seconds.items()}
    took = {name: round(median[name] - median["nothing"], 3) for name in statements if name != "nothing"}
    within = {name: t <= LIMITS.get(name, LIMITS["import"]) for name, t in took.items()}
    report("import_time",
           {"seconds": took, "python_itself": round(median["nothing"], 3), "repeat": args.repeat,
            "all_seconds": {name: [round(x, 3) for x in s] for name, s in seconds.items()},
            "steps_of_the_first_prediction_ms": steps(photo, args.detector, args.repeat),
            "heavy_libraries_loaded": loaded, "within_limits": all(within.values()) and not any(loaded.values())},
           question="How long does an import take, and the first prediction of a fresh process?",
           answer="; ".join(f"`{name}` {t:.2f} s" if "import" in name else f"the {name} of a photo, import included, {t:.2f} s" for name, t in took.items())
                  + ("; neither torch nor fastai is loaded" if not any(loaded.values()) else "; loads heavy libraries"),
           limits=LIMITS, detector=args.detector)
    return all(within.values()) and not any(loaded.values())


if __name__ == "__main__":
    sys.exit(not main())
