"""What does a small search for hyper-parameters find, and what does it save to give up the hopeless trials?

`tune` searches learning rate, weight decay, optimiser and rotation of a recipe on the first 8,000 Training faces, so that a
trial takes about two minutes on one core: 8 trials of at most 9 epochs, of which ASHA looks after 1, 3 and 9. The answer
sets the best of them beside the recipe as it is, trained by the same code for as many epochs on the same faces, and counts
the epochs that were not trained. Scores are those of PublicTest, on which the search chose: they are not what the network
would score on new faces, and PrivateTest is not read.

The search lives in `--runs` and can be stopped: the same command goes on with it.
"""
import argparse
import json
import sys
from pathlib import Path

import _report
from _report import report

SPACE = ("lr=log:3e-3:3e-1", "wd=log:1e-5:1e-2", "optimizer=sgd,adamw", "augment.rotate=0:25")
EXAMPLES = """examples:
  python bench/tune.py --data fer2013.csv --runs runs/tune             the measurement, at most 20 minutes on one core
  python bench/tune.py --limit 200 --epochs 3 --trials 4 --small --runs /tmp/tune --out /tmp    a quick try on drawn faces"""


def read_faces(data, limit):
    "The first `limit` Training faces, which are in no order, and all of PublicTest; drawn ones without data."
    import numpy as np
    from fer_nbdev.data import read_fer2013, synthetic_faces
    table = read_fer2013(data) if data else synthetic_faces(limit)
    training = np.flatnonzero(table.usage == "Training")[:limit]
    return table[np.union1d(training, np.flatnonzero(table.usage == "PublicTest"))]


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="PATH", help="FER2013: its csv or class folders; without it faces are drawn")
    parser.add_argument("--limit", type=int, default=8000, metavar="N", help="Training faces (default: %(default)s)")
    parser.add_argument("--recipe", default="fast", help="bundled recipe or yaml file to start from (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=9, metavar="N", help="epochs of a trial that is not given up (default: %(default)s)")
    parser.add_argument("--trials", type=int, default=8, metavar="N", help="trials (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="a network of a few thousand parameters, for a quick try")
    parser.add_argument("--runs", type=Path, required=True, metavar="FOLDER", help="where the search and the run beside it are kept")
    parser.add_argument("--out", type=Path, default=_report.RESULTS, metavar="FOLDER", help="where tune.json is written (default: bench/results)")
    args = parser.parse_args()
    if args.data is not None and not args.data.exists():
        parser.error(f"no data at {args.data}")
    if min(args.limit, args.epochs, args.trials) < 1:
        parser.error("--limit, --epochs and --trials take numbers from 1 up")
    return args


def main():
    args = parse_args()
    from fer_nbdev.callbacks import best_epoch
    from fer_nbdev.recipe import plain_recipe, read_recipe
    from fer_nbdev.train import train
    from fer_nbdev.tune import best_recipe, trial_rows, tune
    _report.RESULTS = args.out
    small = ["arch=se_resnet", "arch_args={stem: 8, widths: [8], blocks: [1]}"] if args.small else []
    recipe = read_recipe(args.recipe).set([f"epochs={args.epochs}", "bs=64", "ema=.98", *small])
    table = read_faces(args.data, args.limit)
    train(recipe, table, args.runs / "as_it_is", resume=True, progress=False)
    study = tune(recipe, table, list(SPACE), args.runs / "search", args.trials, resume=True)
    history = json.loads((args.runs / "as_it_is" / "history.json").read_text(encoding="utf-8"))
    start, rows = history[best_epoch(history)]["accuracy"], trial_rows(study)
    trained, whole = sum(r["epochs"] for r in rows), args.epochs * len(rows)
    given_up, minutes = sum(r["state"] == "pruned" for r in rows), sum(r["minutes"] for r in rows)
    training, valid = (int((table.usage == usage).sum()) for usage in ("Training", "PublicTest"))
    report("tune",
           {"rows": rows, "as_it_is": start, "best": study.best_value, "best_params": study.best_params,
            "trained_epochs": trained, "epochs_without_pruning": whole, "given_up": given_up, "minutes": round(minutes, 2),
            "recipe": plain_recipe(best_recipe(study, recipe))},
           question="What does a small search for hyper-parameters find?",
           answer=f"of a network trained on {training:,} faces the best of {len(rows)} trials of {args.epochs} epochs "
                  f"scores {study.best_value:.1%} on {valid:,} PublicTest faces, the recipe as it is {start:.1%} "
                  f"(one standard error is {100 * (start * (1 - start) / valid) ** .5:.1f} points); {given_up} trials were given up early, "
                  f"so that {trained} of {whole} epochs were trained, in {minutes:.0f} minutes",
           data={"source": Path(table.source).name or "drawn faces", "training": training, "public_test": valid}, space=list(SPACE), seed=recipe.seed,
           command="python bench/tune.py --runs runs/tune" + (f" --data {args.data.name}" if args.data else "")
                   + f" --limit {args.limit} --epochs {args.epochs} --trials {args.trials}")


if __name__ == "__main__":
    sys.exit(main())
