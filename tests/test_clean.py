"""Does `clean` find what was planted, say what is wrong in a csv, and keep its hands off the test splits?

Copies and wrong labels are planted into drawn faces, so that the truth is known. Where the FER2013 parquet is at hand the
search is put to photographs too, which resemble each other more than drawn faces with a texture do.
"""
import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("cleanlab")
pd = pytest.importorskip("pandas")
cv2 = pytest.importorskip("cv2")
from PIL import Image
from scipy.ndimage import gaussian_filter
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import precision_score, recall_score
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.decomposition import PCA

from fer_nbdev.clean import (COPY_KINDS, NOT_A_FACE, FindingsReviewer, apply_findings, collect_findings, edge_features, find_label_issues,
                             find_near_duplicates, match_faces, out_of_fold_probs, plant_copies, plant_label_errors, read_findings,
                             score_not_face, write_findings)
from fer_nbdev.data import EMOTIONS, FER2013, find_duplicates, synthetic_faces
from fer_nbdev.votes import FERPlus
from fer_nbdev.recipe import Recipe
from fer_nbdev.train import fold_tables

REAL = next((p for d in Path(__file__).resolve().parents if (p := d / "shared" / "data" / "fer2013.parquet").is_file()), None)


def textured(table, seed=0):
    "The table with a random texture on every face: photographs differ in hair, skin and background, drawn faces do not."
    noise = gaussian_filter(np.random.default_rng(seed).normal(size=table.pixels.shape), (0, 1.5, 1.5))
    return dataclasses.replace(table, pixels=np.clip(.7 * table.pixels + 40 + 20 * noise / noise.std(), 0, 255).astype(np.uint8))


def ferplus(table, votes):
    "FER+ votes for a table: {row: (class of FERPLUS_CLASSES, votes)}, nobody else voted."
    from fer_nbdev.votes import FERPLUS_CLASSES
    counts = np.zeros((len(table), 10), np.uint8)
    for row, (name, n) in votes.items():
        counts[row, FERPLUS_CLASSES.index(name)] = n
    return FERPlus(counts, table.usage, np.zeros(len(table), bool))


def recall_and_precision(table, n, seed, kinds=tuple(COPY_KINDS)):
    "Recall by kind of n planted copies, and precision of all pairs with a planted row."
    natural = find_near_duplicates(table)
    planted, truth = plant_copies(table, n, kinds, seed)
    found = find_near_duplicates(planted)
    pairs = found.pairs[(found.pairs >= len(table)).any(1)]
    origin = np.concatenate([np.arange(len(table)), truth.source])
    right = natural.first[origin[pairs[:, 0]]] == natural.first[origin[pairs[:, 1]]]  # a copy of a picture that was there twice has two sources
    have = set(map(tuple, pairs.tolist()))
    hit = pd.Series([pair in have for pair in zip(truth.source, truth.row)])
    return hit.groupby(truth.kind).mean(), right.mean(), found, truth


# ------------------------------------------------------------------------------------------------------- copies

@pytest.mark.parametrize("seed", [1, 2])
def test_planted_copies_are_found_among_drawn_faces(seed):
    recall, precision, found, truth = recall_and_precision(textured(synthetic_faces(350, seed), seed), 105, seed)
    assert precision == 1 and recall.drop(["recropped", "everything"]).tolist() == [1.] * 5
    assert recall[["recropped", "everything"]].min() >= .9  # turned and zoomed, a fine texture may lose its details
    mirrored = dict(zip(map(tuple, found.pairs.tolist()), found.mirrored))
    flipped = truth[truth.kind == "mirrored"]
    assert all(mirrored[pair] for pair in zip(flipped.source, flipped.row)) and len(flipped) == 15
    straight = truth[truth.kind.isin(["shifted", "brightened", "noisy", "compressed", "recropped"])]
    assert not any(mirrored.get(pair) for pair in zip(straight.source, straight.row))


@pytest.mark.skipif(REAL is None, reason="there is no shared/data/fer2013.parquet beside the checkout")
def test_planted_copies_are_found_among_photographs():
    rows = pd.read_parquet(REAL, columns=["image_webp", "emotion", "Usage"])[::24]
    faces = np.stack([np.asarray(Image.open(io.BytesIO(b)).convert("L")) for b in rows.image_webp])
    table = FER2013(faces, rows.emotion.to_numpy().astype(np.int64), rows.Usage.to_numpy().astype(str))
    recall, precision, _, _ = recall_and_precision(table, 105, 0)
    assert precision >= .98 and recall.drop(["recropped", "everything"]).min() == 1
    assert recall[["recropped", "everything"]].min() >= .9


