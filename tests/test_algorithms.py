"""All ways to the gradient agree with backpropagation in double precision, or refuse."""

import gc
import math
import weakref
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moonwalk_compile import OptionError, UsageError
from moonwalk_compile.algorithms import (
    ALGORITHMS,
    backprop,
    chain_of,
    checkpointed_backprop,
    forward_mode,
    moonwalk_mixed,
    moonwalk_pure_forward,
    projected_forward,
    rev_backprop,
)
from moonwalk_compile.algorithms.chain import fingerprint
from moonwalk_compile.algorithms.links import links_of
from moonwalk_compile.algorithms.moonwalk import Choice, choose_spine
from moonwalk_compile.measure import gradient_error, measure_step

EXACT = {name: algorithm for name, algorithm in ALGORITHMS.items() if algorithm is not projected_forward}
REVERSE_FREE = ("moonwalk_pure_forward", "moonwalk_mixed")


class Coupling(nn.Module):
    """y1 = x1 + F(x2); y2 = x2 + G(y1); F and G are convolution, norm, activation."""

    def __init__(self, channels, norm=nn.Identity, activation=nn.ReLU):
        super().__init__()
        half = channels // 2
        self.f, self.g = (
            nn.Sequential(nn.Conv2d(half, half, 3, padding=1), norm(half), activation()) for _ in range(2)
        )

    def forward(self, x):
        x1, x2 = x.chunk(2, dim=1)
        y1 = x1 + self.f(x2)
        y2 = x2 + self.g(y1)
        return torch.cat([y1, y2], dim=1)


class Abs(nn.Module):
    def forward(self, x):
        return x.abs()


class Scale(nn.Module):
    """Has a parameter that nothing reads, a frozen one, and a buffer."""

    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(width))
        self.unused = nn.Parameter(torch.ones(2))
        self.shift = nn.Parameter(torch.randn(width), requires_grad=False)
        self.register_buffer("gain", torch.rand(width) + 1)

    def forward(self, x):
        return x * self.scale.exp() * self.gain + self.shift


