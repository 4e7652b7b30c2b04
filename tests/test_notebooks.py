"""Every notebook runs, cell by cell, and each is one test; and each becomes a page of the site, which is another.

Each runs in a process of its own. That costs the import of fastai where a notebook needs it, and buys three things:
a crash inside native code (torch, OpenCV, ONNX Runtime) fails the notebook that caused it instead of ending the whole
run; a seed, a thread count or a default dtype that one notebook sets cannot change the next; and a notebook that hangs
is stopped and named.

nbdev's own rules hold: cells with `#| eval: false` or with a flag of `tst_flags` in settings.ini (slow) are left out,
and a notebook with `skip_exec: true` in its front matter is skipped, which is said.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("nbdev")

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb")
                   if not any(part[0] in "._" for part in p.relative_to(ROOT / "nbs").parts))
MINUTES = 10
PAGE = """
import sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
from nbdev.processors import FilterDefaults
from nbdev.serve_drv import main
main((Path(sys.argv[1]), Path(sys.argv[2]), FilterDefaults))
"""
RUN = """
import sys
from pathlib import Path
from nbdev.config import get_config
from nbdev.test import test_nb
passed, _ = test_nb(Path(sys.argv[1]), skip_flags=get_config().tst_flags.split(), basepath=get_config().config_path)
sys.exit(not passed)
"""
RENDERED = {"index", "bundled_models", "five_systems", "leakage", "measurements", "what_helps"}
TABLES = """
import os, sys
from pathlib import Path
from execnb.nbio import read_nb, write_nb
from execnb.shell import CaptureShell
page, again = map(Path, sys.argv[1:])
os.chdir(page.parent)
nb = read_nb(page)
nb.cells = [c for c in nb.cells if "#| eval: false" not in c.source]
CaptureShell(page.parent).run_all(nb, exc_stop=True)
write_nb(nb, again)
"""


def _front_matter(notebook):
    from nbdev.frontmatter import FrontmatterProc
    from nbdev.process import NBProcessor
    return getattr(NBProcessor(notebook, procs=FrontmatterProc, process=True).nb, "frontmatter_", {})


def _python(code, *args):
    "Run `code` in a fresh process at the top of the repository; fail with what it wrote, if it failed."
    env = {**os.environ, "OMP_NUM_THREADS": "1", "IN_TEST": "1", "PYTHONIOENCODING": "utf-8"}
    name = Path(args[0]).name
    try:
        done = subprocess.run([sys.executable, "-c", code, *map(str, args)], cwd=ROOT, env=env, stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=60 * MINUTES)
    except subprocess.TimeoutExpired:
        pytest.fail(f"{name} was stopped after {MINUTES} minutes", pytrace=False)
    if done.returncode:
        pytest.fail(f"{name} ended with exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-5000:]}", pytrace=False)


def _id(notebook):
    return notebook.relative_to(ROOT / "nbs").as_posix()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=_id)
def test_notebook_runs(notebook):
    if str(_front_matter(notebook).get("skip_exec", False)).lower() == "true":
        pytest.skip("skip_exec in its front matter")
    _python(RUN, notebook)


@pytest.mark.parametrize("notebook", [p for p in NOTEBOOKS if p.stem in RENDERED], ids=_id)
def test_saved_tables_are_what_the_results_say(notebook, tmp_path):
    "Pages whose tables come from files: run again, they hold the same figures as the saved pages that people read."
    _python(TABLES, notebook, tmp_path / "again.ipynb")
    def tables(path):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        texts = ["".join(o.get("data", {}).get("text/markdown", "")) for c in cells for o in c.get("outputs", ())]
        return [text for text in texts if text]
    assert tables(notebook) and tables(tmp_path / "again.ipynb") == tables(notebook), "run the page again"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=_id)
def test_notebook_becomes_a_page(notebook, tmp_path):
    """What nbdev does before Quarto renders: it runs the exports and every cell that imports something, and no other, to
    print the signatures. A cell that both imports and uses what an example defined fails there: import in a cell of its own."""
    _python(PAGE, notebook, tmp_path / "page.ipynb")
    cells = json.loads((tmp_path / "page.ipynb").read_text(encoding="utf-8"))["cells"]
    sources = ["".join(c["source"]) for c in cells]
    assert sources[0].startswith("---") and "output-file:" in sources[0]
    bare = [s for s, c in zip(sources, cells) if "show_doc(" in s and c["cell_type"] == "code" and not c["outputs"]]
    assert not bare, f"no signature came out of {bare}"
