#!/usr/bin/env python
"""README.md is made from the saved cells and outputs of the front page, nbs/index.ipynb. Needs only Python.

    python .ci/readme.py            writes README.md and its pictures in README_files/
    python .ci/readme.py --check    changes nothing; exit code 1 and a diff where they are out of date

Our own 80 lines, because `nbdev_readme` needs Quarto and `jupyter nbconvert` does not know the cell options
that the page is written with: `hide` (the cell and its output), `echo: false` (the code only), `fig-alt`.
"""
import base64
import configparser
import difflib
import json
import posixpath
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "nbs" / "index.ipynb"
PICTURES = "README_files"
NOTE = "<!-- Made from nbs/index.ipynb by .ci/readme.py: edit the notebook, not this file. -->"
OPTION = re.compile(r"^#\|\s*([\w-]+)\s*:?\s*(.*?)\s*$", re.M)
LINK = re.compile(r"(!?\[[^\]]*\]\()(?!\w+:|#|/)([^)\s]+)(\))")


def _text(value):
    return value if isinstance(value, str) else "".join(value)


def _here():
    "How the page addresses the files of this repository that are not part of the site."
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return f"{parser['DEFAULT']['git_url']}/blob/{parser['DEFAULT']['branch']}/"


def _markdown(text):
    "One markdown cell with links as README needs them, relative to the top; no Quarto divs."
    text = re.sub(r"^:::.*\n?", "", text, flags=re.M)
    text = LINK.sub(lambda m: m[1] + posixpath.normpath("nbs/" + m[2]) + m[3], text)
    return text.replace(f"]({_here()}", "](")


def _output(output, alt, pictures):
    "One output as markdown; a picture is added to `pictures` (name -> bytes) and linked."
    if output["output_type"] == "stream":
        return "" if output["name"] == "stderr" else f"```text\n{_text(output['text']).rstrip()}\n```"
    data = output.get("data", {})
    if "image/png" in data:
        name = f"{PICTURES}/picture-{len(pictures) + 1}.png"
        pictures[name] = base64.b64decode(_text(data["image/png"]))
        return f"![{alt}]({name})"
    if "text/markdown" in data:
        return _markdown(_text(data["text/markdown"])).strip()
    return f"```text\n{_text(data['text/plain']).rstrip()}\n```" if "text/plain" in data else ""


def render(page=PAGE):
    "The text of README.md, and its pictures as a dict name -> bytes."
    parts, pictures = [NOTE], {}
    for cell in json.loads(page.read_text(encoding="utf-8"))["cells"]:
        source = _text(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(_markdown(source).strip())
        if cell["cell_type"] != "code":
            continue
        options = dict(OPTION.findall(source))
        if options.keys() & {"hide", "default_exp"} or options.get("include") == "false":
            continue
        code = OPTION.sub("", source).strip()
        if code and options.get("echo") != "false":
            parts.append(f"```python\n{code}\n```")
        alt = options.get("fig-alt", "").strip("\"'")
        if options.get("output") != "false":
            parts += [_output(o, alt, pictures) for o in cell["outputs"]]
    return "\n\n".join(part for part in parts if part) + "\n", pictures


def differences(page=PAGE, root=ROOT):
    "What `render` gives and the files do not have, as lines; empty when README is up to date."
    text, pictures = render(page)
    readme = root / "README.md"
    old = readme.read_text(encoding="utf-8") if readme.exists() else ""
    lines = list(difflib.unified_diff(old.splitlines(), text.splitlines(), "README.md", "nbs/index.ipynb", lineterm=""))
    for name, data in pictures.items():
        if not (root / name).exists() or (root / name).read_bytes() != data:
            lines.append(f"{name} is not the picture on the front page")
    folder = root / PICTURES
    here = [f"{PICTURES}/{p.name}" for p in sorted(folder.iterdir())] if folder.is_dir() else []
    return lines + [f"{name} is on no page" for name in here if name not in pictures]


def write(page=PAGE, root=ROOT):
    "Write README.md and exactly its pictures."
    text, pictures = render(page)
    folder = root / PICTURES
    for old in folder.iterdir() if folder.is_dir() else []:
        if f"{PICTURES}/{old.name}" not in pictures:
            old.unlink()
    for name, data in pictures.items():
        folder.mkdir(exist_ok=True)
        (root / name).write_bytes(data)
    (root / "README.md").write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        found = differences()
        print("\n".join(found) or "README.md is what the front page makes.")
        sys.exit(bool(found))
    write()
    print("Wrote README.md")
