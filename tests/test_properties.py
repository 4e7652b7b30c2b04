"""What holds for every input, not only for the examples: boxes and crops, labels and splits, duplicates, predictions, tracks.

Hypothesis draws the inputs, the same ones on every run; where there is a second way to say what should come out, it is said here,
plainly and slowly."""
import json
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, assume, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from hypothesis.extra import numpy as hnp  # noqa: E402

import fer_nbdev.inference as inference  # noqa: E402
from fer_nbdev.core import EMOTIONS, UNCERTAIN, Box, Prediction, _upright, read_image  # noqa: E402
from fer_nbdev.data import (FER2013, USAGES, class_counts, draw_per_class, find_duplicates, read_fer2013,  # noqa: E402
                            select_classes, split_names, synthetic_faces, to_folders)
from fer_nbdev.detect import _distinct, check_boxes, crop_faces, detect_faces  # noqa: E402
from fer_nbdev.track import FaceTracker, assign  # noqa: E402
from fer_nbdev.votes import FERPlus, soft_labels  # noqa: E402

cv2 = pytest.importorskip("cv2")
COMMON = dict(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
often, seldom = settings(max_examples=120, **COMMON), settings(max_examples=25, **COMMON)
BAD = [math.nan, math.inf, -math.inf]


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@st.composite
def boxed(draw, least=1, most=90, n=6):
    "An image and boxes inside it."
    height, width = draw(st.integers(least, most)), draw(st.integers(least, most))
    boxes = []
    for _ in range(draw(st.integers(1, n))):
        x0, y0 = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
        boxes.append((x0, y0, draw(st.integers(x0 + 1, width)), draw(st.integers(y0 + 1, height))))
    return noise(height, width, draw(st.integers(0, 9))), boxes


# ------------------------------------------------------------------------------------------------ boxes

@given(boxed())
@often
def test_boxes_inside_the_image_come_back_as_they_are_in_both_formats(case):
    image, boxes = case
    checked = check_boxes(boxes, image)
    assert checked == [Box(*b) for b in boxes] and all(type(v) is int for b in checked for v in b)
    assert check_boxes([(x0, y0, x1 - x0, y1 - y0) for x0, y0, x1, y1 in boxes], image, "xywh") == checked
    assert check_boxes(np.array(boxes, np.float32), image) == checked == check_boxes(checked, image)
    for b in checked: assert image[b.y0:b.y1, b.x0:b.x1].shape[:2] == (b.height, b.width) and b.area == b.width * b.height > 0


@given(boxed(), st.integers(0, 3), st.sampled_from(BAD + [-1, -3, 1e30, -1e30, 10**6]))
@often
def test_boxes_with_a_value_that_cannot_be_are_refused(case, at, value):
    image, boxes = case
    bad = [list(map(float, boxes[0]))]
    bad[0][at] = value
    with pytest.raises(ValueError, match="box"), np.errstate(invalid="ignore"): check_boxes(bad, image)
    with pytest.raises(ValueError, match="box"), np.errstate(invalid="ignore"): crop_faces(image, bad)


@given(st.lists(st.tuples(*[st.floats(allow_nan=True, allow_infinity=True)] * 4), min_size=1, max_size=4), st.sampled_from(["xyxy", "xywh"]))
@often
def test_any_four_numbers_are_boxes_inside_or_an_error(boxes, box_format):
    image = noise(40, 60)
    try:
        with np.errstate(all="ignore"): found = check_boxes(boxes, image, box_format)
    except ValueError as e: assert "box" in str(e)
    else: assert all(0 <= b.x0 < b.x1 <= 60 and 0 <= b.y0 < b.y1 <= 40 for b in found) and len(found) == len(boxes)


# ------------------------------------------------------------------------------------------------ crops

def plain_crop(image, box, size, margin):
    "The crop, as the documentation says it: a square around the box, moved and if need be shrunk to lie inside the image, gray, resized."
    height, width = image.shape[:2]
    side = min(max(1, round(max(box[2] - box[0], box[3] - box[1]) * (1 + 2 * margin))), height, width)
    x0, y0 = round((box[0] + box[2] - side) / 2), round((box[1] + box[3] - side) / 2)
    while x0 < 0: x0 += 1
    while y0 < 0: y0 += 1
    while x0 + side > width: x0 -= 1
    while y0 + side > height: y0 -= 1
    part = np.empty((side, side, 3), np.uint8)
    for y in range(side):
        for x in range(side): part[y, x] = image[y0 + y, x0 + x]
    gray = cv2.cvtColor(part, cv2.COLOR_RGB2GRAY)
    return gray if side == size else cv2.resize(gray, (size, size), interpolation=cv2.INTER_AREA if side > size else cv2.INTER_LINEAR)


@given(boxed(most=60, n=3), st.integers(1, 50), st.sampled_from([0., .1, -.2, .5, 3.]))
@often
def test_crops_are_what_the_documentation_says(case, size, margin):
    image, boxes = case
    faces = crop_faces(image, boxes, size, margin)
    assert faces.shape == (len(boxes), size, size) and faces.dtype == np.uint8
    for face, box in zip(faces, boxes): assert (face == plain_crop(image, box, size, margin)).all()


@given(boxed(most=60, n=3), st.integers(1, 60), st.integers(0, 59), st.integers(0, 59))
@often
def test_crops_do_not_depend_on_what_lies_far_away(case, size, dx, dy):
    "Nor on where in the picture they are, as long as their square fits; and a picture is not changed by cropping."
    image, boxes = case
    size_before = image.copy()
    fits = [b for b in boxes if plain_inside(b, image.shape)]
    assume(fits)
    larger = noise(image.shape[0] + 60, image.shape[1] + 60, 1)
    larger[dy:dy + image.shape[0], dx:dx + image.shape[1]] = image
    moved = [(x0 + dx, y0 + dy, x1 + dx, y1 + dy) for x0, y0, x1, y1 in fits]
    # half pixels round to even, so a box of odd sum moves by up to one pixel; those of even sum do not
    even = [i for i, b in enumerate(fits) if not any((b[k] + b[k + 2] - max(b[2] - b[0], b[3] - b[1])) % 2 for k in (0, 1))]
    assume(even)
    assert (crop_faces(image, [fits[i] for i in even], size) == crop_faces(larger, [moved[i] for i in even], size)).all()
    assert (image == size_before).all()


def plain_inside(box, shape):
    "Whether the square around a box lies in the image without being moved or shrunk."
    side = max(box[2] - box[0], box[3] - box[1])
    x0, y0 = round((box[0] + box[2] - side) / 2), round((box[1] + box[3] - side) / 2)
    return 0 <= x0 and 0 <= y0 and x0 + side <= shape[1] and y0 + side <= shape[0]


@given(st.integers(0, 30), st.integers(0, 30), st.integers(16, 30), st.integers(2, 4), st.sampled_from([8, 16]))
@often
def test_a_picture_enlarged_by_a_whole_factor_gives_nearly_the_same_crop(x0, y0, side, factor, size):
    smooth = cv2.GaussianBlur(noise(60, 60, side), (0, 0), 4)
    large, box = np.repeat(np.repeat(smooth, factor, 0), factor, 1), (x0, y0, x0 + side, y0 + side)
    a, b = crop_faces(smooth, [box], size), crop_faces(large, [tuple(factor * v for v in box)], size)
    assert np.abs(a.astype(int) - b).max() <= 2


@pytest.mark.parametrize("size", [0, -1, 48.5, 48., math.inf, math.nan, "48", None, True])
def test_sizes_of_crops_that_cannot_be_are_refused(size):
    with pytest.raises(ValueError, match="size must be a whole number"): crop_faces(noise(20, 20), [(0, 0, 9, 9)], size)


@pytest.mark.parametrize("option", [dict(scale_factor=v) for v in (1, 10.1, 1e9, *BAD)]
                         + [dict(min_neighbors=v) for v in (-1, 2.5, 1001, 1e300, *BAD)], ids=str)
def test_settings_of_haar_that_cannot_be_are_refused(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} must be"): detect_faces(noise(60, 60), "haar", **option)


def test_the_home_folder_of_a_detector(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="gone.onnx") as said: detect_faces(noise(60, 60), "~/gone.onnx")
    assert repr(str(tmp_path))[1:-1] in str(said.value)


@given(boxed(n=3), st.sampled_from(BAD + [-.5, -1, 10, 11]))
@often
def test_margins_that_cannot_be_are_refused(case, margin):
    with pytest.raises(ValueError, match="margin"): crop_faces(*case, margin=margin)


@given(boxed(least=12, n=4), st.lists(st.one_of(st.floats(-50, 150), st.sampled_from(BAD)), min_size=16, max_size=16))
@often
def test_any_eyes_give_a_face(case, numbers):
    "Not known (NaN), level, in one spot or outside of the picture: what comes out is a face, and level or unknown eyes turn nothing."
    image, boxes = case
    eyes = np.array(numbers[:4 * len(boxes)], float).reshape(-1, 2, 2)
    with np.errstate(invalid="ignore"): faces = crop_faces(image, boxes, 24, eyes=eyes)
    assert faces.shape == (len(boxes), 24, 24)
    level = np.tile([[10., 5.], [20., 5.]], (len(boxes), 1, 1))
    unknown = np.full((len(boxes), 2, 2), np.nan)
    assert (crop_faces(image, boxes, 24, eyes=level) == crop_faces(image, boxes, 24)).all()
    assert (crop_faces(image, boxes, 24, eyes=unknown) == crop_faces(image, boxes, 24)).all()


@given(st.floats(-170, 170), st.integers(0, 20))
@seldom
def test_alignment_undoes_a_turn(angle, seed):
    "A pattern is turned about its middle by any angle: aligned by its eyes it is cut out as it was before."
    soft = cv2.GaussianBlur(noise(240, 240, seed), (0, 0), 9)
    soft = cv2.normalize(soft, None, 0, 255, cv2.NORM_MINMAX)
    turn = cv2.getRotationMatrix2D((119.5, 119.5), -angle, 1.)  # pixel centres: the middle of the box is at 120 edges, 119.5 centres
    turned = cv2.warpAffine(soft, turn, (240, 240), borderMode=cv2.BORDER_REFLECT)
    a = math.radians(angle)
    eyes = [[[120 - 15 * math.cos(a), 120 - 15 * math.sin(a)], [120 + 15 * math.cos(a), 120 + 15 * math.sin(a)]]]
    before, after = crop_faces(soft, [(80, 80, 160, 160)]), crop_faces(turned, [(80, 80, 160, 160)], eyes=eyes)
    assert np.abs(before.astype(int) - after).mean() < 2.5


@given(st.lists(st.tuples(st.integers(-30, 60), st.integers(-30, 60), st.integers(-5, 50), st.integers(-5, 50)), max_size=7), st.randoms(use_true_random=False))
@often
def test_a_detector_may_say_what_it_likes(raw, rng):
    "Boxes are cut off at the edges; those that come out lie inside, are sorted by size, overlap little, and do not depend on the order they were found in."
    image = noise(48, 50)
    found = [(x, y, x + w, y + h) for x, y, w, h in raw]
    try: boxes = detect_faces(image, lambda picture: found)
    except ValueError as e:
        assert "box" in str(e)
        return
    assert all(0 <= b.x0 < b.x1 <= 50 and 0 <= b.y0 < b.y1 <= 48 for b in boxes) and [b.area for b in boxes] == sorted((b.area for b in boxes), reverse=True)
    shuffled = found[:]
    rng.shuffle(shuffled)
    assert detect_faces(image, lambda picture: shuffled) == boxes
    kept = np.array([found[i] for i in _distinct(np.array(found, float).reshape(-1, 4))]).reshape(-1, 4)
    for i, a in enumerate(kept):
        for b in kept[:i]:
            shared = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
            area = (a[2] - a[0]) * (a[3] - a[1])
            assert shared <= .3 * area + 1e-9


@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=7)), st.integers(1, 8))
@often
def test_turning_upright_keeps_every_pixel(pixels, orientation):
    up = _upright(pixels, orientation)
    assert sorted(up.ravel().tolist()) == sorted(pixels.ravel().tolist()) and up.shape[:2] == (pixels.shape[:2] if orientation < 5 else pixels.shape[1::-1])
    back = {6: 8, 8: 6}.get(orientation, orientation)
    assert (_upright(up, back) == pixels).all()


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3, 4]))))
@often
def test_arrays_are_read_alike_whatever_their_layout(pixels):
    found = read_image(pixels)
    assert found.shape == (*pixels.shape[:2], 3) and found.dtype == np.uint8
    for other in (np.asfortranarray(pixels), pixels[::-1][::-1], np.repeat(pixels, 2, 0)[::2]): assert (read_image(other) == found).all()
    if pixels.shape[2] == 4:  # on white, by the definition
        a = pixels[..., 3:] / 255
        assert np.abs(found - (pixels[..., :3] * a + 255 * (1 - a))).max() <= .5 + 1e-9


