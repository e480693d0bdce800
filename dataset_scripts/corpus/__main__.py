"""The command `python -m dataset_scripts.corpus`."""

from .build import main

if __name__ == "__main__":
    main()
