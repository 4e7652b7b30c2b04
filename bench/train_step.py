"""Do the loaders hold training back? A training step through `fer_dls` against the same step on a batch that is there.

A step is forward, backward and optimiser, for the network, batch size and precision of a bundled recipe on this machine.
Three sources of batches feed the same network in turn: one batch held in memory, `fer_dls` with the recipe's
augmentation, and what most notebooks do, fastai's `ImageDataLoaders.from_folder` on png files, in grayscale, with
`aug_transforms()` and two workers. The png files are made from the same faces, in a temporary folder.

Each round draws from every source for some steps and begins with another source than the round before. A source is
started and takes its first steps before the clock counts, so that neither the start of workers nor the batches that
they prepare meanwhile are measured; they end with their turn. A ratio is the median of the rounds' own ratios.
"""
import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from itertools import repeat
from pathlib import Path

import _report
from _report import report

SOURCES = ("held batch", "fer_dls", "from_folder on png")
LIMIT = 1.05  # a step through fer_dls, as a multiple of the step on the held batch
WORKERS = 2
WARM_UP = {"held batch": 1, "fer_dls": 1, "from_folder on png": 5}  # each worker keeps two batches ready: use those up
EXAMPLES = """examples:
  python bench/train_step.py --data fer2013.csv             the measurement, about two minutes
  python bench/train_step.py                                the same on drawn faces
  python bench/train_step.py --steps 2 --rounds 1 --bs 8 --out /tmp    a quick try"""


class Step:
    """One training step of a recipe's network: forward, backward, optimiser.

    The loss comes back as a tensor, so that a GPU is not waited for; `wait` does that."""

    def __init__(self, recipe, n_classes, device, bf16, channels_last=True):
        import torch
        from fer_nbdev.callbacks import quick_gradients
        from fer_nbdev.losses import create_loss
        from fer_nbdev.models import create_model
        from fer_nbdev.recipe import OPTIMIZERS
        from fer_nbdev.train import decay_groups
        torch.manual_seed(recipe.seed)
        self.torch, self.device, self.bf16 = torch, torch.device(device), bf16
        model = create_model(recipe.arch, n_classes, **recipe.arch_args).to(self.device).train()
        self.model = model.to(memory_format=torch.channels_last) if channels_last else model
        if bf16:
            quick_gradients(model)
        self.loss = create_loss(None, recipe.label_smoothing, self.device)
        decayed, plain = decay_groups(model)
        groups = [{"params": decayed, "weight_decay": recipe.wd}, {"params": plain, "weight_decay": 0.}]
        extra = {"momentum": recipe.momentum, "nesterov": True, "fused": True} if recipe.optimizer == "sgd" else {}
        self.opt = OPTIMIZERS[recipe.optimizer](groups, lr=recipe.lr / 25, **extra)

    def __call__(self, x, y):
        with self.torch.autocast(self.device.type, self.torch.bfloat16, enabled=self.bf16):
            out = self.model(x)
        loss = self.loss(out.float(), y)
        loss.backward()
        self.opt.step()
        self.opt.zero_grad()
        return loss

    def wait(self):
        if self.device.type == "cuda":
            self.torch.cuda.synchronize(self.device)


def read_table(data, limit):
    "Training faces: of the csv, or drawn ones."
    from fer_nbdev.data import read_fer2013, synthetic_faces
    table = read_fer2013(data, cache=False) if data else synthetic_faces(limit or 1400)
    return table.split("Training")[:limit]


def enough_faces(table, n):
    "A table of `n` Training faces, those of `table` over and over, and 14 more to validate on, which loaders ask for."
    import numpy as np
    from fer_nbdev.data import FER2013
    rows = np.resize(np.arange(len(table)), n + 14)
    usage = np.array(["Training"] * n + ["PublicTest"] * 14)
    return FER2013(table.pixels[rows], table.emotion[rows], usage, table.classes, table.source)


def folder_dls(folder, bs, device):
    "DataLoaders of png class folders, as fastai's own lessons make them."
    from fastai.vision.augment import aug_transforms
    from fastai.vision.core import PILImageBW
    from fastai.vision.data import ImageDataLoaders
    return ImageDataLoaders.from_folder(folder, train="train", valid="val", img_cls=PILImageBW, batch_tfms=aug_transforms(),
                                        bs=bs, num_workers=WORKERS, device=device)


def seconds_a_step(step, batches, steps, warm_up):
    "Mean seconds of `steps` steps on the next of `batches`, after `warm_up` that do not count."
    for _ in range(warm_up):
        step(*next(batches))
    step.wait()
    start = time.perf_counter()
    for _ in range(steps):
        step(*next(batches))
    step.wait()
    return (time.perf_counter() - start) / steps


def in_turns(names, measure_one, rounds):
    "`{name: [one measurement a round]}`; each name begins a round in its turn."
    found = {name: [] for name in names}
    for i in range(rounds):
        k = i % len(names)
        for name in names[k:] + names[:k]:
            found[name].append(measure_one(name))
    return found


