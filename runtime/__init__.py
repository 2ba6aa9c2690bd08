"""The runtime: composes cache, streams and policy into an engine that serves a model."""
