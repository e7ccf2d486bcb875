"""An operator, accounts and a user of NATS, as ``nsc`` makes them, and the user's credentials file."""

import base64
import json
import os
import time
from binascii import crc_hqx
from hashlib import sha256
from pathlib import Path
from typing import Any

from nacl.signing import SigningKey

PREFIXES = {"O": 14 << 3, "A": 0, "U": 20 << 3}
UNLIMITED = dict.fromkeys(("subs", "data", "payload", "imports", "exports", "conn", "leaf"), -1) | {"wildcards": True}
JETSTREAM = dict.fromkeys(("mem_storage", "disk_storage", "streams", "consumer"), -1)


def base32(data: bytes) -> str:
    return base64.b32encode(data + crc_hqx(data, 0).to_bytes(2, "little")).rstrip(b"=").decode()


def base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


class Identity:
    """A key pair of an operator (O), an account (A) or a user (U)."""

    def __init__(self, kind: str) -> None:
        prefix, secret = PREFIXES[kind], os.urandom(32)
        self.key = SigningKey(secret)
        self.name = base32(bytes([prefix]) + bytes(self.key.verify_key))
        self.seed = base32(bytes([(18 << 3) | (prefix >> 5), (prefix & 31) << 3]) + secret)

    def certify(self, subject: "Identity", **claims: Any) -> str:
        """Return a JWT of the subject with these claims."""
        content: dict[str, Any] = {"iat": int(time.time()), "iss": self.name, "name": "test", "sub": subject.name}
        content["nats"] = {**claims, "version": 2}
        content["jti"] = base64.b32encode(sha256(json.dumps(content).encode()).digest()).decode().rstrip("=")
        parts = [{"typ": "JWT", "alg": "ed25519-nkey"}, content]
        text = ".".join(base64url(json.dumps(part).encode()) for part in parts)
        return f"{text}.{base64url(self.key.sign(text.encode()).signature)}"


def make_user(path: Path) -> dict[str, Any]:
    """Write a credentials file, and return the server's options under which its user may do everything."""
    operator, account, system, user = Identity("O"), Identity("A"), Identity("A"), Identity("U")
    accounts = {
        account.name: operator.certify(account, type="account", limits=UNLIMITED | JETSTREAM),
        system.name: operator.certify(system, type="account", limits=UNLIMITED),
    }
    token = account.certify(user, type="user", **dict.fromkeys(("subs", "data", "payload"), -1))
    path.write_text(
        f"-----BEGIN NATS USER JWT-----\n{token}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{user.seed}\n------END USER NKEY SEED------\n"
    )
    return {
        "operator": operator.certify(operator, type="operator"),
        "system_account": system.name,
        "resolver": "MEMORY",
        "resolver_preload": accounts,
    }
