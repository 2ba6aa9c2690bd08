"""The HTTP face: OpenAI-compatible routes and metrics. Translation only; never imports torch."""
