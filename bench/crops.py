"""Which crop does the classifier want? It learned from FER2013's faces, so the best crop is the one that frames as they do.

FER2013 has no photos, only faces of 48 x 48 pixels. So each is enlarged to 192 pixels, laid into a frame of 320 whose rest
repeats the face's edge, and found again by Haar and by YuNet. What their boxes cut out is classified by the bundled
`accurate` model, and so is the face's own frame, which no box can beat by much: same faces, same enlarging.

On PublicTest the square about a box is chosen: what its side follows (the box's width, its longer side or the root of its
area), by which factor, and how far it moves up or down. The log loss decides, which is smoother than the accuracy. Then
faces are tilted, to see what turning them by the eyes is worth. PrivateTest comes last, once, with the library's defaults.
"""
import argparse
import sys
from pathlib import Path

import numpy as np

import _report
from _report import report

FACTORS = (.8, .9, .95, 1., 1.05, 1.1, 1.15, 1.2, 1.3)
SHIFTS = (-.05, 0., .05)
TILTS = (0, 10, 20, 30, 40, 50)
RULES = {"area": lambda w, h: np.sqrt(w * h), "longer side": np.maximum, "width": lambda w, h: w}
EXAMPLES = """examples:
  python bench/crops.py --data fer2013.csv --yunet yunet.onnx                            the measurement, eight minutes of one core
  python bench/crops.py --data fer2013.csv --faces 100 --tilted 50 --private 100 --out /tmp     a quick try"""


def framed(face, side=192, frame=320):
    "A face of 48 x 48 pixels in the middle of a larger picture, uint8 [frame, frame, 3]"
    import cv2
    big, edge = cv2.resize(face, (side, side), interpolation=cv2.INTER_CUBIC), (frame - side) // 2
    return cv2.cvtColor(cv2.copyMakeBorder(big, edge, edge, edge, edge, cv2.BORDER_REPLICATE), cv2.COLOR_GRAY2RGB)


def tilted(image, degrees):
    import cv2
    middle = (image.shape[1] - 1) / 2, (image.shape[0] - 1) / 2
    return cv2.warpAffine(image, cv2.getRotationMatrix2D(middle, degrees, 1), image.shape[1::-1], borderMode=cv2.BORDER_REPLICATE)


def squares(xyxy, factor, shift=0., rule="area"):
    "Boxes [n, 4] -> squares as `Box`, cut off at the frame of 320"
    from fer_nbdev.core import Box
    sides = RULES[rule](*(xyxy[:, 2:] - xyxy[:, :2]).T) * factor
    centre = (xyxy[:, :2] + xyxy[:, 2:]) / 2 + np.stack([0 * sides, shift * sides], axis=1)
    corners = np.concatenate([centre - sides[:, None] / 2, centre + sides[:, None] / 2], axis=1)
    return [Box(*row) for row in np.clip(corners.round(), 0, 320).astype(int).tolist()]


def score(classifier, crops, labels):
    probs = classifier.predict_faces(crops)
    own = probs[np.arange(len(labels)), labels]
    return {"accuracy": float((probs.argmax(1) == labels).mean()), "log_loss": float(-np.log(np.maximum(own, 1e-9)).mean())}


def own_frame(faces):
    from fer_nbdev.detect import crop_faces
    return np.concatenate([crop_faces(framed(face), [(64, 64, 256, 256)]) for face in faces])


def largest(find, image):
    "The largest raw box of a detector, or None"
    found, _ = find(image)
    return max(found, key=lambda b: (b[2] - b[0]) * (b[3] - b[1])) if len(found) else None


def select(find, faces, labels, classifier):
    "Every rule, factor and shift on the faces that the detector finds"
    from fer_nbdev.detect import crop_faces
    boxes = [largest(find, framed(face)) for face in faces]
    kept = [i for i, box in enumerate(boxes) if box is not None]
    xyxy, faces, labels = np.array([boxes[i] for i in kept]), faces[kept], labels[kept]

    def sweep(**how):
        crops = np.concatenate([crop_faces(framed(face), [box]) for face, box in zip(faces, squares(xyxy, **how))])
        return {**how, **score(classifier, crops, labels)}

    square = np.allclose(xyxy[:, 2] - xyxy[:, 0], xyxy[:, 3] - xyxy[:, 1]) # then all rules are one
    rules = {rule: [sweep(factor=f, rule=rule) for f in FACTORS] for rule in (["area"] if square else RULES)}
    factors, rules = rules["area"], {rule: min(rows, key=lambda r: r["log_loss"]) for rule, rows in rules.items()}
    best = rules["area"]
    shifts = [best if s == 0 else sweep(factor=best["factor"], shift=s) for s in SHIFTS]
    return {"found": len(kept) / len(boxes), "own_frame": score(classifier, own_frame(faces), labels), "factors": factors, "rules": rules, "shifts": shifts,
            "chosen": {"factor": best["factor"], "shift": min(shifts, key=lambda r: r["log_loss"]).get("shift", 0.)}}


