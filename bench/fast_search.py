"""Which network of at most 0.3 M parameters answers fastest on one core, and which of the fast ones learns best?

A candidate is a line of layers, `unshuffle32 down64 res64 wide256` and so on, each a kind and a width:

  crop         the middle of the face, of this side in pixels
  unshuffle    2x2 pixels to 4 channels and a 3x3 convolution; like the next two, leaves half the resolution
  convKs2_     KxK convolution of stride 2
  full         3x3 convolution at full resolution and a pool
  down         3x3 convolution of stride 2
  conv         3x3 convolution, with a skip
  res, seres   two 3x3 convolutions with a skip; with squeeze-and-excitation before the sum
  sep, fused   two depthwise-separable convolutions with a skip; a 3x3 to twice the width, a 1x1 back, with a skip
  wide         1x1 convolution

`arch:NAME` is a network of the registry instead. Each is exported by `create_onnx`, quantised by `quantize_graph` (on drawn
faces and with random weights, which say nothing of accuracy but cost the same), and run both ways by onnxruntime in one
thread. All graphs take turns in every round and the minimum counts: wall time at batch 1, processor time at batch 64, since
on a busy machine no run of that length is left alone.

`--train` gives candidates a short training first, by the `fer2013` recipe with fewer epochs and a shorter average of
weights. They are compared on PublicTest; the PrivateTest rows are taken out of the table before. Runs live in `--runs`,
and can be stopped and resumed. Without it, what the runs wrote is collected.
"""
import argparse
import json
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import _report
import onnxruntime
import torch
from _report import report
from fer_nbdev.data import read_fer2013, synthetic_faces
from fer_nbdev.export import create_onnx, quantize_graph
from fer_nbdev.models import SEBlock, count_parameters, create_model, register_model
from torch import nn

LIMITS = {"parameters": 300_000, "batch 1": .25, "batch 64": 1 / 4.4}  # the last two in ms a face
BODY = "res32 down64 res64 res64 down64 res64"
CANDIDATES = (
    "unshuffle32 down64 res64 res64 res64",
    "unshuffle32 down64 conv64 conv64 conv64 conv64 conv64 conv64 conv64",
    "unshuffle32 down64 res64 res64 down128 wide256",
    "unshuffle32 down64 res64 res64 down64 res64",
    "unshuffle32 down64 res64 res64 down64 res64 wide256",
    "unshuffle32 conv32 down64 res64 res64 down64 res64 wide128",
    f"unshuffle32 {BODY}",
    "unshuffle32 res32 down64 seres64 seres64 down64 res64",
    "unshuffle32 res32 down64 res64 res64 res64 wide256",
    "unshuffle24 res24 down48 res48 res48 down80 res80",
    f"crop40 unshuffle32 {BODY}",
    f"conv3s2_32 {BODY}",
    f"conv5s2_32 {BODY}",
    f"conv6s2_32 {BODY}",
    f"full32 {BODY}",
    "unshuffle32 sep64 down64 sep96 sep96 down64 sep128 sep128 sep128",
    "unshuffle32 down48 fused48 fused48 down64 fused64",
    "arch:se_resnet stem=16 widths=20,40,80",
    "arch:fast_resnet",
)
EXAMPLES = """examples:
  python bench/fast_search.py                                               time all candidates, a few minutes
  python bench/fast_search.py --data fer2013.csv --runs runs/fast --train 6     train candidate 6 first, and collect
  python bench/fast_search.py --only 0 5 --rounds 1 --out /tmp              a quick try"""


def conv(n_in, n_out, kernel=3, stride=1, groups=1, relu=True):
    layers = [nn.Conv2d(n_in, n_out, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False), nn.BatchNorm2d(n_out)]
    return nn.Sequential(*layers, *[nn.ReLU(inplace=True)] * relu)


class Skip(nn.Module):
    "A body added to its input, then ReLU; nothing is added where the widths differ."

    def __init__(self, *body, skip=True):
        super().__init__()
        self.body, self.skip, self.act = nn.Sequential(*body), skip, nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(x + self.body(x) if self.skip else self.body(x))


class Crop(nn.Module):
    "The middle of a face."

    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, x):
        start = (x.shape[-1] - self.size) // 2
        return x[..., start:start + self.size, start:start + self.size]


