"""Real servers for tests and the demo, in `.lab/`: nothing here is simulated."""
