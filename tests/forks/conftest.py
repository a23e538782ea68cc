"""The engine of most fork tests: over TLS, with the pool's defaults."""

from __future__ import annotations

import pytest
from engines import MakeEngine
from sqlalchemy import Engine


@pytest.fixture
def engine(tls_url: str, make_engine: MakeEngine) -> Engine:
    return make_engine(tls_url)
