"""The pages as a reader meets them: every link leads somewhere, every name exists, every public symbol is shown. Without Quarto.

Read are the prose of all notebooks, what their cells printed as Markdown, the Markdown files of the repository and the docstrings.
"""
import functools
import importlib
import importlib.util
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from _repository import CONFIG, LIB, MODULES, NBS, NOTEBOOKS, ROOT, is_inherited, name_of, page_id, read_cells, read_modidx

FILES = [p for p in (*ROOT.glob("*.md"), ROOT / "bench" / "README.md") if p.exists()]
PAGES = [*NOTEBOOKS, *FILES]
LINK = re.compile(r"""\]\(\s*<?([^)\s>]+)>?[^)]*\)        # [text](target "title"), pictures as well
                    | ^\s*\[[^\]]+\]:\s*(\S+)              # [name]: target
                    | <(?:a|img)\b[^>]*?\b(?:href|src)=["']([^"']+)""", re.X | re.M)
SUFFIXES = ("py", "ipynb", "json", "yaml", "yml", "csv", "onnx", "md", "ini", "png", "npy", "html", "txt", "safetensors", "jpg")


def _id(page):
    return page_id(page) if page.suffix == ".ipynb" else name_of(page)


def _without_code(text):
    "Markdown without its code blocks."
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def _texts(page):
    "(where, Markdown) of everything on a page that readers see as text."
    if page.suffix == ".md":
        yield "text", page.read_text(encoding="utf-8")
        return
    for i, source in read_cells(page, "markdown"):
        yield f"cell {i}", source
    for i, cell in enumerate(json.loads(page.read_text(encoding="utf-8"))["cells"]):
        for output in cell.get("outputs", []):
            if "text/markdown" in output.get("data", {}):
                yield f"output of cell {i}", "".join(output["data"]["text/markdown"])


# -------------------------------------------------------------------------------------------------------- links

def _slugs(page):
    "The anchors that the headings of a page get: Quarto's in a notebook, GitHub's in a Markdown file."
    heading = re.compile(r"^#+\s+(.+?)\s*(?:\{[^}]*\})?\s*$", re.M)
    headings = [h for where, text in _texts(page) if not where.startswith("output") for h in heading.findall(_without_code(text))]
    keep = r"[^\w\s.-]" if page.suffix == ".ipynb" else r"[^\w\s-]"
    return {re.sub(keep, "", h.lower()).strip().replace(" ", "-") for h in headings}


def _anchors(page):
    "The headings of a page and, of a notebook, the symbols that it documents."
    html = re.sub(r"^\d+[a-zA-Z0-9]*_", "", page.stem.lower()) + ".html"
    return _slugs(page) | {where.partition("#")[2] for where in read_modidx().values() if page.suffix == ".ipynb" and where.partition("#")[0] == html}


def _broken(target, page):
    "Why a link on a page leads nowhere; None when it is fine or leads to somebody else's site."
    files = f"{CONFIG['git_url']}/blob/{CONFIG['branch']}/"
    site = CONFIG["doc_host"] + CONFIG["doc_baseurl"] + "/"
    path, _, anchor = target.partition("#")
    if target.startswith(files):
        return None if (ROOT / path[len(files):]).exists() else "no such file"
    if target.startswith(site):
        pages = {where.partition("#")[0] for where in read_modidx().values()} | {"", "index.html"}
        return None if path[len(site):] in pages else "no such page"
    if re.match(r"\w+:", target):
        return None
    file = (page.parent / path).resolve() if path else page
    if file.suffix == ".html":
        return "a link to an .html page: link the notebook, so that it works in the checkout as well"
    if page.suffix == ".ipynb" and (not file.exists() or NBS not in file.parents):
        return "no such file under nbs/; for a file outside use its address in the repository"
    if not file.exists() or ROOT not in (file, *file.parents):
        return "no such file in the repository"
    if anchor and file.suffix in (".ipynb", ".md") and anchor not in _anchors(file):
        return "no such heading or symbol on that page"
    return None


