"""docs/speed.md shows what the last run of the benchmark wrote, and nothing else."""

from __future__ import annotations

import json

import pytest

from benchmarks.latency import BEGIN, END, PAGE, RESULTS, placed, rendered


@pytest.mark.skipif(not RESULTS.is_file(), reason="`python -m benchmarks.latency` has not been run")
def test_the_page_shows_the_result() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == placed(page, rendered(json.loads(RESULTS.read_text(encoding="utf-8"))))


def test_tables_go_between_the_comments() -> None:
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    assert placed(page, "figures") == f"{before}{BEGIN}\n\nfigures\n\n{END}{after}"
