"""Learning from feedback while serving: events, store, training, gate, versions."""