def _links(text):
    "Every target in a piece of Markdown; code is no link."
    return [next(filter(None, m)) for m in LINK.findall(re.sub(r"`[^`\n]*`", "", _without_code(text)))]


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_links_lead_somewhere(page):
    wrong = [f"{where}: {target}: {why}" for where, text in _texts(page) for target in _links(text) for why in [_broken(target, page)] if why]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("text, n", [
    ("[a](01_data.ipynb)", 0), ("[a](01_data.ipynb 'title') and [b](https://example.org/nowhere)", 0), ("`[a](nowhere.ipynb)`", 0),
    ("[a](nowhere.ipynb)", 1), ("![a](nowhere.png)", 1), ("[a](data.html)", 1), ("[a](../README.md)", 1), ("[a][1]\n\n[1]: nowhere.ipynb", 1),
    ('<a href="nowhere.ipynb">a</a> <img alt="" src=\'gone.png\'>', 2), ("[a](01_data.ipynb#no-such-heading)", 1), ("[a](#no-such-heading)", 1),
    (f"[a]({CONFIG['git_url']}/blob/{CONFIG['branch']}/gone.md)", 1), (f"[a]({CONFIG['git_url']}/blob/{CONFIG['branch']}/LICENSE)", 0)])
def test_a_broken_link_is_found(text, n):
    "The search itself: what it must find, and what it must not."
    assert sum(_broken(target, NBS / "00_core.ipynb") is not None for target in _links(text)) == n


def test_every_page_is_reached_from_the_front_page_by_links_alone():
    "As a reader goes who never looks at the sidebar."
    seen, ahead = set(), [NBS / "index.ipynb"]
    while ahead:
        page = ahead.pop()
        if page in seen:
            continue
        seen.add(page)
        targets = [t.partition("#")[0] for _, text in _texts(page) for t in _links(text)]
        ahead += [p for t in targets if t.endswith(".ipynb") and ":" not in t for p in [(page.parent / t).resolve()] if p.exists()]
    lost = sorted(page_id(p) for p in set(NOTEBOOKS) - seen)
    assert not lost, f"no link in any text leads to {', '.join(lost)}"


# -------------------------------------------------------------------------------------------------------- names

@functools.cache
def _words():
    "Every word of the project's code, and of what a shell or a config of it says: what prose may name. Not of this file, which makes some up."
    files = [*MODULES, LIB / "__init__.py", *ROOT.glob("bench/*.py"), *(p for p in ROOT.glob("tests/*.py") if p.name != "test_docs.py"),
             *ROOT.glob(".ci/*"), ROOT / "settings.ini", ROOT / "setup.py"]
    text = [p.read_text(encoding="utf-8") for p in files if p.exists()]
    text += [s for n in NOTEBOOKS for _, s in read_cells(n, "code")]
    return set(re.findall(r"[A-Za-z_]\w*", "\n".join(text))) | _words_of_others()


def _words_of_others():
    "The names of the libraries that the pages talk about; what is not installed adds none, and fastai is not imported."
    words = set()
    for name in ("fastai", "fastcore", "nbdev"):
        spec = importlib.util.find_spec(name)
        index = spec and Path(spec.origin).with_name("_modidx.py")
        if index and index.exists():
            words |= set(re.findall(r"[A-Za-z_]\w*", index.read_text(encoding="utf-8")))
    for name in ("numpy", "cv2", "PIL.Image", "onnxruntime", "matplotlib.pyplot", "pandas", "sklearn.metrics", "torch",
                 "torch.nn", "torch.nn.functional", "torch.optim.lr_scheduler", "torch.utils.data"):
        try:
            words |= set(dir(importlib.import_module(name)))
        except ImportError:
            pass
    return words


def _knows(root, rest):
    "Does `root.rest` exist, where root is one of our modules?"
    try:
        thing = importlib.import_module(f"fer_nbdev.{root}" if root != "fer_nbdev" else root)
        for part in rest:
            try:
                thing = getattr(thing, part)
            except AttributeError:
                thing = importlib.import_module(f"{thing.__name__}.{part}")
        return True
    except (ImportError, AttributeError):
        return False


@functools.cache
def _symbols():
    "Public symbols as prose names them, `function` and `Class.method`; the classes among them; the modules."
    short = {s.split(".", 2)[2] for s in read_modidx()}
    return short, {s.split(".")[0] for s in short if s[:1].isupper()}, {p.stem for p in MODULES} | {"fer_nbdev"}


