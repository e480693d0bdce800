"""Where the tissue is, by anatomy: the breast by default, and the body in an axial slice of CT or MR."""

from typing import Protocol

import numpy as np

from .tissue import TissueMask, find_breast, unit_thumbnail

try:
    import cv2
except ImportError:  # transformers imports remote code before its packages are checked
    cv2 = None  # type: ignore[assignment]

MIN_BODY_FRACTION = 0.02  # of the image; anything smaller is noise
TABLE_FRACTION = 0.012  # radius of the opening, of the longer side: the table, its rails and tubes go


class FindTissue(Protocol):
    """A rule for the tissue in a grey image (H, W), 8 to 16 bits or float, in which tissue is brighter than air; by
    name in TISSUE_FINDERS. An image without tissue gives an empty mask with confidence 0."""

    def __call__(self, image: np.ndarray) -> TissueMask: ...


def find_body(image: np.ndarray) -> TissueMask:
    """The body in an axial slice, with the air inside it: lungs and bowel belong to it.

    Otsu's threshold (1979) on a thumbnail, an opening that cuts the table off, the largest component, and its holes
    filled. `confidence` is the share of all that is brighter than the threshold that lies in the mask. Research use
    only.
    """
    if image.ndim != 2:
        raise ValueError(f"find_body takes a 2-D grey image, got shape {image.shape}; pass one plane (H, W).")
    H, W = image.shape
    values = unit_thumbnail(image)
    nothing = TissueMask(np.zeros((H, W), bool), 0.0, 0.0, "no body found")
    if values is None:
        return nothing
    grey = np.rint(values * 255).astype(np.uint8)
    _, above = cv2.threshold(cv2.GaussianBlur(grey, (5, 5), 0), 0, 1, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    radius = max(1, round(TABLE_FRACTION * max(grey.shape)))
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
    count, labels, stats, _ = cv2.connectedComponentsWithStats(cv2.morphologyEx(above, cv2.MORPH_OPEN, disc))
    if count == 1:
        return nothing
    body = (labels == 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))).astype(np.uint8)
    outlines, _ = cv2.findContours(body, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    body = cv2.drawContours(body, outlines, -1, 1, cv2.FILLED)
    if body.mean() < MIN_BODY_FRACTION:
        return nothing
    inside = float((above & body).sum() / above.sum())
    mask = cv2.resize(body * 255, (W, H), interpolation=cv2.INTER_LINEAR) > 127
    return TissueMask(mask, inside, 1 - inside, "much besides it is as bright" if inside < 1 else "")


TISSUE_FINDERS: dict[str, FindTissue] = {"breast": find_breast, "body": find_body}
