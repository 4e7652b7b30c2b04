"""How does fer_nbdev compare with what one would install instead? One run, side by side, each library in its own environment.

Environments are made by pip under --envs and reused when they are there (ours, a plain `pip install .` of this tree, as long
as the package is the same). Each measurement is a process of its own, without a network and with an empty home folder; the
contestants take turns, round by round, after a round that fills the disk cache. What is asked:

  face     a face that is cut out -> probabilities, one core, batch 1 and 64: by the library's own path (`answer`), for arrays
           (`faces`) and by the bare graph with its resize (`bare`); median of calls, then of rounds
  photo    the path of a 512 x 600 portrait -> predictions, two cores, reading the jpeg included: wall and CPU time
  start    a fresh process: import and first prediction of that portrait, and the import alone, until the answer is printed
  install  megabytes of the environment and packages in it, pip included
  scores   PrivateTest of FER2013 through each library's own preprocessing (--data); nothing is selected on it

How each library is called stands in the result and in `_contestants.py`. Those that download their weights are tried, and
what they say without a network is written down.
"""
import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import _report
from _report import ROOT, on_cores, report
from install_size import copy_of_the_project, megabytes

PACKAGES = {"fer_nbdev": ["."], "fer": ["fer==25.10.3", "setuptools<81"],  # fer imports pkg_resources, which newer ones lack
            "facial-emotion-recognition": ["facial-emotion-recognition==0.3.4"], "hsemotion-onnx": ["hsemotion-onnx==0.3.1"]}
DOWNLOADS = {"hsemotion-onnx":  # which forgets the first of these imports
             "import urllib.request; from hsemotion_onnx.facial_emotions import HSEmotionRecognizer; HSEmotionRecognizer()"}
OURS, FER, OTHER = "fer_nbdev", "fer", "facial-emotion-recognition"
FACE = {"fer_nbdev fast": (OURS, "FerNbdev", {"model": "fast", "threads": 1}),
        "fer_nbdev accurate": (OURS, "FerNbdev", {"model": "accurate", "threads": 1}),
        "fer": (FER, "Fer", {"cut_out": True}), "fer, its Keras model": (FER, "Fer", {"cut_out": True, "tflite": False}),
        OTHER: (OTHER, "FacialEmotionRecognition", {})}
PHOTO = {"fer_nbdev accurate, Haar": (OURS, "FerNbdev", {"model": "accurate", "detector": "haar"}),
         "fer_nbdev accurate, YuNet": (OURS, "FerNbdev", {"model": "accurate", "detector": "yunet"}),
         "fer_nbdev fast, Haar": (OURS, "FerNbdev", {"model": "fast", "detector": "haar"}),
         "fer_nbdev fast, YuNet": (OURS, "FerNbdev", {"model": "fast", "detector": "yunet"}),
         "fer, Haar": (FER, "Fer", {}), "fer, MTCNN": (FER, "Fer", {"mtcnn": True}), f"{OTHER}, MTCNN": (OTHER, "FacialEmotionRecognition", {})}
START = {"fer_nbdev accurate, Haar": (OURS, "from fer_nbdev import predict", "predict({photo!r}, detector='haar')[0].emotion"),
         "fer_nbdev accurate, YuNet": (OURS, "from fer_nbdev import predict", "predict({photo!r}, detector='yunet')[0].emotion"),
         "fer, Haar": (FER, "from fer.fer import FER", "FER().top_emotion({photo!r})[0]"),
         "fer, MTCNN": (FER, "from fer.fer import FER", "FER(mtcnn=True).top_emotion({photo!r})[0]"),
         f"{OTHER}, MTCNN": (OTHER, "from facial_emotion_recognition import EmotionRecognition; import cv2",
                             "EmotionRecognition(device='cpu').recognise_emotion(cv2.imread({photo!r})).shape")}
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")
LONGEST = 900  # seconds for one process
CLOSED = "http://127.0.0.1:9"  # a proxy where nobody listens: no network for whoever asks through urllib, requests or curl
EXAMPLES = """examples:
  python bench/peers.py --envs ../peers --data fer2013.csv --yunet face_detection_yunet_2023mar.onnx
                              the measurement: 14 GB and the minutes they take at first, then a quarter of an hour
  python bench/peers.py --envs ../peers --quick --out /tmp                       a smoke test of a minute or two
  python bench/peers.py --envs ../peers --quick --out /tmp --only fer_nbdev      ... of ours alone"""


