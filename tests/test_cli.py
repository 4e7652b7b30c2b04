"""The commands one after the other, as a user types them: a csv becomes a run, a model, a report and a second export."""
import csv
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import typer
from _tables import write_csv

pytest.importorskip("fastai")
from typer.testing import CliRunner

from fer_nbdev.cards import bundled_models, model_card
from fer_nbdev.cli import _Watched, _open, _report, _train_recipe, app
from fer_nbdev.core import sample_portrait
from fer_nbdev.data import read_fer2013, synthetic_faces
from fer_nbdev.evaluate import evaluate_model
from fer_nbdev.inference import Predictor
from fer_nbdev.recipe import list_recipes, read_recipe


def _fer(line, code=0):
    result = CliRunner().invoke(app, line.split())
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A folder with fer2013.csv and a run of two epochs in it; what `fer train` printed."
    folder, table = tmp_path_factory.mktemp("cli"), synthetic_faces(280)
    write_csv(table, folder / "fer2013.csv")
    return folder, _fer(f"train --data {folder}/fer2013.csv --recipe synthetic --set epochs=2 --out {folder}/run")


@pytest.fixture(autouse=True)
def in_its_folder(trained, monkeypatch):
    monkeypatch.chdir(trained[0])


def test_training_leaves_a_model_and_its_report(trained):
    folder, said = trained
    card = json.loads((folder / "run/model/card.json").read_text())
    assert f"PrivateTest: accuracy {card['scores']['PrivateTest']['accuracy']:.1%}" in said
    assert {p.name for p in (folder / "run").iterdir()} >= {
        "recipe.yaml", "run.json", "history.csv", "history.json", "curves.png", "best.safetensors", "last.safetensors", "model", "report"}
    assert json.loads(_fer("predict --model run/model --json"))["faces"][0]["emotion"] in card["classes"]


def test_training_says_first_what_it_is_about_to_do(trained):
    folder, said = trained
    about = json.loads((folder / "run/run.json").read_text())
    line = (rf"synthetic: {about['recipe']['arch']}, {about['n_params']:,} parameters, 2 epochs on (cpu|cuda\S*|mps\S*) in (bf16|fp32); "
            rf"folder {re.escape(str(folder / 'run'))} ")
    assert re.search(line, said[:said.index("train_loss")]), said


def test_what_takes_long_shows_how_far_it_is(trained, monkeypatch):
    "The damages one by one, and ten views of many faces in parts, which answer what the whole would."
    seen = []
    def progress(items, total, on=True, what=""):
        seen.append((what, total, on))
        return items
    monkeypatch.setattr("fer_nbdev.cli._progress", progress)
    _fer("evaluate fast --data fer2013.csv --robustness")
    assert seen == [("Damaging", 45, True)]
    seen.clear()
    _fer("evaluate fast --data fer2013.csv --tta")
    assert seen == [("", 1, False)]  # few faces need no bar
    faces, predictor = synthetic_faces(600).pixels, Predictor("fast", tta=True)
    assert _Watched(predictor).predict_faces(faces) == pytest.approx(predictor.predict_faces(faces), abs=1e-5) and seen[-1] == ("", 3, True)


def test_a_model_is_evaluated_exported_again_and_compared(trained):
    folder, _ = trained
    scores = json.loads((folder / "run/model/card.json").read_text())["scores"]
    said = _fer("evaluate run/model --data fer2013.csv --split private --out report")
    assert f"{scores['PrivateTest']['accuracy']:.2%}" in said
    assert "data:image/png;base64" in (folder / "report/report.html").read_text(encoding="utf-8")
    with open(folder / "report/predictions.csv", newline="") as f:
        assert len(list(csv.DictReader(f))) == scores["PrivateTest"]["n"]
    _fer("export run exported --data fer2013.csv")
    assert json.loads((folder / "exported/card.json").read_text())["scores"] == scores
    assert "exported" in _fer("evaluate run/model --data fer2013.csv --compare exported")


