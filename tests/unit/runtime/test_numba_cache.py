from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cotune.runtime import numba_cache

if TYPE_CHECKING:
    import pytest


def test_without_a_place_to_write_code_is_compiled_anew_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(**_options: Any) -> Any:
        def decorate(function: Any) -> Any:
            raise RuntimeError("cannot cache function: no locator available")

        return decorate

    monkeypatch.setattr(numba_cache, "njit", refuse)
    assert numba_cache._find_out() is False
    assert "NUMBA_CACHE_DIR" in caplog.text
