"""The paper's published figures, every one that is known (Zhou et al., arXiv 2510.11883; its tables are not public).

Shown beside ours, marked as theirs, never mixed with ours: splits, label definitions, resolution and fine-tuning of the
paper are not published, and some of its labels are not in the public data (`UNCLEAR`).
"""

from typing import NamedTuple

from training.evaluation.reports import markdown_table


class Published(NamedTuple):
    dataset: str
    task: str
    metric: str
    by_backbone: dict[str, float]  # by the name that the paper gives a backbone


PUBLISHED = (
    Published("vindr_mammo", "cancer", "AUC", {"MammoDINO": 0.918, "ResNet50": 0.554, "MammoCLIP": 0.809}),
    Published("cbis_ddsm", "lesion", "AUC", {"MammoDINO": 0.932, "ResNet50": 0.919, "DINOv2": 0.902}),
    Published("cmmd", "birads", "F1", {"MammoDINO": 0.762, "DINOv2": 0.704, "ResNet50": 0.633}),
    Published("rsna", "density", "not named", {"MammoDINO": 0.759, "MammoCLIP": 0.748, "RadDINO": 0.740}),
)

UNCLEAR = {
    ("vindr_mammo", "cancer"): "VinDr-Mammo has no pathology; which BI-RADS the paper calls cancer is not said",
    (
        "cbis_ddsm",
        "lesion",
    ): "the paper says DDSM; CBIS-DDSM has no normal cases, so what it calls no lesion is unknown",
    ("cmmd", "birads"): "the public labels of CMMD have no BI-RADS, so this figure cannot be tried",
    ("rsna", "density"): "the metric is not named",
}


def published_table() -> list[str]:
    """The figures as lines of Markdown, each with what is unclear about it."""
    rows = [
        [
            *(each.dataset, each.task, each.metric),
            ", ".join(f"{name} {value:.3f}" for name, value in each.by_backbone.items()),
            UNCLEAR[each.dataset, each.task],
        ]
        for each in PUBLISHED
    ]
    return markdown_table(["data set", "task", "metric", "the paper's results", "unclear"], rows)
