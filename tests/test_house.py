"""The rules of the house, which no single notebook can check: what may import what, links, README, size, style.

Most of it reads files and starts nothing. Where a rule is broken the message names the file and the cell.
"""
import ast
import configparser
import functools
import importlib
import importlib.util
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NBS, LIB = ROOT / "nbs", ROOT / "fer_nbdev"
CONFIG = configparser.ConfigParser(delimiters=["="])
CONFIG.read(ROOT / "settings.ini", encoding="utf-8")
CONFIG = CONFIG["DEFAULT"]

NOTEBOOKS = sorted(p for p in NBS.rglob("*.ipynb") if not any(part[0] in "._" for part in p.relative_to(NBS).parts))
MODULES = sorted(p for p in LIB.glob("*.py") if p.stem[0] != "_")
LIGHT = ("core", "data", "detect", "classify", "inference", "video", "serve", "cli")
HEAVY = ("torch", "torchvision", "fastai", "timm", "pandas", "sklearn", "cleanlab", "onnx", "onnxscript")
COMMANDS = ("pip install . && fer predict", 'pip install -e ".[dev]" && pytest -n 2 tests')


def _name(path):
    return path.relative_to(ROOT).as_posix()


def _cells(notebook, kind):
    "(number, source) of the cells of one kind."
    for i, cell in enumerate(json.loads(notebook.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] == kind:
            yield i, "".join(cell["source"])


def _is_export(source):
    return re.search(r"^#\|\s*exporti?s?\b", source, re.M) is not None


def _is_hidden(source):
    return re.search(r"^#\|\s*(?:hide|default_exp)\b", source, re.M) is not None


def _readme_script():
    spec = importlib.util.spec_from_file_location("readme", ROOT / ".ci" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _modidx():
    "symbol -> page#anchor of everything that the notebooks document, as nbdev wrote it down."
    assert (LIB / "_modidx.py").exists(), "fer_nbdev/_modidx.py is missing: run nbdev_export"
    tree = ast.parse((LIB / "_modidx.py").read_text(encoding="utf-8"))
    index = ast.literal_eval(next(n.value for n in tree.body if isinstance(n, ast.Assign)))
    return {symbol: page for symbols in index["syms"].values() for symbol, (page, _) in symbols.items()}


def _number(path):
    "The number of the notebook that a module comes from: '10' for fer_nbdev/inference.py, '04a' for fer_nbdev/recipe.py."
    found = re.search(r"File to edit: \S*?(\d\d[a-z]?)_\w+\.ipynb", path.read_text(encoding="utf-8"))
    return found[1] if found else None


def _imports(path):
    "(line, top-level module or 'fer_nbdev.x') of every import in a file, also of those inside functions."
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "fer_nbdev" + (f".{node.module}" if node.module else "") if node.level else node.module
            names = [f"{base}.{a.name}" for a in node.names] if base == "fer_nbdev" else [base]
        else:
            continue
        for name in names:
            parts = name.split(".")
            yield node.lineno, ".".join(parts[:2]) if parts[0] == "fer_nbdev" else parts[0]


# ------------------------------------------------------------------------------------------ what may import what

def _loaded(code):
    "Which heavy libraries are loaded after `code` ran in a fresh process."
    code += f"\nimport json, sys; print(json.dumps(sorted(set({HEAVY!r} + ('cv2', 'onnxruntime')) & set(sys.modules))))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tests", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_package_imports_nothing_before_it_is_asked():
    assert _loaded("import fer_nbdev; fer_nbdev.__version__") == set()


@pytest.mark.parametrize("module", LIGHT)
def test_light_module_imports_no_heavy_library(module):
    if not (LIB / f"{module}.py").exists():
        pytest.skip(f"there is no {module} module")
    assert not _loaded(f"import fer_nbdev.{module}") & set(HEAVY)


def test_predicting_imports_no_heavy_library():
    code = ("import numpy as np\nfrom fer_nbdev import predict, Predictor, Prediction, EMOTIONS\n"
            "assert predict(np.full((80, 80), 128, np.uint8), boxes=[(8, 8, 72, 72)])[0].emotion in EMOTIONS")
    assert not _loaded(code) & set(HEAVY)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_arrows_only_point_to_lower_numbers(path):
    number, wrong = _number(path), []
    assert number is not None, f"{_name(path)} does not name the numbered notebook that it comes from"
    for line, name in _imports(path):
        other = LIB / (name.partition(".")[2] + ".py")
        if name.startswith("fer_nbdev.") and other in MODULES and other != path and not _number(other) < number:
            wrong.append(f"line {line}: {path.stem} ({number}) imports {other.stem} ({_number(other)})")
        if path.stem in LIGHT and path.stem != "cli" and name in HEAVY:
            wrong.append(f"line {line}: {path.stem} is on the light side and imports {name}")
    assert not wrong, "\n".join(wrong)


def test_every_module_comes_from_a_notebook_of_its_name():
    notebooks = {re.sub(r"^\d+[a-z]?_", "", p.stem) for p in NBS.glob("[0-9]*.ipynb")}
    assert {p.stem for p in MODULES} <= notebooks


# ------------------------------------------------------------------------------------------------ the notebooks

@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.relative_to(NBS).as_posix())
def test_notebook_keeps_the_measure(notebook):
    cells = [c for c in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if not _is_hidden("".join(c["source"]))]
    assert len(cells) <= 60, f"{len(cells)} cells that readers see: split the notebook, or hide the tests among them"
    wrong = []
    for i, source in _cells(notebook, "code"):
        if not _is_export(source):
            continue
        lines = [line for line in source.splitlines() if line.strip() and not line.strip().startswith("#")]
        if len(lines) > 40:
            wrong.append(f"cell {i}: an export cell of {len(lines)} lines; 40 is the limit")
        if re.search(r"^\s*from\s+\S+\s+import\s+\*", source, re.M):
            wrong.append(f"cell {i}: `import *` in an export cell; name what is imported")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.relative_to(NBS).as_posix())
