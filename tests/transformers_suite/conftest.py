"""These tests need the source of transformers: `make test-transformers` says where it is. Others pass them over."""

import os

collect_ignore_glob = ["stand_ins/*"] + ([] if "TRANSFORMERS_SOURCE" in os.environ else ["test_*.py"])
