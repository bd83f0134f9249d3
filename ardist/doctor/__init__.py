"""Is this machine, are these machines, fit to train? Every finding comes with what to do about it."""
