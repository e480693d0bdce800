"""Encoders by name: ours and those of the paper, their checkpoints opened or converted."""
