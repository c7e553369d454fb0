import pytest

from hga_flax.counting.complexity import Complexity
from hga_flax.paper import command as paper


@pytest.fixture
def no_tracing(monkeypatch):
    """Tables of made-up counts: for tests of all but the counts."""
    counted = Complexity(1_000_000, 2, 3 * 10**9, 4, 5, 6)
    monkeypatch.setattr(paper, "count", lambda *arguments: counted)
