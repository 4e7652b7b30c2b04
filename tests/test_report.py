"""What the notebooks of `evaluate` and `report` leave to a slower place: a browser, foreign learners, and coverage.

The browser is a Chromium without a window. Where none is installed its tests are skipped, and say so.
"""
import html
import json
import re
import subprocess

import numpy as np
import pytest

pytest.importorskip("sklearn")

from _browser import find_browser  # noqa: E402
from fer_nbdev import Predictor  # noqa: E402
from fer_nbdev.data import FER2013, synthetic_faces, to_folders  # noqa: E402
from fer_nbdev.evaluate import STATISTICS, _statistics, compare_models, confidence_intervals, evaluate_model, predict_table  # noqa: E402
from fer_nbdev.report import report_html  # noqa: E402


# ------------------------------------------------------------------------------------------------------- browser

@pytest.fixture(scope="module")
def page():
    "The report of the bundled model on drawn faces, compared with itself in a mirror: every part of the page is there."
    drawn, predictor = synthetic_faces(140, seed=3), Predictor("accurate", threads=1)

    def mirrored(faces):
        return predictor.predict_faces(faces[..., ::-1])

    return report_html(*(evaluate_model(m, drawn, None, n_resamples=100) for m in (predictor, mirrored)))


CHECK = """
addEventListener("load", () => {
  const d = document.getElementById("report").contentDocument, root = d.documentElement, seen = {};
  const wide = [...d.querySelectorAll("body *")].filter(x => !x.closest("svg") && x.getBoundingClientRect().right > innerWidthOf + 1);
  seen.missing = [...d.images].filter(i => !i.complete || i.naturalWidth != 48 || i.getBoundingClientRect().width < 20).length;
  seen.images = d.images.length;
  seen.charts = [...d.querySelectorAll("svg")].map(s => Math.round(s.getBoundingClientRect().width));
  seen.wide = wide.map(x => x.tagName + "." + x.className);
  seen.scroll = root.scrollWidth - root.clientWidth;
  seen.squeezed = [...d.querySelectorAll(".faces img")].filter(i => Math.abs(i.clientWidth - i.clientHeight) > 1).length;
  seen.background = d.defaultView.getComputedStyle(d.body).backgroundColor;
  const line = d.querySelector("svg path[style*='--c0']");
  seen.line = line && d.defaultView.getComputedStyle(line).stroke;
  document.getElementById("answer").textContent = JSON.stringify(seen);
});
"""


def _look(page, folder, width, dark):
    "Open a page in a frame of `width` pixels; what the browser found in it, and what it wrote to the console."
    browser = find_browser()
    test = folder / "test.html"
    test.write_text(f'<!doctype html><meta charset="utf-8"><iframe id="report" srcdoc="{html.escape(page)}" style="border:0;width:{width}px;height:900px">'
                    f'</iframe><pre id="answer"></pre><script>const innerWidthOf = {width};{CHECK}</script>', encoding="utf-8")
    done = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr",
                           "--v=0", f"--blink-settings=preferredColorScheme={int(not dark)}", "--window-size=1300,1000", "--dump-dom", test.as_uri()],
                          capture_output=True, text=True, encoding="utf-8", timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    answer = re.search(r'<pre id="answer">(.*?)</pre>', done.stdout, re.S)
    assert answer and answer[1], f"the test page did not finish: {done.stderr[-3000:]}"
    return json.loads(html.unescape(answer[1])), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize("width, dark", [(1100, False), (400, True), (360, False)], ids=["wide and light", "a dark telephone", "a small one"])
def test_the_report_opens_in_a_browser(page, tmp_path, width, dark):
    seen, console = _look(page, tmp_path, width, dark)
    assert console == []
    assert seen["images"] == page.count("<img") > 50 and seen["missing"] == 0 and seen["squeezed"] == 0
    assert len(seen["charts"]) == 3 and all(250 < w <= 480 for w in seen["charts"])
    assert seen["wide"] == [] and seen["scroll"] <= 0, "something is wider than the page"
    assert seen["background"] == ("rgb(21, 25, 30)" if dark else "rgb(255, 255, 255)")
    assert seen["line"] == ("rgb(110, 168, 254)" if dark else "rgb(37, 99, 235)"), "the charts do not follow the theme"


def test_the_browser_test_can_fail(page, tmp_path):
    "A picture that is cut off, a line on the console and a table that is too wide are noticed."
    at = page.index("data:image/png;base64,") + 60
    broken = page[:at] + "A" * 40 + page[at + 40:]
    broken = broken.replace("</main>", '<div style="width:1500px">.</div></main><script>console.error("noticed")</script>')
    seen, console = _look(broken, tmp_path, 1100, False)
    assert seen["missing"] == 1 and seen["wide"] and any("noticed" in line for line in console)


def test_the_report_asks_no_server(page):
    addresses = re.findall(r'(?:href|src|action|data|poster)\s*=\s*"([^"]*)"|url\(([^)]*)\)|@import\s+(\S+)', page)
    addresses = [a for found in addresses for a in found if a]
    assert len(addresses) > 50 and all(a.startswith(("data:", "#")) for a in addresses)
    assert "<script" not in page and "javascript:" not in page and not re.search(r"\son\w+\s*=", page)


# ------------------------------------------------------------------------------------------------------ learners

@pytest.fixture(scope="module")
def faces():
    return synthetic_faces(140, seed=1)


