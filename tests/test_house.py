"""The rules of the house, which no single notebook can check: what may import what, README, size, style. Links and names: test_docs.py.

Most of it reads files and starts nothing. Where a rule is broken the message names the file and the cell.
"""
import ast
import importlib
import importlib.util
import inspect
import json
import re
import subprocess
import sys

import pytest

from _repository import CONFIG, LIB, MODULES, NBS, NOTEBOOKS, ROOT, is_inherited, name_of, page_id, read_cells

LIGHT = ("core", "cards", "data", "detect", "classify", "inference", "track", "video", "service", "serve", "page", "scale", "cli")
HEAVY = ("torch", "torchvision", "fastai", "timm", "pandas", "sklearn", "cleanlab", "onnx", "onnxscript")
COMMANDS = ("pip install . && fer predict", 'pip install -e ".[dev]" && pytest -n 2 tests')


def _is_export(source):
    return re.search(r"^#\|\s*exporti?s?\b", source, re.M) is not None


def _is_hidden(source):
    "Cells that readers do not see, and those that only show a signature, as nbdev does of itself for functions."
    return re.search(r"^#\|\s*(?:hide|default_exp)\b|\Ashow_doc\([\w.]+\)\Z", source.strip(), re.M) is not None


def _readme_script():
    spec = importlib.util.spec_from_file_location("readme", ROOT / ".ci" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    assert number is not None, f"{name_of(path)} does not name the numbered notebook that it comes from"
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

@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=page_id)
def test_notebook_keeps_the_measure(notebook):
    cells = [c for c in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if not _is_hidden("".join(c["source"]))]
    assert len(cells) <= 60, f"{len(cells)} cells that readers see: split the notebook, or hide the tests among them"
    wrong = []
    for i, source in read_cells(notebook, "code"):
        if not _is_export(source):
            continue
        lines = [line for line in source.splitlines() if line.strip() and not line.strip().startswith("#")]
        if len(lines) > 40:
            wrong.append(f"cell {i}: an export cell of {len(lines)} lines; 40 is the limit")
        if re.search(r"^\s*from\s+\S+\s+import\s+\*", source, re.M):
            wrong.append(f"cell {i}: `import *` in an export cell; name what is imported")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=page_id)
def test_the_first_cell_holds_title_and_summary_only(notebook):
    "nbdev turns that cell into the page's front matter, and drops whatever else stands in it."
    cell = json.loads(notebook.read_text(encoding="utf-8"))["cells"][0]
    lines = [line for line in "".join(cell["source"]).splitlines() if line.strip()]
    assert cell["cell_type"] == "markdown" and len(lines) >= 2
    assert lines[0].startswith("# ") and lines[1].startswith("> ") and all(line.startswith("- ") for line in lines[2:])


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=page_id)
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
            found += [f"{name_of(path)}:{i}: {m[0]}" for w in words for m in [re.search(w, line)] if m]
    found = [f for f in found if not f.startswith("tests/test_house.py")]
    assert not found, "\n".join(found)


def test_no_line_of_code_is_longer_than_160_characters():
    "Neither in the notebooks, from which the modules come, nor around them; a line that holds nothing but an address may be longer."
    files = sorted(p for folder in ("tests", "bench", ".ci") for p in (ROOT / folder).glob("*.py"))
    code = [(f"{name_of(n)}: cell {i}, line ", source) for n in NOTEBOOKS for i, source in read_cells(n, "code")]
    code += [(f"{name_of(p)}:", p.read_text(encoding="utf-8")) for p in files]
    address = re.compile(r"""[\s#'"(\[]*https?://[^\s'"]+[\s'")\],]*""")
    wrong = [f"{where}{i} has {len(line)} characters" for where, source in code for i, line in enumerate(source.split("\n"), 1)
             if len(line) > 160 and not address.fullmatch(line)]
    assert not wrong, "\n".join(wrong)


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
                if inspect.isfunction(f) and method[0] != "_" and not is_inherited(thing, method):
                    yield from _undocumented(f, f"{name}.{method}", True)
        elif inspect.isfunction(thing) and thing.__module__ == module.__name__:
            yield from _undocumented(thing, name)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_every_public_symbol_is_documented(path):
    module = importlib.import_module(f"fer_nbdev.{path.stem}")
    assert module.__doc__, "the notebook has no `> one sentence` under its title"
    assert not list(_undocumented_in(module)), "\n".join(_undocumented_in(module))


