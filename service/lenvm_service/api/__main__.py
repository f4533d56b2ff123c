"""``python -m lenvm_service.api > docs/openapi.json`` writes the pinned OpenAPI document."""

from __future__ import annotations

import json
import sys

from lenvm_service.api.openapi import document

if __name__ == "__main__":
    json.dump(document(), sys.stdout, indent=1, ensure_ascii=False)
    sys.stdout.write("\n")