# ------------------------------------------------------------------------------------------------ labels and splits

@st.composite
def tables(draw, most=60):
    "A small table; its pixels say which row it was."
    n = draw(st.integers(1, most))
    classes = tuple(draw(st.permutations(EMOTIONS)))[:draw(st.integers(2, 7))]
    emotion = np.array(draw(st.lists(st.integers(0, len(classes) - 1), min_size=n, max_size=n)))
    usage = np.array(draw(st.lists(st.sampled_from(USAGES), min_size=n, max_size=n)))
    pixels = np.zeros((n, 48, 48), np.uint8)
    pixels[:, 0, 0] = np.arange(n)
    soft = None
    if draw(st.booleans()):
        soft = np.random.default_rng(n).random((n, len(classes))).astype(np.float32) ** 3
        soft /= soft.sum(1, keepdims=True)
    return FER2013(pixels, emotion, usage, classes, "drawn", soft)


def numbers(table): return table.pixels[:, 0, 0].astype(int).tolist()


@given(tables(), st.data())
@often
def test_selected_classes_keep_their_faces(table, data):
    wanted = tuple(data.draw(st.permutations(table.classes)))[:data.draw(st.integers(1, len(table.classes)))]
    part = select_classes(table, wanted)
    rows = [i for i in range(len(table)) if table.labels[i] in wanted]
    assert numbers(part) == rows and part.labels == [table.labels[i] for i in rows]
    assert part.usage.tolist() == table.usage[rows].tolist() and part.classes == wanted
    if part.soft is not None:
        for i, row in enumerate(rows):
            shares = [float(table.soft[row, table.classes.index(c)]) for c in wanted]
            assert np.allclose(part.soft[i], np.array(shares) / sum(shares) if sum(shares) > 0 else np.eye(len(wanted))[part.emotion[i]], atol=1e-5)
    everything = select_classes(select_classes(table, tuple(reversed(table.classes))), table.classes)
    assert numbers(everything) == numbers(table) and everything.emotion.tolist() == table.emotion.tolist()
    with pytest.raises(ValueError): select_classes(table, (*wanted, "bored"))
    with pytest.raises(ValueError): select_classes(table, (wanted[0], wanted[0]))


