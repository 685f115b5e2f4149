"""`python -m ops`: what operators do with a running registry."""
