"""Damaged faces: every corruption against an implementation of its own or by its property, the scores against scikit-learn, the votes against pandas."""
from dataclasses import replace
from importlib import resources

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageEnhance
from scipy import ndimage
from scipy.stats import chisquare
from sklearn.metrics import accuracy_score, f1_score, log_loss

from fer_nbdev.core import EMOTIONS
from fer_nbdev.data import select_classes, synthetic_faces
from fer_nbdev.votes import FERPLUS_CLASSES, FERPlus
from fer_nbdev.evaluate import calibration_error, evaluate_model
from fer_nbdev.inference import Predictor
from fer_nbdev.robustness import (CORRUPTIONS, Corruption, accuracy_by_agreement, accuracy_by_group, corrupt,
                                  evaluate_robustness, plot_corruptions, plot_robustness)

FACES = synthetic_faces(70, seed=5).pixels
SMOOTH = np.stack([ndimage.gaussian_filter(f, 3) for f in FACES])  # interpolation in 1/32 pixel stays within a gray level
RANDOM = ("noise", "rotation", "shift", "occlusion")
each = pytest.mark.parametrize("name", CORRUPTIONS)


def severities(name):
    "(severity, strength) of all five."
    return enumerate(CORRUPTIONS[name].strengths, 1)


def far(a, b):
    return np.abs(np.asarray(a, int) - np.asarray(b, int)).max()


# ------------------------------------------------------------------------------------------ what holds for all

@each
def test_severity_0_is_the_face_and_others_leave_it_alone(name):
    before = FACES.copy()
    same = corrupt(FACES, name, 0)
    assert (same == FACES).all() and same is not FACES
    for severity in range(1, 6):
        out = corrupt(FACES, name, severity)
        assert out.shape == FACES.shape and out.dtype == np.uint8 and (out != FACES).any()
    assert (FACES == before).all()


@each
def test_more_severe_is_more_damage(name):
    "The mean distance from the undamaged faces grows with every severity, over a distribution of faces."
    faces = synthetic_faces(280, seed=6).pixels.astype(int)
    damage = [np.abs(corrupt(faces.astype(np.uint8), name, s).astype(int) - faces).mean() for s in range(6)]
    assert (np.diff(damage) > .05).all(), damage


@each
def test_the_seed_decides_and_the_number_of_faces_does_not(name):
    one, other = corrupt(FACES, name, 3, seed=1), corrupt(FACES, name, 3, seed=2)
    assert (one == corrupt(FACES, name, 3, seed=1)).all()
    assert (one == other).all() == (name not in RANDOM)
    assert (corrupt(FACES[:9], name, 3, seed=1) == one[:9]).all()


@each
def test_strengths_run_one_way(name):
    strengths = CORRUPTIONS[name].strengths
    assert len(strengths) == 5 and abs(np.sign(np.diff(strengths)).sum()) == 4


# ------------------------------------------------------------------------------- each against something of its own

def test_blur_is_scipys_gaussian():
    for severity, sigma in severities("blur"):
        want = np.stack([ndimage.gaussian_filter(f.astype(float), sigma, mode="nearest", truncate=3.5) for f in FACES])
        got = corrupt(FACES, "blur", severity)
        assert np.abs(got - want).max() < 6 and np.abs(got - want).mean() < .6, severity


def test_noise_is_normal_white_and_as_strong_as_it_says():
    gray = np.full((200, 48, 48), 128, np.uint8)
    for severity, sd in severities("noise"):
        e = corrupt(gray, "noise", severity).astype(float) - 128
        assert abs(e.mean()) < .02*sd
        assert sd == pytest.approx(e.std(), rel=.02)
        assert .67 < (np.abs(e) <= sd + .5).mean() < (.78 if sd == 5 else .71)  # rounding widens the middle of the weakest
        for a, b in ((e[:, 1:], e[:, :-1]), (e[:, :, 1:], e[:, :, :-1]), (e[1:], e[:-1])):
            assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < .01
    assert corrupt(np.zeros((1, 48, 48), np.uint8), "noise", 5).min() == 0 and corrupt(gray + 127, "noise", 5).max() == 255


