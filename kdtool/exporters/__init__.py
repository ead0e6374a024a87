"""Exporters: one file is one target format."""
