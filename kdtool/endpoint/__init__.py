"""Models behind an OpenAI-compatible HTTP server: what a reference means, what to ask, and asking."""

from kdtool.endpoint.protocol import Ask, Choice, Sampling, Token
from kdtool.endpoint.reference import EndpointRef

__all__ = ["Ask", "Choice", "EndpointRef", "Sampling", "Token"]
