"""The table of docs/reliability.md: every test of a fault has its row, and rows say what was found."""

import re

from tests.support.scripts import BENCHMARKS, load_benchmark

reliability = load_benchmark("reliability")
PAGE = BENCHMARKS.parent / "docs" / "reliability.md"
REPORT = """\
<testsuites><testsuite>
<testcase name="test_good"><properties>
<property name="fault" value="kill -9"/><property name="outcome" value="goes on"/>
<property name="lost_steps" value="2"/></properties></testcase>
<testcase name="test_bad"><properties><property name="fault" value="full disk"/></properties>
<failure message="it does not"/></testcase>
<testcase name="test_absent"><skipped message="no Slurm"/></testcase>
</testsuite></testsuites>
"""


def rows(page):
    """The cells of the table of a page."""
    text = page.read_text().partition("<!-- reliability: begin -->")[2].partition("<!-- reliability: end")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_a_report_becomes_rows_that_hide_no_failure(tmp_path):
    report, page = tmp_path / "report.xml", tmp_path / "page.md"
    report.write_text(REPORT)
    page.write_text("# Page\n<!-- reliability: begin -->\nold\n<!-- reliability: end -->\nafter\n")
    assert reliability.main(["--reports", str(report), "--page", str(page)]) == 0
    assert rows(page) == [
        ["kill -9", "goes on", "2"],
        ["full disk", "**the test failed**", ""],
        ["`test_absent`", "not tested here: no Slurm", ""],
    ]
    assert "old" not in page.read_text()
    assert page.read_text().endswith("after\n")


def test_each_fault_that_is_tested_is_on_the_page_and_was_survived():
    sources = [(reliability.ROOT / name).read_text() for name in reliability.TESTS]
    tests = [
        test for source in sources for test in re.split(r"^def (?=test_)", source, flags=re.MULTILINE)[1:]
    ]
    assert all(re.search(r'add_row\(|"fault"', test) for test in tests), "each records its row"
    found = rows(PAGE)
    assert len(found) >= len(tests) > 10
    assert all(fault and outcome and lost for fault, outcome, lost in found), "none failed, none was skipped"
