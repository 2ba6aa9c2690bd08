"""Whether numba can keep machine code on disk.

With ``cache=True`` numba compiles once and reads from disk ever after; where it finds no directory
to write to (a read-only install without a home directory) it refuses to compile at all.
"""

from __future__ import annotations

import logging

from numba import njit

logger = logging.getLogger(__name__)


def _find_out() -> bool:
    try:
        njit(cache=True)(_probe)
    except RuntimeError as error:
        logger.warning(
            "compiled code cannot be kept on disk, so every start compiles it anew, which takes "
            "10 s or more (%s); set NUMBA_CACHE_DIR to a directory that can be written",
            error,
        )
        return False
    return True


def _probe() -> int:
    return 0


CACHE = _find_out()
"""What to pass as numba's ``cache``."""