class Drifting(nn.Module):
    """Reads a buffer that it overwrites."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("factor", torch.ones(width))

    def forward(self, x):
        self.factor.mul_(1.5)
        return x * self.factor


def orthogonal(width, out=None):
    layer = nn.Linear(width, out or width)
    nn.init.orthogonal_(layer.weight)
    return layer


def mlp(*activations, width=6):
    return nn.Sequential(*(module for activation in activations for module in (orthogonal(width), activation)))


def revnet(blocks=3, channels=4, **options):
    return nn.Sequential(*(Coupling(channels, **options) for _ in range(blocks)))


def twice():
    layer = orthogonal(6)
    return nn.Sequential(layer, nn.LeakyReLU(0.5), layer)


def group_norm(channels):
    return nn.GroupNorm(1, channels)


FLAT, IMAGE = (5, 6), (2, 4, 5, 5)
INVERTIBLE = {
    "leaky relu": (lambda: mlp(*(nn.LeakyReLU(0.5) for _ in range(4))), FLAT),
    "tanh": (lambda: mlp(*(nn.Tanh() for _ in range(3))), FLAT),
    "revnet": (revnet, IMAGE),
    "revnet, group norm": (lambda: revnet(norm=group_norm, activation=nn.Tanh), IMAGE),
    "revnet, batch norm": (lambda: revnet(norm=nn.BatchNorm2d), IMAGE),
    "in place": (lambda: mlp(nn.LeakyReLU(0.5, inplace=True), nn.LeakyReLU(0.2)), FLAT),
    "views": (lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Flatten(), nn.Identity(), orthogonal(6)), FLAT),
    "a layer twice": (twice, FLAT),
    "frozen, unused, buffer": (lambda: nn.Sequential(orthogonal(6), Scale(6), nn.LeakyReLU(0.5)), FLAT),
    "a buffer that is read and overwritten": (lambda: nn.Sequential(orthogonal(6), Drifting(6)), FLAT),
    "nested": (lambda: nn.Sequential(mlp(nn.Tanh()), nn.Sequential(), mlp(nn.LeakyReLU(0.5))), FLAT),
    "no layers": (nn.Sequential, FLAT),
}
SURJECTIVE = {
    "abs": (lambda: mlp(Abs(), Abs(), nn.LeakyReLU(0.5)), FLAT),
    "narrowing": (lambda: nn.Sequential(orthogonal(6, 4), nn.LeakyReLU(0.5), orthogonal(4, 2)), FLAT),
    "classifier": (lambda: nn.Sequential(*revnet(2), nn.Flatten(), nn.Linear(100, 3)), IMAGE),
}
OTHER = {
    "mixed": (lambda: nn.Sequential(Coupling(4, group_norm), Abs(), Coupling(4, group_norm), Abs()), IMAGE),
    "one module": (lambda: Coupling(4), IMAGE),
    "dropout": (lambda: nn.Sequential(mlp(nn.Dropout(0.5), nn.Tanh()), orthogonal(6), nn.Dropout(0.5)), FLAT),
}
CASES = {**INVERTIBLE, **SURJECTIVE, **OTHER}


@cache
def prepared(name):
    """Runs an algorithm on a model in double precision, from one state; the programs of its layers are found once."""
    torch.manual_seed(0)
    build, shape = CASES[name]
    model = build().double()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(shape, dtype=torch.float64)
    batch = (x, torch.randn_like(model(x)))

    def run(algorithm, **options):
        model.load_state_dict(state)
        torch.manual_seed(1)
        loss, gradients = algorithm(model, F.mse_loss, (x.clone(), batch[1]), **options)
        return loss, gradients, {name: value.clone() for name, value in model.state_dict().items()}

    return run


def assert_agrees(run, algorithm, **options):
    loss, gradients, after = run(algorithm, **options)
    true_loss, true_gradients, true_after = run(backprop)
    torch.testing.assert_close(loss, true_loss)
    assert not loss.requires_grad
    assert list(gradients) == list(true_gradients)
    assert not any(gradient.requires_grad for gradient in gradients.values())
    assert gradient_error(gradients, true_gradients) < 1e-10
    torch.testing.assert_close(after, true_after)  # running statistics moved once


@pytest.mark.parametrize("case", INVERTIBLE)
@pytest.mark.parametrize("name", EXACT)
def test_agrees_with_backprop(name, case):
    run = prepared(case)
    assert_agrees(run, EXACT[name])


@pytest.mark.parametrize("case", SURJECTIVE)
@pytest.mark.parametrize("name", EXACT)
def test_what_only_has_surjective_jacobians(name, case):
    run = prepared(case)
    if name == "rev_backprop":
        with pytest.raises(UsageError, match="cannot be inverted"):
            run(rev_backprop)
        assert_agrees(run, rev_backprop, keep=True)
    else:
        assert_agrees(run, EXACT[name])


@pytest.mark.parametrize("case", ["tanh", "revnet, batch norm", "frozen, unused, buffer", *SURJECTIVE])
def test_the_spine_by_residuals(case):
    run = prepared(case)
    assert_agrees(run, moonwalk_mixed, spine="residuals")


@pytest.mark.parametrize("case", ["leaky relu", "revnet", "in place", "a buffer that is read and overwritten"])
def test_the_spine_by_inversion(case):
    run = prepared(case)
    assert_agrees(run, moonwalk_mixed, spine="invert")


def test_the_spine_keeps_what_is_light_and_inverts_the_rest():
    """Behind a layer that cannot be inverted, inversion begins anew from a kept output."""
    heavy, light = Choice(inverts=True), Choice(inverts=False)
    layers = [Coupling(4, group_norm), nn.LeakyReLU(0.5), Coupling(4), Abs(), Coupling(4, group_norm)]
    links = links_of(nn.Sequential(*layers), torch.randn(IMAGE), "test", ("sweep",))
    assert choose_spine(links, "auto") == [Choice(True, keeps_output=True), light, light, light, heavy]
    assert choose_spine(links, "residuals") == [light] * 5
    run = prepared("mixed")
    assert_agrees(run, moonwalk_mixed)


@pytest.mark.parametrize("case", ["revnet, batch norm", "classifier", "a layer twice"])
def test_forward_mode_by_layers(case):
    run = prepared(case)
    assert_agrees(run, forward_mode, per="layer", chunk_size=7)


def test_an_arbitrary_module_is_one_layer():
    run = prepared("one module")
    for name in EXACT:
        assert_agrees(run, EXACT[name])


@pytest.mark.parametrize("name", ["checkpointed_backprop", "forward_mode"])
def test_dropout_draws_the_same_again(name):
    run = prepared("dropout")
    options = [{"segments": 3}, {}] if name == "checkpointed_backprop" else [{"per": "layer", "chunk_size": 5}, {}]
    for option in options:
        assert_agrees(run, EXACT[name], **option)


# -- refusals ----------------------------------------------------------------------------------------------------------

REFUSED = {
    "relu": (nn.ReLU(), "threshold_backward for its cotangent"),
    "gelu": (nn.GELU(), "gelu_backward for its cotangent"),
    "widening": (nn.Linear(6, 8), "mm for its cotangent"),
    "dropout": (nn.Dropout(0.5), "draws random numbers"),
    "not one tensor": (nn.LSTM(6, 6), "returns a tuple"),
}


@pytest.mark.parametrize("name", REVERSE_FREE)
@pytest.mark.parametrize("case", REFUSED)
def test_moonwalk_refuses_and_names_the_layer(name, case):
    layer, reason = REFUSED[case]
    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(layer))
    with pytest.raises(UsageError, match=rf"layer '1\.0' \({type(layer).__name__}\).*{reason}"):
        ALGORITHMS[name](model, F.mse_loss, (torch.randn(5, 6), torch.randn(5, 6)))


def test_inversion_refuses_and_names_the_layer():
    model = nn.Sequential(nn.Linear(6, 6), Abs())
    batch = (torch.randn(5, 6), torch.randn(5, 6))
    for algorithm, options in ((rev_backprop, {}), (moonwalk_mixed, {"spine": "invert"})):
        with pytest.raises(UsageError, match=r"layer '1' \(Abs\): cannot be inverted: no rule solves abs"):
            algorithm(model, F.mse_loss, batch, **options)


@pytest.mark.parametrize("name", ["rev_backprop", *REVERSE_FREE])
def test_integers_have_no_cotangent(name):
    model = nn.Sequential(nn.Embedding(4, 6), nn.Tanh())
    with pytest.raises(UsageError, match="cotangent of the input"):
        ALGORITHMS[name](model, F.mse_loss, (torch.randint(4, (5,)), torch.randn(5, 6)))
    x = (torch.randint(4, (5,)), torch.randn(5, 6))
    assert gradient_error(checkpointed_backprop(model, F.mse_loss, x)[1], backprop(model, F.mse_loss, x)[1]) < 1e-6


@pytest.mark.parametrize("name", ["rev_backprop", *REVERSE_FREE])
def test_what_is_not_accurate_is_refused(name):
    """A small slope costs more digits than single precision has, and fewer than double precision has."""
    torch.manual_seed(0)
    model = mlp(*(nn.LeakyReLU(1e-2) for _ in range(6)), width=8)
    batch = (torch.randn(16, 8), torch.randn(16, 8))
    with pytest.raises(UsageError, match="not accurate enough"):
        ALGORITHMS[name](model, F.mse_loss, batch)
    double, batch = model.double(), tuple(item.double() for item in batch)
    found, true = (algorithm(double, F.mse_loss, batch)[1] for algorithm in (ALGORITHMS[name], backprop))
    assert gradient_error(found, true) < 1e-6


def test_a_singular_layer_gives_no_gradients():
    model = mlp(nn.LeakyReLU(0.5), nn.LeakyReLU(0.5))
    with torch.no_grad():
        model[2].weight[0] = 0
    for algorithm in (rev_backprop, moonwalk_mixed, moonwalk_pure_forward):
        with pytest.raises(UsageError, match="not accurate enough"):
            algorithm(model, F.mse_loss, (torch.randn(5, 6), torch.randn(5, 6)))


@pytest.mark.parametrize("name", ["rev_backprop", *REVERSE_FREE])
def test_inputs_of_any_layout(name):
    """Expanded, transposed and cut inputs are taken as they are, and left so."""
    torch.manual_seed(0)
    model = revnet(1).double()
    dense = torch.randn(IMAGE, dtype=torch.float64)
    inputs = [dense[:1].expand(IMAGE), dense.transpose(2, 3), torch.cat([dense, dense], 3)[..., 2:7]]
    inputs.append(dense.to(memory_format=torch.channels_last))
    for x in inputs:
        batch = (x, torch.randn_like(dense))
        found, true = (algorithm(model, F.mse_loss, batch)[1] for algorithm in (ALGORITHMS[name], backprop))
        assert gradient_error(found, true) < 1e-10


def test_an_input_that_is_overwritten():
    model = nn.Sequential(nn.LeakyReLU(0.5, inplace=True), orthogonal(6))
    for algorithm in (checkpointed_backprop, forward_mode, projected_forward, moonwalk_pure_forward):
        with pytest.raises(UsageError, match=r"in.place"):
            algorithm(model, F.mse_loss, (torch.randn(5, 6), torch.randn(5, 6)))


def test_options():
    model, batch = mlp(nn.Tanh()), (torch.randn(5, 6), torch.randn(5, 6))
    wrong = [
        (moonwalk_mixed, {"spine": "backbone"}),
        (forward_mode, {"per": "model"}),
        (forward_mode, {"chunk_size": 0}),
        (projected_forward, {"directions": 0}),
        (checkpointed_backprop, {"segments": 0}),
    ]
    for algorithm, options in wrong:
        with pytest.raises(OptionError):
            algorithm(model, F.mse_loss, batch, **options)
    with pytest.raises(UsageError, match="scalar"):
        backprop(model, lambda y, target: y - target, batch)
    with torch.autocast("cpu"), pytest.raises(UsageError, match="autocast"):
        moonwalk_mixed(model, F.mse_loss, batch)


# -- random directions -------------------------------------------------------------------------------------------------


def test_random_directions_are_unbiased():
    """Of K normal directions, (g_K - g).g / |g|^2 has variance 2 / K, and |g_K - g|^2 / |g|^2 has mean (n + 1) / K."""
    run = prepared("leaky relu")
    _, true, _ = run(backprop)
    count = 20_000
    generator = torch.Generator().manual_seed(0)
    _, found, _ = run(projected_forward, directions=count, chunk_size=1000, generator=generator)
    g, estimate = (torch.cat([item.flatten() for item in gradients.values()]) for gradients in (true, found))
    along = float((estimate - g) @ g / (g @ g))
    squared = float((estimate - g).square().sum() / (g @ g))
    assert abs(along) < 4 * (2 / count) ** 0.5
    assert 0.5 < squared * count / (g.numel() + 1) < 2


def test_one_direction_is_the_directional_derivative():
    run = prepared("revnet")
    _, true, _ = run(backprop)
    _, found, _ = run(projected_forward, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    drawn = {name: torch.randn((1, *g.shape), dtype=g.dtype, generator=generator)[0] for name, g in true.items()}
    slope = sum((true[name] * direction).sum() for name, direction in drawn.items())
    torch.testing.assert_close(found, {name: slope * direction for name, direction in drawn.items()})


# -- memory and programs -----------------------------------------------------------------------------------------------


def beyond_gradients(blocks, algorithms):
    """The peak of a step of each, without the gradients, in activations."""
    torch.manual_seed(0)
    model = revnet(blocks, 8, norm=group_norm)
    x = torch.randn(4, 8, 8, 8)
    batch = (x, torch.randn_like(x))
    peaks = []
    for algorithm in algorithms:
        algorithm(model, F.mse_loss, batch)
        step = measure_step(partial(algorithm, model, F.mse_loss, batch))
        peaks.append((step.peak_bytes - sum(p.nbytes for p in model.parameters())) / x.nbytes)
    return peaks


def test_the_peak_of_moonwalk_does_not_grow_with_depth():
    algorithms = (moonwalk_mixed, rev_backprop, backprop)
    deep, flat = beyond_gradients(12, algorithms), beyond_gradients(3, algorithms)
    grown = [a - b for a, b in zip(deep, flat, strict=True)]
    assert abs(grown[0]) < 0.1
    assert abs(grown[1]) < 0.1
    assert grown[2] > 20


@pytest.mark.parametrize(
    "layer, bits", [(Abs(), 1), (nn.LeakyReLU(0.2), 1), (nn.Linear(32, 32), 0), (nn.Flatten(), 0), (nn.Tanh(), 32)]
)
def test_residuals_take_a_bit_per_element_or_none(layer, bits):
    x = torch.randn(64, 32)
    (link,) = links_of(layer, x, "test", ("spine",))
    assert link.step.residual_bytes == x.numel() * bits / 8


def test_residuals_of_a_convolution_are_those_of_its_activation():
    """The gradient by a convolution's input reads no activation, though one operation also gives that of its weight."""
    x = torch.randn(IMAGE)
    (link,) = links_of(Coupling(4), x, "test", ("spine",))
    assert link.step.residual_bytes == 2 * math.ceil(x.numel() / 2 / 8)


