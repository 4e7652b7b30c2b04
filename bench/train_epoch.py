"""How much faster does the engine train than the plain loop that most projects write?

Both train the same network with the same optimiser, batch size and augmentation on the same faces. The plain loop is the
usual one: PIL images, torchvision transforms one face at a time, a DataLoader with two workers, float32. The engine is
`fer_learner`, as `fer train` runs it: whole batches from one tensor, augmented as batches, bf16 where the machine has it.
A third runner takes the engine's step on one batch that never changes, which is what is left to gain.

Each measurement is a process of its own, because the engine changes how that process allocates memory; the runners take
turns, and each round begins with another one. The first steps of a process are not counted. A ratio is the median of
the rounds' own ratios.
"""
import itertools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import _report
from _report import report
from train_step import enough_faces, in_turns, parse_args, read_table

RUNNERS = ("plain", "engine", "held batch")
WARM_UP = 4  # steps
WORKERS = 2
LIMIT_CPU, LIMIT_GPU = 4, .9  # times the plain loop on a CPU with bf16; share of the held batch's rate on a GPU
EXAMPLES = """examples:
  python bench/train_epoch.py --data fer2013.csv            the measurement, about four minutes
  python bench/train_epoch.py --steps 2 --rounds 1 --bs 8 --out /tmp    a quick try on drawn faces"""


def timed_steps(step, batches, steps, wait):
    "Seconds of `steps` steps on the batches, after `WARM_UP` that do not count."
    batches = iter(batches)
    for batch in itertools.islice(batches, WARM_UP):
        step(*batch)
    wait()
    start = time.perf_counter()
    for batch in itertools.islice(batches, steps):
        step(*batch)
    wait()
    return time.perf_counter() - start


class PlainFaces:
    "A torch `Dataset` of PIL images with torchvision transforms, as most projects have it."

    def __init__(self, table, a, stats):
        from torchvision import transforms as T
        self.table = table
        self.tfms = T.Compose([T.RandomHorizontalFlip(a.p_flip), T.RandomAffine(a.rotate, (a.shift, a.shift), (1 - a.scale, 1 + a.scale)),
                               T.ColorJitter(a.brightness * (a.p_light > 0), a.contrast * (a.p_light > 0)), T.ToTensor(), T.Normalize(*stats),
                               T.RandomErasing(a.p_erase, a.erase)])

    def __len__(self):
        return len(self.table)

    def __getitem__(self, i):
        from PIL import Image
        return self.tfms(Image.fromarray(self.table.pixels[i])), int(self.table.emotion[i])


def plain(recipe, table, steps, device, wait):
    "The plain loop."
    import torch
    from fer_nbdev.models import create_model, input_stats
    from fer_nbdev.recipe import OPTIMIZERS, create_augment
    faces = PlainFaces(table.split("Training"), create_augment(recipe.augment), recipe.stats or input_stats(recipe.arch))
    dl = torch.utils.data.DataLoader(faces, recipe.bs, shuffle=True, num_workers=WORKERS, drop_last=True)
    model = create_model(recipe.arch, len(table.classes), **recipe.arch_args).to(device).train()
    opt = OPTIMIZERS[recipe.optimizer](model.parameters(), lr=recipe.lr)

    def step(x, y):
        loss = torch.nn.functional.cross_entropy(model(x.to(device)), y.to(device))
        opt.zero_grad()
        loss.backward()
        opt.step()
    return timed_steps(step, dl, steps, wait)


def engine(recipe, table, steps, device, wait):
    "A fit of the engine."
    from fastai.callback.core import Callback
    from fastai.callback.progress import ProgressCallback
    from fer_nbdev.loaders import fer_dls
    from fer_nbdev.models import input_stats
    from fer_nbdev.recipe import create_augment
    from fer_nbdev.train import fer_learner, group_lrs, keep_freed_memory, schedule_cbs

    class Clock(Callback):
        def before_batch(self):
            if self.training and self.iter == WARM_UP:
                wait()
                self.start = time.perf_counter()

        def after_train(self):
            wait()
            self.seconds = time.perf_counter() - self.start

    keep_freed_memory()
    dls = fer_dls(table, recipe.bs, "PublicTest", create_augment(recipe.augment), recipe.stats or input_stats(recipe.arch), device=device)
    assert len(dls.train) == WARM_UP + steps
    learn = fer_learner(dls, recipe, cbs=[clock := Clock()])
    learn.remove_cb(ProgressCallback)
    with learn.no_logging():
        schedule = [] if recipe.schedule == "plateau" else schedule_cbs(recipe, len(dls.train))  # a plateau looks at a history
        learn.fit(1, group_lrs(recipe), cbs=schedule)
    return clock.seconds