# ------------------------------------------------------------------------------------------------------- README

def test_readme_is_what_the_front_page_makes():
    assert not _readme_script().differences(), "run `python .ci/readme.py`"


def test_readme_has_the_two_commands():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line in COMMANDS] == list(COMMANDS)


@pytest.mark.parametrize("card", sorted((LIB / "weights").glob("*/card.json")), ids=lambda p: p.parent.name)
def test_readme_quotes_the_cards_of_the_bundled_models(card):
    card = json.loads(card.read_text(encoding="utf-8"))
    row = next(line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith(f"| `{card['name']}` | "))
    s, t = card["scores"]["PrivateTest"], card["latency"]
    for figure in (f"{s['accuracy']:.1%}", f"{s['macro_f1']:.3f}", f"{s['ece']:.3f}", f"{t['single_ms']:.2f} ms", f"{1000 / t['batch_ms']:,.0f}"):
        assert figure in row, f"{card['name']}: {figure} of card.json is not in README: run the front page again"


def test_pages_quote_the_benchmarks():
    "All of them on the page of measurements, and some on the front page."
    cells = json.loads((NBS / "tutorials" / "measurements.ipynb").read_text(encoding="utf-8"))["cells"]
    page = "".join("".join(o["data"].get("text/markdown", "")) for c in cells for o in c.get("outputs", ()))
    front = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in sorted((ROOT / "bench" / "results").glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if "answer" in record:
            assert record["answer"] in page, f"{name_of(path)} says something else: run the page of measurements again"
            assert record["question"] not in front or record["answer"] in front, f"{name_of(path)} says something else: run the front page again"


def test_no_figure_is_typed_into_the_front_page():
    figure = re.compile(r"\d\s*(?:%|ms\b|s\b|seconds?\b|minutes?\b|[KMG]B\b|x\b|faces/s|packages\b|points?\b)")
    for i, source in read_cells(NBS / "index.ipynb", "markdown"):
        found = figure.search(re.sub(r"^```.*?^```", "", source, flags=re.M | re.S))
        assert not found, f"cell {i}: {found[0]!r} is typed by hand; render it from a file"


# ----------------------------------------------------------------------------------------------- around the code

def test_benchmarks_say_where_they_were_measured():
    for path in sorted((ROOT / "bench" / "results").glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        lacking = {"name", "date", "commit", "command", "hardware", "python", "versions", "results"} - record.keys()
        assert not lacking, f"{name_of(path)} lacks {sorted(lacking)}"
        script = ROOT / record["command"].split()[1]
        assert script.is_file(), f"{name_of(path)} was written by {script.name}, which does not exist"


def test_a_limit_that_was_missed_is_told():
    "A benchmark that has a limit and does not keep it says what was asked for."
    for path in sorted((ROOT / "bench" / "results").glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(record["results"], dict) and record["results"].get("within_limits") is False:
            assert "asked for" in record["answer"], f"{name_of(path)} misses its limit, and its answer does not say so"


def test_every_benchmark_is_in_the_table():
    table = (ROOT / "bench" / "README.md").read_text(encoding="utf-8")
    for path in sorted((ROOT / "bench").glob("*.py")):
        assert path.stem[0] == "_" or f"`{path.name}`" in table, f"bench/README.md does not mention {path.name}"


def test_notebooks_carry_no_state_of_widgets():
    for path in NBS.rglob("*.ipynb"):
        kept = json.loads(path.read_text(encoding="utf-8"))["metadata"].keys()
        assert kept <= {"kernelspec"}, f"{name_of(path)} holds more than its kernel's name: megabytes, if it is what widgets showed"


def test_every_extra_that_an_error_names_exists():
    call = re.compile(r"\brequire\([^()]+, ['\"](\w+)['\"]\)")
    asked = {extra for path in (ROOT / "fer_nbdev").glob("*.py") for extra in call.findall(path.read_text(encoding="utf-8"))}
    known = {line.partition("_requirements")[0] for line in (ROOT / "settings.ini").read_text(encoding="utf-8").splitlines() if "_requirements" in line}
    assert asked and asked <= known, asked - known


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
