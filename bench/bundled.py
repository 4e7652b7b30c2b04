"""What do the bundled models score, and what do they cost? Everything that is said of them, for each model:

  scores     PublicTest (it selected the epoch and the calibration) and PrivateTest (scored for this, nothing is chosen on it):
             accuracy with its interval, macro F1, per class, log loss, calibration error, confusion, with one view of a face
             and with the ten of test-time averaging, and with the calibration taken out again
  copies     the same on the PrivateTest faces that are not pixel for pixel a Training face as well; and on those that do not
             show the same picture as a Training face at all, shifted, mirrored or compressed anew (the search takes minutes)
  FER+       PrivateTest against what more than half of FER+'s voters said, where that is one of the seven classes (--ferplus)
  cost       parameters, floating-point operations, size of the file, milliseconds a face on one core in batches of 1 and 64,
             as `FaceClassifier.predict_faces` gives them; the models take turns, and the median of the rounds counts
  made       recipe, seed, commit, hardware and minutes of the training, from the card

With --cards the milliseconds, and an account of the rest, are written into the models' cards, from which `fer models` and
`model_card` show them; --cards-only does so with what an earlier call measured.
"""
import argparse
import json
import math
import shlex
import statistics
import sys
from pathlib import Path

import numpy as np

import _report
from _report import earlier, on_cores, report

SPLITS = ("PublicTest", "PrivateTest")
KEPT = ("accuracy", "balanced_accuracy", "macro_f1", "log_loss", "ece")
MADE = ("recipe", "seed", "data", "teachers", "started_from", "commit", "hardware", "train_minutes", "date", "best_epoch", "calibration", "versions")
EXAMPLES = """examples:
  python bench/bundled.py --data fer2013.csv --ferplus fer2013new.csv --cards     the measurement, ten minutes
  python bench/bundled.py --cards-only                                            bundled.json into the cards, measure nothing
  python bench/bundled.py --out /tmp                                              a quick try on drawn faces"""


def count_operations(card):
    "Floating-point operations of one face through the network, or those of an ensemble, before its export (a multiplication and an addition are two)."
    if members := card.get("members"):
        return sum(count_operations({"classes": card["classes"], "img_size": card["img_size"], **m}) for m in members)
    import torch
    from fer_nbdev.models import create_model
    from torch.utils.flop_counter import FlopCounterMode
    net = create_model(card["arch"], len(card["classes"]), img_size=card["img_size"], **card["recipe"]["arch_args"]).eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        net(torch.zeros(1, 1, card["img_size"], card["img_size"]))
    return counter.get_total_flops()


def uncalibrated(name):
    "What a bundled model says without its calibration: a function from faces to probabilities."
    from fer_nbdev.calibrate import calibrate_graph
    from fer_nbdev.cards import read_model
    from fer_nbdev.export import open_graph
    return open_graph(calibrate_graph(read_model(name)[1], None))


def score_views(name, table, near):
    "Split -> the figures of one view and of ten, of what is left without copies, of one view without near copies, and without calibration."
    from fer_nbdev.evaluate import confidence_intervals, evaluate_model, score
    rows, bare = {}, uncalibrated(name)
    for split in SPLITS:
        rows[split] = {}
        for views, tta in (("one", False), ("ten", True)):
            e = evaluate_model(name, table, split, tta=tta)
            rows[split][views] = e.scores
            if not tta:
                plain = score(bare(e.table.pixels), e.table.emotion, e.table.classes)
                rows[split]["uncalibrated"] = {k: plain[k] for k in KEPT}
                copy = near.leaks(split)[e.rows]
                unseen = score(e.probs[~copy], e.table.emotion[~copy], e.table.classes)
                rows[split]["without_near_copies"] = {"copies": int(copy.sum()), "n": unseen["n"], **{k: unseen[k] for k in KEPT},
                                                      "intervals": confidence_intervals(e.probs[~copy], e.table.emotion[~copy])}
    return rows


