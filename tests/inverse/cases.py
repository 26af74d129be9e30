"""Cases for the universal tester: every rule, what must be refused, and blocks of real nets."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .check import Case

aten = torch.ops.aten


def _channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last)


POINTWISE = [
    Case("add", lambda x, b: x + b, "bn bn"),
    Case("add with alpha, broadcast", lambda x, b: torch.add(x, b, alpha=2), "bn n"),
    Case("add to the second", lambda x, b: torch.add(b, x, alpha=-3), "bn n"),
    Case("add a number", lambda x: x + 1.5, "bn"),
    Case("sub", lambda x, b: torch.sub(x, b, alpha=2), "bn n"),
    Case("sub from", lambda x, b: torch.sub(b, x, alpha=0.5), "bn n"),
    Case("rsub", lambda x: 2.0 - x, "bn"),
    Case("rsub a tensor", lambda x, b: torch.rsub(x, b, alpha=2), "bn bn"),
    Case("mul", lambda x, b: x * b, "bn n"),
    Case("mul by a number", lambda x: 3 * x, "bn"),
    Case("div", lambda x, b: x / b, "bn n"),
    Case("div by a number", lambda x: x / 3, "bn"),
    Case("div of", lambda x, b: b / (2 + x.tanh()), "bn n"),
    Case("neg", lambda x: -x, "bn"),
    Case("reciprocal", lambda x: (2 + x.tanh()).reciprocal(), "bn"),
    Case("exp", torch.exp, "bn"),
    Case("log", lambda x: (2 + x.tanh()).log(), "bn"),
    Case("expm1", torch.expm1, "bn"),
    Case("log1p", lambda x: x.exp().log1p(), "bn"),
    Case("sqrt", lambda x: x.exp().sqrt(), "bn"),
    Case("rsqrt", lambda x: x.exp().rsqrt(), "bn"),
    Case("tanh", torch.tanh, "bn"),
    Case("atanh", lambda x: (0.5 * x.tanh()).atanh(), "bn"),
    Case("sigmoid", torch.sigmoid, "bn"),
    Case("sinh", torch.sinh, "bn"),
    Case("asinh", torch.asinh, "bn"),
    Case("atan", torch.atan, "bn"),
    Case("leaky_relu", lambda x: F.leaky_relu(x, 0.2), "bn"),
    Case("abs", torch.abs, "bn", invert=False),
    Case("erf", torch.erf, "bn"),
    Case("softplus", F.softplus, "bn"),
    Case("softplus with beta", lambda x: F.softplus(x, 3.0, 25.0), "bn"),
    Case("softplus with a low threshold", lambda x: F.softplus(4 * x, 1.0, 2.0), "bn", invert=False),
    Case("log_sigmoid", F.logsigmoid, "bn"),
    Case("elu", lambda x: F.elu(x, 0.7), "bn"),
    Case("elu, in place", lambda x: F.elu(x * 2, 0.7, inplace=True), "bn"),
    Case("elu falling", lambda x: F.elu(x, -0.7), "bn", invert=False, vijp=False),
    Case("selu", F.selu, "bn"),
    Case("celu", lambda x: F.celu(x, 2.0), "bn"),
    Case("mul, the broadcast side", lambda x, w: x * w, "b1n b5n", vijp=False),
]

ERASING = [
    Case("relu", torch.relu, "bn", invert=False),
    Case("threshold", lambda x: F.threshold(x, 0.3, 5.0), "bn", invert=False),
    Case("relu6", lambda x: F.relu6(3 * x), "bn", invert=False),
    Case("hardtanh", lambda x: F.hardtanh(x, -0.3, 0.8), "bn", invert=False),
    Case("hardsigmoid", lambda x: F.hardsigmoid(3 * x), "bn", invert=False),
    Case("hardswish", lambda x: F.hardswish(3 * x), "bn", invert=False),
    Case("hardshrink", F.hardshrink, "bn", invert=False),
    Case("gelu", F.gelu, "bn", invert=False),
    Case("gelu by tanh", lambda x: F.gelu(3 * x, approximate="tanh"), "bn", invert=False),
    Case("silu", lambda x: F.silu(2 * x), "bn", invert=False),
    Case("mish", lambda x: F.mish(2 * x), "bn", invert=False),
    Case("leaky_relu, nearly flat", lambda x: F.leaky_relu(x, 1e-12), "bn"),
    Case("prelu", F.prelu, "bn 1", invert=False),
    Case("prelu of a channel", lambda x, w: F.prelu(x, w - w[0]), "bnk n", invert=False),
    Case("dropout", lambda x: F.dropout(x, 0.4), "bn", invert=False),
    Case("dropout of everything", lambda x: F.dropout(x, 1.0), "bn", invert=False, vijp=False),
    Case("clamp", lambda x: x.clamp(-0.5, 0.6), "bn", invert=False),
    Case("clamp from below", lambda x: x.clamp(min=0.1), "bn", invert=False),
    Case("where", lambda x, p: torch.where(x > p, x, 0.5), "bn n", invert=False),
    Case("where, the other side", lambda x, p: torch.where(p > 0, p, 2 * x), "bn bn", invert=False),
    Case("masked_fill", lambda x: x.masked_fill(x > 0, 0), "bn", invert=False),
    Case("masked_fill, broadcast", lambda x: x.masked_fill(x[:, :1] > 0, 1.5), "bn", invert=False),
    Case("amax", lambda x: x.amax(1), "bn", invert=False),
    Case("max along a dimension", lambda x: x.max(1).values, "bn", invert=False),
    Case("topk", lambda x: x.topk(2, 1).values, "bn", invert=False),
    Case("max alone", lambda x: torch.maximum(x[:, :2], x[:, 2:]), "b4", invert=False),
    Case("max of ties", lambda x: torch.maximum(x[:, :2].relu(), x[:, 2:].relu()), "b4", invert=False),
    Case("maxmin of different pairs", lambda x: _maxmin_of_three(x), "b6", invert=False),
]

COMPOSED = [
    Case("softsign", F.softsign, "bn"),
    Case("sin", torch.sin, "bn", invert=False),
    Case("cos", torch.cos, "bn", invert=False),
    Case("square", torch.square, "bn", invert=False),
    Case("cube", lambda x: x**3, "bn", invert=False),
    Case("square of relu", lambda x: x.relu().square(), "bn", invert=False),
    Case("x times x", lambda x: x * x, "bn", invert=False),
    Case("swish by hand", lambda x: x * torch.sigmoid(1.7 * x), "bn", invert=False),
    Case("gelu by hand", lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)), "bn", invert=False),
    Case("tanhshrink", F.tanhshrink, "bn", invert=False),
    Case("softshrink", F.softshrink, "bn", invert=False),
    Case("sin times cos", lambda x: x.sin() * x.cos(), "bn", invert=False),
    Case("masked by hand", lambda x: x * (x > 0).double(), "bn", invert=False),
    Case("alpha_dropout", lambda x: F.alpha_dropout(x, 0.4, True), "bn", invert=False),
    Case("gate of two halves", lambda x: x[:, :2] * x[:, 2:], "b4", invert=False),
    Case("swiglu", lambda x: F.silu(x[:, :2]) * x[:, 2:], "b4", invert=False),
    Case("glu", lambda x: F.glu(x, 1), "b4", invert=False),
    Case("gate of a sum", lambda x, w: (x @ w) * x.sum(), "bn nn", invert=False, vijp=False),
]

POOLING = [
    Case("avg_pool2d", lambda x: F.avg_pool2d(x, 2), "bn46", invert=False),
    Case("avg_pool2d, cropping", lambda x: F.avg_pool2d(x, (2, 3)), "bn58", invert=False),
    Case("avg_pool2d, padded", lambda x: F.avg_pool2d(x, 3, padding=1), "bn58", invert=False),
    Case("avg_pool2d, up to the border", lambda x: F.avg_pool2d(x, 2, 3, 1, True, False), "bn57", invert=False),
    Case("avg_pool2d, divided by 5", lambda x: F.avg_pool2d(x, 2, divisor_override=5), "bn46", invert=False),
    Case("avg_pool2d, overlapping", lambda x: F.avg_pool2d(x, 3, 2), "bn57", invert=False, vijp=False),
    Case("avg_pool2d of one image", lambda x: F.avg_pool2d(x, 2), "n46", invert=False),
    Case("avg_pool2d, channels last", lambda x: F.avg_pool2d(_channels_last(x), 2), "b346", invert=False),
    Case("avg_pool1d", lambda x: F.avg_pool1d(x, 2, padding=1), "bn6", invert=False),
    Case("avg_pool3d", lambda x: F.avg_pool3d(x, 2, padding=1), "bn446", invert=False),
    Case("adaptive_avg_pool2d", lambda x: F.adaptive_avg_pool2d(x, (2, 3)), "bn46", invert=False),
    Case("adaptive_avg_pool2d, overlapping", lambda x: F.adaptive_avg_pool2d(x, 3), "bn56", False, False),
    Case("adaptive_avg_pool3d", lambda x: F.adaptive_avg_pool3d(x, 2), "bn446", invert=False),
    Case("max_pool2d", lambda x: F.max_pool2d(x, 2), "bn46", invert=False),
    Case("max_pool2d, padded", lambda x: F.max_pool2d(x, 3, 3, 1, ceil_mode=True), "bn58", invert=False),
    Case("max_pool2d, overlapping", lambda x: F.max_pool2d(x, 3, 2, 1), "bn78", invert=False),
    Case("max_pool2d, dilated", lambda x: F.max_pool2d(x, 2, 2, 0, dilation=2), "bn78", invert=False),
    Case("max_pool2d, channels last", lambda x: F.max_pool2d(_channels_last(x), 3, 2), "b378", invert=False),
    Case("max_pool1d", lambda x: F.max_pool1d(x, 3, 1), "bn8", invert=False),
    Case("max_pool3d", lambda x: F.max_pool3d(x, 2), "bn446", invert=False),
    Case("max_pool3d, overlapping", lambda x: F.max_pool3d(x, 3, 1, 1), "b2335", invert=False),
    Case("adaptive_max_pool2d", lambda x: F.adaptive_max_pool2d(x, 2), "bn46", invert=False),
    Case("adaptive_max_pool2d, overlapping", lambda x: F.adaptive_max_pool2d(x, 3), "bn57", invert=False),
    Case("adaptive_max_pool3d", lambda x: F.adaptive_max_pool3d(x, 2), "bn446", invert=False),
]

SHAPE = [
    Case("view", lambda x: x.view(-1) * 2, "bn"),
    Case("_unsafe_view", lambda x, w: x @ w, "bkn nn"),
    Case("squeeze", lambda x: x.squeeze(1) * 2, "b1n"),
    Case("unsqueeze", lambda x: x.unsqueeze(1) * 2, "bn"),
    Case("clone", lambda x: x.clone(), "bn"),
    Case("contiguous", lambda x: x.t().contiguous().view(-1) * 2, "bn"),
    Case("alias", lambda x: aten.alias(x) * 2, "bn"),
    Case("detach", lambda x: torch.cat([x[:, :2].detach(), x[:, 2:]], 1) * 2, "b4", vijp=False),
    Case("memory format", lambda x: x.to(memory_format=torch.channels_last), "bnkk"),
    Case("same dtype", lambda x: aten._to_copy(x, dtype=torch.float64), "bn"),
    Case("permute", lambda x: x.permute(2, 0, 1) * 2, "bnk"),
    Case("transpose", lambda x: x.transpose(0, -1) * 2, "bnk"),
    Case("t", lambda x: x.t() * 2, "bn"),
    Case("flip", lambda x: x.flip(0, -1), "bnk"),
    Case("roll", lambda x: x.roll((1, -2), (0, 1)), "bnk"),
    Case("roll flat", lambda x: x.roll(2), "bn"),
    Case("expand", lambda x: x.expand(5, -1, 3, -1).exp(), "b1n", vijp=False),
    Case("sum", lambda x: x.sum(1), "bn", invert=False),
    Case("sum of several", lambda x: x.sum((0, 2)), "bnk", invert=False),
    Case("mean of all", lambda x: x.mean(), "bn", invert=False),
    Case("cumsum", lambda x: x.cumsum(1), "bnk"),
    Case("cumsum of the last", lambda x: x.cumsum(-1), "bn"),
    Case("mean", lambda x: x.mean(0, keepdim=True), "bn", invert=False),
    Case("pixel_shuffle", lambda x: F.pixel_shuffle(x, 2), "b8nk"),
    Case("pixel_unshuffle", lambda x: F.pixel_unshuffle(x, 2), "bn46"),
    Case("repeat", lambda x: x.repeat(2, 1, 3), "bnk", vijp=False),
    Case("repeat along a new dimension", lambda x: x.repeat(2, 3, 1), "bn", vijp=False),
    Case("repeat never", lambda x: torch.cat([x, x.repeat(0, 1)]), "bn"),
    Case("pad", lambda x: F.pad(x, (1, 2, 0, 1)), "bnk", vijp=False),
    Case("crop", lambda x: F.pad(x, (-1, 0)), "bn", invert=False),
    *(
        Case(
            f"{mode} in {n} dimensions",
            lambda x, n=n, mode=mode: F.pad(x, (1, 2) * n, mode),
            "bn456"[: n + 2],
            True,
            False,
        )
        for mode in ("reflect", "replicate")
        for n in (1, 2, 3)
    ),
    Case("one slice", lambda x: x[:, 1:] * 2, "bn", invert=False),
    Case("one selection", lambda x: x[:, 1] * 2, "bn", invert=False),
    Case("cat", lambda x: torch.cat([x, x.exp()], 1), "bn", vijp=False),
    Case("cat of pieces", lambda x: torch.cat(x.split([1, 2, 1], 1)[::-1], 1), "b4"),
    Case("cat with a parameter", lambda x, p: torch.cat([x, p], 0), "bn mn", vijp=False),
    Case("split", lambda x: torch.cat(x.split(2, 0)[::-1]), "4n"),
    Case("unbind, stack", lambda x: torch.stack(x.unbind(1)[::-1], 0), "bn"),
    Case("an item nobody reads", lambda x: torch.cat(x.split(2, 1)[:1], 1), "b4", invert=False),
]

LINEAR = [
    Case("mm, square", lambda x, w: x @ w, "bn nn"),
    Case("mm from the left", lambda x, w: w @ x, "nb nn"),
    Case("mm, narrowing", lambda x, w: x @ w, "bn nm", invert=False),
    Case("mm, widening", lambda x, w: x @ w, "bn nw", vijp=False),
    Case("bmm", lambda x, w: torch.bmm(x, w), "kbn knn"),
    Case("addmm", F.linear, "bn nn n"),
    Case("addmm, widening", F.linear, "bn wn w", vijp=False),
    Case("addmm, scaled", lambda x, w, b: torch.addmm(b, x, w, alpha=2), "bn nn n", invert=False),
    Case("linear of three dimensions", F.linear, "bkn nn n"),
]


def _conv(**settings: object) -> object:
    return lambda x, w, b=None: F.conv2d(x, w, b, **settings)


def _conv1(**settings: object) -> object:
    return lambda x, w, b=None: F.conv1d(x, w, b, **settings)


def _conv3(**settings: object) -> object:
    return lambda x, w, b=None: F.conv3d(x, w, b, **settings)


def _transposed(**settings: object) -> object:
    return lambda x, w, b=None: F.conv_transpose2d(x, w, b, **settings)


def _transposed1(**settings: object) -> object:
    return lambda x, w, b=None: F.conv_transpose1d(x, w, b, **settings)


CONVOLUTION = [
    Case("convolution 1x1", _conv(), "bnkk nn11 n"),
    Case("convolution 1x1, narrowing", _conv(), "bnkk mn11", invert=False),
    Case("convolution 1x1, widening", _conv(), "bnkk wn11", vijp=False),
    Case("convolution 1x1, strided", _conv(stride=2), "bnww mn11 m", invert=False),
    Case("patchify, square", _conv(stride=2), "b246 8222 8"),
    Case("patchify, narrowing", _conv(stride=2), "b246 6222", invert=False),
    Case("patchify, widening", _conv(stride=2), "b246 9222", vijp=False),
    Case("patchify, cropping", _conv(stride=2), "b257 8222", invert=False),
    Case("patchify in one dimension", lambda x, w: F.conv1d(x, w, stride=3), "b26 623"),
    Case("channels last", lambda x, w: F.conv2d(x.to(memory_format=torch.channels_last), w, stride=2), "b246 8222"),
    Case("transposed", lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2), "b843 8222 2"),
    Case("transposed, narrowing", lambda x, w: F.conv_transpose2d(x, w, stride=2), "b943 9222", invert=False),
    Case("transposed, widening", lambda x, w: F.conv_transpose2d(x, w, stride=2), "b643 6222", vijp=False),
    Case("overlapping", _conv(padding=1), "b2kk 2233", invert=False),
    Case("padded 1x1", _conv(padding=1), "bnkk nn11", vijp=False),
    Case("padded 1x1, widening", _conv(padding=1), "bnkk wn11", vijp=False),
    Case("dilated", _conv(stride=2, dilation=2), "b266 8222", invert=False),
    Case("grouped", _conv(groups=2), "b4kk 4211"),
    Case("unbatched", _conv(), "nkk nn11"),
    Case("grouped, narrowing", _conv(groups=2), "b6kk 4311 4", invert=False),
    Case("grouped, widening", _conv(groups=2), "b4kk 6211 6", vijp=False),
    Case("depthwise", _conv(groups=4), "b4kk 4111 4"),
    Case("patchify, grouped", _conv(stride=2, groups=2), "b446 8222 8", invert=False),
    Case("patchify, padded", _conv(stride=2, padding=1), "b244 8222", vijp=False),
    Case("patchify, padded, a rest", _conv(stride=2, padding=1), "b255 8222", vijp=False),
    Case("patchify, padded, narrowing", _conv(stride=2, padding=1), "b244 2222 2", invert=False),
    Case("patchify, grouped in three dimensions", _conv3(stride=2, groups=2), "b2464 81222", invert=False),
    Case("transposed, grouped", _transposed(stride=2, groups=2), "b843 8222 4", vijp=False),
    Case("transposed, depthwise", _transposed(stride=2, groups=4), "b443 4122", vijp=False),
    Case("transposed, widening groups", _transposed(stride=2, groups=2), "b443 4222", vijp=False),
    Case("transposed, cropping", _transposed(stride=3, padding=1), "b243 2233", vijp=False),
    Case("transposed, in one dimension", _transposed1(stride=2), "b43 422"),
]

STRIDED = [
    Case("one tap", _conv(stride=2, padding=1), "b466 2433 2", invert=False),
    Case("one tap, odd sizes", _conv(stride=2, padding=1), "b457 2433", invert=False),
    Case("one tap, grouped", _conv(stride=2, padding=1, groups=2), "b866 4433", invert=False),
    Case("one tap of five", _conv(stride=3, padding=2), "b477 2455", invert=False),
    Case("several taps", _conv(stride=3, padding=1), "b299 6233", invert=False),
    Case("several taps, overlapping", _conv(stride=4, padding=1), "b2ww 4255", invert=False),
    Case("a kernel smaller than the stride", _conv(stride=3), "b255 6222", invert=False),
    Case("dilated taps", _conv(stride=3, dilation=2, padding=2), "b499 4433", invert=False),
    Case("one tap in one dimension", _conv1(stride=2, padding=1), "b48 243", invert=False),
    Case("one tap in three dimensions", _conv3(stride=2, padding=1), "b4646 24333", invert=False),
    Case("one tap, transposed", _transposed(stride=2, padding=1, output_padding=1), "b234 2433", vijp=False),
    Case("no tap of its own", _transposed(stride=2), "b934 9244", invert=False, vijp=False),
    Case("more channels than taps", _conv(stride=2), "b155 5122", invert=False, vijp=False),
]

FRAGMENTS = [
    Case("checkerboard", _conv(stride=2, padding=1), "b266 4233 4", invert=False),
    Case("checkerboard, odd sizes", _conv(stride=2, padding=1), "b257 2233", invert=False),
    Case("checkerboard, grouped", _conv(stride=2, padding=1, groups=2), "b466 4233", invert=False),
    Case("checkerboard, depthwise", _conv(stride=2, padding=1, groups=3), "b366 3133", invert=False),
    Case("checkerboard in three dimensions", _conv3(stride=2, padding=1), "b2445 22333", invert=False),
    Case("every second one", _conv1(stride=2, padding=1), "b29 324", invert=False),
    Case("one of four", _conv(stride=2, padding=1), "b266 4244 4", invert=False),
    Case("one of six", _conv(padding=1), "b2ww 2233", invert=False),
    Case("one of sixteen", _conv(stride=2, padding=3), "b199 6177", invert=False),
    Case("one of a dilated kernel", _conv(padding=2, dilation=2), "b277 2233", invert=False),
    Case("clusters", _conv(padding=1), "8299 2233 2", invert=False),
    Case("clusters, odd sizes", _conv(padding=1), "8297 2233", invert=False),
    Case("clusters that end at the border", _conv(), "8288 2233", invert=False),
    Case("clusters, strided", _conv(stride=2, padding=1), "9299 4244", invert=False),
    Case("clusters, grouped", _conv(padding=1, groups=2), "9499 4233", invert=False),
    Case("clusters, depthwise", _conv(padding=2, groups=3), "9399 3155", invert=False),
    Case("clusters in one dimension", _conv1(padding=1), "929 223", invert=False),
    Case("clusters in three dimensions", _conv3(padding=1), "91566 11333", invert=False),
    Case("more features than taps", _conv(stride=2), "b155 5122", vijp=False, invert=False),
]
ITERATED = [
    Case("transposed, overlapping", _transposed(stride=2, padding=1), "b234 2444 4", vijp=False),
    Case("transposed, overlapping, grouped", _transposed(stride=2, padding=1, groups=2), "b444 4244", vijp=False),
    Case("transposed, narrowing, overlapping", _transposed(padding=1), "b445 4233", invert=False),
    Case("overlapping, widening", _conv(padding=1), "b234 4233 4"),
    Case("overlapping in one dimension", _conv1(padding=2, dilation=2), "b27 423"),
    Case("overlapping, too narrow", _conv(padding=1), "b634 6633", invert=False),
    Case("overlapping, cropping", _conv(), "b255 4233", invert=False),
    Case("overlapping, strided", _conv(stride=2, padding=1), "b266 8233", invert=False),
]


def _padded(pads: tuple[int, ...], mode: str = "constant", **settings: object) -> object:
    return lambda x, w, b=None: _CONVOLVE[x.dim()](F.pad(x, pads, mode), w, b, **settings)


_CONVOLVE = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


def _by_hand(x: Tensor, w: Tensor) -> Tensor:
    return F.conv1d(torch.cat([x[..., -1:], x, torch.zeros_like(x[..., :1])], -1), w, stride=2)


def _transposed_and_cropped(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.conv_transpose1d(x, w, b, stride=2)[..., :-1]


PADDED = [
    Case("padded behind", _padded((0, 1, 0, 1), stride=2), "b466 2433 2", invert=False),
    Case("padded behind, odd sizes", _padded((0, 1, 0, 1), stride=2), "b457 2433", invert=False),
    Case("padded behind, grouped", _padded((0, 1, 0, 1), stride=2, groups=2), "b866 4433", invert=False),
    Case("padded behind, in three dimensions", _padded((0, 1) * 3, stride=2), "b4646 24333", invert=False),
    Case("padded behind, checkerboard", _padded((0, 1, 0, 1), stride=2), "b266 4233", invert=False),
    Case("padded twice", _padded((1, 0), stride=2, padding=1), "b48 243", invert=False),
    Case("padded far", _padded((2, 5), stride=2, dilation=2), "b48 243", invert=False),
    Case("padded and cropped", _padded((1, -2), stride=2), "b48 242", invert=False),
    Case("padded on both sides", _padded((1, 1), stride=2), "b48 243", invert=False),
    Case("padded with ones", lambda x, w: F.conv1d(F.pad(x, (1, 1), value=1.0), w), "b27 423", invert=False),
    Case("padded, clusters", _padded((0, 2, 1, 1)), "8299 2233", invert=False),
    Case("causal, narrowing", _padded((2, 0)), "b27 123", invert=False),
    Case("causal, widening", _padded((4, 0), dilation=2), "b27 423 4", vijp=False),
    Case("uneven, widening", _padded((1, 2)), "b27 424 4"),
    Case("patchify, padded by another", _padded((1, 1, 0, 2), stride=2), "b244 8222 8", vijp=False),
    Case("reflected", _padded((1, 1, 1, 1), "reflect", stride=2), "b466 2433 2", invert=False),
    Case("reflected, odd sizes", _padded((1, 1), "reflect", stride=2), "b47 243", invert=False),
    Case("reflected, fragments", _padded((1, 1, 1, 1), "reflect"), "8299 2233", invert=False),
    Case("replicated", _padded((0, 2), "replicate", stride=2), "b48 244", invert=False),
    Case("replicated before", _padded((1, 1), "replicate", stride=2), "b48 243", invert=False),
    Case("circular, strided", _padded((1, 1, 1, 1), "circular", stride=2), "b466 2433 2", invert=False),
    Case("circular, strided, by hand", _by_hand, "b48 243", invert=False),
    Case("patchify, reflected", _padded((1, 1), "reflect", stride=2), "b26 422", vijp=False),
    Case("transposed and cropped", lambda x, w: F.conv_transpose1d(x, w, stride=2)[..., :-1], "b25 223", vijp=False),
    Case(
        "transposed and cropped, fitting",
        lambda x, w: F.conv_transpose1d(x, w, stride=2)[..., 1:-1],
        "b45 423",
        False,
        False,
    ),
    Case("transposed and cropped, with bias", _transposed_and_cropped, "b25 223 2", vijp=False),
    Case("padded, some channels", lambda x, w: F.conv1d(torch.cat([x, x.exp()], 1), w), "b27 243", False, False),
    Case("padded, some samples", lambda x, w: F.conv1d(torch.cat([x, x.exp()]), w, stride=2), "b27 223", False, False),
    Case("transposed of padded", lambda x, w: F.conv_transpose1d(F.pad(x, (1, 1)), w), "b27 243", vijp=False),
]


def _circular(pads: tuple[int, ...], **settings: object) -> object:
    return _padded(pads, "circular", **settings)


CIRCULAR = [
    Case("circular", _circular((1, 1, 1, 1)), "b245 2233 2"),
    Case("circular in one dimension", _circular((1, 1)), "b36 333"),
    Case("circular in three dimensions", _circular((1, 1) * 3), "b2345 22333 2"),
    Case("circular to one side", _circular((3, 0, 0, 2)), "b245 2234"),
    Case("circular, dilated", _circular((2, 2), dilation=2), "b25 223"),
    Case("circular, grouped", _circular((1, 1, 1, 1), groups=2), "b445 4233"),
    Case("circular, depthwise", _circular((1, 1, 1, 1), groups=3), "b345 3133 3"),
    Case("circular, along one side", _circular((1, 1, 0, 0)), "b245 2213"),
    Case("circular, narrowing", _circular((1, 1, 1, 1)), "b645 2633", invert=False),
    Case("circular, widening", _circular((1, 1, 1, 1)), "b245 4233", vijp=False),
    Case("circular, all around", _circular((5, 1)), "b25 227"),
    Case("circular by hand", lambda x, w: F.conv1d(torch.cat([x[..., -1:], x, x[..., :1]], -1), w), "b25 223"),
    Case("circular, and zeros beyond", _circular((1, 1), padding=1), "b27 225", invert=False),
    Case("circular, strided", _circular((1, 1), stride=2), "b27 223", invert=False),
    Case("circular, too short", _circular((1, 0)), "b27 223", invert=False),
]


def _weighted(w: Tensor, *tap: int) -> Tensor:
    """With a heavy tap, so that substitution is stable."""
    rows, columns = w.shape[:2]
    heavy = torch.eye(columns, dtype=w.dtype).repeat(rows // columns, 1)
    return w + 2 * F.pad(heavy[(..., *[None] * len(tap))], _around(w, tap))


def _around(w: Tensor, tap: tuple[int, ...]) -> list[int]:
    sides = zip(reversed(tap), reversed(w.shape[2:]), strict=True)
    return [side for t, k in sides for side in (t % k, k - 1 - t % k)]


def _causal(pads: tuple[int, ...], *tap: int, **settings: object) -> object:
    convolve = _padded(pads, **settings)
    return lambda x, w, b=None: convolve(x, _weighted(w, *tap), b)


def _cut(side: slice, **settings: object) -> object:
    """Padded on both sides by the convolution, and cut."""
    return lambda x, w, b=None: F.conv1d(x, _weighted(w, -1 if side.stop else 0), b, **settings)[..., side]


TRIANGULAR = [
    Case("causal", _causal((2, 0), -1), "b29 223 2"),
    Case("causal, long", lambda x, w: F.conv1d(F.pad(x.flatten(2), (1, 0)), _weighted(w, -1)), "2399 332"),
    Case("anticausal", _causal((0, 2), 0), "b29 223"),
    Case("causal, dilated", _causal((6, 0), -1, dilation=3), "b28 223 2"),
    Case("causal, far", _causal((8, 0), -1, dilation=4), "b22 223"),
    Case("causal, grouped", _causal((2, 0), -1, groups=2), "b49 423 4"),
    Case("causal, depthwise", _causal((2, 0), -1, groups=3), "b39 313"),
    Case("causal, cut", _cut(slice(None, -2), padding=2), "b29 223 2"),
    Case("anticausal, cut", _cut(slice(2, None), padding=2), "b29 223 2"),
    Case("causal, dilated, cut", _cut(slice(None, -4), padding=4, dilation=2), "b29 223"),
    Case("causal along both sides", _causal((2, 0, 1, 0), -1, -1), "b256 2223"),
    Case("causal and anticausal", _causal((0, 2, 1, 0), -1, 0), "b256 2223 2"),
    Case("causal along one side", _causal((0, 0, 2, 0), -1, 0), "b256 2231"),
    Case("causal along one side, dilated", _causal((0, 0, 4, 0), -1, 0, dilation=(2, 1)), "b256 2231"),
    Case("causal in three dimensions", _causal((1, 0, 0, 1, 1, 0), -1, 0, -1), "b2345 22222"),
    Case("causal, transposed", lambda x, w: F.conv_transpose1d(x, _weighted(w, 0))[..., :-2], "b29 223"),
    Case("causal, strided", _causal((1, 0), -1, stride=2), "b28 222", invert=False),
    Case("causal, shifted", _causal((3, -1), -1), "b29 223", invert=False, vijp=False),
    Case("causal, padded with ones", lambda x, w: F.conv1d(F.pad(x, (2, 0), value=1.0), w), "b27 223", invert=False),
    Case("causal, one side of both", _causal((1, 1, 2, 0), -1, 1), "8266 2233", invert=False),
]


def _resized(mode: str, **settings: object) -> object:
    return lambda x: F.interpolate(x, mode=mode, **settings)


RESAMPLED = [
    Case("linear", _resized("linear", scale_factor=2), "bnw", vijp=False),
    Case("linear, corners aligned", _resized("linear", size=11, align_corners=True), "bnw", vijp=False),
    Case("linear to a size", _resized("linear", size=7), "bnk", vijp=False),
    Case("bilinear", _resized("bilinear", scale_factor=2), "bnwk", vijp=False),
    Case("bilinear, corners aligned", _resized("bilinear", size=(9, 6), align_corners=True), "bnwk", vijp=False),
    Case("bilinear, uneven", _resized("bilinear", scale_factor=(1.7, 1.3)), "bnww", vijp=False),
    Case("bilinear, along one side", _resized("bilinear", size=(9, 4)), "bnw4", vijp=False),
    Case(
        "bilinear, scale taken from sizes",
        _resized("bilinear", scale_factor=1.7, recompute_scale_factor=True),
        "bnww",
        vijp=False,
    ),
    Case(
        "bilinear, channels last",
        lambda x: F.interpolate(_channels_last(x), scale_factor=2, mode="bilinear"),
        "b346",
        vijp=False,
    ),
    Case(
        "bilinear, negated and halved",
        lambda x: -F.interpolate(x, scale_factor=2, mode="bilinear") / 2,
        "bnkk",
        vijp=False,
    ),
    Case("trilinear", _resized("trilinear", scale_factor=2), "bn345", vijp=False),
    Case("trilinear, corners aligned", _resized("trilinear", size=(5, 6, 7), align_corners=True), "bn345", vijp=False),
    Case("bicubic", _resized("bicubic", scale_factor=2), "bnww", vijp=False),
    Case("bicubic, corners aligned", _resized("bicubic", scale_factor=1.5, align_corners=True), "bnww", vijp=False),
    Case("bilinear, antialiased", _resized("bilinear", scale_factor=2, antialias=True), "bnwk", vijp=False),
    Case(
        "bicubic, antialiased", _resized("bicubic", size=(9, 7), antialias=True, align_corners=True), "bnww", vijp=False
    ),
    Case("nearest to an uneven size", _resized("nearest", size=(8, 7)), "bnww", vijp=False),
    Case("linear, shrinking", _resized("linear", scale_factor=0.5), "bn8", invert=False),
    Case("linear, shrinking, corners aligned", _resized("linear", size=4, align_corners=True), "bnw", invert=False),
    Case("bilinear, shrinking", _resized("bilinear", scale_factor=(0.5, 0.8)), "bn86", invert=False),
    Case("trilinear, shrinking", _resized("trilinear", size=(2, 3, 4)), "bn455", invert=False),
    Case("bicubic, shrinking", _resized("bicubic", scale_factor=(0.7, 0.9)), "bn98", invert=False),
    Case("bilinear, antialiased, shrinking", _resized("bilinear", size=(5, 3), antialias=True), "bn98", invert=False),
    Case("bicubic, antialiased, shrinking", _resized("bicubic", size=(5, 3), antialias=True), "bn98", invert=False),
    Case("nearest, shrinking", _resized("nearest", scale_factor=0.25), "bn89", invert=False),
    Case("bilinear, wider and lower", _resized("bilinear", size=(3, 9)), "bnww", invert=False, vijp=False),
    Case(
        "bilinear, and its image",
        lambda x: F.interpolate(x, size=x.shape[-2:], mode="bilinear") + x.exp(),
        "bnkk",
        invert=False,
        vijp=False,
    ),
    Case("bilinear by weights that are learned", lambda x, w: _between(x, w), "bnw 5", invert=False, vijp=False),
]


def _between(x: Tensor, w: Tensor) -> Tensor:
    """Gathers of neighbours, mixed by weights that are values."""
    index = torch.arange(5)
    first, second = (aten._unsafe_index(x, [None, None, i]) for i in (index, (index + 1).clamp(max=4)))
    return first + (second - first) * w


def _root_mean_square(x: Tensor, dims: tuple[int, ...], epsilon: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(dims, keepdim=True) + epsilon)


def _first_alone(results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The statistics are known as well, but nothing is differentiated through them."""
    return (results[0], *(statistic.detach() for statistic in results[1:]))


