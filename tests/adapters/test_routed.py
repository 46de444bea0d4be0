import pytest
import torch

from rfkernels.adapters.base import run
from rfkernels.adapters.routed import MoLA, Poly, route
from tests.adapters.layers import Running, check_factors, check_merge, check_round_trip, close, layer, randn

OUT, IN, RANK, EXPERTS = 10, 12, 3, 4


def experts(name="", ranks=(RANK,) * EXPERTS):
    made = {f"{name}router.router.weight": randn(len(ranks), IN, seed=9)}
    for e, rank in enumerate(ranks):
        made[f"lora_A.{name and name[:-1] + '_'}{e}.weight"] = randn(rank, IN, seed=e)
        made[f"lora_B.{name and name[:-1] + '_'}{e}.weight"] = randn(OUT, rank, seed=e)
    return made


def mola_definition(made, x, alpha, k):
    """Token by token, expert by expert."""
    router, *pairs = made.values()
    rows = []
    for token in x.reshape(-1, IN):
        p = (router @ token).softmax(0)
        best = sorted(range(len(p)), key=lambda e: (-p[e].item(), e))[:k]
        total = sum(p[e] for e in best)
        rows.append(
            sum(
                p[e] / total * alpha / len(pairs[2 * e]) * pairs[2 * e + 1] @ pairs[2 * e] @ token
                for e in best
            )
        )
    return torch.stack(rows).view(*x.shape[:-1], OUT)


@pytest.mark.parametrize("ranks", [(3, 3, 3, 3), (2, 4, 1, 3)])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_mola_is_the_loop_over_tokens_and_experts(k, ranks):
    base, x, made = layer(OUT, IN), randn(2, 7, IN), experts(ranks=ranks)
    adapter = MoLA(made, alpha=6.0, k=k)
    expected = base(x) + mola_definition(made, x, 6.0, k)
    close(adapter(x, base), expected)
    for kind in (base, Running(base)):
        close(run(kind, x, adapter.branch(x)), expected)
    assert adapter.branch(x)[0].shape == (2, 7, sum(ranks))
    assert (adapter.gates(x) > 0).sum(-1).unique().tolist() == [k]


def test_one_expert_is_a_lora():
    base, x, made = layer(OUT, IN), randn(7, IN), experts(ranks=(3,))
    _, a, b = made.values()
    close(MoLA(made, k=1)(x, base), base(x) + x @ a.T @ b.T)


def test_route_is_softmax_then_top_k_then_renormalise():
    logits = randn(5, 6)
    p = logits.softmax(-1)
    top = p.topk(2, -1)
    expected = torch.zeros_like(p).scatter(-1, top.indices, top.values / top.values.sum(-1, keepdim=True))
    close(route(logits, 2), expected)
    assert route(torch.zeros(4), 2).tolist() == [0.5, 0.5, 0, 0]  # of equal logits the first
    close(route(logits, 6), p)


@pytest.mark.parametrize("name", ["", "default."])
def test_mola_round_trip(name):
    check_round_trip(MoLA, experts(name))


def test_mola_refusals():
    made = experts()
    with pytest.raises(ValueError, match="every token chooses its experts"):
        MoLA(made).merged(randn(OUT, IN))
    assert MoLA(made).factors(randn(OUT, IN)) is None
    with pytest.raises(ValueError, match=r"got A \[0, 1, 2, 3\], B \[0, 1, 2\], 1 routers"):
        MoLA({k: v for k, v in made.items() if k != "lora_B.3.weight"})
    with pytest.raises(ValueError, match="unknown: lora_gate"):
        MoLA(made | {"lora_gate": randn(2)})
    with pytest.raises(ValueError, match=r"k of 1 .. 4 required, got \[4, 12\], k 5"):
        MoLA(made, k=5)
    with pytest.raises(ValueError, match=r"k must be 1 .. 6, got 0"):
        route(randn(5, 6), 0)


TASKS, SKILLS, SPLITS = 4, 5, 2