def test_a_finished_model_is_calibrated_on_other_faces(trained):
    folder, _ = trained
    said = _fer("export run/model mine --data fer2013.csv")
    assert json.loads((folder / "mine/card.json").read_text())["calibration"] == json.loads((folder / "run/model/card.json").read_text())["calibration"]
    assert "calibration: " in said and "PrivateTest: accuracy" in said
    _fer("export fast yours --data fer2013.csv")
    assert json.loads((folder / "yours/card.json").read_text())["calibration"]["fitted_on"] == "PublicTest"
    _fer("export run/model nothing", code=2)


def test_finished_models_are_joined(trained):
    folder, _ = trained
    assert "PrivateTest: accuracy" in _fer("export run/model joint --with fast --with accurate --data fer2013.csv")
    assert [m["name"] for m in json.loads((folder / "joint/card.json").read_text())["members"]] == ["model", "fast", "accurate"]
    assert "accuracy" in _fer("evaluate joint --data fer2013.csv --split private --out joint_report")
    _fer("export fast nothing --with accurate --int8", code=2)
    _fer("export fast nothing --with nobody", code=2)


def test_votes_are_translated_on_demand(trained):
    folder, _ = trained
    usage, columns = synthetic_faces(280).usage, "neutral,happiness,surprise,sadness,anger,disgust,fear,contempt,unknown,NF"
    rows = "".join(f"{u},f{i}.png,{10 - i % 5},0,0,{i % 5},0,0,0,0,0,0\n" for i, u in enumerate(usage))
    (folder / "votes.csv").write_text(f"Usage,Image name,{columns}\n" + rows)
    _fer("train --data fer2013.csv --recipe synthetic --set epochs=1 --votes votes.csv --translate --set soft_share=.5 --out voted")
    assert json.loads((folder / "voted/run.json").read_text())["data"]["soft"] == "chances of the labels, told from the votes of FER+"
    assert "--votes" in _fer("train --data fer2013.csv --recipe synthetic --translate --out nothing", code=2)


def test_resuming_keeps_the_recipe_and_nothing_trains_over_a_run(trained):
    folder, _ = trained
    before = (folder / "run/history.json").read_text()
    _fer("train --data fer2013.csv --out run --resume")
    assert (folder / "run/history.json").read_text() == before
    _fer("train --data fer2013.csv --recipe synthetic --out run", code=2)
    _fer("train --data fer2013.csv --recipe synthetic --out run --resume", code=2)
    assert (folder / "run/history.json").read_text() == before


def test_nothing_is_resumed_where_nothing_was_begun(trained, monkeypatch):
    "A slip in --out must not become a run on drawn faces; under torchrun the same command begins a run and goes on with it."
    folder, _ = trained
    for command in ("train", "train --data fer2013.csv", "tune", "tune --search lr=log:1e-3:1e-1"):
        assert "in 'rum' to resume" in _fer(f"{command} --resume --out rum", code=2)
    assert not (folder / "rum").exists()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert _train_recipe(folder / "rum", None, "synthetic", None, resume=True).name == "synthetic"


def test_what_is_cheap_to_check_is_checked_before_the_data_is_read(trained, monkeypatch):
    def read(*_): raise AssertionError("the data was read")
    monkeypatch.setattr("fer_nbdev.cli._read_data", read)
    for line, said in {"train --recipe nosuch": "unknown recipe 'nosuch'", "train --set epochs=none": "epochs",
                       "evaluate nosuch": "unknown model 'nosuch'", "evaluate nosuch.onnx": "no ONNX file 'nosuch.onnx'",
                       "evaluate fast --split nosuch": "unknown split 'nosuch'", "evaluate fast --compare nosuch": "unknown model 'nosuch'"}.items():
        assert said in _fer(f"{line} --data fer2013.csv", code=2)


def test_a_model_is_opened_once(trained, monkeypatch):
    opened = []
    monkeypatch.setattr("fer_nbdev.cli._open", lambda model, tta, first=_open: opened.append(model) or first(model, tta))
    _fer("evaluate fast --data fer2013.csv --compare run/model")
    assert opened == ["fast", "run/model"]


