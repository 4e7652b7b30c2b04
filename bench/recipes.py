"""Do the six networks of five older systems reach here what they claim, and what does our recipe make of them?

Every network is trained twice. First by the recipe that carries its system's own protocol: its split, optimiser, schedule,
augmentation and epochs. Then by `fer2013`, the recipe of the bundled model, on the honest protocol: PublicTest selects the
epoch, PrivateTest is scored once at the end. Two of the older protocols test on the faces that also select; their figures
are reported because they can be compared with the claims, and are no estimate of anything.

Runs live in `--runs`, one folder each, as `fer train` makes them, and take hours on a CPU. `--train` starts or resumes
those that are not finished, all or the ones named; without it the script only collects what the runs wrote. A run that an
earlier call collected and whose folder is not under `--runs` stays in the result as it is, so that the table can grow on one
machine after another; each run names its own hardware, commit and date.

One system claims how long a prediction takes. `--latency` exports its network untrained, since no time depends on the weights,
and times it on one core; without it the figure of an earlier call stays.
"""
import argparse
import datetime
import json
import sys
import tempfile
from pathlib import Path

import _report
import numpy as np
from _report import earlier, hardware, on_cores, report

# network: (system, what it claims, the claimed accuracy to be reached, where that accuracy is measured)
CLAIMS = dict(
    emotion_detector=("convolutions and four hidden layers, one-cycle", "64.33% validation accuracy", .6433, "valid"),
    realtime_net=("VGG-like net of a real-time system", "67.94% test accuracy", .6794, "PrivateTest"),
    realtime_senet=("SE-ResNet of the same real-time system", "67.94% test accuracy", .6794, "PrivateTest"),
    sequential=("Keras sequential net", "63.2% test accuracy", .632, "last"),
    four_class=("four emotions", "75 to 85% validation accuracy", .75, "valid"),
    class_balanced=("class weights and full reports", "66.13% test accuracy", .6613, "valid"))
# what a system claims beside its accuracy, as a validation or test set of its own gave it
SYSTEM = dict(log_loss=.9585, macro_f1=.6522, macro_precision=.6779, macro_recall=.6387)
FURTHER = dict(emotion_detector=dict(log_loss=.9949), realtime_net=SYSTEM, realtime_senet=SYSTEM, class_balanced=dict(
    log_loss=1.1089, **{f"f1_{c}": f for c, f in dict(angry=.59, disgust=.60, fear=.43, happy=.87, sad=.53, surprise=.78, neutral=.64).items()}))
LATENCY = dict(emotion_detector=4.2)  # milliseconds of one prediction on a CPU
HISTORY = dict(log_loss="valid_loss", macro_f1="f1_score", macro_precision="precision_score", macro_recall="recall_score")  # the same in a history
OURS = dict(emotion_detector=["epochs=42"], realtime_net=["epochs=24"], realtime_senet=["epochs=30"], sequential=["epochs=42", "lr=.02"],
            four_class=["epochs=30", "classes=[angry, happy, neutral, sad]"], class_balanced=["epochs=24"])
# shorter than the system's own protocol, for the sake of time: ended when its claim was passed; its plateau schedule does not look ahead
SHORTER = dict(class_balanced=["epochs=54"])
TRIED = dict(four_class=["seed=1", "seed=2", "epochs=60"], realtime_senet=["seed=1"], emotion_detector=["epochs=20", "epochs=80"],
             sequential=["arch_args.init=null"])  # of the system's own protocol, where the claim was missed; runs own/NAME~SETTING
KINDS = ("own", "ours")
RUNS = [f"{kind}/{name}" for name in CLAIMS for kind in KINDS] + [f"own/{name}~{setting}" for name, settings in TRIED.items() for setting in settings]
EXAMPLES = """examples:
  python bench/recipes.py --runs runs                                             collect what is there
  python bench/recipes.py --runs runs --latency                                   time one prediction as well, half a minute
  python bench/recipes.py --runs runs --data fer2013.csv --train                  train what is missing; hours on a CPU
  python bench/recipes.py --runs runs --data fer2013.csv --train own/sequential   one of them"""


