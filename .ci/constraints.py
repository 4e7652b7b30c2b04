"""The lowest versions (with their newest patches) that settings.ini allows, as constraints for pip:

    python .ci/constraints.py > lowest.txt
    pip install ".[train]" -c lowest.txt
"""
import re
import shlex
from configparser import ConfigParser
from pathlib import Path

parser = ConfigParser(delimiters=["="])
parser.read(Path(__file__).resolve().parent.parent / "settings.ini", encoding="utf-8")
for key, value in parser["DEFAULT"].items():
    if key == "requirements" or key.endswith("_requirements") and key != "dev_requirements":
        for requirement in shlex.split(value):
            if found := re.match(r"([\w.-]+)(?:\[.*\])?>=([\d.]+)", requirement):
                print(f"{found[1]}=={found[2]}.*")
