"""Layers that the compiler can solve for, by construction and with good conditioning.

They are ordinary modules: they train without the compiler, and know nothing of it.

| layer | property | the compiler may |
|---|---|---|
| `OrthogonalLinear`, `OrthogonalConv2d` | singular values 1 at any parameters | invert, moonwalk |
| `MaxMin` | every Jacobian is a permutation | moonwalk, invert |
| `Reversible` | invertible for any blocks | invert |
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import OptionError

__all__ = ["MaxMin", "OrthogonalConv2d", "OrthogonalLinear", "Reversible"]

STREAMS = ("split", "copy")


def _orthonormal(raw: Tensor) -> Tensor:
    """Orthonormal rows [k, n] from any tall [n, k].

    The compiler proves it from this form, see passes/inverse/orthogonal.py. `solve_ex` does not wait for the device:
    1 - K is never singular.
    """
    n, k = raw.shape
    wide = raw.to(torch.promote_types(raw.dtype, torch.float32))  # there is no LU in half precision
    filled = F.pad(wide, (0, n - k)) if k < n else wide
    skew = filled - filled.mT
    one = torch.eye(n, dtype=skew.dtype, device=skew.device)
    turned, _ = torch.linalg.solve_ex(torch.add(one, skew, alpha=-1), torch.add(one, skew))
    return turned.mT[:k].to(raw.dtype)


class _Orthogonal(nn.Module):
    """A matrix [rows, columns] with orthonormal rows or columns, whichever are fewer, from an unconstrained one.

    The Cayley transform (1 - K)^-1 (1 + K) of a skew-symmetric matrix K is orthogonal. It reaches every rotation
    without the eigenvalue -1, at the cost of one LU. The parameter `raw` is tall, [n, k], and K is `raw` filled up to
    [n, n] with zeros, less its transpose; k rows of the transform's transpose are the result, or these turned.
    """

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.rows, self.columns = rows, columns
        self.raw = nn.Parameter(torch.empty(max(rows, columns), min(rows, columns)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal elements, of the size that gives the transform a trace of about zero, as a random rotation has.

        By the semicircle law this is a variance of 2 / (2n - k) in K. The condition number of 1 - K is about 3.
        """
        n, k = self.raw.shape
        self.raw.normal_(0, math.sqrt(2 / (2 * n - k)))
        self.raw[:k] /= math.sqrt(2)  # elements of this square stand in K as differences of two

    def forward(self) -> Tensor:
        wide = _orthonormal(self.raw)
        # Contiguous: then torch takes the gradient of a product without a transpose of its other factor.
        return (wide if self.rows <= self.columns else wide.mT).contiguous()

    def extra_repr(self) -> str:
        return f"{self.rows}, {self.columns}"


def _bias(size: int, fan_in: int) -> nn.Parameter:
    bound = 1 / math.sqrt(fan_in)
    return nn.Parameter(torch.empty(size).uniform_(-bound, bound))


class OrthogonalLinear(nn.Module):
    """y = x W^T + b, where all singular values of W are 1, before and after every optimizer step.

    Args:
        in_features, out_features: any sizes. W is [out_features, in_features].
        bias: whether b is learned, [out_features].

    Shape: x [..., in_features] to y [..., out_features], floating point.

    Square: orthogonal and invertible, with determinant 1. The inverse is W^T, so the compiler may use `invert` or
    `moonwalk`. Narrowing (out < in): submersive, the rows of W are orthonormal; `moonwalk`. Widening: an isometry;
    `invert`. Neither amplifies rounding errors. Each forward pass makes W anew, by one LU of size max(in, out).

    >>> layer = OrthogonalLinear(256, 256)
    >>> torch.linalg.svdvals(layer.weight)  # all 1
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        _check_sizes("OrthogonalLinear", in_features=in_features, out_features=out_features)
        self.in_features, self.out_features = in_features, out_features
        self.matrix = _Orthogonal(out_features, in_features)
        self.bias = _bias(out_features, in_features) if bias else None

    @property
    def weight(self) -> Tensor:
        """W [out_features, in_features], computed anew at each access."""
        return self.matrix()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class OrthogonalConv2d(nn.Module):
    """A convolution whose singular values are all 1, as a map of whole images.

    Args:
        in_channels, out_channels: any sizes for patches; for a sliding kernel in_channels >= kernel_size^2.
        kernel_size: k, the same in both directions.
        stride: k (patches) or 1 (sliding).
        bias: whether a bias [out_channels] is learned.

    Shape: x [B, in_channels, H, W] to y [B, out_channels, H / stride, W / stride]; the stride divides H and W.

    stride = kernel_size (1x1 too): one matrix W [out_channels, in_channels k^2] for each patch. With equal sizes it is
    orthogonal and the compiler may use `invert` or `moonwalk`; with fewer outputs submersive, `moonwalk`; with more
    an isometry, `invert`.

    stride = 1, k > 1: an orthogonal 1x1 convolution, a shift of each of k^2 groups of channels to a place of its own
    in the kernel, another orthogonal 1x1 convolution. Together they are a k x k convolution with circular padding;
    the middle of the kernel is at k // 2. Each place of the kernel has a matrix of rank in_channels / k^2. (Block
    convolutions, Li et al. 2019, are longer products of the same kind.) The same properties hold by in_channels
    against out_channels.

    >>> nn.Sequential(OrthogonalConv2d(3, 48, 4, 4), MaxMin(), OrthogonalConv2d(48, 48, 3), MaxMin())
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 1, stride: int = 1, bias: bool = True
    ) -> None:
        super().__init__()
        _check_sizes("OrthogonalConv2d", in_channels=in_channels, out_channels=out_channels, kernel_size=kernel_size)
        _check_stride(in_channels, kernel_size, stride)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride = kernel_size, stride
        slides = stride < kernel_size
        self.mix = _Orthogonal(in_channels, in_channels) if slides else None
        self.matrix = _Orthogonal(out_channels, in_channels * (1 if slides else kernel_size**2))
        self.bias = _bias(out_channels, in_channels * kernel_size**2) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.mix is not None:
            x = _shifted(F.conv2d(x, self.mix()[:, :, None, None]), self.kernel_size)
        weight = self.matrix().unflatten(1, (self.in_channels, self.stride, self.stride))
        return F.conv2d(x, weight, self.bias, self.stride)

    def extra_repr(self) -> str:
        sizes = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        return f"{sizes}, bias={self.bias is not None}"


