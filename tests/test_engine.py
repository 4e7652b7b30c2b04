"""Every part that a recipe can choose trains a little, survives a kill, and does what it says."""
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastcore.basics import noop

from fer_nbdev.callbacks import Announce, best_epoch, has_bf16
from fer_nbdev.cards import weights_folder
from fer_nbdev.core import EMOTIONS
from fer_nbdev.data import FER2013, synthetic_faces
from fer_nbdev.distill import describe_teachers
from fer_nbdev.export import export_run
from fer_nbdev.loaders import fer_dls
from fer_nbdev.losses import LOSSES
from fer_nbdev.models import create_model
from fer_nbdev.interpret import compare_runs, open_network
from fer_nbdev.recipe import MONITORS, OPTIMIZERS, SCHEDULES, Recipe, list_recipes, read_recipe
from fer_nbdev.train import TrimMemory, decay_groups, fer_learner, fold_tables, group_lrs, load_run, prepare_table, read_run, train

WEIGHTS = weights_folder()
SHORT = read_recipe("synthetic").set(["epochs=3", "lr=.003", "precision=fp32", "bs=32"])


@pytest.fixture(scope="module")
def faces():
    return synthetic_faces(980)[:280]


class Kill(Callback):
    "Pull the plug in the middle of the last epoch."
    def before_batch(self):
        if self.training and self.epoch == 2 and self.iter == 4:
            raise KeyboardInterrupt


def _weights(learn):
    return list(learn.model.state_dict().values())


def _rows(run):
    rows = json.loads((run / "history.json").read_text())
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


# between them they name every schedule, loss and sampling, and what has a state of its own
CHOICES = [["optimizer=adamw", "schedule=cosine"], ["optimizer=ranger", "schedule=plateau", "schedule_args.patience=0"],
           ["optimizer=rmsprop", "schedule=inverse", "schedule_args.decay=.01", "mixup=.4"],
           ["loss=focal", "cutmix=1", "class_weights=null", "sampling=weighted", "clip=1."],
           ["optimizer=lamb", "class_weights=null", "sampling=oversample", "schedule=constant", "ema=0"],
           ["class_weights=effective", "monitor=valid_loss", "label_smoothing=.1"], ["sam=.05", "clip=1.", "augment.crop=.67", "mixup=.2"],
           ["teachers=[fast]", "soft_share=.5", "mixup=.2", "damage={p_blur: .5}"]]


@pytest.mark.parametrize("settings", CHOICES, ids=" ".join)
def test_a_killed_run_resumes_bit_for_bit(settings, faces, tmp_path):
    recipe = SHORT.set(settings)
    whole = train(recipe, faces, tmp_path / "whole", progress=False)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, faces, tmp_path / "killed", progress=False, cbs=[Kill()])
    assert len(_rows(tmp_path / "killed")) == 2
    resumed = train(None, faces, tmp_path / "killed", resume=True, progress=False)
    assert _rows(tmp_path / "killed") == _rows(tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(_weights(whole), _weights(resumed)))


def test_a_run_knows_its_teachers_and_resumes_with_no_other(faces, tmp_path):
    teacher = shutil.copytree(WEIGHTS / "fast", tmp_path / "teacher")
    recipe, run = SHORT.set([f"teachers=[accurate, {teacher}]", "epochs=1"]), tmp_path / "run"
    train(recipe, faces, run, progress=False)
    known = describe_teachers(["accurate", "fast"])
    assert json.loads((run / "run.json").read_text())["teachers"] == known and export_run(run, tmp_path / "pupil")["teachers"] == known
    shutil.rmtree(teacher)
    shutil.copytree(WEIGHTS / "accurate", teacher)
    with pytest.raises(ValueError, match="other teachers"):
        train(None, faces, run, resume=True, progress=False)


