"""A search for hyper-parameters: killed and resumed, hopeless trials given up, PrivateTest unseen, and a recipe that trains."""
import contextlib
import json
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from _tables import write_csv

optuna = pytest.importorskip("optuna", reason="optuna is not installed")
from fastai.callback.core import Callback  # noqa: E402

from fer_nbdev.cli import app  # noqa: E402
from fer_nbdev.data import synthetic_faces  # noqa: E402
from fer_nbdev.recipe import Recipe  # noqa: E402
from fer_nbdev.train import train  # noqa: E402
from fer_nbdev.tune import parse_space, trial_rows, tune  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

TABLE = synthetic_faces(210)
TINY = Recipe.read("synthetic").set(["epochs=4", "bs=16", "precision=fp32", "arch_args.widths=[8]", "arch_args.blocks=[1]"])
SPACE = ["lr=log:1e-4:1", "optimizer=sgd,adam"]


def search(out, table=TABLE, n=7, **kwargs):
    return tune(TINY, table, SPACE, out, n_trials=n, device="cpu", **kwargs)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("found") / "search"
    return out, search(out)


def test_hopeless_trials_are_given_up(found):
    _, study = found
    rows = trial_rows(study)
    assert len(rows) == 7 and {r["state"] for r in rows} == {"complete", "pruned"}
    assert all(r["epochs"] == TINY.epochs for r in rows if r["state"] == "complete")
    assert all(r["epochs"] < TINY.epochs for r in rows if r["state"] == "pruned")
    why = [t.user_attrs["why"] for t in study.trials if "why" in t.user_attrs]
    assert why == [f"others did better after {r['epochs']} epochs" for r in rows if r["state"] == "pruned"]


def test_the_score_of_a_trial_is_that_of_its_best_epoch(found):
    out, study = found
    for r in trial_rows(study):
        scores = [h["accuracy"] for h in json.loads((out / "trials" / f"{r['trial']:03d}" / "history.json").read_text())]
        assert len(scores) == r["epochs"] and r["score"] == (max(scores) if r["state"] == "complete" else scores[-1])
    assert study.best_value == max(r["score"] for r in trial_rows(study) if r["state"] == "complete")


def test_private_test_is_not_read(found, tmp_path):
    "Other faces and labels there change nothing, and no run has seen a row of it."
    out, study = found
    private = TABLE.usage == "PrivateTest"
    assert private.sum() > 5
    pixels, emotion = TABLE.pixels.copy(), TABLE.emotion.copy()
    pixels[private], emotion[private] = 0, 6 - emotion[private]
    spoilt = search(tmp_path / "search", replace(TABLE, pixels=pixels, emotion=emotion), n=3)
    strip = [[{k: v for k, v in r.items() if k != "minutes"} for r in trial_rows(s)[:3]] for s in (study, spoilt)]
    assert strip[0] == strip[1]
    for run in (out / "trials").glob("*/run.json"):
        rows = json.loads(run.read_text())["data"]["rows"]
        assert rows == {u: int((TABLE.usage == u).sum()) for u in ("PublicTest", "Training")}
    with pytest.raises(ValueError, match="PrivateTest"):
        tune(TINY.set(["valid=PublicTest+PrivateTest"]), TABLE, SPACE, tmp_path / "other")


def test_the_best_recipe_trains(found, tmp_path):
    out, study = found
    best = Recipe.read(out / "best.yaml")
    assert best.lr == study.best_params["lr"] and best.optimizer == study.best_params["optimizer"] and best.name == "synthetic_tuned"
    train(best, TABLE, tmp_path / "run", device="cpu", progress=False)
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert max(h["accuracy"] for h in history) == pytest.approx(study.best_value, abs=1e-6)  # PrivateTest rows beside it change nothing


