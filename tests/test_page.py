"""The page of the server in a Chromium without a window, which can reach nothing but this machine. Where there is none the tests are skipped, and say so."""
import io
import json
import asyncio
import os
import time
from pathlib import Path

import numpy as np
import pytest

for _module in ("gradio", "httpx", "websockets"):
    pytest.importorskip(_module)

import httpx  # noqa: E402
from PIL import Image  # noqa: E402

from _browser import Browser  # noqa: E402
from _serving import eventually, serving  # noqa: E402
from fer_nbdev import page, predict  # noqa: E402
from fer_nbdev.core import sample_portrait  # noqa: E402
from fer_nbdev.serve import Limits, create_app  # noqa: E402

PHOTO = "#photo input[type=file]"
TOKEN = "correct-horse-battery-staple"


def _group():
    "Three of the portrait side by side."
    person, group = Image.open(sample_portrait()).convert("RGB"), Image.new("RGB", (1100, 600), "#8fa3b5")
    for left, width in ((20, 420), (470, 300), (800, 260)):
        group.paste(person.resize((width, width * 600 // 512)), (left, 600 - width * 600 // 512))
    return group


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    "What the camera sees: the portrait, moving a little."
    person, path = Image.open(sample_portrait()).convert("RGB").resize((410, 480)), tmp_path_factory.mktemp("film") / "film.mjpeg"
    with open(path, "wb") as out:
        for i in range(30):
            frame, data = Image.new("RGB", (640, 480), "#8fa3b5"), io.BytesIO()
            frame.paste(person, (100 + 2 * i, 0))
            frame.save(data, "JPEG", quality=85)
            out.write(data.getvalue())
    return path


class Served(str):
    "The address of a server, and its folder of uploads."
    def __new__(cls, url, uploads):
        self = super().__new__(cls, url)
        self.uploads = uploads
        return self


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    "Uploads are kept for two seconds here, so that one can watch them go."
    patch = pytest.MonkeyPatch()
    patch.delenv("FER_YUNET", raising=False)
    patch.setenv("FER_CACHE", str(tmp_path_factory.mktemp("cache")))
    patch.setattr(page, "_KEPT", (1, 2))
    app = page.mount_page(create_app("accurate", limits=Limits(pixels=2_000_000)))
    with serving(app) as port:
        yield Served(f"http://127.0.0.1:{port}/", app.state.uploads)
    assert not app.state.uploads.exists(), "the folder of the uploads is left behind"
    patch.undo()


@pytest.fixture(scope="module")
def browser(tmp_path_factory, film):
    with Browser(tmp_path_factory.mktemp("browser"), film) as b:
        yield b


def _pictures(server):
    "The files that the page holds, without those that it came with."
    return [p for p in server.uploads.rglob("*") if p.is_file() and "grace_hopper" not in p.name]


def _file(path, **more):
    "A file as the page names it to the server."
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}, **more}


def _told(client, element, event, *data):
    "What the function behind an event of the page tells who asks it as the page does, up to its first answer."
    config, session = client.get("/config").json(), os.urandom(8).hex()
    ids = [c["id"] for c in config["components"] if element in (c["props"].get("elem_id"), c["type"])]
    function, = [d["id"] for d in config["dependencies"] if any([i, event] in d["targets"] for i in ids)]
    joined = client.post("/gradio_api/queue/join", json={"fn_index": function, "session_hash": session, "data": data})
    assert joined.status_code == 200, joined.text
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}, timeout=30) as lines:
        told = next(line for line in lines.iter_lines() if "process_streaming" in line or "process_completed" in line)
    client.post(f"/gradio_api/stream/{joined.json()['event_id']}/close")
    return json.loads(told.removeprefix("data: "))["output"]


def _photo(client, file): return str(_told(client, "photo", "change", file, "accurate", "auto", False))
def _frame(client, file): return str(_told(client, "camera", "stream", file, None, "accurate", "auto"))


