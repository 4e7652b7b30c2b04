"""How much does the server stand?

Requests a second and waiting times for 1, 8 and 32 clients, with and without micro-batching, when it is overloaded, and its memory.
A server of its own process, on loopback. Each client sends one request after the other: the portrait that ships inside matplotlib,
as a photo in which the face has to be found, and as a crop that is a face (detector "none"), so that the network weighs more.
The ways alternate, and each is measured in several rounds. Then many more clients than the queue is long: some must be refused
with 429 and Retry-After, all others answered, and afterwards a single client must be as fast as before. At last the memory of the
server while eight clients send many requests, a second of photos in each tenth and crops otherwise.
"""
import argparse
import asyncio
import io
import statistics
import sys
import time
from pathlib import Path

import _report
from _report import hardware, report
from _server import Server, memory_mb

CLIENTS = (1, 8, 32)
WAYS = {"together": .005, "each by itself": None}
EXAMPLES = """examples:
  python bench/serve.py                                        the measurement, some minutes
  python bench/serve.py --seconds 1 --requests 200 --out /tmp  a quick try"""


def bodies():
    "What is sent: a photo, and a crop of its face, each as (query, files)."
    from PIL import Image
    from fer_nbdev.core import sample_portrait
    crop = io.BytesIO()
    Image.open(sample_portrait()).convert("L").crop((155, 106, 375, 326)).resize((96, 96)).save(crop, "JPEG", quality=90)
    return {"photo": (sample_portrait().read_bytes(), {"detector": "haar"}), "crop": (crop.getvalue(), {"detector": "none"})}


async def client(http, body, until, seconds, refused):
    "Ask until the time is over."
    data, options = body
    while time.perf_counter() < until:
        start = time.perf_counter()
        answer = await http.post("/v1/predict", files={"images": ("a.jpg", data)}, data=options)
        if answer.status_code == 429:
            refused.append(int(answer.headers["retry-after"]))
            await asyncio.sleep(.05)
            continue
        answer.raise_for_status()
        if len(answer.json()["images"][0]["faces"]) != 1:
            raise RuntimeError(f"expected one face: {answer.text}")
        seconds.append(time.perf_counter() - start)


async def load(port, body, clients, duration):
    "Seconds of each answered request, what the refused ones were told, and how long it took."
    import httpx
    seconds, refused = [], []
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60, limits=limits) as http:
        start = time.perf_counter()
        await asyncio.gather(*(client(http, body, start + duration, seconds, refused) for _ in range(clients)))
        return seconds, refused, time.perf_counter() - start


def percentiles(seconds):
    "Median and 99th percentile in milliseconds."
    ordered = sorted(seconds)
    return {"p50_ms": round(1000 * statistics.median(ordered), 1), "p99_ms": round(1000 * ordered[min(len(ordered) - 1, int(.99 * len(ordered)))], 1)}


def measure_load(servers, duration, rounds):
    "Requests a second, median and 99th percentile by kind of image, way and number of clients."
    results = {}
    for kind, body in bodies().items():
        for n in CLIENTS:
            found = {way: ([], []) for way in servers}
            for turn in range(rounds):
                for way in list(servers)[::1 if turn % 2 else -1]:
                    seconds, refused, took = asyncio.run(load(servers[way].port, body, n, duration))
                    if refused:
                        raise RuntimeError(f"{len(refused)} requests of {n} clients were refused")
                    found[way][0].append(len(seconds) / took)
                    found[way][1].extend(seconds)
            for way, (rates, seconds) in found.items():
                row = {"requests_per_second": round(statistics.median(rates), 1), **percentiles(seconds), "requests": len(seconds)}
                results.setdefault(kind, {}).setdefault(way, {})[str(n)] = row
    return results


def measure_overload(duration):
    "A queue of eight and sixty-four clients; then one client again."
    photo = bodies()["photo"]
    with Server(limits={"queue": 8}) as server:
        asyncio.run(load(server.port, photo, 1, 1))
        before, _, _ = asyncio.run(load(server.port, photo, 1, duration))
        seconds, refused, took = asyncio.run(load(server.port, photo, 64, 2 * duration))
        after, more, _ = asyncio.run(load(server.port, photo, 1, duration))
    if not refused or more or min(refused) < 1:
        raise RuntimeError(f"{len(refused)} refused under load, {len(more)} afterwards: expected some, and none")
    return {"queue": 8, "clients": 64, "answered": len(seconds), "refused_with_429": len(refused), "retry_after_seconds": [min(refused), max(refused)],
            "answered_per_second": round(len(seconds) / took, 1), "before": percentiles(before), "during": percentiles(seconds), "after": percentiles(after)}


def measure_memory(requests):
    "Megabytes that the server holds after each tenth of the requests."
    crop, photo = bodies()["crop"], bodies()["photo"]
    held = []
    with Server() as server:
        asyncio.run(load(server.port, photo, 8, 2))
        done, step = 0, max(1, requests // 10)
        while done < requests:
            count = len(asyncio.run(load(server.port, photo, 8, 1))[0])
            while count < step:
                count += len(asyncio.run(load(server.port, crop, 8, min(5., .005 * (step - count) + .05)))[0])
            done += count
            held.append(round(memory_mb(server.process.pid), 1))
    return {"requests": done, "memory_mb": held, "growth_mb": round(held[-1] - held[0], 1)}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5, metavar="S", help="of each round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of each way (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=10_000, metavar="N", help="while memory is watched (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=_report.RESULTS, metavar="FOLDER", help="where serve.json is written (default: bench/results)")
    args = parser.parse_args()
    if args.seconds <= 0 or args.rounds < 1 or args.requests < 10:
        parser.error("--seconds, --rounds and --requests take numbers above zero, --requests from 10 up")
    return args


def main():
    args = parse_args()
    _report.RESULTS = args.out
    with Server(batch_wait=WAYS["together"]) as one, Server(batch_wait=WAYS["each by itself"]) as other:
        speed = measure_load(dict(zip(WAYS, (one, other))), args.seconds, args.rounds)
    overload, memory = measure_overload(args.seconds), measure_memory(args.requests)
    photo, crop = (speed[kind]["together"] for kind in ("photo", "crop"))
    gain = {kind: {n: round(ways["together"][n]["requests_per_second"] / ways["each by itself"][n]["requests_per_second"], 2)
                   for n in map(str, CLIENTS)} for kind, ways in speed.items()}
    defaults = dict(seconds=5, rounds=3, requests=10_000)
    changed = "".join(f" --{k} {getattr(args, k)}" for k, d in defaults.items() if getattr(args, k) != d)

    def told(n):
        row = photo[str(n)]
        return (f"{n} client{'s' * (n > 1)} {row['requests_per_second']:.0f} photos a second, "
                f"p50 {row['p50_ms']:.0f} and p99 {row['p99_ms']:.0f} ms")

    report("serve", {"load": speed, "times_without_batching": gain, "overload": overload, "memory": memory},
           question="How many requests does the server answer?",
           answer=f"on {hardware()['cores']} cores, clients on the same machine: " + "; ".join(map(told, CLIENTS))
                  + f"; ready-made crops from 32 clients {crop['32']['requests_per_second']:.0f} a second, "
                  f"{gain['crop']['32']:.2f} times as many as without micro-batching (photos {gain['photo']['32']:.2f}); "
                  f"memory {memory['growth_mb']:+.1f} MB over {memory['requests']:,} requests",
           command="python bench/serve.py" + changed)
    return True


if __name__ == "__main__":
    sys.exit(not main())