@given(tables())
@often
def test_splits_are_disjoint_and_complete(table):
    parts = [numbers(table.split(u)) for u in USAGES]
    assert sorted(sum(parts, [])) == numbers(table) and sum(map(len, parts)) == len(table)
    assert numbers(table.split("public+private")) == sorted(parts[1] + parts[2]) and numbers(table.split("Training+PublicTest+PrivateTest")) == numbers(table)
    counts = class_counts(table)
    assert sum(n for by_class in counts.values() for n in by_class.values()) == len(table)
    for usage, by_class in counts.items(): assert by_class == {c: sum(t == c for t in table.split(usage).labels) for c in table.classes}


@given(st.text(max_size=20))
@often
def test_split_names_are_known_or_refused(text):
    try: names = split_names(text)
    except ValueError as e: assert "unknown split" in str(e)
    else: assert names and set(names) <= set(USAGES) and split_names("+".join(names)) == names


@given(tables(most=90), st.integers(1, 4), st.integers(0, 5))
@often
def test_drawn_rows_are_so_many_of_each_class_and_the_same_for_a_seed(table, n, seed):
    have = class_counts(table).get("Training", {})
    try: part = draw_per_class(table, {"Training": n}, seed)
    except ValueError: assert min(have.get(c, 0) for c in table.classes) < n
    else:
        assert class_counts(part) == {"Training": dict.fromkeys(table.classes, n)} and len(set(numbers(part))) == len(part) == n * len(table.classes)
        assert numbers(part) == sorted(numbers(part)) == numbers(draw_per_class(table, {"Training": n}, seed))


