"""What makes a network better on FER2013? One change at a time, short runs, judged on PublicTest alone.

The base is the recipe `fast` with EPOCHS epochs. Every variant differs from it in the settings that its name stands for, and the
base is trained with several seeds: their spread says how large a difference must be to mean anything. Compared are the accuracy
and loss of the last epoch on PublicTest (of the averaged weights where they are on), so that no run profits from a lucky
epoch. PrivateTest is neither read nor scored.

Runs live in --runs, one folder a variant, and can be killed: what is there goes on. Without --train the script collects. A run that
an earlier call collected and whose folder is not under --runs stays in the result, so that the table can grow over time; each run names
its own hardware, commit and date.
"""
import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path

import _report
import numpy as np
from _report import earlier, report

EPOCHS, SEEDS = 16, (0, 1, 2, 3, 4)
BASE = "base"
FREE = ["class_weights=null", "label_smoothing=0"]  # a soft target is smooth already, and says how common a class is
VOTES = {"votes of FER+": 1, "half votes": .5, "a quarter votes": .25}  # variants that train on votes: their share of the target
NO_FACE, VOTED = "pictures without a face out", "the label that most voters give"  # variants that change Training rows
# group: {variant: settings}; a variant is the base with these changed
VARIANTS = {
    "faces": {NO_FACE: [], VOTED: [], "enlarged to 64 pixels": ["img_size=64"]},
    "size": {"half the width": ["arch_args.widths=[16, 32, 32]"], "1.5 times the width": ["arch_args.widths=[48, 96, 96]"],
             "twice the width": ["arch_args.widths=[64, 128, 128]"],
             "a block less": ["arch_args.blocks=[1, 1, 1]"], "two blocks more": ["arch_args.blocks=[2, 2, 2]"]},
    "architecture": {"squeeze-and-excitation, full resolution":
                         ["arch=se_resnet", "arch_args={stem: 16, stem_depth: 1, widths: [32, 64, 64], blocks: [1, 2, 1], dropout: 0.1}"],
                     "no dropout": ["arch_args.dropout=0"], "dropout .3": ["arch_args.dropout=0.3"]},
    "augmentation": {"no augmentation": ["augment=null"], "flip alone": ["augment={p_flip: 0.5, p_affine: 0, p_light: 0, p_erase: 0}"],
                     "no flip": ["augment.p_flip=0"], "no shift": ["augment.shift=0"],
                     "no rotation": ["augment.rotate=0"], "rotation 20": ["augment.rotate=20"],
                     "no light": ["augment.p_light=0"], "no erasing": ["augment.p_erase=0"], "erasing .6": ["augment.p_erase=0.6"],
                     "scale .2, shift .1": ["augment.scale=0.2", "augment.shift=0.1"],
                     "windows of 40 pixels": ["augment.crop=0.83"], "windows of 44 pixels": ["augment.crop=0.92"]},
    "mixing": {"mixup .2": ["mixup=0.2"], "cutmix 1": ["cutmix=1"]},
    "loss": {"no smoothing": ["label_smoothing=0"], "smoothing .2": ["label_smoothing=0.2"], "no class weights": ["class_weights=null"],
             "inverse class weights": ["class_weights=inverse"], "focal": ["loss=focal", "label_smoothing=0"]},
    "targets": {"label alone": FREE, **{how: [f"soft_share={share}", *FREE] for how, share in VOTES.items()},
                "taught by accurate": ["teachers=[accurate]", *FREE], "half taught by accurate": ["teachers=[accurate]", "soft_share=0.5", *FREE]},
    "optimiser": {"peak .04": ["lr=0.04"], "peak .16": ["lr=0.16"], "decay 1e-4": ["wd=1e-4"], "decay 2e-3": ["wd=2e-3"],
                  "AdamW 2e-3": ["optimizer=adamw", "lr=2e-3", "wd=0.05"], "batch 64": ["bs=64"], "batch 256": ["bs=256"],
                  "no averaged weights": ["ema=0"], "cosine": ["schedule=cosine"], "sharpness-aware .05": ["sam=0.05"]},
    "epochs": {"8 epochs": ["epochs=8"], "32 epochs": ["epochs=32"], "64 epochs": ["epochs=64"]}}
