"""The Hub: what a reference means, which commit it is, its files; nothing here needs the client until it is used."""

from kdtool.hub.fetch import fetch_config, fetch_model
from kdtool.hub.reference import ModelRef

__all__ = ["ModelRef", "fetch_config", "fetch_model"]
