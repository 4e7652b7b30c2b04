"""What is wrong with the rows of FER2013, how well are such faults found, and what does a classifier gain when they are gone?

Five questions, each on all rows:

  copies      how many rows show a picture that another row shows, and how many test faces are in Training that way
  planted     of copies that this script plants (shifted, brightened, mirrored, noisy, compressed, cropped anew), which are found,
              and how many of the pairs that are found with them are wrong
  not a face  does a score that knows no votes rank the rows that FER+ calls "not a face" above the others
  labels      cleanlab on out-of-fold probabilities: how many labels it doubts, and what FER+ says of those
  effect      the same classifier with the same seeds on the Training rows as they are, without copies and pictures that are no face,
              and without doubted labels too; scored on both test splits

The last two are asked of edge features with a Gaussian kernel (Nystroem) and linear discriminant analysis, which takes seconds to fit and
has no epoch to choose. With --train they are asked of a small network as well, some twenty minutes of one core more; PublicTest selects its
epochs, and fewer rows are fewer steps. FER+ is a judge only where it is given. PrivateTest is scored at the end, and nothing is chosen on it.
What was computed stays in --runs (near.npz, planted_*.npz, probs_*.npz, test_*.npz, findings.csv, the networks): a second call takes it from there, so
empty the folder when the code of a search changes.
"""
import argparse
import dataclasses
import sys
import time
from pathlib import Path

import _report
from _report import report

SPLITS = ("PublicTest", "PrivateTest")
NETWORK = ["name=small", "arch=fast_resnet", "arch_args={widths: [24, 48, 96], blocks: [0, 1, 1], dropout: 0.1}", "img_size=32",
           "label_smoothing=0", "class_weights=null", "ema=0.99", "augment.p_affine=0.5", "augment.p_light=0", "augment.p_erase=0"]
FOLDS, SEEDS, EPOCHS, COPIES = 5, 3, 6, 2100
EXAMPLES = """examples:
  python bench/clean.py --data fer2013.csv --ferplus fer2013new.csv --runs runs/clean            the measurement
  python bench/clean.py --data fer2013.csv --ferplus fer2013new.csv --runs runs/clean --train    with networks too
  python bench/clean.py --runs /tmp/clean --out /tmp                                             a quick try on drawn faces"""


def draw_faces(n=840):
    "Drawn faces with a texture each, since photographs differ in hair, skin and background; one Training label in twenty is wrong."
    import numpy as np
    from scipy.ndimage import gaussian_filter
    from fer_nbdev.clean import plant_label_errors
    from fer_nbdev.data import synthetic_faces
    table = plant_label_errors(synthetic_faces(n))[0]
    noise = gaussian_filter(np.random.default_rng(0).normal(size=table.pixels.shape), (0, 1.5, 1.5))
    return dataclasses.replace(table, pixels=np.clip(.7 * table.pixels + 40 + 20 * noise / noise.std(), 0, 255).astype(np.uint8))


def cached(path, make):
    "Arrays of an npz file by name; made and written where it is not there."
    import numpy as np
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part.npz")
        np.savez(part, **make())
        part.replace(path)
    with np.load(path) as found:
        return dict(found)


def timed(make):
    "The dict that `make` returns, with the seconds it took by the clock and on the processor."
    clock, cpu = time.perf_counter(), time.process_time()
    found = make()
    return {**found, "clock": time.perf_counter() - clock, "cpu": time.process_time() - cpu}


def search(table):
    "The near duplicates of a table as arrays, and the seconds."
    from fer_nbdev.clean import find_near_duplicates
    return timed(lambda: vars(find_near_duplicates(table)))


def restore(found):
    "The `NearDuplicates` of what `search` returned."
    from fer_nbdev.clean import NearDuplicates
    return NearDuplicates(**{f.name: found[f.name] for f in dataclasses.fields(NearDuplicates)})