def score_by_voters(name, table, ferplus):
    "PrivateTest, with FER+'s majority in place of the label."
    from fer_nbdev import Predictor
    from fer_nbdev.clean import ferplus_majority
    from fer_nbdev.evaluate import confidence_intervals, score
    said, _ = ferplus_majority(ferplus)
    rows = np.flatnonzero((table.usage == "PrivateTest") & np.isin(said, table.classes))
    emotion = np.array([table.classes.index(c) for c in said[rows]])
    probs = Predictor(name, detector="none").predict_faces(table.pixels[rows])
    scores = score(probs, emotion, table.classes)
    return {"n": len(rows), "left_out": int((table.usage == "PrivateTest").sum()) - len(rows), **{k: scores[k] for k in KEPT},
            "intervals": confidence_intervals(probs, emotion), "label_agrees": float((table.emotion[rows] == emotion).mean())}


def time_models(names, rounds):
    "Name -> milliseconds a face on one core; the models take turns."
    from fer_nbdev import Predictor
    from fer_nbdev.evaluate import measure_latency
    took = {name: [] for name in names}
    predictors = {name: Predictor(name, threads=1, detector="none") for name in names}
    with on_cores(1):
        for _ in range(rounds):
            for name, predictor in predictors.items():
                took[name].append(measure_latency(predictor.predict_faces, n=200))
    return {name: {k: round(statistics.median(t[k] for t in of), 4) for k in ("single_ms", "batch_ms")} | {"batch": of[0]["batch"]}
            for name, of in took.items()}


def changed_settings(recipe, known):
    "key=value for each setting of a recipe that is another in the recipe it started from; inside a group, augment.crop=.83 say, where only some are."
    for key, value in recipe.items():
        if key in ("name", "about", "stats") or known[key] == value:
            continue
        if isinstance(value, dict) and isinstance(known[key], dict) and known[key].keys() <= value.keys():
            yield from (f"{key}.{k}={json.dumps(v)}" for k, v in value.items() if k not in known[key] or known[key][k] != v)
        else:
            yield f"{key}={json.dumps(value)}"


def train_command(card, run):
    "The command that trains a network again, from the bundled recipe for which it is the shortest."
    from fer_nbdev.recipe import Recipe, list_recipes, plain_recipe
    recipe, soft = card["recipe"], card["data"].get("soft") or ""
    changes = {name: [*changed_settings(recipe, plain_recipe(Recipe.read(name)))] for name in list_recipes()}
    base = min(changes, key=lambda name: len("".join(changes[name])))
    votes = " --votes fer2013new.csv" * bool(soft) + " --translate" * ("labels" in soft)
    settings = "".join(f" --set {shlex.quote(s)}" for s in changes[base])
    return f"fer train --data fer2013.csv{votes} --recipe {base}{settings} --out {run}"


def train_commands(card, run):
    "The commands that train a network again, one for each run that led to it."
    from fer_nbdev.cards import training_runs
    runs = [made for _, made in training_runs(card)]
    folders = [Path(later["recipe"]["pretrained"]).parent for later in runs[1:]]
    return [train_command(made, folder) for made, folder in zip(runs, [*folders, run])]


def retrain_commands(name, card):
    "All commands that make a bundled model again, of an ensemble those of its parts first."
    def commands(card, number, out):
        run = ("pupil" if card.get("started_from") else "run") + number  # a pupil starts from the folder `run`
        return train_commands(card, run) + [f"fer export {run}/model {out} --data fer2013.csv --int8"] * (card.get("weights") == "int8")
    if not card.get("members"):
        return commands(card, "", name)
    lines = [line for i, part in enumerate(card["members"], 1) for line in commands(part, f"-{i}", f"part-{i}")]
    others = "".join(f" --with part-{i}" for i in range(2, len(card["members"]) + 1))
    return [*lines, f"fer export part-1 {name}{others} --data fer2013.csv"]


def account(m):
    "Of the figures of a model those that its card does not hold yet."
    def few(scores):
        return {k: scores[k] if isinstance(scores[k], int) else round(scores[k], 5)
                for k in ("copies", "n", "accuracy", "macro_f1", "log_loss", "ece", "label_agrees") if k in scores}
    splits = {split: {"uncalibrated": few(of["uncalibrated"]), "ten_views": few(of["ten"]), "without_copies": few(of["one"]["without_copies"]),
                      "without_near_copies": few(of["without_near_copies"])} for split, of in m["scores"].items()}
    return {"flops": m["cost"]["flops"], "splits": splits, "ferplus": m["ferplus"] and few(m["ferplus"])}


