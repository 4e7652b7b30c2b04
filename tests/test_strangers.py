"""What a stranger sends is data. Each thing that can be loaded is replaced by something that would run code; nothing runs, and the message says why.

The canary: every payload, if it were executed, would make a file."""
import base64
import hashlib
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from fer_nbdev.core import EMOTIONS, read_image

onnx = pytest.importorskip("onnx")
torch = pytest.importorskip("torch")

from _models import model_folder, small_graph  # noqa: E402
from fer_nbdev.cards import read_card  # noqa: E402
from fer_nbdev.classify import FaceClassifier  # noqa: E402

FACES = np.zeros((2, 48, 48), np.uint8)


class Payload:
    "Unpickled, it touches a file."
    def __init__(self, canary): self.canary = str(canary)
    def __reduce__(self): return os.system, (f"touch {self.canary}",) if os.name == "posix" else (f"type nul > {self.canary}",)


@pytest.fixture
def canary(tmp_path):
    "A file that must not be there when the test ends; and the payloads do work."
    path = tmp_path / "canary"
    pickle.loads(pickle.dumps(Payload(path)))
    assert path.exists(), "the payload is a dud"
    path.unlink()
    yield path
    assert not path.exists(), "code of a stranger was run"


def payloads(canary):
    "Name -> bytes that run code in somebody's loader."
    bad, zipped, archive = Payload(canary), io.BytesIO(), io.BytesIO()
    torch.save({"w": torch.zeros(2), "x": bad}, zipped)
    old = io.BytesIO()
    torch.save(bad, old, _use_new_zipfile_serialization=False)
    objects = io.BytesIO()
    np.save(objects, np.array([bad], object), allow_pickle=True)
    with zipfile.ZipFile(archive, "w") as z: z.writestr("arr_0.npy", objects.getvalue())
    header = json.dumps({"__metadata__": {"about": base64.b64encode(pickle.dumps(bad)).decode()}}).encode()
    return {"pickle": pickle.dumps(bad), "pickle, protocol 0": pickle.dumps(bad, 0), "torch zip": zipped.getvalue(), "torch, old": old.getvalue(),
            "npy of objects": objects.getvalue(), "npz of objects": archive.getvalue(),
            "safetensors with a pickle for a note": struct.pack("<Q", len(header)) + header}


KINDS = ("pickle", "pickle, protocol 0", "torch zip", "torch, old", "npy of objects", "npz of objects", "safetensors with a pickle for a note")


# ------------------------------------------------------------------------------------------------ pickles under every name

@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_and_weights(kind, canary, tmp_path):
    from fer_nbdev.callbacks import load_checkpoint
    from fer_nbdev.export import export_weights
    from fer_nbdev.models import create_model
    data = payloads(canary)[kind]
    for name in ("last.safetensors", "best.safetensors"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=name): load_checkpoint(tmp_path / name)
    with pytest.raises(ValueError): export_weights(tmp_path / "best.safetensors", tmp_path / "out", recipe="fer2013")
    for suffix in (".safetensors", ".pth", ".pt", ".bin"):
        (tmp_path / f"weights{suffix}").write_bytes(data)
        with pytest.raises(ValueError, match=f"weights{suffix}"): create_model("se_resnet", pretrained=tmp_path / f"weights{suffix}")
    for suffix in (".pth", ".pt", ".pkl"):
        (tmp_path / f"weights{suffix}").write_bytes(data)
        with pytest.raises(ValueError, match="cannot run code"): export_weights(tmp_path / f"weights{suffix}", tmp_path / "out", recipe="fer2013")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_models_and_detectors(kind, canary, tmp_path):
    from fer_nbdev.detect import detect_faces
    from fer_nbdev.evaluate import predict_table
    from fer_nbdev.data import synthetic_faces
    folder = model_folder(tmp_path / "model", payloads(canary)[kind], EMOTIONS)  # its card vouches for it
    with pytest.raises(ValueError, match="model.onnx"): FaceClassifier(folder).predict_faces(FACES)
    shutil.copy(folder / "model.onnx", tmp_path / "alone.onnx")
    with pytest.raises(ValueError, match="alone.onnx"): predict_table(tmp_path / "alone.onnx", synthetic_faces(7))
    with pytest.raises(ValueError, match="alone.onnx"): detect_faces(np.zeros((50, 50, 3), np.uint8), tmp_path / "alone.onnx")
    (folder / "card.json").write_bytes(payloads(canary)[kind])
    with pytest.raises(ValueError, match="card.json"): read_card(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_data_and_pictures(kind, canary, tmp_path):
    from _fuzz import faces_csv
    from fer_nbdev.clean import read_findings
    from fer_nbdev.data import read_fer2013
    from fer_nbdev.votes import read_ferplus
    from fer_nbdev.recipe import read_recipe
    data = payloads(canary)[kind]
    with pytest.raises(ValueError): read_image(data)
    for name, read in {"faces.csv": read_fer2013, "votes.csv": read_ferplus, "findings.csv": read_findings, "recipe.yaml": read_recipe,
                       "faces.csv.gz": read_fer2013, "faces.zip": read_fer2013}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=name): read(tmp_path / name)
    (tmp_path / "good.csv").write_bytes(faces_csv(2))
    (tmp_path / "good.csv.npy").write_bytes(data)  # where the cache would be
    assert len(read_fer2013(tmp_path / "good.csv")) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_run(kind, canary, tmp_path):
    "Resuming, loading and exporting a run of which one file is bad."
    from fer_nbdev.data import synthetic_faces
    from fer_nbdev.export import export_run
    from fer_nbdev.recipe import Recipe
    from fer_nbdev.train import load_run, train
    from safetensors import SafetensorError
    run = tmp_path / "run"
    run.mkdir()
    Recipe(arch="fast_resnet").write(run / "recipe.yaml")
    (run / "run.json").write_text(json.dumps(dict(data=dict(classes=list(EMOTIONS), sha256="", source="", rows={}), recipe={})))
    for name in ("best.safetensors", "last.safetensors"): (run / name).write_bytes(payloads(canary)[kind])
    with pytest.raises((ValueError, RuntimeError, SafetensorError)): load_run(run)
    with pytest.raises((ValueError, RuntimeError, SafetensorError)): export_run(run, tmp_path / "out")
    with pytest.raises(ValueError): train(None, synthetic_faces(70), run, resume=True, progress=False)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ yaml, json, html

