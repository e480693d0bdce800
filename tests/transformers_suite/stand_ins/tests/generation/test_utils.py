"""Stands in for the tests of text generation, which MammoDINO has none of."""


class GenerationTesterMixin:
    pass
