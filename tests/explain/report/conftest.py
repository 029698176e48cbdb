"""Pages of reports as files."""

import functools

import pytest
from report_pages import page_of


@pytest.fixture(scope="session")
def write_page(tmp_path_factory):
    """A function of the arguments of `page_of` that gives the file it wrote."""
    folder = tmp_path_factory.mktemp("pages")

    @functools.cache
    def write(*names, **options):
        path = folder / f"{len(list(folder.iterdir()))}.html"
        path.write_text(page_of(*names, **options), encoding="utf-8")
        return path

    return write
