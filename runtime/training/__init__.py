"""One optimizer step on preference feedback, cut into quanta, over the parameters that serve."""
