"""Self-supervised pretraining: recipe, views, networks, losses, checkpoints, monitoring."""