EXAMPLES = """examples:
  python bench/ablation.py --runs runs/ablation                                                       collect what is there
  python bench/ablation.py --runs runs/ablation --data fer2013.csv --votes fer2013new.csv --train     train what is missing: hours
  python bench/ablation.py --runs runs/ablation --data fer2013.csv --train base loss "mixup .2"       some groups and variants of it
  python bench/ablation.py --runs /tmp/ablation --train loss --epochs 1 --out /tmp                    a quick try on drawn faces"""


def jobs():
    "Run name -> (group, variant, settings)."
    seeds = {f"{BASE} seed {seed}": (BASE, BASE, [f"seed={seed}"]) for seed in SEEDS}
    return seeds | {f"{group} {name}": (group, name, settings) for group, of in VARIANTS.items() for name, settings in of.items()}


def correct(table, ferplus):
    "Variant -> the table with the Training rows that it changes; an opinion of FER+ counts where more than half of the voters share it."
    from fer_nbdev.clean import NOT_A_FACE, ferplus_majority
    said, training = ferplus_majority(ferplus)[0], table.usage == "Training"
    emotion = [table.classes.index(s) if t and s in table.classes else e for s, t, e in zip(said, training, table.emotion)]
    return {NO_FACE: table[~(training & (said == NOT_A_FACE))], VOTED: dataclasses.replace(table, emotion=np.array(emotion))}


def folder_of(runs, name):
    return runs / "".join(c if c.isalnum() or c in ".-" else "_" for c in name)


def train_variant(folder, settings, table, epochs):
    "Train a run or go on with it; PrivateTest is taken out of the table first."
    from fer_nbdev.recipe import read_recipe
    from fer_nbdev.train import train
    if (folder / "done").exists():
        return
    recipe = None if (folder / "run.json").exists() else read_recipe("fast").set(["name=ablation", f"epochs={epochs}", *settings])
    train(recipe, table[table.usage != "PrivateTest"], folder, resume=True)
    (folder / "done").touch()


def read_variant(folder):
    "Figures of a finished run, or None."
    if not (folder / "done").exists():
        return None
    history = json.loads((folder / "history.json").read_text(encoding="utf-8"))
    about = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    last = history[-1]
    return {k: round(last[k], 5) for k in ("accuracy", "f1_score", "valid_loss", "train_loss")} | {
        "epochs": len(history), "n_params": about["n_params"], "seconds_an_epoch": round(statistics.median(h["seconds"] for h in history), 1),
        **{k: about[k] for k in ("hardware", "commit", "date")}}


def collect(runs, epochs):
    "Run name -> figures: of the finished runs in `runs`, and of those that only an earlier result knows, if its base was as long."
    known = earlier("ablation")["results"]
    before = known.get("runs", {}) if known.get("epochs") == epochs else {}
    found = {name: read_variant(folder_of(runs, name)) or before.get(name) for name in jobs()}
    return {name: figures for name, figures in found.items() if figures}


def summarise(found):
    "The base with mean and spread, None without a run of it, and every trained variant with its distance from that mean."
    base = [found[name] for name, (group, _, _) in jobs().items() if group == BASE and name in found]
    if not base:
        return None, []
    mean = {k: statistics.mean(b[k] for b in base) for k in ("accuracy", "valid_loss")}
    spread = {k: statistics.stdev(b[k] for b in base) if len(base) > 1 else None for k in mean}
    rows = [{"group": group, "variant": variant, "run": name, "settings": settings, "gain": round(found[name]["accuracy"] - mean["accuracy"], 5)}
            for name, (group, variant, settings) in jobs().items() if group != BASE and name in found]
    return {**mean, "spread": spread, "noise": noise_of(spread["accuracy"], len(base)), "seeds": len(base)}, rows


