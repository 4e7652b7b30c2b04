"""How much faster do two ranks train than one process, and what does their exchange cost?

The same network, precision and global batch in four ways: one process with one thread, one process with two, two ranks with
a thread each, and those again with batch norms that each rank computes from its own share. A step is the whole one of
`fer train`: a batch out of the loader, augmented, forward, backward, the gradients averaged, optimiser, averaged weights.
Each measurement is a process (or two) of its own; the ways take turns, and each round begins with another one. The first
steps of a process are not counted. A ratio is the median of the rounds' own ratios.

The exchange is timed alone as well, in the two ranks: an `all_reduce` of as many floats as the network has parameters, and
one of two floats, which is all latency.

For eight ranks there is arithmetic, no measurement: a step takes the computation of its share and the exchange. For eight
machines like this one both are taken from what was measured here. For eight GPUs, which this script has not seen, speed,
bandwidth and latency are assumed; the assumptions stand in the JSON beside what follows from them, and can be replaced by
`--gpu-tflops`, `--gpu-gb-per-s` and `--gpu-us`.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import _report
from _report import report
from train_step import enough_faces, in_turns, read_table

WAYS = {"1 process, 1 thread": (1, 1, True), "1 process, 2 threads": (1, 2, True), "2 ranks, 1 thread each": (2, 1, True),
        "2 ranks, own batch norms": (2, 1, False)}  # ranks, threads, batch norms over all ranks
WARM_UP = 4  # steps
EXAMPLES = """examples:
  python bench/distributed.py --data fer2013.csv                the measurement, about six minutes on two idle cores
  python bench/distributed.py --limit 140 --bs 16 --steps 3 --rounds 1 --out /tmp    a quick try on drawn faces"""


def seconds_a_step(learn, steps, lrs):
    "Mean seconds of `steps` training steps of the learner, after `WARM_UP` that do not count."
    import torch
    from fastai.callback.core import Callback, CancelFitException
    cuda = learn.dls.device.type == "cuda"

    class Clock(Callback):
        order = 100

        def after_batch(self):
            if self.iter not in (WARM_UP - 1, WARM_UP + steps - 1):
                return
            if cuda:
                torch.cuda.synchronize()
            self.times = [*getattr(self, "times", []), time.perf_counter()]
            if len(self.times) == 2:
                raise CancelFitException
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, lrs, cbs=[clock := Clock()])
    return (clock.times[1] - clock.times[0]) / steps


def exchange(n, device, repeat=20):
    "Seconds of an `all_reduce` of `n` floats, after five that do not count."
    import torch
    import torch.distributed as dist
    tensor = torch.ones(n, device=device)
    for i in range(5 + repeat):
        if i == 5:
            dist.barrier()
            start = time.perf_counter()
        dist.all_reduce(tensor)
    if tensor.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeat


def run_one(args):
    "One measurement in this process, or in this rank: rank 0 prints what it found as JSON."
    import torch
    from fastai.torch_core import num_distrib, rank_distrib
    from fer_nbdev.callbacks import EMA, BF16
    from fer_nbdev.distributed import distribute, start_ranks
    from fer_nbdev.loaders import fer_dls
    from fer_nbdev.models import count_parameters
    from fer_nbdev.recipe import create_augment, read_recipe
    from fer_nbdev.train import fer_learner, group_lrs, keep_freed_memory
    torch.set_num_threads(WAYS[args.way][1])
    keep_freed_memory()
    recipe = read_recipe(args.recipe)
    recipe = recipe.set([f"bs={args.bs or recipe.bs}"])
    device = start_ranks("cpu") or "cpu"
    found = read_table(args.data, args.limit)
    table = enough_faces(found, recipe.bs * (args.steps + WARM_UP + 1))
    learn = fer_learner(fer_dls(table, recipe.bs, augment=create_augment(recipe.augment), device=device), recipe, cbs=[EMA(recipe.ema)] if recipe.ema else None)
    with distribute(learn, sync_bn=WAYS[args.way][2]):
        seconds = seconds_a_step(learn, args.steps, group_lrs(recipe))
    n = count_parameters(learn.model)
    costs = {"gradients": exchange(n, device), "two floats": exchange(2, device)} if num_distrib() > 1 else {}
    if not rank_distrib():
        norms = sum(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in learn.model.modules())
        print(json.dumps({"seconds": seconds, "exchange": costs, "bs": recipe.bs, "parameters": n, "norms": norms,
                          "flops_an_image": flops(learn.model), "arch": recipe.arch, "bf16": any(isinstance(cb, BF16) for cb in learn.cbs),
                          "faces": len(found), "source": Path(found.source).name}))


def flops(model):
    "Floating-point operations of the forward pass of one face, by PyTorch's counter."
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 1, 48, 48))
    return counter.get_total_flops()


def start(way, arguments):
    "Measure one way in new processes."
    ranks, threads, _ = WAYS[way]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"] if ranks > 1 else []
    done = subprocess.run([sys.executable, *launcher, __file__, *arguments, "--way", way], stdout=subprocess.PIPE, text=True, check=True,
                          env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    return json.loads(done.stdout.splitlines()[-1])


def step_of(n, bs, image, parameters, messages, gb_per_s, latency):
    "Seconds of a step on `n` ranks: the share of the batch, a ring of gradients, and the latency of each message."
    ring = 2 * (n - 1) / n * 4 * parameters / (gb_per_s * 1e9)
    return bs / n * image + (ring + messages * latency if n > 1 else 0)


def estimate(about, seconds, costs, args):
    "What eight ranks would take, computed from the figures and assumptions that are returned beside it."
    bs, n = about["bs"], about["parameters"]
    messages = 3 + 2 * about["norms"]  # gradients (one bucket), the loss that is logged, its gathering by fastai, and each batch norm forward and backward
    bandwidth = 4 * n / max(costs["gradients"] - costs["two floats"], 1e-9) / 1e9  # between two ranks a ring moves the gradients once
    here = {"seconds_an_image": seconds["1 process, 1 thread"] / bs, "gb_per_s": round(bandwidth, 3), "seconds_a_message": round(costs["two floats"], 6)}
    gpu = {"seconds_an_image": 3 * about["flops_an_image"] / (args.gpu_tflops * 1e12), "gb_per_s": args.gpu_gb_per_s, "seconds_a_message": args.gpu_us * 1e-6}
    rows = []
    for where, a in {"cores like this one, measured": here, "GPUs, assumed": gpu}.items():
        for batch in (bs, 8 * bs):
            one, eight = (step_of(k, batch, a["seconds_an_image"], n, messages, a["gb_per_s"], a["seconds_a_message"]) for k in (1, 8))
            rows.append({"where": where, "bs": batch, "seconds_a_step_1": round(one, 6), "seconds_a_step_8": round(eight, 6),
                         "speed_up_8": round(one / eight, 2), "seconds_an_epoch_8": round(28709 // batch * eight, 2)})
    assumed = {"gpu_tflops_reached": args.gpu_tflops, "gpu_gb_per_s": args.gpu_gb_per_s, "gpu_seconds_a_message": args.gpu_us * 1e-6,
               "messages_a_step": messages, "gradient_bytes": 4 * n,
               "training_flops_an_image": "3 times those of the forward pass, as PyTorch counts them",
               "formula": "bs/n * image + 2(n-1)/n * gradient_bytes/bandwidth + messages * latency; "
                          "nothing overlaps, and the loader, the optimiser and the launch of GPU kernels cost nothing",
               "faces_an_epoch": 28709, "here": here, "gpu": gpu}
    return {"assumptions": assumed, "rows": rows}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="PATH", help="FER2013: its csv or class folders; without it faces are drawn")
    parser.add_argument("--limit", type=int, metavar="N", help="take only the first N Training faces, or draw N (default: all, 1400)")
    parser.add_argument("--recipe", default="fer2013", help="bundled recipe or yaml file (default: %(default)s)")
    parser.add_argument("--bs", type=int, metavar="N", help="another global batch size than the recipe's; even")
    parser.add_argument("--steps", type=int, default=16, metavar="N", help="steps of each measurement (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=4, metavar="N", help="rounds; the medians are reported (default: %(default)s)")
    parser.add_argument("--gpu-tflops", type=float, default=20., metavar="X",
                        help="assumed: what one GPU reaches on this network, in TFLOP/s (default: %(default)s)")
    parser.add_argument("--gpu-gb-per-s", type=float, default=100., metavar="X", help="assumed: bandwidth between GPUs (default: %(default)s)")
    parser.add_argument("--gpu-us", type=float, default=20., metavar="X", help="assumed: microseconds of a small message between GPUs (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=_report.RESULTS, metavar="FOLDER", help="where distributed.json is written (default: bench/results)")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.data is not None and not args.data.exists():
        parser.error(f"no data at {args.data}")
    if any(n is not None and n < 1 for n in (args.limit, args.bs, args.steps, args.rounds)):
        parser.error("--limit, --bs, --steps and --rounds take numbers from 1 up")
    return args


def main():
    args = parse_args()
    if args.way:
        return run_one(args)
    _report.RESULTS = args.out
    found = {}

    def measure_one(way):
        found.setdefault(way, []).append(start(way, sys.argv[1:]))
        return found[way][-1]["seconds"]
    seconds = in_turns(list(WAYS), measure_one, args.rounds)
    median = {way: statistics.median(v) for way, v in seconds.items()}
    one, two, ranks, own = WAYS
    ratio = {f"{a}, of {b}": round(statistics.median(y / x for x, y in zip(seconds[a], seconds[b])), 3)
             for a, b in ((ranks, one), (ranks, two), (two, one), (own, one))}
    costs = {k: statistics.median(r["exchange"][k] for r in found[ranks]) for k in ("gradients", "two floats")}
    about = found[ranks][0]
    eight = estimate(about, median, costs, args)
    speed_up, share = ratio[f"{ranks}, of {one}"], costs["gradients"] / median[ranks]
    gpus = [r for r in eight["rows"] if "GPU" in r["where"]]
    report("distributed",
           {"seconds_a_step": {k: round(v, 4) for k, v in median.items()}, "images_per_second": {k: round(about["bs"] / v, 1) for k, v in median.items()},
            "times_as_fast": ratio, "efficiency_of_two_ranks": round(speed_up / 2, 3), "all_reduce_seconds": {k: round(v, 6) for k, v in costs.items()},
            "all_reduce_share_of_a_step": round(share, 4), "all_seconds_a_step": {k: [round(x, 4) for x in v] for k, v in seconds.items()},
            "steps": args.steps, "rounds": args.rounds, "eight": eight},
           question="How much faster do two ranks train than one process, at the same batch?",
           answer=f"two ranks with a thread each are {speed_up:.2f} times as fast as one process with one thread (efficiency {speed_up / 2:.0%}) and "
                  f"{ratio[f'{ranks}, of {two}']:.2f} times as fast as one process with two threads; "
                  f"{ratio[f'{own}, of {one}']:.2f} times without batch norms over all ranks; averaging the gradients of "
                  f"{about['parameters'] / 1e6:.1f} M parameters takes {costs['gradients'] * 1000:.1f} ms, {share:.1%} of a step. "
                  f"Computed, not measured: eight GPUs are {gpus[0]['speed_up_8']:.1f} times as fast as one at batch {gpus[0]['bs']}, "
                  f"and {gpus[1]['speed_up_8']:.1f} times at {gpus[1]['bs']}",
           data={"source": about["source"], "faces": about["faces"]}, backend="gloo",
           recipe={"name": args.recipe, **{k: about[k] for k in ("arch", "parameters", "norms", "bs", "bf16")}},
           command="python bench/distributed.py" + (f" --data {args.data.name}" if args.data else ""))


if __name__ == "__main__":
    main()
