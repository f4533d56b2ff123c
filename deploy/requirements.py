"""``python deploy/requirements.py EXTRA ...``: what the project needs with extras, one a line, for pip's ``-r``.

Read from ``pyproject.toml`` in the current folder, so that an image can install it before the sources are there.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

_OURS = re.compile(r"lenvm\[([a-z, -]+)\]")


def requirements(project: dict[str, Any], extras: list[str]) -> list[str]:
    """Those of the base and of extras, with the extras that they name. Raises KeyError for no extra."""
    found = list(project["dependencies"])
    waiting, seen = list(extras), set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for line in project["optional-dependencies"][name]:
            ours = _OURS.fullmatch(line)
            if ours:
                waiting += [part.strip() for part in ours[1].split(",")]
            else:
                found.append(line)
    return sorted(set(found))


def main() -> int:
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    try:
        lines = requirements(project, [sys.argv[1], *sys.argv[2:]])
    except (IndexError, KeyError):
        print(f"error: name an extra: {', '.join(project['optional-dependencies'])}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