def _upload(client, name="a.png", data=None):
    sent = client.post("/gradio_api/upload", files={"files": (name, data or sample_portrait().read_bytes())})
    assert sent.status_code == 200, sent.text
    return sent.json()[0]


def _open(browser, server, **options):
    browser.events.clear()
    browser.open(server, **options)
    browser.wait(f"document.querySelector('{PHOTO}')")


@pytest.mark.parametrize("width, height, dark", [(1200, 900, False), (390, 844, True)], ids=["wide", "a dark telephone"])
def test_a_photo_is_answered(browser, server, tmp_path, width, height, dark):
    "Boxes, a table of bars for each face, links that save both; no wider than the window; nobody else is asked; and the upload goes."
    photo = tmp_path / "group.jpg"
    _group().save(photo)
    expected = predict(photo)
    _open(browser, server, width=width, height=height, dark=dark)
    browser.upload(PHOTO, photo)
    browser.wait("document.querySelectorAll('#answer .fer-face').length == 3")
    captions = browser.js("[...document.querySelectorAll('.fer-face caption')].map(c => c.innerText)")
    assert captions == [f"{i + 1}: {p.emotion} {p.confidence:.0%}" for i, p in enumerate(expected)]
    widths = browser.js("[...document.querySelectorAll('.fer-face')].map(t => [...t.querySelectorAll('.fer-bar')]"
                        ".map(b => b.getBoundingClientRect().width / b.parentElement.clientWidth))")
    for bars, p in zip(widths, expected, strict=True):
        np.testing.assert_allclose(bars, list(p.probs.values()), atol=.06)
    image = browser.js("(i => [i.complete, i.naturalWidth, i.getBoundingClientRect().right])(document.querySelector('#answer img'))")
    assert image[:2] == [True, 1100] and image[2] <= width
    table = browser.js("fetch(document.querySelector('a[download$=csv]').href).then(r => r.text())")
    assert table.splitlines()[0].startswith("image,face,x0") and len(table.splitlines()) == 4 and "group.jpg" in table
    assert browser.js("document.querySelector('a[download$=jpg]').download") == "group-faces.jpg"
    assert browser.js("document.documentElement.scrollWidth") <= width, "something is wider than the window"
    assert not [u for u in browser.asked() if not u.startswith((server, "data:", "blob:"))]
    assert browser.complaints() == []
    eventually(lambda: not _pictures(server))


def test_a_bad_file_gets_a_sentence(browser, server, tmp_path):
    for name, data, says in (("notes.jpg", b"these are no pixels", "is not a JPEG"), ("huge.png", None, "pixels, more than")):
        path = tmp_path / name
        path.write_bytes(data) if data else Image.new("L", (3000, 3000)).save(path)
        _open(browser, server)
        browser.upload(PHOTO, path)
        browser.wait("document.querySelector('#answer .fer-message')")
        text = browser.js("document.querySelector('#answer .fer-message').innerText")
        assert says in text and "/" not in text.replace("50/", ""), text
    eventually(lambda: not _pictures(server))


def test_an_example(browser, server, tmp_path):
    "A click on it answers it; afterwards a bad file is still told so."
    _open(browser, server)
    browser.wait("document.querySelector('.gallery-item')")
    browser.js("document.querySelector('.gallery-item').click()")
    browser.wait("document.querySelectorAll('#answer .fer-face').length == 1")
    expected, = predict(sample_portrait())
    assert browser.js("document.querySelector('.fer-face caption').innerText") == f"{expected.emotion} {expected.confidence:.0%}"
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no pixels")
    browser.js("document.querySelector('#photo button[aria-label=\"Remove Image\"]').click()")
    browser.wait(f"document.querySelector('{PHOTO}')")
    browser.upload(PHOTO, bad)
    browser.wait("document.querySelector('#answer .fer-message')")