def test_the_first_cell_holds_title_and_summary_only(notebook):
    "nbdev turns that cell into the page's front matter, and drops whatever else stands in it."
    cell = json.loads(notebook.read_text(encoding="utf-8"))["cells"][0]
    lines = [line for line in "".join(cell["source"]).splitlines() if line.strip()]
    assert cell["cell_type"] == "markdown" and len(lines) >= 2
    assert lines[0].startswith("# ") and lines[1].startswith("> ") and all(line.startswith("- ") for line in lines[2:])


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.relative_to(NBS).as_posix())
def test_no_saved_output_is_an_error(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    failed = [i for i, c in enumerate(cells) for o in c.get("outputs", []) if o["output_type"] == "error"]
    assert not failed, f"cells {failed} were saved with a traceback"


def _text_files():
    try:
        done = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True,
                              check=True)
        files = [ROOT / line for line in done.stdout.splitlines()]
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout: which files belong to the project is not known")
    kinds = {".py", ".ipynb", ".md", ".ini", ".in", ".yml", ".yaml", ".json", ".css", ".toml", ".txt", ".cfg", ""}
    return [p for p in files if p.is_file() and p.suffix in kinds]


def test_nothing_names_a_machine_or_leaves_work_undone():
    words = [r"(?<![\w.])/(?:work|root|home|Users)/\w", r"\bTO" + r"DO\b", r"\bFIX" + r"ME\b"]
    found = []
    for path in _text_files():
        for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            line = re.sub(r'"image/\w+": ".*', "", line)
            found += [f"{_name(path)}:{i}: {m[0]}" for w in words for m in [re.search(w, line)] if m]
    found = [f for f in found if not f.startswith("tests/test_house.py")]
    assert not found, "\n".join(found)


# ---------------------------------------------------------------------------------------- symbols and docstrings

def _documented(annotation):
    "A typer option says what it is in its `help`."
    return any(getattr(m, "help", None) for m in getattr(annotation, "__metadata__", ()))


