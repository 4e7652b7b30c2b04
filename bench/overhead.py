"""What does our Python add to the bare run of the session, for one face on one core? And do onnxruntime's settings matter?

For each bundled model, and for a network of one small matrix product that takes hardly any time itself, these take turns: the
bare `session.run`, `predict_faces` on an array and on a list with one crop, and `predict` on an image with its box, which cuts
out and names as well. The bare run is of the same session. Medians of many calls, then of the rounds; the process is tied to one core.

Then the settings: the same model opened with each, on as many cores as there are, against ours with one thread; a photo whose
faces are found by Haar, with threads of onnxruntime that spin and that do not; and long batches in slices of different lengths,
on one core. All answers must agree, or the run fails.
"""
import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import _report
from _report import on_cores, report

LIMIT = .15
SLICES = (1, 4, 8, 16, 32, 64, 256)
SPIN = {"session.intra_op.allow_spinning": "1"}
SETTINGS = {"1 thread (ours)": {}, "denormals as zero": {"config": {"session.set_denormal_as_zero": "1"}}, "no memory arena": {"enable_cpu_mem_arena": False},
            "no memory pattern": {"enable_mem_pattern": False}, "extended graph optimisation, not all": {"level": "ORT_ENABLE_EXTENDED"},
            "2 threads that spin": {"intra_op_num_threads": 2, "config": SPIN}, "2 threads (ours)": {"intra_op_num_threads": 2}}
EXAMPLES = """examples:
  python bench/overhead.py                        the measurement, about two minutes
  python bench/overhead.py --quick --out /tmp     a quick try"""


def tiny_model(folder):
    "A model folder whose network is one matrix product: what is left of its time is onnxruntime's own."
    import numpy as np
    from fer_nbdev.cards import write_model
    from fer_nbdev.core import EMOTIONS
    from onnx import TensorProto, helper, numpy_helper
    weights = np.random.default_rng(0).normal(0, 1 / 3000, (48 * 48, 7)).astype(np.float32)
    nodes = [helper.make_node("Cast", ["faces"], ["floats"], to=TensorProto.FLOAT), helper.make_node("Flatten", ["floats"], ["pixels"], axis=1),
             helper.make_node("MatMul", ["pixels", "weights"], ["logits"]), helper.make_node("Softmax", ["logits"], ["probs"], axis=1)]
    graph = helper.make_graph(nodes, "tiny", [helper.make_tensor_value_info("faces", TensorProto.UINT8, ["n", 48, 48])],
                              [helper.make_tensor_value_info("probs", TensorProto.FLOAT, ["n", 7])], [numpy_helper.from_array(weights, "weights")])
    data = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    write_model(folder, data, dict(format=1, name="tiny", classes=list(EMOTIONS), img_size=48))
    return folder


def medians(calls, seconds, rounds):
    "Name -> median seconds of a call, all in turns; each is called for about `seconds` in every round."
    n = {name: max(3, int(seconds / min(_report.measure(f, 5)))) for name, f in calls.items()}
    every = {name: [] for name in calls}
    for _ in range(rounds):
        for name, f in calls.items():
            every[name].append(statistics.median(_report.measure(f, n[name])))
    return {name: statistics.median(s) for name, s in every.items()}


def overhead(model, seconds, rounds):
    "Microseconds at batch 1, and what each adds to the bare run."
    import numpy as np
    from fer_nbdev import Predictor
    predictor, rng = Predictor(model, threads=1), np.random.default_rng(0)
    size = predictor.img_size
    faces, boxes = rng.integers(0, 256, (1, size, size), dtype=np.uint8), [(0, 0, size, size)]
    image = np.repeat(faces[0][..., None], 3, 2)
    expected = predictor.predict_faces(faces)
    session = predictor._models[0].session
    calls = {"session.run": lambda: session.run(["probs"], {"faces": faces})[0], "predict_faces(array)": lambda: predictor.predict_faces(faces),
             "predict_faces([crop])": lambda: predictor.predict_faces([faces[0]]), "predict(image, boxes)": lambda: predictor.predict(image, boxes)}
    for name, f in calls.items():
        answer = f()
        if not np.array_equal(expected, answer if isinstance(answer, np.ndarray) else [list(answer[0].probs.values())]):
            raise RuntimeError(f"{name} of {model} says something else")
    took = medians(calls, seconds, rounds)
    bare = took["session.run"]
    return {"microseconds": {k: round(1e6 * v, 1) for k, v in took.items()},
            "added_microseconds": {k: round(1e6 * (v - bare), 1) for k, v in took.items() if v is not bare},
            "added_share": {k: round(v / bare - 1, 3) for k, v in took.items() if v is not bare}}