def python_of(env):
    return env / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def asked(name):
    "What the environment `name` is made of; for ours a digest of what goes into the package."
    if name != OURS:
        return PACKAGES[name]
    parts = [ROOT / part for part in ("settings.ini", "setup.py", "pyproject.toml", "MANIFEST.in", "fer_nbdev")]
    files = [p for p in (*parts, *sorted(parts[-1].rglob("*"))) if p.is_file() and p.suffix not in (".pyc", ".part")]
    return [".", hashlib.sha256(b"".join(str(p.relative_to(ROOT)).encode() + hashlib.sha256(p.read_bytes()).digest() for p in files)).hexdigest()]


def install(name, envs):
    "Make the environment `name` under `envs`, or take the one that is there; what it holds: megabytes, packages, versions."
    env, about, wanted = envs / name, envs / name / "about.json", asked(name)
    if about.is_file() and (known := json.loads(about.read_text(encoding="utf-8")))["asked"] == wanted:
        return known
    print(f"installing {name} ...", file=sys.stderr)
    pip = [str(python_of(env)), "-m", "pip"]
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(env)], check=True)
    subprocess.run([*pip, "uninstall", "--quiet", "--yes", "setuptools"], check=True)
    with tempfile.TemporaryDirectory() as tree:
        subprocess.run([*pip, "install", "--quiet", *PACKAGES[name]], check=True, cwd=copy_of_the_project(Path(tree)) if name == OURS else tree)
    listed = json.loads(subprocess.run([*pip, "list", "--format", "json"], capture_output=True, text=True, check=True).stdout)
    versions = {p["name"]: p["version"] for p in listed}
    own = {name, name.replace("_", "-"), name.replace("-", "_")}
    found = {"asked": wanted, "megabytes": round(megabytes(env)), "packages": len(versions.keys() - own), "versions": versions}
    about.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found


class Runner:
    "Starts measurements in the contestants' environments, without a network."

    def __init__(self, envs, home, yunet):
        self.envs, self.home, self.yunet = envs, home, yunet
        self.env = {k: v for k, v in os.environ.items() if k not in THREADS and k.lower() not in ("no_proxy", "pythonpath", "fer_yunet", "fer_cache")}
        self.env.update({k: CLOSED for k in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")},
                        HOME=str(home), USERPROFILE=str(home), XDG_CACHE_HOME=str(home / "cache"), TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES="")

    def environment(self, cores, yunet=False):
        return {**self.env, **({k: "1" for k in THREADS} if cores == 1 else {}), **({"FER_YUNET": str(self.yunet)} if yunet else {})}

    def __call__(self, action, contestant, cores, **settings):
        "The result of one action of `_contestants.py`; RuntimeError with the last line of what went wrong."
        env, cls, options = contestant
        command = [str(python_of(self.envs / env)), str(ROOT / "bench" / "_contestants.py"), action,
                   json.dumps({"class": cls, "options": options, **settings})]
        with on_cores(cores):
            done = self.start(command, self.environment(cores, options.get("detector") == "yunet"))
        if done.returncode:
            raise RuntimeError(last_line(done.stderr))
        return json.loads(done.stdout.splitlines()[-1])

    def start(self, command, env):
        "Run to the end, in a folder where nothing lies that could be imported instead."
        try:
            return subprocess.run(command, cwd=self.home, env=env, capture_output=True, text=True, timeout=LONGEST)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"took longer than {LONGEST} s") from None

    def time_start(self, env, statement, call, photo, yunet):
        "Seconds to the first prediction and to the end of the import, a fresh process each."
        said = f"{statement}\nprint('answer:', {{}}, flush=True)"
        return {"first": self.seconds_to_print(env, said.format(call.format(photo=str(photo))), yunet),
                "import": self.seconds_to_print(env, said.format("0"), yunet)}

    def seconds_to_print(self, env, code, yunet=False):
        "Seconds from the start of a fresh process until `code` has printed a line; how it ends does not count."
        command = [str(python_of(self.envs / env)), "-c", code]
        with on_cores(2), tempfile.TemporaryFile("w+") as errors:
            start = time.perf_counter()
            with subprocess.Popen(command, cwd=self.home, env=self.environment(2, yunet), stdout=subprocess.PIPE, stderr=errors,
                                  text=True) as process:
                while (line := process.stdout.readline()) and not line.startswith("answer:"):
                    pass
                took = time.perf_counter() - start
            errors.seek(0)
            if not line:
                raise RuntimeError(last_line(errors.read()))
        return took


