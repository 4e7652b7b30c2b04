"""Nasty images, made on the spot: what phones, scanners, old programs, broken downloads and ill will produce.

`corpus()` gives `Case`s. Each says what `read_image` has to make of its bytes: these pixels (to a tolerance, where the format
loses some), or a `ValueError` whose message holds certain words. The expectation is worked out from the picture that was
stored, never by reading the file back with the code under test."""
import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image

MODES = ("jpeg", "png", "gif", "webp", "tiff", "bmp")


@dataclass
class Case:
    name: str
    data: bytes
    pixels: np.ndarray = None  # uint8 [h, w, 3] that must come out, or
    error: str = None  # words of the ValueError
    close: float = 0.  # mean absolute difference that is put up with
    suffix: str = ".bin"  # the name it is stored under

    def check(self, read, source, named):
        "Read it: the right pixels, or the error that names its source."
        try:
            found = read(source)
        except ValueError as e:
            assert self.pixels is None, f"{self.name}: {e}"
            assert self.error in str(e) and named in str(e), f"{self.name}: expected {self.error!r} about {named!r}, got: {e}"
            return
        assert self.pixels is not None, f"{self.name}: was read as {found.shape}, expected an error with {self.error!r}"
        assert found.dtype == np.uint8 and found.shape == self.pixels.shape, f"{self.name}: {found.dtype} {found.shape}, expected {self.pixels.shape}"
        assert found.flags.c_contiguous and found.flags.writeable, self.name
        off = np.abs(found.astype(int) - self.pixels).mean()
        assert off <= self.close, f"{self.name}: off by {off:.2f} on average, {self.close} is allowed"


def picture(width=64, height=48, seed=0):
    "RGB uint8 [h, w, 3]: soft colours without any symmetry, so that a turn, a mirror or swapped channels show."
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    rng = np.random.default_rng(seed)
    layers = [x * 200 + 30 * y, y * 220 + 20 * x * x, 255 * np.exp(-8 * ((x - .3) ** 2 + (y - .2) ** 2))]
    return np.clip(np.stack(layers, -1) + rng.normal(0, 2, (height, width, 3)), 0, 255).astype(np.uint8)


def gray_of(rgb):
    "What a gray copy holds, three times."
    return np.repeat(np.asarray(Image.fromarray(rgb).convert("L"))[..., None], 3, 2)


def stored(image, fmt, **options):
    "The bytes of a picture (array or PIL image) in a format."
    out = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(out, fmt, **options)
    return out.getvalue()


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width, height, body=b"", bits=8, colour=0, interlaced=0, more=b""):
    "A png put together by hand: its header says what it likes."
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + more + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")


