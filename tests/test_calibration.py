"""Probabilities that are made true: a planted fault is found, chance is not, the fit is the minimum it claims, every graph gives what the formula says."""
import json

import numpy as np
import pytest
from scipy.special import log_softmax, softmax
from sklearn.linear_model import LogisticRegression

from fer_nbdev.calibrate import CALIBRATIONS, Calibration, calibrate_graph, fit_calibration
from fer_nbdev.cards import weights_folder
from fer_nbdev.data import synthetic_faces
from fer_nbdev.evaluate import calibration_error, score
from fer_nbdev.inference import Predictor

WEIGHTS = weights_folder()


def answers(n=4000, k=7, seed=0):
    "Probabilities that are true, and labels drawn from them."
    rng = np.random.default_rng(seed)
    probs = softmax(rng.normal(0, 2, (n, k)) + rng.normal(0, 1, k), axis=1)
    return probs, (rng.random((n, 1)) > probs.cumsum(1)[:, :-1]).sum(1)


def bent(probs, scale, bias, power=1.):
    "What a model says that would be true, were it raised to the power, scaled and shifted."
    wanted = np.log(probs) - bias
    wanted -= wanted.max(axis=1, keepdims=True)  # odds alone count, and the root below is of what is below 0
    return softmax(-(-wanted / scale) ** (1 / power), axis=1)


@pytest.mark.parametrize("method, scale, bias", [
    ("temperature", np.full(7, .5), np.zeros(7)), ("temperature", np.full(7, 1.8), np.zeros(7)),
    ("vector", np.ones(7), np.array([0, -2., 0, 0, 1, 0, 0])), ("vector", np.array([1, 1.6, 1, .7, 1, 1, .8]), np.array([0, 1., 0, 0, -1, 0, 0]))])
def test_a_planted_fault_is_found_and_mended(method, scale, bias):
    probs, truth = answers()
    given, others, unseen = bent(probs, scale, bias), *(f(answers(seed=1)) for f in (lambda a: bent(a[0], scale, bias), lambda a: a[1]))
    found = fit_calibration(given, truth)
    assert found.method == method and found.losses[method] < min(found.losses.values()) + .001
    assert calibration_error(found.apply(others), unseen) < .02
    before, after = (score(p, unseen)["log_loss"] for p in (others, found.apply(others)))
    assert after < before - .01 and after == pytest.approx(score(answers(seed=1)[0], unseen)["log_loss"], abs=.005)
    assert np.abs(found.apply(others) - answers(seed=1)[0]).mean() < .01
    if method == "temperature":
        assert found.scale == pytest.approx(scale, rel=.08) and found.bias == (0.,) * 7


def test_true_probabilities_are_left_alone():
    kept = [fit_calibration(*answers(seed=seed)) for seed in range(6)]
    assert not {c.method for c in kept} & {"vector", "power"}
    for c in kept:
        np.testing.assert_allclose(c.apply(answers()[0]), answers()[0], atol=.02)


def test_a_few_rows_are_not_fitted_to_chance():
    "Without its prior vector scaling would follow 30 rows anywhere, and a class that none of them has would get no probability at all."
    probs, truth = answers()
    few = np.flatnonzero(truth != 1)[:30]
    c = fit_calibration(probs[few], truth[few], "vector")
    assert max(np.abs(c.bias)) < 2 and c.apply(probs)[:, 1].mean() > .1 * probs[:, 1].mean()
    c = fit_calibration(probs[:30], truth[:30], "vector")
    assert score(c.apply(probs), truth)["log_loss"] < score(probs, truth)["log_loss"] + .15
    assert fit_calibration(probs[:30], truth[:30]).method not in ("vector", "power")


def test_chances_that_never_come_near_zero_are_mended_by_a_power():
    "What smoothed labels teach: a share of every answer is spread over all classes. Scaling the logarithms cannot take it back."
    probs, truth = answers()
    given, (others, unseen) = .8 * probs + .2 / 7, answers(seed=1)
    c = fit_calibration(given, truth)
    assert c.method == "power" and c.power > 1.2
    after = {m: score(fit_calibration(given, truth, m).apply(.8 * others + .2 / 7), unseen)["log_loss"] for m in CALIBRATIONS}
    assert after["power"] < min(after[m] for m in ("none", "temperature", "vector")) - .01 and after["power"] < score(others, unseen)["log_loss"] + .02
    assert calibration_error(c.apply(.8 * others + .2 / 7), unseen) < .025