def noise_of(spread, seeds):
    "How far from the mean of some seeds one more run lies in 19 of 20 cases (Student's t: few seeds know their spread badly); None of one seed."
    from scipy.stats import t
    return float(t.ppf(.975, seeds - 1)) * spread * (1 + 1 / seeds) ** .5 if seeds > 1 else None


def answer_of(base, rows, planned):
    "What stands out, in a sentence."
    if base is None or not rows:
        return "not trained yet"
    trained = f" ({len(rows)} of {planned} variants trained)" if len(rows) < planned else ""
    if not base["noise"]:
        return f"base {base['accuracy']:.1%} on PublicTest, with one seed: nothing says yet what a difference means{trained}"
    out = sorted((r for r in rows if abs(r["gain"]) > base["noise"]), key=lambda r: -abs(r["gain"]))
    told = ", ".join(f"{r['variant']} {100 * r['gain']:+.1f}" for r in out) or "none"
    return (f"base {base['accuracy']:.1%} ± {base['spread']['accuracy']:.1%} over {base['seeds']} seeds on PublicTest; "
            f"19 of 20 runs that change nothing would lie within {100 * base['noise']:.1f} points of it; outside lie {told}; "
            f"the other {len(rows) - len(out)} are not told apart from it{trained}")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, metavar="FOLDER", help="where the runs are")
    parser.add_argument("--data", type=Path, metavar="PATH", help="FER2013: its csv or class folders (default: drawn faces)")
    parser.add_argument("--votes", type=Path, metavar="CSV", help="fer2013new.csv of FER+ (default: the variants that need votes are left out)")
    parser.add_argument("--train", nargs="*", metavar="NAME",
                        help=f"train these first, groups or single variants; groups: {', '.join([BASE, *VARIANTS])} (default: all)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, metavar="N", help=f"of the base (default: {EPOCHS})")
    parser.add_argument("--out", type=Path, default=_report.RESULTS, metavar="FOLDER", help="where ablation.json is written (default: bench/results)")
    args = parser.parse_args()
    args.train = [BASE, *VARIANTS] if args.train == [] else args.train or []
    known = [BASE, *VARIANTS, *(variant for of in VARIANTS.values() for variant in of)]
    if unknown := [name for name in args.train if name not in known]:
        parser.error(f"unknown group or variant {', '.join(unknown)}: expected among {', '.join(known)}")
    if args.data and not args.data.exists():
        parser.error(f"there is no {args.data}")
    return args


def main():
    args = parse_args()
    _report.RESULTS = args.out
    if args.train:
        from fer_nbdev.data import read_fer2013, synthetic_faces
        from fer_nbdev.votes import read_ferplus, soft_labels
        table = read_fer2013(args.data) if args.data else synthetic_faces(700)
        changed = dict.fromkeys([*VOTES, NO_FACE, VOTED])
        if args.votes:
            ferplus = read_ferplus(args.votes)
            changed = dict.fromkeys(VOTES, soft_labels(table, ferplus)) | correct(table, ferplus)
        for name, (group, variant, settings) in jobs().items():
            faces = changed.get(variant, table)
            if {group, variant} & set(args.train) and faces is not None:
                print(name, file=sys.stderr)
                train_variant(folder_of(args.runs, name), settings, faces, args.epochs)
    found = collect(args.runs, args.epochs)
    base, rows = summarise(found)
    args.out.mkdir(parents=True, exist_ok=True)
    planned = sum(map(len, VARIANTS.values()))
    report("ablation", {"base": base, "epochs": args.epochs, "planned": planned, "variants": rows, "runs": found},
           question="What makes a network better on FER2013?", answer=answer_of(base, rows, planned),
           command="python bench/ablation.py --runs runs/ablation --data fer2013.csv --votes fer2013new.csv --train")


if __name__ == "__main__":
    main()
