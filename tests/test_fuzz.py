"""Thousands of damaged files a minute into everything that reads one: a right answer or a documented error, soon, in little memory.

The same cases on every run, so that a failure can be brought back: `python tests/_fuzz.py TARGET --seed S --first N --cases 1`.
`bench/fuzz.py` runs the same for as long as one likes."""
import os
import subprocess
import sys

import pytest

import _fuzz

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs setitimer, RLIMIT_AS and /proc")

# cases of each target: a few seconds each on one core
CASES = {"image bytes": 8000, "image path": 5000, "image PIL": 5000, "fer2013 csv": 2000, "fer2013 archive": 8000, "fer2013 cache": 2500,
         "fer+ csv": 10000, "class folders": 800, "card": 5000, "graph": 2500, "recipe": 500, "findings": 250, "checkpoint": 5000, "transfer weights": 3000}
BOUND = 400  # megabytes that cases may add to a process; class folders hold pictures of up to 100 million pixels


def test_every_target_is_fuzzed():
    assert set(CASES) == set(_fuzz.TARGETS)


@pytest.mark.parametrize("target", CASES)
def test_damaged_files_give_an_answer_or_a_documented_error(target):
    if target not in _fuzz.LIGHT:
        pytest.importorskip("torch")
    if target in ("graph", "card"):
        pytest.importorskip("onnx")
    found = _fuzz.run(target, seed=1, cases=CASES[target])
    assert not found["failures"], "\n".join(f"{len(n)} times {kind}: python tests/_fuzz.py '{target}' --seed 1 --first {n[0]} --cases 1"
                                            for kind, n in found["failures"].items())
    assert found["cases"] == CASES[target] and found["error"] + found["ok"] == CASES[target]
    assert found["error"] > CASES[target] // 20 or target == "fer2013 cache", "the mutations hardly damage anything"
    assert found["ok"] > 0, "the mutations leave nothing that can be read"
    assert found["peak"][0] < BOUND, f"case {found['peak'][1]} added {found['peak'][0]:.0f} MB"


BUILT_TO_FAIL = """
import sys
sys.path.insert(0, {here!r})
import _fuzz, os, time
class Built(_fuzz.Target):
    def make_seeds(self): return [b"0123456789" * 10]
    def run(self, data):
        n = self.n = getattr(self, "n", -1) + 1
        if os.environ["HOW"] == "crash" and n == 5: os.kill(os.getpid(), 11)
        if os.environ["HOW"] == "hang" and n == 5: time.sleep(1000)
        if os.environ["HOW"] == "undocumented" and n % 10 == 5: raise KeyError("x")
        if os.environ["HOW"] == "memory" and n == 5: bytearray(10**10)
        return "ok"
_fuzz.TARGETS["built"], _fuzz.SECONDS = Built, 1
if __name__ == "__main__": _fuzz.main()
"""


@pytest.mark.parametrize("how, kind", [("crash", "crash, signal 11"), ("hang", "hang"), ("undocumented", "KeyError"), ("memory", "MemoryError")])
def test_crashes_hangs_and_other_errors_are_failures_and_not_the_end(how, kind, tmp_path, monkeypatch):
    script = tmp_path / "_built.py"
    script.write_text(BUILT_TO_FAIL.format(here=str(_fuzz.HERE)))
    monkeypatch.setenv("HOW", how)
    monkeypatch.setattr(_fuzz, "__file__", str(script))
    monkeypatch.setitem(_fuzz.TARGETS, "built", _fuzz.Target)
    found = _fuzz.run("built", seed=0, cases=8)  # a new process counts its cases from 0 again, so 5 comes once
    assert any(k.startswith(kind) for k in found["failures"]), found["failures"]
    assert found["cases"] == 8


def test_a_case_can_be_made_again(tmp_path):
    a, b = (_fuzz.save_case("fer+ csv", 3, 17, tmp_path / name).read_bytes() for name in "ab")
    assert a == b != _fuzz.save_case("fer+ csv", 3, 18, tmp_path).read_bytes()
    done = subprocess.run([sys.executable, str(_fuzz.HERE / "_fuzz.py"), "fer+ csv", "--seed", "3", "--first", "17", "--cases", "1"],
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=60, check=True)
    assert '"cases": 1' in done.stdout
