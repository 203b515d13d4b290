"""The images' health check: exit code 0 while /health of the service in this container answers 200, else 1 and the reason.

It does not know how the service was started: the port is the one of DEEPSEEK_PORT (8000 when unset), so set that and not --port in a
container. Invariant: the standard library only, and an answer or an end within four seconds.
"""

import http.client
import os
import sys

TIMEOUT_S = 4


def main() -> int:
    """Ask once; returns the exit code."""
    connection = http.client.HTTPConnection("127.0.0.1", int(os.environ.get("DEEPSEEK_PORT") or 8000), timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/health")
        answer = connection.getresponse()
        body = answer.read(4096).decode("utf-8", "replace")
    except OSError as failure:
        print(f"no answer: {failure}")
        return 1
    print(body)
    return 0 if answer.status == http.client.OK else 1


if __name__ == "__main__":
    sys.exit(main())