LAYERS = {
    "crop": lambda n, w: Crop(w),
    "unshuffle": lambda n, w: nn.Sequential(nn.PixelUnshuffle(2), conv(4 * n, w)),
    "conv3s2_": lambda n, w: conv(n, w, 3, 2),
    "conv5s2_": lambda n, w: conv(n, w, 5, 2),
    "conv6s2_": lambda n, w: conv(n, w, 6, 2),
    "full": lambda n, w: nn.Sequential(conv(n, w), nn.MaxPool2d(2)),
    "down": lambda n, w: conv(n, w, 3, 2),
    "conv": lambda n, w: Skip(conv(n, w, relu=False), skip=n == w),
    "res": lambda n, w: Skip(conv(n, w), conv(w, w, relu=False), skip=n == w),
    "seres": lambda n, w: Skip(conv(n, w), conv(w, w, relu=False), SEBlock(w), skip=n == w),
    "sep": lambda n, w: Skip(conv(n, n, groups=n, relu=False), conv(n, w, 1), conv(w, w, groups=w, relu=False), conv(w, w, 1, relu=False), skip=n == w),
    "fused": lambda n, w: Skip(conv(n, 2 * w), conv(2 * w, w, 1, relu=False), skip=n == w),
    "wide": lambda n, w: conv(n, w, 1),
}


@register_model("candidate")
class Candidate(nn.Module):
    "A line of layers, average pool, classifier."

    def __init__(self, n_classes=7, n_in=1, layers=f"unshuffle32 {BODY}", dropout=.1):
        super().__init__()
        body, n = [], n_in
        for layer in layers.split():
            kind, width = re.fullmatch(r"(.*?\D)(\d+)", layer).groups()
            body.append(LAYERS[kind](n, int(width)))
            n = n if kind == "crop" else int(width)
        self.body = nn.Sequential(*body)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(n, n_classes))
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        return self.head(self.body(x))


def build(line):
    "The network of a candidate, with the running means of a few random batches: unset ones would be folded to nothing."
    torch.manual_seed(0)
    if line.startswith("arch:"):
        arch, *settings = line[5:].split()
        numbers = {k: [int(n) for n in v.split(",")] for k, v in (s.split("=") for s in settings)}
        model = create_model(arch, **{k: v if len(v) > 1 else v[0] for k, v in numbers.items()})
    else:
        model = Candidate(layers=line)
    with torch.no_grad():
        model.train()(torch.randn(32, 1, 48, 48))
    return model.eval()


def count_macs(model):
    "Multiplications of the convolutions and linear layers for one face."
    total = []

    def count(m, _, out):
        total.append(m.weight[0].numel() * out[0].numel() if isinstance(m, nn.Conv2d) else m.weight.numel())
    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    with torch.no_grad():
        model(torch.zeros(1, 1, 48, 48))
    for h in hooks:
        h.remove()
    return sum(total)


def open_session(graph):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def shortest(f, clock, repeat):
    "The least of `repeat` calls, in milliseconds."
    least = float("inf")
    for _ in range(repeat):
        start = clock()
        f()
        least = min(least, clock() - start)
    return least * 1e3


def time_graphs(sessions, rounds):
    "{name: {batch: ms a face}} of sessions that take turns."
    faces = synthetic_faces(64).pixels
    clocks = {1: (time.perf_counter, 60), 64: (time.process_time, 3)}
    best = {name: dict.fromkeys(clocks, float("inf")) for name in sessions}
    for _ in range(rounds):
        for name, session in sessions.items():
            for n, (clock, repeat) in clocks.items():
                x = {"faces": faces[:n]}
                session.run(None, x)
                best[name][n] = min(best[name][n], shortest(lambda s=session, x=x: s.run(None, x), clock, repeat) / n)
    return best


def measure_all(lines, rounds):
    "One row a candidate: parameters, multiplications, ms a face."
    faces, rows, sessions = synthetic_faces(64).pixels, {}, {}
    for line in lines:
        model = build(line)
        graph = create_onnx(model)
        rows[line] = {"layers": line, "parameters": count_parameters(model), "mmacs": round(count_macs(model) / 1e6, 2)}
        sessions[line, "fp32"], sessions[line, "int8"] = open_session(graph), open_session(quantize_graph(graph, faces))
    best = time_graphs(sessions, rounds)
    for line, row in rows.items():
        for kind in ("fp32", "int8"):
            row[kind] = {f"batch {n}": round(ms, 4) for n, ms in best[line, kind].items()}
        fast = any(all(row[kind][b] <= LIMITS[b] for b in row[kind]) for kind in ("fp32", "int8"))
        row["within_limits"] = fast and row["parameters"] <= LIMITS["parameters"]
    return list(rows.values())


