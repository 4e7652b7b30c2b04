"""How large is the plain install? A fresh environment with pip alone, `pip install .`, and nothing else in it.

Megabytes (1e6 bytes) are what the files of the environment occupy, pip and the compiled .pyc files included. Packages
are pip and what the install brought besides fer_nbdev itself. The setuptools that `venv` adds before Python 3.12 is
taken out first, so that the figure does not depend on the Python version.
"""
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _report import ROOT, report

LIMITS = {"megabytes": 500, "packages": 28}


def megabytes(folder, with_pyc=True):
    "Size of the files under `folder` in units of 1e6 bytes; links are not followed."
    total = 0
    for base, _, files in os.walk(folder):
        for name in files:
            path = os.path.join(base, name)
            if not os.path.islink(path) and (with_pyc or not name.endswith(".pyc")):
                total += os.path.getsize(path)
    return total / 1e6


def copy_of_the_project(folder):
    "The files that git knows or would add: a build must not find what happens to lie around here."
    names = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True,
                           check=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def main():
    with tempfile.TemporaryDirectory() as tmp:
        env, tree = Path(tmp, "env"), copy_of_the_project(Path(tmp, "tree"))
        subprocess.run([sys.executable, "-m", "venv", str(env)], check=True)
        python = env / ("Scripts" if os.name == "nt" else "bin") / "python"
        subprocess.run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", "setuptools"], check=True)
        before = megabytes(env)
        start = time.perf_counter()
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "."], cwd=tree, check=True)
        seconds = time.perf_counter() - start
        listed = subprocess.run([str(python), "-m", "pip", "list", "--format", "json"], capture_output=True, text=True, check=True)
        versions = {p["name"]: p["version"] for p in json.loads(listed.stdout)}
        site = next(env.rglob("site-packages"))
        largest = sorted(((round(megabytes(p), 1), p.name) for p in site.iterdir() if p.is_dir()), reverse=True)[:6]
        size, without_pyc, own = megabytes(env), megabytes(env, with_pyc=False), megabytes(site / "fer_nbdev")
    packages = len(versions.keys() - {"fer_nbdev", "fer-nbdev"})
    within = size <= LIMITS["megabytes"] and packages <= LIMITS["packages"]
    report("install_size",
           {"megabytes": round(size, 1), "without_pyc": round(without_pyc, 1), "before": round(before, 1),
            "fer_nbdev": round(own, 1), "packages": packages, "seconds": round(seconds, 1),
            "largest": {name: mb for mb, name in largest}, "within_limits": within},
           question="How large is the plain install?",
           answer=f"{size:.0f} MB in {packages} packages, pip included; installed in {seconds:.0f} s"
                  + ("" if within else f"; at most {LIMITS['megabytes']} MB in {LIMITS['packages']} were asked for"),
           versions=versions, limits=LIMITS)
    return within


if __name__ == "__main__":
    sys.exit(not main())
