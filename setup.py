"""Packaging: everything that can change is in settings.ini, which nbdev reads too."""
import shlex
from configparser import ConfigParser

from setuptools import find_packages, setup

parser = ConfigParser(delimiters=["="])
parser.read("settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]

STATUS = {"1": "1 - Planning", "2": "2 - Pre-Alpha", "3": "3 - Alpha", "4": "4 - Beta", "5": "5 - Production/Stable"}
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def requirements(name):
    return shlex.split(cfg.get(name, ""))


extras = {name: requirements(f"{name}_requirements") for name in ("train", "track", "video", "serve", "scale")}
extras["dev"] = [*(line for extra in extras.values() for line in extra), *requirements("dev_requirements")]
extras["umap"] = requirements("umap_requirements")  # brings a compiler, so that it is not for everybody

with open("README.md", encoding="utf-8") as f:
    readme = f.read()

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme,
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"].split(),
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    project_urls={
        "Documentation": cfg["doc_host"] + cfg["doc_baseurl"],
        "Source": cfg["git_url"],
        "Issues": cfg["git_url"] + "/issues",
        "Changelog": f"{cfg['git_url']}/blob/{cfg['branch']}/CHANGELOG.md",
    },
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        f"Development Status :: {STATUS[cfg['status']]}",
        f"Intended Audience :: {cfg['audience']}",
        "Intended Audience :: Science/Research",
        f"Natural Language :: {cfg['language']}",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: {v}" for v in PYTHONS),
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["fer_nbdev", "fer_nbdev.*"]),
    # Named here and not left to include_package_data: weights/ and recipes/ hold no Python, so they are no packages.
    package_data={"fer_nbdev": ["py.typed", "weights/**/*.onnx", "weights/**/*.json", "recipes/**/*.yaml"]},
    include_package_data=False,
    python_requires=">=" + cfg["min_python"],
    install_requires=requirements("requirements"),
    extras_require=extras,
    entry_points={
        "console_scripts": requirements("console_scripts"),
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
    zip_safe=False,
)
