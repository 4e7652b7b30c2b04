"""Training on several ranks: the run of one process, sooner. Two ranks on this machine, by gloo.

Most of it runs in forked processes, which have fastai imported already, under the launcher that `torchrun` uses; the
command line goes through `torchrun` itself.
"""
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from _tables import write_csv

pytest.importorskip("accelerate", reason="accelerate is not installed")
if not hasattr(os, "fork"):
    pytest.skip("the ranks of these tests are forked", allow_module_level=True)

import torch  # noqa: E402
from fastai.callback.core import Callback  # noqa: E402
from fastai.torch_core import rank_distrib  # noqa: E402
from fer_nbdev.callbacks import load_checkpoint, save_weights  # noqa: E402
from fer_nbdev.data import synthetic_faces  # noqa: E402
from fer_nbdev.distributed import distribute, start_ranks  # noqa: E402
from fer_nbdev.loaders import fer_dls  # noqa: E402
from fer_nbdev.models import create_model  # noqa: E402
from fer_nbdev.recipe import Recipe  # noqa: E402
from fer_nbdev.train import fer_learner, train  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError  # noqa: E402
from torch.distributed.launcher.api import LaunchConfig, elastic_launch  # noqa: E402

FACES = synthetic_faces(147)[:132]  # so many that a single face is left for the last batch of validation
RARE = (FACES.usage == "Training") & (FACES.emotion % 2 == 1)
TABLE = FACES[~RARE | (np.random.default_rng(0).random(len(FACES)) < .4)]  # less of every other class, or class weights would all be 1
STILL = ["epochs=2", "bs=12", "precision=fp32", "augment=null", "arch_args.dropout=0", "lr=.03", "ema=.8"]
NORM = ["arch_args.widths=[8, 16]", "arch_args.blocks=[1, 1]", "class_weights=null"]
CASES = {
    "no norm": ["arch=sequential", "arch_args={blocks: [[8], [8]], dropout: [0, 0], hidden: [16], head_dropout: [0]}", "class_weights=inverse",
                "optimizer=adam", "lr=.003"],
    "class weights": [*NORM, "class_weights=inverse", "label_smoothing=.1", "clip=1"],
    "worst weights nearby": [*NORM, "class_weights=inverse", "sam=.05"],
    "oversampled": [*NORM, "loss=focal", "sampling=oversample"],
    "frozen body": [*NORM, "pretrained=body.safetensors", "freeze_epochs=1"],
    "plateau, early stop": [*NORM, "schedule=plateau", "schedule_args={patience: 0}", "patience=1", "monitor=valid_loss", "epochs=4", "lr=.5"],
}


def launch(f, args, n, answer):
    "Start `n` ranks, and send what each returned or what is said about their end."
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=n, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
                          start_method="fork", max_restarts=0, monitor_interval=.05)
    try:
        answer.send(list(elastic_launch(config, f)(*args).values()))
    except ChildFailedError as e:
        answer.send(str(e))


