"""A training run that is really killed: by the system, at whatever point it has reached, from the command line."""
import json
import subprocess
import sys
import time
from pathlib import Path

FER = [sys.executable, "-c", "from fer_nbdev.cli import main; main()"]
SETTINGS = ["--set", "epochs=3", "--set", "precision=fp32"]


def _train(out, *arguments):
    done = subprocess.run([*FER, "train", "--out", str(out), *arguments], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]


def _kill_after_first_epoch(out):
    "Start a run and kill it as soon as its first checkpoint is there; returns how many epochs it had finished."
    run = subprocess.Popen([*FER, "train", "--out", str(out), *SETTINGS], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.time() + 300
    while not (out / "last.safetensors").exists():
        assert run.poll() is None and time.time() < until, "the run ended, or did not get through an epoch"
        time.sleep(.05)
    run.kill()
    run.wait()
    assert not (out / "model").exists(), "the run finished before it could be killed"
    return len(json.loads((out / "history.json").read_text()))


def _scores(out):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in json.loads((out / "history.json").read_text())]


def test_a_killed_run_resumes_to_the_same_weights(tmp_path: Path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    _train(whole, *SETTINGS)
    assert 1 <= _kill_after_first_epoch(killed) < 3
    _train(killed, "--resume")
    assert _scores(killed) == _scores(whole)
    assert (killed / "best.safetensors").read_bytes() == (whole / "best.safetensors").read_bytes()
    scores = [json.loads((d / "model" / "card.json").read_text())["scores"] for d in (killed, whole)]
    assert scores[0] == scores[1]
