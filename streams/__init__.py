"""Where work runs: lanes and device probes. The only folder that says "stream" to torch."""
