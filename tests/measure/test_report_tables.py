"""measure/report_tables.py: how a number says where it stands; tests/test_report.py follows each of a page."""

from measure.places import Place
from measure.report_tables import cite, name, utc


def test_a_number_has_its_value_and_where_it_stands():
    place = Place("metrics.jsonl", 3).at("a<b")
    assert cite("1.5", 1.5, place) == '<data value="1.5" title="metrics.jsonl:3 /a&lt;b">1.5</data>'
    both = cite("<&", [1.0, 2.0], [place, place, place.at('"')], "mean of")
    assert both == '<data value="[1.0, 2.0]" title="mean of\nmetrics.jsonl:3 /a&lt;b\n' \
        'metrics.jsonl:3 /a&lt;b/\\&#34;">&lt;&amp;</data>'
    assert cite("–", None, place) == "–"


def test_a_name_is_text_that_turns_nothing_around():
    assert name("<b>\u202e") == "<bdi>&lt;b&gt;\u202e</bdi>"


def test_dates():
    assert utc(1.7e9) == "2023-11-14 22:13 UTC"
    assert [utc(odd) for odd in (None, float("nan"), 1e300, "x")] == ["–"] * 4