def last_line(text):
    return ([line.strip() for line in text.splitlines() if line.strip()] or ["no message"])[-1][:300]


def take_turns(jobs, rounds, skipped):
    "What each job (kind, name) -> function returned in each round; one that fails is left out from then on, with its reason."
    results = {key: [] for key in jobs}
    for i in range(rounds + 1):  # the first round is a warm-up of the disk cache
        for key, job in jobs.items():
            if key in results:
                print(f"{'warm-up' if i == 0 else f'round {i} of {rounds}'}: {', '.join(key)}", file=sys.stderr)
                try:
                    results[key].append(job())
                except RuntimeError as e:
                    print(f"skipped: {', '.join(key)}: {e}", file=sys.stderr)
                    skipped.append({"what": ", ".join(key), "why": str(e)})
                    del results[key]
    return {key: found[1:] for key, found in results.items()}


def median_of(rounds, *keys):
    "Each figure's median over the rounds, and all of them."
    return {**{k: round(statistics.median(r[k] for r in rounds), 4) for k in keys}, "rounds": {k: [round(r[k], 4) for r in rounds] for k in keys}}


def face_rows(found):
    rows = []
    for name, rounds in found.items():
        for same in zip(*rounds):  # one way at one batch size, in every round
            figures = median_of(same, "ms", "best_ms")
            rows.append({"contestant": name, "way": same[0]["way"], "called": same[0]["called"], "batch": same[0]["batch"],
                         "call_ms": figures["ms"], "best_call_ms": min(figures["rounds"]["best_ms"]),
                         "faces_per_second": round(1000 * same[0]["batch"] / figures["ms"], 1), "rounds_call_ms": figures["rounds"]["ms"]})
    return rows


def photo_rows(found):
    rows = []
    for name, rounds in found.items():
        figures = median_of(rounds, "ms", "best_ms", "cpu_ms")
        rows.append({"contestant": name, "called": rounds[0]["called"], "faces": rounds[0]["faces"], "emotion": rounds[0]["emotion"],
                     "wall_ms": figures["ms"], "best_wall_ms": min(figures["rounds"]["best_ms"]), "cpu_ms": figures["cpu_ms"],
                     "rounds_wall_ms": figures["rounds"]["ms"], "rounds_cpu_ms": figures["rounds"]["cpu_ms"]})
    return rows


def start_rows(found, itself):
    return [{"contestant": name, "first_prediction_seconds": round(statistics.median(r["first"] for r in rounds), 3),
             "import_seconds": round(statistics.median(r["import"] for r in rounds) - itself, 3),
             "rounds": {k: [round(r[k], 3) for r in rounds] for k in ("first", "import")}, "import": START[name][1], "call": START[name][2]}
            for name, rounds in found.items()]


def score_rows(runner, contestants, table, folder, compare, skipped):
    "Scores of each contestant on the table's faces, by `fer_nbdev.evaluate.score` here."
    import numpy as np
    from fer_nbdev.evaluate import score
    np.save(folder / "scored.npy", table.pixels)
    rows = []
    for name, contestant in contestants.items():
        print(f"scores: {name}", file=sys.stderr)
        try:
            said = runner("probs", contestant, 2, faces=str(folder / "scored.npy"), out=str(folder / "probs.npy"), compare=compare)
        except RuntimeError as e:
            print(f"skipped: scores, {name}: {e}", file=sys.stderr)
            skipped.append({"what": f"scores, {name}", "why": str(e)})
            continue
        scores = score(np.load(folder / "probs.npy"), table.emotion, table.classes)
        rows.append({"contestant": name, **said, "n": scores["n"], **{k: round(scores[k], 5) for k in ("accuracy", "macro_f1", "log_loss", "ece")},
                     "standard_error": round((scores["accuracy"] * (1 - scores["accuracy"]) / scores["n"]) ** .5, 5),
                     "f1": {c: round(v["f1"], 4) for c, v in scores["per_class"].items()}})
    return rows


def try_download(runner, name):
    "What a library that downloads its weights says without a network."
    done = runner.start([str(python_of(runner.envs / name)), "-c", DOWNLOADS[name]], runner.environment(2))
    why = "runs offline after all" if done.returncode == 0 else f"not runnable offline, its weights are downloaded: {last_line(done.stderr)}"
    return {"what": name, "why": why, "tried": DOWNLOADS[name]}


