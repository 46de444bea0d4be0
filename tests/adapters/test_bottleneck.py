import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rfkernels.adapters.base import run
from rfkernels.adapters.bottleneck import Bottleneck, BottleneckStack, ConformerAdapter, ast_adapters
from tests.adapters.layers import Running, check_round_trip, close, layer, randn

WIDTH, HIDDEN, RANK = 12, 20, 3
ADAPTFORMER, AST = ("down_proj", "up_proj"), ("linear_downsample", "linear_upsample")
ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}


def tensors(names=ADAPTFORMER, bias=True, seed=0, rank=RANK):
    down, up = names
    made = {
        f"{down}.weight": randn(rank, WIDTH, seed=seed),
        f"{up}.weight": randn(WIDTH, rank, seed=seed + 1),
    }
    if bias:
        made |= {f"{down}.bias": randn(rank, seed=seed + 2), f"{up}.bias": randn(WIDTH, seed=seed + 3)}
    return made


def adapt(made, x, f=F.relu, s=1.0):
    d, u, *biases = made.values()
    d_bias, u_bias = biases or (0, 0)
    return s * (f(x @ d.T + d_bias) @ u.T + u_bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bottleneck_is_its_formula(activation, bias):
    base, x, made = layer(WIDTH, WIDTH), randn(2, 7, WIDTH), tensors(bias=bias)
    f = ACTIVATIONS[activation]
    parallel = Bottleneck(made, activation, scale=0.1)
    close(parallel(x, base), base(x) + adapt(made, x, f, 0.1))
    sequential = Bottleneck(made, activation, "sequential", scale=0.1)
    close(sequential(x, base), base(x) + adapt(made, base(x), f, 0.1))


def test_names_choose_the_activation():
    assert Bottleneck(tensors()).activation == "relu"
    assert Bottleneck(tensors(AST)).activation == "gelu"


@pytest.mark.parametrize("kind", [Running, lambda fc2: fc2])
def test_adaptformer_block_writes_nothing_but_the_hidden(kind):
    """x + MLP(LN(x)) + s (U relu(D x + d) + u), the branch inside the second linear of the MLP."""
    fc1, fc2, x = layer(HIDDEN, WIDTH), layer(WIDTH, HIDDEN), randn(2, 7, WIDTH)
    made = tensors()
    adapter = Bottleneck(made, scale=0.1)
    h = F.gelu(fc1(F.layer_norm(x, (WIDTH,))))
    expected = x + fc2(h) + adapt(made, x, s=0.1)
    close(adapter(x, lambda x: x + fc2(F.gelu(fc1(F.layer_norm(x, (WIDTH,)))))), expected)
    linear = kind(fc2)
    close(run(linear, h, adapter.branch(x), residual=x), expected)
    if kind is Running:
        assert linear.hidden.shape == (2, 7, RANK)


def test_layer_norms():
    base, x = layer(WIDTH, WIDTH), randn(2, 7, WIDTH)
    norm = {f"adapter_layer_norm_before.{n}": randn(WIDTH, seed=i) for i, n in enumerate(("weight", "bias"))}
    made, affine = tensors(), tuple(norm.values())
    inner = Bottleneck(made | norm, layer_norm="in", scale=0.1)
    close(inner(x, base), base(x) + adapt(made, F.layer_norm(x, (WIDTH,), *affine), s=0.1))
    outer = Bottleneck(made | norm, layer_norm="out", scale=0.1)
    close(outer(x, base), base(x) + F.layer_norm(adapt(made, x, s=0.1), (WIDTH,), *affine))
    with pytest.raises(ValueError, match="has no branch"):
        outer.branch(x)
    check_round_trip(Bottleneck, made | norm, layer_norm="in")


def test_learned_scale_is_that_of_the_file():
    base, x, made = layer(WIDTH, WIDTH), randn(7, WIDTH), tensors()
    scaled = made | {"scale": torch.tensor([0.3], dtype=torch.float64)}
    close(Bottleneck(scaled)(x, base), base(x) + adapt(made, x, s=0.3))
    check_round_trip(Bottleneck, scaled)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_batch_of_adapters_is_the_loop(activation):
    base, x = layer(WIDTH, WIDTH), randn(5, 7, WIDTH)
    adapters = [
        Bottleneck(tensors(seed=0), activation, scale=0.1),
        Bottleneck(tensors(seed=5, rank=4), activation, scale=-2.0),
        Bottleneck(tensors(seed=9, bias=False), activation),
    ]
    ids = torch.tensor([2, 0, -1, 1, 0])
    expected = torch.stack([base(s) if i < 0 else adapters[i](s, base) for s, i in zip(x, ids, strict=True)])
    close(run(base, x, BottleneckStack(adapters).branch(x, ids)), expected)


def test_gradients_are_those_of_plain_torch():
    made, x = tensors(), randn(7, WIDTH)
    adapter = Bottleneck(made, scale=0.1).requires_grad_()
    adapter(x, lambda x: x).square().sum().backward()
    plain = {k: v.clone().requires_grad_() for k, v in made.items()}
    (x + adapt(plain, x, s=0.1)).square().sum().backward()
    for name, tensor in plain.items():
        close(adapter.tensor(name).grad, tensor.grad)


def conformer(k=5, bias=True, r=4):
    torch.manual_seed(0)
    parts = {
        "lnorm": nn.LayerNorm(WIDTH),
        "pwise_conv1": nn.Conv1d(WIDTH, 2 * r, 1, bias=bias),
        "dwise_conv": nn.Conv1d(r, r, k, groups=r, padding=k // 2, bias=bias),
        "bnorm": nn.BatchNorm1d(r),
        "pwise_conv2": nn.Conv1d(r, WIDTH, 1, bias=bias),
    }
    module = nn.ModuleDict(parts).double().eval()
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.copy_(randn(*p.shape, seed=i))
        module["bnorm"].running_mean.copy_(randn(r))
        module["bnorm"].running_var.copy_(randn(r).square() + 0.1)
    return module.requires_grad_(False)


def conformer_definition(m, x, compat):
    h = (x if compat else m["lnorm"](x)).transpose(1, 2)
    h = F.silu(m["bnorm"](m["dwise_conv"](F.glu(m["pwise_conv1"](h), 1))))
    return m["pwise_conv2"](h).transpose(1, 2)


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("k, bias", [(1, True), (5, True), (15, False)])
def test_conformer_adapter_is_the_unfolded_one(k, bias, compat):
    base, x, module = layer(WIDTH, WIDTH), randn(2, 9, WIDTH), conformer(k, bias)
    adapter = ConformerAdapter(module.state_dict(), compat=compat)
    close(adapter(x, base), base(x) + conformer_definition(module, x, compat))
    sequential = ConformerAdapter(module.state_dict(), "sequential", compat=compat)
    close(sequential(x, base), base(x) + conformer_definition(module, base(x), compat))
    close(run(base, x, adapter.branch(x)), adapter(x, base))
    check_round_trip(ConformerAdapter, module.state_dict())


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_even_kernels_pad_as_torch_does():
    module, x = conformer(5), randn(2, 9, WIDTH)
    module["dwise_conv"] = nn.Conv1d(4, 4, 8, groups=4, padding="same").double().requires_grad_(False)
    adapter = ConformerAdapter(module.state_dict())
    close(adapter(x, lambda x: x), x + conformer_definition(module, x, False))


def test_kernel_one_is_a_gated_bottleneck():
    module, x = conformer(1), randn(2, 9, WIDTH)
    adapter = ConformerAdapter(module.state_dict(), compat=True)
    w, b = adapter.folded(torch.float64)
    p1, p2 = module["pwise_conv1"], module["pwise_conv2"]
    hidden = F.silu(F.glu(x @ p1.weight[..., 0].T + p1.bias) * w[:, 0, 0] + b)
    close(adapter.adapt(x), hidden @ p2.weight[..., 0].T + p2.bias)


def test_ast_blocks():
    ffn = {f"adapter_module_FFN.{k}": v for k, v in tensors(AST).items()}
    mhsa = {f"adapter_module_MHSA.{k}": v for k, v in conformer().state_dict().items()}
    assert list(ast_adapters(ffn, "pfeiffer")) == ["FFN"]
    both = ast_adapters(ffn | mhsa, "houlsby", position="sequential")
    assert isinstance(both["MHSA"], ConformerAdapter) and both["FFN"].position == "sequential"
    with pytest.raises(
        ValueError, match=r"pfeiffer has adapter_module_FFN, got adapter_module_MHSA.lnorm.weight"
    ):
        ast_adapters(mhsa | ffn, "pfeiffer")
    with pytest.raises(ValueError, match=r"missing: down_proj.weight"):
        ast_adapters(ffn, "houlsby")
    with pytest.raises(ValueError, match="design must be one of pfeiffer, houlsby, got 'both'"):
        ast_adapters(ffn, "both")


@pytest.mark.parametrize("names", [ADAPTFORMER, AST])
def test_bottleneck_round_trip(names):
    check_round_trip(Bottleneck, tensors(names))
    check_round_trip(Bottleneck, tensors(names, bias=False))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Bottleneck(tensors()).merged(randn(WIDTH, WIDTH)), "its activation is not affine in x"),
        (
            lambda: ConformerAdapter(conformer().state_dict()).merged(randn(2, 2)),
            "a conformer adapter cannot be merged",
        ),
        (
            lambda: Bottleneck(tensors(), "tanh"),
            "activation must be one of relu, gelu, gelu_tanh, silu, got 'tanh'",
        ),
        (lambda: Bottleneck(tensors(), position="after"), "position must be"),
        (lambda: Bottleneck(tensors(), layer_norm="both"), "layer_norm must be"),
        (lambda: Bottleneck(tensors() | {"gate": randn(2)}), "unknown: gate"),
        (
            lambda: Bottleneck({"down_proj.weight": randn(3, 12), "up_proj.weight": randn(12, 4)}),
            r"D \[r, in\], U \[out, r\] required, got \[3, 12\], \[12, 4\]",
        ),
        (
            lambda: ConformerAdapter(conformer().state_dict()).branch(randn(9, WIDTH)),
            r"must be \[batch, tokens, in\]",
        ),
        (
            lambda: ConformerAdapter(conformer().state_dict() | {"pwise_conv2.weight": randn(12, 3, 1)}),
            r"width r = 4 has .* got \[8, 12, 1\] and \[12, 3, 1\]",
        ),
        (
            lambda: BottleneckStack([Bottleneck(tensors()), Bottleneck(tensors(), "gelu")]),
            "one activation and shape",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_no_low_rank_form():
    assert Bottleneck(tensors()).factors(randn(WIDTH, WIDTH)) is None