def _undocumented(function, name, is_method=False):
    "What a public function or method lacks."
    from fastcore.docments import docments
    if not inspect.getdoc(function):
        yield f"{name}: no docstring"
    notes = docments(function, full=True)
    for parameter in list(inspect.signature(function).parameters.values())[is_method:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        note = notes.get(parameter.name)
        if not (note and note.docment) and not _documented(parameter.annotation):
            yield f"{name}: parameter {parameter.name} has no docment"


def _is_inherited(cls, method):
    "Is this a method whose meaning a base class of another library has set, as `forward` or fastai's `before_fit`?"
    bases = [b for b in cls.__mro__[1:] if b is not object and not b.__module__.startswith("fer_nbdev")]
    event = re.fullmatch(r"(?:before|after)_\w+", method) and any(b.__module__.startswith("fastai") for b in bases)
    return bool(event) or any(method in vars(b) for b in bases)


def _undocumented_in(module):
    for name in module.__all__:
        thing = getattr(module, name)
        if inspect.isclass(thing) and thing.__module__ == module.__name__:
            # namedtuples and dataclasses write a docstring of their own, which says nothing
            if not thing.__doc__ or thing.__doc__.startswith(f"{name}("):
                yield f"{name}: no docstring"
            if inspect.isfunction(thing.__dict__.get("__init__")) and not hasattr(thing, "__dataclass_fields__"):
                yield from (m for m in _undocumented(thing.__init__, name, True) if not m.endswith("no docstring"))
            for method, f in vars(thing).items():
                if inspect.isfunction(f) and method[0] != "_" and not _is_inherited(thing, method):
                    yield from _undocumented(f, f"{name}.{method}", True)
        elif inspect.isfunction(thing) and thing.__module__ == module.__name__:
            yield from _undocumented(thing, name)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_every_public_symbol_is_documented(path):
    module = importlib.import_module(f"fer_nbdev.{path.stem}")
    assert module.__doc__, "the notebook has no `> one sentence` under its title"
    assert not list(_undocumented_in(module)), "\n".join(_undocumented_in(module))


# -------------------------------------------------------------------------------------------------------- links

def _anchors(notebook):
    "The anchors that a page has: its headings as Quarto writes them, and the symbols that it documents."
    headings = [h for _, s in _cells(notebook, "markdown") for h in re.findall(r"^#+\s+(.+?)\s*$", s, re.M)]
    page = re.sub(r"^\d+[a-zA-Z0-9]*_", "", notebook.stem.lower()) + ".html"
    slugs = {re.sub(r"[^\w\s.-]", "", h.lower()).strip().replace(" ", "-") for h in headings}
    return slugs | {where.partition("#")[2] for where in _modidx().values() if where.partition("#")[0] == page}


def _broken(target, notebook):
    "Why a link of a notebook leads nowhere; None when it is fine or leads to somebody else's site."
    files = f"{CONFIG['git_url']}/blob/{CONFIG['branch']}/"
    site = CONFIG["doc_host"] + CONFIG["doc_baseurl"] + "/"
    path, _, anchor = target.partition("#")
    if target.startswith(files):
        return None if (ROOT / path[len(files):]).exists() else "no such file"
    if target.startswith(site):
        pages = {where.partition("#")[0] for where in _modidx().values()} | {"", "index.html"}
        return None if path[len(site):] in pages else "no such page"
    if re.match(r"\w+:", target):
        return None
    file = (notebook.parent / path).resolve() if path else notebook
    if file.suffix == ".html":
        return "a link to an .html page: link the notebook, so that it works in the checkout as well"
    if not file.exists() or NBS not in file.parents:
        return "no such file under nbs/; for a file outside use its address in the repository"
    if anchor and file.suffix == ".ipynb" and anchor not in _anchors(file):
        return "no such heading or symbol on that page"
    return None


def _prose(source):
    "Markdown without its code blocks."
    return re.sub(r"^```.*?^```", "", source, flags=re.M | re.S)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.relative_to(NBS).as_posix())
def test_links_lead_somewhere(notebook):
    wrong = []
    for i, source in _cells(notebook, "markdown"):
        for target in re.findall(r"\]\(([^)\s]+)[^)]*\)", re.sub(r"`[^`\n]*`", "", _prose(source))):
            why = _broken(target, notebook)
            wrong += [f"cell {i}: {target}: {why}"] if why else []
    assert not wrong, "\n".join(wrong)


def _words():
    "Every word of the project's code, and of what a shell or a config of it says: what prose may name."
    files = [*MODULES, LIB / "__init__.py", *ROOT.glob("bench/*.py"), *ROOT.glob("tests/*.py"), ROOT / "settings.ini"]
    text = [p.read_text(encoding="utf-8") for p in files if p.exists()]
    text += [s for n in NOTEBOOKS for _, s in _cells(n, "code")]
    return set(re.findall(r"[A-Za-z_]\w*", "\n".join(text))) | _words_of_others()


