"""Every command and example of the guides is run, in order, as a reader would; `make pages`.

`make test` runs those that are quick, in forks; with ``RUN_PAGES=all`` every row that can run does,
each in a process of its own. What is not run is read by its own parser:
tests/unit/test_readme.py.
"""

import os

import pytest

from tests.page_commands import shown
from tests.pages.desk import REPO, Desk
from tests.pages.rows import PAGES, ROWS, Run, key_of

ALL = os.environ.get("RUN_PAGES") == "all"


def commands():
    """Return page, command and row of what this run of the tests executes."""
    for page in PAGES:
        for number, one in enumerate(shown(REPO / page), 1):
            row = ROWS[page].get(key_of(page, one))
            if isinstance(row, Run) and (ALL or row.quick):
                first = " ".join(one.text.split("\n", 1)[0].split()[:4])
                yield pytest.param(page, one, row, id=f"{page} {number}: {first}")


@pytest.fixture(scope="module")
def desk(request, tmp_path_factory):
    server = None if ALL else request.getfixturevalue("trainers")
    desk = Desk(tmp_path_factory.mktemp("reader"), server)
    desk.page = None
    yield desk
    desk.clear()


@pytest.mark.timeout(1000)
@pytest.mark.parametrize(("page", "one", "row"), commands())
def test_it_runs(desk, page, one, row):
    if desk.page != page:
        desk.clear()
        desk.give(page)
        desk.page = page
    if row.needs and not (REPO / row.needs).exists():
        pytest.skip(f"no {row.needs}")
    desk.run(one, row)
