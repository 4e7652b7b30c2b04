"""One contestant of `peers.py` at work, inside its own environment, where nothing else of this project can be imported.

    ENVIRONMENT/bin/python bench/_contestants.py ACTION SETTINGS

SETTINGS is JSON: the contestant's class and options, and what the action needs. The last line printed is the result, as JSON.

A class a library. `ways(faces)` gives the ways to get from faces to probabilities, each with the call in words: `answer` is
the library's own path from an image and its boxes to labelled results, `faces` from crops to an array, and `bare` the graph
alone with the resize it needs. `probs` is what the accuracy is counted on, `photo` what a user calls with a picture.
"""
import json
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np

SIDE = 48  # FER2013's faces


def mosaic(faces):
    "Gray faces as one colour image, eight in a row, and their corners (x, y) in it."
    rows = -(-len(faces) // 8)
    image = np.zeros((rows * SIDE, min(8, len(faces)) * SIDE, 3), np.uint8)
    corners = [(i % 8 * SIDE, i // 8 * SIDE) for i in range(len(faces))]
    for (x, y), face in zip(corners, faces):
        image[y:y + SIDE, x:x + SIDE] = face[..., None]
    return image, corners


class FerNbdev:
    "Ours, from a plain install."

    calls = {"probs": "Predictor(model).predict_faces(faces)", "photo": "Predictor(model, detector=...).predict(path)"}

    def __init__(self, model="accurate", detector="none", threads=None):
        import fer_nbdev
        self.predictor = fer_nbdev.Predictor(model, detector=detector, threads=threads)
        self.graph, self.threads = Path(fer_nbdev.__file__).parent / "weights" / model / "model.onnx", threads

    def ways(self, faces):
        import onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        session = onnxruntime.InferenceSession(str(self.graph), options, providers=["CPUExecutionProvider"])
        image, corners = mosaic(faces)
        boxes = [(x, y, x + SIDE, y + SIDE) for x, y in corners]
        return {"answer": ("Predictor.predict(image, boxes=boxes)", lambda: self.predictor.predict(image, boxes=boxes)),
                "faces": ("Predictor.predict_faces(faces)", lambda: self.predictor.predict_faces(faces)),
                "bare": ("onnxruntime's InferenceSession.run on the model's file", lambda: session.run(["probs"], {"faces": faces}))}

    def probs(self, faces):
        return self.predictor.predict_faces(faces)

    def labels(self, faces):
        found = self.predictor.predict_batch(list(faces))  # by the detector "none": the whole image is a face
        return [self.predictor.classes.index(face.emotion) for face, in found]

    def photo(self, path):
        found = self.predictor.predict(path)
        return {"faces": len(found), "emotion": found[0].emotion if found else None}


class Fer:
    """`fer`: gray, resized to 64 x 64 by cv2.resize, scaled to -1..1, one face at a time.

    Its probabilities come rounded to two digits; accuracy is counted on them as they are before that. `offsets` are pixels
    that it adds around a box: none for a face that is cut out already, its default of ten for a photo."""

    calls = {"probs": "FER()._classify_emotions(faces), after the resize and scaling of FER.detect_emotions",
             "photo": "FER(mtcnn=...).detect_emotions(path)"}

    def __init__(self, mtcnn=False, tflite=True, cut_out=False):
        from fer.fer import FER
        self.tflite, self.fer = tflite, FER(mtcnn=mtcnn, use_tflite=tflite, **({"offsets": (0, 0)} if cut_out else {}))

    @staticmethod
    def prepared(faces):
        "What detect_emotions does with crops: float32 [n, 64, 64]."
        import cv2
        return (np.array([cv2.resize(face, (64, 64)) for face in faces], np.float32) / 255. - .5) * 2.

    def ways(self, faces):
        image, corners = mosaic(faces)
        boxes = [(x, y, SIDE, SIDE) for x, y in corners]
        ways = {"answer": ("FER(offsets=(0, 0)).detect_emotions(image, face_rectangles=boxes)",
                           lambda: self.fer.detect_emotions(image, face_rectangles=boxes))}
        return {**ways, **self.bare(faces)} if self.tflite else ways

    def bare(self, faces):
        "The interpreter without the class around it: face by face, as the class uses it, and all faces at once."
        import fer
        import tensorflow as tf
        path = str(Path(fer.__file__).parent / "data" / "emotion_model_quantized.tflite")
        one, many = (tf.lite.Interpreter(model_path=path, num_threads=1) for _ in range(2))

        inside, outside = (details[0]["index"] for details in (one.get_input_details(), one.get_output_details()))

        def run(interpreter, batch):
            interpreter.set_tensor(inside, batch)
            interpreter.invoke()
            return interpreter.get_tensor(outside)

        def by_one():
            return np.concatenate([run(one, x[None, :, :, None]) for x in self.prepared(faces)])

        def at_once():
            return run(many, self.prepared(faces)[..., None])

        one.allocate_tensors()
        many.resize_tensor_input(inside, [len(faces), 64, 64, 1])
        many.allocate_tensors()
        if not np.allclose(by_one(), at_once(), atol=1e-2):
            raise RuntimeError("the interpreter answers a batch differently from single faces")
        called = "cv2.resize and tf.lite.Interpreter.invoke"
        return {"bare": (f"{called}, a face at a time", by_one),
                **({"bare, one batch": (f"{called}, its input resized to the batch", at_once)} if len(faces) > 1 else {})}

    def probs(self, faces):
        return np.concatenate([np.asarray(self.fer._classify_emotions(self.prepared(part))) for part in np.array_split(faces, -(-len(faces) // 64))])

    def labels(self, faces):
        image, corners = mosaic(faces)
        found = self.fer.detect_emotions(image, face_rectangles=[(x, y, SIDE, SIDE) for x, y in corners])
        return [int(np.argmax(list(face["emotions"].values()))) for face in found]

    def photo(self, path):
        found = self.fer.detect_emotions(path)
        return {"faces": len(found), "emotion": max(found[0]["emotions"], key=found[0]["emotions"].get) if found else None}


class FacialEmotionRecognition:
    """`facial-emotion-recognition`: a gray crop, PIL's resize to 48 x 48, scaled to -1..1; it gives a label and no probabilities.

    The network ends in a sigmoid, and the package takes exp() of that and the largest: divided by their sum, those are the
    probabilities counted here. It has no batches. Its weights are saved for CUDA, and it fails where there is none unless
    torch.load is told to put them on the CPU, as is done here."""

    calls = {"probs": "exp(EmotionRecognition('cpu').network(transform(face))), divided by the sum over the classes; weights loaded with map_location='cpu'",
             "photo": "EmotionRecognition('cpu').recognise_emotion(cv2.imread(path)), which draws the answer into the picture"}

    def __init__(self):
        import torch
        from facial_emotion_recognition import EmotionRecognition
        torch.load = partial(torch.load, map_location="cpu")
        self.peer, self.said = EmotionRecognition(device="cpu"), []
        self.predict = self.peer._predict
        self.peer._predict = self.remember  # recognise_emotion keeps the label to itself

    def remember(self, crop):
        self.said.append(self.predict(crop))
        return self.said[-1]

    def ways(self, faces):
        return {"answer": ("EmotionRecognition._predict(face), a face at a time", lambda: [self.predict(face) for face in faces]),
                "bare": ("its transform and its network, all faces at once, torch.no_grad()", lambda: self.probs(faces))}

    def probs(self, faces):
        import torch
        parts = []
        with torch.no_grad():
            for part in np.array_split(faces, -(-len(faces) // 64)):
                parts.append(torch.softmax(self.peer.network(torch.stack([self.peer.transform(face) for face in part])), 1).numpy())
        return np.concatenate(parts)

    def labels(self, faces):
        names = list(self.peer.emotions.values())
        return [names.index(self.predict(face)) for face in faces]

    def photo(self, path):
        import cv2
        self.said.clear()
        self.peer.recognise_emotion(cv2.imread(path))
        return {"faces": len(self.said), "emotion": self.said[0].lower() if self.said else None}


def clock(calls, seconds, blocks=10):
    "Wall and CPU milliseconds of every call of each way; the ways take turns in blocks, after a warm-up that sizes the blocks."
    share, n, took = seconds / blocks, {}, {name: [] for name in calls}
    for name, call in calls.items():
        for _ in range(3):
            start = time.perf_counter()
            call()
        n[name] = max(1, round(share / max(1e-6, time.perf_counter() - start)))
    for _ in range(blocks):
        for name, call in calls.items():
            for _ in range(n[name]):
                cpu, wall = time.process_time_ns(), time.perf_counter_ns()
                call()
                wall = time.perf_counter_ns() - wall
                took[name].append((wall / 1e6, (time.process_time_ns() - cpu) / 1e6))
    return {name: summary(np.array(t)) for name, t in took.items()}


def summary(took):
    "Median and smallest wall milliseconds, median CPU milliseconds, number of calls."
    return {"ms": float(np.median(took[:, 0])), "best_ms": float(took[:, 0].min()), "cpu_ms": float(np.median(took[:, 1])), "calls": len(took)}


def time_faces(contestant, settings):
    "Every way at every batch size."
    faces = np.load(settings["faces"])
    result = []
    for batch in settings["batches"]:
        ways = contestant.ways(np.ascontiguousarray(faces[:batch]))
        clocked = clock({name: call for name, (_, call) in ways.items()}, settings["seconds"])
        result += [{"way": name, "called": ways[name][0], "batch": batch, **figures} for name, figures in clocked.items()]
    return result


def time_photo(contestant, settings):
    "A picture's path to its predictions."
    said = contestant.photo(settings["photo"])
    took = clock({"photo": lambda: contestant.photo(settings["photo"])}, settings["seconds"])["photo"]
    return {"called": contestant.calls["photo"], **said, **took}


def save_probs(contestant, settings):
    """Probabilities of all faces as .npy. The labels that the library itself gives the first of them must be the largest of
    these, or as large to two digits: fer rounds before it looks."""
    faces = np.load(settings["faces"])
    probs = np.asarray(contestant.probs(faces), np.float32)
    first = min(settings["compare"], len(faces))
    behind = probs[:first].max(1) - probs[np.arange(first), contestant.labels(faces[:first])]
    if behind.max() > .0101:
        raise RuntimeError(f"{np.sum(behind > .0101)} of {first} labels of the library are not those of the probabilities: it computes something else")
    np.save(settings["out"], probs)
    return {"called": contestant.calls["probs"], "labels_compared_with_its_own": first}


def main():
    action, settings = sys.argv[1], json.loads(sys.argv[2])
    contestant = globals()[settings["class"]](**settings["options"])
    result = {"faces": time_faces, "photo": time_photo, "probs": save_probs}[action](contestant, settings)
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    main()