def test_jpeg_is_that_of_pillow(tmp_path):
    for severity, quality in severities("jpeg"):
        for face, got in zip(FACES[:20], corrupt(FACES[:20], "jpeg", severity)):
            Image.fromarray(face).save(tmp_path / "face.jpg", quality=quality)
            assert np.abs(np.asarray(Image.open(tmp_path / "face.jpg"), int) - got).mean() < .1


def test_darkness_and_contrast_are_those_of_pillow():
    for name, enhance in (("darkness", ImageEnhance.Brightness), ("contrast", ImageEnhance.Contrast)):
        for severity, factor in severities(name):
            got = corrupt(FACES, name, severity)
            assert far(got, [np.asarray(enhance(Image.fromarray(f)).enhance(factor)) for f in FACES]) <= 1


def test_rotation_is_scipys_to_either_side():
    for severity, degrees in severities("rotation"):
        got, left = corrupt(SMOOTH, "rotation", severity), 0
        for face, turned in zip(SMOOTH, got):
            sides = [far(ndimage.rotate(face, s*degrees, reshape=False, order=1, mode="nearest"), turned) for s in (1, -1)]
            assert min(sides) <= 3
            left += sides[0] < sides[1]
        assert 20 < left < 50  # of 70: both sides, about equally often


def test_shift_repeats_the_edge_to_four_sides():
    seen = []
    for severity, pixels in severities("shift"):
        for face, moved in zip(FACES, corrupt(FACES, "shift", severity)):
            ways = {way: ndimage.shift(face, np.array(way)*pixels, order=0, mode="nearest") for way in ((1, 0), (-1, 0), (0, 1), (0, -1))}
            fits = [way for way, want in ways.items() if (want == moved).all()]
            assert fits
            seen += fits[:1]
    assert all(seen.count(way) > .15*len(seen) for way in ((1, 0), (-1, 0), (0, 1), (0, -1)))


def test_occlusion_is_one_square_within_the_next():
    faces = np.zeros((3000, 48, 48), np.uint8)
    before = np.zeros(faces.shape, bool)
    for severity, side in severities("occlusion"):
        covered = corrupt(faces, "occlusion", severity) == 130
        assert (covered.sum((1, 2)) == side**2).all()
        rows, columns = covered.any(2), covered.any(1)
        assert (rows.sum(1) == side).all() and (columns.sum(1) == side).all()  # so it is a square, and whole
        assert (covered | ~before).all()
        before = covered
    small = corrupt(faces, "occlusion", 1) == 130
    assert small[:, 0].any() and small[:, -1].any() and small[:, :, 0].any() and small[:, :, -1].any()
    for first in (small.any(2).argmax(1), small.any(1).argmax(1)):
        counts = np.bincount(first, minlength=41)
        assert len(counts) == 41 and chisquare(counts).pvalue > 1e-3  # uniform from 0 to 40


def _areas(side):
    "Row i of a face shrunk to `side` is the mean over the strip that it covers: float [side, 48]."
    edges = np.arange(side + 1)*48/side
    overlap = np.minimum(edges[1:, None], np.arange(1, 49)) - np.maximum(edges[:-1, None], np.arange(48))
    return overlap.clip(0)*side/48


def test_resolution_is_a_mean_over_areas_enlarged_as_pillow_does():
    for severity, side in severities("resolution"):
        small = [Image.fromarray(np.rint(_areas(side) @ f @ _areas(side).T).astype(np.uint8)) for f in FACES]
        want = [np.asarray(f.resize((48, 48), Image.Resampling.BILINEAR)) for f in small]
        assert far(corrupt(FACES, "resolution", severity), want) <= 2


