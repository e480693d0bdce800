"""How much breast do crops hold? Tissue-aware crops beside plain random ones, on the images of a corpus.

python -m performance.tissue_in_crops CORPUS [--recipe NAME] [--draws 10000]
"""

import argparse
import itertools

import numpy as np

from dataset_scripts.corpus.reader import Corpus
from training.pretraining.recipe import load_recipe
from training.pretraining.views.crops import TissueTable, tissue_aware_crops

PERCENTILES = (0, 1, 5, 25, 50, 75, 95)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m performance.tissue_in_crops", description=__doc__.splitlines()[0])
    parser.add_argument("corpus", help="folder written by dataset_scripts.corpus")
    parser.add_argument("--recipe", default="mammodino", help="whose scales and minima (default: mammodino)")
    parser.add_argument("--draws", type=int, default=10_000, help="crops of each kind (default 10000)")
    options = parser.parse_args()
    views = load_recipe([options.recipe, "--corpus", options.corpus, "--output_dir", "none"]).views
    corpus, rng = Corpus(options.corpus), np.random.default_rng(0)
    tables = []
    for row in range(len(corpus.rows)):
        pixels, tissue = corpus.image(row)
        tables.append(TissueTable(tissue, pixels.shape))

    print(f"{options.draws} draws of each kind over {len(tables)} images; breast fraction of the crop")
    print("| crop | minimum | below it | none fitted | " + " | ".join(f"p{each}" for each in PERCENTILES) + " |")
    print("|---" * (4 + len(PERCENTILES)) + "|")
    kinds = {
        "global": (views.global_crop_scale, views.global_min_tissue),
        "local": (views.local_crop_scale, views.local_min_tissue),
    }
    for kind, (scale, minimum) in kinds.items():
        for word, asked in (("tissue-aware", minimum), ("plain", 0.0)):
            crops = [
                tissue_aware_crops(rng, table, tuple(scale), tuple(views.crop_ratio), asked)
                for table in itertools.islice(itertools.cycle(tables), options.draws)
            ]
            fractions = np.concatenate([each.tissue_fractions for each in crops])
            cells = " | ".join(f"{value:.2f}" for value in np.percentile(fractions, PERCENTILES))
            misses = sum(not each.fit[0] for each in crops)
            print(f"| {word} {kind} | {minimum} | {(fractions < minimum).sum()} | {misses} | {cells} |")


if __name__ == "__main__":
    main()
