"""Small ONNX graphs, and model folders around them."""
import hashlib
import json

import numpy as np


def small_graph(classes, change=None, weights=None):
    "The bytes of a network of one matrix product; `change` may alter the onnx model first."
    from onnx import TensorProto, helper, numpy_helper
    k = len(classes)
    if weights is None: weights = np.random.default_rng(0).normal(0, 1 / 300, (48 * 48, k)).astype(np.float32)
    nodes = [helper.make_node("Cast", ["faces"], ["floats"], to=TensorProto.FLOAT), helper.make_node("Flatten", ["floats"], ["pixels"], axis=1),
             helper.make_node("MatMul", ["pixels", "weights"], ["logits"]), helper.make_node("Softmax", ["logits"], ["probs"], axis=1)]
    graph = helper.make_graph(nodes, "small", [helper.make_tensor_value_info("faces", TensorProto.UINT8, ["n", 48, 48])],
                              [helper.make_tensor_value_info("probs", TensorProto.FLOAT, ["n", k])], [numpy_helper.from_array(weights, "weights")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    if change: change(model)
    return model.SerializeToString()


def model_folder(folder, graph, classes, **about):
    "A folder with this graph and a card that vouches for it."
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(graph)
    files = {"model.onnx": dict(sha256=hashlib.sha256(graph).hexdigest(), bytes=len(graph))}
    card = dict(format=1, name=folder.name, classes=list(classes), img_size=48, files=files) | about
    (folder / "card.json").write_text(json.dumps(card), encoding="utf-8")
    return folder