def _by_running_statistics(
    x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    return F.batch_norm(x, mean.detach(), variance.detach().abs(), weight, bias, training=False, eps=0.1)


def _functional(x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    running = mean.detach(), variance.detach()
    return _first_alone(aten._native_batch_norm_legit_functional(x, weight, bias, *running, True, 0.1, 1e-3)[:3])


def _batch(x: Tensor, *affine: Tensor, epsilon: float = 1e-5) -> Tensor:
    return F.batch_norm(x, None, None, *affine, training=True, eps=epsilon)


def _group(x: Tensor, *affine: Tensor) -> tuple[Tensor, ...]:
    batch, channels, *space = x.shape
    weight, bias = affine or (None, None)
    return torch.native_group_norm(x, weight, bias, batch, channels, math.prod(space), 2, 1e-3)


# Without its statistics no normalization says what its input was.
NORMALIZATION = [
    Case("batch_norm", _batch, "wnkk n n", invert=False),
    Case("batch_norm of vectors", _batch, "wn n n", invert=False),
    Case("batch_norm, not affine", _batch, "wnk", invert=False),
    Case("batch_norm, large epsilon", lambda x, w: _batch(x, w, epsilon=10.0), "wn3kk n", invert=False),
    Case("batch_norm, channels last", lambda x, w: _batch(x.to(memory_format=torch.channels_last), w), "wnkk n", False),
    Case(
        "batch_norm and its statistics",
        lambda x, w, b: _first_alone(aten._native_batch_norm_legit(x, w, b, True, 0.1, 1e-3)),
        "wnk n n",
    ),
    Case("batch_norm and running statistics", _functional, "wnkk n n n n"),
    Case("batch_norm, not training", _by_running_statistics, "bnkk n n n n"),
    Case("batch_norm, not training, not affine", _by_running_statistics, "bn n n"),
    Case("layer_norm", lambda x, w, b: F.layer_norm(x, w.shape, w, b), "bkn n n", invert=False),
    Case("layer_norm over two dimensions", lambda x, w, b: F.layer_norm(x, w.shape, w, b, 1.0), "bnw nw nw", False),
    Case("layer_norm, no bias", lambda x, w: F.layer_norm(x, w.shape, w), "bn n", invert=False),
    Case("layer_norm, not affine", lambda x: F.layer_norm(x, x.shape[-1:]), "bkn", invert=False),
    Case("layer_norm of one element", lambda x: F.layer_norm(x, (1,)), "bn1", invert=False),
    Case(
        "layer_norm and its statistics",
        lambda x, w, b: _first_alone(torch.native_layer_norm(x, w.shape, w, b, 1e-3)),
        "bkn n n",
    ),
    Case("group_norm", lambda x, *affine: _group(x, *affine)[0], "b4kk 4 4", invert=False),
    Case("group_norm, not affine", lambda x: _group(x)[0], "b6", invert=False),
    Case(
        "group_norm, channels last",
        lambda x, *affine: _group(x.to(memory_format=torch.channels_last), *affine)[0],
        "b6kk 6 6",
        False,
    ),
    Case("group_norm and its statistics", lambda x, *affine: _first_alone(_group(x, *affine)), "b6k 6 6"),
    Case("instance_norm", lambda x, w, b: F.instance_norm(x, weight=w, bias=b), "bnw n n", invert=False),
    Case("rms_norm", lambda x, w: F.rms_norm(x, w.shape, w, 1e-3), "bkn n", invert=False),
    Case("rms_norm over two dimensions", lambda x, w: F.rms_norm(x, w.shape, w, 1.0), "bnw nw", invert=False),
    Case("rms_norm spelled out", lambda x, w: w * _root_mean_square(x, (-1,), 1e-3), "bkn n", invert=False),
    Case("rms_norm over the first", lambda x: _root_mean_square(x, (0, 1), 1.0), "bnk", invert=False),
    Case("rms_norm of x times x", lambda x: x * (x * x).mean(1, keepdim=True).add(1).rsqrt(), "bnk", invert=False),
    Case(
        "rms_norm beside others", lambda x, p: torch.cat([_root_mean_square(x, (1,), 1), x + p], 1), "bn n", vijp=False
    ),
    Case("a norm that sums", lambda x: x * x.square().sum(1, keepdim=True).add(1).rsqrt(), "bn", False, False),
    Case("normalize", F.normalize, "bn", invert=False),
    Case("normalize the first dimension", lambda x: F.normalize(x, dim=0), "wnk", invert=False),
    Case("normalize, clamped for some", lambda x: F.normalize(x, eps=1.5), "wn", invert=False),
    Case("normalize by another norm", lambda x: F.normalize(x, p=3), "bn", False, False),
    Case("log_softmax", lambda x: F.log_softmax(x, -1), "bkn", invert=False),
    Case("softmax", lambda x: F.softmax(x, 1), "bnk", invert=False),
    Case("attention by given probabilities", lambda p, v: torch.bmm(p, v), "bkw bwm", invert=False),
    Case("linear and layer_norm", lambda x, w: F.layer_norm((x @ w).abs(), w.shape[1:]) @ w, "bkn nn", invert=False),
]

REFUSED = [
    Case("leaky_relu falling", lambda x: F.leaky_relu(x, -0.2), "bn", invert=False, vijp=False),
    Case("leaky_relu flat", lambda x: F.leaky_relu(x, 0.0), "bn", invert=False, vijp=False),
    Case("mul by zero", lambda x: x * 0, "bn", invert=False, vijp=False),
    Case("the broadcast side", lambda x, b: x + b, "1n wn", invert=False, vijp=False),
    Case("to lower precision", lambda x: x.float(), "bn", invert=False, vijp=False),
    Case("to higher precision", lambda x: x.float().double(), "bn", invert=False, vijp=False),
    Case("a view of the bits", lambda x: x + x.detach().view(torch.int64).abs().clamp(max=1), "bn", invert=False),
    # Its derivative is zero everywhere: the fragment is all of the cotangent.
    Case("rounding", lambda x: torch.div(x, 2, rounding_mode="floor") + 0 * x, "bn", invert=False),
    Case("overlapping slices", lambda x: torch.cat([x[:, :3], x[:, 2:]], 1), "b6", invert=False, vijp=False),
    Case("a hole", lambda x: torch.cat([x[:, :2], x[:, 3:]], 1), "b6", invert=False),
    Case("cylindrical", lambda x, w: F.conv2d(F.pad(_circular_rows(x), (1, 1)), w), "b255 2233", invert=False),
    Case("gather", lambda x: x.gather(1, torch.zeros_like(x, dtype=torch.int64)), "bn", invert=False, vijp=False),
]


def _circular_rows(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 1, 1), mode="circular")


def _maxmin_of_three(x: Tensor) -> Tensor:
    a, b, c = x.chunk(3, 1)
    return torch.cat([torch.maximum(a, b), torch.minimum(b, c)], 1)


def _maxmin(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], -1)


