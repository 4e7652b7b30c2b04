"""How much of a score on FER2013 is memory? The same recipe on Training as it is, and without the pictures that the test splits show again.

Hundreds of test faces are in Training as well, pixel for pixel or shifted, cropped, mirrored or compressed anew. Every published score has
them in it. What a model gains from them cannot be told by leaving those test faces out of the score: they may be easier than others. So a network
is trained again, from the same seed, on four versions of Training:

  as it is       all rows
  identical out  without the rows that are pixel for pixel a test face
  copies out     without all rows that show the picture of a test face
  others out     without as many rows of each class as there, drawn among the rest: what fewer faces cost, whatever they show

and scored on the test faces that are in Training and on those that are not. `fast` with EPOCHS epochs: fewer rows are fewer steps. PublicTest selects the
epoch, of which a version profits as much as its copies there help; PrivateTest is scored once a run, and nothing is chosen on it.

Runs live in --runs, one folder each, and can be killed: what is there goes on. A run that an earlier call collected and whose folder
is not under --runs stays in the result; each names its own hardware, commit and date.
"""
import argparse
import dataclasses
import json
import sys
from pathlib import Path

import _report
import clean
import numpy as np
from _report import earlier, report

EPOCHS, SEEDS = 42, (0, 1, 2)
SPLITS = clean.SPLITS
AS_IS, COPIES_OUT = "as it is", "copies out"
VERSIONS = (AS_IS, COPIES_OUT, "others out", "identical out")
EXAMPLES = """examples:
  python bench/leakage.py --runs runs/leakage --data fer2013.csv                 collect what is there
  python bench/leakage.py --runs runs/leakage --data fer2013.csv --train         train what is missing: two hours of one core for each seed
  python bench/leakage.py --runs runs/leakage --data fer2013.csv --train --seeds 0
  python bench/leakage.py --runs /tmp/leakage --train --seeds 0 --epochs 1 --out /tmp    a quick try on drawn faces"""


def draw_faces():
    "Drawn faces with a texture each; the first 40 of each test split are the first of Training again, half of them mirrored."
    table = clean.draw_faces()
    pixels, first = table.pixels.copy(), np.flatnonzero(table.usage == "Training")[:40]
    for split in SPLITS:
        again = np.flatnonzero(table.usage == split)[:40]
        pixels[again] = table.pixels[first]
        pixels[again[::2]] = table.pixels[first[::2], :, ::-1]
    return dataclasses.replace(table, pixels=pixels)


def find_copies(table, runs):
    "`NearDuplicates` of the table, kept in the folder of the runs: the search looks at every face and takes minutes."
    from fer_nbdev.clean import find_near_duplicates
    return clean.restore(clean.cached(runs / "near.npz", lambda: vars(find_near_duplicates(table, progress=sys.stderr.isatty()))))


def shown_in_tests(found):
    "bool [n]: the Training rows whose picture a test split shows too."
    return np.any([found.leaks("Training", split) for split in SPLITS], axis=0)


def rows_out(version, table, near, exact, seed):
    "bool [n]: the Training rows that a version goes without."
    copies = shown_in_tests(near)
    if version == AS_IS:
        return np.zeros(len(table), bool)
    if version == "identical out":
        return shown_in_tests(exact)
    if version == "copies out":
        return copies
    draw, out = np.random.default_rng(seed), np.zeros(len(table), bool)
    for label in range(len(table.classes)):
        of = table.emotion == label
        out[draw.choice(np.flatnonzero(of & ~copies & (table.usage == "Training")), (of & copies).sum(), replace=False)] = True
    return out


def parts_of(split, near, exact):
    "Name -> bool [n]: all faces of a test split, those that Training shows too, those that it does not, and those it holds pixel for pixel."
    of, seen = near.usage == split, near.leaks(split)
    return {"all": of, "in Training": seen, "not in Training": of & ~seen, "identical": exact.leaks(split)}


def folder_of(runs, version, seed):
    return runs / f"{version.replace(' ', '_')}_seed_{seed}"


def train_run(folder, table, seed, epochs):
    "Train a run or go on with it, and keep what it says of all test faces: only then is it finished."
    from fer_nbdev.evaluate import predict_table
    from fer_nbdev.recipe import read_recipe
    from fer_nbdev.train import train

    def answers():
        recipe = None if (folder / "run.json").exists() else read_recipe("fast").set([f"epochs={epochs}", f"seed={seed}"])
        learn = train(recipe, table, folder, resume=True)
        return {split: predict_table(learn, table.split(split)) for split in SPLITS}
    clean.cached(folder / "test.npz", answers)


def read_run(folder, parts, emotion):
    "What a finished run wrote about itself and its scores on every part of the test splits, or None."
    from fer_nbdev.evaluate import score
    if not (folder / "test.npz").exists():
        return None
    about = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    with np.load(folder / "test.npz") as found:
        probs = dict(found)
    scores = {split: {} for split in SPLITS}
    for split, of in parts.items():
        for part, rows in of.items():
            s = score(probs[split][rows[of["all"]]], emotion[rows]) if rows.any() else {"n": 0}
            scores[split][part] = {k: s[k] for k in ("n", "accuracy", "macro_f1", "log_loss") if k in s}
    return {"rows": about["data"]["rows"]["Training"], "epochs": about["recipe"]["epochs"], "best_epoch": about["best_epoch"],
            "minutes": about["train_minutes"], **{k: about[k] for k in ("hardware", "commit", "date")}, "scores": scores}


