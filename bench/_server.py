"""A server in a process of its own, for measurements: `with Server(limits={"queue": 8}) as server: ... server.port`."""
import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

RUN = """
import json, sys
from fer_nbdev.serve import Limits, create_app, run_app
options = json.loads(sys.argv[2])
run_app(create_app("accurate", limits=Limits(**options.pop("limits", {})), **options), port=int(sys.argv[1]), log_level="warning")
"""


def free_port():
    "A port that nobody listens at."
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def memory_mb(pid):
    "Megabytes that a process holds, where Linux tells; 0 elsewhere."
    status = Path(f"/proc/{pid}/status")
    return next((int(line.split()[1]) / 1024 for line in status.read_text().splitlines() if line.startswith("VmRSS")), 0) if status.exists() else 0


class Server:
    "Starts a server and waits until it is ready; `options` are those of `create_app`."
    def __init__(self, **options):
        self.port = free_port()
        self.process = subprocess.Popen([sys.executable, "-c", RUN, str(self.port), json.dumps(options)])

    def __enter__(self):
        for _ in range(600):
            if self.process.poll() is not None:
                raise RuntimeError("the server ended before it was ready")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/readyz", timeout=1) as answer:
                    if answer.status == 200:
                        return self
            except OSError:
                pass
            time.sleep(.1)
        raise RuntimeError("the server was not ready within a minute")

    def __exit__(self, *error):
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