def held(recipe, table, steps, device, wait):
    "The engine's forward, backward and optimiser on one batch."
    import torch
    from fer_nbdev.callbacks import has_bf16, quick_gradients
    from fer_nbdev.loaders import fer_dls
    from fer_nbdev.train import fer_learner, keep_freed_memory
    keep_freed_memory()
    learn = fer_learner(fer_dls(table, recipe.bs, device=device), recipe)
    learn.create_opt()
    model = learn.model.to(device).to(memory_format=torch.channels_last).train()
    if has_bf16(device):
        quick_gradients(model)
    x, y = (t.as_subclass(torch.Tensor) for t in learn.dls.one_batch())
    x = x.to(memory_format=torch.channels_last)

    def step(x, y):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=has_bf16(device)):
            out = model(x)
        loss = learn.loss_func(out.float(), y)
        loss.backward()
        learn.opt.step()
        learn.opt.zero_grad()
    return timed_steps(step, itertools.repeat((x, y)), steps, wait)


def run_one(args):
    "One measurement in this process: prints seconds and what was measured as JSON."
    import torch
    from fastai.torch_core import default_device
    from fer_nbdev.callbacks import has_bf16
    from fer_nbdev.models import count_parameters, create_model
    from fer_nbdev.recipe import read_recipe
    from dataclasses import replace
    recipe = read_recipe(args.recipe)
    recipe = replace(recipe, bs=args.bs or recipe.bs, valid="PublicTest", classes=None, per_class=None)
    device = torch.device(args.device) if args.device else default_device()
    found = read_table(args.data, args.limit)
    table = enough_faces(found, recipe.bs * (args.steps + WARM_UP))
    wait = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
    seconds = dict(zip(RUNNERS, (plain, engine, held)))[args.run](recipe, table, args.steps, device, wait)
    print(json.dumps({"seconds": seconds, "bs": recipe.bs, "device": device.type, "bf16": has_bf16(device), "threads": torch.get_num_threads(),
                      "arch": recipe.arch, "parameters": count_parameters(create_model(recipe.arch, len(table.classes), **recipe.arch_args)),
                      "faces": len(found), "source": Path(found.source).name}))


def main():
    args = parse_args(__doc__, EXAMPLES, "train_epoch", "network, optimiser, batch size and augmentation", steps=16, each="process",
                      recipe="realtime_net", rounds=4, runners=RUNNERS)
    if args.run:
        return run_one(args) or True
    _report.RESULTS = args.out
    found = {}

    def measure_one(runner):
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--run", runner], stdout=subprocess.PIPE, text=True, check=True)
        found[runner] = json.loads(done.stdout.splitlines()[-1])
        return found[runner]["seconds"] / args.steps
    seconds = in_turns(RUNNERS, measure_one, args.rounds)
    about = found["engine"]
    rate = {k: about["bs"] / statistics.median(v) for k, v in seconds.items()}
    faster = statistics.median(a / b for a, b in zip(seconds["plain"], seconds["engine"]))
    share = statistics.median(a / b for a, b in zip(seconds["held batch"], seconds["engine"]))
    fine = share >= LIMIT_GPU if about["device"] == "cuda" else faster >= LIMIT_CPU
    report("train_epoch",
           {"images_per_second": {k: round(v, 1) for k, v in rate.items()},
            "times_the_plain_loop": round(faster, 2), "share_of_the_held_batch": round(share, 3),
            "all_seconds_a_step": {k: [round(x, 4) for x in v] for k, v in seconds.items()}, "steps": args.steps, "rounds": args.rounds, "within_limits": fine},
           question="How much faster does the engine train than a plain loop?",
           answer=f"{'with bf16 ' if about['bf16'] else ''}{faster:.1f} times as fast as PIL images, torchvision transforms "
                  f"and a DataLoader with {WORKERS} workers in fp32 (`{about['arch']}`, batches of {about['bs']}: "
                  f"{rate['engine']:.0f} against {rate['plain']:.0f} faces/s), "
                  f"and at {share:.0%} of the rate of its bare step on a batch held in memory"
                  + ("" if fine else f"; {LIMIT_GPU:.0%} of it were asked for" if about["device"] == "cuda" else f"; {LIMIT_CPU} times were asked for"),
           data={"source": about["source"], "faces": about["faces"]}, limits={"cpu_times_the_plain_loop": LIMIT_CPU, "gpu_share_of_the_held_batch": LIMIT_GPU},
           recipe={k: about[k] for k in ("arch", "parameters", "bs", "bf16")}, device=about["device"], threads=about["threads"],
           command="python bench/train_epoch.py" + (f" --data {args.data.name}" if args.data else ""))
    return fine


if __name__ == "__main__":
    sys.exit(not main())
