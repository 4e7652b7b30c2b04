"""What the notebook of `serve` leaves to a real server on loopback: rude clients, bombs, tokens, full queues, and the OpenAPI document taken at its word."""
import base64
import hashlib
import io
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

for _module in ("fastapi", "httpx", "uvicorn", "websockets", "prometheus_client"):
    pytest.importorskip(_module)

import httpx  # noqa: E402
from PIL import Image  # noqa: E402

from _serving import eventually, serving, tiny_model  # noqa: E402
from fer_nbdev import Predictor, serve, service  # noqa: E402
from fer_nbdev.core import EMOTIONS, sample_portrait  # noqa: E402
from fer_nbdev.serve import Limits, create_app  # noqa: E402

PORTRAIT = sample_portrait().read_bytes()
TOKEN = "correct-horse-battery-staple"


def _stored(image, kind="PNG", **options):
    out = io.BytesIO()
    Image.fromarray(image).save(out, kind, **options)
    return out.getvalue()


SMALL = _stored(np.asarray(Image.open(sample_portrait()).convert("L").crop((155, 106, 375, 326)).resize((64, 64))))


@pytest.fixture(autouse=True)
def _no_yunet(monkeypatch, tmp_path):
    "`auto` is Haar, whatever this machine has."
    monkeypatch.delenv("FER_YUNET", raising=False)
    monkeypatch.setenv("FER_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def server():
    "One server for all tests that change nothing; it accepts up to 400,000 pixels, and waits a second for a body."
    limits = Limits(pixels=400_000, body_bytes=3_000_000, upload_seconds=1.5, idle_seconds=2, frame_bytes=200_000, video_seconds=5, keep_seconds=60)
    app = create_app("accurate", limits=limits, workers=2)
    with serving(app) as port:
        yield app, port


@pytest.fixture
def client(server):
    with httpx.Client(base_url=f"http://127.0.0.1:{server[1]}", timeout=60) as http:
        yield http


def _ask(client, *images, **options):
    "The answers for images, sent as files."
    answer = client.post("/v1/predict", files=[("images", (f"{i}.png", image)) for i, image in enumerate(images)], data=options)
    assert answer.status_code == 200, answer.text
    return answer.json()["images"]


def _still_well(client):
    assert len(_ask(client, SMALL, detector="none")[0]["faces"]) == 1


# ------------------------------------------------------------------------------------------------------- answers

def test_the_answers_are_those_of_predict(client):
    "Files and base64, boxes, averaging, the fewest probabilities: each as the library says it in this process."
    own = [155, 106, 375, 326]
    for options, boxes in (({}, None), ({"tta": True}, None), ({"detector": "none"}, None), ({}, [own])):
        expected = Predictor("accurate", tta="tta" in options, detector=options.get("detector", "auto")).predict(PORTRAIT, boxes)
        form = {k: str(v).lower() if isinstance(v, bool) else v for k, v in options.items()} | ({"box": ",".join(map(str, own))} if boxes else {})
        image = {"data": base64.b64encode(PORTRAIT).decode(), "name": "0.png"} | ({"boxes": boxes} if boxes else {})
        by_json = client.post("/v1/predict", json={"images": [image], **options}).json()["images"]
        by_form = _ask(client, PORTRAIT, **form)
        assert by_form == by_json and len(expected) == 1
        for face, p in zip(by_form[0]["faces"], expected, strict=True):
            assert (face["box"], face["emotion"], list(face["probs"])) == ([*p.box], p.emotion, list(EMOTIONS))
            np.testing.assert_allclose(list(face["probs"].values()), list(p.probs.values()), atol=1e-6)
    face, = _ask(client, PORTRAIT, top_k=2)[0]["faces"]
    assert face["probs"] == pytest.approx(dict(Predictor("accurate").predict(PORTRAIT)[0].top_k(2)))
    url = client.post("/v1/predict", json={"images": [{"data": "data:image/png;base64," + base64.b64encode(SMALL).decode()}], "detector": "none"}).json()
    assert url["images"][0]["error"] is None and url["model"] == "accurate"


def test_one_bad_image_costs_the_others_nothing(client):
    answers = _ask(client, SMALL, b"no image", SMALL[:200], SMALL, detector="none")
    assert [a["error"] and a["error"]["code"] for a in answers] == [None, "unreadable", "unreadable", None]
    assert answers[0]["faces"] == answers[3]["faces"] and answers[1]["faces"] == []
    boxes = [[[0, 0, 10, 10]], [[0, 0, 99999, 10]], [[5, 5, 5, 9]], []]
    asked = {"images": [{"data": base64.b64encode(SMALL).decode(), "boxes": b} for b in boxes] + [{"data": "no base64!"}]}
    answers = client.post("/v1/predict", json=asked).json()["images"]
    assert [a["error"] and a["error"]["code"] for a in answers] == [None, "boxes", "boxes", None, "base64"]
    assert (len(answers[0]["faces"]), answers[3]["faces"], answers[1]["width"]) == (1, [], 64)


def test_two_models(tmp_path):
    "Each request gets the model it names; a folder goes by its name; what is asked at the same time does not mix."
    pytest.importorskip("onnx")
    app = create_app(["accurate", tiny_model(tmp_path / "moods", ("calm", "tense"), 32)], workers=2)
    with serving(app) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        listed = client.get("/v1/models").json()
        assert [m["name"] for m in listed["models"]] == ["accurate", "moods"] and listed["models"][1]["classes"] == ["calm", "tense"]
        assert listed["limits"]["queue"] == Limits().queue and listed["detectors"] == ["auto", "haar", "none"]
        with ThreadPoolExecutor(8) as pool:
            names = ["accurate", "moods"] * 8
            answers = list(pool.map(lambda name: _ask(client, SMALL, model=name, detector="none")[0]["faces"][0], names))
    assert [set(a["probs"]) for a in answers] == [set(EMOTIONS), {"calm", "tense"}] * 8
    assert all(a["probs"] == pytest.approx(answers[i % 2]["probs"], abs=1e-6) for i, a in enumerate(answers))


def test_requests_that_come_together_are_answered_together():
    "Fewer runs of the network than requests, and the same answers as one by one; without batching as many."
    faces = [_stored(np.random.default_rng(i).integers(0, 256, (48, 48), dtype=np.uint8)) for i in range(24)]
    runs = {}
    for wait in (.05, None):
        app = create_app("accurate", batch_wait=wait, workers=2)
        with serving(app) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            with ThreadPoolExecutor(8) as pool:
                answers = list(pool.map(lambda f: _ask(client, f, detector="none")[0]["faces"][0]["probs"], faces))
            runs[wait] = app.state.service.metrics.registry.get_sample_value("fer_batch_requests_count")
    expected = Predictor("accurate", detector="none").predict_batch(faces)
    for got, (p,) in zip(answers, expected, strict=True):
        assert got == pytest.approx(p.probs, abs=1e-6)
    assert runs[None] == 24 and runs[.05] < 20


# ---------------------------------------------------------------------------------------------------- rude clients

def _raw(port, *parts, pause=0.):
    "Send bytes, and give what comes back until the server closes."
    with socket.create_connection(("127.0.0.1", port), timeout=20) as s:
        for part in parts:
            try:
                s.sendall(part)
            except (BrokenPipeError, ConnectionResetError):
                break
            time.sleep(pause)
        back = b""
        try:
            while chunk := s.recv(65536):
                back += chunk
                if re.search(rb"\r\n\r\n.*[}\n]$", back, re.S):
                    break
        except (TimeoutError, ConnectionResetError):
            pass
        return back


HEAD = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def test_a_client_that_hangs_keeps_nobody_out(server, client):
    "Forty clients promise a body and send a byte: everybody else is answered, and they are told after the time that they have."
    app, port = server
    with ThreadPoolExecutor(40) as pool:
        hanging = [pool.submit(_raw, port, HEAD + b"Content-Length: 1000\r\n\r\n{") for _ in range(40)]
        eventually(lambda: app.state.service.intake.held >= 40)
        start = time.monotonic()
        for _ in range(3):
            _still_well(client)
        assert time.monotonic() - start < 15 and not any(h.done() and b"200" in h.result()[:20] for h in hanging)
        assert all(b" 408 " in h.result()[:20] for h in hanging)
    assert app.state.service.intake.held == 0 and app.state.service.busy == 0


def test_a_client_that_breaks_off_leaves_nothing_behind(server, client):
    app, port = server
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", port)) as s:
            s.sendall(HEAD + b"Content-Length: 1000000\r\n\r\n" + b"x" * 200_000)
        with socket.create_connection(("127.0.0.1", port)) as s: # asks, and does not wait for the answer
            body = json.dumps({"images": [{"data": base64.b64encode(SMALL).decode()}], "detector": "none"}).encode()
            s.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    eventually(lambda: app.state.service.intake.held == 0 and app.state.service.busy == 0)
    _still_well(client)


def test_garbage(server, client):
    "What is no HTTP, no JSON, no form: a status, or a closed connection, and nothing else."
    _, port = server
    for garbage in (os.urandom(5000), b"GET\r\n\r\n", b"\x16\x03\x01\x02\x00" + os.urandom(500),
                    HEAD + b"Content-Length: -5\r\n\r\n", HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"):
        back = _raw(port, garbage)
        assert back == b"" or back.startswith(b"HTTP/1.1 4"), back[:200]
    kinds = {"application/json": (b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"images": 1e999}', b'{"images":[{"data":"' + b"A" * 100_000),
             "multipart/form-data; boundary=x": (b"", b"--x", b"--x\r\n\r\n", os.urandom(2000),
                                                 b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--\r\n", b"--x\r\nA: b\r\n" * 5000),
             "multipart/form-data": (b"--x--",), "multipart/form-data; boundary=" + "y" * 500: (b"--y",)}
    for kind, bodies in kinds.items():
        for body in bodies:
            answer = client.post("/v1/predict", content=body, headers={"Content-Type": kind})
            assert answer.status_code == 422, (kind, body[:50], answer.status_code)
    many = b"".join(b'--x\r\nContent-Disposition: form-data; name="f%d"\r\n\r\n\r\n' % i for i in range(20_000)) + b"--x--\r\n"
    answer = client.post("/v1/predict", content=many, headers={"Content-Type": "multipart/form-data; boundary=x"})
    assert answer.status_code == 422 and "parts" in answer.text
    secret = base64.b64encode(b"a secret picture").decode()
    answer = client.post("/v1/predict", json={"images": [{"data": secret, "colour": secret}]})
    assert answer.status_code == 422 and secret not in answer.text, "the refusal repeats what was sent"
    _still_well(client)


def test_a_body_is_cut_off_while_it_comes(server, client):
    "Three megabytes are allowed. Whoever announces more is refused within a second, and whoever does not is refused on the way."
    _, port = server
    back = _raw(port, HEAD + b"Content-Length: 50000000000\r\n\r\n")
    assert b" 413 " in back[:20]
    sent = 0

    def endless():
        nonlocal sent
        while sent < 200_000_000:
            sent += 65536
            yield b"x" * 65536
    try:
        assert client.post("/v1/predict", content=endless(), headers={"Content-Type": "application/json"}).status_code == 413
    except (httpx.WriteError, httpx.ReadError):
        pass # the server closed the connection while we were still sending
    assert sent < 50_000_000
    _still_well(client)


def test_a_form_that_is_cut_off_is_refused(client):
    "Not answered for those of its pictures that came whole."
    head = b'--xyz\r\nContent-Disposition: form-data; name="images"; filename="%d.png"\r\n\r\n'
    parts = b"".join(head % i + _stored(np.full((48, 48), 90, np.uint8)) + b"\r\n" for i in range(2))
    whole = parts + b"--xyz--\r\n"
    ask = dict(headers={"Content-Type": "multipart/form-data; boundary=xyz"})
    assert len(client.post("/v1/predict", content=whole, **ask).json()["images"]) == 2
    for end in (len(whole) - 4, len(parts), len(parts) - 20, len(parts) // 2 + 5):
        answer = client.post("/v1/predict", content=whole[:end], **ask)
        assert answer.status_code == 422 and "damaged" in answer.text


# ---------------------------------------------------------------------------------------------------------- bombs

def _png(width, height, data):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _gif(frames):
    one = Image.fromarray(np.zeros((40, 40), np.uint8))
    out = io.BytesIO()
    one.save(out, "GIF", save_all=True, append_images=[Image.fromarray(np.full((40, 40), i % 255 + 1, np.uint8)) for i in range(frames - 1)])
    return out.getvalue()


def _peak_mb():
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured as Linux counts it")
def test_bombs(client):
    "Small files that claim to be huge are refused by their header: neither memory nor time goes to them. Of an animation the first frame counts."
    zeros = zlib.compress(bytes(30_000_000), 9)
    bombs = {"100 megapixels": _png(10_000, 10_000, zeros), "4 gigapixels": _png(65_000, 65_000, zeros), "no end": _png(2**31 - 1, 2**31 - 1, zeros),
             "bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 50_000, 50_000, 1, 24, 0, 0, 0, 0, 0, 0)}
    animation = _gif(10_000)
    before, start = _peak_mb(), time.monotonic()
    for name, bomb in bombs.items():
        answer, = _ask(client, bomb)
        assert answer["error"]["code"] == "unreadable" and "pixels" in answer["error"]["message"], (name, answer)
    answer, = _ask(client, animation, detector="none")
    assert (answer["width"], len(answer["faces"])) == (40, 1)
    assert _peak_mb() - before < 60 and time.monotonic() - start < 20
    note = struct.pack(">I", len(zeros) + 3) + b"zTXtk\0\0" + zeros + struct.pack(">I", zlib.crc32(b"zTXtk\0\0" + zeros))
    text = _png(64, 64, zeros)[:-12] + note + b"\0\0\0\0IEND\xaeB`\x82"
    _ask(client, text, detector="none") # a comment of 30 MB when it is unpacked: Pillow may read the picture or refuse it, but not unpack that
    assert _peak_mb() - before < 60
    _still_well(client)


def test_only_the_formats_that_are_offered(client):
    "Nothing that Pillow hands to another program or library: PostScript, WMF, FITS, PDF, SVG; nor a text, nor a link."
    others = [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(/etc/passwd) (r) file", b"\xd7\xcd\xc6\x9a" + bytes(100),
              b"SIMPLE  =                    T", b"%PDF-1.4", b"<svg/>", b"http://example.org/a.jpg", b"/etc/passwd", b"#EXTM3U\n"]
    assert {a["error"]["code"] for a in _ask(client, *others)} == {"unreadable"}
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        answer, = _ask(client, _stored(np.zeros((50, 60, 3), np.uint8), kind), detector="none")
        assert (answer["error"], answer["width"], answer["height"]) == (None, 60, 50), kind


# ---------------------------------------------------------------------------------------------- names, disk, logs

def test_names_are_text_and_nothing_is_stored(monkeypatch, tmp_path, caplog, capfd):
    "A file name is never a path. While and after images are answered, no file is there, and no line says what was sent."
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    names = ["../../etc/passwd", "/etc/passwd", "C:\\a.jpg", "a\0b.jpg", "<script>alert(1)</script>.jpg", "ü" * 500, "secret-name.jpg"]
    large = _stored(np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), dtype=np.uint8)) # 3 MB: beyond what form readers hold in memory
    seen, done = set(), threading.Event()

    def watch():
        while not done.is_set():
            seen.update(p.name for p in tmp_path.rglob("*") if p.is_file())
            seen.update(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")) for fd in os.listdir("/proc/self/fd") if os.path.islink(f"/proc/self/fd/{fd}")
                        and os.readlink(f"/proc/self/fd/{fd}").startswith(str(tmp_path))) if os.path.isdir("/proc/self/fd") else None
            time.sleep(.002)
    with serving(create_app("accurate"), log_level="info") as port, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        watcher = threading.Thread(target=watch)
        watcher.start()
        for name in names:
            head = b'--x\r\nContent-Disposition: form-data; name="images"; filename="' + name.encode() + b'"\r\n\r\n'
            parts = head + large + b'\r\n--x\r\nContent-Disposition: form-data; name="detector"\r\n\r\nnone\r\n--x--\r\n'
            answer = client.post("/v1/predict", content=parts, headers={"Content-Type": "multipart/form-data; boundary=x"})
            assert answer.status_code == 200 and (name[:200] == answer.json()["images"][0]["name"] or "\\" in name or "\0" in name), answer.text
        done.set()
        watcher.join()
    assert not seen and not [p for p in tmp_path.rglob("*") if p.is_file()], "something was written"
    logged = caplog.text + "".join(capfd.readouterr())
    assert not any(n in logged for n in ("secret-name", "passwd", "script")), logged


# ------------------------------------------------------------------------------------------------ tokens, origins

def test_tokens():
    with (serving(create_app("accurate", tokens=[TOKEN, "another-token-of-mine"])) as port,
          httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client):
        paths = [("GET", "/v1/models"), ("POST", "/v1/predict"), ("POST", "/v1/video"),
                 ("GET", "/v1/video/" + "0" * 32), ("DELETE", "/v1/video/" + "0" * 32), ("GET", "/metrics")]
        for method, path in paths:
            for header in (None, "", "Bearer", f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}x", f"Basic {TOKEN}", TOKEN, "Bearer \xfc".encode("latin-1")):
                answer = client.request(method, path, headers={} if header is None else {"Authorization": header})
                assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer"), (method, path, header)
        for token in (TOKEN, "another-token-of-mine"):
            assert client.get("/v1/models", headers={"Authorization": f"Bearer {token}"}).status_code == 200
        assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200
        assert client.get("/openapi.json").json()["paths"]["/v1/predict"]["post"]["security"]
        for headers, protocols, good in (({}, None, False), ({"Authorization": f"Bearer {TOKEN}"}, None, True),
                                         ({}, ["fer.v1", f"bearer.{TOKEN}"], True), ({}, ["fer.v1", "bearer.wrong"], False)):
            assert _opens(port, headers, protocols) == good
    for bad in (["short"], ["with a space in it !"], ["ümlaut-ümlaut-ümlaut"], [b"bytes-bytes-bytes-bytes"]):
        with pytest.raises(ValueError, match="16 or more"):
            create_app(tokens=bad)


def _opens(port, headers=None, protocols=None, **options):
    from websockets.exceptions import InvalidStatus
    from websockets.sync.client import connect
    try:
        with connect(f"ws://127.0.0.1:{port}/v1/stream", additional_headers=headers or {}, subprotocols=protocols, **options) as ws:
            assert ws.subprotocol == (protocols and "fer.v1")
            return True
    except InvalidStatus as e:
        assert e.response.status_code == 403
        return False


def test_other_pages_may_not_ask_unless_they_are_named(server, client):
    ask = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in client.options("/v1/predict", headers=ask).headers
    assert not _opens(server[1], origin="https://example.org") and not _opens(server[1], origin="http://[abc")
    assert _opens(server[1], origin=f"http://127.0.0.1:{server[1]}")
    with serving(create_app("accurate", cors=["https://example.org"])) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}") as open_client:
        assert open_client.options("/v1/predict", headers=ask).headers["access-control-allow-origin"] == "https://example.org"
        assert "access-control-allow-origin" not in open_client.options("/v1/predict", headers=ask | {"Origin": "https://example.com"}).headers
        assert _opens(port, origin="https://example.org") and not _opens(port, origin="https://example.com")


# ---------------------------------------------------------------------------------------------------------- limits

def test_a_full_queue_says_so_and_recovers(monkeypatch):
    "Three places and twenty clients: three are answered in the end, the others told at once; afterwards all is as before."
    go, real = threading.Event(), service._look
    monkeypatch.setattr(service, "_look", lambda *args: go.wait(60) and real(*args))
    app = create_app("accurate", limits=Limits(queue=3), workers=1)
    with serving(app) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client, ThreadPoolExecutor(20) as pool:
        def ask(_):
            return client.post("/v1/predict", files={"images": ("a.png", SMALL)}, data={"detector": "none"})
        first = [pool.submit(ask, i) for i in range(3)]
        eventually(lambda: app.state.service.busy == 3)
        refused = list(pool.map(ask, range(17)))
        assert {r.status_code for r in refused} == {429} and all(int(r.headers["retry-after"]) >= 1 for r in refused)
        assert client.get("/healthz").status_code == 200 and "fer_busy 3.0" in client.get("/metrics").text
        go.set()
        assert [f.result().status_code for f in first] == [200] * 3
        eventually(lambda: app.state.service.busy == 0)
        for _ in range(5):
            _still_well(client)
        assert 'fer_requests_total{path="/v1/predict",status="429"} 17.0' in client.get("/metrics").text


def test_who_waits_too_long_is_told_and_keeps_the_place_until_the_work_ends(monkeypatch):
    go, real = threading.Event(), service._look
    monkeypatch.setattr(service, "_look", lambda *args: go.wait(60) and real(*args))
    app = create_app("accurate", limits=Limits(queue=1, seconds=.3), workers=1)
    with serving(app) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        answer = client.post("/v1/predict", files={"images": ("a.png", SMALL)})
        assert answer.status_code == 503 and "retry-after" in answer.headers
        assert client.post("/v1/predict", files={"images": ("a.png", SMALL)}).status_code == 429, "the thread is still at it"
        go.set()
        eventually(lambda: app.state.service.busy == 0)
        app.state.service.limits = Limits()
        _still_well(client)


def test_too_many_faces_and_images(server, client):
    app = create_app("accurate", limits=Limits(faces=2, images=2))
    app.state.service.predictors["accurate", "auto", False].detector = lambda image: [(i * 10, 0, i * 10 + 9 - i, 9 - i) for i in range(5)]
    with serving(app) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as small:
        answer, = _ask(small, SMALL)
        assert ([f["box"] for f in answer["faces"]], answer["faces_left_out"]) == ([[0, 0, 9, 9], [10, 0, 18, 8]], 3)
        assert small.post("/v1/predict", files=[("images", ("a.png", SMALL))] * 3).status_code == 422
        assert small.post("/v1/predict", files=[("images", ("a.png", SMALL))], data={"box": ["0,0,9,9"] * 3}).status_code == 422


# ---------------------------------------------------------------------------------------------------------- video

@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    "Two seconds of the portrait."
    from fer_nbdev.video import VideoWriter
    path, photo = tmp_path_factory.mktemp("clip") / "clip.mp4", np.asarray(Image.open(sample_portrait()).convert("RGB").resize((256, 300)))
    with VideoWriter(path, fps=10) as out:
        for i in range(20):
            out.write(photo, i / 10)
    return path.read_bytes()


def _finished(client, job):
    return eventually(lambda: (found := client.get(f"/v1/video/{job}").json())["status"] in ("done", "failed") and found, 60)


def test_a_video_is_answered_and_forgotten(server, client, clip):
    app, _ = server
    begun = client.post("/v1/video?every=2&annotate=true", content=clip, headers={"Content-Type": "video/mp4"})
    assert begun.status_code == 202 and begun.headers["location"] == f"/v1/video/{begun.json()['id']}"
    job = begun.json()["id"]
    done = _finished(client, job)
    assert (done["status"], done["progress"], len(done["people"]), done["annotated"]) == ("done", 1, 1, True)
    rows = client.get(f"/v1/video/{job}/faces.csv")
    assert rows.headers["content-type"].startswith("text/csv") and len(rows.text.splitlines()) == done["people"][0]["frames"] + 1 > 10
    assert client.get(f"/v1/video/{job}/annotated.mp4").content[4:8] == b"ftyp"
    folder = app.state.videos.folder / job
    assert {p.name for p in folder.iterdir()} == {"faces.csv", "annotated.mp4"}, "the upload is still there"
    assert client.delete(f"/v1/video/{job}").status_code == 204 and not folder.exists()
    assert client.get(f"/v1/video/{job}").status_code == client.delete(f"/v1/video/{job}").status_code == 404


@pytest.mark.parametrize("what", ["text", "playlist", "concat", "half", "empty"])
def test_what_is_no_video_fails_with_a_reason(server, client, clip, what, tmp_path):
    "Also what FFmpeg would take for a list of further files or addresses to read."
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(clip)
    body = {"text": b"hello", "playlist": f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile://{secret}\n#EXT-X-ENDLIST\n".encode(),
            "concat": f"ffconcat version 1.0\nfile {secret}\n".encode(), "half": clip[:len(clip) // 2], "empty": b""}[what]
    job = client.post("/v1/video", content=body, headers={"Content-Type": "application/octet-stream"}).json()["id"]
    failed = _finished(client, job)
    assert failed["status"] == "failed" and failed["people"] is None and len(failed["error"]) > 20
    assert str(server[0].state.videos.folder) not in failed["error"], "the message names a folder of the server"
    assert client.get(f"/v1/video/{job}/faces.csv").status_code == 409
    assert not list((server[0].state.videos.folder / job).iterdir())


def test_videos_have_limits_too(clip, monkeypatch):
    go = threading.Event()

    def waiting(*args):
        go.wait(60)
        raise ValueError("released")
    app = create_app("accurate", limits=Limits(videos=2, video_seconds=1, keep_seconds=.5, video_bytes=len(clip) + 10))
    with serving(app) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        def send(body=clip, kind="video/mp4"):
            return client.post("/v1/video", content=body, headers={"Content-Type": kind})
        job = send().json()["id"]
        assert "lasts 2 s, more than 1 s" in _finished(client, job)["error"]
        answers = {send(clip + bytes(11)).status_code for _ in range(20)}
        assert answers == {413}, "closed under a client that is still sending, the connection takes the answer along"
        assert send(kind="image/png").status_code == 415
        eventually(lambda: client.get(f"/v1/video/{job}").status_code == 404) # kept for half a second
        eventually(lambda: not list(app.state.videos.folder.iterdir()))
        monkeypatch.setattr(serve, "_open_video", waiting)
        begun = [send() for _ in range(3)]
        assert [b.status_code for b in begun] == [202, 202, 429] and int(begun[2].headers["retry-after"]) >= 1
        assert client.delete(f"/v1/video/{begun[1].json()['id']}").status_code == 204
        go.set()
        eventually(lambda: send().status_code == 202)
    assert not app.state.videos.folder.exists(), "the folder is left behind"


# --------------------------------------------------------------------------------------------------------- streams

def _frame(shift=0):
    return _stored(np.asarray(Image.open(sample_portrait()).convert("RGB").resize((256, 300)))[:, shift:shift + 240], "JPEG")


def test_a_stream_follows_faces(server):
    from websockets.sync.client import connect
    with connect(f"ws://127.0.0.1:{server[1]}/v1/stream?every=1") as ws:
        answers = []
        for i in range(4):
            ws.send(_frame(2 * i))
            answers.append(json.loads(ws.recv(timeout=30)))
        ws.send(b"garbage")
        broken = json.loads(ws.recv(timeout=30))
        ws.send(_frame())
        after = json.loads(ws.recv(timeout=30))
    assert [a["frame"] for a in answers] == [0, 1, 2, 3] and [[f["track_id"] for f in a["faces"]] for a in answers] == [[1]] * 4
    assert broken["error"]["code"] == "unreadable" and after["faces"][0]["track_id"] == 1
    eventually(lambda: server[0].state.service.streaming == 0)


def test_a_stream_drops_what_is_late(server):
    "Sixty frames at once: the newest is answered, most of the others are not, and the numbers say which."
    from websockets.sync.client import connect
    with connect(f"ws://127.0.0.1:{server[1]}/v1/stream") as ws:
        frames = [_frame(i % 10) for i in range(60)]
        for frame in frames:
            ws.send(frame)
        numbers = []
        while not numbers or numbers[-1] != 59:
            numbers.append(json.loads(ws.recv(timeout=30))["frame"])
    assert numbers == sorted(numbers) and len(numbers) < 50


def test_streams_end(server):
    "With a reason: text instead of frames, a frame too large, silence, an unknown model, too many at the same time."
    from websockets.exceptions import ConnectionClosed, InvalidStatus
    from websockets.sync.client import connect
    app, port = server
    for message, code in (("hello", 1003), (bytes(200_500), 1009), (bytes(400_000), 1009), (None, 1000)):
        with connect(f"ws://127.0.0.1:{port}/v1/stream") as ws:
            if message is not None:
                ws.send(message)
            with pytest.raises(ConnectionClosed) as closed:
                ws.recv(timeout=30)
        assert closed.value.rcvd.code == code, message and message[:10]
    with pytest.raises(InvalidStatus), connect(f"ws://127.0.0.1:{port}/v1/stream?model=huge"):
        pass
    with ExitStack() as opened:
        several = [opened.enter_context(connect(f"ws://127.0.0.1:{port}/v1/stream")) for _ in range(app.state.service.limits.streams)]
        eventually(lambda: app.state.service.streaming == len(several))
        with connect(f"ws://127.0.0.1:{port}/v1/stream") as ws, pytest.raises(ConnectionClosed) as closed:
            ws.recv(timeout=30)
        assert closed.value.rcvd.code == 1013
        several[0].socket.shutdown(socket.SHUT_RDWR) # breaks off without a word
    eventually(lambda: app.state.service.streaming == 0)


# -------------------------------------------------------------------------------------------------------- contract

@pytest.mark.parametrize("tokens", [[], [TOKEN]], ids=["open", "with tokens"])
def test_schemathesis_finds_nothing(tokens, tmp_path):
    "The OpenAPI document is the contract: whatever fits it is accepted, whatever does not is refused, and every answer is one that it lists."
    program = shutil.which("schemathesis", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if program is None:
        pytest.skip("schemathesis is not installed")
    with serving(create_app("accurate", tokens=tokens, limits=Limits(videos=10_000)), log_level="critical") as port:
        headers = [f"--header=Authorization: Bearer {TOKEN}"] if tokens else []
        done = subprocess.run([program, "run", f"http://127.0.0.1:{port}/openapi.json", "--max-examples=12", "--seed=1",
                               "--generation-database=none", "--no-color", *headers],
                              cwd=tmp_path, capture_output=True, text=True, encoding="utf-8", timeout=500)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"Tested: +10\b", done.stdout), done.stdout[-1500:]


def test_the_document_has_examples_that_work(client):
    document = client.get("/openapi.json").json()
    body = document["paths"]["/v1/predict"]["post"]["requestBody"]["content"]
    assert set(body) == {"application/json", "multipart/form-data"}
    assert client.post("/v1/predict", json=body["application/json"]["example"]).json()["images"][0]["error"] is None
    assert {"FrameAnswer", "PredictAnswer", "PredictRequest", "PredictForm", "VideoJob"} <= set(document["components"]["schemas"])
    described = [(path, method, "summary" in op) for path, methods in document["paths"].items() for method, op in methods.items()]
    assert len(described) == 10 and all(d[2] for d in described)


def test_methods_that_are_not_there(client):
    "405 says which are, also where several routes share a path."
    for path, allowed in (("/v1/predict", "POST"), ("/v1/video/" + "0" * 32, "DELETE, GET"), ("/healthz", "GET")):
        answer = client.request("PATCH", path)
        assert (answer.status_code, answer.headers["allow"]) == (405, allowed)


def test_an_address_that_cannot_be_had_is_one_sentence():
    "From the command line, before any model is opened, and from `run_app`."
    from typer.testing import CliRunner

    from fer_nbdev.cli import app
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        for address, said in ((f"--port {port}", f"port {port} of 127.0.0.1 is taken: choose another with --port"),
                              ("--host 192.0.2.1", "host '192.0.2.1' is not this machine"),
                              ("--host no.such.name.invalid", "is unknown here"), ("--host ..", "is unknown here")):
            done = CliRunner().invoke(app, ["serve", *address.split(), "--model", "no/model"])
            assert done.exit_code == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.output
        application = create_app("accurate")
        with pytest.raises(ValueError, match="is taken"):
            serve.run_app(application, port=port)
        application.state.service.close()


def test_the_server_is_light():
    "Importing it brings neither the learning side nor the page."
    code = "import sys, fer_nbdev.serve; print([m for m in ('torch', 'fastai', 'fastcore', 'pandas', 'sklearn', 'gradio', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
    code = "import sys; sys.modules['fastapi'] = None\ntry: import fer_nbdev.serve\nexcept ImportError as e: print(e)"
    assert 'pip install "fer_nbdev[serve]"' in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere libraries keep such files in other places")
def test_no_library_leaves_a_mark(tmp_path):
    "onnxruntime 1.31 writes a device id and a database of usage data into the home folder, to be sent to its maker, unless it is told not to."
    code = ("import numpy as np; from fer_nbdev.service import Limits, Service; s = Service({'accurate': 'accurate'}, ['haar'], Limits()); s.warm_up(); "
            "s.predictors['accurate', 'haar', False].predict_faces(np.zeros((1, 48, 48), np.uint8)); s.close()")
    unset = ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME")
    env = {k: v for k, v in os.environ.items() if k not in unset} | {"HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=120)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


# ------------------------------------------------------------------------------------------- container and Space

def test_the_space_is_complete():
    "Its front matter names a file that is there, and that file makes an application with names that exist."
    import yaml
    space = Path(__file__).resolve().parent.parent / "space"
    about = yaml.safe_load((space / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert about["sdk"] == "gradio" and (space / about["app_file"]).is_file() and len(about["short_description"]) <= 60
    pytest.importorskip("gradio")
    code = ("import runpy; app = runpy.run_path('app.py', run_name='space')['app']; "
            "print(sorted(r.path for r in app.routes if r.path.startswith('/v1'))[0], app.router.default.__class__.__name__)")
    done = subprocess.run([sys.executable, "-c", code], cwd=space, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["/v1/models", "_Sealed"], done.stderr[-2000:]


# ------------------------------------------------------------------------------------------- what goes wrong is told

@pytest.fixture
def broken(tmp_path):
    "A model folder that is whole, by its card, and whose network is none."
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"no network")
    (folder / "card.json").write_text(json.dumps(dict(format=1, name="broken", classes=list(EMOTIONS), img_size=48,
                                                      files={"model.onnx": {"sha256": hashlib.sha256(b"no network").hexdigest()}})))
    return folder


def test_a_model_that_cannot_be_opened_is_told_before_anything_is_served(broken):
    with pytest.raises(ValueError, match="cannot open '.*broken.+model.onnx'"):
        create_app(["accurate", broken])
    done = subprocess.run([sys.executable, "-m", "fer_nbdev", "serve", "--model", str(broken), "--port", "0"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "cannot open" in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_server_that_cannot_get_ready_says_so(monkeypatch, caplog):
    from starlette.testclient import TestClient
    app = create_app("accurate", workers=1)
    monkeypatch.setattr(service, "detect_faces", lambda *args, **options: 1 / 0)
    with TestClient(app) as client:
        eventually(lambda: "never be ready" in caplog.text)
        assert client.get("/readyz").status_code == 503
    assert "ZeroDivisionError" in caplog.text


def test_a_stopped_application_says_that_it_is_not_started_again():
    from starlette.testclient import TestClient
    app = create_app("accurate", workers=1)
    with TestClient(app):
        pass
    with pytest.raises(RuntimeError, match="make a new one"), TestClient(app):
        pass


def test_a_stream_that_fails_is_logged(server, monkeypatch, caplog):
    "With the error, and the code of an internal one; a client that leaves is no error."
    from websockets.exceptions import ConnectionClosed
    from websockets.sync.client import connect
    address = f"ws://127.0.0.1:{server[1]}/v1/stream"
    with connect(address) as ws:
        ws.send(_frame())
        ws.recv(timeout=30)
    eventually(lambda: server[0].state.service.streaming == 0)
    assert "stream failed" not in caplog.text
    monkeypatch.setattr(serve.LiveFaces, "__call__", lambda self, image: 1 / 0)
    with connect(address) as ws:
        ws.send(_frame())
        with pytest.raises(ConnectionClosed) as closed:
            ws.recv(timeout=30)
    assert closed.value.rcvd.code == 1011
    assert "a live stream failed" in caplog.text and "ZeroDivisionError" in caplog.text


def test_a_body_is_held_once():
    "While it is worked on, the pieces that it came in are gone."
    import asyncio
    import tracemalloc
    from types import SimpleNamespace

    async def pieces():
        for _ in range(300):
            yield bytes(bytearray(65_536))

    async def receive():
        intake = service._Intake(Limits())
        tracemalloc.start()
        try:
            async with intake.body(SimpleNamespace(headers={}, stream=pieces)) as body:
                return len(body), tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
    size, held = asyncio.run(receive())
    assert size == 300 * 65_536 and held < 1.2 * size


def test_hints_for_callers_of_the_library_are_not_for_clients():
    "The API cuts them off the messages of `read_image` and `check_boxes`; here they are still there to be cut off."
    from fer_nbdev.core import read_image
    from fer_nbdev.detect import check_boxes
    with pytest.raises(ValueError, match=r"\. If you trust it") as large:
        read_image(PORTRAIT, max_pixels=1000)
    with pytest.raises(ValueError, match=r"\. Boxes are") as outside:
        check_boxes([(0, 0, 9999, 9)], read_image(PORTRAIT))
    limits, predictor = Limits(pixels=1000), Predictor("accurate", detector="none")
    assert service._look(predictor, PORTRAIT, None, limits).error.message == str(large.value).partition(". If you trust it")[0]
    assert service._look(predictor, PORTRAIT, [(0, 0, 9999, 9)], Limits()).error.message == str(outside.value).partition(". Boxes are")[0]


def test_the_name_of_a_model_is_that_of_its_folder(tmp_path, monkeypatch):
    (tmp_path / "moods" / "parts").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "moods")
    assert list(serve._name_models(["."])) == list(serve._name_models(["parts/.."])) == ["moods"]
    assert list(serve._name_models(["accurate", ["fast", "./parts"]])) == ["accurate", "fast+parts"]
