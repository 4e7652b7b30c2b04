"""Which map of a 48 pixel face can be believed? Grad-CAM and LayerCAM on coarse and fine layers, and occlusion, put to two tests.

Planted: every network of the registry, in full size, learns drawn faces in which only a pattern tells the classes
apart, until it is right on 99% of held-out faces or has seen them twelve times. The map of the pattern's class has to peak on the pattern (hits), and its
heat should lie there (heat). Three patterns, harder from one to the next: a bright square at a known place; a chessboard
at a random place; upright or lying stripes at a random place, with a chessboard elsewhere that means nothing.

Faithful (with --run and --data): on faces that a trained network gets right, the hottest 5, 10, 20 and 40% of the pixels
are replaced by a blurred copy, and the probability of the answer is averaged (deleted, low is good); or all others are
(kept, high is good). Random blobs, the middle of the face and its edges, which know nothing of the network, are beside it.
"""
import argparse
import importlib.util
import time
from pathlib import Path

import numpy as np
from _report import report

SIZE = 10  # side of a pattern, in pixels
SHARES = (.05, .1, .2, .4)
PATTERNS = ("square", "chessboard", "stripes")
EXAMPLES = """examples:
  python bench/class_maps.py                                          planted patterns, all networks
  python bench/class_maps.py --run runs/fer2013 --data fer2013.csv    and how faithful the maps are to a trained network
  python bench/class_maps.py --archs se_resnet --patterns square --faces 64 --asked 16 --out /tmp    a quick try"""


