"""Every key of a metrics line has a meaning, on the command line and on a page that is not stale. That a run writes
these keys and no other is tested with the commands.
"""

import pytest

from engine_cases import refuse, succeed
from flowgrove.report.reference import metrics_page
from flowgrove.run.metric_keys import METRICS, find_metric
from subprocesses import ROOT

KEYS = [metric.key for metric in METRICS]


def test_a_key_stands_once():
    assert len(KEYS) == len(set(KEYS))


@pytest.mark.parametrize("key", KEYS)
def test_a_metric_says_what_it_means_what_is_healthy_and_what_else_to_do(key):
    metric = find_metric(key)
    assert all(text.endswith(".") and len(text.split()) >= 4 for text in metric[1:])
    told = " ".join(succeed("metrics", key).stdout.split())
    assert all(text in told for text in metric)


def test_the_list_has_every_key():
    lines = succeed("metrics").stdout.splitlines()
    assert [line.split()[0] for line in lines[1:] if not line.startswith(" ")] == KEYS


def test_a_nested_number_is_told_with_its_key():
    assert find_metric("seconds/update").key == "seconds"
    assert find_metric("reward.shapes.mean").key == "reward"


def test_an_unknown_key_is_one_line_that_names_the_nearest():
    assert refuse("metrics", "ratio_men") == "error: unknown metric ratio_men: did you mean ratio_mean?"
    assert all(key in refuse("metrics", "qqq") for key in KEYS)


def test_the_page_is_what_the_command_writes():
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert page == metrics_page() == succeed("metrics", "--markdown").stdout, "stale: run `make docs`"