def on_ranks(f, *args, n=2):
    """Run `f(*args)` on `n` ranks, as `torchrun` starts them, but forked. Returns what each returned, or the error as text.

    The launcher is a fork too: it opens sockets and starts threads, which should not be there when the next one forks."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    launcher = fork.Process(target=launch, args=(f, args, n, theirs))
    launcher.start()
    theirs.close()
    try:
        return ours.recv()
    finally:
        launcher.join(20)
        launcher.kill()


def case(name):
    settings = [s for s in STILL if not (name == "no norm" and s.startswith("arch_args"))]
    return Recipe.read("synthetic").set([*settings, *CASES[name]])


class Watch(Callback):
    "Keeps the history as this rank has it when an epoch is decided about."
    order = 64

    def after_epoch(self):
        self.rows = list(self.history.rows)


class PlainLoss:
    "The loss without fastai's tensor types, which turn float64 into float32."

    def __init__(self, func):
        self.func = func.double()

    def __call__(self, pred, y):
        return self.func(pred.as_subclass(torch.Tensor), y.as_subclass(torch.Tensor))


class Double(Callback):
    "float64, in which what two ranks compute differs from what one does by 1e-15 rather than 1e-7, and a wrong factor by as much as ever."
    order = -2  # before anything is made of the parameters

    def before_fit(self):
        self.model.double()
        self.learn.loss_func = PlainLoss(self.loss_func.func)

    def before_batch(self):
        self.learn.xb = tuple(x.double() for x in self.xb)

    def after_loss(self):
        self.learn.loss = self.loss.float()  # the copy that is logged


def train_one(recipe, table, out, resume=False, cbs=()):
    "Train one run; returns the history and weights that this rank ends with."
    learn = train(recipe, table, out, resume=resume, device="cpu", progress=False, cbs=[watch := Watch(), *cbs])
    return watch.rows, {k: v.numpy() for k, v in learn.model.state_dict().items()}


def train_all(folder):
    "Train every case; returns what each ends with."
    os.chdir(folder.parent)
    return {name: train_one(case(name), TABLE, folder / name, cbs=[Double()]) for name in CASES}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "The folders of all cases, trained by one rank and by two, and what the two ranks ended with."
    folder = tmp_path_factory.mktemp("runs")
    recipe = case("frozen body")
    save_weights(create_model(recipe.arch, **recipe.arch_args).state_dict(), folder / "body.safetensors")
    on_ranks(train_all, folder / "1", n=1)
    return folder, on_ranks(train_all, folder / "2")


def close(a, b, tolerance=1e-9):
    return all(torch.allclose(a[k].double(), b[k].double(), rtol=tolerance, atol=tolerance) for k in a)


def scores(folder):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in json.loads((folder / "history.json").read_text())]


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_one_process(runs, name):
    "Weights, averages, optimiser and metrics at the same global batch, to the rounding of float64."
    folder, ranks = runs
    one, two = folder / "1" / name, folder / "2" / name
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())
    for file in ("best.safetensors", "last.safetensors"):
        a, b = load_file(one / file), load_file(two / file)
        assert a.keys() == b.keys() and close(a, b), file
    assert len(scores(one)) == len(scores(two))
    for a, b in zip(scores(one), scores(two)):
        assert a.keys() == b.keys()
        assert all(a[k] == pytest.approx(b[k], abs=2e-6) for k in a), (a, b)
    assert ranks[0][name][0] == ranks[1][name][0] == json.loads((two / "history.json").read_text())
    assert json.loads((two / "run.json").read_text())["ranks"] == 2


def test_a_validation_batch_that_cannot_be_shared_was_among_them():
    assert len(TABLE.split("PublicTest")) % case("no norm").bs == 1


# ------------------------------------------------------------------------------------- what two ranks do not share

DRAWN = Recipe.read("synthetic").set(["epochs=3", "bs=12", "arch_args.dropout=.2", "lr=.03", *NORM])


class Draws(Callback):
    "Keeps the sum of every training batch as the network sees it."
    def before_fit(self):
        self.sums = []

    def after_pred(self):
        if self.training:
            self.sums.append(float(self.xb[0].double().sum()))


class Die(Callback):
    "Rank 1 is gone in the middle of the second epoch."
    def before_batch(self):
        if self.training and self.epoch == 1 and self.iter == 3 and rank_distrib() == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def message(f, *args, **kwargs):
    "The ValueError that a call raises."
    try:
        f(*args, **kwargs)
    except ValueError as e:
        return str(e)


def facts(folder):
    "What one rank finds: draws, errors, and weights without synchronised batch norm."
    draws = Draws()
    rows, weights = train_one(DRAWN, TABLE, folder / "whole", cbs=[draws])
    taken = message(train_one, DRAWN, TABLE, folder / "whole")
    odd = message(train_one, DRAWN.set(["bs=15"]), TABLE, folder / "odd")
    recipe = case("class weights")
    learn = fer_learner(fer_dls(TABLE, recipe.bs, augment=None, device=start_ranks("cpu")), recipe)
    before = list(learn.dls.loaders)
    with learn.no_bar(), learn.no_logging(), distribute(learn, sync_bn=False):
        learn.fit(1, .03)
    state = {k: v.numpy() for k, v in learn.model.state_dict().items() if "running" not in k}
    tidy = learn.dls.loaders == before and not any("Distributed" in type(m).__name__ or "Synced" in type(m).__name__ for m in learn.model.modules())
    return dict(rows=rows, weights=weights, draws=draws.sums, taken=taken, odd=odd, unsynced=state, record=list(learn.final_record), tidy=tidy)


def same(a, b):
    return a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    "A run of two ranks with everything random, and what they found on the way."
    folder = tmp_path_factory.mktemp("drawn")
    return folder, on_ranks(facts, folder)


def test_ranks_draw_differently_and_end_alike(drawn):
    _, (a, b) = drawn
    assert len(a["draws"]) == len(b["draws"]) > 15 and not set(a["draws"]) & set(b["draws"])
    assert a["rows"] == b["rows"] and same(a["weights"], b["weights"])


def test_errors_reach_every_rank(drawn):
    _, found = drawn
    for rank in found:
        assert "already holds a run" in rank["taken"] and "bs=15 can't be shared by 2 ranks" in rank["odd"]


def test_unsynchronised_batch_norm_still_gives_one_model(drawn):
    "Each rank normalises its own share: not the weights of one process, but the same on all ranks, and the same scores."
    _, (a, b) = drawn
    assert same(a["unsynced"], b["unsynced"]) and a["record"] == b["record"] and a["tidy"] and b["tidy"]


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    "The folder of a run one of whose ranks was killed, and what the launcher said."
    out = tmp_path_factory.mktemp("killed") / "run"
    return out, on_ranks(train_one, DRAWN, TABLE, out, False, [Die()])


def test_a_dead_rank_ends_the_run(killed):
    "A hang would end here too: nothing above has a limit of its own, and rank 0 was waiting for rank 1."
    out, said = killed
    died = "rank      : 1" in said and "Signal 9 (SIGKILL)" in said
    assert died or "rank      : 0" in said, said  # torchrun names whoever it sees end first: rank 1, or rank 0 that lost it
    assert load_checkpoint(out / "last.safetensors")[0] == 0 and len(scores(out)) == 1


def test_it_resumes_to_the_same_weights(drawn, killed, tmp_path):
    "Also on one rank, where the epochs to come are drawn otherwise."
    folder, (whole, _) = drawn
    shutil.copytree(killed[0], tmp_path / "two")
    shutil.copytree(killed[0], tmp_path / "one")
    for _, weights in on_ranks(train_one, None, TABLE, tmp_path / "two", True):
        assert same(weights, whole["weights"])
    assert scores(tmp_path / "two") == scores(folder / "whole")
    on_ranks(train_one, None, TABLE, tmp_path / "one", True, n=1)
    assert scores(tmp_path / "one")[0] == scores(folder / "whole")[0] and len(scores(tmp_path / "one")) == 3


def train_on_other_data(out):
    train_one(DRAWN, TABLE[rank_distrib():], out)


def test_other_data_on_one_rank_ends_the_run(tmp_path):
    assert "rank 1 has read other data than rank 0" in on_ranks(train_on_other_data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_fer_train_goes_on_under_torchrun(drawn, killed, tmp_path):
    "The command line on two ranks: resumed, exported, reported, each once."
    write_csv(TABLE, tmp_path / "faces.csv")
    shutil.copytree(killed[0], tmp_path / "run")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint",
                           "localhost:0", "-m", "fer_nbdev", "train", "--resume", "--data", "faces.csv", "--device", "cpu"],
                          cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert scores(tmp_path / "run") == scores(drawn[0] / "whole")
    for line, times in {"train_loss": 2, "model: ": 1, "report: ": 1, "try it: fer predict": 1}.items():
        assert done.stdout.count(line) == times, done.stdout
    assert json.loads((tmp_path / "run" / "run.json").read_text())["finished"] and (tmp_path / "run" / "report" / "report.html").exists()
    assert json.loads((tmp_path / "run" / "model" / "card.json").read_text())["scores"]["PrivateTest"]["n"] == len(TABLE.split("PrivateTest"))