def black_png(width, height):
    "A large picture in a small file: one bit a pixel, all of them zero."
    return png_of(width, height, zlib.compress(bytes((width + 7) // 8 + 1) * height, 1), bits=1)


def interlaced_png(gray):
    "An 8-bit gray png in the seven passes of Adam7; Pillow writes none."
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    rows = b"".join(b"\0" + row.tobytes() for y, x, dy, dx in passes for row in gray[y::dy, x::dx] if row.size)
    return png_of(gray.shape[1], gray.shape[0], zlib.compress(rows), interlaced=1)


def turned(upright, orientation):
    "The pixels as a camera stores them that notes this EXIF orientation: the inverse of what the note asks for, by rot90 and flip."
    turn = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1),
            6: lambda a: np.rot90(a, 1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: lambda a: np.rot90(a, -1)}
    return np.ascontiguousarray(turn[orientation](upright))


def exif_with(orientation, extra=()):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for tag, value in extra:
        exif[tag] = value
    return exif


def icc_profile():
    from PIL import ImageCms
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def ico_around(png, width=16, height=16):
    "An icon whose table says 16 x 16, whatever the png inside is."
    return struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", width, height, 0, 0, 1, 32, len(png), 22) + png


def tiff_of(entries, strip=b""):
    "A little-endian tiff of (tag, type, count, value) entries; the strip lies at its end."
    start = 8 + 2 + 12 * len(entries) + 4
    body = b"".join(struct.pack("<HHII", t, k, n, start if v == "strip" else v) for t, k, n, v in entries)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(entries)) + body + b"\0\0\0\0" + strip


def plain_formats(rgb):
    "The picture in the six formats that people send."
    return {"jpeg": stored(rgb, "JPEG", quality=95), "png": stored(rgb, "PNG"), "gif": stored(Image.fromarray(rgb).quantize(256), "GIF"),
            "webp": stored(rgb, "WEBP", quality=95), "tiff": stored(rgb, "TIFF"), "bmp": stored(rgb, "BMP")}


LOSS = {"jpeg": 3., "webp": 4., "gif": 6.}  # mean difference that the formats themselves make


def good_cases():
    rgb = picture()
    height, width = rgb.shape[:2]
    gray, plain = gray_of(rgb), plain_formats(rgb)
    for fmt, data in plain.items():
        yield Case(fmt, data, rgb, close=LOSS.get(fmt, 0.), suffix=f".{fmt}")
    for fmt, wrong in zip(plain, (*MODES[1:], MODES[0])):
        yield Case(f"{fmt} named .{wrong}", plain[fmt], rgb, close=LOSS.get(fmt, 0.), suffix=f".{wrong}")
    yield Case("jpeg without a suffix", plain["jpeg"], rgb, close=3., suffix="")
    yield Case("png with junk behind it", plain["png"] + b"junk" * 1000, rgb)
    yield Case("jpeg with junk behind it", plain["jpeg"] + b"\xff\xd8junk" * 1000, rgb, close=3.)
    # sizes
    for fmt in ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"):
        dot = np.full((1, 1, 3), (200, 40, 90), np.uint8)
        yield Case(f"one pixel, {fmt}", stored(dot, fmt), dot, close=8.)
    yield Case("one row", stored(picture(300, 1), "PNG"), picture(300, 1))
    yield Case("one column", stored(picture(1, 300), "PNG"), picture(1, 300))
    # depths and modes
    deep = (np.arange(height * width, dtype=np.uint32).reshape(height, width) * 21).clip(0, 65535).astype(np.uint16)
    eight = np.repeat((deep * (255 / 65535) + .5).astype(np.uint8)[..., None], 3, 2)
    yield Case("16-bit png", stored(deep, "PNG"), eight)
    yield Case("16-bit tiff", stored(deep, "TIFF"), eight)
    unit = (deep / 65535).astype(np.float32)
    yield Case("float tiff, 0..1", stored(unit, "TIFF"), eight, close=.01)
    yield Case("float tiff, 0..255", stored(unit * 255, "TIFF"), eight, close=.01)
    yield Case("gray png", stored(Image.fromarray(rgb).convert("L"), "PNG"), gray)
    yield Case("gray jpeg", stored(Image.fromarray(rgb).convert("L"), "JPEG", quality=95), gray, close=3.)
    bits = Image.fromarray(rgb).convert("1", dither=Image.Dither.NONE)
    two = np.repeat(np.where(np.asarray(bits), 255, 0).astype(np.uint8)[..., None], 3, 2)
    for fmt in ("PNG", "TIFF", "BMP", "PPM"):
        yield Case(f"1 bit, {fmt}", stored(bits, fmt), two)
    yield Case("1 bit, fax tiff", stored(bits, "TIFF", compression="group4"), two)
    cmyk = Image.fromarray(rgb).convert("CMYK")
    yield Case("cmyk tiff", stored(cmyk, "TIFF"), rgb, close=1.)
    yield Case("cmyk jpeg", stored(cmyk, "JPEG", quality=95), rgb, close=4.)
    yield Case("progressive jpeg", stored(rgb, "JPEG", quality=95, progressive=True), rgb, close=3.)
    yield Case("jpeg, 4:2:0 and optimised", stored(rgb, "JPEG", quality=95, subsampling=2, optimize=True), rgb, close=4.)
    yield Case("interlaced png", interlaced_png(gray[..., 0].copy()), gray)
    for compression in ("tiff_lzw", "tiff_deflate", "packbits", "raw"):
        yield Case(f"tiff, {compression}", stored(rgb, "TIFF", compression=compression), rgb)
    # what shows through
    alpha = np.tile(np.linspace(0, 255, width).round().astype(np.uint8), (height, 1))
    weight = alpha[..., None] / 255
    over = np.round(rgb * weight + 255 * (1 - weight)).astype(np.uint8)
    yield Case("rgba png", stored(np.dstack([rgb, alpha]), "PNG"), over, close=1.)
    yield Case("rgba webp", stored(np.dstack([rgb, alpha]), "WEBP", lossless=True, exact=True), over, close=1.)
    yield Case("rgba tiff", stored(np.dstack([rgb, alpha]), "TIFF"), over, close=1.)
    la = Image.fromarray(np.dstack([gray[..., 0], alpha]))
    yield Case("gray and alpha png", stored(la, "PNG"), np.round(gray * weight + 255 * (1 - weight)).astype(np.uint8), close=1.)
    few = Image.fromarray(rgb).quantize(16)
    colours = np.asarray(few.convert("RGB"))
    shares = (np.arange(16) * 17).astype(np.uint8)
    through = shares[np.asarray(few)][..., None] / 255
    faded = np.round(colours * through + 255 * (1 - through)).astype(np.uint8)
    yield Case("palette with alpha, png", stored(few, "PNG", transparency=shares.tobytes()), faded, close=1.)
    keyed = np.where((np.asarray(few) == 3)[..., None], 255, colours).astype(np.uint8)
    yield Case("palette with one clear colour, gif", stored(few, "GIF", transparency=3), keyed)
    yield Case("4-bit palette png", stored(few, "PNG", bits=4), colours)
    # frames: the first one counts
    frames = [Image.fromarray(picture(seed=s)) for s in range(4)]
    for fmt, options in {"PNG": {}, "WEBP": dict(lossless=True), "TIFF": {}}.items():
        yield Case(f"animated or many pages, {fmt}", stored(frames[0], fmt, save_all=True, append_images=frames[1:], **options), rgb, close=.5)
    animated = [f.quantize(64) for f in frames]
    yield Case("animated gif", stored(animated[0], "GIF", save_all=True, append_images=animated[1:], duration=50), np.asarray(animated[0].convert("RGB")))
    # notes of cameras and programs
    for orientation in range(1, 9):
        side = turned(rgb, orientation)
        for fmt, options, close in (("JPEG", dict(quality=95), 3.), ("PNG", {}, 0.), ("WEBP", dict(lossless=True), 0.), ("TIFF", {}, 0.)):
            yield Case(f"orientation {orientation}, {fmt}", stored(side, fmt, exif=exif_with(orientation), **options), rgb, close=close)
    for nonsense in (0, 9, 255, 65535):
        yield Case(f"orientation {nonsense}", stored(rgb, "PNG", exif=exif_with(nonsense)), rgb)
    yield Case("60 kB of exif, jpeg", stored(turned(rgb, 6), "JPEG", quality=95, exif=exif_with(6, [(0x010E, "x" * 60_000)])), rgb, close=3.)
    yield Case("5 MB of exif, png", stored(turned(rgb, 8), "PNG", exif=exif_with(8, [(0x010E, "x" * 5_000_000)])), rgb)
    yield Case("exif that is no exif", stored(rgb, "JPEG", quality=95, exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff" + b"\x7f" * 3000), rgb, close=3.)
    yield Case("icc profile", stored(rgb, "PNG", icc_profile=icc_profile()), rgb)
    yield Case("icc profile that is none", stored(rgb, "JPEG", quality=95, icc_profile=b"\x00" * 100_000), rgb, close=3.)
    yield Case("gamma, density and text, png", png_of(width, height, zlib.compress(b"".join(b"\0" + row.tobytes() for row in rgb)), colour=2,
               more=png_chunk(b"gAMA", struct.pack(">I", 45455)) + png_chunk(b"pHYs", b"\0" * 9) + png_chunk(b"tEXt", b"Comment\0" + b"x" * 5000)), rgb)


def truncated_cases(lengths=24):
    "Each of the six formats cut at many lengths: nothing of them is a picture until all of it is there."
    rgb = picture()
    for fmt, data in plain_formats(rgb).items():
        for cut in np.unique(np.linspace(1, len(data) - {"jpeg": 400, "tiff": 200, "bmp": 200}.get(fmt, 40), lengths).astype(int)):
            yield Case(f"{fmt} of {len(data)} bytes cut at {cut}", data[:cut], error="", suffix=f".{fmt}")


def bad_cases():
    plain = plain_formats(picture())
    yield Case("no bytes", b"", error="(0 bytes)")
    for name, data in {"words": b"these are words, not pixels", "zeros": bytes(5000), "html": b"<!doctype html><p>404 not found", "zip": b"PK\3\4" + bytes(100),
                       "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>', "pickle": b"\x80\x04K\x01.", "mp4": b"\0\0\0 ftypisom" + bytes(200)}.items():
        yield Case(f"{name} instead of an image", data, error="not an image", suffix=".jpg")
    yield Case("postscript, which Ghostscript would run",
               b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n0 0 10 10 rectfill\nshowpage\n%%EOF\n",
               error="PostScript", suffix=".eps")
    yield Case("no columns, png", png_of(0, 5), error="")
    yield Case("no rows, bmp", plain["bmp"][:22] + struct.pack("<i", 0) + plain["bmp"][26:], error="")
    yield Case("no rows, jpeg", plain["jpeg"].replace(struct.pack(">HH", 48, 64), struct.pack(">HH", 0, 64), 1), error="")
    yield Case("declares 2 billion a side, png", png_of(2**31 - 1, 2**31 - 1, zlib.compress(b"\0" * 100)), error="max_pixels")
    yield Case("declares 60,000 a side, gif", plain["gif"][:6] + struct.pack("<HH", 60_000, 60_000) + plain["gif"][10:], error="max_pixels")
    yield Case("declares 65,500 a side, jpeg", plain["jpeg"].replace(struct.pack(">HH", 48, 64), struct.pack(">HH", 65_500, 65_500), 1), error="max_pixels")
    yield Case("declares 100,000 a side, bmp", plain["bmp"][:18] + struct.pack("<ii", 100_000, 100_000) + plain["bmp"][26:], error="max_pixels")
    size = [(256, 4, 1, 200_000), (257, 4, 1, 200_000), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1),
            (273, 4, 1, "strip"), (277, 3, 1, 1), (278, 4, 1, 200_000), (279, 4, 1, 4)]
    yield Case("declares 200,000 a side, tiff", tiff_of(size, b"abcd"), error="max_pixels")
    yield Case("a bomb: 200 million pixels in 100 kB", black_png(20_000, 10_000), error="max_pixels")
    yield Case("a bomb inside an icon", ico_around(black_png(30_000, 20_000)), error="", suffix=".ico")
    yield Case("a large picture inside an icon", ico_around(black_png(12_000, 10_000)), error="max_pixels", suffix=".ico")
    text = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(100_000_000), 1))
    yield Case("a bomb in the text of a png", png_of(8, 8, zlib.compress(bytes(72)), more=text), error="")
    profile = png_chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(100_000_000), 1))
    yield Case("a bomb in the profile of a png", png_of(8, 8, zlib.compress(bytes(72)), more=profile), error="broken header")
    for value in (np.nan, np.inf, -1., 300.):
        yield Case(f"float tiff with {value}", stored(np.full((4, 4), value, np.float32), "TIFF"), error="pixel values")
    yield Case("tiff without its tags", tiff_of([(256, 4, 1, 4), (257, 4, 1, 4)]), error="")
    yield Case("png whose checksum is wrong", plain["png"][:40] + bytes([plain["png"][40] ^ 1]) + plain["png"][41:], error="")


def corpus():
    yield from good_cases()
    yield from bad_cases()
    yield from truncated_cases()