def copies_of(table, found):
    "How many rows are copies of another, identical or not, and how many test faces another split holds that way."
    from fer_nbdev.data import find_duplicates
    near = restore(found)

    def counts(d):
        between = (("PrivateTest", "Training"), ("PublicTest", "Training"), ("PrivateTest", "PublicTest"))
        return {"rows": int(d.copies.sum()), "groups": len(d.groups), "labelled_differently": len(d.conflicts),
                "leaks": {f"{usage} in {seen}": int(d.leaks(usage, seen).sum()) for usage, seen in between}}
    edges = [.85, .9, .95, .98, 1.01]
    bands = {f"{low:.2f}": (near.similarity >= low) & (near.similarity < high) for low, high in zip(edges, edges[1:])}
    return {"exact": counts(find_duplicates(table)), "all": counts(near), "pairs": len(near.pairs), "mirrored_pairs": int(near.mirrored.sum()),
            "largest_group": max(map(len, near.groups), default=0),
            "pairs_by_similarity": {low: {"plain": int((band & ~near.mirrored).sum()), "mirrored": int((band & near.mirrored).sum())}
                                    for low, band in bands.items()},
            "seconds": round(float(found["clock"]), 1), "cpu_seconds": round(float(found["cpu"]), 1)}


def planted_copies(table, near, folder, n, thin):
    """Recall by kind and precision on planted copies. A pair with a planted row is right where its rows, or the sources of them, show one
    picture; that two natural rows do says the search without planted copies, and a pair that it missed counts as wrong here."""
    import numpy as np
    from fer_nbdev.clean import COPY_KINDS, plant_copies
    rows = np.arange(0, len(table), thin)
    mixed, truth = plant_copies(table[rows], n)
    found = restore(cached(folder / f"planted_{thin}.npz", lambda: search(mixed)))
    origin = rows[np.concatenate([np.arange(len(rows)), truth.source])]
    pairs = found.pairs[(found.pairs >= len(rows)).any(1)]
    right = near.first[origin[pairs[:, 0]]] == near.first[origin[pairs[:, 1]]]
    have = set(map(tuple, pairs.tolist()))
    hit = np.array([(s, r) in have for s, r in zip(truth.source, truth.row)])
    return {"copies": n, "rows": len(rows), "recall": float(hit.mean()),
            "pairs": len(pairs), "wrong_pairs": int((~right).sum()), "precision": float(right.mean()),
            "recall_by_kind": {k: float(hit[truth.kind == k].mean()) for k in COPY_KINDS}}


def confidences(faces, yunet):
    "The confidence of a YuNet detector in the best face of each picture, enlarged twice with a border; 0 where it sees none."
    import cv2
    import numpy as np
    detector = cv2.FaceDetectorYN.create(str(yunet), "", (160, 160), .01, .3, 50)
    found = np.zeros(len(faces))
    for i, face in enumerate(faces):
        large = cv2.copyMakeBorder(cv2.resize(face, (96, 96), interpolation=cv2.INTER_CUBIC), 32, 32, 32, 32, cv2.BORDER_REPLICATE)
        _, boxes = detector.detect(cv2.cvtColor(large, cv2.COLOR_GRAY2BGR))
        found[i] = 0 if boxes is None else boxes[:, 14].max()
    return {"confidence": found}


