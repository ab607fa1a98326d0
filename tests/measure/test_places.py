"""measure/places.py: where a value stands, judged by hand-written files and by reading the line that is named."""

import json

import pytest

from measure.places import Place, find_lines, find_toml_lines


@pytest.mark.parametrize("indent", [None, 0, 1, 4])
def test_the_line_of_a_value_is_the_line_that_has_its_name_and_its_value(indent):
    """Truth: all values differ, so that a line holds one only where it is; names and texts hold what separates them."""
    value = {'a"b': {"x": 101, "[{": {"y/~": 102, "": 103}}, "list": [{"in": 104}, 105],
             "text": 'a: "{[\\', "é\n:": {"z": 106}}
    text = json.dumps(value, indent=indent)
    lines, found = text.split("\n"), find_lines(text)
    assert found.keys() == {('a"b',), ('a"b', "x"), ('a"b', "[{"), ('a"b', "[{", "y/~"), ('a"b', "[{", ""), ("list",),
                            ("text",), ("é\n:",), ("é\n:", "z")}
    for names, number in found.items():
        held = value
        for name in names:
            held = held[name]
        assert json.dumps(names[-1]) in lines[number - 1]
        assert isinstance(held, dict | list) or json.dumps(held) in lines[number - 1]


def test_the_lines_of_a_recipe():
    text = 'out = "x"\n[optim]\nlr = 0.1\n\n[data.sources.law]\npath = "p"\n'
    assert find_toml_lines(text) == {("out",): 1, ("optim", "lr"): 3, ("data", "sources", "law", "path"): 6}


def test_a_place_in_words():
    place = Place("eval.json", lines={("a",): 7, ("a", "b"): 8})
    assert str(place.at("a", "b")) == "eval.json:8 /a/b"
    # In a list: the line of the list. What is in no file has no line.
    assert str(place.at("a", "list", "0")) == "eval.json:7 /a/list/0"
    assert str(place.at("none")) == "eval.json /none"
    assert str(Place("metrics.jsonl", 3).at("x/y~", "line\nbreak")) == "metrics.jsonl:3 /x~1y~0/line\\nbreak"
