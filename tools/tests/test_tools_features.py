"""The page that says which tests prove what."""

from __future__ import annotations

from tools.features import PAGE, claims, filled, items, proofs

PAGE_TEXT = """# Page

| Item | What it means | Proved by |
|---|---|---|
| 9.2 | takes `a|b` | no test yet |
| 9.26 | order | 7 tests: `old` |
"""


def test_every_item_that_a_test_claims_to_prove_is_on_the_page() -> None:
    unknown = set(proofs()) - set(items(PAGE.read_text(encoding="utf-8")))

    assert not unknown, f"proves() names items that docs/features.md does not have: {sorted(unknown)}"


def test_items_of_the_page_are_numbered_once() -> None:
    listed = items(PAGE.read_text(encoding="utf-8"))

    assert len(listed) > 100
    assert len(listed) == len(set(listed))


def test_claims_are_read_from_functions_classes_modules_and_parameters() -> None:
    source = """
import pytest
pytestmark = pytest.mark.proves("1.1")

@pytest.mark.proves("9.2", "9.26")
def test_one(): ...

@pytest.mark.proves("3.1")
class TestTwo:
    @pytest.mark.parametrize("x", [pytest.param(1, marks=pytest.mark.proves("3.2"))])
    def test_inner(self, x): ...
"""

    assert sorted(claims(source)) == [
        ("1.1", "the whole file"),
        ("3.1", "TestTwo"),
        ("3.2", "test_inner"),
        ("9.2", "test_one"),
        ("9.26", "test_one"),
    ]


def test_the_status_column_is_made_anew() -> None:
    proved = {"9.2": {"packages/a/tests/test_b.py": {"test_x", "test_y"}, "integration_tests/test_a.py": {"test_z"}}}

    rows = filled(PAGE_TEXT, proved).splitlines()

    assert rows[4] == "| 9.2 | takes `a|b` | 3 tests: `test_a`, `test_b` |"
    assert rows[5] == "| 9.26 | order | no test yet |"
    assert filled(filled(PAGE_TEXT, proved), {}) == PAGE_TEXT.replace("7 tests: `old`", "no test yet")