@pytest.mark.parametrize("name", ["blur", "shift", "occlusion"])
def test_lengths_grow_with_the_face(name):
    "A face of twice the side, damaged and shrunk again, is the damaged face."
    big = corrupt(np.kron(SMOOTH, np.ones((2, 2), np.uint8)), name, 4)
    small = big.reshape(-1, 48, 2, 48, 2).mean((2, 4))
    assert np.abs(small - corrupt(SMOOTH, name, 4)).mean() < (.6 if name != "occlusion" else 2.)


# ------------------------------------------------------------------------------------------------- models under them

DRAWN = synthetic_faces(42, seed=1)


@pytest.fixture(scope="module")
def predictor():
    return Predictor("accurate", threads=1)


@pytest.fixture(scope="module")
def robust(predictor):
    return evaluate_robustness(predictor, DRAWN, None, corruptions=("noise", "shift"))


def test_scores_are_scikit_learns(predictor, robust):
    rows = robust.to_pandas()
    assert rows.corruption.tolist() == ["none"] + ["noise"]*5 + ["shift"]*5 and rows.severity.tolist() == [0, *range(1, 6), *range(1, 6)]
    clean = predictor.predict_faces(DRAWN.pixels)
    for row in rows.itertuples():
        probs = clean if row.severity == 0 else predictor.predict_faces(corrupt(DRAWN.pixels, row.corruption, row.severity))
        said = probs.argmax(1)
        assert row.n == 42 and row.strength == (0 if row.severity == 0 else CORRUPTIONS[row.corruption].strengths[row.severity - 1])
        assert row.accuracy == pytest.approx(accuracy_score(DRAWN.emotion, said))
        assert row.macro_f1 == pytest.approx(f1_score(DRAWN.emotion, said, average="macro", labels=range(7), zero_division=0.))
        assert row.log_loss == pytest.approx(log_loss(DRAWN.emotion, probs/probs.sum(1, keepdims=True), labels=range(7)), rel=1e-4)
        assert row.ece == pytest.approx(calibration_error(probs, DRAWN.emotion), abs=1e-4)
        assert row.confidence == pytest.approx(probs.max(1).mean(), rel=1e-4)
        assert row.changed == pytest.approx((said != clean.argmax(1)).mean())


def test_the_same_by_name_folder_file_and_function(predictor, robust):
    with resources.as_file(resources.files("fer_nbdev") / "weights" / "accurate") as folder:
        for model in ("accurate", folder, folder / "model.onnx", predictor.predict_faces):
            other = evaluate_robustness(model, DRAWN[:7], None, corruptions=["shift"])
            for severity in range(1, 6):
                np.testing.assert_allclose(other.probs["shift", severity], robust.probs["shift", severity][:7], atol=1e-5)


def test_a_setting_is_an_evaluation_like_any_other(predictor, robust):
    e = robust.at("noise", 4)
    want = evaluate_model(predictor, replace(DRAWN, pixels=corrupt(DRAWN.pixels, "noise", 4)), None)
    assert (e.table.pixels == want.table.pixels).all() and e.scores["intervals"].keys() == want.scores["intervals"].keys()
    assert e.scores["accuracy"] == want.scores["accuracy"] and e.scores["log_loss"] == pytest.approx(want.scores["log_loss"], rel=1e-5)
    assert e.title.startswith("accurate, noise 30 gray levels") and robust.clean.title.startswith("accurate on")


def test_classes_of_the_data_need_not_be_those_of_the_model(predictor):
    pair = select_classes(DRAWN, ("sad", "happy"))
    r = evaluate_robustness(predictor, pair, None, corruptions="blur")
    assert r.clean.table.classes == EMOTIONS and r.to_pandas().n.tolist() == [12]*6
    want = predictor.predict_faces(corrupt(pair.pixels, "blur", 5)).argmax(1)
    assert (r.probs["blur", 5].argmax(1) == want).all()