def poly(splits=SPLITS, skills=SKILLS):
    return {
        "poly_lora_A": randn(splits, skills, IN // splits, RANK),
        "poly_lora_B": randn(splits, skills, RANK, OUT // splits),
        "poly_router.module_logits": randn(TASKS, splits * skills),
    }


def mttl(made):
    a, b, logits = made.values()
    return {
        "lora_a": a.transpose(0, 1).contiguous(),
        "lora_b": b.permute(1, 2, 0, 3).contiguous(),
        "module_logits": logits,
    }


def poly_definition(made, x, task, scale):
    a, b, logits = made.values()
    splits, skills = a.shape[:2]
    g = logits[task].view(splits, skills).sigmoid()
    w = g / (g.sum(-1, keepdim=True) + 1e-12)
    down = torch.cat([sum(w[q, s] * a[q, s] for s in range(skills)) for q in range(splits)])
    up = torch.cat([sum(w[q, s] * b[q, s] for s in range(skills)) for q in range(splits)], 1)
    return scale * x @ down @ up


@pytest.mark.parametrize("splits, skills", [(2, 5), (1, 5), (1, 1)])
def test_poly_is_its_formula_and_merges_per_task(splits, skills):
    base, x, made = layer(OUT, IN), randn(2, 7, IN), poly(splits, skills)
    for task in range(TASKS):
        adapter = Poly(made, task=task)
        close(adapter(x, base), base(x) + poly_definition(made, x, task, 1 / RANK))
        check_merge(adapter, base, x)
        check_factors(adapter, base, x)
    if splits == skills == 1:
        a, b = made["poly_lora_A"][0, 0], made["poly_lora_B"][0, 0]
        close(adapter(x, base), base(x) + x @ a @ b / RANK)


@pytest.mark.parametrize("lead", [(4,), (4, 7), (4, 2, 3)])
def test_a_batch_of_tasks_is_the_loop(lead):
    base, x, adapter = layer(OUT, IN), randn(*lead, IN), Poly(poly())
    tasks = torch.tensor([2, 0, 3, 2])
    expected = torch.stack([adapter(s, base, task=t) for s, t in zip(x, tasks.tolist(), strict=True)])
    close(adapter(x, base, task=tasks), expected)


def test_layouts_are_one_adapter():
    base, x, made = layer(OUT, IN), randn(7, IN), poly()
    close(Poly(mttl(made), task=1, alpha=1.0)(x, base), Poly(made, task=1)(x, base))
    close(Poly(mttl(made), task=1, alpha=6.0)(x, base), base(x) + poly_definition(made, x, 1, 2.0))
    for tensors, hyper in ((made, {}), (mttl(made), {"alpha": 1.0})):
        check_round_trip(Poly, tensors, **hyper)
    named = {
        k.replace("_lora_A", "_lora_A.default").replace("_lora_B", "_lora_B.default"): v
        for k, v in made.items()
    }
    named["poly_router.default.module_logits"] = named.pop("poly_router.module_logits")
    check_round_trip(Poly, named)
    close(Poly(named, task=1)(x, base), Poly(made, task=1)(x, base))


def test_mean_of_the_skills_where_there_are_no_logits():
    """MHR-mu."""
    base, x, made = layer(OUT, IN), randn(2, 7, IN), poly()
    logits = made.pop("poly_router.module_logits")
    adapter = Poly(made)
    expected = poly_definition(made | {"z": torch.zeros_like(logits)}, x, 0, 1 / RANK)
    torch.testing.assert_close(
        adapter(x, base), base(x) + expected, rtol=1e-10, atol=1e-10
    )  # 1e-12 in the weights
    check_merge(adapter, base, x)
    close(adapter(x, base, task=torch.tensor([0, 1])), adapter(x, base))


def test_merge_after_has_no_cross_terms():
    base, x, made = layer(OUT, IN), randn(7, IN), mttl(poly(splits=1))
    adapter = Poly(made, task=2, alpha=6.0, merge_after=True)
    g = made["module_logits"][2].sigmoid()
    w = g / g.sum()
    expected = sum(w[s] * x @ made["lora_a"][s, 0] @ made["lora_b"][s, :, 0] for s in range(SKILLS))
    torch.testing.assert_close(adapter(x, base), base(x) + 2 * expected, rtol=1e-10, atol=1e-10)
    check_merge(adapter, base, x)
    assert (Poly(made, task=2, alpha=6.0)(x, base) - adapter(x, base)).abs().max() > 1e-3


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Poly(poly()).merged(randn(OUT, IN)), r"a task of 0 .. 3 required, got none"),
        (lambda: Poly(poly(), task=4).merged(randn(OUT, IN)), r"task must be 0 .. 3, got 4"),
        (lambda: Poly(poly(), task=0).merged(randn(OUT, 11)), r"for a weight \[10, 12\], got \[10, 11\]"),
        (lambda: Poly(mttl(poly())), "mttl's files need alpha"),
        (lambda: Poly(poly(), merge_after=True), "merge_after has one split, got 2"),
        (lambda: Poly(poly() | {"poly_lora_B": randn(2, 4, 3, 5)}), r"got \[2, 5, 6, 3\], \[2, 4, 3, 5\]"),
        (lambda: Poly(poly() | {"poly_router.module_logits": randn(4, 9)}), r"logits must be \[tasks, 10\]"),
        (lambda: Poly({"poly_lora_A": randn(2, 5, 6, 3)}), "missing: .'poly_lora_B'"),
        (lambda: Poly(poly() | {"scale": randn(1)}), "unknown: .'scale'"),
        (
            lambda: Poly(poly())(randn(3, 7, IN), layer(OUT, IN), task=torch.tensor([0, 1])),
            r"one task per sample, \[3\], required, got \[2\]",
        ),
        (
            lambda: Poly(poly(splits=1), merge_after=True)(
                randn(2, IN), layer(OUT, IN), task=torch.tensor([0, 1])
            ),
            "take one task, got a tensor",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_no_low_rank_form_without_a_task():
    assert Poly(poly()).factors(randn(OUT, IN)) is None


def test_poly_is_that_of_peft():
    peft = pytest.importorskip("peft")
    base, x = layer(OUT, IN), randn(3, 7, IN)
    config = peft.PolyConfig(
        target_modules=["0"],
        r=RANK,
        n_tasks=TASKS,
        n_skills=SKILLS,
        n_splits=SPLITS,
        init_weights=False,
        poly_type="poly",
    )
    wrapped = peft.get_peft_model(torch.nn.Sequential(layer(OUT, IN)), config).double().eval()
    state = peft.get_peft_model_state_dict(wrapped)
    made = {k.removeprefix("base_model.model.0."): v.clone() for k, v in state.items()}
    made["poly_router.module_logits"].copy_(randn(TASKS, SKILLS * SPLITS))
    state["base_model.model.0.poly_router.module_logits"].copy_(made["poly_router.module_logits"])
    tasks = torch.tensor([1, 3, 1])
    with torch.no_grad():
        expected = wrapped.base_model.model[0](x, task_ids=tasks)
    assert (expected - base(x)).abs().max() > 1e-3
    close(Poly(made)(x, base, task=tasks), expected)
