"""Set before any test imports torch or OpenCV: two workers with a thread each are faster here than two with many."""
import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("MPLBACKEND", "agg")

import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))


@pytest.fixture(autouse=True)
def _no_pictures_left():
    "Figures that a test opened are closed, whether or not it drew any."
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


def pytest_collection_modifyitems(items):
    """Notebooks first, the largest first: they take longest, and what is started last decides when two workers end. Before them the tests that fork:
    in a process that has trained before, PyTorch refuses to do so in a fork."""
    def order(item):
        if item.path.name == "test_distributed.py": return -float("inf")
        size = getattr(item, "callspec", None) and item.callspec.params.get("notebook")
        return -size.stat().st_size if isinstance(size, Path) else 0
    items.sort(key=order)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "A worker that has nothing left takes tests from the other one."
    from xdist.scheduler.worksteal import WorkStealingScheduling
    return WorkStealingScheduling(config, log)