def find(rows, value, **where):
    "The figure of the row that fits, or None."
    return next((r[value] for r in rows if all(r[k] == v for k, v in where.items())), None)


def check_targets(results):
    "Each target with the figure of this run; None where the figure is missing."
    face, photo, start, size = (results[k] for k in ("face", "photo", "start", "install"))

    def one(name, way):
        return find(face, "call_ms", contestant=name, way=way, batch=1)

    def each(name, *ways):
        "Milliseconds a face at batch 64, by the quickest way."
        speeds = [find(face, "faces_per_second", contestant=name, way=way, batch=64) for way in ways]
        return 1000 / max(speeds) if all(speeds) else None
    half = each("fer", "answer", "bare", "bare, one batch")
    rows = [("fast, one face, ms: at most fer's own path", one("fer_nbdev fast", "answer"), one("fer", "answer")),
            ("fast, one face, ms: at most fer's bare interpreter", one("fer_nbdev fast", "bare"), one("fer", "bare")),
            ("accurate, one face, ms", one("fer_nbdev accurate", "answer"), 4),
            ("fast, batch 64, ms a face: at most half of fer's best", each("fer_nbdev fast", "answer"), half and half / 2),
            ("photo with YuNet, wall ms", find(photo, "wall_ms", contestant="fer_nbdev accurate, YuNet"), 15),
            ("photo with Haar, wall ms", find(photo, "wall_ms", contestant="fer_nbdev accurate, Haar"), 45),
            ("first prediction, seconds", find(start, "first_prediction_seconds", contestant="fer_nbdev accurate, Haar"), 1),
            ("import, seconds", find(start, "import_seconds", contestant="fer_nbdev accurate, Haar"), .3),
            ("install, MB", find(size, "megabytes", contestant="fer_nbdev"), 500), ("packages", find(size, "packages", contestant="fer_nbdev"), 28)]
    return [{"target": name, "measured": got and round(got, 4), "at_most": limit and round(limit, 4), "met": got <= limit if got and limit else None}
            for name, got, limit in rows]


def answer_of(results):
    "What the front page shows: for each library what was measured of it."
    def tell(name, env):
        photos = [f"{r['wall_ms']:.0f} ms a photo by {r['contestant'].removeprefix(name + ', ')}" for r in results["photo"]
                  if r["contestant"].startswith(name + ", ")]
        start = [r["first_prediction_seconds"] for r in results["start"] if r["contestant"] == f"{name}, Haar"]
        said = [(find(results["scores"], "accuracy", contestant=name), "{:.1%} on PrivateTest"),
                (find(results["face"], "call_ms", contestant=name, way="answer", batch=1), "{:.2f} ms a face"), *((text, "{}") for text in photos),
                *((seconds, "{:.1f} s to the first prediction") for seconds in start),
                (find(results["install"], "megabytes", contestant=env) if "fast" not in name else None, "{:,.0f} MB")]
        said = [form.format(value) for value, form in said if value is not None]
        return f"`{name}` " + ", ".join(said) if said else ""
    libraries = (("fer_nbdev accurate", OURS), ("fer_nbdev fast", OURS), (FER, FER), (OTHER, OTHER))
    return "; ".join(filter(None, (tell(*library) for library in libraries)))


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", type=Path, required=True, metavar="FOLDER", help="where the environments are, or are made")
    parser.add_argument("--data", type=Path, metavar="PATH", help="FER2013: its csv or class folders; without it nothing is scored, and drawn faces are timed")
    parser.add_argument("--yunet", type=Path, default=os.environ.get("FER_YUNET"), metavar="FILE",
                        help="a YuNet .onnx (default: FER_YUNET); without it YuNet is left out")
    parser.add_argument("--only", nargs="+", choices=PACKAGES, default=list(PACKAGES), metavar="NAME", help=f"some of: {', '.join(PACKAGES)}")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="how often each contestant takes its turn (default: 5)")
    parser.add_argument("--quick", action="store_true", help="one short round and 200 faces: does everything run? Needs --out")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where peers.json is written (default: bench/results)")
    args = parser.parse_args()
    for path in (args.data, args.yunet):
        if path is not None and not Path(path).exists():
            parser.error(f"there is no {path}")
    if args.quick and args.out is None:
        parser.error("--quick needs --out, so that bench/results keeps what was measured")
    if args.rounds < 1:
        parser.error(f"--rounds must be 1 or more, got {args.rounds}")
    if args.envs.resolve().is_relative_to(ROOT):
        parser.error("--envs must be outside the project, which is copied and installed from")
    args.envs, args.yunet = args.envs.absolute(), args.yunet and Path(args.yunet).absolute()
    return args