def measure_sources(step, loaders, held, steps, rounds):
    "Seconds a step, `{source: [one a round]}`."
    def measure_one(source):
        batches = iter(loaders[source]) if source in loaders else repeat(held)
        seconds = seconds_a_step(step, batches, steps, WARM_UP[source])
        del batches  # ends the workers
        for worker in multiprocessing.active_children():
            worker.join()
        return seconds
    return in_turns(SOURCES, measure_one, rounds)


def parse_args(description=__doc__, examples=EXAMPLES, name="train_step", gives="network, batch size, augmentation and precision", steps=8, each="source",
               recipe="fer2013", rounds=6, runners=()):
    """The arguments of a benchmark that takes training steps; `bf16.py` and `train_epoch.py` have the same ones in their own words.

    With `runners` there is a hidden `--run`, by which a benchmark starts itself for one measurement."""
    parser = argparse.ArgumentParser(description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="PATH", help="FER2013: its csv or class folders; without it faces are drawn")
    parser.add_argument("--limit", type=int, metavar="N", help="take only the first N Training faces, or draw N (default: all, 1400)")
    parser.add_argument("--recipe", default=recipe, help=f"bundled recipe, or yaml file, that gives {gives} (default: %(default)s)")
    parser.add_argument("--bs", type=int, metavar="N", help="another batch size than the recipe's")
    parser.add_argument("--steps", type=int, default=steps, metavar="N", help=f"steps of each {each} in a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=rounds, metavar="N", help="rounds; the medians are reported (default: %(default)s)")
    parser.add_argument("--device", help="torch device (default: the GPU where there is one)")
    parser.add_argument("--out", type=Path, default=_report.RESULTS, metavar="FOLDER", help=f"where {name}.json is written (default: bench/results)")
    if runners:
        parser.add_argument("--run", choices=runners, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.data is not None and not args.data.exists():
        parser.error(f"no data at {args.data}")
    if any(n is not None and n < 1 for n in (args.limit, args.bs, args.steps, args.rounds)):
        parser.error("--limit, --bs, --steps and --rounds take numbers from 1 up")
    return args


def main():
    args = parse_args()
    import torch  # after the arguments: with fastai it takes ten seconds
    from fastai.torch_core import default_device
    from fer_nbdev.data import to_folders
    from fer_nbdev.loaders import FER2013_STATS, Augment, fer_dls
    from fer_nbdev.models import count_parameters
    from fer_nbdev.callbacks import has_bf16
    from fer_nbdev.recipe import read_recipe
    _report.RESULTS = args.out
    recipe, device = read_recipe(args.recipe), torch.device(args.device) if args.device else default_device()
    bs, bf16 = args.bs or recipe.bs, recipe.precision == "bf16" or recipe.precision == "auto" and has_bf16(device)
    found = read_table(args.data, args.limit)
    table = enough_faces(found, bs * (args.steps + max(WARM_UP.values()) + 1))
    step = Step(recipe, len(table.classes), device, bf16)
    with tempfile.TemporaryDirectory() as tmp:
        ours = fer_dls(table, bs, augment=Augment(**recipe.augment), stats=recipe.stats or FER2013_STATS, device=device)
        theirs = folder_dls(to_folders(table, Path(tmp, "faces")), bs, device)
        held = ours.one_batch()
        step(*held), step(*theirs.one_batch())  # the first step of a shape is slow
        seconds = measure_sources(step, {"fer_dls": ours.train, "from_folder on png": theirs.train}, held, args.steps, args.rounds)
    ratio = {s: statistics.median(a / b for a, b in zip(seconds[s], seconds["held batch"])) for s in SOURCES[1:]}
    median = {s: statistics.median(v) for s, v in seconds.items()}
    precision, fine = "bf16" if bf16 else "fp32", ratio["fer_dls"] <= LIMIT
    report("train_step",
           {"seconds_a_step": {k: round(v, 4) for k, v in median.items()}, "images_per_second": {k: round(bs / v, 1) for k, v in median.items()},
            "times_the_held_batch": {k: round(v, 3) for k, v in ratio.items()}, "steps": args.steps, "rounds": args.rounds,
            "all_seconds_a_step": {k: [round(x, 4) for x in v] for k, v in seconds.items()}, "within_limits": fine},
           question="Do the loaders hold training back?",
           answer=f"a step through `fer_dls` takes {ratio['fer_dls']:.2f} times as long as on a batch held in memory, "
                  f"through `ImageDataLoaders.from_folder` on png files {ratio['from_folder on png']:.2f} times "
                  f"({median['held batch'] * 1000:.0f} ms for {bs} faces in {precision})",
           data={"source": Path(found.source).name, "faces": len(found)}, limit_ratio=LIMIT,
           recipe={"name": args.recipe, "arch": recipe.arch, "parameters": count_parameters(step.model), "bs": bs, "precision": precision,
                   "augment": recipe.augment}, device=str(device), threads=torch.get_num_threads(), png_workers=WORKERS,
           command="python bench/train_step.py" + (f" --data {args.data.name}" if args.data else "") + (f" --limit {args.limit}" if args.limit else ""))
    return fine


if __name__ == "__main__":
    sys.exit(not main())