def test_the_report_of_a_run_is_on_all_faces_that_selected_it(trained):
    "Where these are those of both tests, however the recipe spells it."
    folder, _ = trained
    shutil.copytree(folder / "run", folder / "both")
    read_recipe(folder / "run/recipe.yaml").set(["valid=public+private"]).write(folder / "both/recipe.yaml")
    for run, split in dict(run="PrivateTest", both="PublicTest+PrivateTest").items():
        _report(folder / run, read_fer2013("fer2013.csv"))
        assert set(json.loads((folder / run / "report/scores.json").read_text())["about"]["split"].split("+")) == set(split.split("+"))


COMMANDS = typer.main.get_command(app).commands


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_has_examples_that_can_be_typed(name, tmp_path, monkeypatch):
    "Each is on a line of its own where the terminal has 80 columns, is a command of this program, and its options and arguments are known."
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokens.txt").touch()
    text = COMMANDS[name].help if name else app.info.epilog
    examples = re.findall(r"^\s*- `(.+)`", text, re.M)
    assert any(e.startswith(f"fer {name}") for e in examples) and " · " not in text
    shown = CliRunner().invoke(app, [*name.split(), "--help"], env=dict(COLUMNS="80", TERM="dumb", NO_COLOR="1")).output
    lines = [re.sub(r"\x1b\[[\d;]*m", "", line).strip() for line in shown.splitlines()]
    assert not [e for e in examples if not any(line.startswith(f"• {e}") for line in lines)], shown
    for words in (shlex.split(part.partition(">")[0]) for e in examples for part in e.split("|")):
        if words[0] == "fer":
            COMMANDS[words[1]].make_context(words[1], words[2:])


def test_commands_are_listed_by_what_they_are_for():
    listed = typer.main.get_command(app).list_commands(None)
    assert sorted(listed) == sorted(COMMANDS)
    assert [k for k, _ in itertools.groupby(listed, lambda name: COMMANDS[name].rich_help_panel)] == ["Use", "Train", "Understand", "Deploy"]


def test_models_tells_all_of_one_and_cards_for_programs():
    assert _fer("models fast") == " ".join(model_card("fast").split()) and "fer train --data fer2013.csv --recipe fast" in _fer("models fast")
    assert json.loads(_fer("models --json")) == bundled_models() and json.loads(_fer("models accurate --json")) == bundled_models()["accurate"]
    assert "unknown model 'nosuch'" in _fer("models nosuch", code=2)