def turning(model, faces, labels, classifier):
    "Upright and turned crops of tilted faces"
    from fer_nbdev.detect import crop_faces, detect_faces
    rows = []
    for degrees in TILTS:
        upright, turned, of = [], [], []
        for face, label in zip(faces, labels):
            image = tilted(framed(face), degrees)
            boxes, eyes = detect_faces(image, model, return_eyes=True)
            if boxes:
                upright.append(crop_faces(image, boxes[:1])), turned.append(crop_faces(image, boxes[:1], eyes=eyes[:1])), of.append(label)
        of = np.array(of)
        rows.append({"degrees": degrees, "found": len(of) / len(faces), "upright": score(classifier, np.concatenate(upright), of),
                     "turned": score(classifier, np.concatenate(turned), of)})
    return rows


def final(detector, faces, labels, classifier):
    "The library's defaults, from the enlarged face to the label"
    from fer_nbdev.detect import crop_faces, detect_faces
    crops, kept = [], []
    for i, face in enumerate(faces):
        image = framed(face)
        boxes = detect_faces(image, detector)
        if boxes:
            crops.append(crop_faces(image, boxes[:1])), kept.append(i)
    return {"found": len(kept) / len(faces), "own_frame": score(classifier, own_frame(faces[kept]), labels[kept]),
            "crop": score(classifier, np.concatenate(crops), labels[kept])}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="PATH", help="FER2013: its csv or class folders")
    parser.add_argument("--yunet", type=Path, metavar="FILE",
                        help="a YuNet model (default: the one that find_yunet() finds; without one only Haar is measured)")
    parser.add_argument("--faces", type=int, default=1500, metavar="N", help="PublicTest faces to choose on (default: %(default)s)")
    parser.add_argument("--tilted", type=int, default=400, metavar="N", help="PublicTest faces to tilt (default: %(default)s)")
    parser.add_argument("--private", type=int, metavar="N", help="PrivateTest faces to report (default: all)")
    parser.add_argument("--out", type=Path, default=_report.RESULTS, metavar="FOLDER", help="where crops.json is written (default: bench/results)")
    args = parser.parse_args()
    if not args.data.exists():
        parser.error(f"no data at {args.data}")
    return args


def main():
    args = parse_args()
    from functools import partial
    from fer_nbdev import Predictor
    from fer_nbdev.data import read_fer2013
    from fer_nbdev.detect import _DETECTORS, find_yunet
    _report.RESULTS = args.out
    table, classifier, model = read_fer2013(args.data), Predictor("accurate"), args.yunet or find_yunet()
    public, private = table.split("PublicTest"), table.split("PrivateTest")
    detectors = {"haar": "haar", **({"yunet": model} if model else {})}
    results = {"faces": len(public[:args.faces]), "tilted": len(public[:args.tilted]), "private_faces": len(private[:args.private]),
               "defaults": {name: _DETECTORS[name][1] for name in detectors}, "public": {}, "private": {}}
    for name in detectors:
        print(name, file=sys.stderr)
        find = partial(_DETECTORS[name][0], model=model)
        results["public"][name] = select(find, public.pixels[:args.faces], public.emotion[:args.faces], classifier)
    if model:
        results["tilts"] = turning(model, public.pixels[:args.tilted], public.emotion[:args.tilted], classifier)
    for name, detector in detectors.items():
        results["private"][name] = final(detector, private.pixels[:args.private], private.emotion[:args.private], classifier)
    figures = [f"{name} finds {r['found']:.1%} of the faces and is right on {r['crop']['accuracy']:.1%} of those, "
               f"{r['found'] * r['crop']['accuracy']:.1%} of all; FER2013's own frame is right on {r['own_frame']['accuracy']:.1%} of those"
               for name, r in results["private"].items()]
    report("crops", results, question="What accuracy is left when the face has to be found first?", answer="on PrivateTest, enlarged: " + "; ".join(figures),
           data={"source": args.data.name}, model="accurate", yunet=model.name if model else None,
           command=f"python bench/crops.py --data {args.data.name}" + (f" --yunet {args.yunet.name}" if args.yunet else ""))


if __name__ == "__main__":
    main()
