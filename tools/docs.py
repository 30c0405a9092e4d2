"""Build the site into build/site, every warning an error: ``python -m tools.docs [--serve]``.

The pages are copied to build/docs first, where a reference page for each package joins them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from tools.features import without_links_to_tests
from tools.workspace import ROOT, Package, packages

SOURCE, TARGET = ROOT / "docs", ROOT / "build" / "docs"


def reference(package: Package) -> str:
    """The API page of a package."""
    about = package.pyproject["project"]["description"]  # type: ignore[index]
    return f"# {package.name}\n\n{about}\n\n::: {package.module}\n"


def decisions() -> list[dict[str, str]]:
    """The navigation entries of the decision records, in order."""
    found = []
    for path in sorted((TARGET / "decisions").glob("*.md")):
        title = next(
            (line[2:] for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# ")), path.stem
        )
        found.append({title: f"decisions/{path.name}"})
    return found


def prepare() -> Path:
    """Gather the pages in build/docs, write the configuration beside them and return it."""
    shutil.rmtree(TARGET, ignore_errors=True)
    shutil.copytree(SOURCE, TARGET, ignore=shutil.ignore_patterns("mkdocs.yml", "__pycache__", "demo_output"))
    features = TARGET / "features.md"
    features.write_text(without_links_to_tests(features.read_text(encoding="utf-8")), encoding="utf-8")
    (TARGET / "reference").mkdir()
    for package in packages():
        (TARGET / "reference" / f"{package.name}.md").write_text(reference(package), encoding="utf-8")

    config = yaml.safe_load((SOURCE / "mkdocs.yml").read_text(encoding="utf-8"))
    config |= {"docs_dir": str(TARGET), "site_dir": str(ROOT / "build" / "site")}
    config["nav"].append({"Reference": [{p.name: f"reference/{p.name}.md"} for p in packages()]})
    if decisions():
        config["nav"].append({"Decisions": decisions()})
    for plugin in config["plugins"]:
        if isinstance(plugin, dict) and "mkdocstrings" in plugin:
            plugin["mkdocstrings"]["handlers"]["python"]["paths"] = [str(p.source) for p in packages()]
    written = TARGET.parent / "mkdocs.yml"
    written.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return written


def main(args: list[str]) -> int:
    """Build the site, or with ``--serve`` show it."""
    config = prepare()
    what = ["serve"] if "--serve" in args else ["build", "--strict", "--quiet"]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    code = subprocess.run([sys.executable, "-m", "mkdocs", *what, "-f", str(config)], env=env, check=False).returncode
    if code == 0:
        print(f"The site is in {(ROOT / 'build' / 'site').relative_to(ROOT)}; open its index.html.")
    return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
