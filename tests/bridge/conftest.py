"""Before the tests of bridges: what they need beside the other tests."""

import os
import shutil
from importlib.util import find_spec

import pytest

os.environ["PATH"] += os.pathsep + "/usr/sbin"  # where Debian has nats-server, and an ordinary user does not look
MISSING = [name for name in ("redis-server", "nats-server", "openssl") if shutil.which(name) is None]
MISSING += [name for name in ("redis", "nats") if find_spec(name) is None]
if MISSING:
    raise pytest.UsageError(
        f"tests/bridge needs {', '.join(MISSING)}: apt-get install --no-install-recommends redis-server nats-server openssl; "
        "pip install -e '.[bridges]'"
    )