def test_own_corruptions_and_their_number_of_strengths():
    mirror = {"mirror": Corruption(lambda faces, strength, rng: faces[..., ::-1], (1,), "")}
    def bright(faces):
        share = faces.mean((1, 2), keepdims=False)[:, None]/256
        return np.concatenate([share, 1 - share, np.zeros((len(faces), 5))], 1)
    rows = evaluate_robustness(bright, DRAWN, None, corruptions=mirror).to_pandas()
    assert rows.corruption.tolist() == ["none", "mirror"] and rows.changed.tolist() == [0., 0.]


def test_a_model_that_knows_nothing_of_the_pixels_loses_nothing():
    def prior(faces): return np.tile(np.eye(7)[3]*.4 + .6/7, (len(faces), 1))
    rows = evaluate_robustness(prior, DRAWN, None, name="prior").to_pandas()
    assert len(rows) == 46 and rows.accuracy.nunique() == 1 and (rows.changed == 0).all()
    assert plot_robustness(rows, ("accuracy", "log_loss")).shape == (3, 3)


# ---------------------------------------------------------------------------------------------------------- votes

def test_agreement_is_what_a_groupby_of_pandas_says(robust):
    rng = np.random.default_rng(0)
    table = synthetic_faces(420, seed=2)
    probs = rng.dirichlet(np.full(7, .3), 420)
    votes = np.array([rng.multinomial(10, rng.dirichlet(np.full(10, .25))) for _ in range(420)]).astype(np.uint8)
    ferplus = FERPlus(votes, table.usage, np.zeros(420, bool))
    e = evaluate_model(lambda faces: probs[-len(faces):], table, "public+private")
    got = accuracy_by_agreement(e, ferplus)

    named = pd.DataFrame(votes, columns=FERPLUS_CLASSES).rename(columns=dict(anger="angry", happiness="happy", sadness="sad"))
    ours = named[list(EMOTIONS)].loc[e.rows]
    want = pd.DataFrame(dict(votes=ours.max(axis=1), most=ours.idxmax(axis=1), truth=e.table.labels, said=[EMOTIONS[i] for i in e.probs.argmax(1)],
                             confidence=e.probs.max(1)), index=e.rows)
    want["right"] = want.truth == want.said
    clear = want[want.votes > 5]
    grouped = want.groupby("votes")
    index = sorted(want.votes.unique(), reverse=True)
    assert got.index.tolist() == [*index, "all"] and len(index) > 6
    assert got.faces.tolist() == [*grouped.size()[index], len(want)]
    np.testing.assert_allclose(got.accuracy, [*grouped.right.mean()[index], want.right.mean()])
    np.testing.assert_allclose(got.confidence, [*grouped.confidence.mean()[index], want.confidence.mean()])
    by_voters = (clear.said == clear.most).groupby(clear.votes).mean().reindex(index)
    labels = (clear.truth == clear.most).groupby(clear.votes).mean().reindex(index)
    np.testing.assert_allclose(got.ferplus_accuracy, [*by_voters, (clear.said == clear.most).mean()])
    np.testing.assert_allclose(got.label_accuracy, [*labels, (clear.truth == clear.most).mean()])
    assert got.ferplus_faces["all"] == len(clear) and got.ferplus_faces[5] == 0 and np.isnan(got.ferplus_accuracy[5])


def test_votes_follow_the_classes_of_the_table(predictor):
    table = select_classes(DRAWN, EMOTIONS[::-1])
    votes = np.zeros((42, 10), np.uint8)
    votes[range(42), [FERPLUS_CLASSES.index(dict(angry="anger", happy="happiness", sad="sadness").get(c, c)) for c in table.labels]] = 10
    got = accuracy_by_agreement(evaluate_model(predictor, table, None), FERPlus(votes, table.usage, np.zeros(42, bool)))
    assert got.label_accuracy["all"] == 1 and got.ferplus_accuracy["all"] == got.accuracy["all"] and got.index.tolist() == [10, "all"]