def test_the_webcam_is_answered_live(browser, server):
    "The camera shows the portrait: a face is found again and again, keeps its number, and no frame is kept."
    _open(browser, server)
    browser.js("[...document.querySelectorAll('button[role=tab]')].find(b => b.innerText.trim() == 'Webcam').click()")
    browser.wait("document.querySelector('#camera button')")
    for _ in range(3): # access, then record
        browser.js("[...document.querySelectorAll('#camera button')].filter(b => b.offsetParent).slice(-1)[0].click()")
        time.sleep(1)
        if browser.js("!!document.querySelector('#live .fer-face')"):
            break
    browser.wait("document.querySelector('#live .fer-face')")
    first = browser.js("document.querySelector('#live img').src")
    browser.wait("document.querySelector('#live img') && document.querySelector('#live img').src.length > 1000")
    eventually(lambda: browser.js("document.querySelector('#live img').src") != first)
    number, emotion, _ = browser.js("document.querySelector('#live .fer-face caption').innerText").split()
    assert number == "1:" and emotion in predict(sample_portrait())[0].probs
    assert browser.complaints() == []
    _open(browser, server)
    eventually(lambda: not _pictures(server))


def test_with_tokens_the_page_asks_for_one(browser):
    "The page is behind a login, the API behind the header, and neither opens the other's door without the token."
    with serving(page.mount_page(create_app("accurate", tokens=[TOKEN]))) as port:
        url = f"http://127.0.0.1:{port}/"
        with httpx.Client(base_url=url) as client:
            assert client.post("/login", data={"username": "me", "password": "wrong-wrong-wrong-wrong"}).status_code == 400
            assert client.get("/config").status_code == 401 and client.post("/gradio_api/upload", files={"files": ("a.png", b"x")}).status_code == 401
            assert client.post("/login", data={"username": "me", "password": TOKEN}).status_code == 200
            assert client.get("/config").status_code == 200
            assert client.get("/v1/models").status_code == 401, "the cookie of the page opens the API"
        browser.open(url)
        browser.wait("document.querySelector('input[type=password]')")


def test_paths_of_the_server_cannot_be_asked_for(server):
    "Nor can an upload be too large, or its name lead out of the folder."
    with httpx.Client(base_url=server) as client:
        for path in ("/etc/passwd", "../../etc/passwd", str(Path(page.__file__)), str(server.uploads)):
            for way in ("/gradio_api/file=", "/file=", "/static/", "/assets/"):
                assert client.get(way + path).status_code in (403, 404), (way, path)
        assert client.post("/gradio_api/upload", files={"files": ("a.png", bytes(25_000_000))}).status_code == 413
        names = ("../../out.png", "/etc/out.png", "a\0b.png")
        before = set(server.uploads.parent.iterdir())
        for name in names:
            client.post("/gradio_api/upload", files={"files": (name, b"x")})
        assert set(server.uploads.parent.iterdir()) == before
    eventually(lambda: not _pictures(server))


@pytest.mark.parametrize("ask", [_photo, _frame], ids=["photo", "camera"])
@pytest.mark.parametrize("streamed", [False, True], ids=["", "streamed"])
def test_only_what_was_uploaded_is_read(server, tmp_path, ask, streamed):
    "Another image of the server is neither shown nor deleted, however its path is written; uploads are answered."
    secret = tmp_path / "secret.png"
    Image.open(sample_portrait()).save(secret)
    whole = secret.read_bytes()
    with httpx.Client(base_url=server) as client:
        for path in (secret, f"{server.uploads}/../../{secret}", server.uploads, "/etc/hostname", "a\0b"):
            told = ask(client, _file(path, is_stream=streamed))
            assert "image/jpeg" not in told, path
            assert secret.exists() and secret.read_bytes() == whole, path
        assert "image/jpeg" in ask(client, _file(_upload(client), is_stream=streamed))
        assert server.uploads.is_dir()


