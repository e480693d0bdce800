"""Make an encoder folder of a checkpoint of pretraining, whichever, as the run itself does at its end.

    python -m training.export RUN/checkpoint-N [--output FOLDER] [--corpus DIR]

Also while the run goes on, or when it was sharded. Of RUN alone its last checkpoint is taken. The folder is a complete
one for the Hub: AutoModel opens it. Research use only.
"""

from pathlib import Path

from dataset_scripts.corpus.reader import Corpus, local_corpus
from modeling_mammodino.tools.command import CommandParser, command_line, user_path
from training.pretraining.checkpoints import STATE_FILE, list_checkpoints
from training.pretraining.export import checkpoint_recipe, export_checkpoint


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(prog="python -m training.export", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=user_path, help="RUN/checkpoint-N, or RUN: its last one")
    parser.add_argument("--output", type=user_path, help="folder to make (default: RUN/encoder-N)")
    parser.add_argument("--corpus", help="where the corpus is now (default: as the run had it)")
    options = parser.parse_args(arguments)
    with command_line("export"):
        checkpoint = find(options.checkpoint)
        corpus = Corpus(local_corpus(options.corpus or checkpoint_recipe(checkpoint).run.corpus))
        output = options.output or checkpoint.with_name(checkpoint.name.replace("checkpoint", "encoder"))
        export_checkpoint(checkpoint, output, corpus)
        print(f"encoder: {output}")


def find(folder: Path) -> Path:
    """Return the folder itself where it is a checkpoint, else the last one in it. Raises ValueError where there is
    none."""
    if (folder / STATE_FILE).is_file():
        return folder
    if found := list_checkpoints(folder):
        return found[-1]
    raise ValueError(f"{folder}: neither is a checkpoint-N nor holds one; give a run's folder that has its first one")


if __name__ == "__main__":
    main()
