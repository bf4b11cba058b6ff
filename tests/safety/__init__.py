"""Named safety properties, each with a twin that takes its fix out."""
