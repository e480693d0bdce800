"""Commands and functions around a checkpoint, none of which a saved checkpoint carries."""
