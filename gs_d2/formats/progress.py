"""Progress of long work on a terminal."""

import sys
from collections.abc import Iterable


def track(items: Iterable, what: str) -> Iterable:
    """The same items, with a progress bar (done, total, time left) once it takes more than a second.

    Without tqdm there is no bar. Where stderr is a log and not a terminal, one line in ten seconds is enough.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, desc=what, leave=False, delay=1, mininterval=0.1 if sys.stderr.isatty() else 10)
