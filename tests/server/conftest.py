"""Users for the file's own tests and for those of the exchanges."""

import pytest

from otel_smtp.server.users import Users, load_users, users_line
from tests.server.passwords import quick_line, written


@pytest.fixture(scope="module")
def argon2_users(tmp_path_factory: pytest.TempPathFactory) -> Users:
    lines = [quick_line("tim", "tanstaaf"), quick_line("jürgen", "päss wörd")]
    return load_users(written(tmp_path_factory.mktemp("users"), *lines))


@pytest.fixture(scope="module")
def scram_users(tmp_path_factory: pytest.TempPathFactory) -> Users:
    lines = [users_line("tim", "tanstaaf", scram=True), users_line("a,b=c", "x", scram=True)]
    return load_users(written(tmp_path_factory.mktemp("users"), *lines))