def test_a_learner_on_png_files_gets_png_files(faces, tmp_path):
    "fastai's own ImageDataLoaders, three colour channels, another size, classes in alphabetical order."
    vision = pytest.importorskip("fastai.vision.all")
    folder = to_folders(faces, tmp_path / "png")
    dls = vision.ImageDataLoaders.from_folder(folder, train="train", valid="test", item_tfms=vision.Resize(32), bs=16, num_workers=0)
    learn = vision.Learner(dls, vision.nn.Sequential(vision.nn.Conv2d(3, 8, 5, 4), vision.nn.ReLU(), vision.AdaptiveAvgPool(2), vision.Flatten(),
                                                     vision.nn.Linear(32, 7)), loss_func=vision.CrossEntropyLossFlat(), metrics=vision.accuracy)
    private = faces.split("private")
    probs = predict_table(learn, private)
    files = sorted((folder / "test").rglob("*.png"), key=lambda p: int(p.stem.split("_")[1]))
    with learn.no_bar():
        expected = learn.get_preds(dl=dls.test_dl(files))[0].numpy()
    assert list(dls.vocab) == sorted(faces.classes) != list(faces.classes)
    np.testing.assert_allclose(probs, expected[:, [list(dls.vocab).index(c) for c in faces.classes]], atol=1e-5)
    evaluation = evaluate_model(learn, faces, n_resamples=20)
    with learn.no_bar():
        assert evaluation.scores["accuracy"] == pytest.approx(learn.validate()[1])
    assert evaluation.about["card"]["n_params"] == sum(p.numel() for p in learn.model.parameters())


def test_a_learner_of_ours_gets_faces(faces):
    pytest.importorskip("fastai")
    from fer_nbdev.loaders import fer_dls, table_dl
    from fer_nbdev.recipe import read_recipe
    from fer_nbdev.train import fer_learner
    learn = fer_learner(fer_dls(faces, bs=32, device="cpu"), read_recipe("synthetic"))
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    evaluation = evaluate_model(learn, faces, n_resamples=20)
    with learn.no_bar():
        loss, accuracy, *_ = learn.validate(dl=table_dl(learn.dls, faces.split("private")))
    assert evaluation.scores["accuracy"] == pytest.approx(accuracy)
    assert evaluation.probs.sum(1) == pytest.approx(np.ones(14), abs=1e-5)
    assert all((v == before[k]).all() for k, v in learn.model.state_dict().items()), "asking changed the network"


# -------------------------------------------------------------------------------------------------------- chance

def _world(n, rng):
    "Labels of three classes and a model that gets each right with .8, .6 and .5: its true scores are known."
    truth = rng.choice(3, n, p=[.5, .3, .2])
    right = rng.random(n) < np.array([.8, .6, .5])[truth]
    said = np.where(right, truth, (truth + rng.integers(1, 3, n)) % 3)
    return np.where(np.arange(3) == said[:, None], .8, .1), truth


def test_intervals_cover_the_truth_as_often_as_they_say():
    """1,000 samples of 300 faces from a world whose accuracy is a binomial share with p = .68. How many of the 95% intervals
    hold the true score is binomial too, with a standard error of 0.7 points."""
    rng = np.random.default_rng(0)
    p = .5*.8 + .3*.6 + .2*.5
    big_probs, big_truth = _world(400_000, np.random.default_rng(1))
    true = dict(zip(STATISTICS, _statistics(big_probs, big_truth)(np.arange(400_000))))
    assert true["accuracy"] == pytest.approx(p, abs=.003) and true["balanced_accuracy"] == pytest.approx((.8 + .6 + .5)/3, abs=.003)
    true["accuracy"] = p
    held = dict.fromkeys(("accuracy", "balanced_accuracy", "macro_f1", "weighted_f1", "log_loss"), 0)
    for trial in range(1000):
        ci = confidence_intervals(*_world(300, rng), n_resamples=400, seed=trial)
        for k in held:
            held[k] += ci[k][0] <= true[k] <= ci[k][1]
    for k, n in held.items():
        assert .925 <= n/1000 <= .975, f"{k}: the 95% interval holds the truth in {n/10:.1f}% of samples"


def test_mcnemar_rejects_equal_models_as_rarely_as_it_says():
    "Two models of the same accuracy: an exact test at 5% rejects at most 5%, here of 2,000 trials (standard error 0.5 points)."
    rng, rejected = np.random.default_rng(0), 0
    truth = np.zeros(120, int)
    for _ in range(2000):
        a, b = (np.where((rng.random(120) < .7)[:, None], [.9, .1], [.1, .9]) for _ in range(2))
        rejected += compare_models(a, b, truth, n_resamples=2)["p_value"] < .05
    assert 0 < rejected/2000 <= .06


def test_differences_are_seen_better_on_the_same_faces():
    "The paired interval of a difference is narrower than what the two single intervals would suggest."
    rng = np.random.default_rng(2)
    a, truth = _world(2000, rng)
    b = np.where((rng.random(2000) < .03)[:, None], np.roll(a, 1, axis=1), a)
    single = [np.diff(confidence_intervals(p, truth)["accuracy"])[0] for p in (a, b)]
    paired = np.diff(compare_models(a, b, truth)["intervals"]["accuracy"])[0]
    assert paired < .5*np.hypot(*single)


def test_a_table_of_the_wrong_kind_is_refused_before_anything_is_asked():
    def never(faces):
        raise AssertionError("the model was asked")
    empty = FER2013(np.zeros((0, 48, 48), np.uint8), np.zeros(0, int), np.zeros(0, str))
    with pytest.raises(ValueError, match="has no rows of PrivateTest"):
        evaluate_model(never, empty)
    with pytest.raises(ValueError, match="unknown split 'test'"):
        evaluate_model(never, synthetic_faces(7), "test")