def write_card(name, record):
    "Put what was measured of a bundled model into its card. Raises `ValueError` where the card tells of other scores: it is another network's then."
    from fer_nbdev.cards import weights_folder
    from fer_nbdev.core import write_whole
    path, m = weights_folder() / name / "card.json", record["results"][name]
    card = json.loads(path.read_text(encoding="utf-8"))
    for split, of in m["scores"].items():
        for key in ("accuracy", "log_loss"):
            if not math.isclose(card["scores"][split][key], of["one"][key], abs_tol=.001):
                raise ValueError(f"the card of {name} has the {key} {card['scores'][split][key]} on {split}, bundled.json {of['one'][key]}: measure it again")
    latency = {k: m["cost"][k] for k in ("single_ms", "batch_ms", "batch")} | {"threads": 1, "hardware": record["hardware"]["cpu"]}
    about = {"sha256": card["files"]["model.onnx"]["sha256"], "date": record["date"][:10], "commit": record["commit"]}
    card |= {"latency": latency, "accounting": about | account(m) | {"retrain": retrain_commands(name, card)}}
    with write_whole(path) as part:
        part.write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")


def made_of(card):
    "How a model came to be."
    return {k: card.get(k) for k in ("arch", *MADE)}


def answer_of(models):
    def told(name, m):
        one, ten = (m["scores"]["PrivateTest"][views] for views in ("one", "ten"))
        return (f"`{name}` {one['accuracy']:.1%} on PrivateTest ({ten['accuracy']:.1%} over ten views), calibration error {one['ece']:.3f}, "
                f"{m['cost']['single_ms']:.2f} ms a face, {m['cost']['bytes'] / 1e6:.1f} MB")
    return "; ".join(told(name, m) for name, m in models.items())


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="PATH", help="FER2013: its csv or class folders (default: drawn faces, which prove nothing)")
    parser.add_argument("--ferplus", type=Path, metavar="CSV", help="fer2013new.csv, the votes of FER+ for the same rows")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="how often each model is timed (default: 5)")
    parser.add_argument("--cards", action="store_true", help="write the milliseconds and the account into the models' cards")
    parser.add_argument("--cards-only", action="store_true", help="do that with bundled.json as it is, and measure nothing")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where bundled.json is written (default: bench/results)")
    args = parser.parse_args()
    for path in (args.data, args.ferplus):
        if path is not None and not path.exists():
            parser.error(f"there is no {path}")
    if args.ferplus and not args.data:
        parser.error("--ferplus gives votes for the rows of FER2013: it needs --data")
    if args.cards and not args.data:
        parser.error("--cards writes down what the models score on FER2013: it needs --data")
    return args


def measure(args):
    "Score and time all bundled models, and report it."
    from fer_nbdev.cards import bundled_models
    from fer_nbdev.clean import find_near_duplicates
    from fer_nbdev.data import read_fer2013, synthetic_faces
    from fer_nbdev.votes import read_ferplus
    cards = bundled_models()
    took = time_models(cards, args.rounds)
    table = read_fer2013(args.data) if args.data else synthetic_faces(700)
    ferplus = read_ferplus(args.ferplus) if args.ferplus else None
    near = find_near_duplicates(table)
    models = {}
    for name, card in cards.items():
        print(name, file=sys.stderr)
        models[name] = {"scores": score_views(name, table, near), "ferplus": score_by_voters(name, table, ferplus) if ferplus else None,
                        "cost": {"n_params": card["n_params"], "flops": count_operations(card), "bytes": card["files"]["model.onnx"]["bytes"], **took[name]},
                        "made": made_of(card) | {"members": [{"name": m["name"], **made_of(m)} for m in card.get("members", ())]}}
    report("bundled", models, question="What do the bundled models score, and what do they cost?", answer=answer_of(models),
           data={"source": args.data.name if args.data else "drawn faces", "faces": len(table)}, rounds=args.rounds,
           command="python bench/bundled.py --data fer2013.csv --ferplus fer2013new.csv --cards" if args.data else "python bench/bundled.py")


def main():
    args = parse_args()
    if args.out:
        _report.RESULTS = args.out
    if not args.cards_only:
        measure(args)
    record = earlier("bundled")
    for name in record["results"] if args.cards or args.cards_only else ():
        write_card(name, record)


if __name__ == "__main__":
    main()