def test_copies_made_by_opencv_are_found_with_their_map():
    "Independent of the changes that the library plants: shift, brightness and mirror by other code, and where they moved the pixels."
    table = textured(synthetic_faces(70))
    moved = np.stack([np.roll(f, (2, -3), (0, 1)) for f in table.pixels[:20]])
    bright = cv2.LUT(table.pixels[20:40].reshape(20, -1), np.clip(np.arange(256) * .7 + 60, 0, 255).astype(np.uint8)).reshape(20, 48, 48)
    flipped = np.stack([cv2.flip(f, 1) for f in table.pixels[40:60]])
    more = FER2013(np.concatenate([table.pixels, moved, bright, flipped]),
                   np.concatenate([table.emotion, table.emotion[:60]]), np.concatenate([table.usage, table.usage[:60]]))
    near = find_near_duplicates(more)
    assert near.pairs.tolist() == [[i, i + 70] for i in range(60)]
    assert near.mirrored.tolist() == [False] * 40 + [True] * 20
    np.testing.assert_allclose(near.warp[:20], np.broadcast_to([[1, 0, -3], [0, 1, 2]], (20, 2, 3)), atol=.25)
    np.testing.assert_allclose(near.warp[20:40], np.broadcast_to([[1, 0, 0], [0, 1, 0]], (20, 2, 3)), atol=.05)
    assert near.groups == [[i, i + 70] for i in range(60)]


def test_a_search_does_not_depend_on_the_order_of_the_rows():
    table, _ = plant_copies(textured(synthetic_faces(210)), 42)
    order = np.random.default_rng(0).permutation(len(table))
    there, here = find_near_duplicates(table), find_near_duplicates(table[order])
    assert {frozenset(g) for g in there.groups} == {frozenset(order[g].tolist()) for g in here.groups}


def test_exact_copies_are_part_of_the_result_and_gray_is_nobodys_copy():
    faces = textured(synthetic_faces(28))
    gray = np.full((3, 48, 48), 7, np.uint8); gray[1] += 1
    usage = np.array(["Training"] * 28 + ["PrivateTest"] * 5 + ["Training"] * 3)
    table = FER2013(np.concatenate([faces.pixels, faces.pixels[:5], gray]), np.zeros(36, np.int64), usage)
    near, exact = find_near_duplicates(table), find_duplicates(table)
    assert near.first.tolist() == exact.first.tolist() and len(near.pairs) == 0
    assert near.leaks().sum() == 5 and near.groups[-1] == [33, 35]


# --------------------------------------------------------------------------------------- no faces, and wrong labels

def test_pictures_without_a_face_score_highest():
    rng, faces = np.random.default_rng(3), synthetic_faces(280, 3).pixels
    rows = rng.choice(280, 12, replace=False)
    for k, row in enumerate(rows):
        faces[row] = 40 * (k + 1) % 256
        if k % 3 == 1: faces[row] = 128 + 90 * np.sin(np.arange(48) * .7)[:, None]
        if k % 3 == 2: faces[row, 24:] = 255
    scores = score_not_face(faces)
    assert set(np.argsort(-scores)[:12]) == set(rows) and scores[rows].min() > .3 > np.delete(scores, rows).max()


@pytest.mark.parametrize("seed", [0, 5])
def test_planted_label_errors_are_found(seed):
    drawn = synthetic_faces(700, seed)
    table, wrong = plant_label_errors(drawn, .05, seed)
    assert (table.emotion[wrong] != drawn.emotion[wrong]).all() and (table.usage[wrong] == "Training").all()
    assert (np.delete(table.emotion, wrong) == np.delete(drawn.emotion, wrong)).all()
    model = make_pipeline(PCA(50, random_state=0), LinearDiscriminantAnalysis())
    issues = find_label_issues(table, cross_val_predict(model, edge_features(table.pixels), table.emotion, cv=5, method="predict_proba"))
    planted, flagged = np.isin(np.arange(700), wrong), np.isin(np.arange(700), issues.row)
    assert recall_score(planted, flagged) >= .9 and precision_score(planted, flagged) >= .7
    hits = issues[issues.row.isin(wrong)]
    assert (hits.suggested.to_numpy() == np.array(EMOTIONS)[drawn.emotion[hits.row]]).mean() >= .95
    assert issues.score.is_monotonic_decreasing