def test_votes_count_as_far_as_the_recipe_says(faces, tmp_path):
    votes = np.random.default_rng(0).dirichlet(np.ones(7), len(faces)).astype(np.float32)
    table = prepare_table(SHORT.set(["soft_share=.3"]), replace(faces, soft=votes))
    assert np.allclose(table.soft, .3 * votes + .7 * np.eye(7)[faces.emotion], atol=1e-6)
    two = prepare_table(SHORT.set(["soft_share=.3", "classes=[happy, sad]"]), replace(faces, soft=votes))
    kept = faces.emotion[:, None] == [EMOTIONS.index(c) for c in two.classes]
    shares = votes[kept.any(1)][:, [EMOTIONS.index(c) for c in two.classes]]  # the share is of what is left where classes are left out
    assert np.allclose(two.soft, .3 * shares / shares.sum(1, keepdims=True) + .7 * kept[kept.any(1)], atol=1e-6)
    assert prepare_table(SHORT, replace(faces, soft=votes)).soft is votes and prepare_table(SHORT.set(["soft_share=.3"]), faces).soft is None
    train(SHORT.set(["soft_share=.3", "epochs=1"]), replace(faces, soft=votes), tmp_path, progress=False)
    with pytest.raises(ValueError, match="other data"):  # the same faces with other votes
        train(None, replace(faces, soft=votes[::-1].copy()), tmp_path, resume=True, progress=False)
    with pytest.raises(ValueError, match="both soft targets"):
        train(SHORT.set(["teachers=[fast]"]), replace(faces, soft=votes), tmp_path / "both", progress=False)
    with pytest.raises(ValueError, match="nothing beside the labels"):
        train(SHORT.set(["soft_share=.3"]), faces, tmp_path / "neither", progress=False)
    assert not (tmp_path / "neither").exists()


def test_a_resumed_run_has_a_progress_bar_too(faces, tmp_path, capsys):
    "And with the bar as without it every epoch says what is right of each class."
    with pytest.raises(KeyboardInterrupt):
        train(SHORT, faces, tmp_path, progress=True, cbs=[Kill()])
    train(None, faces, tmp_path, resume=True, progress=True)
    rows = _rows(tmp_path)
    assert len(rows) == 3
    said = [line for line in capsys.readouterr().out.splitlines() if "right of" in line]
    assert said == ["    right of " + "  ".join(f"{c} {r['recall_' + c]:.0%}" for c in EMOTIONS) for r in rows]


def test_the_choices_above_cover_the_tables():
    recipes = [SHORT.set(c) for c in CHOICES]
    assert {r.schedule for r in recipes} == set(SCHEDULES) and {r.loss for r in recipes} == set(LOSSES)


def test_one_seed_one_result(faces, tmp_path):
    a, b, other = (train(replace(SHORT, epochs=2, seed=seed), faces, tmp_path / str(i), progress=False) for i, seed in enumerate((5, 5, 6)))
    assert _rows(tmp_path / "0") == _rows(tmp_path / "1") != _rows(tmp_path / "2")
    assert all(torch.equal(x, y) for x, y in zip(_weights(a), _weights(b)))
    assert not all(torch.equal(x, y) for x, y in zip(_weights(a), _weights(other)))


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_optimizer_moves_every_weight(name, faces):
    recipe = replace(SHORT, optimizer=name, lr=.001)
    learn = fer_learner(fer_dls(faces[:64], 32), recipe)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    before = [p.clone() for p in learn.model.parameters()]
    learn.fit(1, group_lrs(recipe), wd=[1e-3, 0.])
    still = [p.ndim for p, b in zip(learn.model.parameters(), before) if torch.equal(p, b)]
    assert not still or name == "larc" and max(still) == 1  # larc leaves biases that begin at zero there


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_small_network_learns_28_faces_by_heart(precision, faces, tmp_path):
    part = faces[:28]
    both = FER2013(np.concatenate([part.pixels] * 2), np.concatenate([part.emotion] * 2), np.array(["Training"] * 28 + ["PublicTest"] * 28))
    recipe = replace(SHORT, epochs=90, bs=28, augment=None, precision=precision, ema=0., lr=.05)
    learn = train(recipe, both, tmp_path / "run", progress=False)
    assert max(row["accuracy"] for row in _rows(tmp_path / "run")) == 1
    assert "forward" not in vars(learn.model)


@pytest.mark.parametrize("monitor", sorted(MONITORS))
def test_early_stop_and_best_weights_follow_the_monitor(monitor, faces, tmp_path):
    recipe = replace(SHORT, epochs=12, patience=1, lr=.02, monitor=monitor)
    train(recipe, faces, tmp_path, progress=False)
    rows, about = _rows(tmp_path), json.loads((tmp_path / "run.json").read_text())
    values = [row[monitor] for row in rows]
    assert values[about["best_epoch"]] == MONITORS[monitor](values)
    assert len(rows) - 1 - about["best_epoch"] == 1 or len(rows) == 12 and about["best_epoch"] == 11, "it goes on for one epoch after its best, and no further"
    train(None, faces, tmp_path, resume=True, progress=False)  # a run that stopped early stays stopped
    assert _rows(tmp_path) == rows


