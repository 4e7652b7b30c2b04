"""A real server on loopback in a thread of the test, so that a test can speak raw TCP to it and look inside."""
import hashlib
import json
import socket
import threading
import time
from contextlib import contextmanager


@contextmanager
def serving(app, **config):
    "Serve `app` on a free port; yields its port, and waits until everything has ended."
    import uvicorn
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    config = {"log_level": "error", "ws_max_size": app.state.service.limits.frame_bytes + 1000, "timeout_graceful_shutdown": 5, **config}
    server = uvicorn.Server(uvicorn.Config(app, **config))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    until = time.monotonic() + 60
    while not (server.started and app.state.service.ready):
        assert thread.is_alive() and time.monotonic() < until, "the server did not start"
        time.sleep(.02)
    try:
        yield sock.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(30)
        sock.close()
        assert not thread.is_alive(), "the server did not stop"


def eventually(condition, seconds=20):
    "Wait until a condition holds."
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, "it did not come true"
        time.sleep(.02)
    return found


def tiny_model(folder, classes, size):
    "A model folder whose network is one random matrix."
    import numpy as np
    from onnx import TensorProto as T
    from onnx import helper as h
    from onnx import numpy_helper
    weights = np.random.default_rng(0).normal(0, 1 / 3000, (size * size, len(classes))).astype(np.float32)
    nodes = [h.make_node("Cast", ["faces"], ["floats"], to=T.FLOAT), h.make_node("Flatten", ["floats"], ["pixels"], axis=1),
             h.make_node("MatMul", ["pixels", "weights"], ["logits"]), h.make_node("Softmax", ["logits"], ["probs"], axis=1)]
    graph = h.make_graph(nodes, "tiny", [h.make_tensor_value_info("faces", T.UINT8, ["n", size, size])],
                         [h.make_tensor_value_info("probs", T.FLOAT, ["n", len(classes)])], [numpy_helper.from_array(weights, "weights")])
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=8).SerializeToString()
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(model)
    (folder / "card.json").write_text(json.dumps(dict(format=1, name=folder.name, arch="tiny", classes=list(classes), img_size=size, licence="Apache-2.0",
                                                      files={"model.onnx": {"sha256": hashlib.sha256(model).hexdigest()}})))
    return folder
