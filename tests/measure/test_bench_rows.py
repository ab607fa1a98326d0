"""What every benchmark shares. Truth: hand-made figures and clocks."""

import types

import pytest

from measure import bench_rows


def test_a_row_holds_the_ratio_of_ours_to_the_peer(capsys):
    made = bench_rows.row("x", "tokens/s", 30.0, 20.0, "them", spread=0.1)
    assert made["ratio"] == 1.5
    assert "1.50" in capsys.readouterr().out
    assert bench_rows.row("y", "share", 0.9)["ratio"] is None
    assert bench_rows.spread([1.0, 1.0, 1.0, 1.0]) == 0


def test_sides_take_turns_and_the_first_round_is_not_counted(monkeypatch, capsys):
    now, order = [0.0], []

    def side(name, *seconds):
        left = iter(seconds)

        def call():
            order.append(name)
            now[0] += next(left)
            return name
        return call

    def absent():
        raise ImportError("Please install them.\nand more")
    monkeypatch.setattr(bench_rows, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(bench_rows, "version", lambda package: "1.2")
    rows = bench_rows.compare_in_turn("docs/s", 12, side("a", 99, 2, 4, 3), {
        "x": ("them", side("b", 99, 6, 8, 12)), "y": ("no one", absent)}, 3, documents=12)
    assert order == ["a", "b"] + ["a", "b", "b", "a", "a", "b"]
    assert (rows[0]["ours"], rows[0]["peer"], rows[0]["ratio"], rows[0]["peer_name"]) == (4.0, 1.5, 8 / 3, "them 1.2")
    assert rows[0]["counts"] == {"ours": "a", "peer": "b"}
    assert rows[0]["spread"] == pytest.approx(2 / 3)                # of the ratios 3, 2, 4: quartiles 2 and 4
    assert (rows[1]["ours"], rows[1]["peer"], rows[1]["left_out"]) == (4.0, None, "Please install them.")
    with pytest.raises(ImportError):
        bench_rows.compare_in_turn("docs/s", 12, absent, {}, 1)
