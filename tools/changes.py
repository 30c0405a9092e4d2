"""Check that each package tells its users what changed: ``python -m tools.changes``.

A change is told by a fragment ``packages/NAME/changes/+topic.KIND.md`` of one line, in the imperative; a release
gathers them into CHANGELOG.md with towncrier. A package needs a fragment until it has its first release.
"""

from __future__ import annotations

import re
import subprocess
import sys

from tools.workspace import Package, packages

KINDS = ("added", "changed", "deprecated", "removed", "fixed", "security")
NAME = re.compile(r"(?:\d+|\+[a-z0-9-]+)\.(?P<kind>[a-z]+)(?:\.\d+)?\.md")


def problems(package: Package) -> list[str]:
    """What is wrong with a package's fragments."""
    folder = package.path / "changes"
    fragments = [path for path in sorted(folder.iterdir()) if path.name != ".gitkeep"] if folder.is_dir() else []
    changelog = package.path / "CHANGELOG.md"
    text = changelog.read_text(encoding="utf-8") if changelog.exists() else ""
    found = []
    if "<!-- towncrier release notes start -->" not in text:
        found.append(f"{package.name}/CHANGELOG.md lacks the line '<!-- towncrier release notes start -->'")
    if not fragments and not re.search(r"^## ", text, re.MULTILINE):
        found.append(f"{package.name} has neither a release nor a fragment: add changes/+topic.added.md")
    for fragment in fragments:
        match = NAME.fullmatch(fragment.name)
        if match is None or match["kind"] not in KINDS:
            kinds = ", ".join(KINDS)
            found.append(
                f"{package.name}/changes/{fragment.name}: name it NUMBER.KIND.md or +topic.KIND.md; kinds: {kinds}"
            )
        elif not fragment.read_text(encoding="utf-8").strip():
            found.append(f"{package.name}/changes/{fragment.name} is empty")
    return found


def main() -> int:
    """Check every package and let towncrier draft its next entry; return 0 if all is well."""
    found = [problem for package in packages() for problem in problems(package)]
    for package in packages():
        command = [
            sys.executable,
            "-m",
            "towncrier",
            "build",
            "--draft",
            "--version",
            "next",
            "--dir",
            str(package.path),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            found.append(
                f"towncrier cannot read {package.name}'s fragments: {done.stderr.strip() or done.stdout.strip()}"
            )
    print("\n".join(found) if found else f"All {len(packages())} packages tell what changed.")
    return int(bool(found))


if __name__ == "__main__":
    raise SystemExit(main())