def run_name(line):
    return line.replace(" ", "-")


def train_candidate(line, table, folder, settings):
    "A short training, or the rest of it."
    from fer_nbdev.recipe import read_recipe
    from fer_nbdev.train import train
    recipe = read_recipe("fer2013").set(["name=candidate", "arch=candidate", f"arch_args={json.dumps({'layers': line})}", "ema=.99", *settings])
    train(recipe, table, folder / run_name(line), resume=True, progress=False)


def read_training(folder):
    "What a finished training wrote, or None. Short ones are compared after the last epoch: no epoch is picked."
    if not (folder / "run.json").exists() or not (about := json.loads((folder / "run.json").read_text(encoding="utf-8")))["finished"]:
        return None
    last = json.loads((folder / "history.json").read_text(encoding="utf-8"))[-1]
    return {"epochs": about["recipe"]["epochs"], "seed": about["recipe"]["seed"],
            **{k: round(last[k], 4) for k in ("accuracy", "f1_score", "train_loss", "valid_loss")}}


def answer(rows):
    "How many are fast enough, the network of the registry, and the best of those that were trained, in a sentence."
    fit = [r for r in rows if r["within_limits"]]
    text = f"{len(fit)} of {len(rows)} candidates keep to the limits"
    for ours in (r for r in rows if r["layers"] == "arch:fast_resnet"):
        text += (f"; `fast_resnet` has {ours['parameters']:,} parameters and takes {ours['int8']['batch 1']:.2f} ms a face in int8, "
                 f"{ours['fp32']['batch 1']:.2f} ms in fp32, and {1e3 / ours['int8']['batch 64']:,.0f} faces/s at batch 64 in int8")
    if trained := [r for r in fit if r["trained"]]:
        best = max(trained, key=lambda r: r["trained"]["accuracy"])
        text += (f"; of {len(trained)} that were trained for {best['trained']['epochs']} epochs `{best['layers']}` is the best on PublicTest, "
                 f"with {best['trained']['accuracy']:.1%}")
    return text


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="these candidates, counted from 0 (default: all)")
    parser.add_argument("--rounds", type=int, default=12, help="turns that each graph takes (default: %(default)s)")
    parser.add_argument("--runs", type=Path, metavar="FOLDER", help="where the trainings are")
    parser.add_argument("--data", type=Path, metavar="PATH", help="FER2013: its csv or class folders; for --train")
    parser.add_argument("--train", type=int, nargs="+", metavar="N", help="train these candidates first")
    parser.add_argument("--epochs", type=int, default=4, help="of a training (default: %(default)s)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="other settings of the recipe, as in `fer train`")
    parser.add_argument("--no-timing", action="store_true", help="end after the trainings")
    parser.add_argument("--out", type=Path, default=_report.RESULTS, metavar="FOLDER", help="where fast_search.json is written (default: bench/results)")
    args = parser.parse_args()
    if args.train and not (args.runs and args.data and args.data.exists()):
        parser.error("--train needs --runs and --data, and --data has to be there")
    return args


def main():
    args = parse_args()
    _report.RESULTS = args.out
    torch.set_num_threads(1)
    if args.train:
        table = read_fer2013(args.data)
        seen = table.usage != "PrivateTest"
        table = replace(table, pixels=table.pixels[seen], emotion=table.emotion[seen], usage=table.usage[seen])
        for i in args.train:
            print(CANDIDATES[i], file=sys.stderr)
            train_candidate(CANDIDATES[i], table, args.runs, [f"epochs={args.epochs}", *args.set])
    if args.no_timing:
        return
    rows = measure_all([CANDIDATES[i] for i in args.only or range(len(CANDIDATES))], args.rounds)
    for row in rows:
        row["trained"] = read_training(args.runs / run_name(row["layers"])) if args.runs else None
    report("fast_search", {"rows": rows, "limits": LIMITS},
           question="Which networks of at most 0.3 M parameters answer within a quarter of a millisecond on one core?", answer=answer(rows))


if __name__ == "__main__":
    main()