@given(tables(most=80), st.sampled_from([.1, .25, .5, .9]), st.integers(0, 3))
@seldom
def test_a_random_validation_share_is_disjoint_complete_stratified_and_seeded(table, share, seed):
    pytest.importorskip("fastai")
    from fer_nbdev.loaders import FERSplitter, table_rows
    rows = table_rows(table)
    training = [i for i, r in enumerate(rows) if r.usage == "Training"]
    try: train, valid = FERSplitter(share, seed=seed)(rows)
    except ValueError: return
    train, valid = list(train), list(valid)
    assert not set(train) & set(valid) and sorted(train + valid) == training
    for c in range(len(table.classes)):
        of_class = [i for i in training if table.emotion[i] == c]
        assert abs(len(set(of_class) & set(valid)) - share * len(of_class)) <= 1
    again = FERSplitter(share, seed=seed)(rows)
    assert [list(again[0]), list(again[1])] == [train, valid]


@given(st.integers(2, 5), st.integers(0, 3), st.integers(0, 40))
@seldom
def test_folds_are_disjoint_complete_and_stratified(k, seed, more):
    pytest.importorskip("fastai")
    from fer_nbdev.train import fold_tables
    n = 7 * k + more
    pixels = np.zeros((n, 48, 48), np.uint8)
    pixels[:, 0, 0] = np.arange(n)
    table = FER2013(pixels, np.arange(n) % 7, np.array(["Training"] * n))
    folds = fold_tables(table, k, seed)
    held = [numbers(f.split("PublicTest")) for f in folds]
    assert sorted(sum(held, [])) == list(range(n)) and all(len(f) == n for f in folds)
    for fold in folds:
        counts = class_counts(fold)["PublicTest"]
        assert max(counts.values()) - min(counts.values()) <= 2
    assert [numbers(f.split("PublicTest")) for f in fold_tables(table, k, seed)] == held