def _shifted(x: Tensor, kernel_size: int) -> Tensor:
    """[B, C, H, W]: each group of channels moved to its place of the kernel, around the border of the image."""
    places = [k - kernel_size // 2 for k in range(kernel_size)]
    shifts = list(product(places, places))
    sizes = [x.shape[1] * (i + 1) // len(shifts) - x.shape[1] * i // len(shifts) for i in range(len(shifts))]
    groups = zip(x.split(sizes, 1), shifts, strict=True)
    return torch.cat([torch.roll(group, shift, (2, 3)) for group, shift in groups], 1)


class MaxMin(nn.Module):
    """The larger of each pair of features, then the smaller (GroupSort of pairs, Anil et al. 2019).

    Args:
        dim: the dimension of the features, of even size n; feature i is paired with i + n / 2.

    Shape: any, kept.

    Its Jacobian is a permutation: norms of gradients stay exactly as they are, and the map is 1-Lipschitz. It is
    submersive but not invertible. The compiler may use `moonwalk`, and keeps one bit for each pair. Where both are
    exactly equal, torch shares the gradient between them and `moonwalk` gives it to one.
    """

    def __init__(self, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        a, b = _halves("MaxMin", x, self.dim)
        return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class Reversible(nn.Module):
    """A residual stack x + F1(x), + F2, ... made invertible: two streams that add to each other in turn.

        a = a + F1(b);  b = b + F2(a);  a = a + F3(b);  ...        (NICE, Dinh et al. 2014; RevNet, Gomez et al. 2017)

    Args:
        blocks: the modules F. Each must keep the shape of a stream; nothing else is asked of them. They are used as
            they are, with their parameters.
        dim: with "split", the dimension that is split, of even size.
        streams: "split": the streams are the halves of x along `dim`, and the result is put together from both. The
            blocks see half the width. "copy": both streams start as x and the result is their mean. The blocks see
            the whole width, the stack takes two activations instead of one.
        skips: True if the blocks are residual already, x + F(x); then F(x) is block(x) - x.

    Shape: x to the same shape.

    Invertible whatever the blocks are, by as many evaluations of them ("copy": all but the mean at the end). The
    compiler uses `invert`: no activation inside is kept. How much noise the inverse amplifies depends on the blocks;
    normalised branches of moderate size are good. The compiler measures it before it trusts it.

    >>> branch = lambda: nn.Sequential(nn.LayerNorm(128), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 128))
    >>> net = Reversible([branch() for _ in range(24)], dim=-1)  # [..., 256] to [..., 256]
    >>> deep = Reversible(vit.blocks, streams="copy", skips=True)
    """

    def __init__(
        self, blocks: Iterable[nn.Module], *, dim: int = 1, streams: str = "split", skips: bool = False
    ) -> None:
        super().__init__()
        if streams not in STREAMS:
            raise OptionError("Reversible", f"streams={streams!r} is unknown", f"use one of {', '.join(STREAMS)}")
        self.blocks = nn.ModuleList(blocks)
        self.dim, self.streams, self.skips = dim, streams, skips

    def forward(self, x: Tensor) -> Tensor:
        changed, read = (x, x) if self.streams == "copy" else _halves("Reversible", x, self.dim)
        for block in self.blocks:
            changed, read = read, changed + self._branch(block, read)
        first, second = (changed, read) if len(self.blocks) % 2 == 0 else (read, changed)
        return (first + second) / 2 if self.streams == "copy" else torch.cat([first, second], self.dim)

    def _branch(self, block: nn.Module, x: Tensor) -> Tensor:
        result = block(x)
        if result.shape != x.shape:
            what = f"{type(block).__name__} makes {list(result.shape)} of a stream {list(x.shape)}"
            todo = "use blocks that keep the shape" + (
                "" if self.streams == "copy" else ", built for half the width, or streams='copy'"
            )
            raise OptionError("Reversible", what, todo)
        return result - x if self.skips else result

    def extra_repr(self) -> str:
        return f"dim={self.dim}, streams={self.streams!r}, skips={self.skips}"


def _halves(layer: str, x: Tensor, dim: int) -> Sequence[Tensor]:
    if x.shape[dim] % 2:
        what = f"dimension {dim} of {list(x.shape)} has an odd size"
        raise OptionError(layer, what, "use an even number of features, or another dim")
    return x.chunk(2, dim)


def _check_sizes(layer: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise OptionError(layer, f"{name} is {size}", "use a size of at least 1")


def _check_stride(channels: int, kernel_size: int, stride: int) -> None:
    if stride not in (1, kernel_size):
        what = f"kernel_size {kernel_size} and stride {stride} overlap in part"
        raise OptionError("OrthogonalConv2d", what, f"use stride={kernel_size} or stride=1")
    if stride < kernel_size and channels < kernel_size**2:
        what = f"{channels} channels do not fill the {kernel_size**2} places of the kernel"
        raise OptionError("OrthogonalConv2d", what, f"use at least {kernel_size**2} channels, or stride={kernel_size}")
