"""The page that says which tests prove what."""

from __future__ import annotations

from tools.features import PAGE, claims, explained, filled, items, proofs, without_links_to_tests

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

    rows = filled(PAGE_TEXT, proved, {"9.26"}).splitlines()

    links = "[test_a](../integration_tests/test_a.py), [test_b](../packages/a/tests/test_b.py)"
    assert rows[4] == f"| 9.2 | takes `a|b` | 3 tests: {links} |"
    assert rows[5] == "| 9.26 | order | see [differences](differences.md) |"
    assert filled(filled(PAGE_TEXT, proved), {}) == PAGE_TEXT.replace("7 tests: `old`", "no test yet")


def test_differences_name_the_items_that_they_explain() -> None:
    text = "| a | b | refused (item 9.19) |\n| a | b | otherwise (items 6.5, 11.2 and 12.1) |\n| 1.2 | no item | |"

    assert explained(text) == {"9.19", "6.5", "11.2", "12.1"}


def test_links_to_tests_are_left_out_of_the_site() -> None:
    row = "| 1.1 | x | 1 test: [test_a](../integration_tests/test_a.py); see [differences](differences.md) |"

    assert without_links_to_tests(row) == "| 1.1 | x | 1 test: `test_a`; see [differences](differences.md) |"