def test_examples_stay(server):
    "Whoever tries them, as a photo or as a frame of the camera, which is deleted when it has been read."
    with httpx.Client(base_url=server) as client:
        shown = _told(client, "dataset", "click", 0)["data"][0]
        assert "image/jpeg" in _photo(client, shown)
        assert "image/jpeg" in _frame(client, shown) and "image/jpeg" in _frame(client, shown | {"is_stream": True})
        time.sleep(4) # uploads are deleted meanwhile
        assert client.get(f"/gradio_api/file={shown['path']}").content == sample_portrait().read_bytes()
        assert sample_portrait().exists()


def test_nothing_is_downloaded(server, monkeypatch):
    "A client may name an address where a file belongs, or a word, or ask for it as for an upload."
    import safehttpx
    looked_up = []

    async def look_up(host, *args):
        looked_up.append(host)
        raise ValueError("not in a test")
    monkeypatch.setattr(safehttpx, "async_validate_url", look_up)
    address = "http://fetch-me.example.com/x.png"
    with httpx.Client(base_url=server) as client:
        for streamed in (False, True):
            named = _file(address, is_stream=streamed)
            assert "image/jpeg" not in _photo(client, named) + _frame(client, named)
            _told(client, "photo", "change", None, named, "auto", False)
            _told(client, "dataset", "click", named)
        for way in ("/gradio_api/file=", "/gradio_api/file/", "/gradio_api/proxy="):
            assert client.get(way + address).status_code == 404
    assert looked_up == []


def test_a_photo_that_was_deleted_says_so(server):
    with httpx.Client(base_url=server) as client:
        sent = _upload(client, "late.png")
        eventually(lambda: not Path(sent).exists())
        assert "choose it again" in _photo(client, _file(sent))


def test_the_page_has_the_limits_of_the_api(monkeypatch):
    "On a request, however many files it has and however it comes; and on all that is held."
    monkeypatch.setattr(page, "_KEPT", (1, 2))
    app = page.mount_page(create_app("accurate", limits=Limits(body_bytes=1_000_000, held_bytes=2_000_000, upload_seconds=1.5), workers=1))

    def files(*sizes): return [("files", (f"{i}.png", os.urandom(size))) for i, size in enumerate(sizes)]

    def pieces(pause=0):
        for _ in range(100):
            yield b" " * 100_000
            time.sleep(pause)
    with serving(app) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        def send(*sizes): return client.post("/gradio_api/upload", files=files(*sizes))
        assert send(900_000, 900_000, 900_000).status_code == 413
        assert client.post("/gradio_api/queue/join", json={"data": ["x" * 3_000_000]}).status_code == 413
        kind = {"content-type": "application/json"}
        assert client.post("/gradio_api/queue/join", content=pieces(), headers=kind).status_code == 413
        assert client.post("/gradio_api/queue/join", content=pieces(.5), headers=kind).status_code == 408
        assert app.state.service.intake.held == 0 and list(app.state.uploads.rglob("*.png")) == []
        assert [send(900_000).status_code for _ in range(2)] == [200, 200]
        full = send(900_000)
        assert full.status_code == 429 and int(full.headers["retry-after"]) > 0, full.text
        assert client.get("/").status_code == 200
        eventually(lambda: send(900_000).status_code == 200)


def test_requests_that_come_at_once_share_the_room(tmp_path):
    uploads = page._Uploads(tmp_path, [])
    async def come(): return await asyncio.gather(*(uploads.make_room(900_000, 2_000_000) for _ in range(10)), return_exceptions=True)
    assert sum(answer is None for answer in asyncio.run(come())) == 2 and uploads.size == 1_800_000


def test_what_was_broken_off_is_swept(server):
    "A form without an end leaves files of which Gradio knows nothing, and every upload a folder."
    body = b'--x\r\ncontent-disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + bytes(5000)
    with httpx.Client(base_url=server) as client:
        _upload(client, "b.png", b"any bytes")
        client.post("/gradio_api/upload", content=body, headers={"content-type": "multipart/form-data; boundary=x"})
        assert _pictures(server)
    eventually(lambda: not _pictures(server) and all(any(d.iterdir()) for d in server.uploads.iterdir()))
