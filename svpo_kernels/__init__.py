"""Ops, packed step trees and a trainer for step-level preference, policy-gradient and process-reward training.

    import svpo_kernels as sk

Letters: T packed tokens, D hidden size, V vocabulary, N predictions (scored tokens), R distinct rows that predict them,
S steps, P pairs, C classes of a head, B sequences. Outputs are fp32 (fp64 for fp64), gradients in their input's dtype;
every op takes `backend="auto"` ("cuda", "triton", "cpu" or "reference"), and `sk.backends()` says what runs here.
"""

# The public names (public.py) are loaded together when the first one is used, because torch takes seconds: the command
# line imports this package too, and answers `--help` or a wrong key before that.
import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__

if TYPE_CHECKING:
    from .public import *  # noqa: F403

# Ops that bear the name of their folder: importing the folder must not put itself in the op's place.
SAME_NAME = ("linear_step_logps", "step_logps", "tree_attention")


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in SAME_NAME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    private = name.startswith("_") and name != "__all__"
    if private or (name not in SAME_NAME and importlib.util.find_spec(f"{__name__}.{name}")):  # a file below
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    public = importlib.import_module(f"{__name__}.public")
    globals().update({each: getattr(public, each) for each in public.__all__}, __all__=[*public.__all__, "__version__"])
    if name not in globals():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals()[name]


def __dir__() -> list[str]:
    __getattr__("__all__")
    return sorted(globals())