# ------------------------------------------------------------------------------------- nothing leaks across splits

def test_no_network_judges_a_picture_that_taught_it(tmp_path):
    table, _ = plant_copies(textured(synthetic_faces(140)), 30, ("shifted", "brightened"))
    near, recipe = find_near_duplicates(table), Recipe.read("synthetic").set(["epochs=1", "bs=16", "precision=fp32"])
    probs = out_of_fold_probs(recipe, table, tmp_path / "folds", 2, near, progress=False)
    train = np.flatnonzero(table.usage == "Training")
    kept = train[np.sort(np.unique(near.first[train], return_index=True)[1])]
    assert len(kept) < len(train)
    for fold in fold_tables(table[kept], 2, recipe.seed):
        taught, held = (set(near.first[kept[fold.usage == u]]) for u in ("Training", "PublicTest"))
        assert not taught & held and taught | held == set(near.first[train])
    taught = np.isin(near.first, near.first[train])  # one answer for every picture that Training holds
    np.testing.assert_array_equal(probs[taught], probs[near.first][taught])
    np.testing.assert_allclose(probs.sum(1), 1, atol=1e-5)


def test_cleaned_training_shares_no_picture_with_the_test_splits():
    table, _ = plant_copies(textured(synthetic_faces(280)), 84)
    near = find_near_duplicates(table)
    assert near.leaks("PrivateTest").sum() and near.leaks("PublicTest").sum()
    cleaned = apply_findings(table, collect_findings(table, near, score_not_face(table.pixels)))
    again = find_near_duplicates(cleaned)
    assert not again.leaks("PrivateTest").any() and not again.leaks("PublicTest").any()
    for split in ("PublicTest", "PrivateTest"):
        np.testing.assert_array_equal(cleaned.split(split).pixels, table.split(split).pixels)
        np.testing.assert_array_equal(cleaned.split(split).emotion, table.split(split).emotion)
    of_training = [r for g in again.groups for r in g if cleaned.usage[r] == "Training"]
    assert not of_training, "copies were left within Training"


# -------------------------------------------------------------------------------------------------------- the csv

@pytest.fixture(scope="module")
def searched():
    "A table with copies, wrong labels and one picture that is no face; its votes, and its findings."
    table, wrong = plant_label_errors(synthetic_faces(280))
    table, _ = plant_copies(textured(table), 14)
    table.pixels[3] = 90
    model = make_pipeline(PCA(30, random_state=0), LinearDiscriminantAnalysis())
    probs = cross_val_predict(model, edge_features(table.pixels), table.emotion, cv=5, method="predict_proba")
    issues = find_label_issues(table, probs)
    doubted = issues[table.usage[issues.row] == "Training"]
    names = dict(angry="anger", happy="happiness", sad="sadness")
    said = {int(doubted.row.iloc[0]): (names.get(doubted.suggested.iloc[0], doubted.suggested.iloc[0]), 8),
            int(doubted.row.iloc[1]): (names.get(doubted.label.iloc[1], doubted.label.iloc[1]), 9), 5: ("NF", 10)}
    votes = ferplus(table, said)
    return table, votes, collect_findings(table, find_near_duplicates(table), score_not_face(table.pixels), issues, votes), doubted


def test_what_is_proposed_follows_the_votes(searched):
    table, _, findings, doubted = searched
    label = findings[findings.kind == "label"].set_index("row")
    first, second, rest = doubted.row.iloc[0], doubted.row.iloc[1], doubted.row.iloc[2:]
    assert label.loc[first, ["action", "new_label"]].tolist() == ["relabel", doubted.suggested.iloc[0]] and label.loc[first, "votes"] == 8
    assert label.loc[second, "action"] == "keep" and (label.loc[rest, "action"] == "drop").all()
    faceless = findings[findings.kind == "not a face"].set_index("row")
    assert faceless.loc[3, "action"] == faceless.loc[5, "action"] == "drop" and faceless.loc[5, "ferplus"] == NOT_A_FACE
    assert (findings[findings.usage != "Training"].action == "keep").all()