@given(tables(most=25))
@seldom
def test_folders_and_back_keep_faces_labels_and_splits(table):
    import tempfile
    with tempfile.TemporaryDirectory() as folder: back = read_fer2013(to_folders(table, f"{folder}/faces"))
    assert sorted(zip(numbers(back), back.labels, back.usage.tolist())) == sorted(zip(numbers(table), table.labels, table.usage.tolist()))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.data())
@often
def test_duplicates_are_what_comparing_all_pairs_finds(ids, data):
    n = len(ids)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 48, 48), dtype=np.uint8)[ids]
    emotion = np.array(data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n)))
    usage = np.array(data.draw(st.lists(st.sampled_from(USAGES), min_size=n, max_size=n)))
    d = find_duplicates(FER2013(pixels, emotion, usage))
    first = [next(j for j in range(n) if ids[j] == ids[i]) for i in range(n)]
    assert d.first.tolist() == first and d.copies.tolist() == [f != i for i, f in enumerate(first)]
    groups = [[i for i in range(n) if ids[i] == v] for v in dict.fromkeys(ids)]
    assert sorted(d.groups) == sorted(g for g in groups if len(g) > 1)
    assert sorted(d.conflicts) == sorted(g for g in groups if len({int(emotion[i]) for i in g}) > 1)
    leaks = [usage[i] == "PrivateTest" and any(usage[j] == "Training" and ids[j] == ids[i] for j in range(n)) for i in range(n)]
    assert d.leaks().tolist() == leaks


def test_leaks_are_asked_for_by_any_name_of_a_split_or_several():
    table = synthetic_faces(70)
    table.usage[:] = ["Training"] * 50 + ["PublicTest"] * 10 + ["PrivateTest"] * 10
    table.pixels[50:53], table.pixels[60:65] = table.pixels[:3], table.pixels[5:10]
    found = find_duplicates(table)
    assert [int(found.leaks(*asked).sum()) for asked in [(), ("private", "train"), ("public",), ("public+private",), ("private", "public")]] == [5, 5, 3, 8, 0]
    with pytest.raises(ValueError, match="unknown split 'nonsense'"):
        found.leaks("nonsense")
    with pytest.raises(ValueError, match="unknown split 'Foo'"):
        replace(table, usage=np.full(70, "Foo"))


