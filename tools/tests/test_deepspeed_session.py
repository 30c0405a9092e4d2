"""What is half built of DeepSpeed's operators does not hold up the next session."""

from __future__ import annotations

from pathlib import Path

from tools.deepspeed_session import delete_half_built


def test_only_operators_whose_build_did_not_end_are_deleted(tmp_path: Path) -> None:
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "op.so").write_text("")
    (tmp_path / "broken" / "lock").write_text("")

    assert delete_half_built(tmp_path) == ["broken"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["whole"]
    assert delete_half_built(tmp_path / "nowhere") == []