def eigenface_residual(faces, components=50):
    "Mean squared difference between each face, brightness and contrast aside, and its projection on the principal components of 6,000 of them."
    import numpy as np
    from sklearn.decomposition import PCA
    flat = faces.reshape(len(faces), -1).astype(np.float32)
    flat = (flat - flat.mean(1, keepdims=True)) / np.maximum(flat.std(1, keepdims=True), 1)
    some = np.random.default_rng(0).permutation(len(flat))[:6000]
    pca = PCA(min(components, len(some) // 2), svd_solver="randomized", random_state=0).fit(flat[some])
    return ((flat - pca.inverse_transform(pca.transform(flat))) ** 2).mean(1)


def faceless(table, scores, votes, yunet, folder):
    "Average precision of scores without votes against the rows that FER+ calls not a face; pictures of one gray come first in all of them."
    import numpy as np
    from sklearn.metrics import average_precision_score
    from fer_nbdev.clean import NOT_A_FACE, ferplus_majority
    listed, gray = scores >= .3, scores == 1
    result = {"one_gray": int(gray.sum()), "threshold": .3, "listed": int(listed.sum())}
    if votes is None:
        return result
    truth = ferplus_majority(votes)[0] == NOT_A_FACE
    others = {"edges unlike the average": scores, "eigenfaces: residual of 50 components": eigenface_residual(table.pixels)}
    if yunet:
        unseen = 1 - cached(folder / "yunet.npz", lambda: confidences(table.pixels, yunet))["confidence"]
        others |= {"YuNet sees no face": unseen, "edges and YuNet, weighted 5 to 1": scores + .2 * unseen}
    return {**result, "ferplus_rows": int(truth.sum()), "listed_and_ferplus": int((listed & truth).sum()),
            "average_precision": {k: float(average_precision_score(truth, np.where(gray, s.max() + 1, s))) for k, s in others.items()}}


def doubted(table, probs, issues, votes):
    "How many labels cleanlab doubts, and how FER+ judges those and the others."
    import numpy as np
    from sklearn.metrics import average_precision_score
    from fer_nbdev.clean import ferplus_majority
    from fer_nbdev.data import USAGES
    right = probs.argmax(1) == table.emotion
    result = {"accuracy": {u: float(right[table.usage == u].mean()) for u in USAGES if (table.usage == u).any()},
              "issues": {u: int((table.usage[issues.row] == u).sum()) for u in USAGES}}
    if votes is None:
        return result
    said = ferplus_majority(votes)[0]
    known = np.isin(said, table.classes)
    differs = known & (said != np.array(table.labels))
    suggested, flagged = np.full(len(table), "", object), np.zeros(len(table), bool)
    suggested[issues.row], flagged[issues.row] = issues.suggested, True
    doubt = 1 - probs[np.arange(len(table)), table.emotion]
    worst = issues.row[known[issues.row]][:1000]
    return {**result, "rows_with_majority": int(known.sum()), "majority_differs": float(differs[known].mean()),
            "issues_with_majority": int((flagged & known).sum()), "precision": float(differs[flagged & known].mean()), "recall": float(flagged[differs].mean()),
            "precision_of_first_1000": float(differs[worst].mean()), "suggestion_is_majority": float((suggested == said)[flagged & known].mean()),
            "average_precision": float(average_precision_score(differs[known], doubt[known]))}


class Edges:
    "Edge features, a Gaussian kernel of some of the Training faces (Nystroem), linear discriminant analysis."
    components, gamma, shrinkage = 1000, 3., 1e-3

    def __init__(self, folder):
        self.folder = folder

    def about(self):
        return {"folds": FOLDS, "components": self.components, "gamma": self.gamma, "shrinkage": self.shrinkage}

    def fit(self, rows, seed):
        "The function from edge features to probabilities that some rows teach."
        from fer_nbdev.clean import edge_features
        from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
        from sklearn.kernel_approximation import Nystroem
        from sklearn.pipeline import make_pipeline
        kernel = Nystroem(gamma=self.gamma, n_components=min(self.components, len(rows) // 4), random_state=seed)
        model = make_pipeline(kernel, LinearDiscriminantAnalysis(solver="lsqr", shrinkage=self.shrinkage))
        return model.fit(edge_features(rows.pixels), rows.emotion).predict_proba

    def out_of_fold(self, table, near):
        "Probabilities for all rows by models that were taught by Training rows of other folds; a picture is in one fold with its copies."
        import numpy as np
        from fer_nbdev.clean import edge_features
        from sklearn.model_selection import StratifiedGroupKFold
        probs, edges = np.zeros((len(table), len(table.classes)), np.float32), edge_features(table.pixels)
        for taught, held in StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0).split(edges, table.emotion, near.first):
            probs[held] = self.fit(table[taught[table.usage[taught] == "Training"]], 0)(edges[held])
        return probs

    def test_probs(self, arm, rows, test, seed):
        "Probabilities for the test rows by a model that the Training rows of an arm taught."
        from fer_nbdev.clean import edge_features
        return self.fit(rows.split("Training"), seed)(edge_features(test.pixels))


class Networks:
    "A small network, trained briefly."
    def __init__(self, folder, recipe):
        self.folder, self.recipe = folder, recipe

    def about(self):
        return {"folds": FOLDS, "epochs": self.recipe.epochs, "recipe": self.recipe.name, "arch": self.recipe.arch, "img_size": self.recipe.img_size}

    def out_of_fold(self, table, near):
        from fer_nbdev.clean import out_of_fold_probs
        return out_of_fold_probs(self.recipe, table, self.folder / "folds", FOLDS, near, resume=True, progress=False)

    def test_probs(self, arm, rows, test, seed):
        from fer_nbdev.clean import predict_run
        from fer_nbdev.train import train
        out = self.folder / f"{arm.replace(' ', '_')}_{seed}"
        train(None if (out / "run.json").exists() else self.recipe.set([f"seed={seed}"]), rows, out, resume=True, progress=False)
        return predict_run(out, test.pixels)


def scored(probs, table, near, votes):
    "Scores on both test splits: all rows, pictures that Training does not hold, and of those the ones with a majority in FER+, against it."
    import numpy as np
    from fer_nbdev.clean import ferplus_majority
    from fer_nbdev.evaluate import score
    test, result = np.flatnonzero(table.usage != "Training"), {}
    for usage in SPLITS:
        of = table.usage[test] == usage
        rows = test[of]
        unseen = ~near.leaks(usage)[rows]
        judges = {"all": (np.ones(len(rows), bool), table.emotion[rows]), "unseen": (unseen, table.emotion[rows])}
        if votes is not None:
            said = ferplus_majority(votes)[0][rows]
            judges["ferplus"] = unseen & np.isin(said, table.classes), np.array([table.classes.index(s) if s in table.classes else 0 for s in said])
        scores = {kind: score(probs[of][use], truth[use], table.classes) for kind, (use, truth) in judges.items() if use.any()}
        result[usage] = {kind: {k: s[k] for k in ("n", "accuracy", "macro_f1", "log_loss")} for kind, s in scores.items()}
    return result


def effect(judge, table, csvs, near, votes, seeds, path):
    "The scores of a judge by arm and seed, their means, and the gains over the raw rows, seed by seed. All are fitted before any is scored."
    from fer_nbdev.clean import apply_findings
    tables = {"raw": table, **{name: apply_findings(table, findings) for name, findings in csvs.items()}}
    test = table[table.usage != "Training"]
    probs = cached(path, lambda: {f"{name} {seed}": judge.test_probs(name, rows, test, seed) for seed in range(seeds) for name, rows in tables.items()})
    arms = {name: {"training_rows": int((rows.usage == "Training").sum()),
                   "runs": [{"seed": seed, **scored(probs[f"{name} {seed}"], table, near, votes)} for seed in range(seeds)]} for name, rows in tables.items()}
    kinds = list(arms["raw"]["runs"][0]["PrivateTest"])
    for name, arm in arms.items():
        arm["mean"] = {u: {k: sum(run[u][k]["accuracy"] for run in arm["runs"]) / seeds for k in kinds} for u in SPLITS}
        if name != "raw":
            pairs = list(zip(arm["runs"], arms["raw"]["runs"]))
            arm["gain"] = {u: {k: [run[u][k]["accuracy"] - raw[u][k]["accuracy"] for run, raw in pairs] for k in kinds} for u in SPLITS}
    return {"seeds": seeds, "arms": arms}


def ask(name, judge, table, votes, near, scores, args):
    "What one judge doubts, what is proposed about it, and what that does to the judge."
    from fer_nbdev.clean import collect_findings, find_label_issues, write_findings
    print(name, file=sys.stderr)
    judged = cached(args.runs / f"probs_{name}.npz", lambda: timed(lambda: {"probs": judge.out_of_fold(table, near)}))
    issues = find_label_issues(table, judged["probs"])
    csvs = {"copies out": collect_findings(table, near, scores), "doubted out": collect_findings(table, near, scores, issues, drop_doubted=True)}
    if votes is not None:
        csvs["with votes"] = collect_findings(table, near, scores, issues, votes)
    write_findings(list(csvs.values())[-1], args.runs / "findings.csv")
    counts = {k: f[f.usage == "Training"].groupby(["kind", "action"]).size() for k, f in csvs.items()}
    return {"about": judge.about(), "cpu_minutes": round(float(judged["cpu"]) / 60, 1), "labels": doubted(table, judged["probs"], issues, votes),
            "findings": {k: {f"{kind}: {action}": int(n) for (kind, action), n in c.items()} for k, c in counts.items()},
            "effect": effect(judge, table, csvs, near, votes, args.seeds, args.runs / f"test_{name}_{args.seeds}.npz")}


def answer(results):
    "The findings in a sentence."
    c, p = results["copies"], results["planted"]
    judge = list(results["judges"])[-1]
    arms = {name: arm["gain"]["PrivateTest"] for name, arm in results["judges"][judge]["effect"]["arms"].items() if "gain" in arm}
    def points(kind): return ", ".join(f"{name} {100 * sum(g[kind]) / len(g[kind]):+.1f}" for name, g in arms.items() if kind in g)
    by_votes = f"; on the majority of FER+ {points('ferplus')}, whose voters corrected the labels of the last" if points("ferplus") else ""
    return (f"{c['all']['rows']:,} rows show a picture that an earlier row shows, {c['exact']['rows']:,} of them byte for byte; "
            f"{c['all']['leaks']['PrivateTest in Training']:,} PrivateTest faces are in Training. "
            f"Planted copies are found with recall {p['recall']:.3f}, precision {p['precision']:.3f}. "
            f"What Training rows without the faults bring ({judge}), in points on unseen PrivateTest faces: {points('unseen')}{by_votes}")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="PATH", help="FER2013: its csv, all rows; without it faces are drawn, and wrong labels planted")
    parser.add_argument("--ferplus", type=Path, metavar="PATH", help="fer2013new.csv of FER+")
    parser.add_argument("--yunet", type=Path, metavar="PATH", help="a YuNet detector as .onnx, to be compared on pictures without a face")
    parser.add_argument("--runs", type=Path, required=True, metavar="FOLDER", help="where results in between go; what is there is not repeated")
    parser.add_argument("--train", action="store_true", help="ask a small network too")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"of the network (default: {EPOCHS})")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"classifiers for every way of cleaning (default: {SEEDS})")
    parser.add_argument("--thin", type=int, default=1, metavar="N", help="plant copies among every N-th row only, which is quicker (default: 1, all rows)")
    parser.add_argument("--out", type=Path, default=_report.RESULTS, metavar="FOLDER", help="where clean.json is written (default: bench/results)")
    args = parser.parse_args()
    for path in (args.data, args.ferplus, args.yunet):
        if path is not None and not path.exists():
            parser.error(f"there is nothing at {path}")
    if args.ferplus and not args.data:
        parser.error("--ferplus needs --data: drawn faces have no votes")
    return args