def test_the_csv_round_trips(searched, tmp_path):
    _, _, findings, _ = searched
    write_findings(findings, tmp_path / "a.csv")
    read = read_findings(tmp_path / "a.csv")
    assert read.to_dict("list") == findings.to_dict("list")
    write_findings(read, tmp_path / "b.csv")
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.csv", "b.csv"]  # nothing half written is left


def broken(change):
    def lines(text):
        rows = [line.split(",") for line in text.splitlines()]
        change(rows, rows[0].index)
        return "\n".join(",".join(r) for r in rows) + "\n"
    return lines


def _set(line, column, value):
    def change(rows, at): rows[line - 1][at(column)] = value
    return broken(change)


BROKEN = {
    "unknown action": (_set(4, "action", "remove"), "line 4: unknown action 'remove'"),
    "unknown kind": (_set(7, "kind", "ugly"), "line 7: unknown kind 'ugly'"),
    "row is a word": (_set(3, "row", "three"), "line 3: row must be a whole number, not 'three'"),
    "score is a word": (_set(5, "score", "high"), "line 5: score must be a number"),
    "votes missing": (_set(6, "votes", ""), "line 6: votes must be a whole number, not ''"),
    "relabel to nothing": (_set(2, "action", "relabel"), "line 2: relabel needs a class"),
    "a short line": (broken(lambda rows, at: rows.__setitem__(8, rows[8][:3])), "line 9: "),
    "a long line": (broken(lambda rows, at: rows[8].append("x")), "line 9"),
    "a column is gone": (broken(lambda rows, at: [r.pop(9) for r in rows]), "line 1: no column action"),
    "another separator": (lambda text: text.replace(",", ";"), "line 1: no column"),
    "after an empty line": (lambda text: _set(4, "action", "remove")(text).replace("\n", "\n\n", 1), "line 5: unknown action"),
    "the row is beyond the table": (_set(3, "row", "99999"), "line 3: row 99999 is not in the table"),
    "a row below zero": (_set(3, "row", "-1"), "line 3: row -1 is not in the table"),
    "pixels of another row": (_set(4, "pixels", "p000000000000"), "line 4: row "),
    "an unknown class": (lambda text: _set(2, "new_label", "bored")(_set(2, "action", "relabel")(text)), "line 2: row "),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_csv_names_its_line(searched, tmp_path, name):
    table, _, findings, _ = searched
    change, message = BROKEN[name]
    # Training rows only: a test row would be refused for that
    write_findings(findings[findings.usage == "Training"].reset_index(drop=True), tmp_path / "findings.csv")
    text = change((tmp_path / "findings.csv").read_text())
    (tmp_path / "findings.csv").write_text(text)
    with pytest.raises(ValueError, match="findings.csv") as error:
        apply_findings(table, tmp_path / "findings.csv")
    assert message in str(error.value)


# ------------------------------------------------------------------------------------------------------- applying

def test_applying_does_what_the_csv_says_and_nothing_else(searched, tmp_path):
    table, _, findings, _ = searched
    before = (table.pixels.copy(), table.emotion.copy())
    write_findings(findings, tmp_path / "findings.csv")
    cleaned = apply_findings(table, tmp_path / "findings.csv")
    dropped, relabelled = set(findings.row[findings.action == "drop"]), findings[findings.action == "relabel"]
    rest = [r for r in range(len(table)) if r not in dropped]
    expected = table.emotion.copy()
    for f in relabelled.itertuples():
        expected[f.row] = table.classes.index(f.new_label)
    assert dropped and len(relabelled)
    np.testing.assert_array_equal(cleaned.pixels, table.pixels[rest])
    np.testing.assert_array_equal(cleaned.emotion, expected[rest])
    np.testing.assert_array_equal(cleaned.usage, table.usage[rest])
    np.testing.assert_array_equal(before[0], table.pixels)
    np.testing.assert_array_equal(before[1], table.emotion)


def test_an_edit_of_one_line_changes_one_row(searched, tmp_path):
    table, _, findings, _ = searched
    kept = findings.assign(action="keep", new_label="")
    assert len(apply_findings(table, kept)) == len(table)
    line = int(np.flatnonzero(findings.usage == "Training")[0])
    kept.loc[line, ["action", "new_label"]] = "relabel", next(c for c in EMOTIONS if c != findings.label[line])
    write_findings(kept, tmp_path / "findings.csv")
    changed = np.flatnonzero(apply_findings(table, tmp_path / "findings.csv").emotion != table.emotion)
    assert changed.tolist() == [findings.row[line]]


def test_cleaning_what_is_clean_changes_nothing(searched):
    table, votes, findings, _ = searched
    cleaned = apply_findings(table, findings)
    keep = np.setdiff1d(np.arange(len(table)), findings.row[findings.action == "drop"])
    left = FERPlus(votes.votes[keep], votes.usage[keep], votes.dropped[keep])
    again = collect_findings(cleaned, find_near_duplicates(cleaned), score_not_face(cleaned.pixels), ferplus=left)
    assert (again.action == "keep").all()
    twice = apply_findings(cleaned, again)
    np.testing.assert_array_equal(twice.pixels, cleaned.pixels)
    np.testing.assert_array_equal(twice.emotion, cleaned.emotion)
    with pytest.raises(ValueError, match="not in the table|other data|applied before"):
        apply_findings(cleaned, findings)  # the same csv a second time


def test_test_rows_are_not_for_the_taking(searched):
    table, _, findings, _ = searched
    line = findings.index[findings.usage == "PrivateTest"][0]
    for action, label in (("drop", ""), ("relabel", "happy")):
        bad = findings.copy()
        bad.loc[line, ["action", "new_label"]] = action, label
        with pytest.raises(ValueError, match="PrivateTest row.*write keep"):
            apply_findings(table, bad)


def test_a_review_ends_in_the_csv_and_then_in_the_table(searched, tmp_path):
    pytest.importorskip("ipywidgets")
    table, _, findings, _ = searched
    path = tmp_path / "findings.csv"
    write_findings(findings, path)
    page = FindingsReviewer(table, path, kinds=("label",), batch=4)
    menus = [card.children[-1] for card in page.grid.children]
    rows = [int(findings.row[line]) for line in page.lines[:4]]
    wanted = ["keep", "drop", next(c for c in EMOTIONS if c != findings.label[page.lines[2]]), "keep"]
    for menu, value in zip(menus, wanted):
        menu.value = value
    page.next_button.click()
    read, cleaned = read_findings(path), apply_findings(table, path)
    assert read.loc[page.lines[:4], "action"].tolist() == ["keep", "drop", "relabel", "keep"]
    gone = set(read.row[read.action == "drop"])
    where = {r: i for i, r in enumerate(r for r in range(len(table)) if r not in gone)}
    assert len(cleaned) == len(where) and rows[1] in gone and rows[2] in where
    assert cleaned.labels[where[rows[2]]] == wanted[2]
    only = FindingsReviewer(table, path, kinds=("label",), labels=("happy",))
    assert len(only.lines) < len(page.lines) and set(only.findings.label[only.lines]) <= {"happy"}


def test_match_is_symmetric_and_strangers_do_not_match():
    faces = textured(synthetic_faces(30)).pixels
    moved = np.roll(faces[0], (1, 2), (0, 1))
    there, back = match_faces(faces[0], moved), match_faces(moved, faces[0])
    np.testing.assert_allclose(there.warp[:, 2], -back.warp[:, 2], atol=.1)
    assert min(there.similarity, back.similarity) > .97
    assert max(match_faces(faces[i], faces[i + 1]).similarity for i in range(29)) < .85


def test_no_test_label_decides_which_training_labels_are_doubted():
    table, wrong = plant_label_errors(synthetic_faces(840), .1)
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(7), len(table)) * .5 + .5 * np.eye(7)[synthetic_faces(840).emotion]
    other = dataclasses.replace(table, emotion=np.where(table.usage == "Training", table.emotion, rng.integers(0, 7, len(table))))
    doubted, again = (found.row[table.usage[found.row] == "Training"].tolist() for found in (find_label_issues(t, probs) for t in (table, other)))
    assert set(doubted) & set(wrong) and sorted(doubted) == sorted(again)
    assert len(find_label_issues(table.split("Training"), probs[table.usage == "Training"])) == len(doubted)