def recipe_of(kind, name):
    "The recipe of a run: the system's own, or `fer2013` with its network."
    from fer_nbdev.recipe import read_recipe
    if kind == "own":
        name, *settings = name.split("~")
        return read_recipe(name).set(SHORTER.get(name, []) + settings)
    return read_recipe("fer2013").set([f"name={name}", f"arch={name}", "arch_args={}", *OURS[name]])


def train_run(folder, kind, name, table):
    "Train a run, or go on with it, and export it with its scores; the older systems did not calibrate."
    from fer_nbdev.calibrate import Calibration
    from fer_nbdev.export import export_run
    from fer_nbdev.train import train
    begun = (folder / "run.json").exists()
    k = train(None if begun else recipe_of(kind, name), table, folder, resume=True).dls.c
    export_run(folder, folder / "model", table, calibration=Calibration((1.,) * k, (0.,) * k, "none") if kind == "own" else None)


def class_f1(scores):
    "F1 of every class over the faces of all test splits together."
    classes = next(iter(scores))["classes"]
    counts = sum(np.array(s["confusion"]) for s in scores)
    right, labelled, said = counts.diagonal(), counts.sum(1), counts.sum(0)
    return {c: round(float(2 * r / max(1, n + m)), 4) for c, r, n, m in zip(classes, right, labelled, said)}


def read_run(folder):
    "What a finished run wrote about itself, or None."
    if not (folder / "model" / "card.json").exists():
        return None
    about, history, card = (json.loads((folder / f).read_text(encoding="utf-8")) for f in ("run.json", "history.json", "model/card.json"))
    keys = ("accuracy", "macro_f1", "macro_precision", "macro_recall", "log_loss", "ece", "n")
    return {"epochs": len(history), "best_epoch": about["best_epoch"], "minutes": about["train_minutes"], "parameters": about["n_params"],
            "seed": about["recipe"]["seed"], **{k: about[k] for k in ("hardware", "commit", "date")},
            "selected_on": about["recipe"]["valid"], "valid": history[about["best_epoch"]], "last": history[-1],
            "class_f1": class_f1(card["scores"].values()), "scores": {usage: {k: s[k] for k in keys} for usage, s in card["scores"].items()}}


def collect(runs):
    "{run: what it wrote}: of the runs in `runs`, and of those that only the rows of an earlier result know."
    found = {}
    for r in earlier("recipes")["results"].get("rows", ()):
        found |= {f"{kind}/{r['network']}": r[kind] for kind in KINDS} | {f"own/{r['network']}~{setting}": run for setting, run in r.get("tried", {}).items()}
    found |= {name: run for name in RUNS if (run := read_run(runs / name))}
    return {name: run for name, run in found.items() if run}


def time_network(name):
    "Milliseconds a face of an untrained network on one core, one by one: the median of three rounds."
    from fer_nbdev import Predictor
    from fer_nbdev.evaluate import measure_latency
    from fer_nbdev.export import export_model
    from fer_nbdev.models import create_model
    recipe = recipe_of("own", name)
    with tempfile.TemporaryDirectory() as folder, on_cores(1):
        export_model(create_model(recipe.arch, **recipe.arch_args), folder)
        predict_faces = Predictor(folder, threads=1, detector="none").predict_faces
        ms = sorted(measure_latency(predict_faces, n=200)["single_ms"] for _ in range(3))
    return {"claim": LATENCY[name], "own": round(ms[1], 3), "threads": 1, "weights": "untrained",
            "hardware": hardware()["cpu"], "date": datetime.date.today().isoformat()}


def latencies(measure):
    "{network: milliseconds of one prediction}, measured now or by an earlier call."
    if measure:
        return {name: time_network(name) for name in LATENCY}
    known = {r["network"]: r["further"].get("latency_ms") for r in earlier("recipes")["results"].get("rows", ())}
    return {name: known[name] for name in LATENCY if known.get(name)}


def reached(run, where):
    "The accuracy that a system's claim speaks of."
    return run["scores"]["PrivateTest"]["accuracy"] if where == "PrivateTest" else run[where]["accuracy"]


