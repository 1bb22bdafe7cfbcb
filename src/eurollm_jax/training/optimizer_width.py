"""Learning rates that hold across widths: how far each weight may go in a step as a model grows.

Of the maximal update parametrisation (Yang et al. 2022, arXiv:2203.03466, table 8) this is the part for Adam's learning
rates, and for those of its kind, whose updates have one size whatever the gradient's: a product with a matrix sums over
`fan_in` changes that agree with each other, so they must shrink with it. It is meant for a family of models that grow
in width, heads and hidden size in proportion, with `head_dim`, depth and vocabulary as they are.

Two things in the table are about how weights start, which an optimizer cannot change. It starts embeddings at one size
whatever the width, where this model starts them at 1/sqrt(width): their rate follows their start, so that one step
turns them as far at any width. And it starts the head at 1/width, where here it is 1/sqrt(width): logits at the start,
and their first changes through the hidden states, are larger than the table's by sqrt(width / base_width).
"""

import jax
import optax

from eurollm_jax.errors import UserError
from eurollm_jax.model.param import Param, Specs, flatten


def scale_by_width(base_width: int | None, specs: Specs) -> optax.GradientTransformation:
    """Multiplies each weight's direction by its share of the learning rate; does nothing without a `base_width`."""
    if base_width is None:
        return optax.identity()
    shares = rate_shares(base_width, specs)
    return optax.stateless(lambda updates, _: jax.tree.map(lambda update, share: update * share, updates, shares))


def rate_shares(base_width: int, specs: Specs) -> Specs:
    """Of each weight, the share of the learning rate that is its own; 1 for all at `base_width`.

    Matrices have base_width / width; gains and biases have 1. An embedding has sqrt(base_width / width), but as much
    as a matrix where it is the head, too: as a head it would go too far.
    """
    if base_width < 1:
        raise UserError(f"optimizer: base_width={base_width} must be 1 or more, or None.")
    flat = flatten(specs)
    (width,) = {spec.sizes["embed"] for spec in flat.values() if spec.embeds}
    ratio = base_width / width
    tied = not any("vocab" in spec.axes and not spec.embeds for spec in flat.values())

    def share(spec: Param) -> float:
        if not spec.fan_in:
            return 1.0
        return ratio**0.5 if spec.embeds and not tied else ratio

    return jax.tree.map(share, specs)
