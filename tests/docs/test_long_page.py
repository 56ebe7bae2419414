"""The page that `make test-long` writes from what pytest has noted."""

import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]

RESULTS = """<?xml version="1.0" encoding="utf-8"?>
<testsuites name="pytest tests"><testsuite name="pytest" errors="0" failures="1" skipped="1" tests="4" time="4000.5"
 timestamp="2026-11-27T03:04:05.678901+00:00" hostname="somewhere">
<testcase classname="tests.engine.test_soak" name="test_one" time="600.4">
<properties><property name="soak" value="900 iterations; memory flat"/></properties></testcase>
<testcase classname="tests.run.test_saving" name="test_two[a|b]" time="1.5"/>
<testcase classname="tests.run.test_saving" name="test_three" time="0.5">
<failure message="assert 1 == 2&#10; where 1 is one">trace</failure></testcase>
<testcase classname="tests.kernels.test_noise" name="test_four" time="0">
<skipped type="pytest.skip" message="torch sees no GPU">where</skipped></testcase>
</testsuite></testsuites>
"""


def test_the_page_says_when_where_and_what_came_out(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "profiling"))
    from long_tests import page, read_results

    files = [tmp_path / "first.xml", tmp_path / "second.xml"]
    for file in files:
        file.write_text(RESULTS.replace("1 is one", f"1 is {ROOT}/one of {tempfile.gettempdir()}"), encoding="utf-8")
    began, seconds, results = read_results(files[0])
    assert (began[:10], seconds, len(results)) == ("2026-11-27", 4000.5, 4)
    text = page(files)
    for line in (
        "| begun | 2026-11-27 03:04 |",
        "| tests | 4 passed, 2 failed, 2 skipped |",
        "| took | 2 h 13 min |",
        "- `run.test_saving: test_three`: assert 1 == 2 where 1 is ./one of TMP",
        "- `engine.test_soak: test_one`: soak: 900 iterations; memory flat",
        "- 2: torch sees no GPU",
        "| `engine.test_soak: test_one` | 600 |",
        "| `run.test_saving: test_two[a/b]` | 2 |",
    ):
        assert line in text.splitlines(), line
    assert "torch 2." in text
    assert "somewhere" not in text  # nobody's machine is named