def test_equal_layers_share_their_programs():
    model = revnet(5)
    links = links_of(model, torch.randn(IMAGE), "test", ("forward", "sweep"))
    assert len({id(link.step) for link in links}) == 1
    again = links_of(model, torch.randn(IMAGE), "test", ("sweep",))
    assert again[0].step is links[0].step
    model[2].f[2] = nn.LeakyReLU(0.2)
    links = links_of(model, torch.randn(IMAGE), "test", ("sweep",))
    assert [link.step is links[0].step for link in links] == [True, True, False, True, True]


def test_what_changes_a_layer_changes_its_fingerprint():
    def tied():
        layer = nn.Linear(4, 4)
        return nn.ModuleList([layer, layer])

    class Noted(nn.Linear):
        note: object = None

    def noted(note):
        layer = Noted(4, 4)
        layer.note = note
        return layer

    distinct = [
        nn.Linear(4, 4),
        nn.Linear(4, 4, bias=False),
        nn.Linear(4, 4).double(),
        nn.Linear(4, 4).eval(),
        nn.Linear(4, 4).requires_grad_(False),
        nn.LeakyReLU(0.1),
        nn.LeakyReLU(0.2),
        nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]),
        tied(),
        noted(1),
        noted([1, {"a": 2.0}]),
        noted(F.relu),
    ]
    found = [fingerprint(module) for module in distinct]
    assert None not in found
    assert len(set(found)) == len(found)
    assert fingerprint(nn.Linear(4, 4)) == fingerprint(nn.Linear(4, 4))
    for unknown in (object(), torch.ones(2), lambda x: found, nn.Linear(2, 2).forward):
        assert fingerprint(noted(unknown)) is None
    hooked = nn.Linear(4, 4)
    hooked.register_forward_hook(lambda *_: None)
    assert fingerprint(hooked) is None


def test_programs_die_with_their_model():
    model = mlp(nn.Tanh())
    moonwalk_mixed(model, F.mse_loss, (torch.randn(5, 6), torch.randn(5, 6)))
    watch = weakref.ref(model)
    del model
    gc.collect()
    assert watch() is None


def test_a_hook_keeps_a_sequential_whole():
    model = nn.Sequential(nn.Sequential(nn.Tanh(), nn.Tanh()), nn.Tanh())
    assert [layer.name for layer in chain_of(model)] == ["0.0", "0.1", "1"]
    model[0].register_forward_hook(lambda module, args, output: 2 * output)
    assert [layer.name for layer in chain_of(model)] == ["0", "1"]
    x = torch.randn(5, 6)
    true = backprop(model, F.mse_loss, (x, x))[0]
    torch.testing.assert_close(moonwalk_mixed(model, F.mse_loss, (x, x))[0], true)
