"""The package as others get it: an sdist and a wheel are built from a copy of the project, looked into, installed and used."""
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
from _repository import ROOT

pytest.importorskip("build")
LEFT_OUT = shutil.ignore_patterns(".git", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", "_docs", "_proc", "runs", ".venv*")


def run(*command, cwd, **env):
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=900, env={**os.environ, **env})
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "The sdist, and the wheel that is built from it."
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(ROOT, folder / "tree", ignore=LEFT_OUT, symlinks=True)
    run("-m", "build", "--no-isolation", "--outdir", folder, cwd=folder / "tree")
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def test_twine_accepts_both(built):
    pytest.importorskip("twine")
    assert run("-m", "twine", "check", "--strict", *built, cwd=ROOT).count("PASSED") == 2


def test_the_sdist_holds_the_whole_project(built):
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True) if shutil.which("git") else None
    if done is None or done.returncode or not done.stdout:
        pytest.skip("not a git checkout: which files belong to the project is not known")
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = {name for name in done.stdout.splitlines() if (ROOT / name).exists()}
    assert not tracked - names


def test_the_wheel_holds_the_package_and_nothing_else(built):
    with zipfile.ZipFile(built[1]) as archive:
        names, size = set(archive.namelist()), sum(i.compress_size for i in archive.infolist())
    assert all(name.startswith(("fer_nbdev/", "fer_nbdev-")) for name in names)
    here = {p.relative_to(ROOT).as_posix() for p in (ROOT / "fer_nbdev").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert here == {name for name in names if name.startswith("fer_nbdev/")}
    assert size < 15e6


def test_the_wheel_predicts(built, tmp_path):
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", tmp_path / "site", built[1], cwd=tmp_path)
    where = run("-c", "import fer_nbdev; print(fer_nbdev.__file__)", cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert where.startswith(str(tmp_path / "site"))
    assert '"emotion"' in run("-m", "fer_nbdev", "predict", "--json", cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))


def test_the_tests_run_from_the_sdist(built, tmp_path):
    pytest.importorskip("nbdev")
    with tarfile.open(built[0]) as archive:
        archive.extractall(tmp_path, filter="data")
    (tree,) = tmp_path.iterdir()
    said = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_house.py", "tests/test_notebooks.py", "-k", "house or 00_core or 10_inference",
               cwd=tree, PYTHONPATH=str(tree))
    assert " passed" in said and "failed" not in said


def test_the_container_is_made_from_what_is_there():
    "Everything that is copied exists and passes .dockerignore, nothing else does, and what runs is not root. (The build itself needs Docker.)"
    lines = [line.split() for line in (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines() if line and line[0] not in "# "]
    copied = {name for line in lines if line[0] == "COPY" and not line[1].startswith("--") for name in line[1:-1]}
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line.startswith("!")}
    assert copied == allowed and all((ROOT / name).exists() for name in copied)
    assert [line[1] for line in lines if line[0] == "USER"][-1] == "fer" and lines[-1][0] == "CMD"
    assert "*" in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
