"""Ways to the gradient, written to be read and compared: reverse mode, forward mode, and Moonwalk.

    loss, gradients = algorithm(module, loss_fn, (input, target), **options)

`loss_fn(output, target)` gives a scalar. `gradients` maps the names of all trainable parameters to their gradients;
nothing is written to `.grad`. Modules are ordinary ones. Where an algorithm goes layer by layer, the layers are the
children of an `nn.Sequential` (nested ones in their places); any other module is one layer.
"""

from .chain import chain_of
from .forward import forward_mode, projected_forward
from .moonwalk import moonwalk_mixed, moonwalk_pure_forward
from .reverse import backprop, checkpointed_backprop, rev_backprop

ALGORITHMS = {
    algorithm.__name__: algorithm
    for algorithm in (
        backprop,
        checkpointed_backprop,
        rev_backprop,
        forward_mode,
        projected_forward,
        moonwalk_pure_forward,
        moonwalk_mixed,
    )
}

__all__ = ["ALGORITHMS", "chain_of", *ALGORITHMS]