def jobs_for(runner, args, photo, faces, installed, skipped):
    "(kind, name) -> what measures it once, for the contestants that are there."
    if args.yunet is None:
        print("skipped: YuNet, there is no model: pass --yunet or set FER_YUNET", file=sys.stderr)
        skipped.append({"what": "YuNet", "why": "no model was given"})

    def usable(contestants):
        return {name: c for name, c in contestants.items() if c[0] in installed and (args.yunet or "YuNet" not in name)}.items()
    seconds = .2 if args.quick else 1.
    return {**{("face", name): partial(runner, "faces", c, 1, faces=str(faces), batches=[1, 64], seconds=seconds) for name, c in usable(FACE)},
            **{("photo", name): partial(runner, "photo", c, 2, photo=str(photo), seconds=seconds) for name, c in usable(PHOTO)},
            **{("start", name): partial(runner.time_start, *c, photo, "YuNet" in name) for name, c in usable(START)}}


def install_all(args, skipped):
    "name -> what was installed; an installation that fails is left out, with its reason."
    installed = {}
    for name in args.only:
        try:
            installed[name] = install(name, args.envs)
        except subprocess.CalledProcessError as e:
            print(f"skipped: {name}: {e}", file=sys.stderr)
            skipped.append({"what": name, "why": f"could not be installed: {e}"})
    return installed


def main():
    args = parse_args()
    import numpy as np
    from fer_nbdev.core import sample_portrait
    from fer_nbdev.data import read_fer2013, synthetic_faces
    args.envs.mkdir(parents=True, exist_ok=True)
    skipped = []
    installed = install_all(args, skipped)
    table = read_fer2013(args.data).split("PrivateTest")[:200 if args.quick else None] if args.data else None
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        (tmp / "home").mkdir()
        runner = Runner(args.envs, tmp / "home", args.yunet)
        np.save(tmp / "faces.npy", (table.pixels if table is not None and len(table) >= 64 else synthetic_faces(64).pixels)[:64])
        jobs = jobs_for(runner, args, sample_portrait(), tmp / "faces.npy", installed, skipped)
        found = take_turns(jobs, 1 if args.quick else args.rounds, skipped)
        of = {kind: {name: rounds for (k, name), rounds in found.items() if k == kind} for kind in ("face", "photo", "start")}
        itself = statistics.median(runner.seconds_to_print(name, "print('answer:', flush=True)") for _ in range(3) for name in installed)
        contestants = {name: c for name, c in FACE.items() if c[0] in installed}
        scores = score_rows(runner, contestants, table, tmp, min(200, len(table)), skipped) if table is not None else []
        skipped += [try_download(runner, name) for name in DOWNLOADS if name in installed]
    results = {"face": face_rows(of["face"]), "photo": photo_rows(of["photo"]), "start": start_rows(of["start"], itself),
               "python_itself_seconds": round(itself, 3), "scores": scores,
               "install": [{"contestant": name, "pip_install": PACKAGES[name], **{k: about[k] for k in ("megabytes", "packages")}}
                           for name, about in installed.items()],
               "not_measured": skipped}
    results["targets"] = check_targets(results)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        _report.RESULTS = args.out
    report("peers", results, question="How does it compare with what one would install instead?", answer=answer_of(results),
           versions={name: about["versions"] for name, about in installed.items()}, rounds=1 if args.quick else args.rounds,
           cores={"face": 1, "photo": 2, "start": 2, "pinned": hasattr(os, "sched_setaffinity")}, yunet=args.yunet and args.yunet.name,
           data={"source": Path(table.source).name, "faces": len(table), "split": "PrivateTest"} if table is not None else None,
           command="python bench/peers.py --envs ../peers" + (f" --data {args.data.name}" if args.data else "")
                   + (f" --yunet {args.yunet.name}" if args.yunet else ""))
    return all(t["met"] is not False for t in results["targets"])


if __name__ == "__main__":
    sys.exit(not main())