YAML = ("!!python/object/apply:os.system ['touch {canary}']", "!!python/object/new:os.system ['touch {canary}']",
        "!!python/name:os.system", "!!python/module:os", "!!python/tuple [1, 2]",
        "!!python/object/apply:subprocess.check_output [[touch, {canary}]]", "!!map {{__reduce__: [os.system]}}",
        "!<tag:yaml.org,2002:python/object/apply:os.system> ['touch {canary}']")


@pytest.mark.parametrize("text", YAML)
@pytest.mark.parametrize("where", ["{}", "name: {}", "arch_args: {{x: {}}}", "- {}"])
def test_yaml_tags(text, where, canary, tmp_path):
    from fer_nbdev.recipe import Recipe, read_recipe
    evil = where.format(text.format(canary=canary))
    (tmp_path / "recipe.yaml").write_text(evil)
    try: read_recipe(tmp_path / "recipe.yaml")
    except ValueError as e: assert "recipe.yaml" in str(e)
    else: assert "!!map" in text, "it was read"  # a plain mapping, which runs nothing
    if "!!map" not in text:
        with pytest.raises(ValueError): Recipe().set([f"arch_args.x={text.format(canary=canary)}"])


def test_a_recipe_may_not_load_weights_through_the_back_door(canary, tmp_path):
    "timm takes paths and addresses of weights among its arguments; older versions unpickle them."
    pytest.importorskip("timm")
    from fer_nbdev.models import create_model
    evil = tmp_path / "evil.pth"
    evil.write_bytes(payloads(canary)["torch zip"])
    for arguments in (dict(checkpoint_path=str(evil)), dict(pretrained_cfg=dict(file=str(evil))), dict(pretrained_cfg_overlay=dict(file=str(evil)))):
        with pytest.raises(ValueError, match="would load weights"): create_model("timm/resnet10t", img_size=64, **arguments)
    for arch in ("timm/hf-hub:stranger/model", "timm/local-dir:/tmp", "timm/hf_hub:stranger/model", "torchvision/../evil"):
        with pytest.raises(ValueError): create_model(arch, pretrained=True)


def test_names_in_findings_and_models_are_text(canary, tmp_path):
    "Labels end up on a web page, in messages, in formulas of spreadsheets: as text."
    from fer_nbdev.clean import _COLUMNS, read_findings
    evil = {"suggested": "<script>alert(1)</script>", "action": "{0.__class__}", "kind": "{path.__init__.__globals__}", "score": "__import__('os').system('x')"}
    for column, text in evil.items():
        row = dict(dict.fromkeys(_COLUMNS, ""), row="3", usage="Training", kind="copy", score="1", votes="1", action="keep") | {column: text}
        (tmp_path / "findings.csv").write_text(",".join(_COLUMNS) + "\n" + ",".join(row[c] for c in _COLUMNS) + "\n")
        if column == "suggested": assert read_findings(tmp_path / "findings.csv").suggested[0] == text
        else:
            with pytest.raises(ValueError, match="findings.csv, line 2"): read_findings(tmp_path / "findings.csv")


# ------------------------------------------------------------------------------------------------ model folders