@given(st.lists(st.lists(st.integers(0, 10), min_size=10, max_size=10), min_size=1, max_size=12), st.data())
@often
def test_soft_labels_are_shares_of_the_votes(votes, data):
    n = len(votes)
    classes = tuple(data.draw(st.permutations(EMOTIONS)))[:data.draw(st.integers(2, 7))]
    emotion = np.array(data.draw(st.lists(st.integers(0, len(classes) - 1), min_size=n, max_size=n)))
    usage = np.array(["Training"] * n)
    table = soft_labels(FER2013(np.zeros((n, 48, 48), np.uint8), emotion, usage, classes), FERPlus(np.array(votes, np.uint8), usage, np.zeros(n, bool)))
    place = dict(neutral=0, happy=1, surprise=2, sad=3, angry=4, disgust=5, fear=6)  # columns of FER+
    for i in range(n):
        mine = [votes[i][place[c]] for c in classes]
        expected = [v / sum(mine) for v in mine] if sum(mine) else [float(k == emotion[i]) for k in range(len(classes))]
        assert np.allclose(table.soft[i], expected, atol=1e-6)


# ------------------------------------------------------------------------------------------------ predictions

probabilities = (st.lists(st.floats(0, 1, width=32), min_size=2, max_size=9).filter(lambda v: sum(v) > 0)
                 .map(lambda v: (np.array(v, np.float64) / sum(v)).astype(np.float32)))


@given(probabilities, st.floats(0, 1))
@often
def test_a_prediction_says_what_its_probabilities_say(probs, least):
    classes = [f"class {i}" for i in range(len(probs))]
    p = inference._prediction(probs, classes, Box(1, 2, 30, 40), least)
    assert list(p.probs) == classes and np.allclose(list(p.probs.values()), probs) and abs(sum(p.probs.values()) - 1) < 1e-5
    best = max(range(len(probs)), key=lambda i: (probs[i], -i))
    assert p.confidence == p.probs[classes[best]] == max(p.probs.values()) and p.emotion == (classes[best] if p.confidence >= least else UNCERTAIN)
    ranked = p.top_k(len(probs) + 3)
    assert sorted(ranked) == sorted(p.probs.items()) and [v for _, v in ranked] == sorted(p.probs.values(), reverse=True) and ranked[0][0] == classes[best]
    for k in range(1, len(probs)): assert p.top_k(k) == ranked[:k]
    assert json.loads(json.dumps(p.to_dict())) == p.to_dict() and pickle.loads(pickle.dumps(p)) == p
    assert Prediction(**(p.to_dict() | dict(box=Box(*p.to_dict()["box"])))) == p and p.emotion in str(p)


@given(st.integers(0, 40), st.integers(0, 5), st.booleans())
@seldom
def test_probabilities_sum_to_one_and_do_not_depend_on_the_company(n, seed, tta):
    pytest.importorskip("onnxruntime")
    faces = np.random.default_rng(seed).integers(0, 256, (n, 48, 48), dtype=np.uint8)
    model = inference.Predictor("fast", threads=1, tta=tta)
    probs = model.predict_faces(faces)
    assert probs.shape == (n, len(model.classes)) and probs.dtype == np.float32 and np.isfinite(probs).all() and (probs >= 0).all()
    assert np.allclose(probs.sum(1), 1, atol=1e-5) and np.allclose(model.predict_faces(faces[::-1])[::-1], probs, atol=1e-5)
    for i in range(0, n, 13): assert np.allclose(model.predict_faces(faces[i:i + 1])[0], probs[i], atol=1e-5)


# ------------------------------------------------------------------------------------------------ tracks

@given(hnp.arrays(np.float64, st.tuples(st.integers(0, 5), st.integers(0, 5)), elements=st.one_of(st.floats(0, 100), st.just(math.inf))))
@often
def test_assignments_pair_as_many_as_can_be_at_the_least_cost(cost):
    "Against trying all of them."
    from itertools import combinations, permutations
    n, m = cost.shape
    def all_of_size(k): return ([*zip(rows, columns)] for rows in combinations(range(n), k) for columns in permutations(range(m), k))
    pairs = assign(cost)
    assert len({i for i, _ in pairs}) == len({j for _, j in pairs}) == len(pairs) and all(np.isfinite(cost[i, j]) for i, j in pairs)
    for k in range(min(n, m), -1, -1):
        sums = [sum(cost[i, j] for i, j in some) for some in all_of_size(k) if all(np.isfinite(cost[i, j]) for i, j in some)]
        if sums: break
    assert len(pairs) == k and abs(sum(cost[i, j] for i, j in pairs) - min(sums)) < 1e-6


