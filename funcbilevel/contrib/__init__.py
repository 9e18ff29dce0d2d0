"""Bridges to other projects; each module needs that project installed and is imported by itself."""