def test_every_bit_of_a_model_counts(tmp_path):
    graph = small_graph(EMOTIONS)
    folder = model_folder(tmp_path / "model", graph, EMOTIONS)
    assert FaceClassifier(folder).predict_faces(FACES).shape == (2, 7)
    for at in (0, 100, len(graph) // 2, len(graph) - 1):
        changed = bytearray(graph)
        changed[at] ^= 1
        (folder / "model.onnx").write_bytes(changed)
        with pytest.raises(ValueError, match="sha256"): FaceClassifier(folder)
    (folder / "model.onnx").write_bytes(graph)
    with pytest.raises(ValueError, match="sha256"): read_card(model_folder(tmp_path / "other", graph, EMOTIONS, files={"model.onnx": {"sha256": "0" * 64}}))


def test_a_model_that_is_exchanged_after_the_check_is_not_opened(tmp_path):
    "Between the reading of the card and the first prediction."
    folder = model_folder(tmp_path / "model", small_graph(EMOTIONS), EMOTIONS)
    model = FaceClassifier(folder)
    (folder / "model.onnx").write_bytes(small_graph(EMOTIONS, weights=np.ones((2304, 7), np.float32)))
    with pytest.raises(ValueError, match="sha256"): model.predict_faces(FACES)


def external(location):
    "The graph, whose weights are said to lie in a file."
    def change(model):
        from onnx import TensorProto
        w = model.graph.initializer[0]
        w.ClearField("raw_data")
        w.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", "0"), ("length", str(2304 * 7 * 4))):
            entry = w.external_data.add()
            entry.key, entry.value = key, value
    return small_graph(EMOTIONS, change)


@pytest.mark.parametrize("place", ["../secret.bin", "{root}/secret.bin", "beside.bin", "link.bin", "/dev/zero", "../model/../secret.bin"])
def test_a_graph_reads_no_other_file(place, tmp_path, monkeypatch):
    "Wherever the process runs: in the folder, beside it, elsewhere."
    (tmp_path / "secret.bin").write_bytes(bytes(2304 * 7 * 4))
    folder = model_folder(tmp_path / "model", external(place.format(root=tmp_path)), EMOTIONS)
    shutil.copy(tmp_path / "secret.bin", folder / "beside.bin")
    if os.name == "posix": os.symlink(tmp_path / "secret.bin", folder / "link.bin")
    for here in (folder, tmp_path, Path(__file__).parent):
        monkeypatch.chdir(here)
        with pytest.raises(ValueError, match="cannot open"): FaceClassifier(folder).predict_faces(FACES)


@pytest.mark.parametrize("key", [b"\n\x08location", b"\n\x88\x00location", b"\n\x88\x80\x80\x00location",
                                 b"\x8a\x00\x08location", b"\x8a\x80\x00\x88\x00location"])
def test_the_name_of_another_file_is_found_however_it_is_written(key):
    "Protobuf reads numbers that are written longer than they need to be."
    from onnx import StringStringEntryProto
    from fer_nbdev.core import check_self_contained
    assert StringStringEntryProto.FromString(key).key == "location"
    with pytest.raises(ValueError, match="another file"): check_self_contained(b"before" + key + b"after", "model.onnx")


def test_a_layer_may_be_called_location(tmp_path):
    def rename(model):
        model.graph.name = model.graph.node[2].name = "location"
        model.doc_string = "a location"
    assert FaceClassifier(model_folder(tmp_path / "model", small_graph(EMOTIONS, rename), EMOTIONS)).predict_faces(FACES).shape[1] == 7


def test_a_graph_with_operators_of_its_own_is_refused(tmp_path):
    def custom(model):
        model.graph.node[2].domain = "evil.ops"
        model.opset_import.add(domain="evil.ops", version=1)
    folder = model_folder(tmp_path / "model", small_graph(EMOTIONS, custom), EMOTIONS)
    with pytest.raises(ValueError, match="cannot open"): FaceClassifier(folder).predict_faces(FACES)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "sub/../../secret", "..", "", "."])
def test_a_card_names_files_of_its_folder_only(name, tmp_path):
    (tmp_path / "secret").write_bytes(b"x")
    graph = small_graph(EMOTIONS)
    files = {"model.onnx": dict(sha256=hashlib.sha256(graph).hexdigest()), name: dict(sha256=hashlib.sha256(b"x").hexdigest())}
    with pytest.raises((ValueError, FileNotFoundError)) as e: read_card(model_folder(tmp_path / "model", graph, EMOTIONS, files=files))
    assert "model" in str(e.value) and "x" * 64 not in str(e.value)


