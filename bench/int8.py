"""Is int8 faster, smaller, and as good? One network as three graphs: float32, float16 weights, int8.

The networks: every bundled one (`--run` takes `accurate` from the run that it was exported from, so that its float32
is not read off rounded weights), and a small one with random weights, with and without squeeze-and-excitation. All
graphs of all networks take turns on one thread, each beginning a round in its turn: ms a face in batches of 1 and 64,
and the time to open a session.

Besides, for the networks that are trained: how far each graph strays from float32 on PublicTest, how calibrating in
other ways compares, and, from onnxruntime's profile, which operators run and for how long. Last, convolutions alone,
in chains of ten less chains of two: what a layer costs in float32 and in int8.

int8 is calibrated on 512 Training faces.
"""
import argparse
import collections
import json
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

import _report
from _report import measure, report

SMALL = {"stem": 16, "widths": (16, 32, 64), "blocks": (2, 2, 2)}
WAYS = {"minmax": {}, "minmax, 8-bit weights": {"reduce_range": False}, "percentile": {"method": "percentile"}}
LAYERS = [(kind, c, side) for kind in ("3x3", "1x1", "depthwise") for c, side in ((32, 24), (64, 12), (128, 6))]
EXAMPLES = """examples:
  python bench/int8.py --data fer2013.csv --run runs/fer2013    the measurement, about ten minutes
  python bench/int8.py --limit 64 --rounds 2 --out /tmp         a quick try on drawn faces"""


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="FER2013 csv; without it faces are drawn, and no accuracy is given")
    parser.add_argument("--run", type=Path, help="folder of the run that `accurate` was exported from")
    parser.add_argument("--limit", type=int, help="use at most so many faces for calibration and for PublicTest")
    parser.add_argument("--rounds", type=int, default=40, help="rounds in which all graphs take turns (default: 40)")
    parser.add_argument("--out", type=Path, default=_report.RESULTS, help="folder for int8.json (default: bench/results)")
    return parser.parse_args()


def in_float32(graph):
    "A graph of `halve_weights` with float32 weights again, as rounded as they are."
    proto = onnx.load_from_string(graph)
    halves = {w.name: w for w in proto.graph.initializer if w.name.endswith("_half")}
    for node in [n for n in proto.graph.node if n.op_type == "Cast" and n.input[0] in halves]:
        w = halves[node.input[0]]
        w.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(w).astype(np.float32), node.output[0]))
        proto.graph.node.remove(node)
    return proto.SerializeToString()


def without_se(model):
    "The network with its squeeze-and-excitation blocks taken out."
    import torch
    for module in model.modules():
        if hasattr(module, "se"):
            module.se = torch.nn.Identity()
    return model


def float_graphs(run):
    "name -> (float32 graph, mean and standard deviation known to it, is it trained)."
    import torch
    from fer_nbdev.cards import weights_folder
    from fer_nbdev.export import ExportedModel, create_onnx
    from fer_nbdev.models import create_model
    from fer_nbdev.recipe import read_recipe
    from fer_nbdev.train import load_run
    found = {}
    for folder in sorted(p.parent for p in weights_folder().glob("*/card.json")):
        if run and folder.name == "accurate":
            found[folder.name] = create_onnx(ExportedModel(load_run(run), stats=read_recipe(run / "recipe.yaml").stats)), True
        else:
            found[folder.name] = in_float32((folder / "model.onnx").read_bytes()), True
    torch.manual_seed(0)
    found["small"] = create_onnx(create_model("se_resnet", **SMALL)), False
    found["small, no SE"] = create_onnx(without_se(create_model("se_resnet", **SMALL))), False
    return found


def session(graph, profile=None):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def in_turns(calls, rounds, n=1):
    "Seconds of every call, `{key: [n a round]}`; each key begins a round in its turn. A first call of each does not count."
    keys, seconds = list(calls), {k: [] for k in calls}
    for call in calls.values():
        call()
    for i in range(rounds):
        for k in keys[i % len(keys):] + keys[:i % len(keys)]:
            seconds[k] += measure(calls[k], n)
    return seconds


