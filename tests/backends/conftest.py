"""Fixtures of several backends' tests."""

from __future__ import annotations

from tests.backends.fake_cuda import products as products