def test_a_card_that_is_odd_is_refused_by_name(tmp_path):
    folder = model_folder(tmp_path / "model", small_graph(EMOTIONS), EMOTIONS)
    good = json.loads((folder / "card.json").read_text())
    for odd in (dict(classes=["a"]), dict(classes="angry"), dict(classes=[1, 2]), dict(classes=["a", "a"]),
                dict(img_size="48"), dict(img_size=-1), dict(img_size=True), dict(img_size=1e9),
                dict(files=[]), dict(files={}), dict(files={"model.onnx": "x"}), dict(files={"model.onnx": {"sha256": 5}}),
                dict(format="1"), dict(format=[1])):
        (folder / "card.json").write_text(json.dumps(good | odd))
        with pytest.raises(ValueError, match="card.json|model.onnx"): read_card(folder)
    for text in ("[" * 100_000, "null", "\xff", '{"format": 1', "NaN"):
        (folder / "card.json").write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match="card.json"): read_card(folder)


# ------------------------------------------------------------------------------------------------ downloads

def test_downloads_are_kept_only_with_the_right_sum(canary, tmp_path, monkeypatch):
    "Of weights for transfer, whose name holds the start of their sum, and of YuNet. From a file, as from an address."
    from fer_nbdev.detect import fetch_yunet
    from fer_nbdev.models import _fetch
    good, evil = io.BytesIO(), payloads(canary)["torch zip"]
    torch.save({"w": torch.zeros(3)}, good)
    name = f"net-{hashlib.sha256(good.getvalue()).hexdigest()[:8]}.pth"
    (tmp_path / name).write_bytes(good.getvalue())
    assert _fetch((tmp_path / name).as_uri(), tmp_path / "kept")["w"].tolist() == [0, 0, 0]
    shutil.rmtree(tmp_path / "kept")
    (tmp_path / name).write_bytes(good.getvalue() + b"!")
    with pytest.raises(ValueError, match="not what it should be"): _fetch((tmp_path / name).as_uri(), tmp_path / "kept")
    assert not list((tmp_path / "kept").glob("*"))
    named = f"net-{hashlib.sha256(evil).hexdigest()[:8]}.pth"  # its sum is right, since the stranger made both
    (tmp_path / named).write_bytes(evil)
    with pytest.raises(ValueError, match="not what it should be"): _fetch((tmp_path / named).as_uri(), tmp_path / "kept")
    monkeypatch.setenv("FER_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="sha256"): fetch_yunet((tmp_path / named).as_uri())
    assert not list((tmp_path / "cache").glob("*"))


# ------------------------------------------------------------------------------------------------ the source

def test_prediction_opens_no_connection(tmp_path):
    "Python reports every connection and every question for an address to its audit hooks, before it happens."
    code = """
import sys
def refuse(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"): print(event, args, file=sys.stderr); raise SystemExit(9)
sys.addaudithook(refuse)
if sys.argv[1:] == ["call"]:
    import urllib.request; urllib.request.urlopen("http://127.0.0.1:9/")
from fer_nbdev.cli import main
main()
"""
    def run(*args): return subprocess.run([sys.executable, "-c", code, *args], cwd=tmp_path, capture_output=True, text=True)
    assert run("call").returncode == 9  # it would be seen
    for command in (["predict", "--json"], ["predict", "--model", "fast", "--tta", "--annotate", "out"], ["models"]):
        done = run(*command)
        assert done.returncode == 0 and not done.stderr, done.stderr


def test_nothing_in_the_package_unpickles():
    "`torch.load` without weights_only, pickle.load, yaml.load with another loader, eval and exec do not occur."
    import ast
    allowed = {("models.py", "torch.hub.load_state_dict_from_url"), ("recipe.py", "yaml.load")}  # both looked at above
    risky = {"pickle.load", "pickle.loads", "torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec",
             "joblib.load", "marshal.loads", "dill.load", "cloudpickle.load", "load_learner", "torch.jit.load",
             "torch.hub.load", "torch.hub.load_state_dict_from_url", "os.system"}
    options = {("allow_pickle", "True"), ("weights_only", "False"), ("shell", "True")}
    import fer_nbdev
    found = set()
    for path in Path(fer_nbdev.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in risky: found.add((path.name, ast.unparse(node.func)))
            if isinstance(node, ast.keyword) and (node.arg, ast.unparse(node.value)) in options: found.add((path.name, node.arg))
    assert found == allowed


def test_a_graph_for_one_face_at_a_time_is_refused(tmp_path):
    from fer_nbdev.data import synthetic_faces
    from fer_nbdev.evaluate import predict_table
    def one(model): model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    (tmp_path / "one.onnx").write_bytes(small_graph(EMOTIONS, one))
    with pytest.raises(ValueError, match="expected one input, uint8 faces .* with any n"):
        predict_table(tmp_path / "one.onnx", synthetic_faces(14))


@pytest.mark.parametrize("providers", ["", [], [None], [("cpu", 1)], 3, {"cpu"}])
def test_providers_that_are_none(providers):
    with pytest.raises(ValueError, match="provider"):
        FaceClassifier("fast", providers=providers)
