"""The parts of a pretraining run around the losses."""