def test_votes_of_other_rows_or_classes_are_refused(robust):
    votes = FERPlus(np.zeros((42, 10), np.uint8), np.full(42, "PublicTest"), np.zeros(42, bool))
    with pytest.raises(ValueError, match="not those of the table"):
        accuracy_by_agreement(robust.clean, votes)
    moods = replace(robust.clean, table=replace(DRAWN, classes=("calm", *EMOTIONS[1:])))
    with pytest.raises(ValueError, match="no votes for 'calm'"):
        accuracy_by_agreement(moods, replace(votes, usage=DRAWN.usage))


def test_groups_are_what_pandas_says():
    rng, table = np.random.default_rng(1), synthetic_faces(210, seed=2)
    probs = rng.dirichlet(np.full(7, .3), 210)
    e = evaluate_model(lambda faces: probs, table, None)
    group = rng.choice(["a", "b", "c"], 210, p=[.6, .38, .02])
    got = accuracy_by_group(e, group, emotion="angry", n_resamples=200)
    frame = pd.DataFrame(dict(group=group, right=e.probs.argmax(1) == table.emotion, angry=e.probs.argmax(1) == 0,
                              confidence=e.probs.max(1), truth=table.emotion))
    by, others = frame.groupby("group"), frame[frame.truth != 0]
    assert got.index.tolist() == ["a", "b", "c", "all"] and got.faces.tolist() == [*by.size(), 210]
    np.testing.assert_allclose(got.accuracy, [*by.right.mean(), frame.right.mean()])
    np.testing.assert_allclose(got.confidence, [*by.confidence.mean(), frame.confidence.mean()])
    np.testing.assert_allclose(got.called_wrongly, [*others.groupby("group").angry.mean(), others.angry.mean()])
    assert (got.low <= got.accuracy).all() and (got.accuracy <= got.high).all()
    assert (got.high - got.low)["b"] > (got.high - got.low)["all"] and "called_wrongly" not in accuracy_by_group(e, group, n_resamples=20)
    alone = accuracy_by_group(e, np.arange(210) == 7, n_resamples=20)
    assert alone.faces[True] == 1 and np.isnan(alone.low[True])
    with pytest.raises(ValueError, match="one value a face"):
        accuracy_by_group(e, group[:9])
    with pytest.raises(ValueError, match="unknown class 'bored'"):
        accuracy_by_group(e, group, emotion="bored")


def test_the_command_line_damages_faces_too(tmp_path):
    import json

    from typer.testing import CliRunner

    from fer_nbdev.cli import app
    from fer_nbdev.data import to_folders
    to_folders(synthetic_faces(210, seed=2), tmp_path / "faces", progress=False)
    asked = f"evaluate fast --data {tmp_path / 'faces'} --split public --robustness --out {tmp_path / 'report'}"
    said, plain = CliRunner().invoke(app, asked.split()), CliRunner().invoke(app, [*asked.split(), "--json"])
    assert said.exit_code == plain.exit_code == 0 and all(name in said.stdout for name in CORRUPTIONS)
    rows = json.loads(plain.stdout)["robustness"]["rows"]
    assert len(rows) == 1 + 5 * len(CORRUPTIONS) and {r["corruption"] for r in rows} >= set(CORRUPTIONS)
    assert json.loads((tmp_path / "report" / "robustness.json").read_text())["rows"] == rows
    assert Image.open(tmp_path / "report" / "robustness.png").size[0] > 300


@pytest.mark.parametrize("severity", [-1, 9, 2., 1.5, "3"])
def test_severities_are_whole_numbers_in_range(severity):
    face = synthetic_faces(7).pixels[0]
    for draw in (lambda: corrupt(face[None], "blur", severity), lambda: plot_corruptions(face, ["blur"], (severity,))):
        with pytest.raises(ValueError, match="severity"):
            draw()
