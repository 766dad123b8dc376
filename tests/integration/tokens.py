"""A token service: client credentials for a token that lives for seconds (RFC 6749 4.4), and the public keys that brokers check it with."""

import base64
import http.server
import json
import threading
import time
import uuid
from collections import Counter
from typing import Any

from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256

from tests.integration.broker import Guarded

__all__ = ["TokenService"]


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


class TokenService:
    """Serves tokens for the user `shop` until it is closed; while `down`, it answers 503 instead, and while `wrong`, with tokens that no broker accepts."""

    def __init__(self, lifetime_s: float) -> None:
        self.lifetime_s = lifetime_s
        self.down = self.wrong = False
        self.given: list[str] = []
        self.asked = Counter[str]()  # how often, by path
        self._key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def token(self) -> dict[str, Any]:
        now = time.time()
        claims = {"iss": Guarded.ISSUER, "aud": Guarded.AUDIENCE, "sub": Guarded.USER, "iat": int(now), "exp": int(now + self.lifetime_s), "jti": uuid.uuid4().hex}
        signed = ".".join(_encoded(json.dumps(part).encode()) for part in ({"alg": "RS256", "typ": "JWT", "kid": "one"}, claims))
        signature = self._key.sign(signed.encode() + b"!" * self.wrong, padding.PKCS1v15(), SHA256())
        token = f"{signed}.{_encoded(signature)}"
        self.given.append(token)
        return {"access_token": token, "token_type": "Bearer", "expires_in": self.lifetime_s, "expires_at": claims["exp"]}

    def keys(self) -> dict[str, Any]:
        public = self._key.public_key().public_numbers()
        return {"keys": [{"kty": "RSA", "use": "sig", "alg": "RS256", "kid": "one", "n": _encoded(public.n.to_bytes(256)), "e": _encoded(public.e.to_bytes(3))}]}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _handler(service: TokenService) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(200, service.keys())

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            service.asked[self.path] += 1
            if service.down:
                self._answer(503, {"error": "temporarily_unavailable"})
            else:
                self._answer(200, service.token())

        def _answer(self, status: int, what: dict[str, Any]) -> None:
            body = json.dumps(what).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            """Say nothing."""

    return Handler
