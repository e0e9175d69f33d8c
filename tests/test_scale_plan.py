"""docs/scale.md: its tables are what benchmarks/scale_plan.py prints, and that is what one gets by hand."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Any:
    return _of_benchmarks("scale_plan", monkeypatch)


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Any:
    return _of_benchmarks("scale_tables", monkeypatch)


def _of_benchmarks(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module(name)


def test_the_page_holds_what_the_plan_prints(plan: Any) -> None:
    page = plan.PAGE.read_text(encoding="utf-8")
    for name, text in plan.tables(plan.MEASURED.read_text(encoding="utf-8")).items():
        assert plan.filled(page, name, text) == page, f"{name} is out of date: python benchmarks/scale_plan.py"


def test_six_members_of_70b_by_hand(plan: Any) -> None:
    # 6 x 140 GB are read and 140 GB written: 980 GB at 3 GB/s, or at 0.5.
    assert plan.average_hours(70e9, 3e9, False, 0, 16) * 3600 == pytest.approx(980 / 3)
    assert plan.average_hours(70e9, 0.5e9, False, 0, 16) * 3600 == pytest.approx(1960)
    # Over a wire of 1 Gbit/s 840 GB take 6720 s; the disk writes meanwhile.
    assert plan.average_hours(70e9, 0.125e9, True, 0, 16) * 3600 == pytest.approx(6720)
    # At 3 CPU seconds a GB, 840 GB on two threads take longer than to move them.
    assert plan.average_hours(70e9, 3e9, False, 3, 2) * 3600 == pytest.approx(1260)
    # 100,000 pairs of 2 x 600 tokens: 6 x 70e9 x 120e6 FLOP, of which an H100 at 40 % does 395.6e12 a second.
    assert plan.training_flop(70e9, 1.2e8) == 5.04e19
    assert plan.gpu_hours(5.04e19) == pytest.approx(35.39, abs=0.01)
    assert plan.units(1_000_000) == 31
    assert plan.best_of_n_tokens() == (300 + 16 * 300, 300 + 16 * 300, 16 * 600)
    rows = {row[0]: row for row in plan.training()}
    assert rows["6 x 70B"][1:] == ["35", "212", "12", "672", "1,120", "14", "35", "280", "2,240"]
    scored = {(row[0], row[1]): row for row in plan.scoring()}
    # 2 x 70e9 x 6e8 FLOP are 59 hours of one H100; 31 units load 140 GB each.
    assert scored["70B", "1"][3:8] == ["59", "7.4", "177", "31", "4,340"]
    assert scored["70B", "6"][3:8] == ["354", "44", "1,062", "186", "26,040"]
    # 2 x 70e9 x 5.1e9 FLOP.
    assert plan.best_of_n()[2][1:4] == ["2,005", "501", "3,008"]


@pytest.mark.parametrize(("exponent", "fixed"), [(1.0, 0.0), (2.0, 0.0), (1.0, 3.0)])
def test_fits_find_the_power_and_the_line(tables: Any, exponent: float, fixed: float) -> None:
    xs = [1.0, 2.0, 4.0, 8.0, 16.0]
    found = tables.fit(xs, [fixed + 0.5 * x**exponent for x in xs])
    if fixed:
        assert found.exponent < 0.6, "a fixed part looks like a small power"
        assert found.exponent < found.last < 1
    else:
        assert found.exponent == pytest.approx(exponent)
        assert found.last == pytest.approx(exponent)
        assert found.bent == pytest.approx(0, abs=1e-9)
    if exponent == 1:
        assert (found.fixed, found.slope) == (pytest.approx(fixed, abs=1e-9), pytest.approx(0.5))
        assert found.off == pytest.approx(0, abs=1e-9)
    else:
        assert found.fixed == 0, "no work takes less than nothing"
        assert found.off > 0.5, "a square is no line"


def test_a_page_without_its_marks_is_told(plan: Any) -> None:
    with pytest.raises(AssertionError, match="no end of t"):
        plan.filled("<!-- t --> and no more", "t", "new")
    with pytest.raises(AssertionError, match="no mark t"):
        plan.filled("nothing", "t", "new")
