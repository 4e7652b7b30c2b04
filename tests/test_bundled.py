"""The bundled models are what their cards say: scored again where the faces of FER2013 are at hand, and beside what `bench/bundled.py` measured."""
import importlib.util
import io
import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pd = pytest.importorskip("pandas")
from PIL import Image
from _repository import ROOT

from fer_nbdev.cards import bundled_models
from fer_nbdev.data import FER2013
from fer_nbdev.evaluate import evaluate_model
from fer_nbdev.recipe import Recipe, list_recipes, plain_recipe, read_recipe

REAL = next((p for d in Path(__file__).resolve().parents if (p := d / "shared" / "data" / "fer2013.parquet").is_file()), None)
MODELS = sorted(bundled_models())


@pytest.fixture(scope="module")
def private():
    if REAL is None:
        pytest.skip("there is no shared/data/fer2013.parquet beside the checkout")
    rows = pd.read_parquet(REAL, columns=["image_webp", "emotion", "Usage"]).query("Usage == 'PrivateTest'")
    faces = np.stack([np.asarray(Image.open(io.BytesIO(b)).convert("L")) for b in rows.image_webp])
    return FER2013(faces, rows.emotion.to_numpy().astype(np.int64), rows.Usage.to_numpy().astype(str))


@pytest.fixture(scope="module")
def bench():
    "bench/bundled.py, which imports its neighbours."
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        spec = importlib.util.spec_from_file_location("bundled", ROOT / "bench" / "bundled.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


@pytest.mark.parametrize("name", ["fast", "accurate"])
def test_a_model_scores_what_its_card_says(name, private):
    found, card = evaluate_model(name, private, "private", n_resamples=2, threads=1).scores, bundled_models()[name]["scores"]["PrivateTest"]
    assert found["n"] == card["n"] == 3589
    assert found["accuracy"] == pytest.approx(card["accuracy"], abs=.001)  # a tenth of a point
    assert found["log_loss"] == pytest.approx(card["log_loss"], abs=.002) and found["ece"] == pytest.approx(card["ece"], abs=.003)
    assert np.abs(np.subtract(found["confusion"], card["confusion"])).sum() <= 20


@pytest.mark.parametrize("name", MODELS)
def test_cards_hold_what_was_measured(name, bench):
    "A model that was trained anew, or a measurement that was made again, needs `bench/bundled.py --cards`."
    card, record = bundled_models()[name], json.loads((ROOT / "bench" / "results" / "bundled.json").read_text(encoding="utf-8"))
    account = card["accounting"]
    assert account["sha256"] == card["files"]["model.onnx"]["sha256"] and account["commit"] == record["commit"]
    assert bench.account(record["results"][name]).items() <= account.items()
    assert account["retrain"] == bench.retrain_commands(name, card)


def _runs(part):
    "The runs that led to a network, first to last."
    before = (part.get("started_from") or {}).get("run")
    return [*(_runs(before) if before else []), part]


@pytest.mark.parametrize("name", MODELS)
def test_the_commands_of_a_card_train_its_recipes(name):
    "Read as a shell and `fer train` read them, they give the recipes that the networks were trained by."
    card = bundled_models()[name]
    trained = [words for line in card["accounting"]["retrain"] if (words := shlex.split(line))[1] == "train"]
    runs = [run for part in card.get("members") or [card] for run in _runs(part)]
    assert len(trained) == len(runs)
    for words, part in zip(trained, runs):
        settings = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
        asked = plain_recipe(read_recipe(words[words.index("--recipe") + 1]).set(settings))
        assert all(asked[k] == v for k, v in part["recipe"].items() if k not in ("name", "about", "stats")), settings
        assert ("--votes" in words) == bool(part["data"].get("soft"))
        folder = Path(part["recipe"]["pretrained"] or "").parent
        assert not part["recipe"]["pretrained"] or folder.name in [w[w.index("--out") + 1] for w in trained[:trained.index(words)]]


def test_a_setting_inside_a_group_is_named_alone_and_quoted_where_a_shell_needs_it(bench):
    base, other = (plain_recipe(read_recipe("fer2013").set(s)) for s in ([], ["augment.crop=.83", "classes=[happy, sad]", "name=mine"]))
    assert sorted(bench.changed_settings(other, base)) == ["augment.crop=0.83", 'classes=["happy", "sad"]']
    words = shlex.split(bench.train_command({"recipe": other, "data": {}}, "run"))
    assert plain_recipe(Recipe.read("fer2013").set([words[i + 1] for i, word in enumerate(words) if word == "--set"]).set(["name=mine"])) == other
    assert "fer2013" in list_recipes() and words[words.index("--recipe") + 1] == "fer2013"
