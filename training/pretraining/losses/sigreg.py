"""SIGReg (LeJEPA, Balestriero and LeCun 2025): embeddings of a batch are standard normal along random directions."""

import torch

from .distributed import from_first_process, gather_rows


def sigreg_loss(
    embeddings: torch.Tensor, num_directions: int = 256, num_knots: int = 17, largest_knot: float = 3.0
) -> torch.Tensor:
    """Distance between the empirical characteristic function and that of a standard normal (Epps and Pulley 1983).

        mean_k integral_0^T w(t) [(mean_b cos(t x_bk) - exp(-t^2 / 2))^2 + (mean_b sin(t x_bk))^2] dt,
        x = z a, w(t) = exp(-t^2 / 2), by the trapezoid rule over `num_knots` knots from 0 to T = `largest_knot`

    embeddings z (B, D), B the images of all processes; directions a (D, K) are drawn on the unit sphere from torch's
    generator, which training seeds anew for each step. Without the factor B of LeJEPA, as in Meta's FINO. Returns a
    scalar float32.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        embeddings = gather_rows(embeddings.float())
        directions = from_first_process(torch.randn(embeddings.shape[1], num_directions, device=embeddings.device))
        projected = embeddings @ torch.nn.functional.normalize(directions, dim=0)  # (B, K)
        knots = torch.linspace(0, largest_knot, num_knots, device=embeddings.device)  # (T,)
        normal = torch.exp(-knots.square() / 2)
        angles = projected.unsqueeze(-1) * knots  # (B, K, T)
        error = (angles.cos().mean(dim=0) - normal).square() + angles.sin().mean(dim=0).square()  # (K, T)
        return torch.trapezoid(error * normal, knots, dim=-1).mean()