def differences(runs, parts, emotion, seed):
    "Version -> split -> part: points of accuracy that are lost without some rows, with their interval over faces; the two runs have one seed."
    from fer_nbdev.evaluate import compare_models
    first, lost = folder_of(runs, AS_IS, seed) / "test.npz", {}
    for version in VERSIONS[1:]:
        second = folder_of(runs, version, seed) / "test.npz"
        if not (first.exists() and second.exists()):
            continue
        with np.load(first) as a, np.load(second) as b:
            lost[version] = {split: {part: difference(compare_models(b[split][rows[of["all"]]], a[split][rows[of["all"]]], emotion[rows]))
                                     for part, rows in of.items() if rows.sum() > 1} for split, of in parts.items()}
    return lost


def difference(compared):
    return {"accuracy": compared["difference"]["accuracy"], "interval": compared["intervals"]["accuracy"], "p_value": compared["p_value"]}


def answer_of(found):
    "What the copies are worth, over the seeds that were trained both with them and without."
    seeds = sorted(seed for version, seed in found if version == AS_IS and (COPIES_OUT, seed) in found)
    if not seeds:
        return "not trained yet"

    def right(version, part, split="PrivateTest"):
        return np.mean([found[version, seed]["scores"][split][part].get("accuracy", np.nan) for seed in seeds])

    def leads(split):
        return " to ".join(f"{100 * (right(version, 'in Training', split) - right(version, 'not in Training', split)):.1f}" for version in (AS_IS, COPIES_OUT))
    all_rows, without = ([f"{right(version, part):.1%}" for part in ("all", "in Training", "not in Training")] for version in (AS_IS, COPIES_OUT))
    n = found[AS_IS, seeds[0]]["scores"]["PrivateTest"]["in Training"]["n"]
    return (f"trained on all rows a network is right on {all_rows[0]} of PrivateTest: "
            f"on {all_rows[1]} of the {n} faces whose picture Training shows and {all_rows[2]} of the others; "
            f"trained without those pictures on {without[0]}: {without[1]} and {without[2]}. "
            f"The lead of the {n} falls from {leads('PrivateTest')} points, on PublicTest from {leads('PublicTest')} "
            f"({len(seeds)} seed{'s' * (len(seeds) > 1)})")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, metavar="FOLDER", help="where the runs are")
    parser.add_argument("--data", type=Path, metavar="PATH", help="FER2013: its csv or class folders (default: drawn faces, some of them twice)")
    parser.add_argument("--train", action="store_true", help="train what is missing first")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, metavar="N", help=f"of the runs (default: {' '.join(map(str, SEEDS))})")
    parser.add_argument("--epochs", type=int, default=EPOCHS, metavar="N", help=f"of a run (default: {EPOCHS})")
    parser.add_argument("--out", type=Path, default=_report.RESULTS, metavar="FOLDER", help="where leakage.json is written (default: bench/results)")
    args = parser.parse_args()
    if args.data and not args.data.exists():
        parser.error(f"there is no {args.data}")
    return args


def write(args, table, near, exact):
    "Collect all runs there are, and write what they say."
    parts = {split: parts_of(split, near, exact) for split in SPLITS}
    before = earlier("leakage")["results"]
    found, lost = {(r["version"], r["seed"]): r for r in before.get("runs", ())}, {int(k): v for k, v in before.get("differences", {}).items()}
    for seed in args.seeds:
        for version in VERSIONS:
            if run := read_run(folder_of(args.runs, version, seed), parts, table.emotion):
                found[version, seed] = {"version": version, "seed": seed, **run}
        if new := differences(args.runs, parts, table.emotion, seed):
            lost[seed] = lost.get(seed, {}) | new
    report("leakage", {"runs": list(found.values()), "differences": {str(k): v for k, v in sorted(lost.items())},
                       "rows": {version: int(rows_out(version, table, near, exact, 0).sum()) for version in VERSIONS}},
           question="How much of a score on FER2013 is memory?", answer=answer_of(found),
           command="python bench/leakage.py --runs runs/leakage --data fer2013.csv --train")


def main():
    args = parse_args()
    _report.RESULTS = args.out
    from fer_nbdev.data import find_duplicates, read_fer2013
    table = read_fer2013(args.data) if args.data else draw_faces()
    near, exact = find_copies(table, args.runs), find_duplicates(table)
    for seed in args.seeds if args.train else ():
        for version in VERSIONS:
            print(version, f"seed {seed}", file=sys.stderr)
            train_run(folder_of(args.runs, version, seed), table[~rows_out(version, table, near, exact, seed)], seed, args.epochs)
            write(args, table, near, exact)
    write(args, table, near, exact)


if __name__ == "__main__":
    main()