def further(name, run, where, latency=None):
    "What a system claims beside its accuracy, and what its reproduction reaches."
    def here(key):
        if key.startswith("f1_"):
            return run["class_f1"][key[3:]]
        if key == "log_loss" and where == "valid" and isinstance(run["selected_on"], str):  # of whole test splits, without the class weights of the history's
            tests = run["scores"].values()
            return sum(s["n"] * s["log_loss"] for s in tests) / sum(s["n"] for s in tests)
        return run["scores"]["PrivateTest"][key] if where == "PrivateTest" else run[where][HISTORY[key]]
    told = {key: {"claim": claim, "own": run and round(here(key), 4)} for key, claim in FURTHER.get(name, {}).items()}
    return told | ({"latency_ms": latency} if latency else {})


def row(name, found, took):
    "One line of the table: claim, reproduction, and the same network under our recipe."
    system, claim, target, where = CLAIMS[name]
    own, ours = (found.get(f"{kind}/{name}") for kind in KINDS)
    own_accuracy = own and round(reached(own, where), 4)
    tried = {setting: found.get(f"own/{name}~{setting}") for setting in TRIED.get(name, ())}
    return {"network": name, "system": system, "claim": claim, "target": target, "measured_on": where, "own_accuracy": own_accuracy,
            "misses_by": own and round(max(0., target - own_accuracy), 4), "shorter": SHORTER.get(name, []),
            "own": own, "ours": ours, "further": further(name, own, where, took.get(name)),
            "tried": {setting: {**run, "reached": round(reached(run, where), 4)} for setting, run in tried.items() if run},
            "ours_accuracy": ours and round(ours["scores"]["PrivateTest"]["accuracy"], 4)}


def answer(rows):
    "The table in a sentence."
    done = [r for r in rows if r["own"]]
    reach = [r["network"] for r in done if not r["misses_by"]]
    text = (f"of {len(done)} networks trained by their own protocol {len(reach)} reach{'es' * (len(reach) == 1)} the claim"
            + f": {', '.join(reach)}" * bool(reach))
    if again := [f"{r['network']} with {setting}" for r in done if r["misses_by"] for setting, run in r["tried"].items() if run["reached"] >= r["target"]]:
        text += f", and {', '.join(again)}"
    if len(done) < len(rows):
        text += f" ({len(rows) - len(done)} are not trained yet)"
    if short := [f"{r['network']} was given {', '.join(r['shorter'])}" for r in done if r["shorter"]]:
        text += f"; for the sake of time {'; '.join(short)}"
    seven = [f"{r['network']} {r['ours_accuracy']:.1%}" for r in rows if r["ours"]]
    return text + (f"; on PrivateTest our recipe makes of them: {', '.join(seven)}" if seven else "")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, metavar="FOLDER", help="where the runs are: own/NAME and ours/NAME")
    parser.add_argument("--data", type=Path, metavar="PATH", help="FER2013: its csv or class folders; for --train")
    parser.add_argument("--train", nargs="*", metavar="KIND/NAME", help="train these runs first (default: all that the table lacks)")
    parser.add_argument("--latency", action="store_true", help="time the networks of which a time is claimed")
    parser.add_argument("--out", type=Path, default=_report.RESULTS, metavar="FOLDER", help="where recipes.json is written (default: bench/results)")
    args = parser.parse_args()
    if unknown := sorted(set(args.train or ()) - set(RUNS)):
        parser.error(f"unknown run {', '.join(unknown)}: expected among {', '.join(RUNS)}")
    if args.train is not None and (args.data is None or not args.data.exists()):
        parser.error(f"--train needs --data, and there is nothing at {args.data}")
    return args


def write(args, took):
    "Collect all runs there are, and write the table."
    found = collect(args.runs)
    rows = [row(name, found, took) for name in CLAIMS]
    report("recipes", {"rows": rows}, question="Do the networks of five older systems reach their claims here, and what does our recipe make of them?",
           answer=answer(rows), command="python bench/recipes.py --runs runs --data fer2013.csv --train")


def main():
    args = parse_args()
    _report.RESULTS = args.out
    took = latencies(args.latency)
    if args.train is not None:
        from fer_nbdev.data import read_fer2013
        table = read_fer2013(args.data)
        for run in args.train or [r for r in RUNS if r not in collect(args.runs)]:
            print(run, file=sys.stderr)
            train_run(args.runs / run, *run.split("/"), table)
            write(args, took)
    write(args, took)


if __name__ == "__main__":
    main()
