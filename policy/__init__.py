"""Decisions only. Standard library only: no torch, no asyncio, no clock, no I/O."""
