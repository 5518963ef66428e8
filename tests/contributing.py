"""The examples of CONTRIBUTING.md, as files that Python can import: what is shown is what runs."""

from __future__ import annotations

from pathlib import Path

PAGE = Path(__file__).parents[1] / "CONTRIBUTING.md"


def example(heading: str) -> str:
    """Return the first block of Python under a heading of CONTRIBUTING.md."""
    section = PAGE.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    code = section.partition("```python\n")[2].partition("```")[0]
    assert code, f"CONTRIBUTING.md has no example under {heading!r}"
    return code


def write_example(heading: str, folder: Path, name: str) -> str:
    """Write the example under a heading to `folder` as the module `name`, and return the name."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(example(heading))
    return name
