"""The faults that `make mutants` seeds, and its tables: nothing in them is of a source that is gone."""

from __future__ import annotations

from pathlib import Path

from tests.mutants.__main__ import sampled
from tests.mutants.explained import EXPLAINED
from tests.mutants.mutations import mutations_of
from tests.mutants.table import ROOMS, TESTS

ROOT = Path(__file__).parent.parent
SOURCE = '''
"""Said."""
if TYPE_CHECKING:
    import a
class Stage:
    version = 3
    rank: int = 3
def f(x: int = 1) -> None:
    assert x > 2
    check(x, limit=2.5)
    report.info("so", x)
    if x < 1 and "ü" in names:
        raise Error(f"{x + 1}", hint="so", strict=True)
    return {"a": True, **g(x, y=2)}
'''


def test_each_fault_that_a_source_can_have() -> None:
    found = mutations_of("f.py", SOURCE)
    assert [(one.line, one.kind, one.change) for one in found] == [
        (7, "constant changed", "3 → 6"),
        (8, "constant changed", "1 → 2"),
        (10, "call deleted", "check(x, limit=2.5) → pass"),
        (10, "argument dropped", "limit=2.5 → (nothing)"),
        (10, "constant changed", "2.5 → 5.0"),
        (12, "condition negated", 'x < 1 and "ü" in names → (not (x < 1 and "ü" in names))'),
        (12, "comparison swapped", "< → <="),
        (12, "constant changed", "1 → 2"),
        (12, "comparison swapped", "in → not in"),
        (14, "entry dropped", '"a": True, → (nothing)'),
        (14, "constant changed", "True → False"),
        (14, "argument dropped", "y=2 → (nothing)"),
        (14, "constant changed", "2 → 4"),
    ]
    for one in found:
        compile(one.applied(SOURCE.encode()), "f.py", "exec")
    assert 'if x < 1 and "ü" not in names:' in found[8].applied(SOURCE.encode()).decode()


def test_a_sample_stays_when_the_source_of_others_changes() -> None:
    found = mutations_of("f.py", SOURCE)
    more = mutations_of("f.py", f"# So much for that.\n{SOURCE}    check(x, limit=9.5)\n")
    drawn = sampled(found, 5, seed=1)
    assert len(drawn) == 6
    assert set(drawn) <= set(sampled(more, 5 + len(more) - len(found), seed=1))
    assert len(set(more)) == len(more)


def test_the_tables_are_of_the_sources_and_tests_that_there_are() -> None:
    modules = {path.relative_to(ROOT).as_posix() for room in ROOMS for path in (ROOT / room).glob("*.py")}
    assert {path for path in modules if (ROOT / path).read_text(encoding="utf-8").strip()} == TESTS.keys()
    assert {name.partition("::")[0] for names in TESTS.values() for name in names} <= {
        path.name for path in (ROOT / "tests").glob("test_*.py")
    }
    known = {
        (path, one.context, one.change)
        for path in {path for path, _, _ in EXPLAINED}
        for one in mutations_of(path, (ROOT / path).read_text(encoding="utf-8"))
    }
    assert EXPLAINED.keys() - known == set()
