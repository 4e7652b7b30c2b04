"""What the tests of the house and of the pages read: where things are, the cells of a notebook, the symbols that nbdev indexed."""
import ast
import configparser
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS, LIB = ROOT / "nbs", ROOT / "fer_nbdev"
CONFIG = configparser.ConfigParser(delimiters=["="])
CONFIG.read(ROOT / "settings.ini", encoding="utf-8")
CONFIG = CONFIG["DEFAULT"]

NOTEBOOKS = sorted(p for p in NBS.rglob("*.ipynb") if not any(part[0] in "._" for part in p.relative_to(NBS).parts))
MODULES = sorted(p for p in LIB.glob("*.py") if p.stem[0] != "_")


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def page_id(notebook):
    "What pytest calls the test of a notebook."
    return notebook.relative_to(NBS).as_posix()


def read_cells(notebook, kind):
    "(number, source) of the cells of one kind."
    for i, cell in enumerate(json.loads(notebook.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] == kind:
            yield i, "".join(cell["source"])


def read_modidx():
    "symbol -> page#anchor of everything that the notebooks document, as nbdev wrote it down."
    assert (LIB / "_modidx.py").exists(), "fer_nbdev/_modidx.py is missing: run nbdev_export"
    tree = ast.parse((LIB / "_modidx.py").read_text(encoding="utf-8"))
    index = ast.literal_eval(next(n.value for n in tree.body if isinstance(n, ast.Assign)))
    return {symbol: page for symbols in index["syms"].values() for symbol, (page, _) in symbols.items()}


def is_inherited(cls, method):
    "Is this a method whose meaning a base class of another library has set, as `forward` or fastai's `before_fit`?"
    import re
    bases = [b for b in cls.__mro__[1:] if b is not object and not b.__module__.startswith("fer_nbdev")]
    event = re.fullmatch(r"(?:before|after)_\w+", method) and any(b.__module__.startswith("fastai") for b in bases)
    return bool(event) or any(method in vars(b) for b in bases)
