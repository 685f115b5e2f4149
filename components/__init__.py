"""The parts of the registry: one component resource a file, none of which imports another."""
