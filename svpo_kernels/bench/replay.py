"""Repeats recorded native calls, in a process that imports nothing but the extension: see instructions.py.

python -I replay.py EXTENSION CALLS.pickle
"""

import ctypes
import importlib.machinery
import importlib.util
import pickle
import sys

ALIGNMENT = 64  # as torch's allocator


def load(path):
    """The extension module, without the package around it, which would import torch."""
    loader = importlib.machinery.ExtensionFileLoader("_C", path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_C", loader))
    loader.exec_module(module)
    return module


def main(extension, calls):
    native, kept = load(extension), []

    def argument(value):
        if not isinstance(value, bytes):
            return value
        buffer = ctypes.create_string_buffer(len(value) + ALIGNMENT)
        kept.append(buffer)
        address = -(-ctypes.addressof(buffer) // ALIGNMENT) * ALIGNMENT
        ctypes.memmove(address, value, len(value))
        return address

    with open(calls, "rb") as file:
        recorded = pickle.load(file)
    for op, arguments in recorded:
        getattr(native, op)(*map(argument, arguments))


if __name__ == "__main__":
    main(*sys.argv[1:])
