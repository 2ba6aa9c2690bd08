"""Attention over KV pages: one reference and one fast path per device."""
