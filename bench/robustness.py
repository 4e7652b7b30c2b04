"""What is left of the bundled models' accuracy when faces are damaged, do they notice, and on which faces do people disagree as well?

Every bundled model answers for PrivateTest as it is and under every corruption of `fer_nbdev.robustness` at its five strengths; accuracy,
macro-F1, log loss, ECE, mean confidence and the share of changed answers are kept for each. With --ferplus (fer2013new.csv of
microsoft/FERPlus) the faces are grouped by how many of the ten voters chose the commonest emotion, as they are and damaged.

Deterministic by --seed. One core needs a few minutes for a model of two milliseconds a face: there are 46 passes over 3,589 faces.
"""
import argparse
import datetime
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

import _report
from _report import earlier, measure, report

EXAMPLES = """examples:
  python bench/robustness.py --data fer2013.csv --ferplus fer2013new.csv    the measurement
  python bench/robustness.py --data fer2013.csv --ferplus fer2013new.csv --models fast --add     one more model beside those in the file
  python bench/robustness.py --limit 100 --out /tmp                         a quick try on drawn faces"""


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="FER2013 csv; without it faces are drawn")
    parser.add_argument("--ferplus", type=Path, help="fer2013new.csv, the votes of FER+; only with --data")
    parser.add_argument("--models", nargs="+", help="bundled names or model folders (default: all bundled models)")
    parser.add_argument("--add", action="store_true", help="keep what the file says of other models; `measured` in it says what is from when")
    parser.add_argument("--limit", type=int, help="use at most so many faces of PrivateTest")
    parser.add_argument("--seed", type=int, default=0, help="of noise, sides and places (default: 0)")
    parser.add_argument("--threads", type=int, default=1, help="threads of the network (default: 1)")
    parser.add_argument("--out", type=Path, default=_report.RESULTS, help="folder for robustness.json (default: bench/results)")
    args = parser.parse_args()
    if args.ferplus and not args.data:
        parser.error("--ferplus goes with --data")
    return args


def limited(table, n):
    "The table with at most n rows of PrivateTest counting as such; all rows stay, so that FER+ still fits."
    late = np.flatnonzero(table.usage == "PrivateTest")[n:] if n else []
    usage = table.usage.copy()
    usage[late] = "PublicTest"
    return replace(table, usage=usage)


def records(frame):
    "Rows for JSON: None where there is no number."
    return [{k: None if isinstance(v, float) and np.isnan(v) else v for k, v in row.items()} for row in frame.to_dict("records")]


def by_agreement(robustness, ferplus):
    "The table of the faces as they are, and the mean of those of all damages."
    from fer_nbdev.robustness import accuracy_by_agreement
    clean = accuracy_by_agreement(robustness.clean, ferplus)
    hurt = [accuracy_by_agreement(replace(robustness.clean, probs=p), ferplus) for p in robustness.probs.values()]
    mean = sum(h[["accuracy", "confidence", "ferplus_accuracy"]] for h in hurt) / len(hurt)
    return records(clean.reset_index()), records(mean.reset_index())


def trained_on(card):
    "The corruptions that a model, or a part of it, was trained on: for it they are no test of what it never saw."
    from fer_nbdev.recipe import create_damage
    damages = [create_damage((c.get("recipe") or {}).get("damage")) for c in card.get("members") or [card]]
    return [kind for kind in ("blur", "noise") if any(d and getattr(d, f"p_{kind}") for d in damages)]


def begin(args, data):
    "Results to add to: those of an earlier run on the same data, or empty ones."
    record = earlier("robustness")
    if not args.add or not record["results"]:
        return {"rows": [], "agreement": {}, "agreement_damaged": {}, "measured": {}, "trained_on": {}}
    if record["data"] != data or record["seed"] != args.seed:
        raise SystemExit(f"robustness.json is of {record['data']} and seed {record['seed']}: run without --add")
    return record["results"]


def main():
    args = parse_args()
    from fer_nbdev.cards import bundled_models, read_model
    from fer_nbdev.data import read_fer2013, synthetic_faces
    from fer_nbdev.votes import read_ferplus
    from fer_nbdev.robustness import CORRUPTIONS, evaluate_robustness
    _report.RESULTS = args.out
    table = limited(read_fer2013(args.data) if args.data else synthetic_faces(700), args.limit)
    ferplus = read_ferplus(args.ferplus) if args.ferplus else None
    if ferplus and args.limit:
        ferplus = replace(ferplus, usage=table.usage)
    n_faces = int((table.usage == "PrivateTest").sum())
    data = {"source": Path(table.source).name if args.data else "drawn faces", "faces": n_faces, "ferplus": args.ferplus.name if args.ferplus else None}
    found = begin(args, data)
    for model in args.models or bundled_models():
        got = []
        seconds = measure(lambda: got.append(evaluate_robustness(model, table, seed=args.seed, threads=args.threads)), 1)[0]
        name = got[0].clean.about["model"]
        found["rows"] = [r for r in found["rows"] if r["model"] != name] + got[0].to_pandas().to_dict("records")
        found["measured"][name] = {"date": datetime.date.today().isoformat(), "commit": _report.commit(), "seconds": round(seconds, 1)}
        found["trained_on"][name] = trained_on(read_model(model)[0])
        if ferplus:
            found["agreement"][name], found["agreement_damaged"][name] = by_agreement(got[0], ferplus)
    frame, said = pd.DataFrame(found["rows"]), []
    for model, r in frame.groupby("model", sort=False):
        clean, hurt = r[r.severity == 0].iloc[0], r[r.severity > 0]
        means, known = hurt.groupby("corruption").accuracy.mean().sort_values(), found["trained_on"][model]
        said.append(f"`{model}` {clean.accuracy:.1%} of {clean.n:,} faces as they are, "
                    f"{hurt.accuracy.mean():.1%} on average under {len(means)} kinds of damage at five strengths "
                    f"(worst {means.index[0]}, {means.iloc[0]:.1%}; mildest {means.index[-1]}, {means.iloc[-1]:.1%}), "
                    f"where it is {100 * (hurt.confidence - hurt.accuracy).mean():.0f} points too sure of itself"
                    + f"; {means.drop(known).mean():.1%} under those other than {' and '.join(known)}, which it was trained on" * bool(known))
    corruptions = {n: {"strengths": list(c.strengths), "unit": c.unit, "about": c.about} for n, c in CORRUPTIONS.items()}
    report("robustness", {**found, "corruptions": corruptions}, data=data,
           question="How much accuracy is left when faces are blurred, noisy, dark, turned, covered or small?", answer="; ".join(said),
           seed=args.seed, threads=args.threads,
           command="python bench/robustness.py" + (f" --data {args.data.name}" if args.data else "")
                   + (f" --ferplus {args.ferplus.name}" if args.ferplus else "") + (f" --limit {args.limit}" if args.limit else ""))


if __name__ == "__main__":
    sys.exit(main())