boxes_of_a_frame = st.lists(st.tuples(st.integers(0, 900), st.integers(0, 900), st.integers(5, 150), st.integers(5, 150)), max_size=6).map(
    lambda found: [(x, y, x + w, y + h) for x, y, w, h in found])
videos = st.lists(st.tuples(st.sampled_from([.04, .04, .2, 1., 3.]), boxes_of_a_frame), min_size=1, max_size=25)


def follow(tracker, video, order=None):
    time, seen = 0., []
    for gap, boxes in video:
        time += gap
        seen.append(tracker.update(boxes if order is None else order(boxes), time))
    return seen


@given(videos, st.randoms(use_true_random=False), st.integers(1, 3))
@often
def test_tracks_keep_their_rules(video, rng, min_hits):
    tracker = FaceTracker(min_hits=min_hits)
    seen = follow(tracker, video)
    numbers_seen, alive, gone = [], set(), set()
    for frame in seen:
        assert all(isinstance(i, int) and i >= 1 for i in frame)
        new = set(frame) - set(numbers_seen)
        assert all(i > max(numbers_seen, default=0) for i in new), "a new face gets a new number"
        numbers_seen += sorted(new)
        assert len(frame) == len(set(frame))
        for b in frame.values(): assert b.x1 > b.x0 and b.y1 > b.y0
    assert sorted(set(numbers_seen)) == list(range(1, len(set(numbers_seen)) + 1)), "numbers are given without gaps"
    time = 0.
    tracker = FaceTracker(min_hits=min_hits)
    for gap, boxes in video:  # what has not been seen for max_age never comes back, and nothing piles up
        before, time = {t.id: t.seen for t in tracker._tracks if t.id}, time + gap
        frame = tracker.update(boxes, time)
        gone |= {i for i, at in before.items() if i not in {t.id for t in tracker._tracks}}
        assert not gone & set(frame) and not gone & {t.id for t in tracker._tracks}
        assert len(tracker._tracks) <= sum(len(b) for _, b in video) and all(time - t.seen <= tracker.max_age for t in tracker._tracks)
        alive |= set(frame)
    assert alive == set(numbers_seen)
    assert follow(FaceTracker(min_hits=min_hits), video) == seen, "the same video gives the same tracks"


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=6, unique=True), st.randoms(use_true_random=False), st.integers(0, 1000))
@often
def test_the_order_of_detections_does_not_matter(places, rng, seed):
    "Faces that stand apart and move a little: whoever is named first in a frame, each keeps its number."
    noises = np.random.default_rng(seed).integers(-4, 5, (12, len(places), 2))
    video = [(.04, [(300 * x + dx, 300 * y + dy, 300 * x + dx + 100, 300 * y + dy + 100) for (x, y), (dx, dy) in zip(places, frame)])
             for frame in noises.tolist()]
    def shuffled(boxes):
        boxes = boxes[:]
        rng.shuffle(boxes)
        return boxes
    plain, mixed = follow(FaceTracker(), video), follow(FaceTracker(), video, shuffled)
    assert [sorted(frame.values()) for frame in plain] == [sorted(frame.values()) for frame in mixed]
    assert set(plain[-1]) == set(mixed[-1]) == set(range(1, len(places) + 1)) and all(set(f) in (set(), set(plain[-1])) for f in mixed)
    for number in mixed[-1]:  # one number, one place
        assert len({(round(f[number].x0 / 300), round(f[number].y0 / 300)) for f in mixed if number in f}) == 1


@given(st.sampled_from(BAD), st.integers(0, 3))
@often
def test_trackers_refuse_what_is_no_box_and_no_time(bad, at):
    box = [0., 0., 50., 50.]
    box[at] = bad
    tracker = FaceTracker()
    with pytest.raises(ValueError): tracker.update([tuple(box)], 1.)
    assert tracker.update([(0, 0, 50, 50)], 1.) == {} and 1 in tracker.update([(0, 0, 50, 50)], 1.04), "the refused frame left nothing behind"
    with pytest.raises(ValueError): tracker.update([], bad)
    with pytest.raises(ValueError): tracker.update([], 1.04)
    for name in ("max_age", "coast", "min_hits", "max_distance"):
        with pytest.raises(ValueError): FaceTracker(**{name: bad})
