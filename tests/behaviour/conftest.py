"""Real models compile as users have them do, with all of XLA's passes."""

import pytest


@pytest.fixture(scope="session")
def compilation():
    """In place of the quick compilation of the other tests."""