def test_every_bundled_recipe_takes_a_step(tmp_path):
    "A step of every recipe's own network, data, augmentation, loss and schedule, on faces that are drawn."
    table = synthetic_faces(280)
    for name in list_recipes():
        recipe = read_recipe(name).set(["epochs=1", "bs=8"])
        if recipe.per_class:
            recipe = replace(recipe, per_class={k: 3 for k in recipe.per_class})
        train(recipe, table[::4] if recipe.per_class is None else table, tmp_path / name, progress=False)
        model = load_run(tmp_path / name)
        with torch.no_grad():
            assert model(torch.zeros(2, 1, 48, 48)).shape == (2, len(recipe.classes or table.classes))


def test_trackers_write_what_they_are_asked_to(faces, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    recipe = replace(SHORT, epochs=2)
    train(recipe, faces, tmp_path / "a", progress=False, track="tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(tmp_path / "a" / "tensorboard"))
    events.Reload()
    logged = [e.value for e in events.Scalars("accuracy")]
    assert np.allclose(logged, [row["accuracy"] for row in _rows(tmp_path / "a")], atol=1e-5)
    train(recipe, faces, tmp_path / "b", progress=False, track="wandb")
    assert list((tmp_path / "b" / "wandb").glob("offline-run-*/*.wandb"))
    os.environ.pop("WANDB_SERVICE", None)


def test_a_pretrained_body_is_fine_tuned_in_two_phases(faces, tmp_path):
    "Weights of our own stand in for a hub's: the body waits for the head, then learns more slowly."
    first = train(SHORT, faces, tmp_path / "first", progress=False)
    recipe = SHORT.set(["epochs=1", "freeze_epochs=1", "lr_mult=100", "ema=0", "img_size=64", f"pretrained={tmp_path/'first'/'best.safetensors'}"])
    bodies = []

    class Look(Callback):
        def after_train(self):
            bodies.append(([h["lr"] for h in self.opt.hypers], {k: v.clone() for k, v in self.model.named_parameters()}))
    train(recipe, faces, tmp_path / "second", progress=False, cbs=[Look()])
    trained = dict(first.model.named_parameters())
    (_, frozen), (lrs, tuned) = bodies
    body = [k for k in trained if not k.startswith("head")]
    assert body and all(torch.equal(frozen[f"body.{k}"], trained[k]) for k in body)
    assert not any(torch.equal(tuned[f"body.{k}"], trained[k]) for k in body)
    assert np.allclose(np.array(lrs) / lrs[-1], [.01, .01, .1, .1, 1, 1])


def test_a_run_knows_the_weights_that_it_started_from(faces, tmp_path):
    first, once = tmp_path / "first", SHORT.set(["epochs=1"])
    train(once, faces, first, progress=False)
    shutil.copy(first / "best.safetensors", tmp_path / "lone.safetensors")
    train(once.set([f"pretrained={first / 'best.safetensors'}"]), faces, tmp_path / "second", progress=False)
    train(once.set([f"pretrained={tmp_path / 'lone.safetensors'}"]), faces, tmp_path / "third", progress=False)
    records = [json.loads((tmp_path / run / "run.json").read_text()) for run in ("first", "second", "third")]
    digest = hashlib.sha256((tmp_path / "lone.safetensors").read_bytes()).hexdigest()
    assert [r["started_from"] for r in records] == [None, dict(file="best.safetensors", sha256=digest, run=records[0]),
                                                    dict(file="lone.safetensors", sha256=digest)]
    assert export_run(tmp_path / "second", tmp_path / "model")["started_from"]["run"] == records[0]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_goes_back_to_the_system():
    "Every second block is freed, so that what is kept lies between: kept by the library until it is trimmed."
    code = """
import torch
from fer_nbdev.train import TrimMemory, keep_freed_memory
def megabytes(): return int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6
keep_freed_memory()
blocks = [torch.ones(2**20) for _ in range(200)]
full, blocks = megabytes(), blocks[::2]
kept = megabytes()
TrimMemory().trim(0)
print(full - kept, kept - megabytes())
"""
    kept, returned = map(float, subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()[-2:])
    assert kept < 50 and returned > 350


def test_memory_is_trimmed_every_so_many_steps_and_after_an_epoch():
    learn, trim = fer_learner(fer_dls(synthetic_faces(140), bs=16, device="cpu"), read_recipe("synthetic")), TrimMemory(every=3)
    trimmed = []
    trim.trim = lambda pad: trimmed.append(learn.train_iter)
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, cbs=[trim])
    assert trimmed == [3, 6, 7, 9, 12, 14]


def test_an_edited_recipe_is_noticed(faces, tmp_path):
    "A run goes on as run.json says that it was begun, and what it wrote says what it did."
    train(SHORT.set(["epochs=1"]), faces, tmp_path / "run", progress=False)
    SHORT.set(["epochs=2", "lr=.1"]).write(tmp_path / "run/recipe.yaml")
    with pytest.raises(ValueError, match="epochs, lr differ"):
        train(None, faces, tmp_path / "run", resume=True, progress=False)


def test_weights_of_nobody_knows_what_are_not_trained_on(faces, tmp_path):
    train(SHORT.set(["epochs=1"]), faces, tmp_path, progress=False)
    (tmp_path / "run.json").unlink()
    for recipe, resume in ((SHORT, False), (SHORT, True), (None, True)):
        with pytest.raises(ValueError, match="no run.json"):
            train(recipe, faces, tmp_path, resume=resume, progress=False)


def test_a_run_that_failed_at_once_can_be_corrected(faces, tmp_path):
    class Fail(Callback):
        def before_train(self): raise ValueError("a disk is full")
    with pytest.raises(ValueError, match="disk"):
        train(SHORT.set(["lr=.5"]), faces, tmp_path, progress=False, cbs=[Fail()])
    train(SHORT.set(["epochs=1"]), faces, tmp_path, progress=False)
    assert json.loads((tmp_path / "run.json").read_text())["recipe"]["lr"] == SHORT.lr == read_recipe(tmp_path / "recipe.yaml").lr


@pytest.mark.parametrize("setting, said", [
    ("valid=null", "valid"), ("valid=[PublicTest]", "valid"), ("valid=1.5", "valid"),
    ("stats=[a, b]", "stats"), ("stats=[.5]", "stats"), ("stats=[.5, 0]", "stats"), ("pretrained=5", "pretrained"),
    ("damage={noise: x}", "damage"), ("damage={p_blur: 2}", "p_blur"), ("damage={blur: nan}", "blur"), ("damage=.2", "damage"),
    ("augment.erase=[1, 2, 3]", "erase"), ("classes=[happy]", "two or more")])
def test_what_cannot_train_is_refused_before_it_does(setting, said):
    with pytest.raises(ValueError, match=said):
        SHORT.set([setting])


@pytest.mark.parametrize("schedule, settings", [
    ("plateau", dict(patience="x")), ("plateau", dict(factor=2)), ("plateau", dict(factor=0)),
    ("inverse", dict(decay="x")), ("inverse", dict(decay=-1))])
def test_schedules_are_refused_before_they_run(schedule, settings):
    with pytest.raises(ValueError, match="schedule_args"):
        replace(SHORT, schedule=schedule, schedule_args=settings)


def test_whole_numbers_may_be_written_with_a_point(tmp_path):
    recipe = SHORT.set(["epochs=2.0", "bs=20.0", "seed=1.0"])
    assert [(v, type(v)) for v in (recipe.epochs, recipe.bs, recipe.seed)] == [(2, int), (20, int), (1, int)]
    (tmp_path / "twice.yaml").write_text("lr: .1\nepochs: 2\nlr: .001\n")
    with pytest.raises(ValueError, match="twice"):
        read_recipe(tmp_path / "twice.yaml")


def test_a_tracker_goes_on_where_its_curves_ended(faces, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with pytest.raises(KeyboardInterrupt):
        train(SHORT, faces, tmp_path, progress=False, track="tensorboard", cbs=[Kill()])
    train(SHORT, faces, tmp_path, resume=True, progress=False, track="tensorboard")
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    steps = 224 // SHORT.bs
    assert [e.step for e in events.Scalars("accuracy")] == [steps, 2 * steps, 3 * steps]


def test_folds_want_a_face_of_every_class(faces):
    few = faces[(faces.emotion != 1) | (np.cumsum(faces.emotion == 1) < 2)]
    with pytest.raises(ValueError, match="1 disgust"):
        fold_tables(few, 3)


def test_numbers_in_words_of_yaml_are_numbers_everywhere(tmp_path):
    (tmp_path / "r.yaml").write_text("schedule: plateau\nschedule_args: {min_lr: 1e-6, factor: 5e-1, patience: 3}\naugment: {shift: 5e-2}\nwd: 1e-6\n")
    recipe = read_recipe(tmp_path / "r.yaml")
    assert (recipe.schedule_args["min_lr"], recipe.schedule_args["factor"], recipe.augment["shift"], recipe.wd) == (1e-6, .5, .05, 1e-6)


def test_a_device_that_cannot_be_used_is_named_in_a_sentence(faces, tmp_path):
    for device in ("abacus", "hpu", "xla", *([] if torch.cuda.is_available() else ["cuda"])):
        with pytest.raises(ValueError, match=f"device='{device}' cannot be used here") as e:
            train(SHORT, faces, tmp_path / "run", device=device, progress=False)
        assert len(str(e.value)) < 300 and not (tmp_path / "run").exists()


def test_splits_of_a_recipe_have_one_name():
    assert Recipe(valid="public + private").valid == "PublicTest+PrivateTest"
    for valid in ("nonsense", "Training", "public+train", 1.):
        with pytest.raises(ValueError, match="split|rows that train|fraction"):
            Recipe(valid=valid)


@pytest.mark.parametrize("settings, said", [
    (dict(wd=-1.), "of zero or more$"), (dict(seed=-1), "a whole number of zero or more"),
    (dict(label_smoothing=1.5), "of zero or more and below one"), (dict(pct_start=0.), "above zero and below one"),
    (dict(ema=1.), "below one"), (dict(lr=0.), "above zero$")])
def test_a_number_out_of_range_is_told_its_range(settings, said):
    with pytest.raises(ValueError, match=said):
        Recipe(**settings)


@pytest.mark.parametrize("text, said", [("", "cannot be read as JSON"), ("{}", "lacks recipe, data"), ("[]", "lacks recipe"), (None, "there is no")])
def test_a_damaged_run_is_named(text, said, faces, tmp_path):
    train(SHORT.set(["epochs=1"]), faces, tmp_path, progress=False)
    assert read_run(tmp_path)[1]["finished"] is True
    (tmp_path / "run.json").unlink() if text is None else (tmp_path / "run.json").write_text(text)
    readers = [read_run, load_run, lambda run: export_run(run, tmp_path / "model"), open_network, lambda run: compare_runs([run])]
    if text is not None:
        readers.append(lambda run: train(None, faces, run, resume=True, progress=False))
    for reader in readers:
        with pytest.raises((ValueError, FileNotFoundError), match=f"run.json.*{said}|{said}.*run.json"):
            reader(tmp_path)


@pytest.mark.parametrize("mix", ["mixup=.2", "cutmix=.2"])
def test_a_run_that_ended_early_is_whole_and_has_nothing_left_to_do(mix, faces, tmp_path, capsys):
    recipe = SHORT.set(["epochs=6", "patience=1", "lr=1e-9", mix])
    train(recipe, faces, tmp_path, progress=False)
    rows = _rows(tmp_path)
    assert len(rows) < 6
    train(recipe, faces, tmp_path, resume=True, progress=False, cbs=[Announce(tmp_path)])
    assert f"6 epochs, of which {len(rows)} are done (it has ended early), on" in capsys.readouterr().out
    assert _rows(tmp_path) == rows and read_run(tmp_path)[1]["finished"] is True


@pytest.mark.parametrize("monitor", MONITORS)
def test_a_value_that_is_no_number_is_never_the_best(monitor):
    rows = [{monitor: v} for v in (float("nan"), .8, .9, float("nan"))]
    assert best_epoch(rows, monitor) == (2 if MONITORS[monitor] is max else 1)


def test_bf16_that_is_emulated_is_not_chosen(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    assert not has_bf16("cpu")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert has_bf16("cpu")


def test_norm_layers_of_every_kind_have_no_weight_decay():
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.GroupNorm(2, 4), torch.nn.RMSNorm(4), torch.nn.BatchNorm2d(4))
    decayed, plain = decay_groups(model)
    assert [p.ndim for p in decayed] == [4] and len(plain) == 6


@pytest.mark.parametrize("side", [34, 36, 42, 43, 46, 47])
def test_our_network_takes_faces_of_every_size(side):
    assert create_model("se_resnet", 7).eval()(torch.zeros(2, 1, side, side)).shape == (2, 7)
