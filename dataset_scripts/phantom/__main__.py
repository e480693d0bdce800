"""The command `python -m dataset_scripts.phantom`."""

from .archive import main

if __name__ == "__main__":
    main()
