"""Facial emotion recognition: `predict` answers, everything else is in the modules.

The names below are loaded on first use, so that `import fer_nbdev` costs nothing."""
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .core import EMOTIONS, Prediction
    from .inference import Predictor, predict

_HOME = {"EMOTIONS": "core", "Prediction": "core", "Predictor": "inference", "predict": "inference"}
__all__ = [*_HOME, "__version__"]


def __getattr__(name):
    if name == "__version__": value = _version()
    elif name in _HOME: value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    else: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__(): return sorted({*globals(), *__all__})


def _version():
    from importlib.metadata import PackageNotFoundError, version
    try: return version("fer_nbdev")
    except PackageNotFoundError: return "0+unknown"  # imported from a source tree that is not installed