def _maxmin_turned(x: Tensor) -> Tensor:
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([torch.min(b, a), torch.max(a, b)], -1).flatten(-2)


def _sort_pairs(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, 2)).sort(dim=-1).values.flatten(-2)


def _half(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.gelu(F.layer_norm(x, x.shape[-1:]) @ up) @ down


def _additive(x: Tensor, *weights: Tensor) -> Tensor:
    for up, down in zip(weights[::2], weights[1::2], strict=True):
        a, b = x.chunk(2, -1)
        b = b + _half(a, up, down)
        x = torch.cat([b, a], -1)
    return x


def _additive_slices(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    a, b = x[..., :4], x[..., 4:]
    b = b + _half(a, up, down)
    a = a + _half(b, up, down)
    return torch.cat([a, b], -1)


def _additive_interleaved(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    a, b = x[..., ::2], x[..., 1::2]
    a = a + _half(b, up, down)
    return torch.stack([a, b], -1).flatten(-2)


def _affine(x: Tensor, s: Tensor, t: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    b = b * torch.exp(torch.tanh(a @ s)) + a @ t
    a = a * torch.exp(torch.tanh(b @ s)) + b @ t
    return torch.cat([a, b], -1)


def _leapfrog(x: Tensor, w: Tensor) -> Tensor:
    q, p = x.unbind(0)
    for _ in range(3):
        p = p - 0.1 * torch.tanh(q @ w) @ w.t()
        q = q + 0.1 * p
    return torch.stack([q, p])


def _momentum(x: Tensor, w: Tensor) -> Tensor:
    x, v = x.chunk(2, -1)
    for _ in range(3):
        v = 0.9 * v + 0.1 * torch.tanh(x @ w)
        x = x + v
    return torch.cat([x, v], -1)


def _space_to_depth(x: Tensor) -> Tensor:
    return torch.cat([x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], 1)


COMPOSITE = [
    Case("additive coupling", _additive, "b8 46 64 46 64"),
    Case("additive coupling of slices", _additive_slices, "bk8 46 64"),
    Case("additive coupling, interleaved", _additive_interleaved, "b8 46 64"),
    Case("affine coupling", _affine, "b8 44 44"),
    Case("leapfrog", _leapfrog, "2bn nn"),
    Case("momentum", _momentum, "b8 44"),
    Case("space to depth", _space_to_depth, "bn46"),
    Case("slices and selections", lambda x: torch.cat([x[:, 3:], x[:, :2], x[:, 2, None]], 1) * 2, "b6"),
    Case("linear and abs", lambda x, w: (x @ w).abs() @ w, "bn nn", invert=False),
    Case("linear and leaky_relu", lambda x, w: F.leaky_relu(x @ w, 0.5) @ w, "bn nn"),
    Case("linear and maxmin", lambda x, w: _maxmin(_maxmin(x @ w) @ w), "b4 44", invert=False),
    Case("linear and maxmin, turned", lambda x, w: _maxmin_turned(x @ w), "bk4 44", invert=False),
    Case("linear and sorted pairs", lambda x, w: _sort_pairs(_sort_pairs(x @ w) @ w), "b4 44", invert=False),
    Case("sort", lambda x: x.sort(dim=0, descending=True, stable=True).values, "bn", invert=False),
    Case("nested", lambda x, u, d, w: F.leaky_relu(_additive(x, u, d) @ w, 0.3).sinh(), "b8 46 64 88"),
]


def _twice(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    for _ in range(2):
        x = x + 0.3 * F.gelu(x @ up) @ down
    return x


# Where a branch does not contract, the certificate says so (tests/test_contractions.py); nothing is refused here but
# branches that hardly ever do.
CONTRACTIONS = [
    Case("residual", lambda x, w: x + 0.3 * torch.tanh(x @ w), "bn nn"),
    Case("residual, subtracted", lambda x, w, b: x + F.linear(F.relu(x), w, b).neg() * 0.3, "bkn nn n"),
    Case("residual with an option", lambda x, w: x + 0.2 * F.gelu(x @ w, approximate="tanh"), "bn nn"),
    Case("residual, the other way", lambda x, w: x - 0.3 * torch.tanh(x @ w), "bn nn"),
    Case("residual with alpha", lambda x, w: torch.add(x, torch.tanh(x @ w), alpha=0.3), "bn nn"),
    Case("residual of two layers", lambda x, u, d: x + 0.3 * F.gelu(x @ u) @ d, "bn nw wn"),
    Case("residual, twice", _twice, "bn nw wn"),
    Case("residual of images", lambda x, w: x + 0.05 * F.conv2d(F.elu(x), w, padding=1).sin(), "b345 3333"),
    Case("residual of a gate", lambda x, u, w: x + 0.2 * F.silu(x @ u) * torch.tanh(x @ w), "bn nn nn"),
    Case("residual beside another", lambda x, u, w: x + 0.2 * torch.tanh(x @ u) + 0.2 * (x @ w).sin(), "bn nn nn"),
    Case("residual, normalized weight", lambda x, w: x + torch.tanh(x @ (w * (0.3 / w.norm()))), "bn nn"),
    Case("residual in slices", lambda x, w: x + 0.3 * torch.cat([x[:, 2:].tanh(), x[:, :2] @ w], 1), "b4 22"),
    Case("residual of a norm", lambda x, w: x + 0.3 * F.layer_norm(x @ w, x.shape[1:]), "bn nn", False, False),
    Case("residual of a softmax", lambda x, w: x + 0.3 * F.softmax(x @ w, -1), "bn nn", False, False),
]

# What a CPU never runs in one operation; tested in test_normalization.py.
ON_OTHER_DEVICES = {"_fused_rms_norm", "_fused_rms_norm_backward"}

CASES = [
    *POINTWISE,
    *ERASING,
    *COMPOSED,
    *POOLING,
    *SHAPE,
    *LINEAR,
    *CONVOLUTION,
    *STRIDED,
    *FRAGMENTS,
    *ITERATED,
    *PADDED,
    *CIRCULAR,
    *TRIANGULAR,
    *RESAMPLED,
    *NORMALIZATION,
    *REFUSED,
    *COMPOSITE,
    *CONTRACTIONS,
]