def test_the_bias_is_that_of_a_logistic_regression():
    "On log-odds of two classes vector scaling is logistic regression; its prior is weak enough to be lost among 4,000 rows."
    probs, truth = answers(k=2)
    c = fit_calibration(bent(probs, np.ones(2), np.array([1., 0])), truth, "vector")
    said = log_softmax(np.log(bent(probs, np.ones(2), np.array([1., 0]))), axis=1)
    theirs = LogisticRegression(C=1e9, tol=1e-9).fit(said, truth)
    np.testing.assert_allclose(c.apply(softmax(said, axis=1))[:, 1], theirs.predict_proba(said)[:, 1], atol=5e-3)


def test_nothing_near_the_fit_is_better():
    probs, truth = answers(600)
    given, rng = bent(probs, np.full(7, .8), np.array([0, 1., 0, 0, 0, 0, 0])), np.random.default_rng(0)

    def loss(scale, bias, power):
        prior = ((np.array(scale) - 1) ** 2).sum() + (np.array(bias) ** 2).sum() + np.log(power) ** 2
        return -log_softmax(bias - scale * (-np.log(given)) ** power, axis=1)[range(600), truth].sum() + prior / 2
    for method, bends in (("vector", 0), ("power", 1)):
        c = fit_calibration(given, truth, method)
        best = loss(np.array(c.scale), np.array(c.bias), c.power)
        for step in (.1, .01):
            for _ in range(50):
                beside = c.scale + rng.normal(0, step, 7), c.bias + rng.normal(0, step, 7), c.power * np.exp(bends * rng.normal(0, step))
                assert loss(*beside) > best


def test_folds_that_do_not_fit_and_unknown_methods_are_refused():
    probs, truth = answers(8)
    for settings, says in ((dict(method="platt"), "expected auto, none, temperature, vector, power"),
                           (dict(folds=9), "8 rows in 9 parts"), (dict(folds=1), "at least two parts")):
        with pytest.raises(ValueError, match=says):
            fit_calibration(probs, truth, **settings)


def test_answers_without_a_doubt_stay_finite():
    probs = np.eye(7)[np.arange(70) % 7]
    c = fit_calibration(probs, np.arange(70) % 7)
    assert np.isfinite(c.apply(probs)).all() and np.allclose(c.apply(probs).sum(1), 1, atol=1e-6)


@pytest.mark.parametrize("name", ["accurate", "ensemble", "fast"])
def test_a_bundled_graph_does_what_its_card_says(name, tmp_path):
    pytest.importorskip("onnx")
    from fer_nbdev.export import open_graph
    about, graph = json.loads((WEIGHTS / name / "card.json").read_text()), (WEIGHTS / name / "model.onnx").read_bytes()
    c, faces = Calibration(**{k: v for k, v in about["calibration"].items() if k != "fitted_on"}), synthetic_faces(20).pixels
    plain = calibrate_graph(graph, None)
    assert len(plain) < len(graph)
    np.testing.assert_allclose(c.apply(open_graph(plain)(faces)), Predictor(name, detector="none").predict_faces(faces), atol=1e-5)
    assert calibrate_graph(plain, c) == calibrate_graph(graph, c)
    with pytest.raises(ValueError, match="does not end in a softmax"):
        import onnx
        proto = onnx.load_from_string(plain)
        proto.graph.node.pop()
        calibrate_graph(proto.SerializeToString(), c)


def test_what_is_no_probability_is_refused():
    probs = np.random.default_rng(0).dirichlet(np.ones(7), 50)
    emotion = np.arange(50) % 7
    for wrong, labels in ((np.log(probs), emotion), (np.log(probs) + 5, emotion), (probs * np.nan, emotion),
                          (probs, emotion - 1), (probs, emotion + 1), (probs, emotion[:-1])):
        with pytest.raises(ValueError):
            fit_calibration(wrong, labels)
    assert fit_calibration(probs, emotion.tolist()) == fit_calibration(probs, emotion)
    with pytest.raises(ValueError, match="n_bins"):
        calibration_error(probs, emotion, n_bins=0)
    assert score(probs, emotion.tolist()) == score(probs, emotion)
