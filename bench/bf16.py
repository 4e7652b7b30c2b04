"""How much faster does a network train in bf16? Faces a second, three ways of doing the same step.

A step is forward, backward and optimiser of a bundled recipe's network, on one batch held in memory:

  fp32                    32-bit floats, channels before pixels: PyTorch's defaults
  fp32 channels_last      the same with the channels of a pixel beside each other
  bf16 channels_last      besides, bf16 autocast: what the recipe does where the machine has instructions for it

They take turns, each beginning a round in its turn. A machine without bf16 instructions is told so plainly, and
measures the other two: bf16 would be emulated there, many times slower than fp32, and a recipe does not pick it.
"""
import statistics
import sys
from itertools import repeat
from pathlib import Path

import _report
from _report import report
from train_step import Step, enough_faces, in_turns, parse_args, read_table, seconds_a_step

WAYS = {"fp32": {"bf16": False, "channels_last": False}, "fp32 channels_last": {"bf16": False, "channels_last": True},
        "bf16 channels_last": {"bf16": True, "channels_last": True}}
EXAMPLES = """examples:
  python bench/bf16.py                                      the measurement, about two minutes
  python bench/bf16.py --data fer2013.csv                   the same on real faces; the figures are the same
  python bench/bf16.py --steps 1 --rounds 1 --bs 8 --out /tmp    a quick try"""


def bf16_instructions():
    "Those the processor lists, `['amx_bf16', 'avx512_bf16']` at most; None where the system does not say."
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return None
    return sorted({"amx_bf16", "avx512_bf16"} & set(info.read_text(encoding="utf-8", errors="replace").split()))


def measure_ways(steps_of, batch, steps, rounds):
    "Seconds a step, `{way: [one a round]}`; the first step of each, which is slow, does not count."
    for step in steps_of.values():
        seconds_a_step(step, repeat(batch), 1, 1)
    return in_turns(list(steps_of), lambda way: seconds_a_step(steps_of[way], repeat(batch), steps, 0), rounds)


def main():
    args = parse_args(__doc__, EXAMPLES, "bf16", "network and batch size", steps=3, each="way")
    import torch  # after the arguments: with fastai it takes ten seconds
    from fastai.torch_core import default_device
    from fer_nbdev.loaders import FER2013_STATS, fer_dls
    from fer_nbdev.models import count_parameters
    from fer_nbdev.callbacks import has_bf16
    from fer_nbdev.recipe import read_recipe
    _report.RESULTS = args.out
    recipe, device = read_recipe(args.recipe), torch.device(args.device) if args.device else default_device()
    bs, able = args.bs or recipe.bs, has_bf16(device)
    found = read_table(args.data, args.limit)
    table = enough_faces(found, bs)
    batch = fer_dls(table, bs, stats=recipe.stats or FER2013_STATS, device=device).one_batch()
    steps_of = {way: Step(recipe, len(table.classes), device, **how) for way, how in WAYS.items() if able or not how["bf16"]}
    seconds = measure_ways(steps_of, batch, args.steps, args.rounds)
    ratio = {way: statistics.median(a / b for a, b in zip(seconds["fp32"], seconds[way])) for way in steps_of if way != "fp32"}
    rate = {way: bs / statistics.median(v) for way, v in seconds.items()}
    if able:
        answer = (f"the network trains on {rate['bf16 channels_last']:.0f} faces a second in bf16 channels_last, "
                  f"{rate['fp32 channels_last']:.0f} in fp32 channels_last and {rate['fp32']:.0f} in fp32: "
                  f"bf16 channels_last is {ratio['bf16 channels_last']:.1f} times as fast as fp32")
    else:
        answer = (f"this machine has no bf16 instructions, so recipes train in fp32 here: "
                  f"on {rate['fp32 channels_last']:.0f} faces a second with channels_last, {rate['fp32']:.0f} without")
    report("bf16",
           {"images_per_second": {k: round(v, 1) for k, v in rate.items()}, "times_fp32": {k: round(v, 2) for k, v in ratio.items()},
            "has_bf16": able, "steps": args.steps, "rounds": args.rounds,
            "all_seconds_a_step": {k: [round(x, 4) for x in v] for k, v in seconds.items()}},
           question="How much faster does a network train in bf16?", answer=answer,
           data={"source": Path(found.source).name, "faces": len(found)},
           recipe={"name": args.recipe, "arch": recipe.arch, "parameters": count_parameters(steps_of["fp32"].model), "bs": bs},
           device=str(device), threads=torch.get_num_threads(), processor_bf16_instructions=bf16_instructions(),
           command="python bench/bf16.py" + (f" --data {args.data.name}" if args.data else "") + (f" --limit {args.limit}" if args.limit else ""))
    return True


if __name__ == "__main__":
    sys.exit(not main())