def test_a_killed_search_loses_no_trial(tmp_path, monkeypatch):
    "Killed by the system in the middle of the third trial, from the command line, and resumed."
    write_csv(TABLE, tmp_path / "faces.csv")
    TINY.write(tmp_path / "tiny.yaml")
    command = ["tune", "--data", "faces.csv", "--trials", "4", "--out", "search", "--device", "cpu"]
    search = subprocess.Popen([sys.executable, "-m", "fer_nbdev", *command, "--recipe", "tiny.yaml", "--search", SPACE[0], "--search", SPACE[1]],
                              cwd=tmp_path, stdout=subprocess.DEVNULL)
    started = tmp_path / "search" / "trials" / "002" / "run.json"
    until = time.time() + 300
    while not started.exists():
        assert search.poll() is None and time.time() < until, "the search ended before it could be killed"
        time.sleep(.01)
    search.kill()
    search.wait()
    storage = f"sqlite:///{tmp_path / 'search' / 'study.db'}"
    before = optuna.load_study(study_name="fer", storage=storage).trials
    assert [t.state.name for t in before][2:] == ["RUNNING"]
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, [*command, "--resume"])
    assert done.exit_code == 0, done.output
    after = optuna.load_study(study_name="fer", storage=storage).trials
    assert after[:2] == before[:2] and after[2].params == before[2].params
    assert len(after) == 4 and all(t.state.name in ("COMPLETE", "PRUNED") for t in after)
    assert sorted(p.name for p in (tmp_path / "search" / "trials").iterdir()) == ["000", "001", "002", "003"]
    assert "fer train --recipe" in done.stdout and (tmp_path / "search" / "best.yaml").exists()
    seen = [[t.params[k] for k in t.params] for t in after]
    assert len({str(v) for v in seen}) == 4  # a resumed sampler does not begin with the same values again


def test_wrong_lines_are_refused(tmp_path):
    for line, said in {"opt=adam,sgd": "no setting opt", "lr=fast": "several choices", "seed=1:5": "can't be searched", "wd=log:0:1": "above zero",
                       "bs=0:64": "bs=0", "augment.flip=0:1": "no setting flip"}.items():
        with pytest.raises(ValueError, match=said):
            tune(TINY, TABLE, [line], tmp_path / "search")
    assert not (tmp_path / "search").exists()


def test_values_that_do_not_go_together_are_given_up(tmp_path, capsys):
    "Each is right by itself, so the space is taken; the pair is refused when it comes, and the search goes on and can be resumed."
    space = ["sampling=null,oversample", "class_weights=null,inverse"]
    tune(TINY.set(["epochs=1", "class_weights=null"]), TABLE, space, tmp_path / "search", n_trials=2, device="cpu")
    study = tune(None, TABLE, None, tmp_path / "search", n_trials=6, resume=True, device="cpu")
    states = {(t.params["sampling"], t.params["class_weights"]) == ("oversample", "inverse"): t.state.name for t in study.trials}
    assert len(study.trials) == 6 and states == {True: "PRUNED", False: "COMPLETE"}
    assert "given up after  0 epochs: no score" in (said := capsys.readouterr().out) and "both balance the classes" in said
    for t in study.trials:  # each is announced, with what it tries, before it ends
        begun = said.index(f"trial {t.number:3} begins: sampling {t.params['sampling']}, ")
        ended = said.index(f"trial {t.number:3} {'finished' if t.state.name == 'COMPLETE' else 'given up'}")
        assert begun < ended


def test_without_public_test_a_tenth_of_training_chooses_and_is_named(tmp_path):
    tune(TINY.set(["epochs=1"]), TABLE.split("Training"), SPACE, tmp_path / "search", n_trials=1, device="cpu")
    best = Recipe.read(tmp_path / "search" / "best.yaml")
    assert best.valid == .1 and best.about.endswith("on 0.1.")


