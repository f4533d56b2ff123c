#!/usr/bin/env python3
"""``lenvm-probe [PATH]``: status 0 where the service in this container answers 200 (``/health/ready`` unless given).

Only the standard library, and nothing of the project: it runs every few seconds. ``LENVM_PROBE_KEY`` is an API key to
send; every path but ``/health/live`` wants one where the service has ``--api-keys``. Probes of Kubernetes that send
HTTP themselves cannot read it from a Secret.
"""

import http.client
import os
import sys

_TIMEOUT_S = 5.0


def main() -> int:
    path = sys.argv[1] if len(sys.argv) > 1 else "/health/ready"
    key = os.environ.get("LENVM_PROBE_KEY", "").strip()  # a file that a Secret was made from may end with a line break
    connection = http.client.HTTPConnection("127.0.0.1", int(os.environ.get("LENVM_PORT") or 8000), timeout=_TIMEOUT_S)
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {key}"} if key else {})
        answer = connection.getresponse()
        body = answer.read(2000).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException) as error:
        print(f"{path}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    finally:
        connection.close()
    if answer.status != 200:
        print(f"{path}: {answer.status} {body}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