def test_the_shell_completes_names_without_waiting_for_torch(tmp_path):
    "As bash asks for them; where no name fits, the answer is empty, and bash offers files."
    code = ("import sys, atexit; sys.argv = ['fer']; "
            "atexit.register(lambda: print([m for m in ('torch', 'onnxruntime', 'fastai', 'sklearn') if m in sys.modules])); "
            "from fer_nbdev.cli import main; main()")
    def completed(line):
        env = {**os.environ, "_FER_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
        *names, heavy = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout.splitlines()
        assert heavy == "[]", heavy
        return [name for name in names if name]
    assert completed("fer train --recipe ") == [*list_recipes()] and completed("fer tune --recipe four") == ["four_class"]
    assert completed("fer evaluate ") == completed("fer predict --model ") == [*bundled_models()]
    assert completed("fer predict --detector ") == ["auto", "haar", "yunet", "none"] and completed("fer predict --provider open") == ["openvino"]
    assert completed("fer evaluate fast --split p") == ["private", "public"] and completed("fer train --recipe my_own") == []


def test_options_of_predicting_reach_the_predictor(trained):
    portrait = str(sample_portrait())
    for options, settings in {"": {}, "--margin .2": dict(margin=.2), "--tta": dict(tta=True),
                              "--threads 1 --provider cpu": dict(threads=1, providers=["cpu"])}.items():
        face, = json.loads(_fer(f"predict --model fast --json {options}"))["faces"]
        wanted, = Predictor("fast", **settings).predict(portrait)
        assert face["probs"] == pytest.approx(wanted.probs, abs=1e-5) and face["box"] == list(wanted.box), options
    # so each of them could be told from none
    assert Predictor("fast", margin=.2)(portrait) != Predictor("fast")(portrait) != Predictor("fast", tta=True)(portrait)
    assert "abacus" in _fer("predict --model fast --provider abacus", code=2)


def test_views_are_averaged_where_scores_are_asked_for(trained):
    table = read_fer2013("fer2013.csv")
    def scores(options):
        return json.loads(CliRunner().invoke(app, f"evaluate fast --data fer2013.csv --json {options}".split()).stdout)["scores"]
    plain, averaged = scores(""), scores("--tta")
    for said, tta in ((plain, False), (averaged, True)):
        assert said["log_loss"] == pytest.approx(evaluate_model(Predictor("fast", tta=tta), table, "private").scores["log_loss"], abs=1e-5)
    assert plain["log_loss"] != averaged["log_loss"]


def test_an_export_is_as_wide_and_as_free_as_it_is_told(trained):
    folder, _ = trained
    cards = {}
    for name, options in dict(usual="", whole="--float32", free="--licence MIT").items():
        _fer(f"export run {name} --data fer2013.csv {options}")
        cards[name] = json.loads((folder / name / "card.json").read_text())
    assert [c["weights"] for c in cards.values()] == ["float16", "float32", "float16"]
    assert cards["whole"]["files"]["model.onnx"]["bytes"] > 1.5 * cards["usual"]["files"]["model.onnx"]["bytes"]
    assert [c.get("licence") for c in cards.values()] == [None, None, "MIT"], "nobody else can say under which terms a model may be used"


def test_test_splits_can_be_prepared_as_one_folder(trained):
    folder, _ = trained
    table = read_fer2013("fer2013.csv")
    _fer("prepare fer2013.csv apart")
    _fer("prepare fer2013.csv merged --merge-test")
    count = {name: {p.name: len(list(p.rglob("*.png"))) for p in (folder / name).iterdir() if p.is_dir()} for name in ("apart", "merged")}
    sizes = {u: int((table.usage == u).sum()) for u in ("Training", "PublicTest", "PrivateTest")}
    assert sorted(count["apart"].values()) == sorted(sizes.values())
    assert count["merged"] == dict(train=sizes["Training"], test=sizes["PublicTest"] + sizes["PrivateTest"])


def test_a_teacher_is_named_on_the_command_line(trained):
    folder, _ = trained
    _fer("train --data fer2013.csv --recipe synthetic --set epochs=1 --set class_weights=null --set label_smoothing=0 "
         "--set soft_share=.5 --teacher fast --out taught")
    teacher, = json.loads((folder / "taught/run.json").read_text())["teachers"]
    assert json.loads((folder / "taught/run.json").read_text())["recipe"]["teachers"] == ["fast"] and teacher


def test_recipes_are_listed_with_what_they_are(trained):
    said = _fer("train --list")
    for name, about in list_recipes().items():
        assert name in said and " ".join(about.split()[:3]) in said


def test_pictures_are_a_video_of_the_rate_that_is_named(trained):
    folder, _ = trained
    (folder / "frames").mkdir()
    for i in range(12):
        shutil.copy(sample_portrait(), folder / f"frames/{i}.jpg")
    for options, seconds in {"": 11 / 25, "--fps 4": 11 / 4}.items():
        _fer(f"video frames --model fast --csv faces.csv {options}")
        with open("faces.csv", newline="") as f:
            assert float(list(csv.DictReader(f))[-1]["time"]) == pytest.approx(seconds, abs=.01)


def test_pictures_beside_the_photos_leave_these_alone(trained):
    folder, _ = trained
    (folder / "photos").mkdir()
    for name in ("a.png", "b.jpg"):
        shutil.copy(sample_portrait(), folder / "photos" / name)
    before = {p.name: p.read_bytes() for p in (folder / "photos").iterdir()}
    _fer("predict photos --model fast --annotate photos")
    after = {p.name: p.read_bytes() for p in (folder / "photos").iterdir()}
    assert {name: after[name] for name in before} == before and after.keys() - before.keys() == {"a-2.png", "b.png"}


def test_what_an_option_cannot_do_is_said(trained):
    folder, _ = trained
    graph = folder / "run/model/model.onnx"
    shutil.copy(graph, folder / "alone.onnx")
    assert "without a card" in _fer("evaluate alone.onnx --data fer2013.csv --tta", code=2)
    def loss(model):
        return json.loads(CliRunner().invoke(app, f"evaluate {model} --data fer2013.csv --tta --json".split()).stdout)["scores"]["log_loss"]
    assert loss(graph) == loss(graph.parent)  # the card lies beside it
    assert "weights are what they are" in _fer("export fast whole --float32 --data fer2013.csv", code=2)
    assert "device='abacus' cannot be used here" in _fer("train --data fer2013.csv --recipe synthetic --device abacus --out nothing", code=2)


def test_what_is_wrong_is_said_with_what_would_be_right(trained):
    "A file in the place of a folder, a name that nobody knows, a slip in a field: before anything is read or written."
    folder, _ = trained
    (folder / "notes.txt").write_text("mine")
    for command in ("predict --annotate", "train --set epochs=1 --out", "tune --search lr=log:1e-3:1e-1 --out",
                    "evaluate fast --data fer2013.csv --out", "export fast", "prepare fer2013.csv"):
        assert "notes.txt is a file: expected a folder" in _fer(f"{command} notes.txt", code=2)
    bundled = ", ".join(bundled_models())
    for line, said in {"export nosuch out": "there is no run, model folder or file 'nosuch', "
                                            f"and no bundled model of that name: these are {bundled}",
                       "train --set epoch=3": "no setting epoch: did you mean epochs? expected among name, about",
                       "train --set augment.rotatee=3": "did you mean rotate?", "train --device foo": "expected cpu, cuda or mps",
                       "tune --search lr=1:2 --device foo": "expected cpu, cuda or mps", "tune": "--search lr=log:1e-3:1e-1",
                       "train --teacher nosuch": "unknown model 'nosuch'"}.items():
        assert said in _fer(line, code=2)
    assert (folder / "notes.txt").read_text() == "mine" and not (folder / "search").exists()


def test_lists_of_files_from_other_systems(trained):
    folder, _ = trained
    shutil.copy(sample_portrait(), folder / "face.jpg")
    for data in (b"\xef\xbb\xbfface.jpg\r\n", "face.jpg\r\n".encode("utf-16")):
        (folder / "list.txt").write_bytes(data)
        assert json.loads(_fer("predict --model fast --json --files-from list.txt"))["image"] == "face.jpg"
    (folder / "list.txt").write_bytes(b"face.jpg\0other.jpg\0")
    assert "zero bytes" in _fer("predict --model fast --files-from list.txt --annotate out", code=2)


def test_the_home_folder_is_found_after_an_equals_sign_too(trained, tmp_path):
    "As bash leaves it, and as cmd does everywhere; nothing comes to lie in a folder that is called ~."
    (tmp_path / "photos").mkdir()
    shutil.copy(sample_portrait(), tmp_path / "photos/a.png")
    before = (tmp_path / "photos/a.png").read_bytes()
    env = {**os.environ, "HOME": str(tmp_path), "USERPROFILE": str(tmp_path)}
    for line in ("predict ~/photos --model fast --annotate=~/photos", "train --set epochs=1 --out=~/run",
                 "export ~/run ~/m", "evaluate ~/m --data fer2013.csv --out=~/report"):
        done = subprocess.run([sys.executable, "-m", "fer_nbdev", *line.split()], cwd=trained[0], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "photos/a.png").read_bytes() == before and (tmp_path / "photos/a-2.png").exists()
    assert (tmp_path / "run/report/report.html").exists() and (tmp_path / "m/card.json").exists() and (tmp_path / "report/report.html").exists()
    assert not (trained[0] / "~").exists()


def test_torchrun_may_start_the_same_command_again(tmp_path, monkeypatch):
    from fer_nbdev.cli import _train_recipe
    recipe = _train_recipe(tmp_path, "fast", "fer2013", ["epochs=3"])
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="leave --recipe"):
        _train_recipe(tmp_path, "fast", "fer2013", ["epochs=3"], resume=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert _train_recipe(tmp_path, "fast", "fer2013", ["epochs=3"], resume=True) == recipe
    assert _train_recipe(tmp_path, None, "fer2013", None, resume=True) is None