def open_session(path, level="ORT_ENABLE_ALL", config=None, **fields):
    "onnxruntime with the settings of ours, but for those named."
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    for field, value in {"intra_op_num_threads": 1, "inter_op_num_threads": 1, "log_severity_level": 3, **fields}.items():
        setattr(options, field, value)
    for key, value in {"session.intra_op.allow_spinning": "0", **(config or {})}.items():
        options.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def settings(path, size, seconds, rounds):
    "Times as long as ours, for each setting, at batch 1 and 32."
    import numpy as np
    sessions, result = {name: open_session(path, **options) for name, options in SETTINGS.items()}, {}
    for n in (1, 32):
        faces = np.random.default_rng(0).integers(0, 256, (n, size, size), dtype=np.uint8)
        calls = {name: lambda s=s: s.run(["probs"], {"faces": faces})[0] for name, s in sessions.items()}
        answers = [f() for f in calls.values()]
        if max(abs(a - answers[0]).max() for a in answers) > 1e-5:
            raise RuntimeError("the settings change the answers")
        took = medians(calls, seconds, rounds)
        result[f"batch {n}"] = {name: round(v / next(iter(took.values())), 3) for name, v in took.items()}
    return result


def spinning(model, path, repeat):
    "Wall and processor milliseconds of a photo, found and answered, when onnxruntime's threads spin and when they do not; medians, in turns."
    from fer_nbdev import Predictor
    from fer_nbdev.core import read_image, sample_portrait
    photo, ways, every = read_image(sample_portrait()), {}, {}
    for name, config in (("threads that do not spin (ours)", {}), ("threads that spin", SPIN)):
        ways[name] = Predictor(model, detector="haar", threads=2)
        ways[name]._models[0].session = open_session(path, intra_op_num_threads=2, config=config)
        ways[name].predict(photo)
    for _ in range(repeat):
        for name, predictor in ways.items():
            begin, begin_cpu = time.perf_counter(), time.process_time()
            for _ in range(4):
                predictor.predict(photo)
            every.setdefault(name, []).append(((time.perf_counter() - begin) / 4, (time.process_time() - begin_cpu) / 4))
    return {name: {part: round(1000 * statistics.median(t), 1) for part, t in zip(("wall", "cpu"), zip(*times))} for name, times in every.items()}


def slices(path, size, rounds):
    "Faces a second on one thread when 256 faces go through in slices."
    import numpy as np
    session, faces = open_session(path), np.random.default_rng(0).integers(0, 256, (256, size, size), dtype=np.uint8)
    calls = {str(n): lambda n=n: [session.run(["probs"], {"faces": faces[i:i + n]}) for i in range(0, 256, n)] for n in SLICES}
    every = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, f in calls.items():
            every[name] += _report.measure(f, 1)
    return {name: round(256 / statistics.median(s[1:])) for name, s in every.items()}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few calls: shows that it works, not how fast it is")
    parser.add_argument("--out", type=Path, default=_report.RESULTS, metavar="FOLDER", help="where overhead.json is written (default: bench/results)")
    return parser.parse_args()


def main():
    args = parse_args()
    _report.RESULTS = args.out
    from fer_nbdev.cards import bundled_models, weights_folder
    cards, weights = bundled_models(), weights_folder()
    seconds, rounds = (.02, 3) if args.quick else (.5, 9)
    with on_cores(1), tempfile.TemporaryDirectory() as tmp:
        models = {"one small matrix": tiny_model(Path(tmp) / "tiny"), **{n: n for n in cards}}
        added = {name: overhead(model, seconds, rounds) for name, model in models.items()}
        long = {name: slices(weights / name / "model.onnx", card["img_size"], 2 if args.quick else 5) for name, card in cards.items()}
    options = {name: settings(weights / name / "model.onnx", card["img_size"], seconds, rounds) for name, card in cards.items()}
    photo = {name: spinning(name, weights / name / "model.onnx", 3 if args.quick else 15) for name in cards}
    share = {name: added[name]["added_share"]["predict_faces(array)"] for name in cards}

    def told(name):
        row, more = added[name], f"{share[name]:.1%}" if share[name] > .001 else "nothing measurable"
        return (f"{more} to the {row['microseconds']['session.run'] / 1000:.2f} ms of `{name}` (`predict` with its box, "
                f"which cuts it out and names the classes, {row['added_share']['predict(image, boxes)']:.1%})")

    report("overhead",
           {"batch_1": added, "faces_per_second_by_slice": long, "times_as_long_by_setting": options, "photo_ms": photo,
            "within_limits": all(s <= LIMIT for s in share.values())},
           question="What does our Python add to the bare run of the network?",
           answer="For one face on one core `predict_faces` adds " + " and ".join(map(told, cards)),
           limits={"added_share": LIMIT}, command="python bench/overhead.py" + (" --quick" if args.quick else ""))
    return all(s <= LIMIT for s in share.values())


if __name__ == "__main__":
    sys.exit(not main())
