"""Why channels are not followed through operators that have no rule."""

from __future__ import annotations

from typing import Any


def reason_of(target: Any) -> str:
    return ""
