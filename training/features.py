"""Draw what a checkpoint's patch features see of files, as colors. Research use only.

python -m training.features FILE... --model MODEL --output PNG [--slices_per_volume N]
"""

from pathlib import Path

import torch

from modeling_mammodino.tools.command import CommandParser, add_model_option, command_line, user_path
from modeling_mammodino.tools.embed import open_encoder
from modeling_mammodino.tools.figure import write_figure
from modeling_mammodino.tools.files import check_output
from modeling_mammodino.tools.visualize import draw_features


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(prog="python -m training.features", description=__doc__.splitlines()[0])
    parser.add_argument(
        "files", nargs="+", type=user_path, metavar="FILE", help="DICOM or image files, colored together"
    )
    add_model_option(parser)
    parser.add_argument("--output", type=user_path, required=True, help="PNG to write")
    parser.add_argument("--slices_per_volume", type=int, default=1, help="evenly spaced slices (default 1, the middle)")
    options = parser.parse_args(arguments)
    with command_line("features"):
        check_output(options.output, ".png")
        model, image_processor = open_encoder(options.model)
        each = [
            image_processor(file, slices_per_volume=options.slices_per_volume, return_tensors="pt")
            for file in options.files
        ]
        inputs = {name: torch.cat([one[name] for one in each]) for name in ("pixel_values", "tissue_mask")}
        alike = len({file.name for file in options.files}) < len(set(options.files))
        names = []
        for file, one in zip(options.files, each, strict=True):
            name, count = "/".join(file.parts[-2:]) if alike else file.name, len(one["tissue_mask"])
            names += [f"{name}, slice {number} of {count}" if count > 1 else name for number in range(1, count + 1)]
        title = f"What the patch features of {Path(options.model).name} see"
        write_figure(draw_features(model, **inputs, title=title, names=names), options.output)
        print(options.output)


if __name__ == "__main__":
    main()
