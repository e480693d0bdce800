"""Encoders by name: ours and those of the article, their checkpoints opened or converted."""