def _unknown(text):
    """Back-ticked names that nothing is called. `module.symbol` and `Class.method` of ours must resolve; a bare name with an underscore
    or capitals, and what is called as `f(x)`, must at least occur in some code, so that a rename cannot leave it behind."""
    short, classes, modules = _symbols()
    for name, call in re.findall(r"(?<!`)`([A-Za-z_][\w.]*)(\([^`\n]*\))?`(?!`)", _without_code(text)):
        root, *rest = name.split(".")
        file = rest and rest[-1] in SUFFIXES
        known = name in _words() or any(word.endswith("_" + name) for word in _words())
        if rest and root in modules and not file and not _knows(root, rest):
            yield f"`{name}` is not in the package"
        elif rest and root in classes and name not in short and not set(rest) <= _words():
            yield f"`{name}`: {root} has no such attribute"
        elif not rest and not known and (call or re.search(r"_|[a-z][A-Z]", name)):
            yield f"`{name}{call}` occurs in no code of this project"


def _wrong_commands(text):
    "Commands of `fer`, in back-ticks and in blocks of bash, that the command line does not know."
    from typer.main import get_command
    from fer_nbdev.cli import app
    commands = get_command(app).commands
    blocks = "\n".join(re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", text, re.M | re.S))
    lines = re.findall(r"(?<!`)`((?:\$ )?fer [^`\n]*)`(?!`)", _without_code(text)) + blocks.replace("\\\n", " ").splitlines()
    for part in (p for line in lines for p in re.split(r"&&|\||;", line)):
        words = shlex.split(part.strip().removeprefix("$ "), comments=True)
        if words[:1] != ["fer"] or len(words) == 1 or words[1].startswith("-") or not re.fullmatch(r"[a-z][\w-]*", words[1]):
            continue
        if words[1] not in commands:
            yield f"fer {words[1]}: no such command"
            continue
        options = {o for p in commands[words[1]].params for o in (*p.opts, *p.secondary_opts)} | {"--help", "-h"}
        yield from (f"fer {words[1]} {w}: no such option" for w in words[2:] if re.match(r"--?[a-z]", w) and w.partition("=")[0] not in options)


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_named_symbols_exist(page):
    wrong = [f"{where}: {why}" for where, text in _texts(page) for why in (*_unknown(text), *_wrong_commands(text))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_symbols_named_in_docstrings_exist(path):
    module, wrong = importlib.import_module(f"fer_nbdev.{path.stem}"), []
    for name in module.__all__:
        thing = getattr(module, name)
        if getattr(thing, "__module__", None) != module.__name__:
            continue
        parts = vars(thing) if inspect.isclass(thing) else {}
        own = [(f"{name}.{m}", f) for m, f in parts.items() if m[0] != "_" and (inspect.isfunction(f) or isinstance(f, property))]
        for where, symbol in ((name, thing), *own):
            text = (symbol.__doc__ or "") if not inspect.isclass(symbol) or not (symbol.__doc__ or "").startswith(f"{name}(") else ""
            wrong += [f"{where}: {why}" for why in (*_unknown(text), *_wrong_commands(text))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("text, n", [
    ("`core.read_image`, `read_image`, `Predictor.predict`, `Box`, `numpy`, `fer_nbdev.core`, `card.json`, `split`", 0),
    ("`core.read_picture`", 1), ("`read_a_picture`", 1), ("`readPicture`", 1), ("`Predictor.foretell`", 1), ("`foretell(x)`", 1), ("`read_image(path)`", 0),
    ("```\n`read_a_picture`\n```\n", 0)])
def test_a_wrong_name_is_found(text, n):
    assert len(list(_unknown(text))) == n


@pytest.mark.parametrize("text, n", [
    ("`fer predict photo.jpg --json`, `fer --version`, `fer`, `fer COMMAND --help`", 0), ("`fer foretell`", 1), ("`fer predict --jason x`", 1),
    ("```bash\npip install . && fer predict --nowhere  # --here\n```\n", 1), ("```bash\nfer train --data x \\\n  --colour red\n```\n", 1),
    ("```python\nfer predict --nowhere\n```\n", 0)])
def test_a_wrong_command_is_found(text, n):
    assert len(list(_wrong_commands(text))) == n


# ------------------------------------------------------------------------------------- what the pages document

def _shown(notebook):
    "The symbols whose signature and docstring stand on a page: nbdev adds functions, classes and patched methods, `show_doc` cells the rest."
    from nbdev.frontmatter import FrontmatterProc
    from nbdev.process import NBProcessor
    from nbdev.processors import add_show_docs, populate_language
    page = NBProcessor(notebook, procs=[FrontmatterProc, populate_language, add_show_docs], process=True).nb
    return {name for c in page.cells if c.cell_type == "code" for name in re.findall(r"^show_doc\(([\w.]+)", c.source, re.M)}


def _public(module):
    "Functions, classes, and methods that a class defines itself; what the base class of another library means by a name is documented there."
    for name in module.__all__:
        thing = getattr(module, name)
        if not (inspect.isclass(thing) or inspect.isfunction(thing)) or thing.__module__ != module.__name__:
            continue
        yield name
        for method, f in vars(thing).items() if inspect.isclass(thing) else ():
            f = getattr(f, "__func__", f)
            own = inspect.isfunction(f) and f.__qualname__ == f"{name}.{method}"
            if own and method[0] != "_" and method not in ("encodes", "decodes") and not is_inherited(thing, method):
                yield f"{name}.{method}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_every_public_symbol_is_on_its_page(path):
    "For a method in the body of a class nbdev writes nothing: a cell `show_doc(Class.method)` below it does."
    pytest.importorskip("nbdev")
    notebook = next(n for n in NOTEBOOKS if n.parent == NBS and re.sub(r"^\d+[a-z]?_", "", n.stem) == path.stem)
    lost = sorted(set(_public(importlib.import_module(f"fer_nbdev.{path.stem}"))) - _shown(notebook))
    assert not lost, f"{notebook.name} does not show " + ", ".join(lost) + ": add a cell show_doc(...) for each, after the one that defines it"


# ------------------------------------------------------------------------------------------------------ the site

def _entries(node):
    "Every file that the sidebar names."
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict):
        yield from (e for key in ("href", "file") if key in node for e in [node[key]])
        yield from _entries(node.get("contents", []))
    else:
        for item in node:
            yield from _entries(item)


def test_the_sidebar_names_every_notebook_once():
    import yaml
    sidebar = yaml.safe_load((NBS / "sidebar.yml").read_text(encoding="utf-8"))["website"]["sidebar"]
    assert sorted(_entries(sidebar["contents"])) == sorted(page_id(p) for p in NOTEBOOKS)


def test_the_site_is_configured_in_one_place():
    import yaml
    link = NBS / "_quarto.yml"
    assert link.read_text(encoding="utf-8") in ("../_quarto.yml", (ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    quarto = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    assert quarto["metadata-files"] == ["nbdev.yml", "sidebar.yml"]
    for entry in _entries(quarto["website"]["navbar"]["left"]):
        assert (NBS / entry).exists(), f"the navigation bar names {entry}"
    nbdev = yaml.safe_load((NBS / "nbdev.yml").read_text(encoding="utf-8"))["website"]
    assert nbdev["repo-url"] == CONFIG["git_url"] and nbdev["description"] == CONFIG["description"]


@pytest.mark.parametrize("prints, code, passes", [
    ("Output created: _docs/index.html", 0, True),
    ("WARN: Unable to resolve link target: nowhere.ipynb", 0, False),
    ("WARNING (main.lua:1234) Unable to resolve crossref @fig-nothing", 0, False),
    ("ERROR: a page does not render", 1, False)])
def test_the_docs_workflow_stops_at_a_link_that_leads_nowhere(prints, code, passes, tmp_path):
    "Quarto only warns. The step that renders is run here as GitHub runs it, with a Quarto that says what we want to hear."
    import yaml
    bash = shutil.which("bash")
    if not bash or os.name == "nt":
        pytest.skip("no bash to run the step with")
    flow = yaml.safe_load((ROOT / ".github" / "workflows" / "docs.yaml").read_text(encoding="utf-8"))
    step, = [s for s in flow["jobs"]["build"]["steps"] if "quarto render" in s.get("run", "")]
    assert step.get("shell") == "bash" and not step.get("continue-on-error") and flow["jobs"]["deploy"]["needs"] == "build"
    (tmp_path / "quarto").write_text(f'#!/bin/sh\necho "{prints}" >&2\nexit {code}\n')
    (tmp_path / "quarto").chmod(0o755)
    (tmp_path / "step.sh").write_text(step["run"])
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([bash, "--noprofile", "--norc", "-eo", "pipefail", "step.sh"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode == 0) == passes, done.stdout + done.stderr