def main():
    args = parse_args()
    from fer_nbdev.clean import score_not_face
    from fer_nbdev.data import read_fer2013
    from fer_nbdev.votes import read_ferplus
    from fer_nbdev.recipe import read_recipe
    _report.RESULTS = args.out
    table = read_fer2013(args.data) if args.data else draw_faces()
    votes = read_ferplus(args.ferplus) if args.ferplus else None
    print("copies", file=sys.stderr)
    found = cached(args.runs / "near.npz", lambda: search(table))
    near, scores = restore(found), score_not_face(table.pixels)
    judges = {"edges": Edges(args.runs)}
    if args.train:
        recipe = read_recipe("fer2013").set(NETWORK) if args.data else read_recipe("synthetic")
        judges["networks"] = Networks(args.runs, recipe.set([f"epochs={args.epochs}"]))
    asked = {name: ask(name, judge, table, votes, near, scores, args) for name, judge in judges.items()}
    print("planted, not a face", file=sys.stderr)
    results = {"copies": copies_of(table, found), "planted": planted_copies(table, near, args.runs, COPIES if args.data else 42, args.thin),
               "not_a_face": faceless(table, scores, votes, args.yunet, args.runs), "judges": asked}
    options = {"--data": args.data, "--ferplus": args.ferplus, "--yunet": args.yunet}
    report("clean", results, question="What is wrong with the labels and faces of FER2013, and what does cleaning do to the score?", answer=answer(results),
           data={"source": args.data.name if args.data else table.source, "faces": len(table), "ferplus": votes is not None},
           command=" ".join(["python bench/clean.py", *(f"{k} {path.name}" for k, path in options.items() if path), "--runs runs/clean",
                             *["--train"] * args.train, *[f"--thin {args.thin}"] * (args.thin > 1)]))


if __name__ == "__main__":
    main()
