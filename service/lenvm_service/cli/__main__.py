"""``python -m lenvm_service.cli``."""

from __future__ import annotations

import sys

from lenvm_service.cli import main

if __name__ == "__main__":
    sys.exit(main())
