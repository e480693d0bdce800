"""Data in: the phantom and the pretraining corpus."""