def ms(seconds, n=1):
    "Least and median milliseconds, of one face of `n`."
    return {"min": round(min(seconds) / n * 1e3, 4), "median": round(statistics.median(seconds) / n * 1e3, 4)}


def speed(graphs, rounds):
    "{(name, kind): {ms_a_face, load_ms}} of all graphs, in turns."
    sessions, rng = {k: session(g) for k, g in graphs.items()}, np.random.default_rng(0)
    found = {k: {"ms_a_face": {}} for k in graphs}
    for batch, n in ((1, 20), (64, 1)):
        faces = rng.integers(0, 256, (batch, 48, 48), np.uint8)
        for k, seconds in in_turns({k: lambda s=s: s.run(None, {"faces": faces}) for k, s in sessions.items()}, rounds, n).items():
            found[k]["ms_a_face"][str(batch)] = ms(seconds, batch)
    for k, seconds in in_turns({k: lambda g=g: session(g) for k, g in graphs.items()}, max(3, rounds // 4)).items():
        found[k]["load_ms"] = ms(seconds)
    return found


def profile(graph, calls=50):
    "Which operators run on one face: {operator: {number, microseconds}}, longest first; medians over the calls, in sum more than an unprofiled call takes."
    with tempfile.TemporaryDirectory() as folder:
        s = session(graph, Path(folder) / "profile")
        for _ in range(calls):
            s.run(None, {"faces": np.zeros((1, 48, 48), np.uint8)})
        events = json.loads(Path(s.end_profiling()).read_text(encoding="utf-8"))
    nodes, total = collections.defaultdict(list), collections.defaultdict(lambda: {"number": 0, "microseconds": 0.})
    for e in events:
        if e.get("cat") == "Node" and e["name"].endswith("_kernel_time"):
            nodes[e["name"], e["args"]["op_name"]].append(e["dur"])
    for (_, operator), microseconds in nodes.items():
        total[operator]["number"] += 1
        total[operator]["microseconds"] += statistics.median(microseconds)
    return dict(sorted(total.items(), key=lambda item: -item[1]["microseconds"]))


def chain(kind, channels, side, n):
    "A graph of `n` convolutions with ReLU on uint8 [b, channels, side, side]."
    rng, k, group = np.random.default_rng(0), 1 if kind == "1x1" else 3, channels if kind == "depthwise" else 1
    nodes, weights, name = [helper.make_node("Cast", ["faces"], ["x0"], to=TensorProto.FLOAT)], [], "x0"
    for i in range(n):
        w = rng.normal(size=(channels, channels // group, k, k)) / (channels // group * k * k)**.5
        weights += [numpy_helper.from_array(w.astype(np.float32), f"w{i}"), numpy_helper.from_array(np.zeros(channels, np.float32), f"b{i}")]
        nodes += [helper.make_node("Conv", [name, f"w{i}", f"b{i}"], [f"c{i}"], f"conv{i}", kernel_shape=[k, k], pads=[k // 2] * 4, group=group),
                  helper.make_node("Relu", [f"c{i}"], [f"x{i + 1}"], f"relu{i}")]
        name = f"x{i + 1}"
    nodes.append(helper.make_node("GlobalAveragePool", [name], ["probs"], "pool"))
    ends = [helper.make_tensor_value_info("faces", TensorProto.UINT8, ["n", channels, side, side]),
            helper.make_tensor_value_info("probs", TensorProto.FLOAT, ["n", channels, 1, 1])]
    return helper.make_model(helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights), opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def in_int8(proto, faces):
    "The chain as `quantize_graph` would quantise it; that one takes faces."
    from onnxruntime.quantization import QuantType, quantize_static

    class Once:
        batches = iter([{"faces": faces}])

        def get_next(self):
            return next(self.batches, None)
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder) / "a.onnx", Path(folder) / "b.onnx"
        onnx.save(proto, before)
        quantize_static(before, after, Once(), per_channel=True, reduce_range=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)
        return after.read_bytes()


def layers(rounds):
    "Microseconds of one convolution with ReLU on one face: a chain of ten less a chain of two."
    found = []
    for kind, channels, side in LAYERS:
        faces = np.random.default_rng(0).integers(0, 4, (1, channels, side, side)).astype(np.uint8)
        graphs = {}
        for n in (2, 10):
            proto = chain(kind, channels, side, n)
            graphs |= {("float32", n): proto.SerializeToString(), ("int8", n): in_int8(proto, faces)}
        sessions = {k: session(g) for k, g in graphs.items()}
        seconds = in_turns({k: lambda s=s: s.run(None, {"faces": faces}) for k, s in sessions.items()}, rounds, 10)
        us = {kind: round((min(seconds[kind, 10]) - min(seconds[kind, 2])) / 8 * 1e6, 2) for kind in ("float32", "int8")}
        found.append({"convolution": kind, "channels": channels, "side": side, **us})
    return found


def main():
    args = parse_args()
    import logging
    logging.getLogger().setLevel(logging.ERROR)  # the quantiser recommends to preprocess what already is
    from fer_nbdev.data import read_fer2013, synthetic_faces
    from fer_nbdev.export import halve_weights, parity_report, quantize_graph
    _report.RESULTS = args.out
    table = read_fer2013(args.data) if args.data else synthetic_faces(700)
    training, public = table.split("Training").pixels, table.split("PublicTest")
    training = training[np.sort(np.random.default_rng(0).permutation(len(training))[:min(512, args.limit or 512)])]
    public = public[:args.limit]
    emotion = public.emotion if args.data else None

    graphs, trained = {}, []
    for name, (graph, is_trained) in float_graphs(args.run).items():
        graphs |= {(name, "float32"): graph, (name, "float16"): halve_weights(graph), (name, "int8"): quantize_graph(graph, training)}
        trained += [name] * is_trained
    found = speed(graphs, args.rounds)

    def answers(graph):
        s = session(graph)
        return np.concatenate([s.run(None, {"faces": public.pixels[i:i + 64]})[0] for i in range(0, len(public), 64)])
    models, operators = collections.defaultdict(dict), collections.defaultdict(dict)
    reference = {name: answers(graphs[name, "float32"]) for name in trained}
    for (name, kind), graph in graphs.items():
        parity = parity_report(answers(graph), reference[name], emotion) if name in trained else {}
        models[name][kind] = {"bytes": len(graph), **found[name, kind], **parity}
        if kind != "float16":
            operators[name][kind] = profile(graph)
    calibration = {way: parity_report(answers(quantize_graph(graphs["accurate", "float32"], training, **how)), reference["accurate"], emotion)
                   for way, how in WAYS.items()}

    a, b = models["accurate"]["float32"], models["accurate"]["int8"]
    faster = {n: a["ms_a_face"][n]["min"] / b["ms_a_face"][n]["min"] for n in ("1", "64")}
    answer = (f"`accurate` in int8 takes {b['ms_a_face']['1']['min']:.2f} ms a face on one thread, {faster['1']:.1f} times as fast as float32 "
              f"({faster['64']:.1f} times in batches of 64), and {b['bytes'] / 1e6:.1f} MB instead of {a['bytes'] / 1e6:.1f}"
              + (f"; PublicTest accuracy {b['accuracy']:.1%} against {a['accuracy']:.1%}, {b['equal_answers']:.1%} of the answers are the same"
                 if args.data else ""))
    report("int8", {"models": models, "calibration": calibration, "operators": operators, "layers_microseconds": layers(args.rounds),
                    "times_float32": {name: {n: round(kinds["float32"]["ms_a_face"][n]["min"] / kinds["int8"]["ms_a_face"][n]["min"], 2) for n in ("1", "64")}
                                      for name, kinds in models.items()}},
           question="Is int8 faster, smaller, and as good?", answer=answer,
           data={"source": Path(table.source).name if args.data else "drawn faces", "calibration_faces": len(training), "public_faces": len(public)},
           accurate_from="its run" if args.run else "the bundled graph, whose weights are rounded to float16", threads=1, rounds=args.rounds,
           command="python bench/int8.py" + (f" --data {args.data.name}" if args.data else "")
                   + (" --run RUN" if args.run else "") + (f" --limit {args.limit}" if args.limit else ""))


if __name__ == "__main__":
    sys.exit(main())
