"""Looks for what the set-up cannot install by itself and says, in one message each, how to get it.

Runs on any Python from 2.7 on, before anything is installed.
"""

import os
import sys

MIN_PYTHON = (3, 10)


def main():
    if sys.version_info < MIN_PYTHON:
        return "gs_d2 needs Python %d.%d or newer, and %s is %d.%d. Name another: make PYTHON=python3.11 ..." % (
            MIN_PYTHON + (sys.executable,) + tuple(sys.version_info[:2])
        )
    import shutil

    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        return "This Python cannot make virtual environments. Debian and Ubuntu: apt-get install python3-venv"
    compiler = (os.environ.get("CXX") or "c++").split()[0]
    if shutil.which(compiler) is None:
        return (
            "gs_d2's build needs a C++17 compiler, and '%s' is not there. Debian and Ubuntu: apt-get install g++; "
            "or point CXX at one" % compiler
        )
    if not any(os.path.exists(os.path.join(path, "Python.h")) for path in include_paths()):
        return "Python's C headers are missing. Debian and Ubuntu: apt-get install python3-dev"
    return None


def include_paths():
    import sysconfig

    return {sysconfig.get_path("include"), sysconfig.get_path("platinclude")}


if __name__ == "__main__":
    problem = main()
    if problem:
        sys.exit(problem)
