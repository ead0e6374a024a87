"""`endpoint:URL#MODEL`: a model that a server runs, and the key that the server may want."""

import os
from dataclasses import dataclass
from urllib.parse import urlsplit

from kdtool.errors import UsageProblem

PREFIX = "endpoint:"
KEY = "KDTOOL_ENDPOINT_KEY"
_OPENAI = ("api.openai.com", "OPENAI_API_KEY")
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_EXAMPLE = "such as endpoint:http://localhost:8000/v1#model-name"


@dataclass(frozen=True, slots=True)
class EndpointRef:
    """A model behind a server.

    Attributes:
        url: Base address, to which `/completions` and its like are added.
        model: Name by which the server knows the model.
    """

    url: str
    model: str

    @staticmethod
    def matches(text: str | None) -> bool:
        """Whether a model reference is one of an endpoint."""
        return text is not None and text.startswith(PREFIX)

    @classmethod
    def parse(cls, text: str) -> "EndpointRef":
        """Read `endpoint:URL#MODEL`.

        Raises:
            UsageProblem: not of that form, or it holds a secret, which would end up in logs and manifests.
        """
        url, _, model = text.removeprefix(PREFIX).partition("#")
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise UsageProblem("an endpoint has an address that cannot be read", hint=_EXAMPLE) from None
        if "@" in parts.netloc or parts.query:
            raise UsageProblem(
                "an address of an endpoint holds no user, password or key", hint=f"set {KEY} in the environment"
            )
        if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or not text.isprintable():
            raise UsageProblem(f"endpoint '{url}' is no http address", hint=_EXAMPLE)
        if not model:
            raise UsageProblem(f"endpoint '{url}' names no model", hint=_EXAMPLE)
        return cls(url.rstrip("/"), model)

    def __str__(self) -> str:
        return f"{PREFIX}{self.url}#{self.model}"

    @property
    def local(self) -> bool:
        """Whether the server is on this machine."""
        return urlsplit(self.url).hostname in _LOOPBACK

    @property
    def encrypted(self) -> bool:
        """Whether what is sent can only be read by the server."""
        return self.url.startswith("https:")

    def key(self) -> str | None:
        """The key for this server from the environment; that of OpenAI goes to OpenAI alone.

        Raises:
            UsageProblem: it holds what no header can hold.
        """
        host, own = _OPENAI
        names = (KEY, own) if urlsplit(self.url).hostname == host else (KEY,)
        for name in names:
            value = os.environ.get(name, "").strip()
            if value and not (value.isascii() and value.isprintable()):
                raise UsageProblem(f"{name} holds characters that no key has", hint="set it again")
            if value:
                return value
        return None