def board(rng):
    yy, xx = np.indices((SIZE, SIZE))
    return 40 + 190 * ((xx // 2 + yy // 2 + rng.integers(2)) % 2)


def stripes(rng, upright):
    at = np.indices((SIZE, SIZE))[1 if upright else 0]
    return 40 + 190 * ((at + rng.integers(4)) // 2 % 2)


def plant(pattern, n, seed):
    "Faces, class of each (0: nothing planted), and the upper left corner of what was planted."
    from fer_nbdev.data import synthetic_faces
    rng, faces = np.random.default_rng(seed), synthetic_faces(n, seed).pixels
    label, corner = np.arange(n) % (3 if pattern == "stripes" else 2), rng.integers(0, 48 - SIZE, (n, 2))
    if pattern == "square":
        corner[:] = 6, 30
    for face, c, (top, left) in zip(faces, label, corner):
        if pattern == "stripes":  # the chessboard that means nothing, clear of them
            while abs(other := rng.integers(0, 48 - SIZE, 2) - (top, left)).max() <= SIZE:
                pass
            y, x = other + (top, left)
            face[y:y + SIZE, x:x + SIZE] = board(rng)
        if c:
            made = rng.normal(235, 6, (SIZE, SIZE)) if pattern == "square" else board(rng) if pattern == "chessboard" else stripes(rng, c == 1)
            face[top:top + SIZE, left:left + SIZE] = np.clip(made, 0, 255)
    return faces, label, corner


def train(arch, pattern, n, seed=0, epochs=12, bs=32):
    "A `Network` that tells the pattern, and its accuracy on held-out faces; stops when one in a hundred is wrong."
    import torch
    import torch.nn.functional as F
    from fer_nbdev.callbacks import has_bf16
    from fer_nbdev.interpret import open_network
    from fer_nbdev.models import create_model
    torch.manual_seed(seed)
    (faces, label, _), (others, truth, _) = plant(pattern, n, seed), plant(pattern, 120, seed + 1)
    classes = ("nothing", "upright", "lying")[:label.max() + 1]
    model = create_model(arch, len(classes)).to(memory_format=torch.channels_last)
    network, opt = open_network(model, classes=classes), torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=1e-2)
    x, y = network.prepare(faces), torch.from_numpy(label)
    for epoch in range(epochs):
        model.train()
        for g in opt.param_groups:
            g["lr"] = 1e-3 * min(1, (epoch + 1) / 3)
        for rows in torch.randperm(n).split(bs)[:n // bs]:
            with torch.autocast("cpu", torch.bfloat16, enabled=has_bf16("cpu")):
                out = model(x[rows])
            F.cross_entropy(out.float(), y[rows]).backward()
            opt.step()
            opt.zero_grad()
        model.eval()
        accuracy = (network.predict_faces(others).argmax(1) == truth).mean()
        if accuracy >= .99:
            break
    return network, float(accuracy)


def shifted(network, faces, emotion, **options):
    "Grad-CAM of nine copies shifted by up to 4 pixels, shifted back and averaged."
    from fer_nbdev.interpret import grad_cam
    total = 0
    for dy in (-4, 0, 4):
        for dx in (-4, 0, 4):
            moved = np.roll(np.pad(faces, ((0, 0), (4, 4), (4, 4)), mode="edge"), (dy, dx), (1, 2))[:, 4:-4, 4:-4]
            total = total + np.roll(np.pad(grad_cam(network, moved, emotion, **options), ((0, 0), (4, 4), (4, 4))), (-dy, -dx), (1, 2))[:, 4:-4, 4:-4]
    return total


def maps(network, faces, emotion, n_occlusion):
    "(name, maps, seconds a face) of every method; occlusion for the first faces only."
    from fer_nbdev.interpret import default_layers, grad_cam, map_layers, occlusion_map
    layers = map_layers(network)
    deepest = {side: name for name, (_, side) in layers.items()}
    ways = {"default": lambda f, e: grad_cam(network, f, e)}
    for side, name in sorted(deepest.items()):
        for method in ("gradcam", "layercam"):
            ways[f"{method} {side}x{side}"] = lambda f, e, n=name, m=method: grad_cam(network, f, e, layer=n, method=m)
    last = default_layers(network, "gradcam")
    ways["gradcam last"] = lambda f, e: grad_cam(network, f, e, method="gradcam")
    ways["gradcam last, shifts"] = lambda f, e: shifted(network, f, e, layer=last, method="gradcam")
    for size, stride in ((8, 4), (12, 6)):
        ways[f"occlusion {size}/{stride}"] = lambda f, e, s=size, t=stride: occlusion_map(network, f, e, size=s, stride=t)
    for name, way in ways.items():
        n = n_occlusion if name.startswith("occlusion") else len(faces)
        start = time.perf_counter()
        yield name, way(faces[:n], emotion[:n]), (time.perf_counter() - start) / n


def judge(heat, corner):
    "Share of maps that peak on the pattern, and share of their heat that lies there."
    peak = np.stack(np.unravel_index(heat.reshape(len(heat), -1).argmax(1), heat.shape[1:]), 1) - corner
    inside = [h[top:top + SIZE, left:left + SIZE].sum() / max(h.sum(), 1e-9) for h, (top, left) in zip(heat, corner)]
    return {"hits": round(float(((peak >= 0) & (peak < SIZE)).all(1).mean()), 4), "heat": round(float(np.mean(inside)), 4)}


def planted(arch, pattern, args):
    network, accuracy = train(arch, pattern, args.faces)
    faces, label, corner = plant(pattern, args.asked, 7)
    keep = np.flatnonzero((label > 0) & (network.predict_faces(faces).argmax(1) == label))
    row = {"arch": arch, "pattern": pattern, "accuracy": round(accuracy, 4), "faces": len(keep), "occluded": min(args.occluded, len(keep)), "methods": {}}
    for name, heat, seconds in maps(network, faces[keep], label[keep], args.occluded):
        row["methods"][name] = judge(heat, corner[keep][:len(heat)]) | {"ms": round(1000 * seconds, 2)}
    row["captum"] = beside_captum(network, faces[keep][:8], label[keep][:8])
    return row


def beside_captum(network, faces, emotion):
    "Largest difference of our Grad-CAM from captum's; None where captum is not installed."
    if importlib.util.find_spec("captum") is None:
        return None
    import torch
    from captum.attr import LayerAttribution, LayerGradCam
    from fer_nbdev.interpret import default_layers, grad_cam
    layer = dict(network.model.named_modules())[default_layers(network, "gradcam")[0]]
    theirs = LayerGradCam(lambda x: network.model(x).log_softmax(1), layer).attribute(network.prepare(faces), torch.from_numpy(emotion), relu_attributions=True)
    theirs = LayerAttribution.interpolate(theirs, faces.shape[1:], "bilinear").detach()[:, 0].numpy()
    theirs /= np.maximum(theirs.max((1, 2), keepdims=True), np.finfo(np.float32).tiny)
    return float(abs(theirs - grad_cam(network, faces, emotion, method="gradcam")).max())


def faithful(run, data, args):
    "Deleted and kept probability of every method on PublicTest faces that the network gets right."
    import cv2
    from fer_nbdev.data import read_fer2013
    from fer_nbdev.interpret import open_network
    network, table = open_network(run), read_fer2013(data).split("PublicTest")
    table = table[np.random.default_rng(0).permutation(len(table))[:args.asked]]
    answer = network.predict_faces(table.pixels).argmax(1)
    faces, emotion = table.pixels[answer == table.emotion], answer[answer == table.emotion]
    blurred = np.stack([cv2.blur(f, (15, 15)) for f in faces])

    def judge_by_blur(heat):
        n = len(heat)
        rank = (-heat).reshape(n, -1).argsort(1, kind="stable").argsort(1, kind="stable").reshape(heat.shape)
        said = {"deleted": [], "kept": []}
        for share in SHARES:
            hot = rank < share * rank[0].size
            for key, keep_sharp in (("deleted", ~hot), ("kept", hot)):
                probs = network.predict_faces(np.where(keep_sharp, faces[:n], blurred[:n]))
                said[key].append(float(probs[np.arange(n), emotion[:n]].mean()))
        return {k: round(float(np.mean(v)), 4) for k, v in said.items()}

    rng, (yy, xx) = np.random.default_rng(0), np.indices((48, 48)) - 23.5
    blobs = np.stack([cv2.resize(rng.random((6, 6), np.float32), (48, 48)) for _ in faces])
    edges = abs(faces.astype(np.float32) - blurred)
    methods = {"random blobs": blobs, "the middle": np.broadcast_to(-(yy**2 + xx**2), faces.shape), "edges of the face": edges}
    rows = {name: judge_by_blur(heat) for name, heat in methods.items()}
    for name, heat, seconds in maps(network, faces, emotion, args.occluded):
        rows[name] = judge_by_blur(heat) | {"ms": round(1000 * seconds, 2)}
        if name == "default":  # what occlusion is to be compared with: the same faces
            rows["default, faces of occlusion"] = judge_by_blur(heat[:args.occluded])
    probs = network.predict_faces(faces)[np.arange(len(faces)), emotion].mean()
    return {"run": network.name, "faces": len(faces), "occluded": min(args.occluded, len(faces)), "probability": round(float(probs), 4), "methods": rows}


def main():
    from fer_nbdev.models import list_models
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="*", default=None, help="networks of the planted test (default: all of the registry)")
    parser.add_argument("--patterns", nargs="*", default=list(PATTERNS), choices=PATTERNS)
    parser.add_argument("--run", nargs="*", default=[], help="folders of runs for the second test")
    parser.add_argument("--data", help="FER2013 as csv or folders, for the second test")
    parser.add_argument("--faces", type=int, default=300, help="planted faces that train")
    parser.add_argument("--asked", type=int, default=150, help="faces that maps are made of, some of them without a pattern or answered wrongly, and left out")
    parser.add_argument("--occluded", type=int, default=32, help="of these, faces that occlusion is tried on")
    parser.add_argument("--out", help="write the result there instead of bench/results")
    args = parser.parse_args()
    if args.run and not args.data:
        parser.error("--run needs --data")
    if args.out:
        import _report
        _report.RESULTS = Path(args.out)
    found = {"planted": [], "faithful": []}
    for pattern in args.patterns:
        for arch in list_models() if args.archs is None else args.archs:
            found["planted"].append(planted(arch, pattern, args))
            row = found["planted"][-1]
            print(f"{pattern} {arch}: right on {row['accuracy']:.0%}; " + ", ".join(f"{k} {m['hits']:.0%}" for k, m in row["methods"].items()), flush=True)
    for run in args.run:
        found["faithful"].append(faithful(run, args.data, args))
        print(found["faithful"][-1], flush=True)
    report("class_maps", found, data=args.data and Path(args.data).name, shares=SHARES,
           arguments={k: v for k, v in vars(args).items() if k in ("faces", "asked", "occluded")})


if __name__ == "__main__":
    main()
