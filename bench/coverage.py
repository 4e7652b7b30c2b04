"""Which lines of the package do its tests run?

    python bench/coverage.py                     all tests and notebooks: about half an hour of one core
    python bench/coverage.py --only 09_detect    what one of them runs, for a quick look

The notebooks are where most lines are tested, but what a notebook runs is its own cell, not the line of the module that the
cell was exported to. So each exported cell is run here under the name and the line numbers of its module: nbdev copies
cells line for line, below a comment with the cell's id. Programs that tests start are counted too.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import _report
from _report import ROOT, report

CONFIG = """[run]
source = {package}
parallel = true
data_file = {data}
patch = subprocess
sigterm = true
omit = */_modidx.py
[report]
exclude_also =
    if TYPE_CHECKING:
"""

# In the folder of sitecustomize: it teaches execnb, which runs the notebooks, where an exported cell stands in its module.
CUSTOM = '''
import importlib.abc, importlib.machinery, os, re, sys
from pathlib import Path
PACKAGE = Path({package!r})

def _places():
    "cell id -> (module file, lines above its first line of code)"
    found = {{}}
    for path in PACKAGE.glob("*.py"):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if marker := re.match(r"# %% \\S+\\.ipynb #(\\S+)", line):
                found[marker[1]] = str(path), number
    return found

def _teach(shell):
    places, cell = _places(), shell.CaptureShell.cell
    def run(self, it, **kwargs):
        if getattr(it, "id", None) in places and it.cell_type == "code":
            name, above = places[it.id]
            lines = it.source.splitlines()
            while lines and (lines[0].startswith("#|") or not lines[0].strip()): del lines[0]
            source, it.source = it.source, "exec(compile({{!r}}, {{!r}}, 'exec', dont_inherit=True))".format("\\n"*above + "\\n".join(lines), name)
            try: return cell(self, it, **kwargs)
            finally: it.source = source
        return cell(self, it, **kwargs)
    shell.CaptureShell.cell = run

class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "execnb.shell": return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        load = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (load(module), _teach(module))
        return spec
sys.meta_path.insert(0, _Finder())
'''


def measure(only, workers):
    "coverage.py's own report as a dict, and the closing line of pytest."
    with tempfile.TemporaryDirectory() as folder:
        folder, package = Path(folder), ROOT / "fer_nbdev"
        (folder / "rc").write_text(CONFIG.format(package=package, data=folder / "data"))
        (folder / "sitecustomize.py").write_text(CUSTOM.format(package=str(package)))
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), "COVERAGE_PROCESS_START": str(folder / "rc"), "OMP_NUM_THREADS": "1"}
        run = [sys.executable, "-m", "coverage"]
        tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests", *(["-n", str(workers)] if workers > 1 else []), *(["-k", only] if only else [])]
        done = subprocess.run([*run, "run", "--rcfile", str(folder / "rc"), *tests], cwd=ROOT, env=env, capture_output=True, text=True)
        print(done.stdout[-2000:], done.stderr[-1000:])
        subprocess.run([*run, "combine", "--quiet", "--rcfile", str(folder / "rc"), str(folder)], check=True, cwd=ROOT)
        subprocess.run([*run, "json", "--quiet", "--rcfile", str(folder / "rc"), "-o", str(folder / "found.json")], check=True, cwd=ROOT)
        return json.loads((folder / "found.json").read_text()), done.stdout.strip().splitlines()[-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="WORDS", help="tests to run, as pytest's -k has them; nothing is written then")
    parser.add_argument("--workers", type=int, default=2, help="tests at the same time (default: 2)")
    parser.add_argument("--show", metavar="MODULE", help="also print the lines of this module that no test ran")
    parser.add_argument("--out", type=Path, default=_report.RESULTS, help="folder for coverage.json (default: bench/results)")
    args = parser.parse_args()
    _report.RESULTS = args.out
    found, closing = measure(args.only, args.workers)
    modules = {Path(name).stem: f for name, f in sorted(found["files"].items())}
    for name, f in modules.items():
        print(f"{name:12s} {f['summary']['percent_covered']:6.1f}%   not run: {len(f['missing_lines'])} of {f['summary']['num_statements']}")
    if args.show:
        print(args.show, modules[args.show]["missing_lines"])
    if not args.only:
        totals = found["totals"]
        share = totals["covered_lines"] / totals["num_statements"]
        parts = {name: f["summary"] for name, f in modules.items()}
        least = min(parts, key=lambda name: parts[name]["percent_covered"])
        tests = closing.strip("= ")
        report("coverage", {
            "tests": tests, "share": round(share, 4), "lines": totals["num_statements"],
            "modules": {name: {"share": round(part["covered_lines"] / max(1, part["num_statements"]), 4), "lines": part["num_statements"]}
                        for name, part in parts.items()},
        }, question="Which lines of the package do its tests and notebooks run?", command="python bench/coverage.py",
           answer=f"{share:.1%} of {totals['num_statements']:,} lines of code (90% were asked for), "
                  f"least in `{least}`, {parts[least]['percent_covered']:.0f}%; tests: {tests.partition(' in ')[0]}")


if __name__ == "__main__":
    sys.exit(main())