@functools.cache
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
    "Does `root.rest` exist, where root is one of our modules or classes?"
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


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.relative_to(NBS).as_posix())
def test_named_symbols_exist(notebook):
    """A back-ticked name that is ours exists. `module.symbol`, `Class.method` and calls `f()` of ours must resolve; a
    bare name with an underscore or capitals must at least occur in some code, so that a rename cannot leave it behind."""
    index, words, wrong = _modidx(), _words(), []
    short = {s.split(".", 2)[2] for s in index}
    classes = {s.split(".")[0] for s in short if s[:1].isupper()}
    modules = {p.stem for p in MODULES} | {"fer_nbdev"}
    for i, source in _cells(notebook, "markdown"):
        for name in re.findall(r"(?<!`)`([A-Za-z_][\w.]*)(?:\(\))?`(?!`)", _prose(source)):
            root, *rest = name.split(".")
            file = rest and rest[-1] in ("py", "ipynb", "json", "yaml", "yml", "csv", "onnx", "md", "ini", "png", "npy")
            if rest and root in modules and not file and not _knows(root, rest):
                wrong.append(f"cell {i}: `{name}` is not in the package")
            elif rest and root in classes and name not in short and not set(rest) <= words:
                wrong.append(f"cell {i}: `{name}`: {root} has no such attribute")
            elif not rest and re.search(r"_|[a-z][A-Z]", name) and name not in words \
                    and not any(word.endswith("_" + name) for word in words):
                wrong.append(f"cell {i}: `{name}` occurs in no code of this project")
    assert not wrong, "\n".join(wrong)


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
    listed = sorted(_entries(sidebar["contents"]))
    assert listed == sorted(p.relative_to(NBS).as_posix() for p in NOTEBOOKS)


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


# ------------------------------------------------------------------------------------------------------- README

def test_readme_is_what_the_front_page_makes():
    assert not _readme_script().differences(), "run `python .ci/readme.py`"


def test_readme_has_the_two_commands():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line in COMMANDS] == list(COMMANDS)


def test_readme_quotes_the_card_of_the_bundled_model():
    card = json.loads((LIB / "weights" / "accurate" / "card.json").read_text(encoding="utf-8"))
    rows = {line.split("|")[1].strip(): line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
            if line.count("|") == 7}
    for split, s in card["scores"].items():
        for figure in (f"{s['n']:,}", f"{s['accuracy']:.1%}", f"{s['macro_f1']:.3f}", f"{s['log_loss']:.3f}", f"{s['ece']:.3f}"):
            assert figure in rows[split], f"{split}: {figure} of card.json is not in README: run the front page again"


def test_readme_quotes_the_benchmarks():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in sorted((ROOT / "bench" / "results").glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if "answer" in record:
            assert record["answer"] in readme, f"{_name(path)} says something else: run the front page again"


def test_no_figure_is_typed_into_the_front_page():
    figure = re.compile(r"\d\s*(?:%|ms\b|s\b|seconds?\b|minutes?\b|[KMG]B\b|x\b|faces/s|packages\b|points?\b)")
    for i, source in _cells(NBS / "index.ipynb", "markdown"):
        found = figure.search(_prose(source))
        assert not found, f"cell {i}: {found[0]!r} is typed by hand; render it from a file"


# ----------------------------------------------------------------------------------------------- around the code

def test_benchmarks_say_where_they_were_measured():
    for path in sorted((ROOT / "bench" / "results").glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        lacking = {"name", "date", "commit", "command", "hardware", "python", "versions", "results"} - record.keys()
        assert not lacking, f"{_name(path)} lacks {sorted(lacking)}"
        script = ROOT / record["command"].split()[1]
        assert script.is_file(), f"{_name(path)} was written by {script.name}, which does not exist"


def test_every_benchmark_is_in_the_table():
    table = (ROOT / "bench" / "README.md").read_text(encoding="utf-8")
    for path in sorted((ROOT / "bench").glob("*.py")):
        assert path.stem[0] == "_" or f"`{path.name}`" in table, f"bench/README.md does not mention {path.name}"


def test_workflows_are_valid_and_pinned():
    import yaml
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.y*ml"))
    assert {p.name for p in workflows} >= {"test.yaml", "docs.yaml"}
    for path in workflows:
        flow = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert flow["jobs"] and (True in flow or "on" in flow), f"{path.name}: YAML reads a bare `on` as true"
        for name, job in flow["jobs"].items():
            assert "runs-on" in job and "timeout-minutes" in job, f"{path.name}: {name}"
            for step in job["steps"]:
                assert ("run" in step) != ("uses" in step), f"{path.name}: {name}: {step}"
                uses = step.get("uses", "")
                assert not uses or re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", uses), f"{path.name}: {uses} is not pinned"


def test_settings_and_pins_agree():
    "The dev extra pins versions that the ranges for users allow, and nbdev stays at 2: nbdev 3 has no settings.ini."
    from packaging.requirements import Requirement
    ranges = {r.name: r for r in map(Requirement, (CONFIG["requirements"] + " " + CONFIG["train_requirements"]).split())}
    pins = [Requirement(r) for r in CONFIG["dev_requirements"].split()]
    assert any(r.name == "nbdev" and "2.4.14" in r.specifier for r in pins)
    for pin in pins:
        versions = [s.version for s in pin.specifier if s.operator == "=="]
        assert pin.name not in ranges or all(v in ranges[pin.name].specifier for v in versions), pin.name