def test_values_that_training_refuses_are_given_up(tmp_path, capsys):
    "Where others have trained; what no trial could train with is an error, and the search can be resumed."
    with pytest.raises(ValueError, match="only whole batches train"):
        tune(TINY.set(["epochs=1"]), TABLE, ["bs=300:400"], tmp_path / "none", n_trials=2, device="cpu")
    with pytest.raises(ValueError, match="cannot be used here"):
        tune(TINY.set(["epochs=1"]), TABLE, SPACE, tmp_path / "search", n_trials=2, device="abacus")
    study = tune(None, TABLE, None, tmp_path / "search", n_trials=2, resume=True, device="cpu")
    assert [t.state.name for t in study.trials] == ["FAIL", "COMPLETE", "COMPLETE"]
    for _ in range(9):
        with contextlib.suppress(ValueError):  # until it draws a 16
            tune(TINY.set(["epochs=1"]), TABLE, ["bs=16,300"], tmp_path / "some", n_trials=1, resume=True, device="cpu")
    study = tune(None, TABLE, None, tmp_path / "some", n_trials=8, resume=True, device="cpu")
    assert {(t.params["bs"], t.state.name) for t in study.trials} - {("300", "FAIL")} == {("16", "COMPLETE"), ("300", "PRUNED")}
    assert "only whole batches train" in capsys.readouterr().out


def test_private_test_is_refused_whatever_rows_there_are(tmp_path):
    for valid in ("PrivateTest", "PublicTest+PrivateTest"):
        for table in (TABLE, TABLE.split("Training"), TABLE.split("Training+PrivateTest")):
            with pytest.raises(ValueError, match="must not look at PrivateTest"):
                tune(TINY.set([f"valid={valid}"]), table, SPACE, tmp_path / "search")


def test_scores_that_are_no_numbers_end_a_search(tmp_path, capsys):
    study = tune(TINY.set(["epochs=1", "monitor=valid_loss"]), TABLE, ["lr=1e30:1e31"], tmp_path / "search", n_trials=2, device="cpu")
    assert [t.state.name for t in study.trials] == ["FAIL", "FAIL"] and capsys.readouterr().out.count("its score is no number") == 2


class Scored(Callback):
    "Writes its own scores into the history, and pulls the plug after some epochs."
    order = 63  # before ReportTrial

    def __init__(self, scores, killed_after=None): self.scores, self.killed_after = scores, killed_after

    def after_epoch(self): self.history.rows[-1]["accuracy"] = self.scores[self.epoch]

    def before_epoch(self):
        if self.epoch == self.killed_after: raise KeyboardInterrupt


def test_a_killed_trial_goes_on_and_is_judged_as_if_it_had_not_been(tmp_path, monkeypatch):
    found = {}
    for name, killed_after in (("whole", None), ("killed", 4)):
        def scored(*args, cbs, killed_after=killed_after, **options):
            train(*args, cbs=[*cbs, Scored([.2, .3, .4, .45, .5, .52], killed_after)], **options)
        monkeypatch.setattr("fer_nbdev.tune.train", scored)
        if killed_after:
            with pytest.raises(KeyboardInterrupt):
                tune(TINY.set(["epochs=6"]), TABLE, [SPACE[0]], tmp_path / name, n_trials=1)
            time.sleep(1.5)
            monkeypatch.setattr("fer_nbdev.tune.train", lambda *args, cbs, **options: train(*args, cbs=[*cbs, Scored([.2, .3, .4, .45, .5, .52])], **options))
        recipe, space = (None, None) if killed_after else (TINY.set(["epochs=6"]), [SPACE[0]])
        found[name] = tune(recipe, TABLE, space, tmp_path / name, n_trials=1, resume=bool(killed_after))
    whole, killed = found["whole"].trials, found["killed"].trials
    assert len(killed) == 1 and killed[0].intermediate_values == whole[0].intermediate_values
    assert {k: v for k, v in killed[0].system_attrs.items() if "rung" in k} == {k: v for k, v in whole[0].system_attrs.items() if "rung" in k} != {}
    rows = json.loads((tmp_path / "killed" / "trials" / "000" / "history.json").read_text())
    assert trial_rows(found["killed"])[0]["minutes"] == pytest.approx(sum(r["seconds"] for r in rows) / 60, abs=1e-3)


def test_batches_are_no_choice_where_weights_are_averaged_over_them():
    weighted = TINY.set(["monitor=valid_loss", "class_weights=inverse"])
    with pytest.raises(ValueError, match="bs can't be searched"):
        parse_space(["bs=16,32"], weighted)
    assert parse_space(["bs=16,32"], weighted.set(["class_weights=null"]))
