"""What the fast tests of training compile with; the slow tests' own processes compile as users
do."""

import pytest

from tests.quick_compile import quick_compile


@pytest.fixture(scope="package", autouse=True)
def compilation(tmp_path_factory):
    with quick_compile(tmp_path_factory.mktemp("compiled")):
        yield
